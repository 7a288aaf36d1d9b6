"""The commands of docs/resize.md run as they stand there, on a smaller model and for fewer steps."""

import re
import shlex
from pathlib import Path

import pytest
from support.english import english

from hf_recycle import find_feed_forwards
from hf_recycle.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "resize.md").read_text()
TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=512,max_position_embeddings=16"


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("\n".join(english(400)))
    Path("tiny.yaml").write_text(
        f"config_overrides: {TINY}\ntrain_file: my.txt\ntokenizer_vocab_size: 500\nmax_seq_length: 16\n"
        "per_device_train_batch_size: 4\neval_strategy: no\nmax_eval_samples: 8\nuse_cpu: true\ndisable_tqdm: true\n"
    )
    commands = re.findall(r"^hf-recycle .*$", PAGE, re.M)
    assert len(commands) == 7
    train = next(line for line in commands if line.startswith("hf-recycle train"))
    for line in [train, *(line for line in commands if line != train)]:  # the first one makes the model of the others
        words = shlex.split(line.replace("400", "8").replace("200", "4").removeprefix("hf-recycle "))
        if words[0] == "train":
            words[2:2] = ["tiny.yaml"]
            words += [] if "--output_dir" in words else ["--output_dir", "runs/demo"]
        assert main(words) == 0, line
    [python] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict = {}
    exec(python.replace("200", "4"), names)
    assert find_feed_forwards(names["model"])[0].num_neurons == 1024
