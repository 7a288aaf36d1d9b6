"""Launches with real processes, two on the CPU, by the commands that users write; what one process gives, this one
does."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.english import english
from support.scripts import run_script
from transformers import AutoModelForMaskedLM

from hf_recycle import RecyclingHistory
from hf_recycle.cli.main import main
from hf_recycle.runs.launcher import find_accelerate_config

pytestmark = pytest.mark.slow

TINY = (
    "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,"
    "hidden_dropout_prob=0,attention_probs_dropout_prob=0"
)
RECYCLE = [sys.executable, "-c", "import sys; from hf_recycle.cli.main import main; sys.exit(main())", "train"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a recipe, a text, and the caches of all the runs."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "train.txt").write_text("\n".join(english(800)))
    (folder / "tiny.yaml").write_text(
        f"# Tiny.\nmodel_type: bert\nconfig_overrides: {TINY}\ntrain_file: {folder / 'train.txt'}\n"
        "tokenizer_vocab_size: 500\nmax_seq_length: 32\nmax_steps: 6\nsave_steps: 3\nlogging_steps: 2\n"
        "max_eval_samples: 8\nrecycle_steps: 2\nrecycle_start: 2\nrecycle_fraction: 0.25\ndisable_tqdm: true\n"
        "lr_scheduler_type: constant\nlearning_rate: 0.001\n"
    )
    return folder


@pytest.fixture(scope="module")
def start(workplace):
    """`start(*words)` -> a process."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_RECYCLE_CACHE": str(workplace / "cache"),
        "HF_DATASETS_CACHE": str(workplace / "cache" / "datasets"),
    }

    def start(*words, **variables) -> subprocess.Popen:
        words = [str(word) for word in words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, env=environment | variables, **pipes)

    return start


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    """What a process said on stderr, once it has ended."""
    try:
        return process.communicate(timeout=timeout)[1]
    finally:
        process.kill()


def log(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def train_here(workplace):
    """`train_here(name, *words)`: a run of one process with the global batch of two; returns its folder."""

    def train_here(name, *words) -> Path:
        words = [workplace / "tiny.yaml", "--output_dir", workplace / name, "--per_device_train_batch_size", 8, *words]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_RECYCLE_CACHE", str(workplace / "cache"))
            patch.setattr("datasets.config.HF_DATASETS_CACHE", workplace / "cache" / "datasets")
            patch.setattr("hf_recycle.plots.run._figures", lambda *_: {})
            assert main(["train", *map(str, words), "--use_cpu"]) == 0
        return workplace / name

    return train_here


@pytest.fixture(scope="module")
def single(train_here):
    return train_here("single")


@pytest.mark.parametrize("config", ["ddp", pytest.param("zero3", marks=pytest.mark.long)])
def test_two_processes_by_a_short_name(config, start, workplace, single):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (make test installs it)")
    out = workplace / config
    words = [workplace / "tiny.yaml", "--output_dir", out, "--per_device_train_batch_size", 4, "--use_cpu"]
    process = start(*RECYCLE, *words, "--accelerate_config", config, "--num_processes", 2)
    errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    expected, found = ([row for row in log(folder) if "loss" in row] for folder in (single, out))
    # Two processes with half the batch each have seen as much as one with all of it.
    assert [row["epoch"] for row in found] == [row["epoch"] for row in expected]
    if config != "zero3":  # where transformers draws the first weights in another order
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
        assert _recycled(out) == _recycled(single)
    assert [len(index) for index in _recycled(out)] == [8, 8]
    model = AutoModelForMaskedLM.from_pretrained(out / "checkpoint-3")
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert tuple(weight.shape) == (32, 16)
    # The recycled ones, too, are drawn with the standard deviation of the model.
    assert 0.017 < float(weight.detach().std()) < 0.023


def test_zero2_is_launched_as_zero3_is():
    """Of which a run shows that it works."""
    zero2, zero3 = (yaml.safe_load(find_accelerate_config(name).read_text()) for name in ("zero2", "zero3"))
    assert (zero2["deepspeed_config"].pop("zero_stage"), zero3["deepspeed_config"].pop("zero_stage")) == (2, 3)
    for name in ("zero3_init_flag", "zero3_save_16bit_model"):
        del zero3["deepspeed_config"][name]
    assert zero2 == zero3


@pytest.mark.long
def test_a_dry_run_of_two_processes_speaks_once(start, workplace):
    out = workplace / "dry"
    words = [workplace / "tiny.yaml", "--output_dir", out, "--per_device_train_batch_size", 4, "--use_cpu", "--dry-run"]
    process = start(*RECYCLE, *words, "--accelerate_config", "ddp", "--num_processes", 2)
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    assert said.count("nothing was trained") == 1
    assert "6 steps, each of 8 sequences x 32 tokens (4 x 2 processes)" in said
    assert not out.exists()


def _recycled(folder: Path) -> list[list[int]]:
    return [list(index) for index in RecyclingHistory.from_pretrained(folder).events["recycled"]]


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "words", "status", "message"),
    [
        (
            [*RECYCLE],
            ["--accelerate_config", "fsdp2", "--num_processes", "2", "--use_cpu"],
            2,
            "FSDP was asked for, but Accelerate would silently train with plain data parallelism (DDP)",
        ),
        (
            [*ACCELERATE, "--cpu", "--num_processes", "2", "-m", "hf_recycle.train"],
            [],
            1,
            "several processes were asked for, but accelerate launch started a single one",
        ),
    ],
    ids=["fsdp2", "cpu"],
)
def test_launches_that_became_less_are_refused(launcher, words, status, message, start, workplace):
    out = workplace / "refused"
    process = start(*launcher, workplace / "tiny.yaml", "--output_dir", out, *words)
    errors = finish(process)
    assert process.returncode == status
    assert errors.count("error: ") == 1
    assert f"error: {message}" in errors
    assert not out.exists() or not list(out.glob("checkpoint-*"))


