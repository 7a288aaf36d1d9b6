"""Runs that publish while they train, with the real Trainer and client."""

import io
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import ALICE, Fault, HubServer, Store
from publishing_runs import QUICK, make_trainer, train_and_publish
from support.tiny_runs import assert_same_weights, sentences
from transformers import AutoModelForMaskedLM, TrainerCallback

from hf_recycle import RecyclingHistory
from hf_recycle.cli.main import main
from hf_recycle.hub.push.staging import FOLDER, leftovers
from hf_recycle.hub.retry import RetryPolicy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("figures_not_drawn")]

COMMIT = r"POST /api/models/.*/commit/"


class AtStep(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, **actions):
        self.actions = {int(step[1:]): action for step, action in actions.items()}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.actions:
            self.actions[state.global_step]()


@pytest.fixture(scope="module")
def unpublished_run(tmp_path_factory):
    """The same run, never published."""
    return train_and_publish(tmp_path_factory.mktemp("reference") / "run", push_to_hub=False)


def model_at(hub, name, revision="main", folder="") -> bytes:
    return hub.store.read(name, f"{folder}model.safetensors", revision)


def test_last_checkpoint_on_a_branch_of_a_private_repository_of_an_organisation(online, hub, tmp_path, unpublished_run):
    name, branch = "acme/organised", "runs/one"
    trainer = train_and_publish(
        tmp_path / "run",
        hub_model_id=name,
        hub_strategy="checkpoint",
        hub_private_repo=True,
        hub_revision=branch,
        hub_always_push=True,
    )
    repository = hub.store.repositories["model", name]
    assert repository.private
    assert hub.store.titles(name) == [], "main was left alone"
    titles = hub.store.titles(name, branch)
    assert [title.split(",")[0] for title in titles] == ["step 2", "step 4", "step 6"]
    assert "loss " in titles[-1]
    assert titles[-1].endswith("% of neurons recycled")
    run = tmp_path / "run"
    assert model_at(hub, name, branch) == (run / "checkpoint-6" / "model.safetensors").read_bytes()
    assert model_at(hub, name, branch, "last-checkpoint/") == model_at(hub, name, branch)
    assert json.loads(hub.store.read(name, "recycling_stats.json", branch))["step"] == 6
    assert b"neuron" in hub.store.read(name, "README.md", branch)
    assert not (run / FOLDER).exists()
    assert trainer.publisher.report() == ""
    assert_same_weights(trainer, unpublished_run)  # publishing changed nothing


def test_every_checkpoint_and_tag_lands_though_uploads_are_slow_and_rotation_is_not(
    online, hub, tmp_path, unpublished_run
):
    hub.faults.set([Fault(r"PUT /_lfs|/commit/", "delay", delay=0.4)])
    name = "alice/rotated"
    train_and_publish(
        tmp_path / "run",
        hub_model_id=name,
        hub_strategy="all_checkpoints",
        hub_tag_steps=True,
        save_total_limit=1,
    )
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert [title.split(",")[0] for title in hub.store.titles(name)] == ["step 2", "step 4", "step 6"]
    expected = Path(unpublished_run.args.output_dir)
    for step in (2, 4, 6):
        weights = (expected / f"checkpoint-{step}" / "model.safetensors").read_bytes()
        assert model_at(hub, name, f"step-{step}") == weights
        assert model_at(hub, name, "main", f"checkpoint-{step}/") == weights
        assert json.loads(hub.store.read(name, "recycling_stats.json", f"step-{step}"))["step"] == step
    assert not (tmp_path / "run" / FOLDER).exists()

    hub.faults.set()
    resumed = make_trainer(tmp_path / "elsewhere", push_to_hub=False)
    resumed.train(resume_from_checkpoint=f"hub://{name}/checkpoint-4")
    assert_same_weights(resumed, unpublished_run)


def test_waiting_updates_of_the_root_coalesce_and_the_newest_wins(online, hub, tmp_path):
    hub.faults.set([Fault(COMMIT, "delay", delay=2.0, times=1)])
    train_and_publish(tmp_path / "run", hub_model_id="alice/coalesced", save_steps=1)
    titles = hub.store.titles("alice/coalesced")
    assert titles[-1].startswith("step 6")
    assert len(titles) < 6
    assert not (tmp_path / "run" / FOLDER).exists()


