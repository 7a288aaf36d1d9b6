"""What accelerate keeps to itself (seen in accelerate 1.15)."""

from torch import nn


def has_forward_of_accelerate(module: nn.Module) -> bool:
    """Whether accelerate has put a forward of its own, which converts dtypes, before the one of the module's class."""
    original = getattr(vars(module).get("_original_forward"), "__func__", None)
    return original is type(module).forward and vars(module)["forward"].__module__.startswith("accelerate.")
