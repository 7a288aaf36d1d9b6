"""What of a file is published, and what of a folder."""

import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from hf_recycle import RecyclingArguments
from hf_recycle.hub.layout import checkpoint_files, has_weights, model_files, replaced_files
from hf_recycle.hub.privacy import Secrets, Withheld
from hf_recycle.studies.lock import _LOCK_FILE
from hf_recycle.studies.one_shot import CURVES_FILE
from hf_recycle.studies.results import RESULT_FILE
from hf_recycle.studies.runner import LOG_FILE, SETTINGS_FILE

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"
SECRETS = Secrets((TOKEN,), ("/home/wanda/texts", "/home/wanda"), "wanda-hub/bert")


def published(path: Path, content: object) -> bytes:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    result = SECRETS.content(path)
    return path.read_bytes() if isinstance(result, Path) else result


def test_json_loses_places_and_tokens_and_nothing_else(tmp_path):
    config = {
        "_name_or_path": "/home/wanda/models/base",
        "model_type": "bert",
        "best_model_checkpoint": "runs/wanda/checkpoint-20",
        "nested": [{"note": "from /home/wanda/texts/data.txt"}, {"note": f"with {TOKEN}"}],
        "eos_token": "</s>",
        "pattern": "/usr/share/not a place of ours",
        "loss": 1.25,
    }
    told = json.loads(published(tmp_path / "config.json", config))
    assert told["_name_or_path"] == "base"
    assert told["best_model_checkpoint"] == "checkpoint-20"
    assert TOKEN not in json.dumps(told)
    assert "wanda" not in json.dumps(told)
    kept = ("model_type", "eos_token", "pattern", "loss")
    assert {key: told[key] for key in kept} == {key: config[key] for key in kept}


def test_a_name_on_the_hub_is_no_place(tmp_path):
    config = {"_name_or_path": "google-bert/bert-base-uncased"}
    assert json.loads(published(tmp_path / "config.json", config)) == config


# In a container, with the working directory /data and the output folder /data/bert.
CONTAINER = Secrets((), ("/data/bert", "/root", "/data"), "alice/data-bert")


@pytest.mark.parametrize(
    "text",
    [
        "alice/data-bert",
        "from alice/data and alice/data.v2",
        "https://huggingface.co/alice/data-bert/tree/main",
        "https://example.org/data/x, http://data/y",
        "./data/train.txt, ~/data/x, ${HOME}/data/x, ../data",
        "/database/x, /data-old, /data_old, /data.txt, /rooted",
        "<data>x</data>",
        "and/or, input/data",
    ],
)
def test_a_short_working_directory_is_not_seen_in_ordinary_words(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"note": text, "notes": [text]}))
    assert CONTAINER.content(path) == path
    assert CONTAINER.card(text) == text


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("/data", "…"),
        ("/data/x/y.txt", "…/x/y.txt"),
        ("in `/data/x`, (/data), [x](/data/x) and /data.", "in `…/x`, (…), [x](…/x) and …."),
        ("--train_file=/data/x.txt", "--train_file=…/x.txt"),
        ("file:///data/x host:/data/x", "file://…/x host:…/x"),
        ("/data/bert/checkpoint-2, /root/.cache", "…/checkpoint-2, …/.cache"),
        ("/mnt/data/bert/x", "/mnt…/x"),  # deeper folders are found anywhere
    ],
)
def test_a_short_working_directory_and_what_is_below_it_are_hidden(tmp_path, text, card):
    assert CONTAINER.card(text) == card
    (tmp_path / "config.json").write_text(json.dumps({"note": text}))
    told = CONTAINER.content(tmp_path / "config.json")
    assert isinstance(told, bytes)
    assert not re.search("/(data|root)", told.decode())


def test_what_a_tokenizer_learnt_is_left_alone(tmp_path):
    path = tmp_path / "tokenizer.json"
    learnt = {"vocab": [["/data", -1.5], ["/root", -2]], "merges": [["/data", "base"], "/ data"]}
    path.write_text(json.dumps({"model": learnt}))
    assert CONTAINER.content(path) == path
    path.write_text(json.dumps({"model": {**learnt, "vocab": "/data/vocab.txt", "from": "/data/x"}}))
    told = json.loads(CONTAINER.content(path))
    assert told == {"model": {**learnt, "vocab": "vocab.txt", "from": "x"}}


