"""The queue of pushes, without a Hub: order, patience, and a word about everything that did not land."""

import atexit
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given
from hypothesis import strategies as st
from publishing_runs import QUICK

from hf_recycle.hub.push.job import Push
from hf_recycle.hub.push.publisher import Publisher
from hf_recycle.hub.push.staging import FOLDER, is_overtaken, leftovers, stage, unstage
from hf_recycle.hub.retry import RetryPolicy, asked_for, passes


def refusal(status: int, **headers: str) -> HfHubHTTPError:
    response = httpx2.Response(status, headers=headers, request=httpx2.Request("POST", "http://hub/api"))
    return HfHubHTTPError(f"{status} of the test", response=response)


class FakeRepository:
    """Lands pushes; `trouble(message, attempt)` may give an error instead. Closed gates hold everything up."""

    name = repo_id = "alice/fake"

    def __init__(self, trouble=lambda message, attempt: None, gate=None, policy=QUICK):
        self.trouble, self.gate, self.policy = trouble, gate, policy
        self.attempts, self.landed, self.pushes, self.started = [], [], [], threading.Event()

    def publish(self, push, deadline):
        self.started.set()
        if self.gate is not None:
            self.gate.wait(10)
        self.attempts.append(push.message)
        error = self.trouble(push.message, self.attempts.count(push.message))
        if error is not None:
            raise error
        self.landed.append(push.message)
        self.pushes.append(push)
        return SimpleNamespace(oid=push.message)


def push(tmp_path, message, **more) -> Push:
    return Push(tmp_path, "alice/fake", str(message), **more)


def test_what_waits_is_replaced_by_the_newest_but_what_must_land_lands_in_order(tmp_path):
    gate = threading.Event()
    repository = FakeRepository(gate=gate)
    publisher = Publisher(repository)
    futures = [publisher.submit(push(tmp_path, 0))]
    repository.started.wait(10)
    for message, more in [
        (1, {}),
        (2, {"always": True}),
        (3, {}),
        (4, {"revision": "other"}),
        (5, {"always": True}),
        (6, {}),
    ]:
        futures.append(publisher.submit(push(tmp_path, message, **more)))
    gate.set()
    publisher.finish()
    assert repository.landed == ["0", "2", "4", "5", "6"]
    assert [future.cancelled() for future in futures] == [False, True, False, True, False, False, False]
    assert futures[6].result().oid == "6"
    assert not publisher.unpublished


def test_a_failure_that_passes_is_tried_again_before_the_next_push(tmp_path):
    repository = FakeRepository(lambda message, attempt: refusal(503) if attempt < 4 else None)
    publisher = Publisher(repository)
    for message in range(3):
        publisher.submit(push(tmp_path, message, always=True))
    publisher.finish()
    assert repository.attempts == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    assert not publisher.unpublished


def test_a_failure_that_stays_is_said_kept_and_does_not_stop_the_others(tmp_path, caplog):
    repository = FakeRepository(lambda message, attempt: refusal(403) if message == "1" else None)
    publisher = Publisher(repository)
    futures = [
        publisher.submit(push(tmp_path / str(message), message, always=True, revision="dev")) for message in range(3)
    ]
    with caplog.at_level("WARNING"):
        publisher.finish()
    command = f"hf-recycle push {tmp_path}/1 alice/fake --revision dev"
    assert repository.attempts == ["0", "1", "2"]
    assert futures[1].result() is None
    assert publisher.report().count(command) == 1
    assert caplog.text.count(command) == 2, "said at once and at the end"


def test_at_the_end_patience_runs_out_for_all_that_wait(tmp_path):
    policy = RetryPolicy(first=0.01, longest=0.05, last_patience=0.3)
    repository = FakeRepository(lambda message, attempt: refusal(503), policy=policy)
    publisher = Publisher(repository)
    futures = [publisher.submit(push(tmp_path, message, always=True)) for message in range(4)]
    publisher.finish()
    assert set(repository.attempts) == {"0"}
    assert repository.attempts.count("0") > 3
    assert [future.result() for future in futures] == [None] * 4
    assert [item.push.message for item in publisher.unpublished] == list("0123")


