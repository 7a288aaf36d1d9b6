"""On what machine and with which versions something was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

_LIBRARIES = ("hf-recycle", "torch", "transformers", "accelerate", "datasets")


def machine_facts() -> dict[str, str]:
    """In words, by name: processor, memory, GPUs, threads, versions, and how busy the machine was."""
    facts = {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {platform.machine()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())) or "none",
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES),
        "python": f"{platform.python_version()} on {platform.system()}",
    }
    if hasattr(os, "getloadavg"):
        facts["load before"] = f"{os.getloadavg()[0]:.1f} processes at work on {os.cpu_count()} cores"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    named: Mapping[str, str] = dict(line.split(":", 1) for line in lines if ":" in line and "model name" in line)
    return next((name.strip() for name in named.values()), "unknown processor")
