"""Adapters of PEFT that were read from a checkpoint: whether all that trains was in it."""

import sys
from pathlib import Path

from safetensors import safe_open
from torch import nn

from hf_recycle.errors import UserError

_FILE = "adapter_model.safetensors"


def check_adapter(model: nn.Module, folder: Path) -> None:
    """Refuses to go on with a PEFT model that was read from an adapter's file which lacks a part of it, or a parameter
    of the base model that trains too.

    Raises:
        UserError: names the first one.
    """
    if "peft" not in sys.modules:
        return
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return
    adapter = model.active_adapters[0]
    path = next((path for path in (folder / _FILE, folder / adapter / _FILE) if path.is_file()), None)
    if path is None:
        return
    with safe_open(path, framework="pt") as file:
        saved = set(file.keys())
    wanted = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
    if lost := sorted(wanted - saved):
        raise UserError(f"The adapter in {path} is not that of the model: {lost[0]} is missing.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and adapter not in name.split(".") and name not in saved:
            raise UserError(
                f"{name} trains, but {path} holds the adapter alone, so it can't be resumed: freeze it, or name its "
                "module in modules_to_save of the PEFT configuration."
            )
