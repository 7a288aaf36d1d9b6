"""Staged copies that are published later, and pushes by hand: `hf-recycle push` with the real client."""

import re
import shlex
import shutil

import pytest
from hub_server import ALICE, INVALID, Fault

from hf_recycle.cli.main import main
from hf_recycle.hub.push import repository as repository_module
from hf_recycle.hub.push.job import JOB_FILE, Push
from hf_recycle.hub.push.staging import leftovers, stage
from hf_recycle.hub.retry import RetryPolicy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("figures_not_drawn")]

COMMIT = r"POST /api/models/.*/commit/"


def test_a_staged_copy_outlives_rotation_and_the_next_save(tmp_path, run):
    checkpoint = tmp_path / "run" / "checkpoint-4"
    shutil.copytree(run / "checkpoint-4", checkpoint)
    for name in ("training_args.bin", "checkpoint_files.json"):  # not to be published
        (checkpoint / name).unlink()
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    staged = stage(Push(checkpoint, "alice/x", "step 4", tag="step-4", token=ALICE), tmp_path / "run", link=True)
    assert (staged.folder / "model.safetensors").stat().st_ino == (checkpoint / "model.safetensors").stat().st_ino
    shutil.rmtree(checkpoint)
    assert {path.name: path.read_bytes() for path in staged.folder.iterdir() if path.name in before} == before
    (tmp_path / "run" / "unpublished" / "tmp-0002-checkpoint-6").mkdir()
    (found,) = leftovers(tmp_path / "run")
    assert (found.folder, found.tag, found.token, found.staged) == (staged.folder, "step-4", None, True)
    assert ALICE not in (staged.folder / JOB_FILE).read_text()
    assert [path.name for path in staged.folder.parent.iterdir()] == ["0001-checkpoint-4"]