def test_at_the_end_only_and_on_request(online, hub, tmp_path):
    """Strategy `end`, pushes on request, the card's metadata, and what plain transformers and we read back."""
    name = "alice/on-request"
    trainer = train_and_publish(tmp_path / "run", hub_model_id="on-request", hub_strategy="end", hub_tag_steps=True)
    assert trainer.hub_model_id == name
    (title,) = hub.store.titles(name)
    assert title.startswith("End of training, step 6, loss")
    assert "step-6" in hub.store.repositories["model", name].tags

    commit = trainer.push_to_hub(
        commit_message="With a license",
        license="apache-2.0",
        tags="tiny",
        dataset_tags="me/mine",
        finetuned_from="me/it",
    )
    assert commit.oid == hub.store.repositories["model", name].branches["main"]
    # Another tag, because the Hub's client makes no commit where nothing changed.
    future = trainer.push_to_hub(commit_message="On a branch", blocking=False, revision="dev", tags="dev")
    trainer.publisher.finish()
    assert future.result().commit_message == "On a branch"
    assert hub.store.titles(name)[1:] == ["With a license"]
    assert hub.store.titles(name, "dev")[-1] == "On a branch"
    description = hub.store.repositories["model", name].commits[commit.oid].message
    assert description.startswith("step 6, loss")
    assert not (tmp_path / "run" / FOLDER).exists()

    data = huggingface_hub.ModelCard.load(name).data
    assert (data.license, data.base_model, data.datasets) == ("apache-2.0", "me/it", ["me/mine"])
    assert {"tiny", "neuron-recycling"} <= set(data.tags)
    published = AutoModelForMaskedLM.from_pretrained(name).state_dict()
    assert all(torch.equal(value, published[key]) for key, value in trainer.model.state_dict().items())
    folder = huggingface_hub.snapshot_download(name)
    assert RecyclingHistory.from_pretrained(folder).stats["step"] == 6


def test_a_hub_that_never_takes_a_commit_costs_no_training_and_loses_nothing(
    online, hub, tmp_path, unpublished_run, caplog
):
    name, run = "alice/stormy", tmp_path / "run"
    hub.faults.set([Fault(COMMIT)])
    trainer = make_trainer(run, hub_model_id=name, hub_strategy="all_checkpoints", save_total_limit=1, save_steps=3)
    trainer.publisher.policy = RetryPolicy(first=0.01, longest=0.1, last_patience=0.5)
    with caplog.at_level("WARNING"):
        result = trainer.train()
    assert result.global_step == 6
    assert_same_weights(trainer, unpublished_run)
    commands = [item.push.command for item in trainer.publisher.unpublished]
    assert len(commands) == 2
    for command in commands:
        assert caplog.text.count(command) == 2, "said at once and again at the end"
    assert [push.checkpoint for push in leftovers(run)] == ["checkpoint-3", "checkpoint-6"]

    hub.faults.set()
    assert main(commands[0].split()[1:]) == 0
    # A run that goes on takes up what is left before what is new.
    resumed = make_trainer(
        run, hub_model_id=name, hub_strategy="all_checkpoints", save_total_limit=1, save_steps=3, max_steps=9
    )
    resumed.train(resume_from_checkpoint=True)
    assert [title.split(",")[0] for title in hub.store.titles(name)] == ["step 3", "step 6", "step 9"]
    assert not (run / FOLDER).exists()


class Augmented(torch.utils.data.Dataset):
    """Sentences with words replaced by means of Python's own generator, as augmentations are made."""

    def __init__(self):
        self.rows = list(sentences())

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = dict(self.rows[index])
        row["input_ids"] = [7 if random.random() < 0.2 else token for token in row["input_ids"]]
        return row


