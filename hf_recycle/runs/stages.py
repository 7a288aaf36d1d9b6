"""A run in stages of different widths, as one process trains one of them; `cli.stages` runs them one after another."""

import os
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback

from hf_recycle.data.arguments import ModelArguments
from hf_recycle.data.stages import Stages
from hf_recycle.errors import UserError
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.neurons.width import rebuilt, width_fields
from hf_recycle.records.files import CONFIG_FILE, read_config, read_history
from hf_recycle.records.recorder import rows_of_kind
from hf_recycle.runs.parse import RunArguments


class StageEnd(TrainerCallback):
    """Ends a training, with a checkpoint, where the next stage begins.

    Attributes:
        step: where that is; None: at the end of the training.
    """

    step: int | None = None

    def __init__(self, stages: Stages):
        self._stages = stages

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = self._stages.in_steps(state.max_steps).end_after(state.global_step)
        control.should_training_stop = False  # a checkpoint may have kept that the stage before it was over

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def check_stages(arguments: RunArguments) -> None:
    """Refuses, before anything is trained, a run in stages whose checkpoints can't be resized.

    Raises:
        UserError: as said.
    """
    model, args = arguments.model, arguments.training
    if model.ff_stages is None:
        return
    stages = Stages.of(model.ff_stages)
    if model.model_name_or_path and stages.shares[0] != 1:
        raise UserError(
            f"ff_stages begins with the share {stages.shares[0]:g}, and model_name_or_path="
            f"{model.model_name_or_path!r} has all its neurons; begin with 1, or with a model that hf-recycle shrink "
            "made"
        )
    if args.max_steps > 0:
        stages.in_steps(args.max_steps)
    for name in ("l2_init_weight", "save_only_model", "save_on_each_node", "deepspeed"):
        if getattr(args, name):
            raise UserError(f"{name}={getattr(args, name)!r} can't be used with ff_stages: resizing needs a checkpoint "
                            "of one process, DDP or FSDP2, with its optimizer and without initial weights")  # fmt: skip
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true"):
        raise UserError("ff_stages can't be used with DeepSpeed, whose checkpoints can't be resized: use ddp or fsdp2")
    processes = os.environ.get("WORLD_SIZE")
    if os.environ.get("LOCAL_WORLD_SIZE", processes) != processes:
        raise UserError("ff_stages can't be used on several machines; resize by hand with hf-recycle resize")


def first_stage(arguments: ModelArguments) -> ModelArguments:
    """The arguments with the width of the first stage of a model from scratch."""
    if arguments.ff_stages is None or arguments.model_name_or_path:
        return arguments
    return replace(arguments, ff_factor=arguments.ff_factor * Stages.of(arguments.ff_stages).shares[0])


def as_wide_as(model: PreTrainedModel, checkpoint: str | Path | None, ff_pattern=None, ff_blocks=None):
    """`model`, or one of the width of a checkpoint, if that was resized since its run began; its weights are then still
    to be loaded. Another width that no resize has made is left for resuming to refuse."""
    if checkpoint is None or not Path(checkpoint, CONFIG_FILE).is_file():
        return model
    saved = {block["name"]: block["num_neurons"] for block in read_config(checkpoint)["blocks"]}
    try:
        blocks = find_feed_forwards(model, ff_pattern, ff_blocks)
    except ValueError:
        return model
    widths = {block.name: block.num_neurons for block in blocks}
    if widths == saved or widths.keys() != saved.keys() or not was_resized(checkpoint):
        return model
    config = type(model.config).from_pretrained(checkpoint)
    return rebuilt(model, blocks, {field: field.get(config) for field in width_fields(model, blocks)})[0]


def was_resized(checkpoint: str | Path, step: int | None = None) -> bool:
    """Whether the history of a checkpoint tells of a resize; given a step, at that one."""
    if not Path(checkpoint, CONFIG_FILE).is_file():
        return False
    steps = rows_of_kind(read_history(checkpoint), "resize")["step"].to_pylist()
    return bool(steps) if step is None else step in steps
