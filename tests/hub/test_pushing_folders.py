"""`hf-recycle push` of folders that are no plain output folder of a run of ours."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from hf_recycle.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the client's own


@pytest.fixture
def folder(tmp_path):
    """A model without recycling files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=31, **sizes)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.filterwarnings("ignore:Warnings while validating metadata:UserWarning")
@pytest.mark.parametrize(
    ("header", "published"),
    [
        ("", ""),
        ("---\n\n---\n", ""),
        ("---\n- a\n- list\n---\n", "\n```yaml\n- a\n- list\n```\n"),
        ("---\nnot: [closed\n---\n", "\n```yaml\nnot: [closed\n```\n"),
    ],
)
def test_a_card_without_a_valid_header(online, hub, folder, request, header, published):
    """It is published where there is none, and replaces none: without our marks, nobody knows what in it is ours."""
    name = f"alice/card-{request.node.callspec.indices['header']}"
    for change in ("", "More.\n"):
        (folder / "README.md").write_text(f"{header}# By hand\n{change}")
        assert main(["push", str(folder), name]) == 0
        assert hub.store.read(name, "README.md").decode() == f"{published}# By hand\n"


def test_of_a_studys_run_nothing_names_a_folder_of_this_machine(online, hub, folder):
    private = b"output_dir: /mnt/lab/wanda/study\n"
    for file in ("study_settings.yaml", "study_result.json", "study_prune_curves.json", "study.log", ".study.lock"):
        (folder / file).write_bytes(private)
    assert main(["push", str(folder), "alice/study"]) == 0
    published = hub.store.paths("alice/study")
    assert "model.safetensors" in published
    for path in published:
        assert b"wanda" not in hub.store.read("alice/study", path), path
    assert not [path for path in published if "study" in path]
