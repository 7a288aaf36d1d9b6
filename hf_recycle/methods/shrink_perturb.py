"""Shrink and perturb: every so many steps, W ← keep · W + (1 − keep) · fresh.

Source: Ash and Adams, *On Warm-Starting Neural Network Training* (arXiv:1910.08475).
"""

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from hf_recycle.methods.base import Method, Run, StepInfo
from hf_recycle.methods.coordinator import NeuronCallback
from hf_recycle.methods.schedule import resolved
from hf_recycle.methods.settings import ShrinkPerturbSettings
from hf_recycle.neurons.blocks import FeedForward, NeuronSlice, whole_slices
from hf_recycle.neurons.optimizer_state import check_optimizer
from hf_recycle.neurons.storage import Fragments
from hf_recycle.neurons.table import BlockState
from hf_recycle.utils.seeds import generator_for


class ShrinkPerturb(Method[ShrinkPerturbSettings]):
    """Mixes fresh weights into those of the model."""

    settings_class = ShrinkPerturbSettings

    def start(self, run: Run, settings: ShrinkPerturbSettings) -> None:
        super().start(run, settings)
        self._every = resolved(settings.steps)
        check_optimizer(run.optimizer, "shrink_perturb_steps", self._every)
        model = extract_model_from_parallel(run.model, keep_torch_compile=False)
        slices = whole_slices(model, (name for name, _ in model.named_parameters()))
        self._slices = {name: piece for name, piece in slices.items() if run.watch.is_optimized(piece)}
        recipes = self.table.fresh.recipes("")
        for name in self._slices:
            path, _, attribute = name.rpartition(".")
            if recipes[path, attribute] == []:
                raise ValueError(
                    f"shrink_perturb_steps={settings.steps}: nothing in the model initialises {name}, so fresh weights "
                    "can't be drawn for it."
                )

    def acting_steps(self, max_steps: int) -> range:
        every = resolved(self.settings.steps)
        return range(every, max_steps, every)

    @torch.no_grad()
    def after_step(self, info: StepInfo) -> None:
        if not info.stepped or info.step >= info.max_steps or info.optimizer_steps % self._every:
            return
        kept = [lines for pair in zip(self.table.blocks, self.table.states, strict=True) for lines in _fading_in(*pair)]
        generator = generator_for(resolved(self.settings.seed), info.optimizer_steps, 0, "shrink and perturb")
        seed, keep = int(torch.randint(2**62, (), generator=generator)), self.settings.keep
        with self.table.fresh.instance("", seed=seed) as model:
            fresh = dict(model.named_parameters(remove_duplicate=False))
            for name, piece in self._slices.items():
                if piece.parameter.requires_grad:
                    storage, lines = piece.storage, piece.lines()
                    parts = storage.shard(piece, lines, fresh[name])
                    for tile, values in zip(storage.tiles(piece), parts, strict=True):
                        tile.values.mul_(keep).add_(values, alpha=1 - keep)
                    storage.publish(piece, lines)
        for piece, index, master, forward in kept:
            piece.storage.write(piece, index, master)
            piece.storage.write_forward(piece, index, forward)


def _fading_in(block: FeedForward, state: BlockState) -> list[tuple[NeuronSlice, Tensor, Fragments, Fragments]]:
    """The lines of neurons that fade in, master and forward copy: they have their new weights already."""
    index = state.fading_in().nonzero().flatten()
    if not len(index):
        return []
    return [
        (piece, index, piece.storage.read(piece, index), piece.storage.read_forward(piece, index))
        for piece in block.slices
    ]


class ShrinkPerturbCallback(NeuronCallback):
    """Shrink and perturb: every `steps` optimizer steps, W ← keep · W + (1 − keep) · fresh, on all trained parameters.

    Source: Ash and Adams, *On Warm-Starting Neural Network Training*. Fresh weights are those of the model initialised
    anew, from a seed and the step, the same on every process. The optimizer's state stays. So do neurons that fade in,
    and frozen parameters; pruned neurons stay at zero. An event on the last step is left out; steps that the optimizer
    skips do not count. An event draws the whole model in float32 on the CPU of every process, also of a sharded one.

    Takes the settings of `RecyclingArguments` whose names begin with `shrink_perturb_`, without that prefix. On a stock
    `Trainer` it does all it does on a `RecyclingTrainer`.
    """

    method_class = ShrinkPerturb
