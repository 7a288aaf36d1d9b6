"""One training run on one engine, started by torchrun or alone; process 0 writes what came out.

    [torchrun --nproc_per_node N] engine_run.py ENGINE METHOD FOLDER [--resume CHECKPOINT] [--steps N]
"""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
sys.path.insert(0, str(Path(__file__).parent))
from matrix import ENGINES, GLOBAL_BATCH, METHODS  # noqa: E402


def pretend_an_accelerator() -> None:
    """Accelerate turns FSDP on for accelerator devices only; fully_shard itself works on the CPU. In this process a
    MULTI_CPU state with an FSDP plugin is taken for FSDP."""
    from accelerate import state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]

    state.AcceleratorState.__init__ = patched


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("method")
    parser.add_argument("folder")
    parser.add_argument("--resume")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--accumulation", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(1)
    engine = ENGINES[options.engine]
    os.environ |= engine.environment
    if engine.pretend:
        pretend_an_accelerator()

    from tiny_runs import masked_sentences, tiny_bert

    from hf_recycle import RecyclingArguments, RecyclingTrainer

    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = RecyclingArguments(
        output_dir=options.folder,
        max_steps=options.steps,
        per_device_train_batch_size=GLOBAL_BATCH // processes // options.accumulation,
        gradient_accumulation_steps=options.accumulation,
        per_device_eval_batch_size=3,
        learning_rate=1e-2,
        # Large, so that Adam does not blow up the rounding of gradients that are zero (those of key biases).
        adam_epsilon=1e-3,
        # DeepSpeed would decay biases too.
        weight_decay=0.0,
        max_grad_norm=0.5,
        logging_steps=1,
        save_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        magnitude_steps=5,
        **engine.arguments(options.folder),
        **METHODS[options.method],
    )
    trainer = RecyclingTrainer(
        model=tiny_bert(dropout=0.0),
        args=args,
        train_dataset=masked_sentences(64),
        eval_dataset=masked_sentences(11, seed=4),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    assert trainer.accelerator.num_processes == processes
    metrics = trainer.evaluate()
    magnitudes = trainer.neuron_table().magnitudes()
    state = trainer.neuron_table().state_dict()
    if trainer.is_world_process_zero():
        torch.save(
            {
                "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
                "evaluation": {k: metrics[k] for k in ("eval_loss", "eval_accuracy")},
                "magnitudes": magnitudes,
                "state": state,
                "history": trainer.recorder.to_table().to_pylist(),
                "engine": str(trainer.accelerator.distributed_type),
            },
            Path(options.folder, "result.pt"),
        )
    trainer.end()


if __name__ == "__main__":
    main()