def test_a_success_renews_the_patience(tmp_path):
    # Each push fails for longer than half of the patience.
    began = {}

    def trouble(message, attempt):
        return refusal(502) if time.monotonic() - began.setdefault(message, time.monotonic()) < 0.6 else None

    publisher = Publisher(FakeRepository(trouble, policy=RetryPolicy(first=0.01, longest=0.02, last_patience=1.0)))
    for message in range(3):
        publisher.submit(push(tmp_path, message, always=True))
    publisher.finish()
    assert not publisher.unpublished


def test_a_long_wait_is_cut_short_at_the_end(tmp_path):
    policy = RetryPolicy(first=300, longest=300, patience=3600, last_patience=600)
    repository = FakeRepository(lambda message, attempt: refusal(503) if attempt == 1 else None, policy=policy)
    publisher = Publisher(repository)
    publisher.submit(push(tmp_path, 0))
    repository.started.wait(10)
    time.sleep(0.1)
    publisher.finish()  # the test's own timeout is the assertion
    assert repository.landed == ["0"]


def test_interrupted_it_stops_soon_and_says_what_is_left(tmp_path):
    gate = threading.Event()
    repository = FakeRepository(gate=gate)
    publisher = Publisher(repository)
    for message in range(3):
        publisher.submit(push(tmp_path, message, always=True))
    repository.started.wait(10)
    publisher.abandon(grace=0.2)
    gate.set()
    publisher.finish()
    assert [item.push.message for item in publisher.unpublished] == ["0", "1", "2"]
    assert set(repository.attempts) <= {"0"}


def test_what_is_left_is_taken_up_and_forgotten_when_it_lands(tmp_path):
    gate = threading.Event()
    repository = FakeRepository(gate=gate)
    publisher = Publisher(repository)
    copies = [staged(tmp_path, number, always=True) for number in range(2)]
    for one in copies:
        publisher.submit(one)
    repository.started.wait(10)
    publisher.abandon(grace=0.05)
    assert publisher.report()
    again = [publisher.submit(one) for one in copies]
    assert [publisher.submit(one) for one in copies] == again, "each once"
    gate.set()
    publisher.finish()
    assert [future.result().oid for future in again] == ["0", "1"]
    assert publisher.report() == ""
    assert not (tmp_path / FOLDER).exists()


def test_a_program_that_does_not_wait_says_what_it_leaves(tmp_path, monkeypatch, caplog):
    at_exit, gate = [], threading.Event()
    monkeypatch.setattr(atexit, "register", at_exit.append)
    repository = FakeRepository(gate=gate)
    publisher = Publisher(repository)
    for message in range(2):
        publisher.submit(push(tmp_path, message, always=True))
    repository.started.wait(10)
    with caplog.at_level("ERROR"):
        for call in at_exit:
            call()
    assert caplog.text.count(f"Publish it later with: hf-recycle push {tmp_path} alice/fake") == 2
    gate.set()
    publisher.finish()
    caplog.clear()
    for call in at_exit:
        call()
    assert not caplog.text


def test_staging_while_the_last_staged_copy_goes(tmp_path, monkeypatch):
    """The thread that publishes removes the folder of staged copies once none is left."""
    first = staged(tmp_path, 1)
    mkdir = Path.mkdir

    def mkdir_late(path, *args, **kwargs):
        if first.folder.exists() and path.name.startswith("tmp-"):
            unstage(first)
            raise FileNotFoundError(path)  # as if it had gone in the middle of it
        return mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir_late)
    second = staged(tmp_path, 2)
    assert (second.folder / "config.json").read_text() == "{}"
    assert not first.folder.exists()


def test_a_second_attempt_that_lands_clears_the_first(tmp_path):
    repository = FakeRepository(lambda message, attempt: refusal(403) if attempt == 1 else None)
    publisher = Publisher(repository)
    for _ in range(2):
        publisher.submit(push(tmp_path, "0", always=True))
        publisher.finish()
    assert publisher.report() == ""


def test_a_mistake_of_ours_leaves_nobody_waiting(tmp_path):
    publisher = Publisher(FakeRepository(lambda message, attempt: KeyError("oops")))
    future = publisher.submit(push(tmp_path, 0))
    publisher.finish()
    assert future.result() is None
    assert "oops" in publisher.report()


def staged(tmp_path, number, **more) -> Push:
    """A push of a copy, as training makes them."""
    folder = tmp_path / f"checkpoint-{number}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    return stage(push(folder, number, **more), tmp_path, link=True)