@given(
    st.dictionaries(
        st.sampled_from(["a", "eos_token", "vocab", "</s>"]),
        st.recursive(st.text("/<>s ~.\\C:ab") | st.integers() | st.floats(allow_nan=False), st.lists, max_leaves=5),
    )
)
def test_a_file_without_secrets_goes_up_byte_for_byte(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    path.write_text(json.dumps(content, indent=1))
    assert SECRETS.content(path) == path


def test_what_holds_a_token_and_cannot_be_mended_stays_here(tmp_path):
    (tmp_path / "notes.txt").write_text(f"token: {TOKEN}")
    torch.save({"note": TOKEN}, tmp_path / "scheduler.pt")
    for name in ("notes.txt", "scheduler.pt"):
        with pytest.raises(Withheld):
            SECRETS.content(tmp_path / name)
    (tmp_path / "notes.txt").write_text("some_hf_words_of_more_than_sixteen_letters")
    assert SECRETS.content(tmp_path / "notes.txt") == tmp_path / "notes.txt"


def test_training_arguments_come_back_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "wanda")
    secrets = Secrets(SECRETS.tokens, SECRETS.places, "bert")
    args = RecyclingArguments(
        output_dir="/home/wanda/texts/run-7",
        run_name="wanda's run",
        hub_token=TOKEN,
        hub_model_id="acme/bert",
        recycle_steps=7,
        report_to=["none"],
        lr_scheduler_kwargs={"where": "/home/wanda/x", "api_token": TOKEN, "who": "by wanda-2"},
        use_cpu=True,
    )
    torch.save(args, tmp_path / "training_args.bin")
    data = secrets.content(tmp_path / "training_args.bin")
    again = torch.load(io.BytesIO(data), weights_only=False)
    assert type(again) is RecyclingArguments
    assert (again.output_dir, again.hub_token, again.recycle_steps) == ("run-7", None, 7)
    assert again.hub_model_id == "acme/bert"
    assert again.lr_scheduler_kwargs == {"where": "x", "api_token": None, "who": "by …-2"}
    assert again.lr_scheduler_type == args.lr_scheduler_type
    assert TOKEN.encode() not in data
    assert b"/home" not in data


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize("content", [Bomb(), {"no": "arguments"}, [TrainingArguments]])
def test_training_arguments_that_are_none_are_neither_executed_nor_published(tmp_path, content):
    torch.save(content, tmp_path / "training_args.bin")
    with pytest.raises(Withheld):
        SECRETS.content(tmp_path / "training_args.bin")
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(Withheld):
        SECRETS.content(tmp_path / "training_args.bin")


def test_training_arguments_are_read_where_nothing_of_them_is_loaded(tmp_path):
    """As `hf-recycle push` does."""
    torch.save(RecyclingArguments(output_dir="mine", hub_token="hf_secretsecretsecret"), tmp_path / "training_args.bin")
    code = (
        "import sys; from pathlib import Path; from hf_recycle.hub.privacy import Secrets; "
        "assert 'hf_recycle.arguments' not in sys.modules; "
        "sys.stdout.buffer.write(Secrets().content(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "training_args.bin"], capture_output=True, check=True)
    published = torch.load(io.BytesIO(done.stdout), weights_only=False)
    assert type(published) is RecyclingArguments
    assert (published.output_dir, published.hub_token) == ("mine", None)


def test_what_of_a_folder_goes_where(tmp_path):
    model = ["config.json", "model.safetensors", "README.md", "figures/loss.png", "modeling_mine.py", "vocab.txt"]
    state = ["optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json", "rng_state_1.pth", "latest"]
    state += ["global_step20/mp_rank_00_model_states.pt", "zero_to_fp32.py", "pytorch_model_fsdp_0/__0_0.distcp"]
    state += ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "zero_to_torch.py"]
    never = [
        "runs/events.out.tfevents.1.host",
        "wandb/x",
        "train.log",
        ".git/config",
        ".push.json",
        "_private",
        ".metadata",
    ]
    never += [
        "last-checkpoint/x",
        "checkpoint-2/model.safetensors",
        "unpublished/0001-x/config.json",
        "tmp-checkpoint-3/config.json",
    ]
    never += [SETTINGS_FILE, LOG_FILE, RESULT_FILE, CURVES_FILE, _LOCK_FILE]  # a study's
    for name in model + state + never:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert model_files(tmp_path) == sorted(model)
    assert checkpoint_files(tmp_path) == sorted(model + state)
    assert has_weights(tmp_path)
    assert not has_weights(tmp_path / "figures")


SOMETHING = ["notes.txt", "figures/a.png", "figures/b.png", "checkpoint-2/x", "last-checkpoint/x", "last-checkpoint/y"]
SOME_WEIGHTS = ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]


@given(
    st.sets(st.sampled_from(SOMETHING + SOME_WEIGHTS)),
    st.sets(st.sampled_from(["model.safetensors", "figures/a.png", "last-checkpoint/x", "pytorch_model.bin"])),
)
def test_a_push_takes_away_only_what_contradicts_it(present, added):
    gone = set(replaced_files(present, added, "last-checkpoint", "![](figures/b.png)", "nothing"))
    expected = {name for name in present if name.startswith(("model", "last-checkpoint/")) or name == "figures/b.png"}
    if "pytorch_model.bin" in added:
        expected |= present & {"pytorch_model.bin"}
    assert gone == expected - added