SCRIPT = '''
"""A script as people have it, for masked language modelling, with this package in place of transformers."""

import sys

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, HfArgumentParser
from transformers import PreTrainedTokenizerFast, set_seed

from hf_recycle import RecyclingArguments, RecyclingTrainer

(args,) = HfArgumentParser(RecyclingArguments).parse_args_into_dataclasses(sys.argv[2:])
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.train([sys.argv[1]], trainers.WordLevelTrainer(vocab_size=300, special_tokens=special))
names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **dict(zip(names, special)))
with args.main_process_first():
    text = datasets.load_dataset("text", data_files=sys.argv[1], split="train")
    text = text.filter(lambda row: len(row["text"].split()) > 4)
    rows = text.map(lambda row: tokenizer(row["text"], truncation=True, max_length=16), remove_columns="text")
set_seed(args.seed)
sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes, **still))
trainer = RecyclingTrainer(
    model=model,
    args=args,
    train_dataset=rows,
    eval_dataset=rows.select(range(11)),
    data_collator=DataCollatorForLanguageModeling(tokenizer),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_state()
if trainer.is_world_process_zero():
    print("processes:", args.world_size, file=sys.stderr)
if torch.distributed.is_initialized():
    # As PyTorch asks: threads of a process group that is still there abort a process that ends, once in a while.
    torch.distributed.destroy_process_group()
'''


def test_a_script_of_ones_own_on_two_processes_is_as_on_one(start, workplace, monkeypatch, capsys):
    script = workplace / "run_mlm.py"
    script.write_text(SCRIPT)
    words = ["--max_steps", 4, "--logging_steps", 1, "--save_steps", 4, "--eval_strategy", "steps", "--eval_steps", 4]
    words += ["--recycle_steps", 2, "--recycle_fraction", 0.25, "--disable_tqdm", "true", "--use_cpu", "true"]
    logs = []
    for processes, batch in ((1, 8), (2, 4)):
        out = workplace / f"script-{processes}"
        command = [script, workplace / "train.txt", *words, "--per_device_train_batch_size", batch, "--output_dir", out]
        if processes == 1:
            monkeypatch.setattr(sys, "argv", [str(word) for word in command])
            runpy.run_path(str(script), run_name="__main__")
            errors = capsys.readouterr().err
        else:
            process = start(*TORCHRUN, *command)
            errors = finish(process)
            assert process.returncode == 0, errors[-3000:]
        assert f"processes: {processes}" in errors
        assert [len(index) for index in _recycled(out / "checkpoint-4")] == [8]
        AutoModelForMaskedLM.from_pretrained(out / "checkpoint-4")
        logs.append(log(out))
    single, both = ([row.get("loss", row.get("eval_loss")) for row in found[:-1]] for found in logs)
    assert both == pytest.approx(single, abs=1e-4)
    assert len(both) == 5


def test_processes_with_different_recipes_are_stopped(workplace):
    script = workplace / "uneven.py"
    script.write_text(
        "import os, sys\nfrom support.processes import run_in_processes\n"
        "def uneven():\n"
        "    from hf_recycle.train import main\n"
        "    more = ['--mlm_probability', '0.3'] if os.environ['RANK'] == '1' else []\n"
        "    assert main([*sys.argv[1:], *more]) == 1\n"
        "sys.exit(run_in_processes('ddp', 2, uneven))\n"
    )
    out = workplace / "uneven"
    words = [workplace / "tiny.yaml", "--output_dir", out, "--use_cpu"]
    errors = run_script(script, *words, HF_RECYCLE_CACHE=str(workplace / "cache")).stderr
    assert "error: the processes disagree about mlm_probability: process 0 has 0.15, process 1 has 0.3;" in errors
    assert not list(out.glob("checkpoint-*"))


def test_a_signal_reaches_every_process(start, workplace):
    out = workplace / "stopped"
    words = [workplace / "tiny.yaml", "--output_dir", out, "--use_cpu", "--max_steps", 100000, "--save_total_limit", 1]
    process = start(*RECYCLE, *words, "--accelerate_config", "ddp", "--num_processes", 2)
    try:
        deadline = time.monotonic() + 240
        while not (out / "checkpoint-3").is_dir():
            assert process.poll() is None, process.stderr.read()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = _children(process.pid)
        assert len(children) == 2
        process.send_signal(signal.SIGTERM)
        errors = finish(process, timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert len(re.findall(r"stopped; go on from the last checkpoint with: \S*hf-recycle train ", errors)) == 1
    assert errors.rstrip().endswith("--accelerate_config ddp --num_processes 2 --resume_from_checkpoint true")


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold spaces: state, parent.
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found


@pytest.mark.long
def test_stages_are_launched_one_after_another(start, workplace, train_here):
    """Two processes each time, and the losses of one process on the same global batch."""
    stages = ["--ff_stages", '{"0": 0.5, "0.5": 1.0}', "--logging_steps", 1, "--recycle_steps", 0]
    two = ["--accelerate_config", "ddp", "--num_processes", 2, "--use_cpu", "--per_device_train_batch_size", 4]
    folders = [train_here("stages-one", *stages), workplace / "stages-two"]
    process = start(*RECYCLE, workplace / "tiny.yaml", "--output_dir", folders[1], *stages, *two)
    errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    one, found = ([row["loss"] for row in log(folder) if "loss" in row] for folder in folders)
    assert len(one) == 6
    assert found == pytest.approx(one, abs=1e-5)
    for folder in folders:
        assert RecyclingHistory.from_pretrained(folder).resizes["step"].tolist() == [3]