def test_the_command_that_is_said_publishes_it(publisher, hub, name, tmp_path, run, capsys):
    shutil.copytree(run / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    hub.faults.set([Fault(COMMIT, status=403)])
    push = Push(tmp_path / "run" / "checkpoint-4", name, "step 4", checkpoint="checkpoint-4", tag="step-4")
    publisher.submit(stage(push, tmp_path / "run", link=True))
    publisher.finish()
    (failed,) = publisher.unpublished
    assert failed.push.command in publisher.report()
    words = failed.push.command.split()
    assert words[:2] == ["hf-recycle", "push"]
    hub.faults.set()
    assert main(words[1:]) == 0
    assert hub.store.titles(name) == ["step 4"]
    assert "checkpoint-4/optimizer.pt" in hub.store.paths(name, "step-4")
    assert not (tmp_path / "run" / "unpublished").exists()
    assert "commit" in capsys.readouterr().out


def test_an_older_copy_is_published_as_its_folder_without_touching_the_newer_model(
    publisher, hub, name, tmp_path, run, capsys
):
    """Step 2 is given up, step 4 lands, and then the command that the report gives is run."""
    shutil.copytree(run, copy := tmp_path / "run")
    for step in (2, 4):
        hub.faults.set([Fault(COMMIT, status=403)] if step == 2 else [])
        push = Push(copy / f"checkpoint-{step}", name, f"step {step}", checkpoint=f"checkpoint-{step}", always=True)
        publisher.submit(stage(push.to(tag=f"step-{step}"), copy, link=True))
        publisher.finish()
    (failed,) = publisher.unpublished
    root = {path: hub.store.read(name, path) for path in hub.store.paths(name)}
    hub.faults.set(lost := [Fault(COMMIT, "lose_response", times=1)])  # done, but it does not learn of it
    assert main(failed.push.command.split()[1:]) == 0
    assert lost[0].fired
    assert not (copy / "unpublished").exists()
    now = {path: hub.store.read(name, path) for path in hub.store.paths(name)}
    assert {path: content for path, content in now.items() if not path.startswith("checkpoint-2/")} == root
    state = (run / "checkpoint-2" / "optimizer.pt").read_bytes()
    assert now["checkpoint-2/optimizer.pt"] == state
    repository = hub.store.repositories["model", name]
    assert set(repository.branches) == {"main"}
    assert set(repository.tags) == {"step-4"}


def test_an_older_copy_without_a_folder_of_its_own_is_refused_in_a_sentence(
    publisher, hub, name, tmp_path, run, capsys
):
    shutil.copytree(run, copy := tmp_path / "run")
    for step in (2, 4):
        hub.faults.set([Fault(COMMIT, status=403)] if step == 2 else [])
        push = Push(copy / f"checkpoint-{step}", name, f"step {step}", checkpoint="last-checkpoint", always=True)
        publisher.submit(stage(push, copy, link=True))
        publisher.finish()
    command = publisher.unpublished[0].push.command
    assert command in publisher.report()
    words = command.split()[2:]
    assert words[-2:] == ["--revision", "checkpoint-2"]
    assert main(["push", *words[:-2]]) == 2
    assert "holds a newer model" in capsys.readouterr().err
    assert main(["push", *words]) == 0
    assert hub.store.titles(name) == ["step 4"]
    assert hub.store.titles(name, "checkpoint-2") == ["step 4", "step 2"]


# ---- By hand ----


def test_pushing_by_hand(online, hub, name, run, capsys):
    assert main(["push", str(run), name, "--tag", "--private", "--resumable", "--commit_message", "my words"]) == 0
    assert hub.store.titles(name) == ["my words"]
    repository = hub.store.repositories["model", name]
    assert repository.private
    assert "step 4, loss" in repository.commits[repository.branches["main"]].message
    assert "last-checkpoint/optimizer.pt" in hub.store.paths(name, "step-4")
    assert main(["push", str(run), name, "--revision", "dev"]) == 0
    assert hub.store.titles(name, "dev")[-1].startswith("step 4, loss")


@pytest.mark.parametrize(
    ("folder", "repo", "token", "says"),
    [
        ("nowhere", "alice/x", ALICE, "does not exist"),
        (".", "alice/x", ALICE, "no weights"),
        ("run", "alice/x--y", ALICE, "REPO='alice/x--y'"),
        ("run", "bob/new", ALICE, "bob/new"),
        ("run", "alice/x", INVALID, "401"),
        ("run", "alice/x", None, "hf auth login"),
    ],
)
def test_a_mistake_by_hand_is_one_sentence(online, run, tmp_path, monkeypatch, capsys, folder, repo, token, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", folder, repo]) == 2
    said = capsys.readouterr().err.strip()
    error = said.splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error
    assert said.count(says) == error.count(says), "said once"
    assert not re.search(r"\w\.\.( |$)", error)


def test_what_was_to_be_private_is_published_privately_later(online, hub, name, tmp_path, run):
    checkpoint = tmp_path / "run" / "checkpoint-4"
    shutil.copytree(run / "checkpoint-4", checkpoint)
    wanted = Push(checkpoint, name, "step 4", private=True)
    for push, suffix in [(wanted, "-1"), (stage(wanted, tmp_path / "run", link=True), "-2")]:
        words = shlex.split(push.to(repo_id=name + suffix).command)
        assert main(words[1:]) == 0
        assert hub.store.repositories["model", name + suffix].private


def test_the_card_names_the_repository_it_is_published_in(online, hub, name, run):
    """Wherever it was written for; what was written by hand stays."""
    local = (run / "checkpoint-4" / "README.md").read_text()
    assert f"hf://{name}" not in local
    assert main(["push", str(run / "checkpoint-4"), name.removeprefix("alice/")]) == 0
    card = hub.store.read(name, "README.md").decode()
    assert f'from_pretrained("{name}")' in card
    assert f"hf://{name}" in card
    assert f"hf-recycle analyze {name}" in card
    assert "path/to/this/folder" not in card
    assert "figures/" not in local
    for path in re.findall(r"figures/\w+\.png", card):
        assert hub.store.read(name, path)
    assert (run / "checkpoint-4" / "README.md").read_text() == local
    again = name + "-again"
    assert main(["push", str(run / "checkpoint-4"), again]) == 0
    assert name not in hub.store.read(again, "README.md").decode().replace(again, "")


def test_a_hub_that_is_away_is_status_1(online, run, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(repository_module, "RetryPolicy", lambda: RetryPolicy(first=0.01, last_patience=1.0))
    assert main(["push", str(run), "alice/away"]) == 1
    assert "was not published" in capsys.readouterr().err
