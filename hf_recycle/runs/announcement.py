"""The banner and the file `config.yaml` when training begins."""

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback

from hf_recycle import __version__
from hf_recycle.card.run_facts import hardware, model_facts
from hf_recycle.methods.base import Method
from hf_recycle.methods.settings import flat
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.runs.configuration import save_configuration
from hf_recycle.runs.parse import RunArguments
from hf_recycle.trainer.trainer import RecyclingTrainer


class Announcement(TrainerCallback):
    """Writes `config.yaml` and prints the banner once everything is checked: right before the first step.

    Args:
        quiet: no banner.
    """

    def __init__(self, trainer: RecyclingTrainer, arguments: RunArguments, *, quiet: bool = False):
        self._trainer, self._arguments, self._quiet = trainer, arguments, quiet

    def on_train_begin(self, args, state, control, **kwargs):
        # First, so that the folder of a run that is interrupted at any moment says how to run it again.
        if args.should_save:
            save_configuration(self._arguments, Path(args.output_dir))
        if state.is_world_process_zero and not self._quiet:
            print(banner(self._trainer, self._arguments), flush=True)


def banner(trainer: RecyclingTrainer, arguments: RunArguments) -> str:
    """A few lines: model, devices, batch, methods with their schedule, folder. To be asked for in `on_train_begin`."""
    args, state, table = trainer.args, trainer.state, trainer.neuron_table()
    model = model_facts(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
    where = hardware(trainer)
    blocks = blocks_text([] if table is None else table.blocks)
    begins = f" from step {state.global_step:,}" if state.global_step else ""
    batch = batch_text(args, arguments.data.max_seq_length)
    return "\n".join(
        [
            f"hf-recycle {__version__}: {model['architecture']}, {model['parameters']:,} parameters, {blocks}",
            f"  device      {where['processes']} x {where['device']}, {where['engine']}, {where['precision']}",
            f"  training    {state.max_steps:,} steps{begins}, each of {batch}",
            *(method_text(method, state.max_steps) for method in trainer.neuron_methods.methods),
            f"  output_dir  {args.output_dir}",
        ]
    )


def blocks_text(blocks: Sequence[FeedForward]) -> str:
    """`8 feed-forward blocks x 2,048 neurons`."""
    if not blocks:
        return "no feed-forward block"
    widths = sorted({block.num_neurons for block in blocks})
    neurons = f"{widths[0]:,}" if len(widths) == 1 else f"{widths[0]:,} to {widths[-1]:,}"
    return f"{len(blocks)} feed-forward block{'s' * (len(blocks) > 1)} x {neurons} neurons"


def batch_text(args, length: int) -> str:
    """The sequences of an optimizer step, and what they are the product of."""
    factors = {"": args.per_device_train_batch_size, " processes": args.world_size}
    factors[" accumulated"] = args.gradient_accumulation_steps
    total = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    product = " x ".join(f"{factor}{what}" for what, factor in factors.items() if factor > 1 or not what)
    return f"{total:,} sequences x {length} tokens" + (f" ({product})" if " x " in product else "")


def method_text(method: Method, max_steps: int, *, everything: bool = False) -> str:
    """When a method acts in a training of so many steps, and its settings in force: all, or those of some interest."""
    settings = flat(method.settings)
    plain = flat(type(method.settings)())
    shown = [f"{name}={value}" for name, value in settings.items() if everything or value != plain[name]]
    first = f"  {method.settings.prefix.rstrip('_'):<10}  {steps_text(method.acting_steps(max_steps))}"
    width = shutil.get_terminal_size().columns
    indent = " " * 14
    return "\n".join([first, *textwrap.wrap(", ".join(shown), width, initial_indent=indent, subsequent_indent=indent)])


def steps_text(steps: Sequence[int] | None) -> str:
    """`at 7 steps: 100, 200, ..., 700`."""
    if steps is None:
        return "at every step"
    shown = [f"{step:,}" for step in steps]
    if len(shown) > 4:
        shown = [*shown[:2], "...", shown[-1]]
    return f"at {len(steps):,} step{'s' * (len(steps) != 1)}" + (f": {', '.join(shown)}" if shown else "")
