"""What is published of arguments and commands."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_recycle.hub.scrub import scrub, scrub_command, scrub_text

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ"


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/home/jane doe/my data.txt", "my data.txt"),
        ("~/data/x.json", "x.json"),
        ("~jane/x.json", "x.json"),
        ("C:\\Users\\jane\\x.txt", "x.txt"),
        ("file:///home/jane/x.txt", "x.txt"),
        ("../jane/x.txt", "x.txt"),
        ("/", "…"),
        ("--train_file=/home/jane/x.txt", "--train_file=x.txt"),
        ("read /home/jane/x.txt, then 'C:/jane/y.txt'", "read x.txt, then 'y.txt'"),
        (f"key={TOKEN}", "key=hf_…"),
        ("https://jane:secret@host.example/x", "https://host.example/x"),
        # What is no path stays.
        ("user/model", "user/model"),
        ("hub://user/model/checkpoint-3@main", "hub://user/model/checkpoint-3@main"),
        ("https://huggingface.co/user/model", "https://huggingface.co/user/model"),
        ("hidden_size=128,hidden_act=relu", "hidden_size=128,hidden_act=relu"),
        ("1/2 and 1e-7", "1/2 and 1e-7"),
        ("hf_recycle", "hf_recycle"),
    ],
)
def test_texts(text, published):
    assert scrub_text(text) == published
    assert scrub_text(published) == published


def test_the_machine_has_no_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-07.lab.example")
    assert scrub_text("run on gpu-07.lab.example today") == "run on … today"
    monkeypatch.setattr("socket.gethostname", lambda: "laptop")
    assert scrub_text("scale/laptop") == "scale/laptop"


def test_private_arguments_go_and_the_rest_becomes_json():
    arguments = {
        "hub_token": TOKEN,
        "push_to_hub_token": TOKEN,
        "output_dir": "runs/x",
        "nested": {"api_key": "x", "path": "/home/jane/f"},
        "include_num_input_tokens_seen": "no",
        "something": object(),
        "many": (1, "/a/b"),
    }
    assert scrub(arguments) == {
        "nested": {"path": "f"},
        "include_num_input_tokens_seen": "no",
        "something": "object",
        "many": [1, "b"],
    }


def test_a_command():
    words = ["hf-recycle", "train", "/home/jane/my.yaml", "--output_dir", "runs/x y", "--max_steps", "3"]
    words += ["--hub_token", TOKEN, "--train_file=/home/jane/a b.txt", f"--hub-token={TOKEN}", "--x", "$(rm x)"]
    command = scrub_command([*words, "--resume_from_checkpoint", "true"])
    assert command == "hf-recycle train my.yaml --max_steps 3 '--train_file=a b.txt' --x '$(rm x)'"


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
folders = st.lists(st.sampled_from(["home", "jane", "Data Sets", "x.y", "ü"]), min_size=1, max_size=4)


@given(json_values, folders, st.sampled_from(["{}", "a={}", "see {} now", "'{}'", "[{}, 1]"]))
def test_no_folder_and_no_token_is_left_anywhere(value, parts, frame):
    secret = "/secret-folder/" + "/".join(part.replace(" ", "") for part in parts)
    published = json.dumps(scrub({"a": [value, frame.format(secret)], "b": frame.format(TOKEN)}))
    assert "secret-folder" not in published
    assert TOKEN not in published
