"""What users see of a run, and that files which contradict each other are refused."""

import json
import shutil

import huggingface_hub.errors as hub
import numpy as np
import pytest
import safetensors.torch
import torch
from support.simulated_runs import write_run

from hf_recycle.records import files, history
from hf_recycle.records.file_checks import FORMAT_VERSION
from hf_recycle.records.files import RecyclingFileError
from hf_recycle.records.history import RecyclingHistory
from hf_recycle.records.recorder import QUANTILE_LEVELS, BlockRecord, HistoryRecorder
from hf_recycle.records.summary import summarize

NAMES = ("z.layer.10", "z.layer.2", "a")  # an order that no sorting gives


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path, NAMES, d_ff=30, phases=4)
    return tmp_path


def test_events_counts_and_ages_agree(run):
    seen = RecyclingHistory.of_own_run(run)
    assert list(seen.counts) == list(seen.ages) == seen.blocks == list(NAMES)
    assert list(seen.events.columns) == ["step", "phase", "block", "recycled", "eligible", "requested", "note"]
    assert len(seen.events) == 4 * 3
    assert seen.events["step"].dtype == np.int64
    for name in NAMES:
        counts, last = np.zeros(30, int), np.full(30, -1)
        for event in seen.events[seen.events["block"] == name].itertuples():
            assert isinstance(event.recycled, list)
            assert len(event.recycled) == event.requested == 3
            counts[event.recycled] += 1
            last[event.recycled] = event.step
        np.testing.assert_array_equal(seen.counts[name], counts)
        assert seen.counts[name].dtype == np.int32
        np.testing.assert_array_equal(seen.ages[name], np.where(last < 0, -1, 50 - last))


def test_magnitudes(run):
    magnitudes = RecyclingHistory.of_own_run(run).magnitudes
    assert list(magnitudes.columns) == ["step", "block", "quantiles", "histogram", "edges", "note"]
    assert len(magnitudes) == 6 * 3
    row = magnitudes.iloc[0]
    assert (len(row.quantiles), len(row.histogram), len(row.edges)) == (len(QUANTILE_LEVELS), 64, 65)
    assert sum(row.histogram) == 30
    assert row.quantiles[-1] == pytest.approx(row.edges[-1])


def test_logs_have_one_row_per_step(run):
    logs = RecyclingHistory.of_own_run(run).logs
    assert list(logs.columns) == ["step", "loss", "learning_rate", "eval_loss", "eval_accuracy"]
    assert logs["step"].tolist() == [10, 20, 30, 40, 50]
    assert logs["loss"].iloc[-1] == pytest.approx(2 + 6 * np.exp(-1))
    assert logs.notna().all().all()


def test_logs_keep_the_later_of_two_values_and_gaps(tmp_path):
    write_run(tmp_path, losses=False)
    recorder = HistoryRecorder.from_table(files.read_history(tmp_path))
    recorder.log(9, {"eval_loss": 1.0})
    recorder.log(3, {"loss": 5.0})
    recorder.log(9, {"eval_loss": 2.0})
    files.write_history(tmp_path, recorder.to_table())
    logs = RecyclingHistory.of_own_run(tmp_path).logs
    assert logs["step"].tolist() == [3, 9]
    assert logs["eval_loss"].tolist()[1] == 2.0
    assert np.isnan(logs["loss"].tolist()[1])


def test_a_run_that_did_nothing_has_empty_tables(tmp_path):
    seen = write_run(tmp_path, phases=0, magnitudes=False, losses=False)
    assert len(seen.events) == len(seen.magnitudes) == len(seen.logs) == 0
    assert list(seen.logs.columns) == ["step"]
    assert all((ages == -1).all() for ages in seen.ages.values())


# ---- Files that contradict each other ----


def forge_state(run, kind, change):
    tensors = files.read_state(run)
    change(tensors[f"a/{kind}"], tensors)
    files.write_state(run, tensors)


def test_counts_that_the_events_do_not_give(run):
    def drop_one(counts, tensors):
        often = int(counts.argmax())
        counts[often] -= 1

    forge_state(run, "counts", drop_one)
    with pytest.raises(RecyclingFileError, match="counts of block a in the state contradicts the phases"):
        RecyclingHistory.of_own_run(run)


def test_a_last_phase_that_the_events_do_not_give(run):
    forge_state(run, "last_phase", lambda last, _: last.masked_fill_(last > 0, 5))
    with pytest.raises(RecyclingFileError, match="last_phase of block a"):
        RecyclingHistory.of_own_run(run)


def test_a_history_without_the_phases_that_were_counted(run):
    files.write_history(run, HistoryRecorder().to_table())
    with pytest.raises(RecyclingFileError, match=r"counts of block z\.layer\.10"):
        RecyclingHistory.of_own_run(run)


def test_an_older_summary(run):
    recorder = HistoryRecorder.from_table(files.read_history(run))
    tensors = files.read_state(run)
    counts = {name: tensors[f"{name}/counts"] for name in NAMES}
    none = {name: torch.zeros_like(count) for name, count in counts.items()}
    for stats, message in (
        (summarize(counts, {}, recorder, step=39), "made at step 39, before the last recycling at 40"),
        (summarize(counts, {}, HistoryRecorder(), step=50), "counts 0 phases"),
        (summarize(none, {}, recorder, step=50), r"times_recycled of block z\.layer\.10 in the summary"),
        (summarize(dict(reversed(counts.items())), {}, recorder, step=50), "blocks of the summary"),
    ):
        files.write_stats(run, stats)
        with pytest.raises(RecyclingFileError, match=message):
            RecyclingHistory.of_own_run(run)


