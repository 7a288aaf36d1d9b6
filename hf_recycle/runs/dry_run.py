"""`train --dry_run`: model, data, schedule and memory of a run, without training."""

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from datasets import IterableDataset
from transformers import PreTrainedModel, set_seed

from hf_recycle.arguments import RecyclingArguments
from hf_recycle.data.model import load_model, pin_revision
from hf_recycle.data.stages import Stages
from hf_recycle.errors import UserError
from hf_recycle.methods.all import CALLBACKS
from hf_recycle.methods.base import Method
from hf_recycle.methods.l2_init import parameters_of
from hf_recycle.mlm.chunked_head import find_chunked_head
from hf_recycle.mlm.heads import find_masked_head
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.find import Survey, survey
from hf_recycle.neurons.left_out import summary
from hf_recycle.runs.announcement import batch_text, blocks_text, method_text
from hf_recycle.runs.memory import activation_bytes, optimizer_bytes
from hf_recycle.runs.parse import RunArguments
from hf_recycle.runs.run import check_arguments, check_evaluation, find_checkpoint, prepare_data
from hf_recycle.runs.stages import as_wide_as, first_stage


def dry_run(arguments: RunArguments) -> str:
    """Checks and prepares all that a run does before it trains; nothing is written but the caches of the data.

    Raises:
        UserError, ValueError: what the run refuses, but for what only the devices and engines can tell.
    """
    args = arguments.training
    check_arguments(arguments)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    pin_revision(arguments.model)
    set_seed(args.seed)
    with args.main_process_first(local=False, desc="preparing the data"):
        tokenizer, train, validation = prepare_data(arguments.model, arguments.data)
    check_evaluation(args, validation)
    model = _shapes_of_model(arguments, tokenizer, checkpoint)
    max_steps = planned_steps(args, None if isinstance(train, IterableDataset) else len(train))
    methods = list(_methods(args, max_steps))
    found = _survey(model, args, needed=bool(methods))
    for method in methods:
        method.check_blocks(found.blocks)
    left_out = [f"  left out    {len(found.left_out)} modules of unknown layout: {summary(found.left_out)}"]
    length = arguments.data.max_seq_length
    return "\n".join(
        [
            f"  model       {type(model).__name__}, {model.num_parameters():,} parameters",
            f"  blocks      {blocks_text(found.blocks)}",
            *(left_out if found.left_out else []),
            f"  tokenizer   {len(tokenizer):,} entries",
            f"  data        {_size(train)} of at most {length} tokens to train on, {_size(validation)} to evaluate on",
            f"  training    {max_steps:,} steps, each of {batch_text(args, length)}",
            *_stages(arguments, max_steps),
            *(method_text(method, max_steps, everything=True) for method in methods),
            *_memory(arguments, model, found.blocks),
            f"  output_dir  {args.output_dir}" + (f", going on from {checkpoint}" if checkpoint else ""),
            "nothing was trained (dry_run)",
        ]
    )


def planned_steps(args: RecyclingArguments, examples: int | None) -> int:
    """The steps that the Trainer takes.

    Args:
        examples: of the training data; None: a stream.

    Raises:
        UserError: a stream without max_steps.
    """
    if args.max_steps > 0:
        return args.max_steps
    if examples is None:
        raise UserError("max_steps is missing: a stream has no end of its own; say how many steps to train")
    rounded = math.floor if args.dataloader_drop_last else math.ceil
    batches = rounded(rounded(examples / args.per_device_train_batch_size) / args.world_size)
    steps_of_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * steps_of_epoch)


def _shapes_of_model(arguments: RunArguments, tokenizer: Any, checkpoint: str | None) -> PreTrainedModel:
    """The model, without weights where it is built from scratch and its code can do that."""
    length, args = arguments.data.max_seq_length, arguments.training

    def load() -> PreTrainedModel:
        model = load_model(first_stage(arguments.model), tokenizer, length)
        return as_wide_as(model, checkpoint, args.ff_pattern, args.ff_blocks)

    with suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        return load()
    return load()


def _stages(arguments: RunArguments, max_steps: int) -> Iterator[str]:
    if arguments.model.ff_stages is not None:
        stages = Stages.of(arguments.model.ff_stages).in_steps(max_steps)
        pairs = zip(map(int, stages.starts), stages.shares, strict=True)
        told = (f"from step {start:,} on {share:.4g} of the neurons" for start, share in pairs)
        yield "  stages      " + ", ".join(told)


def _methods(args: RecyclingArguments, max_steps: int) -> Iterator[Method]:
    """The methods that are on, in their order, with their settings in force."""
    for callback in CALLBACKS:
        settings = args.method_settings(callback.method_class.settings_class)
        if settings.enabled:
            method = callback.method_class(settings)
            method.settings = settings.resolve(max_steps, args.seed)
            yield method


def _survey(model: PreTrainedModel, args: RecyclingArguments, *, needed: bool) -> Survey:
    try:
        return survey(model, args.ff_pattern, args.ff_blocks)
    except ValueError:
        if needed or args.ff_pattern or args.ff_blocks:
            raise
        return Survey([], [])


def _size(data: Any) -> str:
    if data is None:
        return "none"
    return "a stream of sequences" if isinstance(data, IterableDataset) else f"{len(data):,} sequences"


def _memory(arguments: RunArguments, model: PreTrainedModel, blocks: list[FeedForward]) -> Iterator[str]:
    """What training keeps, by the shapes: an estimate, without what libraries and allocators take."""
    args = arguments.training
    parts = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": 4 * sum(p.numel() for p in model.parameters() if p.requires_grad),
        "optimizer": optimizer_bytes(args, model),
        "activations of a process at most": None if args.gradient_checkpointing else _activations(arguments, model),
    }
    if args.l2_init_weight:
        pulled = parameters_of(model, blocks, args.l2_init_parts)
        parts["initial weights"] = 4 * sum(p.numel() for p in pulled.values() if p.requires_grad)
    known = sum(filter(None, parts.values()))
    told = ", ".join(f"{name} {'unknown' if size is None else _bytes(size)}" for name, size in parts.items())
    yield f"  memory      about {_bytes(known)} in float32: {told}"
    if args.world_size > 1:
        yield "              (DDP keeps it all on each process; ZeRO and FSDP shard weights, gradients or optimizer)"


def _activations(arguments: RunArguments, model: PreTrainedModel) -> int | None:
    args, data = arguments.training, arguments.data
    shape = (args.per_device_train_batch_size, data.max_seq_length)
    if arguments.model.task == "mlm":
        share = max((data.mlm_probability_schedule or {"0": data.mlm_probability}).values())
        masked = args.masked_head and find_masked_head(model) is not None
        return activation_bytes(model, shape, head_share=share if masked else 1)
    whole = not (args.masked_head and args.chunked_head) or args.torch_compile or args.fp16
    return activation_bytes(model, shape, in_chunks=not whole and find_chunked_head(model) is not None)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
