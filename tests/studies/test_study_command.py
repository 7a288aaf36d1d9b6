"""`hf-recycle study` on its command line: mistakes, and real small studies."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_recycle import __version__
from hf_recycle.cli.main import main
from hf_recycle.studies.plan_file import load_study

STUDY = """\
title: A tiny study
seeds: 1
baseline: baseline
control: {lower: baseline, higher: plain}
recipes: tiny.yaml
arms:
  baseline: {}
  plain: {recipes: plain, about: recycled}
figures:
  - {kind: losses, title: Losses}
  - {kind: prune_curves, title: One-shot pruning, arms: [baseline]}
statements: [one_shot_pruning_order, magnitudes_form_two_groups, vicious_cycle]
"""


def tiny(folder):
    """A recipe of a model and a text that train in seconds."""
    words = [f"w{i}" for i in range(60)]
    lines = [" ".join(words[(i * j) % 60] for j in range(1, 30)) for i in range(1, 200)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "tiny.yaml").write_text(
        "model_type: bert\n"
        "config_overrides: hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=40,"
        "max_position_embeddings=32\n"
        f"tokenizer_vocab_size: 256\nmax_seq_length: 16\ntrain_file: {folder / 'text.txt'}\nmax_eval_samples: 8\n"
        "per_device_train_batch_size: 4\nmax_steps: 80\neval_strategy: steps\neval_steps: 40\nsave_steps: 40\n"
        "magnitude_steps: 60\nlogging_steps: 40\n"
    )
    (folder / "study.yaml").write_text(STUDY.replace("tiny.yaml", str(folder / "tiny.yaml")))
    return folder / "study.yaml"


@pytest.fixture
def study(tmp_path):
    return tiny(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: STUDY"),
        (["articel"], r"study 'articel' .*did you mean article\?"),
        (["article", "--arms", "plian"], r"has no arm 'plian'; did you mean plain\?"),
        (["article", "--arms", ","], "no arm is named"),
        (["article", "--scale", "laptob"], r"recipe 'scale/laptob' .*did you mean scale/laptop\?"),
        (["article", "--seeds", "none"], "seeds='none' must be a number of seeds"),
        (["article", "--jobs", "0"], "jobs=0 must be at least 1"),
        (["article", "--jobs", "many"], "argument --jobs: invalid int value: 'many'"),
        (["article", "--max_step", "3"], r"unknown argument --max_step; did you mean --max_steps\?"),
        (["article", "--learning_rate", "fast"], "argument --learning_rate: invalid float value: 'fast'"),
        (["article", "--recycle_fraction", "7"], "arm 'baseline': .*recycle_fraction"),
        (["article", "--seed", "3"], "command line: seed is not a setting of a study; use the study's seeds"),
        (["article", "--max_steps"], "argument --max_steps: expected one argument"),
        (["article", "--streaming", "maybe"], "argument --streaming: 'maybe' must be true or false"),
        (["article", "--eval_strategy", "no"], "eval_strategy=no leaves nothing to compare"),
        (["article", "article"], "two of the studies are called 'article'"),
    ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    assert main(["study", "--help"]) == 0
    text = capsys.readouterr().out
    assert "packaged studies (article, article-facts, " in " ".join(text.split())
    assert "--report_only" in text
    assert main(["--help"]) == 0
    assert "study" in capsys.readouterr().out


def test_an_arm_that_cannot_work_is_told_before_the_others_start(study, tmp_path, capsys):
    text = study.read_text().replace("recipes: plain", "recipes: plain, settings: {recycle_selektion: random}")
    study.write_text(text)
    assert main(["study", str(study), "--output", str(tmp_path / "out")]) == 2
    assert re.search(
        "arm 'plain': unknown argument recycle_selektion; did you mean recycle_selection", capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_report_of_nothing(study, tmp_path, capsys):
    assert main(["study", str(study), "--output", str(tmp_path / "out"), "--report-only"]) == 1
    assert "no run is finished" in capsys.readouterr().err


def test_json_is_all_that_stdout_holds(study, tmp_path, capsys):
    output = tmp_path / "out"
    losses = {("baseline", 1): 2.0, ("baseline", 2): 3.0, ("plain", 1): 2.5, ("plain", 2): math.inf}
    for run in load_study(study).changed(seeds=(1, 2)).runs():
        folder = output / "runs" / run.folder
        folder.mkdir(parents=True)
        found = {"steps": 80, "tokens": 7, "losses": [], "evaluations": [(80, losses[run.arm, run.seed])]}
        (folder / "study_result.json").write_text(json.dumps(found))
    words = ["study", str(study), "--seeds", "1,2,3", "--output", str(output), "--report-only", "--json"]
    assert main(words) == 0
    [found] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["studies"]
    baseline, plain = found["arms"]
    assert (baseline["values"], baseline["median"]) == ({"1": 2.0, "2": 3.0}, 2.5)
    assert plain["values"] == {"1": 2.5, "2": None}  # which diverged
    assert plain["difference"] == {"mean": None, "low": None, "high": None, "p": None, "seeds": 2}
    assert found["control"]["verdict"] == "does not hold"
    assert [each["verdict"] for each in found["verdicts"]] == ["not measured"] * 3
    assert found["missing"] == [{"arm": "baseline", "seed": 3}, {"arm": "plain", "seed": 3}]
    assert [Path(page).name for page in found["report"]] == ["report.md", "report.html"]


def test_what_a_study_does_meanwhile_is_no_json(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_recycle.studies.runner.StudyRunner.run", lambda *_: ({}, {("plain", 1): "no memory"}))
    assert main(["study", str(study), "--output", str(tmp_path / "out"), "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {"studies": []}
    assert "2 runs, " in said.err
    assert "failed: plain, seed 1: no memory" in said.err


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """One cache of tokenizers and data for the real studies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_RECYCLE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory, shared_cache):
    """A study of two arms that work and one that fails, done once: (its file, its output, exit status)."""
    folder = tmp_path_factory.mktemp("study")
    path = tiny(folder)
    broken = "arms:\n  broken: {settings: {model_type: null, model_name_or_path: ./nowhere, config_overrides: null}}\n"
    path.write_text(path.read_text().replace("arms:\n", broken, 1))
    status = main(["study", str(path), "--output", str(folder / "out"), "--jobs", "2"])
    return path, folder / "out", status


