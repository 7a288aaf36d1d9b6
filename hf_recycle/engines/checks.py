"""What the engines under the Trainer need before they take the model over."""

import os
from typing import Any

from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from transformers import Trainer

from hf_recycle.engines.launch import check_process_count
from hf_recycle.errors import UserError
from hf_recycle.internals.of_transformers import unsplit_classes


def check_engine(trainer: Trainer) -> None:
    """Refuses engines that the methods can't work on and those that Accelerate silently replaced, and has ZeRO-3 write
    plain weights with its checkpoints.

    Raises:
        ValueError: for FSDP version 1, which flattens parameters out of reach; for what keeps parameters or the
            optimizer's state out of reach under DeepSpeed; if there are fewer processes than were asked for; if FSDP or
            DeepSpeed was asked for and something else is used.
    """
    check_process_count(trainer.accelerator.num_processes)
    engine = trainer.accelerator.distributed_type
    instead = "on one process" if engine == DistributedType.NO else "with plain data parallelism (DDP)"
    if _asked_for(trainer, "FSDP") and engine != DistributedType.FSDP:
        raise UserError(
            f"FSDP was asked for, but Accelerate would silently train {instead}, because it shards over accelerator "
            "devices only: on CPUs use ddp, zero2 or zero3; on GPUs start the processes with accelerate launch"
        )
    if _asked_for(trainer, "DEEPSPEED") and engine != DistributedType.DEEPSPEED:
        raise UserError(
            f"DeepSpeed was asked for, but Accelerate would silently train {instead}, as it does where "
            "ACCELERATE_USE_CPU is set: unset it, and pass --use_cpu (use_cpu=True) to the training instead"
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "FSDP version 1 flattens the parameters, so neurons can't be told apart: use version 2 "
            "(fsdp_version: 2 in the accelerate configuration, or FSDP_VERSION=2)."
        )
    if trainer.is_deepspeed_enabled:
        if trainer.args.optim == "muon":
            raise UserError(
                "optim=muon can't be used with DeepSpeed, which flattens the matrices whose steps Muon orthogonalises: "
                "use DDP or FSDP2, or optim=adamw_torch"
            )
        check_deepspeed(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)


def check_can_overtrain(trainer: Trainer) -> None:
    """Refuses engines under which the feed-forward weights can't be trained by themselves for a while.

    Raises:
        ValueError: with what to do.
    """
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "overtrain_steps can't be used with DeepSpeed, which takes gradients and optimizer over: use DDP or FSDP2."
        )
    for name in ("tp", "cp", "sp"):
        if (size := getattr(trainer, f"get_{name}_size")()) > 1:
            raise ValueError(f"overtrain_steps can't be used with {name}_size={size}: use DDP or FSDP2 alone.")


def can_recompute(trainer: Trainer) -> bool:
    """Whether activations may be computed again, block by block: not where compilation or checkpointing decides what is
    kept, nor under ZeRO-3, whose gathered weights a hook on saved tensors would keep alive."""
    state = trainer.accelerator.state
    assert trainer.model is not None
    checkpointing = (
        trainer.args.gradient_checkpointing
        or any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
        or getattr(getattr(state, "fsdp_plugin", None), "activation_checkpointing", False)
    )
    zero3 = trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3
    return not (checkpointing or _is_compiled(trainer) or zero3)


def can_use_onednn(trainer: Trainer) -> bool:
    """Whether linear layers may compute by oneDNN: on a CPU, where neither a compiler nor DeepSpeed replaces them."""
    return trainer.args.device.type == "cpu" and not (_is_compiled(trainer) or trainer.is_deepspeed_enabled)


def _is_compiled(trainer: Trainer) -> bool:
    return trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def _asked_for(trainer: Trainer, engine: str) -> bool:
    by_argument = trainer.args.fsdp if engine == "FSDP" else trainer.args.deepspeed
    return bool(by_argument) or os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"


def leave_embeddings_ungrouped(plugin, model: Any) -> None:
    """Leaves the input embeddings out of the groups that FSDP2 makes of a model's `_no_split_modules`, where the
    accelerate configuration names no classes.

    An output layer tied to them lies in another group, and a parameter in two groups is an error.

    Args:
        plugin: Accelerate's FSDP plugin, which is changed.
    """
    if plugin.transformer_cls_names_to_wrap is not None or not unsplit_classes(model):
        return
    embeddings = model.get_input_embeddings()
    present = {type(module).__name__ for module in model.modules()}
    holders = {type(module).__name__ for module in model.modules() if any(m is embeddings for m in module.modules())}
    plugin.transformer_cls_names_to_wrap = sorted((present & set(unsplit_classes(model))) - holders)


def check_deepspeed(config: dict[str, Any]) -> None:
    """Refuses a DeepSpeed configuration that the methods can't work with, and completes it.

    Raises:
        ValueError: with the key, its value and what to do.
    """
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1)
    tensor_parallel = (config.get("tensor_parallel") or {}).get("autotp_size", 0)
    unreachable = [
        ("stage", stage, stage not in (1, 2, 3), "use stage 1, 2 or 3 (without ZeRO, DDP does the same)"),
        *(
            (f"{part}.device", device, device == "nvme", "weights on disks can't be reached: use cpu or none")
            for part in ("offload_optimizer", "offload_param")
            if (device := (zero.get(part) or {}).get("device"))
        ),
        ("offload_optimizer.ratio", ratio, ratio != 1, "a second optimizer steps the other weights: leave it out"),
        *(
            (key, value, value is True or value > 1, "it keeps further copies of the weights: leave it out")
            for key in ("zero_hpz_partition_size", "zero_quantized_weights")
            if (value := zero.get(key)) is not None
        ),
    ]
    for key, value, refused, remedy in unreachable:
        if refused:
            raise ValueError(f"zero_optimization.{key}={value!r} can't be used with neuron recycling: {remedy}.")
    if tensor_parallel > 1:
        raise ValueError(
            f"tensor_parallel.autotp_size={tensor_parallel} can't be used with neuron recycling: it cuts weights "
            "without a record of how; use ZeRO-3 or FSDP2 alone."
        )
    if stage == 3 and not zero.setdefault("stage3_gather_16bit_weights_on_model_save", True):
        raise ValueError(
            "zero_optimization.stage3_gather_16bit_weights_on_model_save=False would leave checkpoints without weights "
            "that from_pretrained can load: set it to true."
        )


def drop_tied_aliases(model: nn.Module) -> dict[str, str]:
    """Removes second names of parameters that the output embeddings hold, before FSDP2 shards the model.

    BERT and its kin register the decoder's bias twice, on the decoder and on the head around it, and compute with the
    decoder's only. FSDP2 puts decoder and head into different groups, and a parameter in two groups is an error. The
    name that goes is one that `from_pretrained` ties again.

    Returns:
        The names that went, each with the name that stays.
    """
    whole: Any = model
    output = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
    if output is None:
        return {}
    held = {id(parameter) for parameter in output.parameters(recurse=False)}
    kept = {id(output), id(whole.get_input_embeddings())}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in held and id(module) not in kept:
                delattr(module, name)
    stayed = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: next(other for other in tied if other in stayed)
        for tied in names.values()
        for name in tied
        if name not in stayed
    }
