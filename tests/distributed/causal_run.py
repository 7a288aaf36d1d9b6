"""Causal models on one engine: `causal_run.py PROCESSES ENGINE FOLDER [RUN ...]`; process 0 writes what came out.

Of two processes, or one, the global batch has twelve sequences of uneven lengths.
"""

import os
import sys
from pathlib import Path

import torch
from engine_run import begin
from matrix import ENGINES
from support.processes import run_in_processes

STEPS, MIDDLE = 6, 3
RUNS = {
    "untied": {},
    "tied": {"tied": True},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "recycled": {"recycle_steps": 2, "recycle_fraction": 0.2},
}


def run(name: str, folder: Path, engine: str = "single", resume: Path | None = None):
    from support.causal import llama, texts

    from hf_recycle import RecyclingArguments, RecyclingTrainer
    from hf_recycle.mlm import chunked_head
    from hf_recycle.mlm.causal_batches import CausalCollator

    chunked_head._ROWS, chunked_head._LOGITS = {"cpu": 7}, 0  # seven tokens each
    settings = dict(RUNS[name])
    tied = settings.pop("tied", False)
    processes, accumulation = int(os.environ.get("WORLD_SIZE", 1)), settings.get("gradient_accumulation_steps", 1)
    trainer = RecyclingTrainer(
        model=llama(tied),
        args=RecyclingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=12 // processes // accumulation,
            per_device_eval_batch_size=3,
            learning_rate=1e-2,
            adam_epsilon=1e-3,
            max_grad_norm=0.5,
            logging_steps=1,
            save_steps=MIDDLE,
            use_cpu=True,
            disable_tqdm=True,
            **ENGINES[engine].arguments(str(folder)),
            **settings,
        ),
        train_dataset=texts(),
        eval_dataset=texts(11, seed=1),
        data_collator=CausalCollator(),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    result = {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "evaluation": {name: trainer.evaluate()[f"eval_{name}"] for name in ("loss", "perplexity", "accuracy")},
        "head": type(trainer._own_head()).__name__,
        "engine": trainer.accelerator.distributed_type.value,
        "history": [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"],
    }
    if trainer.is_world_process_zero():
        torch.save(result, folder / "result.pt")
    return trainer


def main() -> None:
    engine, folder = begin()
    for name in sys.argv[4:]:
        run(name, folder / name, engine)
    run("recycled", folder / "resumed", engine, folder / "recycled" / f"checkpoint-{MIDDLE}").end()


if __name__ == "__main__":
    sys.exit(run_in_processes(sys.argv[2], int(sys.argv[1]), main))