@pytest.mark.slow
def test_a_real_study_with_an_arm_that_fails(done):
    _, output, status = done
    assert status == 1
    page = (output / "study" / "report.md").read_text()
    assert re.search(r"## Failed runs\n+- broken, seed 1: error: .*nowhere", page)
    rows = dict(re.findall(r"^\| (baseline|plain: recycled) \| 1 \| (\d+\.\d{4}) ", page, re.M))
    assert set(rows) == {"baseline", "plain: recycled"}
    for figure in ("01-losses", "02-prune-curves"):
        assert (output / "study" / "figures" / f"{figure}.png").stat().st_size > 5000
        assert f"figures/{figure}.png" in page
    assert "check failed" not in page
    assert "not drawn" not in page
    assert "p-values of one group" in page
    assert __version__ in page


@pytest.mark.slow
def test_a_study_that_is_done_trains_nothing(done, monkeypatch, capsys):
    path, output, _ = done
    page = (output / "study" / "report.html").read_bytes()
    curves = next(output.glob("runs/baseline*/study_prune_curves.json"))
    before = curves.stat().st_mtime_ns
    monkeypatch.setattr("hf_recycle.studies.runner.WarmProcess", None)  # whatever it would start
    words = ["study", str(path), "--output", str(output), "--arms", "plain"]
    assert main(words) == 0
    assert "done before" in capsys.readouterr().out
    assert main([*words, "--report-only"]) == 0
    assert curves.stat().st_mtime_ns == before
    # Without the arm that failed.
    assert b"broken" in page
    assert b"broken" not in (output / "study" / "report.html").read_bytes()