def test_what_is_cancelled_while_it_waits_goes_and_stops_nothing(tmp_path):
    gate = threading.Event()
    repository = FakeRepository(gate=gate)
    publisher = Publisher(repository)
    pushes = [staged(tmp_path, number, always=True) for number in range(3)]
    futures = [publisher.submit(one) for one in pushes]
    repository.started.wait(10)
    assert [future.cancel() for future in futures[:2]] == [False, True], "what is on its way can't be called back"
    gate.set()
    publisher.finish()  # the test's own timeout is an assertion
    assert repository.landed == ["0", "2"]
    assert [future.cancelled() for future in futures] == [False, True, False]
    assert not (tmp_path / FOLDER).exists(), "nothing is left of any"
    assert publisher.report() == ""


def test_what_is_cancelled_is_not_given_up_with_the_rest(tmp_path):
    policy = RetryPolicy(first=0.01, longest=0.05, last_patience=0.3)
    gate = threading.Event()
    repository = FakeRepository(lambda message, attempt: refusal(503), gate, policy)
    publisher = Publisher(repository)
    pushes = [staged(tmp_path, number, always=True) for number in range(4)]
    futures = [publisher.submit(one) for one in pushes]
    repository.started.wait(10)
    futures[1].cancel()
    gate.set()
    publisher.finish()
    assert [future.cancelled() or future.result() for future in futures] == [None, True, None, None]
    assert [item.push.message for item in publisher.unpublished] == ["0", "2", "3"]
    assert [one.folder.exists() for one in pushes] == [True, False, True, True]


def refuses(*messages):
    """A repository that takes everything but these."""
    return FakeRepository(lambda message, attempt: refusal(403) if message in messages else None)


def test_what_was_given_up_is_forgotten_once_a_newer_push_has_landed(tmp_path, caplog):
    repository = refuses("1", "2", "4")
    publisher = Publisher(repository)
    pushes = [staged(tmp_path, 1, revision="other"), *(staged(tmp_path, number) for number in (2, 3, 4))]
    for one in pushes:
        publisher.submit(one)
        with caplog.at_level("WARNING"):
            publisher.finish()
    assert repository.landed == ["3"]
    assert [item.push.message for item in publisher.unpublished] == ["1", "4"], "of another branch, and newer"
    assert [one.folder.exists() for one in pushes] == [True, False, False, True]
    assert "'2' need not be published any more: '3' was" in caplog.text
    assert leftovers(tmp_path) == [pushes[0], pushes[3]]


@pytest.mark.parametrize(
    ("older", "newer", "command"),
    [
        ({}, {}, None),
        ({"checkpoint": "last-checkpoint"}, {"checkpoint": "last-checkpoint"}, None),
        ({"checkpoint": "checkpoint-1", "always": True}, {"checkpoint": "checkpoint-2", "always": True}, ""),
        ({"tag": "step-1", "always": True}, {}, " --revision checkpoint-1"),
    ],
)
@pytest.mark.parametrize("is_staged", [True, False])
def test_what_is_left_of_an_older_push(tmp_path, older, newer, command, is_staged):
    publisher = Publisher(refuses("1"))
    first = staged(tmp_path, 1, **older)
    publisher.submit(first)
    publisher.finish()
    publisher.submit(staged(tmp_path, 2, **newer) if is_staged else push(tmp_path, 2, **newer))
    publisher.finish()
    assert is_overtaken(first, "alice/fake") is (command is not None)
    assert first.folder.exists() is (command is not None)
    if command is None:
        assert publisher.report() == ""
    else:
        assert publisher.unpublished[0].push.command == f"hf-recycle push {first.folder} alice/fake{command}"


def test_what_is_newer_than_a_push_that_lands_when_nobody_waits_stays(tmp_path, monkeypatch):
    """The program ends, gives up all that wait, and the first of them lands after all."""
    at_exit, gate = [], threading.Event()
    monkeypatch.setattr(atexit, "register", at_exit.append)
    repository = FakeRepository(gate=gate)
    publisher = Publisher(repository)
    pushes = [staged(tmp_path, number, always=number == 2) for number in (1, 2, 3)]
    publisher.submit(pushes[0])
    repository.started.wait(10)
    for one in pushes[1:]:
        publisher.submit(one)
    at_exit[0]()
    assert [item.push.message for item in publisher.unpublished] == ["1", "2", "3"]
    gate.set()
    while not repository.landed:
        time.sleep(0.01)
    assert repository.landed == ["1"]
    assert leftovers(tmp_path) == pushes, "whoever publishes the first again finds nothing left to change"


