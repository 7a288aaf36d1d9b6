"""The engines and methods that must work together; the tests run over this list."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
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


def _zero(stage: int) -> Callable[[str], dict]:
    def arguments(folder: str) -> dict:
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "optimizer": {
                "type": "AdamW",
                "params": {"torch_adam": True, "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
            },
        }
        path = Path(folder, f"zero{stage}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
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
    "midpoint": {"midpoint_weight": 0.05, "midpoint_distance": "l2"},
}
