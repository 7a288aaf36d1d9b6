"""What is pulled is not trusted: hostile repositories give one clear error, and nothing of them is executed."""

import io
import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pulled_runs import contents, new_trainer, pull_checkpoint, saved
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerState

from hf_recycle import RecyclingArguments, RecyclingHistory, find_feed_forwards
from hf_recycle.analysis import shrink_files
from hf_recycle.analysis.checkpoint import Checkpoint
from hf_recycle.analysis.source import Source
from hf_recycle.cli.main import main
from hf_recycle.cli.report import report
from hf_recycle.data.arguments import ModelArguments
from hf_recycle.data.model import pin_revision
from hf_recycle.errors import UserError
from hf_recycle.hub.address import HubAddress
from hf_recycle.hub.checks import sizes
from hf_recycle.hub.pull.names import check_names
from hf_recycle.hub.pull.pull import is_pulled, plan
from hf_recycle.hub.pull.resume import forget_foreign_best, local_checkpoint

STATE_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "scaler.pt", "optimizer.bin")


class _Bomb:
    """Unpickling it makes a file: the least that code of others can do."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code of the repository was executed"


@pytest.mark.parametrize("name", STATE_FILES)
@pytest.mark.parametrize("form", ["torch", "plain pickle", "legacy"])
def test_a_pickle_bomb_in_place_of_a_state_file(hub, online, pulled_checkpoint, marker, name, form):
    bomb = {"state": {}, "param_groups": [_Bomb(marker)]}
    buffer = io.BytesIO()
    torch.save(bomb, buffer, _use_new_zipfile_serialization=False)
    content = {"torch": saved(bomb), "plain pickle": pickle.dumps(bomb), "legacy": buffer.getvalue()}[form]
    repo = hub.store.create(f"alice/bomb-{name}-{form.replace(' ', '-')}").name
    hub.store.add_files(repo, contents(pulled_checkpoint, "checkpoint-4") | {f"checkpoint-4/{name}": content})
    with pytest.raises(UserError, match=name) as error:
        pull_checkpoint(f"hub://{repo}")
    assert "nothing of it was used" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_bomb_would_go_off(marker, tmp_path):
    """The tests above can fail: unpickled without `weights_only`, the file does what it was made for."""
    path = tmp_path / "optimizer.pt"
    path.write_bytes(saved(_Bomb(marker)))
    torch.load(path, weights_only=False)
    assert marker.exists()
    marker.rmdir()


def test_a_bomb_is_not_touched_where_nothing_needs_it(hub, online, pulled_checkpoint, marker, tmp_path):
    repo = hub.store.create("alice/bomb-beside").name
    bomb = saved(_Bomb(marker))
    names = ("training_args.bin", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "evil.pkl")
    hub.store.add_files(
        repo, contents(pulled_checkpoint, "checkpoint-4") | {f"checkpoint-4/{name}": bomb for name in names}
    )
    folder = pull_checkpoint(f"hub://{repo}")
    assert not {path.name for path in folder.iterdir()} & set(names)
    trainer = new_trainer(tmp_path / "out", max_steps=6)
    trainer.train(resume_from_checkpoint=f"hub://{repo}")
    assert trainer.state.global_step == 6


def test_weights_come_from_safetensors_only(hub, online, pulled_checkpoint):
    repo = hub.store.create("alice/pickled-weights").name
    files = contents(pulled_checkpoint, "checkpoint-4")
    files["checkpoint-4/pytorch_model.bin"] = files.pop("checkpoint-4/model.safetensors")
    hub.store.add_files(repo, files)
    with pytest.raises(UserError, match=r"lacks the weights \(model\.safetensors\)"):
        pull_checkpoint(f"hub://{repo}/checkpoint-4")


@pytest.mark.parametrize(
    "shard",
    [
        "global_step4/mp_rank_00_model_states.pt",
        "latest",
        "pytorch_model_fsdp_0/.metadata",
        "optimizer_0/__0_0.distcp",
        "global_step4_universal/zero/optimizer_state.pt",
        ".metadata",
    ],
)
def test_sharded_checkpoints_only_with_the_flag(hub, online, pulled_checkpoint, marker, shard):
    name = f"alice/sharded-{''.join(filter(str.isalnum, shard))}"
    hub.store.create(name)
    extra = {f"checkpoint-4/{shard}": saved(_Bomb(marker)), "checkpoint-4/zero_to_fp32.py": b"raise SystemExit"}
    hub.store.add_files(name, contents(pulled_checkpoint, "checkpoint-4") | extra)
    address = HubAddress.parse(f"hub://{name}")

    with pytest.raises(UserError, match=r"is sharded .*--trust_pickled_checkpoint if you trust") as error:
        plan(address)
    assert shard in str(error.value)
    assert not hub.requests("/resolve/"), "nothing was downloaded"
    folder = plan(address, trust_pickled=True).fetch()
    assert (folder / shard).is_file()
    assert not (folder / "zero_to_fp32.py").exists()
    assert not (folder / "training_args.bin").exists()


def test_the_flag_does_not_open_the_state_files(hub, online, pulled_checkpoint, marker):
    repo = hub.store.create("alice/flagged").name
    extra = {"checkpoint-4/latest": b"x", "checkpoint-4/optimizer.pt": saved(_Bomb(marker))}
    hub.store.add_files(repo, contents(pulled_checkpoint, "checkpoint-4") | extra)
    with pytest.raises(UserError, match=r"optimizer\.pt"):
        pull_checkpoint(f"hub://{repo}", trust_pickled=True)


HOSTILE = [
    "../../evil.pt",
    "last-checkpoint/../../evil.pt",
    "/etc/evil.pt",
    "last-checkpoint//evil.pt",
    "last-checkpoint/./evil.pt",
    "last-checkpoint\\..\\evil.pt",
    "C:/evil.pt",
    "last-checkpoint/evil\0.pt",
    "last-checkpoint/evil\n.pt",
    "~/evil.pt",
    "last-checkpoint/" + "x" * 300,
    "/".join(["x" * 50] * 40),
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names(hub, online, pulled_checkpoint, hostile, tmp_path):
    repo = hub.store.create(f"alice/hostile-{HOSTILE.index(hostile)}").name
    hub.store.add_files(repo, contents(pulled_checkpoint, "last-checkpoint") | {hostile: b"x"})
    with pytest.raises(UserError, match="nothing of it was fetched") as error:
        pull_checkpoint(f"hub://{repo}")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert not hub.requests("/resolve/")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(online)]


@given(st.text(alphabet="ab./\\~:\0\n-é", max_size=12))
def test_a_name_that_passes_stays_in_its_folder(name):
    try:
        check_names("here", [name])
    except UserError:
        return
    joined = os.path.normpath(os.path.join("/cache/snapshot", name))
    assert joined == f"/cache/snapshot/{name}"
    assert "\\" not in name
    assert name.isprintable() or not any(ord(character) < 32 for character in name)


@pytest.fixture
def claiming(monkeypatch):
    """`claiming(ending, size)`: for the next questions the Hub says that files whose path ends so have this size."""
    original = huggingface_hub.HfApi.list_repo_tree

    def set_to(ending: str, size: int) -> None:
        def listed(*args, **kwargs):
            for entry in original(*args, **kwargs):
                if entry.path.endswith(ending):
                    entry.size = size
                yield entry

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", listed)

    return set_to


@pytest.mark.parametrize(
    ("name", "size", "problem"),
    [
        ("model.safetensors", 2**60, "are free in the cache"),
        ("rng_state.pth", 2**23, r"rng_state\.pth is not to be trusted \(it has 8,388,608 bytes"),
        ("/config.json", 198 * 10**6, r"config\.json is not to be trusted"),
        ("trainer_state.json", 2**28, r"trainer_state\.json is not to be trusted"),
        ("recycling_config.json", 2**24, r"recycling_config\.json is not to be trusted"),
        ("recycling_history.parquet", 2**31, r"recycling_history\.parquet is not to be trusted"),
    ],
)
@pytest.mark.parametrize("folder", ["checkpoint-4", "last-checkpoint"])
def test_sizes_are_bounded_before_anything_is_downloaded(
    hub, online, pulled_checkpoint, claiming, name, size, problem, folder
):
    repo = hub.store.create(f"alice/huge-{name.strip('/').partition('.')[0]}-{folder}").name
    hub.store.add_files(repo, contents(pulled_checkpoint, folder))
    claiming(name, size)
    with pytest.raises(UserError, match=problem):
        pull_checkpoint(f"hf://{repo}/{folder}")
    assert not hub.requests("/resolve/")
    with pytest.raises(UserError, match=problem):
        pull_checkpoint(f"hf://{repo}")
    # To know which is the newest, the step of last-checkpoint is asked for.
    assert not hub.requests(f"GET .*/resolve/.*({name}|safetensors)")


@pytest.mark.parametrize("take", ["history", "analyze", "shrink", "a new run", "report"])
def test_large_small_files_of_a_model_are_not_downloaded(hub, online, pulled_checkpoint, take, tmp_path, monkeypatch):
    """The Hub's test server has no such files: the bounds come down to what is there."""
    repo = hub.store.create(f"alice/large-{take.replace(' ', '-')}").name
    hub.store.add_files(repo, {Path(key).name: value for key, value in contents(pulled_checkpoint, "x").items()})
    name = "recycling_stats.json" if take in ("history", "report") else "config.json"
    monkeypatch.setitem(sizes._MOST, name, 100)
    actions = {
        "history": lambda: RecyclingHistory.from_pretrained(repo),
        "report": lambda: report(f"hf://{repo}"),
        "analyze": lambda: Checkpoint(Source(repo)).blocks,
        "shrink": lambda: shrink_files.load_model(Source(f"hf://{repo}")),
        "a new run": lambda: pin_revision(ModelArguments(model_name_or_path=f"hf://{repo}")),
    }
    with pytest.raises(ValueError, match=rf"{name} is not to be trusted \(it has .* bytes and such a file has at most"):
        actions[take]()
    assert not hub.requests(f"GET .*/resolve/.*{name}")


