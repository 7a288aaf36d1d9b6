import json

import pytest
import torch
from support.simulated_runs import write_run

from hf_recycle.records import files
from hf_recycle.records.recorder import OVERTRAINING_METRICS, HistoryRecorder, overtraining_totals
from hf_recycle.studies.plan import PlannedRun
from hf_recycle.studies.results import RESULT_FILE, collect, load_result

PLANNED = PlannedRun("arm", 3, {"max_steps": 40}, "0123456789ab")


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run without feed-forward neurons, or with."""

    def write(neurons=True, run=None):
        log = [{"step": step, "loss": 5 - step / 20} for step in (10, 20, 30, 40)]
        # The last evaluation is logged twice: by the training, and after it.
        log += [{"step": step, "eval_loss": 4 - step / 20} for step in (20, 40, 40)]
        state = {"global_step": 40, "log_history": log, "num_input_tokens_seen": 640}
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        if neurons:
            write_run(tmp_path)
            config = files.read_config(tmp_path)
            files.write_config(tmp_path, {**config, "run": run or {"seconds": 9.25, "tokens": 1280}})
        return tmp_path

    return write


def test_what_is_collected(finished):
    folder = finished()
    result = collect(PLANNED, folder)
    assert (result.arm, result.seed, result.steps) == ("arm", 3, 40)
    assert result.losses == [(10, 4.5), (20, 4.0), (30, 3.5), (40, 3.0)]
    assert result.evaluations == [(20, 3.0), (40, 2.0)]
    assert result.eval_loss == 2.0
    assert result.tokens == 1280
    assert json.loads((folder / RESULT_FILE).read_text())["settings"] == {"max_steps": 40}
    assert load_result(PLANNED, folder) == result
    other = PlannedRun("another", 5, PLANNED.settings, PLANNED.key)
    assert (load_result(other, folder).arm, load_result(other, folder).seed) == ("another", 5)


def test_a_model_without_neurons_has_no_record_of_its_own(finished):
    folder = finished(neurons=False)
    result = collect(PLANNED, folder)
    assert (result.tokens, result.history) == (640, None)


def test_overtraining_counts_as_well(finished):
    folder = finished()
    recorder = HistoryRecorder.from_table(files.read_history(folder))
    for step in (10, 20):
        recorder.overtraining(step, dict.fromkeys(OVERTRAINING_METRICS, 0.0) | {"batches": 2, "tokens": 150})
    files.write_history(folder, recorder.to_table())
    tensors = files.read_state(folder)
    files.write_state(folder, tensors | {"trainer/overtrain_tokens": torch.tensor([300])})
    stats = files.read_stats(folder)
    files.write_stats(folder, {**stats, "overtraining": overtraining_totals(recorder.to_table())})
    assert collect(PLANNED, folder).tokens == 1280 + 300


def test_a_run_that_was_not_evaluated(finished):
    folder = finished()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 40, "log_history": []}))
    with pytest.raises(ValueError, match="no evaluation loss: a study needs eval_strategy=steps"):
        collect(PLANNED, folder)
    assert not (folder / RESULT_FILE).exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"settings": {}}', '{"losses": 3}', "\x00" * 40],
)
def test_a_damaged_result_counts_as_not_done(finished, content):
    folder = finished()
    collect(PLANNED, folder)
    (folder / RESULT_FILE).write_text(content)
    assert load_result(PLANNED, folder) is None


@pytest.mark.parametrize("change", [{"evaluations": []}, {"evaluations": [[1]]}, {"losses": [["a", "b"]]}])
def test_a_result_that_lacks_something(finished, change):
    folder = finished()
    collect(PLANNED, folder)
    content = json.loads((folder / RESULT_FILE).read_text())
    (folder / RESULT_FILE).write_text(json.dumps(content | change))
    assert load_result(PLANNED, folder) is None


def test_a_damaged_history_counts_as_not_done(finished):
    folder = finished()
    collect(PLANNED, folder)
    path = folder / files.HISTORY_FILE
    path.write_bytes(path.read_bytes()[:-20])
    assert load_result(PLANNED, folder) is None


def test_there_is_no_result(tmp_path):
    assert load_result(PLANNED, tmp_path) is None
    assert load_result(PLANNED, tmp_path / "nowhere") is None
