"""Runs that go on from the Hub: to the bit like one that never stopped, on one process and on two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import ALICE_READ
from huggingface_hub import HfApi
from pulled_runs import contents, new_trainer
from support.tiny_runs import assert_same_weights, losses

from hf_recycle import RecyclingHistory
from hf_recycle.cli.main import main
from hf_recycle.errors import UserError

# Whole runs against a Hub in trouble.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("figures_not_drawn")]


def same_history(first: Path, second: Path) -> None:
    one, other = (RecyclingHistory.from_pretrained(folder) for folder in (first, second))
    assert one.events.astype(str).equals(other.events.astype(str))
    assert one.magnitudes.astype(str).equals(other.magnitudes.astype(str))
    for block, counts in one.counts.items():
        assert (counts == other.counts[block]).all()
    assert one.events["recycled"].map(len).sum() > 0


def test_a_run_goes_on_from_the_hub_to_the_bit(hub, online, tmp_path):
    whole = new_trainer(tmp_path / "whole")
    whole.train()
    api = HfApi(endpoint=hub.url)
    repo = api.create_repo("alice/to-the-bit", private=True).repo_id
    for step, folder in ((2, "checkpoint-2"), (4, "last-checkpoint")):
        api.upload_folder(repo_id=repo, folder_path=tmp_path / "whole" / f"checkpoint-{step}", path_in_repo=folder)

    for address, begins in ((f"hub://{repo}", 4), (f"hf://{repo}@main/checkpoint-2", 2)):
        resumed = new_trainer(tmp_path / f"from-{begins}", hub_token=ALICE_READ)
        resumed.train(address)
        assert_same_weights(whole, resumed)
        assert losses(whole) == losses(resumed)
        assert not (tmp_path / f"from-{begins}" / f"checkpoint-{begins}").exists(), "it began after that step"
        same_history(tmp_path / "whole" / "checkpoint-8", tmp_path / f"from-{begins}" / "checkpoint-8")
    assert not hub.requests("training_args")


def test_the_best_checkpoint_of_another_machine(hub, online, tmp_path):
    first = new_trainer(tmp_path / "first", max_steps=4)
    first.train()
    files = contents(tmp_path / "first" / "checkpoint-4", "checkpoint-4")
    state = json.loads(files["checkpoint-4/trainer_state.json"])
    state |= {"best_global_step": 4, "best_metric": 0.0, "best_model_checkpoint": str(tmp_path)}
    files["checkpoint-4/trainer_state.json"] = json.dumps(state).encode()
    hub.store.create("alice/best")
    hub.store.add_files("alice/best", files)
    resumed = new_trainer(tmp_path / "resumed", max_steps=6)
    resumed.train("hub://alice/best")
    assert Path(resumed.state.best_model_checkpoint).is_relative_to(online)
    assert Path(resumed.state.best_model_checkpoint).name == "checkpoint-4"


def test_nothing_is_trained_from_what_is_refused(hub, online, tmp_path):
    trainer = new_trainer(tmp_path / "out")
    for address, problem in (
        ("hub://alice/absent", "no such repository"),
        ("hub://absent", "the form is hf://user/repo"),
    ):
        with pytest.raises(UserError, match=problem):
            trainer.train(resume_from_checkpoint=address)
    assert trainer.state.global_step == 0


@pytest.mark.slow
def test_the_command_line_goes_on_from_the_hub(hub, online, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_RECYCLE_CACHE", str(tmp_path / "recycle-cache"))
    text = tmp_path / "train.txt"
    text.write_text("\n".join(f"the {i} quick foxes jump over {i * 7 % 11} lazy dogs" for i in range(400)))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "model_type: bert\nconfig_overrides: hidden_size=16,num_hidden_layers=1,num_attention_heads=2,"
        f"intermediate_size=32\ntrain_file: {text}\ntokenizer_vocab_size: 300\nmax_seq_length: 16\n"
        "per_device_train_batch_size: 4\nmax_steps: 8\nsave_steps: 4\nlogging_steps: 4\nmax_eval_samples: 8\n"
        "recycle_steps: 3\nrecycle_fraction: 0.25\ndisable_tqdm: true\nuse_cpu: true\n"
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(["train", str(recipe), "--output_dir", str(whole)]) == 0
    hub.store.create("alice/command-line")
    hub.store.add_files("alice/command-line", contents(whole / "checkpoint-4", "last-checkpoint"))

    words = ["train", str(recipe), "--output_dir", str(resumed), "--resume_from_checkpoint"]
    assert main([*words, "hub://alice/command-line@nothing"]) == 2
    assert "no such revision" in capsys.readouterr().err
    assert main([*words, "hub://alice/command-line"]) == 0

    same_history(whole, resumed)
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


_TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch
from huggingface_hub import HfApi
from pulled_runs import new_trainer
from support.processes import run_in_processes
from hf_recycle.errors import UserError

def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    whole = new_trainer(folder / "whole")
    whole.train()
    if rank == 0:
        api = HfApi()
        repo = api.create_repo("alice/two-processes").repo_id
        api.upload_folder(repo_id=repo, folder_path=folder / "whole" / "checkpoint-4", path_in_repo="checkpoint-4")
    torch.distributed.barrier()
    try:
        whole.train(resume_from_checkpoint="hub://alice/two-processes@nothing")
        raise SystemExit("a wrong revision was taken")
    except UserError as error:
        assert "no such revision" in str(error), error
    resumed = new_trainer(folder / "resumed")
    resumed.train(resume_from_checkpoint="hub://alice/two-processes")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed.accelerator.num_processes == 2
    print(f"process {rank} came to the same end\\n", end="", flush=True)

sys.exit(run_in_processes("ddp", 2, main))
"""


@pytest.mark.slow
def test_two_processes_take_the_same_commit(hub, hub_environment, tmp_path):
    environment = hub_environment()
    environment["PYTHONPATH"] += f":{Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, "-c", _TWO_PROCESSES, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("came to the same end") == 2
    downloads = [entry.target for entry in hub.requests("^GET .*/resolve/")]
    assert len(downloads) == len(set(downloads)), "only one process downloads"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {target.rsplit("/", 1)[-1] for target in downloads}
    assert len(hub.requests("^GET .*/revision/|^GET /api/models/alice/two-processes$")) <= 2, "one process asks"
