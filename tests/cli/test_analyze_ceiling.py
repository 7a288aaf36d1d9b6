"""`hf-recycle analyze --ceiling` as users run it."""

import json

import pytest
from support.simulated_runs import write_run
from support.text_model import save_text_model
from transformers import BertForMaskedLM, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from hf_recycle.card.card import write_card
from hf_recycle.cli.main import main
from hf_recycle.records import files


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT with ReLU and its tokenizer; five neurons of its first block can't fire."""

    def kill(model):
        model.bert.encoder.layer[0].intermediate.dense.bias[5:10] = -10.0

    return save_text_model(tmp_path, kill, hidden_act="relu")


def words(folder, *more):
    text = str(folder.parent / "text.txt")
    return ["analyze", str(folder), "--ceiling", "--eval_file", text, "--batch_size", "4", *more]


def test_a_causal_model_that_does_not_need_its_neurons(folder, capsys):
    """Random weights: nothing has been learnt that could be lost."""
    config = GPT2Config(vocab_size=256, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=1e-3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    assert main(words(folder, "--shares", "0.25")) == 0
    out = capsys.readouterr().out
    assert "GPT2LMHeadModel, 64 neurons in 1 feed-forward block; loss " in out
    assert "Nothing to recycle here: " in " ".join(out.split())
    assert f"hf-recycle shrink {folder} --fraction 0." in out


def test_json_and_a_figure(folder, capsys):
    assert main(words(folder, "--json", "--output", str(folder.parent / "figures"), "--shares", "0.2")) == 0
    [found] = json.loads(capsys.readouterr().out)["models"]
    assert {name: found[name] for name in ("task", "text", "neurons", "pruned", "dead", "parameters")} == {
        **{"task": "mlm", "text": "text.txt", "neurons": 80, "pruned": 0, "dead": 5},
        "parameters": BertForMaskedLM.from_pretrained(folder).num_parameters(),
    }
    first, second = found["blocks"]
    assert first["indices"]["dead"] == [5, 6, 7, 8, 9]
    assert set(first) == set(second) == {"name", "neurons", "dead", "dormant", "duplicate", "cost", "sd", "indices"}
    assert [point["share"] for point in found["curve"]] == [0.2, 0.5]
    assert {"loss", "cost", "sd", "parameters", "flops"} < set(found["curve"][0])
    assert found["thresholds"] == {"dormant": 0.025, "worth_recycling": 0.2, "removed": 0.5, "noise_sds": 3}
    for suffix in (".png", ".svg"):
        assert (folder.parent / "figures" / f"ceiling{suffix}").stat().st_size > 5000


@pytest.mark.slow
def test_the_card_of_a_run_and_its_report_say_it(folder, capsys):
    write_run(folder, blocks=("bert.encoder.layer.0", "bert.encoder.layer.1"), magnitudes=False, losses=False)
    assert main(words(folder, "--json", "--card", "--shares", "0.2")) == 0
    [found] = json.loads(capsys.readouterr().out)["models"]
    card = (folder / "README.md").read_text()
    assert "## Which neurons matter" in card
    assert "| layer.0 | 40 | 5 | 5 | 0 |" in card
    assert all(f" {word}" in card for word in found["verdict"]["sentences"][0].split()[1:8])
    assert "figures/ceiling.png" in card
    assert (folder / "figures" / "ceiling.png").stat().st_size > 5000
    assert main(["report", str(folder), "--output", str(folder.parent / "report.html")]) == 0
    assert "Which neurons matter" in (folder.parent / "report.html").read_text()

    # Of another model of the same folder the card does not say it.
    stats = json.loads((folder / files.STATS_FILE).read_text()) | {"step": 41}
    files.write_stats(folder, stats)
    write_card(folder)
    assert "Which neurons matter" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"found_in": 3}', "DELETED KEY", "A TEXT FOR A NUMBER"])
def test_a_damaged_file_is_left_out_of_the_card(folder, content):
    from hf_recycle.records.ceiling_file import CEILING_FILE, read_ceiling, write_ceiling

    write_run(folder)
    row = dict.fromkeys(("neurons", "dead", "dormant", "duplicate", "cost", "sd"), 1)
    point = dict.fromkeys(("share", "loss", "cost", "sd", "parameters", "flops"), 0.5)
    whole = {"text": "t", "verdict": {"sentences": ["s"]}, "blocks": [{"name": "a", **row}], "curve": [point]}
    write_ceiling(folder, whole)
    assert read_ceiling(folder)["curve"] == [point]
    if content == "DELETED KEY":
        write_ceiling(folder, {**whole, "curve": [{"share": 0.5}]})
    elif content == "A TEXT FOR A NUMBER":
        write_ceiling(folder, {**whole, "curve": [point | {"loss": "<b>"}]})
    else:
        (folder / CEILING_FILE).write_text(content)
    assert read_ceiling(folder) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--criteria", "random"], "criteria belongs to prune_curve"),
        (["--prune_curve"], "ceiling does not go with prune_curve; leave one of them out"),
        (["--revisions", "all"], "ceiling does not go with revisions"),
        (["--batch_size", "256"], "gives one batch of 256 sequences to measure on, and noise can't be told from one"),
        (["--card"], "card needs a folder that a RecyclingTrainer has saved"),
        (["--shares", "2"], "shares='2' must be numbers in [0, 1]"),
    ],
)
def test_what_does_not_work_is_one_sentence(folder, capsys, more, message):
    assert main(words(folder, *more)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_text_that_can_not_be_read_is_named_as_it_was_given(folder, tmp_path, capsys):
    text = tmp_path / "bytes.txt"
    text.write_bytes(bytes(range(256)))
    assert main(["analyze", str(folder), "--ceiling", "--eval_file", str(text)]) == 2
    assert f"error: eval_file={str(text)!r} could not be read as text" in capsys.readouterr().err


def test_a_model_of_images_and_a_missing_text_are_refused(folder, tmp_path, capsys):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    assert main(words(tmp_path / "vit")) == 2
    assert "vit is a ViTForImageClassification: a loss on a text needs a model with" in capsys.readouterr().err
    assert main(["analyze", str(folder), "--ceiling"]) == 2
    assert capsys.readouterr().err == "error: ceiling needs a text to measure the loss on; pass eval_file\n"
