"""How long a Hub in trouble holds a run up, at the start and at the end, whatever the client would wait for."""

import hashlib
import time
from pathlib import Path

import httpx2
import pytest
import torch
from hub_server import Fault
from huggingface_hub.utils import get_session
from publishing_runs import QUICK
from transformers import BertConfig, BertForMaskedLM

from hf_recycle.hub.push.job import Push
from hf_recycle.hub.push.publisher import Publisher
from hf_recycle.hub.push.repository import Repository
from hf_recycle.hub.retry import RetryPolicy

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the client's own

# Half a second stands for the sixty of the shipped policy.
PATIENCE = RetryPolicy(first=0.02, longest=0.2, start_patience=0.5, patience=30.0, last_patience=0.5)
FOREVER = 10_000.0
TROUBLE = {
    "answers 429 and asks for five minutes": {"status": 429, "retry_after": 300},
    "answers 503": {"status": 503},
    "accepts and never answers": {"action": "delay", "delay": FOREVER},
    "hangs up": {"action": "drop"},
    "is a portal's page": {"action": "page"},
}
WHERE = {
    "from the start": ".",
    "when it is asked what is there": "/revision/|/tree/",
    "at uploads": "PUT /_lfs",
    "at the commit": "/commit/",
    "at the tag": "/tag/|/refs",
}
FIVE_MINUTES, FAILS, SILENT, CUTS, PORTAL = TROUBLE
START, ASKED, UPLOADS, COMMIT, TAG = WHERE


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model of new weights, so that they have to be uploaded."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(time.monotonic_ns() % 2**40)
    model = BertForMaskedLM(BertConfig(vocab_size=31, **sizes))
    model.save_pretrained(tmp_path / "model")
    torch.save(torch.rand(8), tmp_path / "model" / "scheduler.pt")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "where"),
    [
        *((SILENT, where) for where in WHERE),
        *((FIVE_MINUTES, where) for where in (START, UPLOADS, COMMIT)),
        *((FAILS, where) for where in (COMMIT, TAG)),
        *((PORTAL, where) for where in (UPLOADS, COMMIT, TAG)),
        (CUTS, UPLOADS),
    ],
)
def test_at_the_end_the_patience_is_kept(online, hub, folder, request, trouble, where):
    name = f"alice/patience-{request.node.callspec.indices['trouble']}"
    session = get_session()
    hooks, timeout = {kind: list(hooks) for kind, hooks in session.event_hooks.items()}, session.timeout
    publisher = Publisher(Repository(name, policy=PATIENCE))
    hub.faults.set([Fault(WHERE[where], **TROUBLE[trouble])])
    publisher.submit(Push(folder, name, "step 4", checkpoint="last-checkpoint", tag="step-4"))
    began = time.monotonic()
    publisher.finish()
    assert time.monotonic() - began < PATIENCE.last_patience + 2
    assert f"hf-recycle push {folder} {name}" in publisher.report()

    hub.faults.set()
    publisher.policy = QUICK  # which has time for it on a busy machine too
    publisher.submit(Push(folder, name, "step 4", checkpoint="last-checkpoint", tag="step-4"))
    publisher.finish()
    assert publisher.report() == ""
    repository = hub.store.repositories["model", name]
    assert repository.tags["step-4"] == repository.branches["main"]
    now = get_session()
    if now is session:  # the client makes another one when nobody answers
        assert ({kind: list(hooks) for kind, hooks in now.event_hooks.items()}, now.timeout) == (hooks, timeout)
    assert now.timeout == httpx2.Timeout(None)


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=list(TROUBLE))
def test_at_the_start_too_and_nothing_is_left_in_the_clients_session(online, hub, trouble, caplog):
    hub.faults.set([Fault(".", **trouble)])
    session = get_session()
    hooks = {kind: list(hooks) for kind, hooks in session.event_hooks.items()}
    began = time.monotonic()
    with caplog.at_level("WARNING"):
        assert Repository("alice/start", policy=PATIENCE).check_at_start() == "alice/start"
    assert time.monotonic() - began < PATIENCE.start_patience + 1
    assert "Training starts" in caplog.text
    assert get_session().timeout == httpx2.Timeout(None)
    assert session.event_hooks == hooks