def test_the_trainer_itself_checks_what_lies_in_the_cache(
    hub, online, pulled_checkpoint, marker, monkeypatch, tmp_path
):
    """The path that `hf-recycle pull` prints is no way round the checks."""
    repo = hub.store.create("alice/by-path").name
    bomb = {"checkpoint-4/scheduler.pt": saved(_Bomb(marker))}
    hub.store.add_files(repo, contents(pulled_checkpoint, "checkpoint-4") | bomb)
    folder = Path(huggingface_hub.snapshot_download(repo), "checkpoint-4")
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("training began"))
    with pytest.raises(UserError, match=r"scheduler\.pt"):
        new_trainer(tmp_path / "out").train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("named", ["as text", "as a path", "by a linked cache", "by a link to it", "as the last one"])
def test_shards_in_the_cache_only_with_the_flag(hub, online, pulled_checkpoint, marker, monkeypatch, tmp_path, named):
    """However the folder is named; torch.distributed.checkpoint unpickles `.metadata` as soon as it reads them."""
    repo = hub.store.create(f"alice/shards-{named.replace(' ', '-')}").name
    bomb = {"checkpoint-4/optimizer_0/.metadata": pickle.dumps(_Bomb(marker))}
    hub.store.add_files(repo, contents(pulled_checkpoint, "checkpoint-4") | bomb)
    folder = Path(huggingface_hub.snapshot_download(repo), "checkpoint-4")
    out = tmp_path / "out"
    if named == "by a linked cache":
        Path(tmp_path / "linked").symlink_to(online)
        folder = tmp_path / "linked" / folder.relative_to(online)
    elif named == "by a link to it":
        Path(tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    elif named == "as the last one":
        out.mkdir()
        Path(out / "checkpoint-4").symlink_to(folder)
    source = {"as a path": folder, "as the last one": True}.get(named, str(folder))
    taken = []
    monkeypatch.setattr(Trainer, "train", lambda self, resume_from_checkpoint, *args, **kwargs: taken.append(1))
    with pytest.raises(UserError, match=r"is sharded .optimizer_0/.*--trust_pickled_checkpoint if you trust"):
        new_trainer(out).train(resume_from_checkpoint=source)
    assert not taken
    new_trainer(out, trust_pickled_checkpoint=True).train(resume_from_checkpoint=source)
    assert taken


def test_a_linked_folder_of_shards_is_seen(hub, online, pulled_checkpoint, tmp_path):
    """A link in the place of a folder is not entered, and refused by its name."""
    folder = online / "models--alice--by-hand" / "snapshots" / "0" / "checkpoint-4"
    shutil.copytree(pulled_checkpoint, folder)
    (tmp_path / "elsewhere").mkdir()
    (folder / "optimizer_0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"is sharded \(optimizer_0/\)"):
        local_checkpoint(folder, RecyclingArguments(output_dir=str(tmp_path / "out"), use_cpu=True))


def test_what_lies_in_the_cache_is_found_there(online, tmp_path):
    """Also if a repository's folder is a link to a larger disk; what only has a similar name is not of the cache."""
    (online / "models--alice--x").mkdir(parents=True)
    disk, beside = tmp_path / "disk", online.with_name("hub-2")
    (disk / "checkpoint-4").mkdir(parents=True)
    beside.mkdir()
    (online / "models--alice--y").symlink_to(disk)
    assert is_pulled(online / "models--alice--x")
    assert is_pulled(str(online / "models--alice--y" / "checkpoint-4"))
    assert not is_pulled(disk / "checkpoint-4")
    assert not is_pulled(beside)


def test_a_path_stays_a_path_of_text(tmp_path):
    """The Trainer notes it in its state, which is JSON."""
    args = RecyclingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    assert local_checkpoint(tmp_path, args) == str(tmp_path)
    assert [local_checkpoint(source, args) for source in (None, True, False)] == [None, True, False]


@pytest.mark.parametrize(
    ("best_step", "present", "expected"),
    [(4, False, "pulled"), (2, True, "checkpoint-2"), (2, False, None), (None, False, None)],
)
def test_no_path_of_another_machine_is_opened(tmp_path, best_step, present, expected):
    if present:
        (tmp_path / "checkpoint-2").mkdir()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    state = TrainerState(global_step=4, best_global_step=best_step, best_model_checkpoint=str(foreign))
    forget_foreign_best(state, "pulled", str(tmp_path))
    found = state.best_model_checkpoint
    assert (found and Path(found).name) == expected


def test_pickled_weights_are_read_only_with_the_flag(hub, online, marker, tmp_path, capsys):
    """And then by an unpickler that refuses all that is none."""
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    repo = hub.store.create("alice/pickled").name
    files = {"config.json": model.config.to_json_string().encode(), "pytorch_model.bin": saved(model.state_dict())}
    hub.store.add_files(repo, files)
    small = ["--fraction", "0.5", "--output", str(tmp_path / "small")]
    for words in (["analyze", repo], ["shrink", repo, *small]):
        assert main(words) == 2
        assert "you trust whoever wrote it to run code on this machine, pass trust_pickle" in capsys.readouterr().err
    assert not hub.requests("/resolve/.*bin")
    assert main(["analyze", repo, "--trust_pickle"]) == 0
    assert main(["shrink", repo, *small, "--trust_pickle"]) == 0
    assert find_feed_forwards(BertForMaskedLM.from_pretrained(tmp_path / "small"))[0].num_neurons == 8
    hub.store.add_files(repo, {"pytorch_model.bin": saved({"bert.x": _Bomb(marker)})})
    assert main(["analyze", repo, "--trust_pickle"]) == 2
    assert "can't be read as plain weights" in capsys.readouterr().err
    assert not marker.exists()
