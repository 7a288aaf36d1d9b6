"""Checkpoints come from the Hub: the right one, of one commit, only what is needed, with errors that help."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from hub_server import ALICE, ALICE_READ, BOB, INVALID, Fault
from huggingface_hub import HfApi
from pulled_runs import contents, new_trainer, pull_checkpoint

from hf_recycle import RecyclingHistory
from hf_recycle.analysis import shrink_files
from hf_recycle.analysis.source import Source
from hf_recycle.cli.main import main
from hf_recycle.data.arguments import ModelArguments
from hf_recycle.data.model import load_config, load_model, pin_revision
from hf_recycle.errors import UserError
from hf_recycle.hub.address import HubAddress
from hf_recycle.hub.pull.pull import plan
from hf_recycle.records.files import RECYCLING_FILES, RecyclingFileError
from hf_recycle.runs.run import Run

NEEDED = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run with checkpoints 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("run")
    new_trainer(folder).train()
    return folder


@pytest.fixture
def publish(hub, run, request):
    """`publish({folder of the repository: step}, name)`: a repository with these checkpoints; returns its name."""

    def make(steps: dict[str, int], name: str | None = None, **options) -> str:
        name = f"alice/{name or re.sub(r'[^a-z0-9]+', '-', request.node.name).strip('-')}"
        hub.store.create(name, **options)
        for folder, step in steps.items():
            hub.store.add_files(name, contents(run / f"checkpoint-{step}", folder))
        hub.log.clear()
        return name

    return make


def step_of(folder: Path) -> int:
    return json.loads((folder / "trainer_state.json").read_text())["global_step"]


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [
        ({"last-checkpoint": 6, "checkpoint-4": 4}, "last-checkpoint"),
        ({"last-checkpoint": 4, "checkpoint-4": 4, "checkpoint-6": 6}, "checkpoint-6"),
        ({"last-checkpoint": 6, "checkpoint-6": 6}, "checkpoint-6"),
        ({"last-checkpoint": 2}, "last-checkpoint"),
        ({"checkpoint-2": 2, "checkpoint-4": 4}, "checkpoint-4"),
    ],
)
def test_the_newest_checkpoint_is_chosen(publish, online, steps, chosen):
    folder = pull_checkpoint(f"hub://{publish(steps)}")
    assert folder.name == chosen
    assert step_of(folder) == max(steps.values())
    assert folder.is_relative_to(online)


def test_incomplete_checkpoints_are_passed_over(publish, hub, online):
    name = publish({"checkpoint-2": 2, "checkpoint-4": 4, "last-checkpoint": 6})
    hub.store.add_files(name, {}, delete=["checkpoint-4/rng_state.pth", "last-checkpoint/optimizer.pt"])
    assert pull_checkpoint(f"hub://{name}").name == "checkpoint-2"
    with pytest.raises(UserError, match=r"checkpoint-4 lacks rng_state\.pth"):
        pull_checkpoint(f"hub://{name}/checkpoint-4")


def test_only_what_is_needed_is_downloaded(publish, hub, online):
    name = publish({"checkpoint-2": 2, "last-checkpoint": 4})
    extra = {"README.md": b"x", "figures/loss.png": b"x", "pytorch_model.bin": b"x", "zero_to_fp32.py": b"x"}
    hub.store.add_files(name, {f"last-checkpoint/{key}": value for key, value in extra.items()})

    folder = pull_checkpoint(f"hub://{name}/last-checkpoint")

    assert {path.name for path in folder.iterdir()} >= NEEDED | set(RECYCLING_FILES)
    assert not {path.name for path in folder.iterdir()} & {*extra, "training_args.bin", "figures"}
    assert not hub.requests("checkpoint-2|training_args|pytorch_model|README|figures")
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_all_files_come_from_one_commit(publish, hub, online):
    name = publish({"last-checkpoint": 2})
    settled = plan(HubAddress.parse(f"hub://{name}"))
    before = hub.store.read(name, "last-checkpoint/model.safetensors")
    replacement = {"last-checkpoint/model.safetensors": b"newer", "last-checkpoint/trainer_state.json": b"{}"}
    hub.store.add_files(name, replacement)

    folder = settled.fetch()

    assert (folder / "model.safetensors").read_bytes() == before
    assert folder.parent.name == settled.address.revision
    assert all(settled.address.revision in entry.target for entry in hub.requests("/resolve/"))


def test_revisions(publish, hub, online, run):
    name = publish({"last-checkpoint": 2})
    repository = hub.store.repositories["model", name]
    repository.tags["first"] = repository.branches["main"]
    hub.store.add_files(name, contents(run / "checkpoint-6", "last-checkpoint"))
    assert step_of(pull_checkpoint(f"hub://{name}@first")) == 2
    assert step_of(pull_checkpoint(f"hub://{name}@{repository.tags['first']}")) == 2
    assert step_of(pull_checkpoint(f"hub://{name}")) == 6


@pytest.mark.parametrize(
    ("address", "token", "message"),
    [
        ("hub://alice/absent", ALICE, "no such repository on the Hub that you may read"),
        ("hub://{secret}", BOB, "no such repository on the Hub that you may read"),
        ("hub://{gated}", BOB, "access to this repository is restricted"),
        ("hub://{name}", INVALID, "does not know your token"),
        ("hf://{name}@absent", ALICE, "no such revision"),
        ("hf://{name}@" + "0" * 40, ALICE, "no such revision"),
        ("hf://{name}@main/models", ALICE, "write last-checkpoint or checkpoint-N"),
        ("hub://{name}/checkpoint-7", ALICE, "no folder checkpoint-7; it has checkpoint-2"),
        ("hub://{empty}", ALICE, r"neither last-checkpoint nor a checkpoint-N.*--model_name_or_path alice/empty"),
        ("hub://{empty}/last-checkpoint", ALICE, "it has no checkpoint"),
    ],
)
def test_what_can_not_be_had_is_said_in_one_sentence(hub, publish, online, monkeypatch, address, token, message):
    names = {"name": {}, "secret": {"private": True}, "gated": {"gated": True}}
    names = {key: f"alice/{key}" for key in names if ("model", f"alice/{key}") in hub.store.repositories} or {
        key: publish({"checkpoint-2": 2}, name=key, **options) for key, options in names.items()
    }
    names["empty"] = "alice/empty"
    hub.store.create("alice/empty")
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message) as error:
        pull_checkpoint(address.format(**names))
    assert "\n" not in str(error.value)
    assert "hf_" not in str(error.value), "no token in a message"


def test_a_private_repository_with_a_token(publish, online, monkeypatch):
    name = publish({"checkpoint-2": 2}, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no such repository"):
        pull_checkpoint(f"hub://{name}")
    assert pull_checkpoint(f"hub://{name}", token=ALICE_READ).is_dir()


def test_offline_takes_what_was_pulled_before(publish, hub, online, monkeypatch, run):
    name = publish({"last-checkpoint": 2, "checkpoint-2": 2})
    first = pull_checkpoint(f"hub://{name}")
    assert first.name == "checkpoint-2", "of last-checkpoint only the file that tells its step is in the cache"
    hub.store.add_files(name, contents(run / "checkpoint-4", "checkpoint-4"))
    other = publish({"checkpoint-2": 2}, name="offline-and-new")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    assert pull_checkpoint(f"hub://{name}") == first
    assert pull_checkpoint(f"hub://{name}/checkpoint-2") == first
    with pytest.raises(UserError, match="not in the cache and the Hub can't be reached"):
        pull_checkpoint(f"hub://{other}")
    with pytest.raises(UserError, match="not in the cache and the Hub can't be reached"):
        pull_checkpoint(f"hub://{name}/last-checkpoint")
    (first / "recycling_state.safetensors").unlink()
    with pytest.raises(UserError, match="not in the cache and the Hub can't be reached"):
        pull_checkpoint(f"hub://{name}/checkpoint-2")


def test_the_hub_is_down(publish, hub, online, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    name, known = publish({"checkpoint-2": 2}), publish({"checkpoint-4": 4}, name="known")
    before = pull_checkpoint(f"hub://{known}")
    hub.stop()
    try:
        with pytest.raises(UserError, match=r"can't be (reached|downloaded)"):
            pull_checkpoint(f"hub://{name}")
        assert pull_checkpoint(f"hub://{known}") == before
    finally:
        hub.start()
    hub.faults.set([Fault("/resolve/.*safetensors", "truncate", times=1), Fault("/resolve/", status=503, every=5)])
    assert pull_checkpoint(f"hub://{name}").is_dir()


def test_the_pull_command(publish, online, tmp_path, capsys):
    name = publish({"checkpoint-2": 2, "last-checkpoint": 4})
    assert main(["pull", name]) == 0
    address, folder, advice = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"hf://{name}@[0-9a-f]{{40}}/last-checkpoint", address)
    assert Path(folder).is_dir()
    assert advice == f"resume with: --resume_from_checkpoint {address}"

    out = tmp_path / "out"
    assert main(["pull", f"hub://{name}", "--folder", "checkpoint-2", "--output", str(out)]) == 0
    copied = out / "checkpoint-2"
    assert {path.name for path in out.iterdir()} == {"checkpoint-2"}
    assert not any(path.is_symlink() for path in copied.iterdir())
    assert {path.name for path in copied.iterdir()} >= NEEDED | set(RECYCLING_FILES)
    assert main(["pull", name, "--folder", "checkpoint-2", "--output", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["pull", f"hub://{name}/checkpoint-2", "--folder", "last-checkpoint"]) == 2
    assert "contradicts" in capsys.readouterr().err
    assert main(["pull", "bert"]) == 2
    assert "write user/repo" in capsys.readouterr().err


def test_a_history_is_small_and_of_one_commit(hub, online, run):
    name = hub.store.create("alice/history").name
    files = {key.removeprefix("x/"): value for key, value in contents(run / "checkpoint-6", "x").items()}
    first = hub.store.add_files(name, files)

    history = RecyclingHistory.from_pretrained(name)

    assert history.stats["step"] == 6
    fetched = {entry.target.rsplit("/", 1)[-1] for entry in hub.requests("^GET .*/resolve/")}
    assert fetched == set(RECYCLING_FILES)
    later = [entry.target for entry in hub.requests("/resolve/") if "recycling_config" not in entry.target]
    assert all(first.sha in target for target in later)
    newer = {key.removeprefix("x/"): value for key, value in contents(run / "checkpoint-8", "x").items()}
    hub.store.add_files(name, newer)
    assert RecyclingHistory.from_pretrained(name, revision=first.sha[:10]).stats["step"] == 6
    assert RecyclingHistory.from_pretrained(name).stats["step"] == 8


def test_a_folder_of_a_repository_by_its_address(publish, hub, online, tmp_path, capsys):
    name = publish({"checkpoint-2": 2, "last-checkpoint": 6})
    address = f"hf://{name}@main/checkpoint-2"

    assert RecyclingHistory.from_pretrained(address).stats["step"] == 2
    assert RecyclingHistory.from_pretrained(f"hub://{name}/last-checkpoint").stats["step"] == 6
    with pytest.raises(RecyclingFileError, match="has no recycling_config"):
        RecyclingHistory.from_pretrained(f"hf://{name}")
    with pytest.raises(RecyclingFileError, match="contradicts"):
        RecyclingHistory.from_pretrained(address, revision="other")

    assert main(["analyze", address, "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["recycling"]["step"] == 2
    assert re.fullmatch(rf"{name}@[0-9a-f]{{8}}/checkpoint-2", model["model"])

    assert main(["report", address, "--output", str(tmp_path / "page.html")]) == 0
    assert "checkpoint-2" in (tmp_path / "page.html").read_text()

    model, tokenizer = shrink_files.load_model(Source(address))
    commit = hub.store.repositories["model", name].branches["main"]
    there = online / f"models--{name.replace('/', '--')}/snapshots/{commit}/checkpoint-2/model.safetensors"
    weights = safetensors.torch.load_file(there)
    key = next(key for key in weights if key.endswith("word_embeddings.weight"))
    assert torch.equal(model.state_dict()[key], weights[key])
    assert tokenizer is not None

    assert main(["analyze", address, "--revisions", "all"]) == 2
    assert "takes a whole repository" in capsys.readouterr().err
    assert not hub.requests("/resolve/.*last-checkpoint/(model|optimizer)")


def test_a_mistyped_folder(hub, online, run, monkeypatch):
    monkeypatch.chdir(run)
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(RecyclingFileError, match=r"no folder here \(did you mean checkpoint-\d\?\)"):
            RecyclingHistory.from_pretrained("checkpoin-2")
    with pytest.raises(RecyclingFileError, match="no folder here, and it is not the name of a repository"):
        RecyclingHistory.from_pretrained("./a/b/c")


def test_a_new_run_knows_the_commit_it_began_from(hub, online, run):
    name = hub.store.create("alice/base").name
    commit = hub.store.add_files(
        name, {k.removeprefix("x/"): v for k, v in contents(run / "checkpoint-2", "x").items()}
    )
    arguments = ModelArguments(model_name_or_path=name)
    pin_revision(arguments)
    hub.store.add_files(name, {"config.json": b"{}"})  # a push in the meantime

    from pulled_runs import word_tokenizer

    model = load_model(arguments, word_tokenizer(), 12)

    assert (model.name_or_path, model.config._commit_hash) == (name, commit.sha)
    assert arguments.model_revision == "main"
    assert "_commit_hash" not in model.config.to_json_string()


def test_a_commit_is_asked_for_again_and_what_is_not_known_is_said(hub, online, run, monkeypatch, caplog):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    name = hub.store.create("alice/busy").name
    commit = hub.store.add_files(name, {"config.json": b"{}"})
    hub.faults.set([Fault("/api/models/", status=503, times=1), Fault("/api/models/", status=429, times=1)])
    arguments = ModelArguments(model_name_or_path=name)
    pin_revision(arguments)
    assert arguments.model_revision.resolved == commit.sha
    assert not caplog.text

    elsewhere = ModelArguments(model_name_or_path="alice/never-seen")
    with caplog.at_level("WARNING"):
        pin_revision(elsewhere)
    assert elsewhere.model_revision == "main"
    assert "alice/never-seen" in caplog.text


def test_code_of_a_repository_is_run_only_on_request(hub, online, tmp_path):
    marker = tmp_path / "executed"
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import PretrainedConfig\n"
    code += "class MineConfig(PretrainedConfig):\n    model_type = 'mine'\n"
    name = hub.store.create("alice/code").name
    files = {"config.json": json.dumps(config).encode(), "configuration_mine.py": code.encode()}
    hub.store.add_files(name, files)
    with pytest.raises(UserError, match="trust_remote_code"):
        load_config(ModelArguments(model_name_or_path=name))
    assert not marker.exists()


def test_the_real_client_can_upload_what_is_pulled(hub, online, run):
    api = HfApi(endpoint=hub.url)
    name = api.create_repo("alice/uploaded").repo_id
    api.upload_folder(repo_id=name, folder_path=run / "checkpoint-4", path_in_repo="checkpoint-4")
    folder = pull_checkpoint(f"hub://{name}")
    assert (folder / "optimizer.pt").read_bytes() == (run / "checkpoint-4" / "optimizer.pt").read_bytes()


@pytest.mark.parametrize(
    "form", [["--resume_from_checkpoint", "hub://alice/a"], ["--resume_from_checkpoint=hub://alice/a"]]
)
def test_what_was_interrupted_goes_on_from_its_own_checkpoint(tmp_path, form):
    (tmp_path / "checkpoint-4").mkdir()
    run = SimpleNamespace(trainer=SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path))))
    advice = Run.how_to_go_on(run, ["demo", *form, "--seed", "1"])
    assert advice.endswith("hf-recycle train demo --seed 1 --resume_from_checkpoint true")