@pytest.mark.slow
def test_the_cached_pruning_curves_are_those_of_the_final_model(done):
    from hf_recycle.studies.one_shot import CURVES_FILE, one_shot_curves
    from hf_recycle.studies.plan_file import load_study
    from hf_recycle.studies.results import load_result

    path, output, _ = done
    run = next(run for run in load_study(path).runs() if run.arm == "baseline")
    result = load_result(run, next(output.glob(f"runs/*{run.key}")))
    known = one_shot_curves(result)
    # All criteria agree where nothing and where everything is pruned; nothing pruned is the model that was evaluated,
    # here on all of its validation data.
    assert len({losses[0] for losses in known.losses.values()}) == 1
    assert len({losses[-1] for losses in known.losses.values()}) == 1
    assert known.losses["random"][0] == pytest.approx(result.eval_loss, abs=1e-5)
    Path(result.folder, CURVES_FILE).write_text("{")
    assert one_shot_curves(result) == known


@pytest.mark.long
def test_an_interrupted_study_goes_on_as_if_nothing_had_happened(done, tmp_path, capsys):
    path, uninterrupted, _ = done
    words = ["study", str(path), "--arms", "baseline", "--jobs", "1", "--output", str(tmp_path / "out")]
    code = "import sys; from hf_recycle.cli.main import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/runs/*/checkpoint-40")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped; finished runs are kept, go on with: hf-recycle study" in said
    assert not running(tmp_path)
    (run,) = tmp_path.glob("out/runs/*")
    assert not (run / "study_result.json").exists()
    assert main(words) == 0
    assert "goes on" in capsys.readouterr().out
    other = uninterrupted / "runs" / run.name
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    one, two = (json.loads((folder / "study_result.json").read_text()) for folder in (run, other))
    for name in ("steps", "tokens", "losses", "evaluations"):
        assert one[name] == two[name]
    assert one["tokens"] > 0


FACTS = """\
title: Facts
seeds: 2
baseline: dead
control: {lower: alive, higher: dead}
tuning: {grid: {learning_rate: [1e-5, 1e-2]}, seeds: [9]}
recipes: facts
settings:
  {facts_keys: 16, facts_values: 8, facts_tasks: 2, facts_epochs: 20, train_sampling_strategy: sequential,
  per_device_train_batch_size: 128, max_steps: 80, warmup_steps: 5, logging_steps: 40, eval_strategy: steps,
  eval_steps: 40, save_strategy: "no", dead_fraction: 0.75}
arms:
  dead: {}
  alive: {settings: {dead_fraction: 0}}
removal: {arm: alive, criteria: [obs, random], folds: [none, least_squares], shares: [0.5]}
claims: [{says: Living neurons help, lower: alive, than: dead}]
figures:
  - {kind: tasks, title: Tasks}
  - {kind: dead, title: Dead}
statements: []
"""


@pytest.mark.long
def test_a_real_study_of_facts_is_tuned_and_judged(tmp_path, shared_cache, capsys):
    path, output = tmp_path / "facts.yaml", tmp_path / "out"
    path.write_text(FACTS)
    words = ["study", str(path), "--output", str(output), "--jobs", "2"]
    assert main(words) == 0
    assert "4 of 4 done" in capsys.readouterr().out
    page = (output / "facts" / "report.md").read_text()
    # The low rate learns nothing in 80 steps, and is tried on seed 9 alone.
    assert page.count("**learning_rate=0.01: ") == 2
    used = [json.loads(file.read_text())["settings"] for file in output.glob("runs/*/study_result.json")]
    assert sorted({(each["seed"], each["learning_rate"]) for each in used}) == [
        (1, 1e-2),
        (2, 1e-2),
        (9, 1e-5),
        (9, 1e-2),
    ]
    assert re.search(r"\| Living neurons help \| \*\*(holds|not shown at this scale|can't tell)\*\*", page)
    assert re.search(r"\| obs, least_squares \| \+\d\.\d{4} \[", page)
    assert "not drawn" not in page
    assert {file.name for file in (output / "facts" / "figures").glob("*.svg")} == {"01-tasks.svg", "02-dead.svg"}
    assert main([*words, "--report-only", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["studies"]
    assert len(found["removal"]) == 4
    assert [cost["share"] for row in found["removal"] for cost in row["costs"]] == [0.5] * 4
    assert [each["chosen"] for each in found["tuned"]] == [{"learning_rate": 1e-2}] * 2
    assert [each["says"] for each in found["verdicts"]] == ["Living neurons help"]


def running(folder):
    """Processes that write into the folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            written = os.readlink(link)
        except OSError:
            continue
        if written.startswith(str(folder)):
            found.append(written)
    return found
