"""What makes short runs quick and changes nothing that they compute."""

import contextlib
import functools
import gc
import importlib.metadata
import os


def make_runs_quick() -> None:
    """For this process, for good. To be called when everything else is imported."""
    # What runs would load, the latter by Accelerate where it is installed; half as many objects again to look through.
    import hf_recycle.mlm.metric  # noqa: F401

    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401
    # Accelerate reads the metadata of DeepSpeed whenever it unwraps a model, and every checkpoint tells versions.
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
    importlib.metadata.version = functools.cache(importlib.metadata.version)
    # No test pulls the plug.
    os.fsync = lambda handle: None
    # Every training starts with a collection of garbage, which takes a third of a second to look through what imports
    # have left: from now on it need not.
    gc.collect()
    gc.freeze()
