"""`hf-recycle train` with ff_stages: one stage after another, each from the resized checkpoint of the one before."""

import json
from collections.abc import Callable
from pathlib import Path

from hf_recycle.errors import UserError


def train_in_stages(arguments, train: Callable[[str | None], int]) -> int:
    """Trains all stages that are left; returns the first exit status that is not 0, or 0.

    Args:
        arguments: of the run, with `ff_stages`.
        train: trains one stage, or what is left of it, from a checkpoint that it is given.
    """
    from hf_recycle.hub.address import is_address
    from hf_recycle.runs.run import find_checkpoint, last_checkpoint
    from hf_recycle.runs.stages import check_stages

    args = arguments.training
    check_stages(arguments)
    if is_address(args.resume_from_checkpoint):
        raise UserError("ff_stages go on from a folder; bring the checkpoint here with hf-recycle pull first")
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    while True:
        if checkpoint is not None and (change := _change_due(arguments, checkpoint)):
            checkpoint = _resize(arguments, checkpoint, *change)
        status = train(checkpoint)
        checkpoint = last_checkpoint(args.output_dir)
        if status or checkpoint is None or not _change_due(arguments, checkpoint):
            return status


def _change_due(arguments, checkpoint: str) -> tuple[float, float] | None:
    """The shares before and after, if a checkpoint stands where a stage begins and has the width of the one before."""
    from hf_recycle.data.stages import Stages
    from hf_recycle.runs.stages import was_resized

    try:
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
        step, max_steps = int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # resuming says what is wrong with it
    change = Stages.of(arguments.model.ff_stages).in_steps(max_steps).change_at(step)
    return None if change is None or was_resized(checkpoint, step) else change


def _resize(arguments, checkpoint: str, before: float, after: float) -> str:
    """Writes the resized checkpoint into the run's folder, in place of one of that step, and returns where it is."""
    from hf_recycle.analysis.resize import ResizeSettings
    from hf_recycle.analysis.resize_checkpoint import resize_checkpoint
    from hf_recycle.checkpoints.claims import claimed
    from hf_recycle.checkpoints.run_folder import checkpoint_folder
    from hf_recycle.neurons.width import width_fields

    args, factor = arguments.training, after / before
    step = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    output = checkpoint_folder(Path(args.output_dir), step)

    def values_of(model, blocks):
        return {
            field: round(field.value * factor) if isinstance(field.value, int) else field.value * factor
            for field in width_fields(model, blocks)
        }

    output.parent.mkdir(parents=True, exist_ok=True)
    with claimed(Path(args.output_dir), args):
        done = resize_checkpoint(Path(checkpoint), output, values_of, ResizeSettings(seed=args.seed))
    name, (was, now) = next(iter(done.widths.items()))
    print(f"stage at step {step:,}: {was:,} -> {now:,} neurons in {name}, and the other blocks alike", flush=True)
    return str(output)
