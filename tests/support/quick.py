"""What makes short runs quick and changes nothing that they compute."""

import functools
import gc
import importlib.metadata
import os


def make_runs_quick() -> None:
    """For this process, for good. To be called when everything is imported."""
    # Accelerate reads the metadata of DeepSpeed whenever it unwraps a model, and every checkpoint tells versions.
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
    importlib.metadata.version = functools.cache(importlib.metadata.version)
    # No test pulls the plug.
    os.fsync = lambda handle: None
    # Every training starts with a collection of garbage, which takes a third of a second to look through what imports
    # have left: from now on it need not.
    gc.collect()
    gc.freeze()
