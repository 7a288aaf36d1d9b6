"""A damaged checkpoint of our own is refused in a sentence that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM

from hf_recycle.checkpoints import file_list as checkpoint_list
from hf_recycle.checkpoints.file_list import LIST_FILE, check_list, write_list
from hf_recycle.errors import UserError
from hf_recycle.records.file_checks import RecyclingFileError

SETTINGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "recycle_steps": 2, "recycle_fraction": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with `checkpoint-2` and `checkpoint-4`. Not to be changed."""
    from support.tiny_runs import sentences, tiny_bert
    from support.words import word_tokenizer
    from transformers import DataCollatorForLanguageModeling

    from hf_recycle import RecyclingArguments, RecyclingTrainer

    folder = tmp_path_factory.mktemp("run")
    args = RecyclingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4, logging_steps=1, **SETTINGS
    )
    collator = DataCollatorForLanguageModeling(word_tokenizer())
    RecyclingTrainer(model=tiny_bert(), args=args, train_dataset=sentences(), data_collator=collator).train()
    return folder


@pytest.fixture
def checkpoint(run, tmp_path):
    return Path(shutil.copytree(run / "checkpoint-2", tmp_path / "run" / "checkpoint-2"))


def listed(checkpoint: Path) -> dict:
    return json.loads((checkpoint / LIST_FILE).read_text())["files"]


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path, _: path.unlink(),
    "empty": lambda path, _: path.write_bytes(b""),
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path, _: path.write_bytes(path.read_bytes() + b"\0"),
    "a flipped bit": lambda path, _: flip(path),
    "a flipped last bit": lambda path, _: flip(path, 1.0),
    "a folder": lambda path, _: (path.unlink(), path.mkdir()),
    "of another step": lambda path, other: shutil.copyfile(other, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_every_file_is_a_sentence_that_names_it(damage, checkpoint, run):
    assert check_list(checkpoint) == []
    for name in listed(checkpoint):
        path, original = checkpoint / name, (checkpoint / name).read_bytes()
        other = run / "checkpoint-4" / name
        if damage == "of another step" and other.read_bytes() == original:
            continue
        DAMAGES[damage](path, other)
        with pytest.raises(RecyclingFileError, match=rf"{name}: .*; restore it") as error:
            check_list(checkpoint)
        assert "\n" not in str(error.value)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(original)
    assert check_list(checkpoint) == []


def test_a_file_that_the_disk_does_not_give_is_a_sentence(checkpoint, monkeypatch):
    def fails(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_list, "sha256_of", fails)
    with pytest.raises(UserError, match=r"can't be read \(Input/output error\)"):
        check_list(checkpoint)


def test_what_training_goes_on_from_is_listed_and_what_may_be_edited_is_not(checkpoint):
    names = set(listed(checkpoint))
    assert names >= {
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"),
        *("recycling_config.json", "recycling_state.safetensors", "recycling_history.parquet", "recycling_stats.json"),
    }
    (checkpoint / "README.md").write_text("mine")
    (checkpoint / "training_args.bin").unlink()
    (checkpoint / "note.txt").write_text("mine")
    check_list(checkpoint)


def test_large_files_have_checksums_if_asked_for(checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoint_list, "_SMALL", 10_000)
    write_list(checkpoint, 2, checksum_all=False)
    assert set(check_list(checkpoint)) == {"model.safetensors", "optimizer.pt", "rng_state.pth"}
    flip(checkpoint / "model.safetensors")
    check_list(checkpoint)
    flip(checkpoint / "model.safetensors")
    write_list(checkpoint, 2, checksum_all=True)
    assert check_list(checkpoint) == []
    flip(checkpoint / "model.safetensors")
    with pytest.raises(RecyclingFileError, match=r"model\.safetensors: it was changed or damaged"):
        check_list(checkpoint)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(checkpoint):
    check_list(checkpoint.rename(checkpoint.with_name("best")))
    with pytest.raises(RecyclingFileError, match=r"checkpoint-7: it holds the checkpoint of step 2"):
        check_list(checkpoint.with_name("best").rename(checkpoint.with_name("checkpoint-7")))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 2, "files": [1]}'])
def test_a_damaged_list_is_named(content, checkpoint):
    (checkpoint / LIST_FILE).write_text(content)
    with pytest.raises(RecyclingFileError, match=LIST_FILE):
        check_list(checkpoint)


def test_resuming_begins_with_the_check(checkpoint, train):
    (checkpoint / "scheduler.pt").unlink()
    for resume in (True, str(checkpoint)):
        with pytest.raises(RecyclingFileError, match=r"scheduler\.pt: the file is missing"):
            train(resume=resume, **SETTINGS)


def test_weights_cut_into_shards_on_purpose_resume_once_the_list_is_deleted(checkpoint, run, train):
    (checkpoint / "model.safetensors").unlink()
    BertForMaskedLM.from_pretrained(run / "checkpoint-2").save_pretrained(checkpoint, max_shard_size="4KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    with pytest.raises(RecyclingFileError, match=rf"model\.safetensors: the file is missing; .* delete {LIST_FILE}"):
        train(resume=str(checkpoint), **SETTINGS)
    (checkpoint / LIST_FILE).unlink()
    resumed = train(resume=str(checkpoint), **SETTINGS).model.state_dict()
    for name, expected in BertForMaskedLM.from_pretrained(run / "checkpoint-4").state_dict().items():
        assert torch.equal(resumed[name], expected), name


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "truncated"),
        ("optimizer.pt", "truncated"),
        ("optimizer.pt", "a flipped bit"),
        ("scheduler.pt", "empty"),
        ("rng_state.pth", "empty"),
        ("trainer_state.json", "empty"),
        ("trainer_state.json", "missing"),
    ],
)
def test_without_a_list_what_a_library_can_not_read_is_a_sentence_too(name, damage, checkpoint, train):
    (checkpoint / LIST_FILE).unlink()
    if (name, damage) == ("optimizer.pt", "a flipped bit"):
        flip(checkpoint / name, 0.01)  # in the pickle, which comes first
    else:
        DAMAGES[damage](checkpoint / name, None)
    with pytest.raises(UserError, match=rf"{name}: .*can't be read \(.*\); restore it") as error:
        train(resume=str(checkpoint), **SETTINGS)
    assert "\n" not in str(error.value)


def test_a_well_formed_file_that_does_not_fit_is_a_sentence(checkpoint, train):
    (checkpoint / LIST_FILE).unlink()
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    del state["param_groups"][0]["params"][0]
    torch.save(state, checkpoint / "optimizer.pt")
    with pytest.raises(
        UserError, match=r"optimizer state in .*checkpoint-2 is that of another model or optimizer: its"
    ):
        train(resume=str(checkpoint), **SETTINGS)


def test_verifying_what_has_no_checksum_is_said(checkpoint, train, said, monkeypatch):
    monkeypatch.setattr(checkpoint_list, "_SMALL", 10_000)
    write_list(checkpoint, 2, checksum_all=False)
    trainer = train(resume=str(checkpoint), verify_checkpoint=True, **(SETTINGS | {"max_steps": 2}))
    assert trainer.state.global_step == 2  # and finished, so that nothing is trained
    said_of_it = "saved without verify_checkpoint, so only the size of model.safetensors, optimizer.pt"
    assert any(said_of_it in text for text in said())
