"""`hf-recycle analyze REPO` and `--revisions`, against the Hub of the tests."""

import json

import pytest
import torch
from hub_server import ALICE
from huggingface_hub import HfApi
from support.simulated_runs import write_run
from transformers import BertConfig, BertForMaskedLM

from hf_recycle import neuron_magnitudes
from hf_recycle.analysis.revisions import analyze_revisions
from hf_recycle.cli.main import main
from hf_recycle.errors import UserError
from hf_recycle.records.files import RECYCLING_FILES

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the client's own


def model(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=31, **sizes))


@pytest.fixture
def repo(online, hub, tmp_path):
    """Two models, then one with recycling files, and a change of the card at the end."""
    api = HfApi(endpoint=hub.url, token=ALICE)
    name = api.create_repo("alice/revisions", exist_ok=True).repo_id
    for seed in (1, 2):
        model(seed).save_pretrained(tmp_path / str(seed))
        api.upload_folder(repo_id=name, folder_path=tmp_path / str(seed), commit_message=f"model {seed}")
    api.create_tag(name, tag="second")
    (tmp_path / "3").mkdir()
    write_run(tmp_path / "3")
    api.upload_folder(repo_id=name, folder_path=tmp_path / "3", commit_message="recycling")
    api.upload_file(path_or_fileobj=b"# A model", path_in_repo="README.md", repo_id=name)
    yield name
    api.delete_repo(name)


def test_all_revisions(repo, hub, tmp_path, capsys):
    states = analyze_revisions(repo, "all")

    assert [state.step for state in states] == [None, None, 40]
    assert states[1].name == "second"
    for state, seed in zip(states[:2], (1, 2), strict=True):
        for block, magnitudes in neuron_magnitudes(model(seed)).items():
            assert state.quantiles[block]["0.5"] == pytest.approx(float(magnitudes.quantile(0.5)), rel=1e-5)
    stats = json.loads((tmp_path / "3" / RECYCLING_FILES[3]).read_text())
    assert states[2].ever_recycled == stats["neurons"]["share_ever_recycled"] > 0
    assert states[2].times_recycled["encoder.layer.0"] == stats["blocks"][0]["recycling_events"] / 40

    assert main(["analyze", repo, "--revisions", "all", "--json", "--output", str(tmp_path / "figures")]) == 0
    printed = json.loads(capsys.readouterr().out)["revisions"]
    assert [state["name"] for state in printed] == [state.name for state in states]
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {f"revision_{what}.{kind}" for what in ("magnitudes", "counts") for kind in ("png", "svg")}


def test_commits_without_weights_that_can_be_read_are_left_out(online, hub, tmp_path, capsys):
    """Of a repository that began with a configuration, then had pickled weights, then shards of safetensors."""
    api = HfApi(endpoint=hub.url, token=ALICE)
    name = api.create_repo("alice/early", exist_ok=True).repo_id
    early, sharded = tmp_path / "early", tmp_path / "sharded"
    model(1).config.save_pretrained(early)
    api.upload_folder(repo_id=name, folder_path=early, commit_message="config")
    torch.save(model(1).state_dict(), early / "pytorch_model.bin")
    api.upload_folder(repo_id=name, folder_path=early, commit_message="pickled")

    assert main(["analyze", name, "--revisions", "all"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {name} holds no model at any revision")
    assert "\n" not in error

    model(2).save_pretrained(sharded, max_shard_size="8KB")
    assert (sharded / "model.safetensors.index.json").exists()
    commit = api.upload_folder(repo_id=name, folder_path=sharded, commit_message="sharded").oid
    api.upload_folder(repo_id=name, folder_path=early, commit_message="pickled, too", path_in_repo="old")

    (state,) = analyze_revisions(name, "all")
    assert state.commit == commit
    for block, magnitudes in neuron_magnitudes(model(2)).items():
        assert state.quantiles[block]["0.5"] == pytest.approx(float(magnitudes.quantile(0.5)), rel=1e-5)


def test_named_revisions_and_one_revision(repo, capsys):
    assert main(["analyze", repo, "--revisions", "second,main"]) == 0
    assert "second" in capsys.readouterr().out
    assert main(["analyze", repo, "--revision", "second", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"][0]
    magnitudes = next(iter(neuron_magnitudes(model(2)).values()))
    assert found["blocks"][0]["quantiles"]["1"] == pytest.approx(float(magnitudes.max()), rel=1e-5)
    assert len(found["revision"]) == 40


def test_what_can_not_be_found(repo, tmp_path, capsys):
    for words, message in (
        (["alice/none"], "it is no folder here, and there is no such repository"),
        (["alice/none", "--revisions", "all"], "there is no such repository"),
        ([repo, "--revision", "gone"], "has no such revision"),
    ):
        assert main(["analyze", *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="is a folder"):
        analyze_revisions(str(tmp_path), "all")