@pytest.mark.slow
def test_another_process_takes_its_turn(tmp_path):
    """What it has published meanwhile is not published again, and not over what it has published."""
    code = """
import sys, time
from pathlib import Path
from hf_recycle.hub.deadline import Deadline
from hf_recycle.hub.push.staging import leftovers, note_landed, take_turn, unstage
first, second, third = leftovers(Path(sys.argv[1]))
turn = take_turn(second, Deadline())
print("taken", flush=True)
sys.stdin.readline()
note_landed(second, "alice/fake")
unstage(second)
"""
    pushes = [staged(tmp_path, number, always=True) for number in (1, 2, 3)]
    repository = FakeRepository()
    publisher = Publisher(repository)
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "taken\n"
        futures = [publisher.submit(one) for one in pushes[1:]]
        time.sleep(0.5)
        assert repository.attempts == []
        other.stdin.write("\n")
        other.stdin.flush()
        publisher.finish()  # the lock dies with its process
    assert [future.result() and future.result().oid for future in futures] == [None, "3"]
    assert repository.landed == ["3"]
    assert publisher.report() == ""
    assert is_overtaken(pushes[0], "alice/fake")


def test_a_push_that_hangs_is_left_when_the_time_is_up_and_the_next_one_is_tried(tmp_path):
    gate = threading.Event()
    policy = RetryPolicy(last_patience=0.3)
    hanging = FakeRepository(gate=gate, policy=policy)
    publisher = Publisher(hanging)
    copies = [staged(tmp_path, number, always=True) for number in (1, 2)]
    futures = [publisher.submit(one) for one in copies]
    began = time.monotonic()
    publisher.finish()
    assert time.monotonic() - began < 3
    assert [future.result() for future in futures] == [None, None]
    assert [item.reason for item in publisher.unpublished] == ["the Hub did not answer in time"] * 2
    hanging.gate = None
    publisher.submit(staged(tmp_path, 3))
    publisher.finish()
    assert hanging.landed == ["3"], "by another thread"
    gate.set()


def test_waiting_draws_nothing_from_the_users_generators():
    before = random.getstate()
    for attempt in range(1, 5):
        RetryPolicy().wait(attempt, refusal(503))
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refusal(503), True),
        (refusal(500), True),
        (refusal(429), True),
        (refusal(412), True),
        (refusal(408), True),
        (refusal(401), False),
        (refusal(403), False),
        (refusal(404), False),
        (refusal(400), False),
        (httpx2.ReadTimeout("slow"), True),
        (httpx2.ConnectError("nobody there"), True),
        (httpx2.RemoteProtocolError("cut"), True),
        (ConnectionResetError(), True),
        (FileNotFoundError("gone"), False),
        (PermissionError("no"), False),
        (ValueError("Invalid metadata in README.md."), False),
    ],
)
def test_which_failures_pass(error, expected):
    assert passes(error) is expected


def test_an_upload_that_failed_underneath_passes():
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = refusal(403)
    assert passes(error), "the upload's address expired; the next attempt gets another"


@given(attempt=st.integers(1, 60), first=st.floats(0.001, 10), longest=st.floats(10, 100))
def test_waits_double_up_to_the_longest_and_differ(attempt, first, longest):
    policy = RetryPolicy(first=first, longest=longest)
    ceiling = min(longest, first * 2 ** (attempt - 1))
    waits = [policy.wait(attempt, ValueError()) for _ in range(20)]
    assert all(ceiling / 2 <= wait <= ceiling for wait in waits)
    assert len(set(waits)) > 1


def test_the_hub_may_ask_for_a_wait():
    assert asked_for(refusal(429, **{"Retry-After": "17"})) == 17
    assert asked_for(refusal(429, RateLimit='"api";r=0;t=55')) == 55
    assert RetryPolicy().wait(1, refusal(503, **{"Retry-After": "17"})) == 17
    assert RetryPolicy(patience=5).wait(1, refusal(503, **{"Retry-After": "1e9"})) <= 5
    assert RetryPolicy(patience=5).wait(1, refusal(503, **{"Retry-After": "999999999"})) == 5
