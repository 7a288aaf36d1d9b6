"""What runs in half precision need beside the others, and a look at their masters."""

import torch
from support.overflow import ARGUMENTS, POISONED, poison, use_scaler
from transformers import TrainerCallback

from hf_recycle.methods.recycling import phase


def bf16_settings(method: str) -> dict:
    """Small steps, so that rounded gradients do not add up to more than the gaps between neurons; the midpoint loss so
    strong that what it does stands out from them."""
    # With this seed no two neurons are close where the choice is made.
    return {"learning_rate": 1e-3, "recycle_seed": 1} | ({"midpoint_weight": 1000.0} if method == "midpoint" else {})


def prepare(trainer, how: str) -> "Watched":
    """To be called before `train`."""
    if trainer.args.fp16 and not trainer.is_deepspeed_enabled:
        use_scaler(trainer)
    if trainer.args.fp16 and trainer.is_deepspeed_enabled:
        from deepspeed.accelerator import get_accelerator

        # DeepSpeed asks for fast fp16 instructions; torch computes without them.
        type(get_accelerator()).is_fp16_supported = lambda self: True
    if how in ARGUMENTS:
        poison(trainer, POISONED if how == "skip" else ())
    watched = Watched(trainer)
    trainer.add_callback(watched)
    return watched


class Watched(TrainerCallback):
    """Looks, after every step, whether what the model computes with is what the masters say, and how clear each choice
    of neurons was.

    Attributes:
        differences: at each step, the largest difference in units of the last place of the model's dtype.
        margins: of each choice, how much larger the smallest neuron left was than the largest one taken, relatively.
    """

    def __init__(self, trainer):
        self._trainer, self.differences, self.dtypes, self.margins = trainer, [], set(), []

    def on_train_begin(self, args, state, control, **kwargs):
        self._original = phase.select_in_each

        def select_in_each(all_scores, all_eligible, ks):
            for scores, eligible, k in zip(all_scores, all_eligible, ks, strict=True):
                ranked = scores[eligible].sort().values
                if 0 < k < len(ranked):
                    self.margins.append(float(ranked[k] / ranked[k - 1] - 1))
            return self._original(all_scores, all_eligible, ks)

        phase.select_in_each = select_in_each

    def on_train_end(self, args, state, control, **kwargs):
        phase.select_in_each = self._original

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        table, worst = self._trainer.neuron_table(), 0.0
        for block, neurons in zip(table.blocks, table.states, strict=True):
            settled = (~neurons.fading_in()).nonzero().flatten()
            for piece in block.slices:
                pairs = zip(piece.storage.read(piece, settled), piece.storage.read_forward(piece, settled), strict=True)
                for master, forward in pairs:
                    if not master.numel():
                        continue
                    expected = master.to(piece.dtype).float()
                    off = (forward.float() - expected).abs() / expected.abs().clamp(min=1e-8)
                    worst = max(worst, float(off.max()) / torch.finfo(piece.dtype).eps)
                    self.dtypes.add(str(master.dtype))
        self.differences.append(worst)

    def results(self) -> dict:
        parameters = {str(piece.dtype) for block in self._trainer.neuron_table().blocks for piece in block.slices}
        return {
            "off": self.differences,
            "margins": self.margins,
            "masters": sorted(self.dtypes),
            "parameters": sorted(parameters),
        }
