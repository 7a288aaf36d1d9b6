"""Other widths on the command line: `hf-recycle resize`, and stages one after another, also interrupted ones."""

import json
from pathlib import Path

import pytest
import torch
from support.english import english
from transformers import AutoModelForMaskedLM

from hf_recycle import RecyclingHistory, find_feed_forwards
from hf_recycle.cli.main import main
from hf_recycle.data.stages import Stages
from hf_recycle.errors import UserError
from hf_recycle.runs.parse import parse_run
from hf_recycle.runs.stages import check_stages

pytestmark = pytest.mark.usefixtures("figures_not_drawn")

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"


@pytest.fixture
def words(tmp_path):
    """A run of 8 steps: half the neurons at first, all from step 3 on."""
    text = tmp_path / "train.txt"
    text.write_text("\n".join(english(800)))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"model_type: bert\nconfig_overrides: {TINY}\ntrain_file: {text}\ntokenizer_vocab_size: 500\n"
        "max_seq_length: 32\nper_device_train_batch_size: 4\nmax_steps: 8\nsave_steps: 2\nlogging_steps: 1\n"
        "max_eval_samples: 8\nrecycle_steps: 2\nrecycle_fraction: 0.25\nrecycle_maturity: 4\ndisable_tqdm: true\n"
        "use_cpu: true\nff_stages: {0: 0.5, 0.3: 1.0}\nsave_total_limit: 10\n"
    )
    return ["train", str(recipe), "--output_dir", str(tmp_path / "out")]


def width(folder) -> int:
    return find_feed_forwards(AutoModelForMaskedLM.from_pretrained(folder))[0].num_neurons


def rates(folder) -> list[float]:
    rows = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return [row["learning_rate"] for row in rows if "learning_rate" in row]


@pytest.mark.slow
def test_a_resized_checkpoint_goes_on_by_the_recipe_of_its_run(words, tmp_path, capsys):
    plain = [*words, "--ff_stages", "null", "--max_steps", "8"]
    assert main(plain) == 0
    resize = ["resize", str(tmp_path / "out" / "checkpoint-4"), "--width", "48", "--birth", "gradmax", "--json"]
    resize += ["--eval_file", str(tmp_path / "train.txt"), "--output", str(tmp_path / "wide" / "checkpoint-4")]
    capsys.readouterr()
    assert main(resize) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["widths"] == {"bert.encoder.layer.0": [32, 48]}
    assert told["losses"][0] == pytest.approx(told["losses"][1], abs=1e-5)
    plain[plain.index("--output_dir") + 1] = str(tmp_path / "wide")
    assert main([*plain, "--resume_from_checkpoint", "true", "--dry_run"]) == 0
    assert "1 feed-forward block x 48 neurons" in capsys.readouterr().out
    assert main([*plain, "--resume_from_checkpoint", "true"]) == 0
    assert width(tmp_path / "wide") == 48
    assert rates(tmp_path / "wide") == rates(tmp_path / "out")
    assert main(resize) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "width is missing"),
        (["--width", "8"], "output is missing"),
        (["--width", "8", "--output", "new", "--birth", "spilt"], "birth='spilt' is unknown; did you mean split?"),
        (["--width", "8", "--output", "new", "--criterion", "fisher"], "criterion='fisher' looks at what neurons do"),
        (["--width", "8", "--output", "new"], "'nowhere' is no folder; name a checkpoint-N folder of a run"),
    ],
)
def test_mistakes_in_resize_are_one_line(more, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["resize", "nowhere", *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_stages_run_one_after_another_with_one_schedule(words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*words, "--dry_run"]) == 0
    assert "stages      from step 0 on 0.5 of the neurons, from step 3 on 1 of the neurons" in capsys.readouterr().out
    assert main(words) == 0
    assert "stage at step 3: 16 -> 32 neurons" in capsys.readouterr().out
    assert [width(out / f"checkpoint-{step}") for step in (2, 3, 4, 8)] == [16, 32, 32, 32]
    assert width(out) == 32
    assert rates(out) == pytest.approx([5e-5 * (8 - step) / 8 for step in range(8)])
    history = RecyclingHistory.from_pretrained(out)
    assert history.resizes["step"].tolist() == [3]
    # Newborn neurons are left alone until step 3 + 4.
    at_4, at_6 = (history.events.set_index("step").loc[step] for step in (4, 6))
    assert max(at_4["recycled"], default=0) < 16
    assert max(at_6["recycled"], default=0) < 16
    assert at_4["eligible"] < 16


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_its_stage(words, tmp_path, monkeypatch, capsys):
    """Stopped before, between and after the change of width, and resumed by the same command: the same weights."""
    assert main(words) == 0
    whole = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").state_dict()
    words[-1] = str(tmp_path / "again")
    resumed = [*words, "--resume_from_checkpoint", "true"]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the first stage, before the resize
        patch.setattr("hf_recycle.analysis.resize_checkpoint.install", killed)
        assert main(words) == 130
    assert width(tmp_path / "again" / "checkpoint-3") == 16
    with monkeypatch.context() as patch:  # after the resize
        patch.setattr("hf_recycle.runs.run.RecyclingTrainer.train", killed)
        assert main(resumed) == 130
    assert width(tmp_path / "again" / "checkpoint-3") == 32
    assert main(resumed) == 0
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "must map steps"),
        ({0.5: 1.0}, "must map steps"),
        ({0: 0.5, 0.1: 1.5}, "must map steps"),
        ({0: 0.0, 0.1: 1.0}, "must map steps"),
        ({0: 0.5, 10.5: 1.0}, "must map steps"),
        ({0: "half"}, "must map steps"),
        ({0: 0.5, 5: 0.5}, "two stages of one width"),
    ],
)
def test_stages_that_are_none(given, message):
    with pytest.raises(UserError, match=message):
        Stages.of(given)


def test_stages_in_steps():
    stages = Stages.of({"0": 0.5, "0.1": 1, "60": 0.25}).in_steps(100)
    assert (stages.starts, stages.shares) == ((0, 10, 60), (0.5, 1.0, 0.25))
    assert [stages.end_after(step) for step in (0, 9, 10, 60, 99)] == [10, 10, 60, None, None]
    assert [stages.change_at(step) for step in (0, 10, 11, 60)] == [None, (0.5, 1.0), None, (1.0, 0.25)]
    for given in ({0: 0.5, 0.001: 1.0, 1: 0.25}, {0: 0.5, 200: 1.0}, {0: 0.5, 0.9: 1.0, 20: 0.5}):
        with pytest.raises(UserError, match="each must begin later than the one before it, and before the end"):
            Stages.of(given).in_steps(100)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model_name_or_path", "somewhere"], "begins with the share 0.5"),
        (["--l2_init_weight", "0.1"], "l2_init_weight=0.1 can't be used with ff_stages"),
        (["--save_only_model", "true"], "save_only_model=True can't be used with ff_stages"),
        (["--resume_from_checkpoint", "hf://user/repo"], "ff_stages go on from a folder"),
    ],
)
def test_runs_that_can_not_be_staged_are_refused(more, message, words, capsys):
    if "--model_name_or_path" in more:
        more = [*more, "--config_overrides", "null", "--model_type", "null"]
    assert main([*words, *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ff_stages can't be used with DeepSpeed"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "ff_stages can't be used on several machines"),
    ],
)
def test_engines_whose_checkpoints_can_not_be_resized_are_refused(environment, message, words, monkeypatch):
    arguments = parse_run(words[1:])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_stages(arguments)


def test_other_launchers_are_refused(words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    assert "start it with --accelerate_config in place of accelerate launch" in capsys.readouterr().err
