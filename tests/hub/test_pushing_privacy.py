"""What of a file is published, and what of a folder."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.hub.push.job import Push
from hf_recycle.hub.push.layout import checkpoint_files, has_weights, model_files, replaced_files
from hf_recycle.hub.push.privacy import Withheld, clean_card, published_content
from hf_recycle.hub.push.staging import stage
from hf_recycle.hub.scrub import Secrets
from hf_recycle.records.files import RECYCLING_FILES

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"
SECRETS = Secrets((TOKEN,), ("/home/wanda/texts", "/home/wanda"), ("wanda", "node-17.hidden"))


def published(path: Path, content: object) -> bytes:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    result = published_content(path, SECRETS)
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
CONTAINER = Secrets((), ("/data/bert", "/root", "/data"))


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
    assert published_content(path, CONTAINER) == path
    assert clean_card(text, CONTAINER) == text


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("/data", "data"),
        ("/data/x/y.txt", "y.txt"),
        ("in `/data/x`, (/data), [x](/data/x) and /data.", "in `x`, (data), [x](x) and data."),
        ("--train_file=/data/x.txt", "--train_file=x.txt"),
        ("file:///data/x host:/data/x", "x host:x"),
        ("/data/bert/checkpoint-2, /root/.cache", "checkpoint-2, .cache"),
    ],
)
def test_a_short_working_directory_and_what_is_below_it_are_hidden(tmp_path, text, card):
    assert clean_card(text, CONTAINER) == card
    (tmp_path / "config.json").write_text(json.dumps({"note": text}))
    told = published_content(tmp_path / "config.json", CONTAINER)
    assert isinstance(told, bytes)
    assert not re.search("/(data|root)", told.decode())


def test_what_a_tokenizer_learnt_is_left_alone(tmp_path):
    path = tmp_path / "tokenizer.json"
    learnt = {"vocab": [["/data", -1.5], ["/root", -2]], "merges": [["/data", "base"], "/ data"]}
    path.write_text(json.dumps({"model": learnt}))
    assert published_content(path, CONTAINER) == path
    path.write_text(json.dumps({"model": {**learnt, "vocab": "/data/vocab.txt", "from": "/data/x"}}))
    told = json.loads(published_content(path, CONTAINER))
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
    assert published_content(path, SECRETS) == path


def test_what_holds_a_token_and_cannot_be_mended_stays_here(tmp_path):
    (tmp_path / "vocab.txt").write_text(f"token: {TOKEN}")
    torch.save({"note": TOKEN}, tmp_path / "scheduler.pt")
    for name in ("vocab.txt", "scheduler.pt"):
        with pytest.raises(Withheld):
            published_content(tmp_path / name, SECRETS)
    (tmp_path / "vocab.txt").write_text("some_hf_words_of more_than_sixteen_letters")
    assert published_content(tmp_path / "vocab.txt", SECRETS) == tmp_path / "vocab.txt"


# ---- Which files ----

MODEL = [
    *("config.json", "generation_config.json", "README.md", "figures/loss.png", "model.safetensors.index.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "adapter_model.safetensors"),
    *("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.jinja"),
    *("additional_chat_templates/tool_use.jinja", *RECYCLING_FILES),
]
STATE = [
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json", "rng_state_1.pth", "latest"),
    *("global_step20/mp_rank_00_model_states.pt", "global_step20/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    *("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"),
]
LEFTOVERS = [
    # Other people's work, keys and logs.
    *("notebook.ipynb", ".ipynb_checkpoints/notebook-checkpoint.ipynb", ".env", ".git/config", ".netrc", "id_rsa"),
    *("train.log", "slurm-1.out", "core.17", "wandb/run/output.log", "runs/events.out.tfevents.1.host", "mlruns/0/x"),
    *("data.csv", "train.jsonl", "patients.parquet", "data/train-00000.parquet", "cache.arrow", "secrets.json"),
    *("passwords.txt", "notes.md", "todo.txt", "params.yaml", "script.py", "run.sh", "zero_to_fp32.py", "dump.pkl"),
    *("training_args.bin", "weights.safetensors", "old_model.safetensors", "model.safetensors.bak", "events.bin"),
    *(".push.json", ".metadata", ".hidden/config.json", "README.md~", "config.json.orig", "study_settings.yaml"),
    "checkpoint_files.json",  # of what lies here; there, some of it is left out or reworded
    # Known names, where they are somebody's own.
    *("backup/model.safetensors", "backup/config.json", "notes/README.md", "figures/config.json", "figures/mine.png"),
    *("figures/README.md", "data/recycling_history.parquet", "global_step20/notes.txt", "global_step20/a/x_states.pt"),
    *("optimizer_0/optimizer.pt", "additional_chat_templates/notes.txt", "pytorch_model_fsdp_0/README.md"),
    # Other checkpoints.
    *("checkpoint-2/model.safetensors", "last-checkpoint/optimizer.pt", "unpublished/0001-checkpoint-2/config.json"),
    *("tmp-checkpoint-3/config.json", "checkpoint-2/trainer_state.json"),
]


@pytest.fixture
def crowded(tmp_path):
    """A folder with a model, a state to resume from, and everything that others have left there."""
    folder = tmp_path / "run"
    for name in MODEL + STATE + LEFTOVERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("special_tokens_map.json", "magnitudes.png", "__1_0.distcp"):
        (elsewhere / name).write_text("secret")
    (folder / "special_tokens_map.json").symlink_to(elsewhere / "special_tokens_map.json")
    (folder / "figures" / "magnitudes.png").symlink_to(elsewhere / "magnitudes.png")
    (folder / "added_tokens.json").symlink_to(folder / "secrets.json")
    (folder / "optimizer_1").symlink_to(elsewhere, target_is_directory=True)
    return folder


def test_of_a_folder_full_of_leftovers_only_known_files_go_up(crowded):
    assert model_files(crowded) == sorted(MODEL)
    assert checkpoint_files(crowded) == sorted(MODEL + STATE)
    assert has_weights(crowded)
    assert not has_weights(crowded / "figures")


def test_of_a_folder_full_of_leftovers_a_private_copy_holds_the_same_files(crowded):
    for link in (True, False):
        copy = stage(Push(crowded, "alice/x", "all"), crowded, link=link).folder
        assert {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} == {
            *(MODEL + STATE),
            ".push.json",
        }


def test_every_file_that_a_tokenizer_of_transformers_saves_is_known(tmp_path):
    """The slow ones' rare extras are not; the list here is what the common families name."""
    from transformers import AlbertTokenizer, BertTokenizer, GPT2Tokenizer, T5Tokenizer, XLMRobertaTokenizer

    for cls in (AlbertTokenizer, BertTokenizer, GPT2Tokenizer, T5Tokenizer, XLMRobertaTokenizer):
        for name in cls.vocab_files_names.values():
            (tmp_path / name).write_text("x")
            assert name in model_files(tmp_path)