def test_failing_pushes_draw_nothing_from_the_generators_that_data_are_made_with(online, hub, tmp_path):
    hub.faults.set([Fault(COMMIT)])
    ends = []
    for publishing in (True, False):
        trainer = make_trainer(
            tmp_path / str(publishing), hub_model_id="alice/random", push_to_hub=publishing, hub_always_push=publishing
        )
        trainer.train_dataset = Augmented()
        if publishing:
            trainer.publisher.policy = RetryPolicy(first=0.001, longest=0.01, last_patience=0.5)
            trainer.publisher.finish = trainer.publisher.abandon
            trainer.add_callback(AtStep(**{f"_{step}": lambda: time.sleep(0.2) for step in range(1, 7)}))
        random.seed(1)
        trainer.train()
        ends.append((trainer, random.getstate()))
    assert len(hub.requests(COMMIT)) > 3
    assert_same_weights(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_what_a_run_gave_up_is_not_put_over_what_it_has_published_since(online, hub, tmp_path):
    """Neither forgotten nor taken up wrongly: step 2 is refused, step 4 lands, and the run goes on."""
    for strategy, kept in (("every_save", []), ("all_checkpoints", ["checkpoint-2"])):
        name, run = f"alice/overtaken-{strategy.replace('_', '-')}", tmp_path / strategy
        hub.faults.set([Fault(COMMIT, status=403, times=1)])
        trainer = make_trainer(run, hub_model_id=name, hub_strategy=strategy, max_steps=4)
        trainer.publisher.submit = one_after_the_other(trainer.publisher)
        trainer.train()
        assert [title.split(",")[0] for title in hub.store.titles(name)] == ["step 4"]
        assert [item.push.checkpoint for item in trainer.publisher.unpublished] == kept
        root = model_at(hub, name)

        resumed = make_trainer(run, hub_model_id=name, hub_strategy=strategy, max_steps=5, save_steps=10)
        resumed.args.save_strategy = "no"
        resumed.train(resume_from_checkpoint=True)
        titles = [title.split(",")[0] for title in hub.store.titles(name)]
        assert titles[:2] == ["step 4", *(["step 2"] if kept else [])]
        if kept:
            late = next(
                c for c in hub.store.repositories["model", name].commits.values() if c.title.startswith("step 2")
            )
            assert model_at(hub, name, late.sha) == root
            assert (
                model_at(hub, name, late.sha, "checkpoint-2/") == (run / "checkpoint-2/model.safetensors").read_bytes()
            )
        assert resumed.publisher.report() == ""
        assert not (run / FOLDER).exists()


def one_after_the_other(publisher):
    """Or a push may wait for the next one, which replaces it."""
    submit = publisher.submit

    def submit_and_wait(push):
        future = submit(push)
        future.result()
        return future

    return submit_and_wait


def test_a_hub_that_comes_dies_and_comes_back_while_training(online, tmp_path, monkeypatch, caplog):
    """Away at the start, there from step 1, killed at step 3 and restarted at step 5."""
    store = tmp_path / "store"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    server = HubServer(Store(store), port=port)
    with caplog.at_level("WARNING"):
        trainer = make_trainer(
            tmp_path / "run",
            hub_model_id="alice/late",
            hub_strategy="checkpoint",
            hub_tag_steps=True,
            callbacks=[AtStep(_1=server.start, _3=server.stop, _5=server.start)],
        )
    assert "Training starts" in caplog.text
    trainer.train()
    server.stop()
    assert trainer.publisher.report() == ""
    assert [title.split(",")[0] for title in Store(store).titles("alice/late")] == ["step 2", "step 4", "step 6"]


def test_interrupted_it_ends_soon_and_says_what_is_left(online, hub, tmp_path, caplog):
    hub.faults.set([Fault(COMMIT, status=503)])

    def interrupt():
        raise KeyboardInterrupt

    trainer = make_trainer(tmp_path / "run", hub_model_id="alice/stopped", callbacks=[AtStep(_3=interrupt)])
    trainer.publisher.policy = RetryPolicy(first=60)
    with caplog.at_level("WARNING"), pytest.raises(KeyboardInterrupt):
        trainer.train()
    (left,) = trainer.publisher.unpublished
    assert left.push.folder.name == "0001-checkpoint-2"
    assert (left.push.folder / "model.safetensors").is_file()
    assert left.push.command in caplog.text


def test_nothing_published_tells_about_the_machine(online, hub, tmp_path, monkeypatch):
    home = tmp_path / "home" / "wanda-quux"
    run = home / "secret project" / "run-7"
    run.mkdir(parents=True)
    host, user = "node-17.hidden.example", "wanda-quux"
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    for variable in ("USER", "LOGNAME"):
        monkeypatch.setenv(variable, user)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    name = "alice/discreet"
    (run / "runs").mkdir()
    (run / "runs" / f"events.out.tfevents.1.{host}").write_text(host)
    (run / "train.log").write_text(f"{user}@{host}")
    (run / "leaked.txt").write_text(f"my token is {ALICE}")
    trainer = make_trainer(
        run,
        hub_model_id=name,
        hub_token=ALICE,
        hub_strategy="checkpoint",
        run_name=f"{user}'s run on {host}",
        lr_scheduler_kwargs={},
        load_best_model_at_end=False,
        resume_from_checkpoint=str(run),
        save_steps=6,
    )
    trainer.model.config._name_or_path = str(home / "base")
    trainer.model.config.note = f"made in {run}"
    trainer.state.best_model_checkpoint = str(run / "checkpoint-6")
    trainer.train()
    trainer.save_model()
    assert trainer.publisher.report() == ""
    assert ALICE.encode() in (run / "training_args.bin").read_bytes(), "or else this test shows nothing"
    paths = hub.store.paths(name)
    assert "last-checkpoint/trainer_state.json" in paths
    assert not [path for path in paths if path.endswith("training_args.bin")]
    repository = hub.store.repositories["model", name]
    told = {"commits": " ".join(c.title + c.message for c in repository.commits.values()).encode()}
    for revision in repository.commits:
        for path in hub.store.paths(name, revision):
            told[f"{path}@{revision}"] = hub.store.read(name, path, revision)
    for path, data in told.items():
        parts = [data]
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                parts += [archive.read(member) for member in archive.namelist()]
        for secret in (ALICE, host, user, str(home), str(tmp_path), "secret project"):
            assert not any(secret.encode() in part for part in parts), f"{path} tells {secret}"
    assert not [path for path in paths if "events" in path or path.endswith((".log", "leaked.txt"))]


def test_of_two_processes_one_talks_to_the_hub_and_the_other_does_not_wait(hub, hub_environment, tmp_path):
    script = Path(__file__).with_name("publishing_in_two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=hub_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0]["refused"] == told[1]["refused"], "a bad name stops both, with one sentence"
    assert "hub_model_id='alice/a--b'" in told[0]["refused"]
    assert told[0]["requests"] > 0
    assert told[1]["requests"] == 0
    assert told[0]["name"] == told[1]["name"] == "alice/two"
    titles = hub.store.titles("alice/two")
    assert [title.split(",")[0] for title in titles] == ["step 3", "step 6", "Model saved"]
    assert {"last-checkpoint/rng_state_0.pth", "last-checkpoint/rng_state_1.pth"} <= set(hub.store.paths("alice/two"))


def test_a_full_disk_stops_neither_training_nor_the_next_push(online, hub, tmp_path, monkeypatch, caplog):
    from hf_recycle.hub.push import trainer as module

    stage, failed = module.stage, []

    def no_space(push, *args, **kwargs):
        if not failed:
            failed.append(push)
            raise OSError(28, "No space left on device")
        return stage(push, *args, **kwargs)

    monkeypatch.setattr(module, "stage", no_space)
    with caplog.at_level("ERROR"):
        train_and_publish(tmp_path / "run", hub_model_id="alice/full", save_steps=3)
    assert "No space left" in caplog.text
    assert [title.split(",")[0] for title in hub.store.titles("alice/full")] == ["step 6"]
    shutil.rmtree(tmp_path / "run")


def test_the_shipped_policy_is_the_one_in_use():
    from hf_recycle import RecyclingTrainer

    assert RecyclingTrainer.push_policy == RetryPolicy()
    assert RetryPolicy() != QUICK
