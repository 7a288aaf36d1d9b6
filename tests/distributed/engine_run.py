"""Training runs on one engine, on several processes or one; process 0 writes what came out.

    engine_run.py PROCESSES ENGINE FOLDER METHOD[@PRECISION][:HOW]|LAYOUT ...

`:resume`: a second trainer resumes from the checkpoint in the middle and must come to the same end. `:accumulate`: the
global batch is made of two accumulated ones. `:compile`: so too, with a compiled model; `:compile=full`: with its full
head. `:disagree`: process 1 gets other settings than process 0. `:drift`: the weights of process 1 change silently.
`:skip`: at some steps gradients are infinite and the loss scaler skips them. `:without`: the batches of these steps are
left out. `:economical`: activations are computed again in the backward pass, linear layers by oneDNN. Several runs in
one launch, because starting the processes takes longer than the runs.
"""

import os
import sys
from itertools import count
from pathlib import Path
from unittest import mock

import precision
import torch
from matrix import ENGINES, GLOBAL_BATCH, GRADIENT_METHODS, LAYOUTS, METHODS, ON_LAYOUTS, PRECISIONS, VARIANTS
from support import overflow
from support.processes import run_in_processes
from torch._dynamo.utils import counters
from transformers import TrainerCallback, default_data_collator

from hf_recycle.records.recorder import activity_rows
from hf_recycle.speed import onednn

STEPS, MIDDLE = 10, 5


def pretend_an_accelerator() -> None:
    """Accelerate turns FSDP on for accelerator devices only; fully_shard itself works on the CPU. In this process a
    MULTI_CPU state with an FSDP plugin is taken for FSDP."""
    from accelerate import state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__

    def patched(self, *args, **kwargs):
        # Every new reference to the shared state takes the distributed type over from the process state again.
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin") or self.__dict__.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    state.AcceleratorState.__init__ = patched