# ---- What we write ourselves ----


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/home/jane doe/my data.txt", "my data.txt"),
        ("/home/jane", "…"),
        ("~/data/x.json", "x.json"),
        ("~jane/x.json", "x.json"),
        ("C:\\Users\\jane\\x.txt", "x.txt"),
        ("file:///home/jane/x.txt", "x.txt"),
        ("../jane/x.txt", "x.txt"),
        ("/", "…"),
        ("read /home/jane/x.txt, then 'C:/jane/y.txt'", "read x.txt, then 'y.txt'"),
        (f"key={TOKEN}", "key=…"),
        ("https://jane:secret@host.example/x", "https://host.example/x"),
        ("by wanda on node-17.hidden", "by … on …"),
        # What is no path stays.
        ("user/model", "user/model"),
        ("wanda/model", "wanda/model"),
        ("hub://user/model/checkpoint-3@main", "hub://user/model/checkpoint-3@main"),
        ("hidden_size=128,hidden_act=relu", "hidden_size=128,hidden_act=relu"),
        ("1/2 and 1e-7", "1/2 and 1e-7"),
        ("hf_recycle", "hf_recycle"),
    ],
)
def test_texts_of_ours(text, published):
    assert SECRETS.text(text) == published
    assert SECRETS.text(published) == published


