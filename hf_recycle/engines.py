"""What the engines under the Trainer need before they take the model over."""

from torch import nn
from transformers import Trainer


def check_engine(trainer: Trainer) -> None:
    """Refuses engines that the methods can't work on.

    Raises:
        ValueError: for FSDP version 1, which flattens parameters out of reach.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "FSDP version 1 flattens the parameters, so neurons can't be told apart: use version 2 "
            "(fsdp_version: 2 in the accelerate configuration, or FSDP_VERSION=2)."
        )


def drop_tied_aliases(model: nn.Module) -> dict[str, str]:
    """Removes second names of parameters that the output embeddings hold, before FSDP2 shards the model.

    BERT and its kin register the decoder's bias twice, on the decoder and on the head around it, and compute with the
    decoder's only. FSDP2 puts decoder and head into different groups, and a parameter in two groups is an error. The
    name that goes is one that `from_pretrained` ties again.

    Returns:
        The names that went, each with the name that stays.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None:
        return {}
    held = {id(parameter) for parameter in output.parameters(recurse=False)}
    kept = {id(output), id(model.get_input_embeddings())}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in held and id(module) not in kept:
                del module._parameters[name]
    stayed = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: next(other for other in tied if other in stayed)
        for tied in names.values()
        for name in tied
        if name not in stayed
    }