def run(
    engine_name: str,
    method: str,
    folder: Path,
    *,
    resume: Path | None = None,
    accumulation: int = 1,
    drift: bool = False,
    d_ff: int = 32,
    family: str | None = None,
    precision_name: str = "fp32",
    how: str = "",
    **overrides,
):
    from support.tiny_runs import labelled_sentences, masked_sentences, tiny_bert

    from hf_recycle import RecyclingArguments, RecyclingTrainer

    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = RecyclingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": GLOBAL_BATCH // processes // accumulation,
            "gradient_accumulation_steps": accumulation,
            "per_device_eval_batch_size": 3,
            "learning_rate": 1e-2,
            # Large, so that Adam does not blow up the rounding of gradients that are zero (those of key biases).
            "adam_epsilon": 1e-3,
            "max_grad_norm": 0.5,
            "logging_steps": 1,
            "save_steps": MIDDLE,
            "use_cpu": True,
            "disable_tqdm": True,
            "magnitude_steps": MIDDLE,
        }
        | (ENGINES | VARIANTS)[engine_name].arguments(str(folder))
        | (METHODS | GRADIENT_METHODS)[method]
        | PRECISIONS[precision_name]
        | (precision.bf16_settings(method) if precision_name == "bf16" else {})
        | overflow.ARGUMENTS.get(how, {})
        | overrides,
    )
    # Other weights than those that are resumed.
    model = model_of(family, seed=2 if resume else 1) if family else tiny_bert(dropout=0.0, d_ff=d_ff)
    if precision_name == "bf16":
        # DeepSpeed rounds the model before it makes the masters: all start from what it starts from.
        model = model.bfloat16().float()
    # Of a causal model the stock Trainer evaluates means of batches, which are whole on one process and on two if 12
    # examples with as many tokens each come in batches of three.
    masked = type(model).__name__.endswith("MaskedLM")
    made, evaluated = (masked_sentences, 11) if masked else (labelled_sentences, 12)
    trainer = RecyclingTrainer(
        model=model,
        args=args,
        train_dataset=overflow.samples(made, GLOBAL_BATCH, how),
        eval_dataset=made(evaluated, seed=4),
        data_collator=Collator(),
    )
    if drift:
        trainer.add_callback(_Drift(trainer))
    if how == "infinite":
        _make_infinite(trainer)
    watched = precision.prepare(trainer, how)
    with mock.patch.object(onednn, "multiply", side_effect=onednn.multiply) as multiply:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    assert trainer.accelerator.num_processes == processes
    result = {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "evaluation": {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_accuracy")},
        "magnitudes": trainer.neuron_table().magnitudes(),
        "state": trainer.neuron_table().state_dict(),
        "history": [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"],
        "activity": activity_rows(trainer.recorder.to_table()),
        "engine": trainer.accelerator.distributed_type.value,
        "products by oneDNN": multiply.call_count,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "skipped": trainer.neuron_table().skipped_steps,
        **watched.results(),
        "shards": sorted({type(parameter).__name__ for parameter in trainer.model.parameters()}),
    }
    if trainer.is_world_process_zero():
        torch.save(result, folder / "result.pt")
    return trainer


def model_of(family: str, seed: int):
    """A tiny model without dropout."""
    from support import families, renamed_models

    if family in renamed_models.FAMILIES:
        model = renamed_models.build(family, seed)
    else:
        torch.manual_seed(seed)
        model = families.BY_NAME[family].build(d_ff=24)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


class Collator:
    """The default one, which says how much is masked so that the shapes of a compiled model are static."""

    mlm_probability = 0.4

    def __call__(self, examples):
        return default_data_collator(examples)


class _Drift(TrainerCallback):
    """Silently changes the weights of one process, as a wrong random generator would."""

    def __init__(self, trainer):
        self._trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            block = self._trainer.neuron_table().blocks[0]
            with torch.no_grad():
                block.slices[0].parameter[:8] *= 3


def _make_infinite(trainer) -> None:
    """The loss of the first of two batches of step 3 becomes infinite on process 1, with gradients as they were."""
    compute, batches = trainer.compute_loss, count()

    def compute_loss(*args, **kwargs):
        loss = compute(*args, **kwargs)
        return loss + torch.inf if next(batches) == 4 and os.environ.get("RANK") == "1" else loss

    trainer.compute_loss = compute_loss


def begin() -> tuple[str, Path]:
    """The engine and the folder that a script of these tests was called with, once this process is ready for it."""
    engine = (ENGINES | VARIANTS)[sys.argv[2]]
    torch.set_num_threads(1)
    os.environ |= engine.environment
    if engine.pretend:
        pretend_an_accelerator()
    return sys.argv[2], Path(sys.argv[3])


def main() -> None:
    engine, folder = begin()
    for word in sys.argv[4:]:
        if word in LAYOUTS:
            trainer = run(engine, "off", folder / word, family=LAYOUTS[word], **ON_LAYOUTS)
            continue
        method, _, how = word.partition(":")
        label = method.replace("@", "-")
        method, _, precision_name = method.partition("@")
        precision_name = precision_name or "fp32"
        if how == "accumulate":
            trainer = run(engine, method, folder / f"{method}-accumulated", accumulation=2)
            continue
        if how == "infinite":
            trainer = run(engine, method, folder / f"{method}-infinite", accumulation=2, how=how)
            continue
        if how == "economical":
            settings = {"activation_checkpointing": True, "onednn_linear": onednn.is_available()}
            with mock.patch.object(onednn, "_LEAST_WORK", 0):
                trainer = run(engine, method, folder / f"{method}-economical", **settings)
            continue
        if how.startswith("compile"):
            torch.compiler.reset()
            counters.clear()
            name = f"{method}-{how.replace('compile', 'compiled')}"
            compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "masked_head": "=full" not in how}
            trainer = run(engine, method, folder / name, accumulation=2, **compiled)
            continue
        odd = os.environ.get("RANK") == "1"
        overrides = {"recycle_fraction": 0.5} if how == "disagree" and odd else {}
        if how in overflow.ARGUMENTS:
            trainer = run(engine, method, folder / f"{label}-{how}", how=how, precision_name=precision_name)
            continue
        overrides["precision_name"] = precision_name
        if how != "resume":
            overrides["save_steps"] = STEPS  # nobody reads what the middle would save
        trainer = run(engine, method, folder / label, drift=how == "drift" and odd, **overrides)
        if how == "resume":
            middle = folder / label / f"checkpoint-{MIDDLE}"
            trainer = run(engine, method, folder / f"{label}-resumed", resume=middle, **overrides)
    trainer.end()


if __name__ == "__main__":
    sys.exit(run_in_processes(sys.argv[2], int(sys.argv[1]), main))
