"""Pushes of a checkpoint to a Hub in trouble, with the real client."""

import os
import re
import shutil
import threading

import pytest
from hub_server import ALICE, ALICE_NO_WRITE, ALICE_READ, BOB, INVALID, Fault, HubServer, Store
from publishing_runs import QUICK, make_trainer

from hf_recycle.card.card import card_for
from hf_recycle.errors import UserError
from hf_recycle.hub.push.job import Push
from hf_recycle.hub.push.publisher import Publisher
from hf_recycle.hub.push.repository import Refused, Repository

# Whole runs against a Hub in trouble.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("figures_not_drawn")]

COMMIT = r"POST /api/models/.*/commit/"


def test_everything_goes_up_in_one_commit_and_nothing_else(publisher, hub, name, checkpoint):
    publisher.submit(Push(checkpoint, name, "step 4", "and more", checkpoint="last-checkpoint", tag="step-4"))
    publisher.finish()
    assert publisher.report() == ""
    assert hub.store.titles(name) == ["step 4"]
    paths = hub.store.paths(name)
    here = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    here -= {
        "training_args.bin",
        "checkpoint_files.json",
    }  # a pickle with the token in it, and a list of what lies here
    assert {path.removeprefix("last-checkpoint/") for path in paths if path.startswith("last-checkpoint/")} == here
    resuming = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    figures = {"figures/loss.png", "figures/recycle_counts.png"}  # drawn for what is published, not at the save
    assert {path for path in paths if not path.startswith("last-checkpoint/")} == (here - resuming) | figures
    assert {"model.safetensors", "recycling_state.safetensors", "README.md"} <= here
    card = hub.store.read(name, "README.md").decode()
    assert set(re.findall(r"figures/\w+\.png", card)) == figures
    assert (
        "figures/"
        not in (checkpoint / "README.md").read_text() + hub.store.read(name, "last-checkpoint/README.md").decode()
    )
    for path in here - {"README.md"}:
        assert hub.store.read(name, f"last-checkpoint/{path}") == (checkpoint / path).read_bytes(), path
    repository = hub.store.repositories["model", name]
    assert repository.tags["step-4"] == repository.branches["main"]
    uploads = [entry.line for entry in hub.requests(r"^PUT /_lfs")]
    assert len(uploads) == len(set(uploads)), "the weights lie in two places and go up once"


