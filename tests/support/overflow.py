"""Steps that a loss scaler skips: infinite gradients, and a scaler for the CPU."""

from collections.abc import Callable, Collection

import torch
from accelerate.utils import AutocastKwargs

# Steps of the Trainer at which gradients are infinite: a selection phase (with recycle_steps=3) is due at the first of
# them, and neurons are fading in at the others.
POISONED = (3, 6, 7)
# Batches in a known order, each once, and a learning rate that does not depend on how many there are.
_STEPS = 12
_IN_ORDER = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
ARGUMENTS = {
    "skip": _IN_ORDER | {"max_steps": _STEPS},
    "without": _IN_ORDER | {"max_steps": _STEPS - len(POISONED)},
}


def samples(make: Callable[[int], list], batch: int, how: str) -> list:
    """The training data; with `how="without"` those of the poisoned steps are left out."""
    if how not in ARGUMENTS:
        return make(64)
    left_out = POISONED if how == "without" else ()
    return [sample for i, sample in enumerate(make(_STEPS * batch)) if i // batch + 1 not in left_out]


def use_scaler(trainer, *, autocast: bool = True) -> None:
    """Gives a trainer with fp16=True on the CPU a gradient scaler, which Accelerate does for accelerator devices only.
    Without autocast everything is computed in float32, in which a scale that is a power of two rounds nothing."""
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.accelerator.autocast_handler = AutocastKwargs(enabled=autocast)


def poison(trainer, steps: Collection[int] = POISONED) -> None:
    """Makes some gradients infinite at the poisoned steps. A run that it is compared with needs the hook too, because
    what looks at a model's activations switches some savings off, which changes last digits."""

    # Through an activation: hooks on parameters do not fire under FSDP2.
    def hook(module, inputs, output):
        if output.requires_grad and trainer.state.global_step + 1 in steps:
            output.register_hook(lambda gradient: gradient * torch.inf)

    trainer.model.get_input_embeddings().register_forward_hook(hook)
