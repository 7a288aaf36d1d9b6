"""A run that is killed with SIGKILL again and again, and started again, until it comes to its end.

    python killable_run.py OUTPUT_DIR KILL [KILL ...]

Each KILL is a call count: the process dies right before its n-th file operation of that attempt (writing a tensor file,
renaming, syncing, or starting an optimizer step). The last line printed is a digest of the final weights and neuron
state. Attempts are forked children, so that the imports are paid for once.
"""

import gc
import hashlib
import os
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
from support.tiny_runs import sentences, tiny_bert
from support.words import word_tokenizer
from transformers import DataCollatorForLanguageModeling
from transformers.trainer_utils import get_last_checkpoint

from hf_recycle import RecyclingArguments, RecyclingTrainer
from hf_recycle.plots import run as figures


def die_at(count: int | None) -> None:
    calls = 0

    def deadly(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    torch.save = deadly(torch.save)
    safetensors.torch.save_file = deadly(safetensors.torch.save_file)
    os.replace = deadly(os.replace)
    os.fsync = deadly(os.fsync)
    RecyclingTrainer.training_step = deadly(RecyclingTrainer.training_step)


def train(folder: str, count: int | None) -> None:
    torch.set_num_threads(1)
    args = RecyclingArguments(
        output_dir=folder,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        recycle_steps=2,
        recycle_fraction=0.1,
        recycle_smooth_steps=3,
        recycle_immunity=1,
        midpoint_weight=0.05,
    )
    trainer = RecyclingTrainer(
        model=tiny_bert(),
        args=args,
        train_dataset=sentences(),
        data_collator=DataCollatorForLanguageModeling(word_tokenizer()),
    )
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    die_at(count)
    trainer.train(resume_from_checkpoint=last)


def digest(folder: str) -> str:
    result = hashlib.sha256()
    for name in ("model.safetensors", "recycling_state.safetensors"):
        with safetensors.safe_open(Path(get_last_checkpoint(folder), name), "pt") as file:
            for key in sorted(file.keys()):
                result.update(key.encode() + file.get_tensor(key).numpy().tobytes())
    return result.hexdigest()


def main() -> None:
    folder, kills = sys.argv[1], [int(word) for word in sys.argv[2:]]
    # Files are written as ever; drawing them would take most of the time.
    figures.figure_images = lambda *_, **__: dict.fromkeys(("loss.png", "recycle_counts.png", "ages.png"), b"drawn")
    gc.freeze()
    for count in [*kills, None]:
        child = os.fork()
        if child == 0:
            train(folder, count)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed == (count is not None), f"kill {count}: status {status}"
        # Whatever the moment: what bears the name of a checkpoint is whole.
        for checkpoint in Path(folder).glob("checkpoint-*"):
            assert (checkpoint / "trainer_state.json").stat().st_size, checkpoint
            assert (checkpoint / "recycling_stats.json").stat().st_size, checkpoint
    leftovers = [path.name for path in Path(folder).glob("tmp-*")]
    assert not leftovers, leftovers
    print(digest(folder))


if __name__ == "__main__":
    main()