PUSH = """
import sys, time
from hf_recycle.cli.main import main
from hf_recycle.hub.push import repository
from hf_recycle.hub.push.publisher import Publisher
from hf_recycle.hub.retry import RetryPolicy
policy = RetryPolicy(first=0.02, last_patience=float(sys.argv.pop()))
repository.RetryPolicy = lambda: policy
finish = Publisher.finish
def timed(publisher):
    began = time.monotonic()
    finish(publisher)
    print(time.monotonic() - began)
Publisher.finish = timed
sys.exit(main(["push", *sys.argv[1:]]))
"""


@pytest.mark.long
def test_files_go_up_by_xet_and_a_silent_xet_store_holds_nobody_up_either(
    hub, hub_environment, run_python, folder, tmp_path, monkeypatch
):
    """hf_xet can keep its store in a folder."""
    monkeypatch.setattr(hub.routes, "cas", f"local://{tmp_path / 'cas'}")
    done = run_python(PUSH, hub_environment(HF_HUB_DISABLE_XET="0"), str(folder), "alice/xet", "--tag", "first", "30")
    assert "published" in done.stdout
    assert hub.requests("xet-write-token")
    assert not hub.requests("PUT /_lfs|objects/batch")
    weights = (folder / "model.safetensors").read_bytes()
    commit = hub.store.repositories["model", "alice/xet"].resolve("first")
    assert commit.files["model.safetensors"].sha256 == hashlib.sha256(weights).hexdigest()
    stored = sum(path.stat().st_size for path in (tmp_path / "cas").rglob("*") if path.is_file())
    assert stored > 0.8 * len(weights)

    hub.faults.set([Fault("xet-write-token", "delay", delay=FOREVER)])
    environment = hub_environment(HF_HUB_DISABLE_XET="0")
    done = run_python(PUSH, environment, str(folder), "alice/xet-silent", "2", status=1)
    assert float(done.stdout.split()[-1]) < 2 + 3
    assert hub.requests("xet-silent/preupload"), "it got as far as the upload"
    assert "the Hub did not answer in time" in done.stderr


@pytest.mark.slow
def test_a_slow_upload_is_waited_for(online, hub, folder):
    """In all it takes longer than the patience, though each of its parts, model and state, does not."""
    hub.faults.set([Fault("PUT /_lfs", "delay", delay=1.2)])
    publisher = Publisher(Repository("alice/slow", policy=RetryPolicy(first=0.02, last_patience=2.2)))
    publisher.submit(Push(folder, "alice/slow", "step 4", checkpoint="last-checkpoint"))
    publisher.finish()
    assert publisher.report() == ""


def test_requests_of_others_meanwhile_are_left_to_the_client(online, hub, folder, monkeypatch):
    """While a push hangs, what the user asks the Hub is tried again by the client as ever, without our limits."""
    from huggingface_hub import HfApi

    seen = []
    send = httpx2.Client.send
    monkeypatch.setattr(
        httpx2.Client, "send", lambda *a, **k: (seen.append(a[1].extensions["timeout"]), send(*a, **k))[1]
    )
    publisher = Publisher(Repository("alice/beside", policy=PATIENCE))
    hub.store.create("alice/other")
    hub.faults.set([Fault("alice/beside", "delay", delay=FOREVER), Fault("alice/other/tree", status=503, times=2)])
    publisher.submit(Push(folder, "alice/beside", "step 4"))
    while not hub.requests("repos/create|beside"):
        time.sleep(0.01)
    assert [item.path for item in HfApi().list_repo_tree("alice/other")] == [".gitattributes"]
    assert {"connect": None, "read": None, "write": None, "pool": None} in seen
    publisher.abandon(grace=0.1)