FAULTS = {
    "one request in three answers 503": [Fault(".", every=3)],
    "one request in three is dropped": [Fault(".", "drop", every=3)],
    "a storm of 503 on commits": [Fault(COMMIT, times=6)],
    "429 with Retry-After": [Fault(COMMIT, status=429, retry_after=1, times=1)],
    "uploads reset in mid-body": [Fault(r"PUT /_lfs", "reset_request", times=5)],
    "the commit reset in mid-body": [Fault(COMMIT, "reset_request", times=2)],
    "a commit done whose answer is lost": [Fault(COMMIT, "lose_response", times=1)],
    "answers cut short": [Fault(r"/tree/|preupload|objects/batch", "truncate", every=2, times=4)],
    "no page but an error of a proxy": [Fault("validate-yaml", status=502, times=2)],
    "the tag fails": [Fault("/tag/", times=2)],
    "delays": [Fault(".", "delay", delay=0.05)],
    "a portal's page in place of the commit": [Fault(COMMIT, "page", times=2)],
    "a portal's page in place of the tag": [Fault("POST .*/tag/", "page", times=2)],
    "a portal's page in place of an upload": [Fault(r"PUT /_lfs", "page", times=3)],
    "a portal's page now and then": [Fault(".", "page", every=4)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=[key.replace(" ", "-") for key in FAULTS])
def test_it_lands_once_and_whole_in_spite_of(faults, publisher, hub, name, run, tmp_path):
    shutil.copytree(run, run := tmp_path / "run")
    hub.faults.set(faults)
    for folder in (run / "checkpoint-2", run / "checkpoint-4"):
        (folder / "scaler.pt").write_bytes(os.urandom(2000))  # the Hub knows the rest from the other tests
        step = folder.name.rpartition("-")[2]
        publisher.submit(Push(folder, name, f"step {step}", checkpoint=folder.name, tag=f"step-{step}", always=True))
    publisher.finish()
    fired = sum(fault.fired for fault in faults)
    hub.faults.set()
    assert fired, "the fault has to have happened"
    assert publisher.report() == ""
    assert hub.store.titles(name) == ["step 2", "step 4"]
    for step in (2, 4):
        for place in ("", f"checkpoint-{step}/"):
            published = hub.store.read(name, f"{place}model.safetensors", f"step-{step}")
            assert published == (run / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def test_a_hub_that_dies_and_comes_back(tmp_path, online, monkeypatch, checkpoint, run):
    import huggingface_hub

    store = tmp_path / "store"
    server = HubServer(Store(store)).start()
    port = int(server.url.rpartition(":")[2])
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    server.faults.set([Fault("PUT /_lfs", "delay", delay=0.3)])
    publisher = Publisher(Repository("alice/phoenix", output_dir=run, policy=QUICK))
    publisher.submit(Push(checkpoint, "alice/phoenix", "step 4"))
    while not server.requests("PUT /_lfs"):
        threading.Event().wait(0.01)
    server.stop()
    revived = threading.Timer(0.5, lambda: None)
    revived.start()
    revived.join()
    with HubServer(Store(store), port=port) as again:
        publisher.finish()
        assert publisher.report() == ""
        assert again.store.titles("alice/phoenix") == ["step 4"]


def test_a_commit_by_someone_else_is_kept(publisher, hub, name, checkpoint, run):
    """Between our look at the repository and our commit, a user edits the card and adds a figure."""
    publisher.submit(Push(run / "checkpoint-2", name, "step 2"))
    publisher.finish()
    create_commit = publisher.repository.api.create_commit
    edits = iter(["# Mine\n\nAbove.\n\n", ""])

    def meanwhile(*args, **kwargs):
        edit = next(edits, "")
        if edit:
            theirs = hub.store.read(name, "README.md").decode()
            header, rest = theirs.split("\n---\n", 1)
            edited = f"{header}\n---\n{edit}{rest}\nBelow.\n"
            hub.store.add_files(name, {"README.md": edited.encode(), "figures/mine.png": b"png", "notes.txt": b"n"})
        return create_commit(*args, **kwargs)

    publisher.repository.api.create_commit = meanwhile
    publisher.submit(Push(checkpoint, name, "step 4"))
    publisher.finish()
    assert publisher.report() == ""
    assert hub.store.titles(name) == ["step 2", "made by a test", "step 4"]
    assert len(hub.requests(COMMIT)) == 3
    assert [entry.status for entry in hub.requests(COMMIT)] == [200, 412, 200]
    card = hub.store.read(name, "README.md").decode()
    assert "# Mine\n\nAbove." in card
    assert card.endswith("Below.\n")
    ours = card_for(checkpoint, name)[0].partition("<!-- hf_recycle:begin")[2]
    assert ours.strip() in card
    assert {"figures/mine.png", "notes.txt"} <= set(hub.store.paths(name))


def test_what_would_contradict_the_push_is_removed_and_nothing_else(publisher, hub, name, checkpoint, run):
    publisher.submit(Push(run / "checkpoint-2", name, "step 2", checkpoint="last-checkpoint"))
    publisher.finish()
    card = hub.store.read(name, "README.md").decode()
    hub.store.add_files(
        name,
        {
            "README.md": card.replace("figures/loss.png", "figures/old_loss.png").encode(),
            "figures/old_loss.png": b"ours",
            "figures/user.png": b"theirs",
            "model-00001-of-00002.safetensors": b"stale",
            "model.safetensors.index.json": b"{}",
            "pytorch_model.bin": b"converted by the user",
            "last-checkpoint/rng_state_7.pth": b"stale",
            "last-checkpoint-mine/notes.txt": b"theirs",
        },
    )
    publisher.submit(Push(checkpoint, name, "step 4", checkpoint="last-checkpoint"))
    publisher.finish()
    assert publisher.report() == ""
    paths = set(hub.store.paths(name))
    assert {"figures/user.png", "pytorch_model.bin", "last-checkpoint-mine/notes.txt", "figures/loss.png"} <= paths
    gone = {"figures/old_loss.png", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert not paths & (gone | {"last-checkpoint/rng_state_7.pth"})


def test_a_tag_follows_the_newest_model_of_its_step(publisher, hub, name, checkpoint, run):
    for folder in (run / "checkpoint-2", checkpoint):
        publisher.submit(Push(folder, name, folder.name, tag="step-4", always=True))
    publisher.finish()
    repository = hub.store.repositories["model", name]
    assert repository.tags["step-4"] == repository.branches["main"]


def test_a_branch_is_made_and_main_left_alone(online, hub, name, checkpoint, run):
    publisher = Publisher(Repository(name, revision="runs/second", output_dir=run, policy=QUICK))
    publisher.submit(Push(checkpoint, name, "step 4", revision="runs/second"))
    publisher.finish()
    assert publisher.report() == ""
    assert hub.store.titles(name) == []
    assert hub.store.titles(name, "runs/second") == ["step 4"]


def test_an_adapter_beside_the_full_model_is_left_alone(publisher, hub, name, checkpoint):
    hub.store.create(name)
    hub.store.add_files(name, {"adapter_model.safetensors": b"theirs", "adapter_config.json": b"{}"})
    publisher.submit(Push(checkpoint, name, "step 4"))
    publisher.finish()
    assert hub.store.read(name, "adapter_model.safetensors") == b"theirs"
    assert {"adapter_config.json", "model.safetensors"} <= set(hub.store.paths(name))


def test_what_was_deleted_on_the_hub_stays_deleted(publisher, hub, name, checkpoint, run):
    publisher.submit(Push(run / "checkpoint-2", name, "step 2"))
    publisher.finish()
    card = hub.store.read(name, "README.md").decode()
    assert "pipeline_tag: fill-mask\n" in card
    assert "- neuron-recycling\n" in card
    edited = card.replace("pipeline_tag: fill-mask\n", "").replace("- neuron-recycling\n", "")
    before, _, rest = edited.partition("## Limitations\n")
    edited = before + rest[rest.index("<!-- hf_recycle:end") :]
    hub.store.add_files(name, {"README.md": edited.encode()})
    for folder in (checkpoint, run):
        publisher.submit(Push(folder, name, folder.name))
        publisher.finish()
        now = hub.store.read(name, "README.md").decode()
        assert "fill-mask" not in now.partition("\n---\n")[0]
        assert "- neuron-recycling" not in now
        assert "## Limitations\n" not in now
        assert "after 4 optimizer steps" in now.replace(" of 4", ""), "the rest is brought up to date"
        assert "## How to use it" in now


def test_a_tag_that_the_hub_refuses_is_said(publisher, hub, name, checkpoint):
    hub.faults.set([Fault("POST .*/tag/", status=403)])
    publisher.submit(Push(checkpoint, name, "step 4", tag="step-4"))
    publisher.finish()
    assert hub.store.titles(name) == ["step 4"]
    assert "is published, but its tag 'step-4' is not made: 403" in publisher.report()


# ---- Before the first step ----

REFUSALS = {
    "no token": ("alice/new", None, "hf auth login"),
    "a wrong token": ("alice/new", INVALID, "401"),
    "a token that may only read": ("alice/new", ALICE_READ, "403"),
    "a fine-grained token without the right": ("alice/new", ALICE_NO_WRITE, "403"),
    "somebody else's namespace": ("bob/new", ALICE, "bob/new"),
    "somebody else's repository, readable": ("bob/readable", ALICE, "bob/readable"),
    "a bad name": ("alice/a--b", ALICE, "hub_model_id='alice/a--b'"),
    "too many slashes": ("alice/a/b", ALICE, "hub_model_id='alice/a/b'"),
}


@pytest.mark.parametrize(("name", "token", "says"), REFUSALS.values(), ids=list(REFUSALS))
def test_a_run_that_could_never_publish_does_not_start(online, hub, tmp_path, monkeypatch, name, token, says):
    if ("model", "bob/readable") not in hub.store.repositories:
        hub.store.create("bob/readable")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError) as error:
        make_trainer(tmp_path / "run", hub_model_id=name, hub_token=token)
    assert says in str(error.value)
    assert token is None or token not in str(error.value)
    assert not hub.requests(COMMIT)


def test_a_passing_failure_at_the_start_is_tried_again(online, hub, name):
    hub.faults.set([Fault("repos/create", times=2)])
    assert Repository(name.removeprefix("alice/"), policy=QUICK).check_at_start() == name


def test_a_hub_that_is_away_at_the_start_is_a_warning(online, monkeypatch, checkpoint, caplog):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    repository = Repository("alice/away", policy=QUICK)
    with caplog.at_level("WARNING"):
        assert repository.check_at_start() == "alice/away"
    assert "Training starts" in caplog.text


def test_refused_later_after_a_start_without_the_hub(online, hub, monkeypatch, checkpoint, run):
    """The right that is missing shows only once the Hub is back."""
    publisher = Publisher(Repository("bob/later", output_dir=run, policy=QUICK))
    publisher.submit(Push(checkpoint, "bob/later", "step 4"))
    publisher.finish()
    assert isinstance(publisher.unpublished[0].error, Refused)


def test_bobs_token_is_bobs(online, hub, run, monkeypatch):
    """A push with a token of its own does not use the one that is logged in."""
    publisher = Publisher(Repository("bob/own", token=BOB, output_dir=run, policy=QUICK))
    publisher.submit(Push(run / "checkpoint-4", "bob/own", "step 4"))
    publisher.finish()
    assert publisher.report() == ""
