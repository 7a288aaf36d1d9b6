"""The tables of what can be chosen by name. Their functions are in the modules that are named here."""

from collections.abc import Callable

from hf_recycle.utils.registry import Registry

CRITERIA: Registry[Callable] = Registry("selection criterion", "hf_recycle.methods.recycling.selection")
REINITIALIZATIONS: Registry[Callable] = Registry("reinitialization", "hf_recycle.methods.recycling.births")