def test_a_config_of_another_model(run):
    config = files.read_config(run)
    config["blocks"][0]["num_neurons"] = 31
    files.write_config(run, config)
    with pytest.raises(RecyclingFileError, match=r"counts of block z\.layer\.10 has shape \(30,\) where \(31,\)"):
        RecyclingHistory.of_own_run(run)


def test_a_run_that_went_on_from_a_vanilla_checkpoint(tmp_path):
    # Recycling starts late: the history lacks the steps before, and the counts start from zero with it.
    write_run(tmp_path)
    recorder = HistoryRecorder()
    recorder.phase(BlockRecord(5000, "encoder.layer.1", 2, 40, [3, 4], phase=1))
    state = {
        f"encoder.layer.{i}/{kind}": torch.zeros(40, dtype=dtype)
        for i in range(2)
        for kind, dtype in (("counts", torch.int32), ("last_phase", torch.int32), ("last_step", torch.int64))
    }
    for kind, value in (("counts", 1), ("last_phase", 1), ("last_step", 5000)):
        state[f"encoder.layer.1/{kind}"][[3, 4]] = value
    files.write_state(tmp_path, state)
    files.write_history(tmp_path, recorder.to_table())
    counts = {f"encoder.layer.{i}": state[f"encoder.layer.{i}/counts"] for i in range(2)}
    files.write_stats(tmp_path, summarize(counts, {}, recorder, step=5010))
    seen = RecyclingHistory.of_own_run(tmp_path)
    assert seen.ages["encoder.layer.1"][:5].tolist() == [-1, -1, -1, 10, 10]


# ---- Where the files are found ----


def test_an_output_folder_gives_its_newest_complete_checkpoint(tmp_path):
    for number, phases in ((9, 1), (10, 2), (11, 3)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        write_run(tmp_path / f"checkpoint-{number}", phases=phases)
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-13.old").mkdir()
    (tmp_path / "checkpoint-11" / files.STATE_FILE).unlink()
    assert RecyclingHistory.of_own_run(tmp_path).stats["phases"] == 2
    write_run(tmp_path, phases=4)
    assert RecyclingHistory.from_pretrained(str(tmp_path)).stats["phases"] == 4


def test_folders_without_a_complete_set(tmp_path, run):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RecyclingFileError, match=r"it has no recycling_config\.json, and it holds no checkpoints"):
        RecyclingHistory.from_pretrained(empty)
    (empty / "checkpoint-3").mkdir()
    with pytest.raises(RecyclingFileError, match="no complete set"):
        RecyclingHistory.from_pretrained(empty)
    (run / files.STATS_FILE).unlink()
    with pytest.raises(RecyclingFileError, match=r"recycling_stats\.json is missing beside"):
        RecyclingHistory.of_own_run(run)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(RecyclingFileError, match="no folder here, and it is not the name of a repository"):
        RecyclingHistory.from_pretrained(tmp_path / "nowhere" / "at" / "all")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A stand-in for the Hub's client: serves a run as commit COMMIT of user/model and notes the requests."""
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    write_run(folder)
    requests = []

    def fetch(repo, name, revision=None, token=None):
        requests.append((repo, name, revision, token))
        return folder / name

    monkeypatch.setattr(history, "fetch_file", fetch)
    return requests


def test_a_repository_is_read_at_one_commit(cache):
    seen = RecyclingHistory.from_pretrained("user/model", revision="main", token="secret")
    assert seen.stats["phases"] == 3
    assert cache == [
        ("user/model", name, "main" if i == 0 else COMMIT, "secret") for i, name in enumerate(files.RECYCLING_FILES)
    ]


def response(status):
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub/x"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: hub.RepositoryNotFoundError("no", response=response(404)),
            "no folder here, and there is no such",
        ),
        (lambda: hub.GatedRepoError("no", response=response(403)), "is restricted"),
        (lambda: hub.RevisionNotFoundError("no", response=response(404)), "user/model@v1: .*no such revision"),
        (lambda: hub.EntryNotFoundError("no"), "has no recycling_config.json"),
        (lambda: hub.LocalEntryNotFoundError("no"), "not in the cache and the Hub can't be reached"),
        (lambda: hub.HfHubHTTPError("no", response=response(500)), "can't be downloaded"),
        (lambda: ConnectionResetError("no"), "can't be downloaded"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, make, message):
    def fetch(*args, **kwargs):
        raise make()

    monkeypatch.setattr(history, "fetch_file", fetch)
    with pytest.raises(RecyclingFileError, match=message):
        RecyclingHistory.from_pretrained("user/model", revision="v1")


def test_the_state_is_plain_safetensors_and_the_config_plain_json(run):
    assert "a/counts" in safetensors.torch.load_file(run / "recycling_state.safetensors")
    assert json.loads((run / "recycling_config.json").read_text())["format_version"] == FORMAT_VERSION
    copy = shutil.copytree(run, run / "copy")
    assert RecyclingHistory.from_pretrained(copy).stats == RecyclingHistory.of_own_run(run).stats
