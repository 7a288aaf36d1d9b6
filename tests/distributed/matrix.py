"""The engines and methods that must work together; the tests run over this list."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Engine:
    """One way to train on several processes.

    Attributes:
        title: its name in the docs.
        environment: variables that launch it.
        arguments: training arguments, given a folder to write a configuration file to.
        pretend: FSDP on the CPU, see `engine_run.pretend_an_accelerator`.
    """

    title: str
    environment: dict[str, str] = field(default_factory=dict)
    arguments: Callable[[str], dict] = lambda folder: {}
    pretend: bool = False


def _zero(stage: int, **more) -> Callable[[str], dict]:
    def arguments(folder: str) -> dict:
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "initial_scale_power": 10, "hysteresis": 1},
            "zero_optimization": {"stage": stage},
            "optimizer": {
                "type": "AdamW",
                "params": {"torch_adam": True, "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
            },
        }
        for key, value in more.items():
            config[key] = config[key] | value if isinstance(value, dict) and key in config else value
        config = {key: value for key, value in config.items() if value is not None}
        path = Path(folder, f"zero{stage}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: one process must not read what another is writing.
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(config))
        temporary.replace(path)
        return {"deepspeed": str(path)}

    return arguments


ENGINES = {
    "single": Engine("one process"),
    "ddp": Engine("DDP"),
    "fsdp2": Engine(
        "FSDP2",
        {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        },
        pretend=True,
    ),
    "zero1": Engine("DeepSpeed ZeRO-1", arguments=_zero(1)),
    "zero2": Engine("DeepSpeed ZeRO-2", arguments=_zero(2)),
    "zero3": Engine("DeepSpeed ZeRO-3", arguments=_zero(3)),
}

# Settings of these engines that change where things lie. What is tested of each: `test_engine_resume`,
# `test_engine_limits`.
VARIANTS = {
    "fsdp2_sharded": replace(
        ENGINES["fsdp2"],
        title="FSDP2, sharded state dicts",
        environment=ENGINES["fsdp2"].environment | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    ),
    "zero2_universal": Engine("ZeRO-2, universal checkpoints", arguments=_zero(2, checkpoint={"load_universal": True})),
    "zero2_offload": Engine(
        "ZeRO-2, optimizer on the CPU",
        arguments=_zero(
            2, zero_optimization={"offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=False
        ),
    ),
    "zero3_offload": Engine(
        "ZeRO-3, parameters and optimizer on the CPU",
        arguments=_zero(
            3,
            zero_optimization={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
            zero_force_ds_cpu_optimizer=False,
        ),
    ),
    "zero3_own_optimizer": Engine(
        "ZeRO-3, the Trainer's own optimizer, no parameter kept gathered",
        arguments=_zero(3, optimizer=None, zero_optimization={"stage3_param_persistence_threshold": 0}),
    ),
}

# Methods, as training arguments.
METHODS = {
    "off": {},
    "plain": {"recycle_steps": 3, "recycle_fraction": 0.1},
    "immunity_matched": {
        "recycle_steps": 2,
        "recycle_fraction": 0.2,
        "recycle_immunity": 2,
        "recycle_reinit": "matched_normal",
    },
    "smooth": {"recycle_steps": 3, "recycle_fraction": 0.1, "recycle_smooth_steps": 4},
    "regularised": {
        "recycle_steps": 3,
        "recycle_fraction": 0.1,
        "recycle_smooth_steps": 4,
        "l2_init_weight": 3.0,
        "shrink_perturb_steps": 4,
        "shrink_perturb_keep": 0.7,
    },
    "pruning": {
        "prune_fraction": 0.5,
        "prune_start": 2,
        "prune_end": 8,
        "prune_steps": 2,
        "recycle_steps": 3,
        "recycle_fraction": 0.1,
        "recycle_smooth_steps": 4,
    },
    "contribution": {
        "recycle_steps": 3,
        "recycle_fraction": 0.1,
        "recycle_selection": "contribution",
        "recycle_fold": "mean",
        "recycle_reinit": "sample",
        "recycle_probe_batches": 2,
    },
    "surgeon": {
        "prune_fraction": 0.25,
        "prune_start": 2,
        "prune_end": 8,
        "prune_steps": 3,
        "prune_selection": "obs",
        "prune_fold": "least_squares",
        "prune_probe_batches": 2,
    },
    "midpoint": {"midpoint_weight": 0.05, "midpoint_distance": "l2"},
    "copies": {"recycle_steps": 3, "recycle_fraction": 0.1, "recycle_reinit": "copy_noise"},
    "global": {"recycle_steps": 3, "recycle_fraction": 0.1, "recycle_scope": "global"},
    "layers": {"recycle_steps": 3, "recycle_fraction": 0.2, "recycle_layers": [1], "recycle_reinit": "zero_out"},
}

# Methods that take gradients of their own, which DeepSpeed does not give.
GRADIENT_METHODS = {
    "fisher": {
        "recycle_steps": 3,
        "recycle_fraction": 0.1,
        "recycle_selection": "fisher",
        "recycle_reinit": "gradmax",
        "recycle_probe_batches": 2,
    },
    "gradient": {
        "recycle_steps": 3,
        "recycle_fraction": 0.1,
        "recycle_selection": "gradient",
        "recycle_reinit": "split",
        "recycle_probe_batches": 2,
    },
}

# Layouts of feed-forward weights other than BERT's, each with a family that has it, and what these models train with:
# everything that reads or writes neurons.
LAYOUTS = {"gated": "llama", "fused": "modernbert", "Conv1D": "gpt2"}
ON_LAYOUTS = METHODS["pruning"] | METHODS["midpoint"]

# Precisions, as training arguments. In fp16 a loss scaler may skip steps.
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
}