def test_private_facts_go_and_the_rest_becomes_json():
    arguments = {
        "hub_token": TOKEN,
        "output_dir": "runs/x",
        "nested": {"api_key": "x", "path": "/home/jane/f"},
        "include_num_input_tokens_seen": "no",
        "something": object(),
        "many": (1, "/a/b"),
        "train_file": "wanda/private/texts.txt",
        "model_name_or_path": "lab/bert",
    }
    assert SECRETS.facts(arguments) == {
        "nested": {"path": "f"},
        "include_num_input_tokens_seen": "no",
        "something": "object",
        "many": [1, "b"],
        "train_file": "texts.txt",
        "model_name_or_path": "lab/bert",
    }


def test_a_command_carries_no_path_absolute_or_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wanda" / "base").mkdir(parents=True)
    words = ["hf-recycle", "train", "wanda/my.yaml", "scale/laptop", "--output_dir", "runs/x y", "--max_steps", "3"]
    words += ["--hub_token", TOKEN, "--train_file=/home/jane/a b.txt", f"--hub-token={TOKEN}", "--x", "$(rm x)"]
    words += ["--validation_file", "./wanda/v.txt", "--tokenizer_name", "../home/wanda/tok"]
    words += ["--model_name_or_path", "wanda/base", "--dataset_name", "lab/books", "--deepspeed", "wanda/zero.json"]
    words += ["--lr_scheduler_kwargs", '{"from": "wanda/private/x.json"}', "--config_overrides", "a=wanda/b,c=1e-3"]
    command = SECRETS.command([*words, "--resume_from_checkpoint", "wanda/checkpoint-2"], known=["scale/laptop"])
    assert command == (
        "hf-recycle train my.yaml scale/laptop --max_steps 3 '--train_file=a b.txt' --x '$(rm x)' "
        "--validation_file v.txt --tokenizer_name tok --model_name_or_path base --dataset_name lab/books "
        """--deepspeed zero.json --lr_scheduler_kwargs '{"from": "x.json"}' --config_overrides a=b,c=1e-3"""
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
folders = st.lists(st.sampled_from(["home", "jane", "Data Sets", "x.y", "ü"]), min_size=1, max_size=4)


@given(json_values, folders, st.sampled_from(["{}", "a={}", "see {} now", "'{}'", "[{}, 1]"]))
def test_no_folder_and_no_token_is_left_anywhere(value, parts, frame):
    secret = "/secret-folder/" + "/".join(part.replace(" ", "") for part in parts)
    published = json.dumps(SECRETS.facts({"a": [value, frame.format(secret)], "b": frame.format(TOKEN)}))
    assert "secret-folder" not in published
    assert TOKEN not in published


# ---- What goes away ----

SOMETHING = ["notes.txt", "figures/a.png", "figures/b.png", "checkpoint-2/x", "last-checkpoint/x", "last-checkpoint/y"]
SOME_WEIGHTS = [
    *("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "adapter_model.safetensors")
]


@given(
    st.sets(st.sampled_from(SOMETHING + SOME_WEIGHTS)),
    st.sets(st.sampled_from(["model.safetensors", "figures/a.png", "last-checkpoint/x", "pytorch_model.bin"])),
)
def test_a_push_takes_away_only_what_contradicts_it(present, added):
    gone = set(replaced_files(present, added, "last-checkpoint", "![](figures/b.png)", "nothing"))
    expected = {name for name in present if name.startswith("last-checkpoint/") or name == "figures/b.png"}
    for kind in ("model", "pytorch_model", "adapter_model"):
        if any(name.startswith(kind) for name in added):
            expected |= {name for name in present if name.startswith(kind)}
    assert gone == expected - added
