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
from hf_recycle.neurons.blocks import FeedForward, NeuronSlice
from hf_recycle.neurons.initial import FreshModules
from hf_recycle.neurons.optimizer_state import check_optimizer, unwrap_optimizer
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
        if any(piece.storage.sharded for block in run.table.blocks for piece in block.slices):
            raise ValueError(
                f"shrink_perturb_steps={settings.steps} can't be used with weights that FSDP2, tensor parallelism or "
                "DeepSpeed has sharded, because fresh ones are drawn whole: use one process or DDP."
            )
        self._model = extract_model_from_parallel(run.model, keep_torch_compile=False)
        trained = {id(each) for group in unwrap_optimizer(run.optimizer).param_groups for each in group["params"]}
        self._parameters = {name: each for name, each in self._model.named_parameters() if id(each) in trained}
        self._fresh = FreshModules(self._model)
        recipes = self._fresh.recipes("")
        for name in self._parameters:
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
        with self._fresh.instance("", seed=seed) as model:
            fresh = dict(model.named_parameters(remove_duplicate=False))
            for name, parameter in self._parameters.items():
                if parameter.requires_grad:
                    parameter.mul_(keep).add_(fresh[name].to(parameter), alpha=1 - keep)
        for piece, index, values in kept:
            piece.storage.write(piece, index, values)


def _fading_in(block: FeedForward, state: BlockState) -> list[tuple[NeuronSlice, Tensor, Fragments]]:
    """The lines of neurons that fade in: they have their new weights already."""
    index = state.fading_in().nonzero().flatten()
    return [(piece, index, piece.storage.read(piece, index)) for piece in block.slices] if len(index) else []


class ShrinkPerturbCallback(NeuronCallback):
    """Shrink and perturb: every `steps` optimizer steps, W ← keep · W + (1 − keep) · fresh, on all trained parameters.

    Source: Ash and Adams, *On Warm-Starting Neural Network Training*. Fresh weights are those of the model initialised
    anew, from a seed and the step, the same on every process. The optimizer's state stays. So do neurons that fade in,
    and frozen parameters; pruned neurons stay at zero. An event on the last step is left out; steps that the optimizer
    skips do not count. It works on one process and DDP; sharded weights are refused.

    Takes the settings of `RecyclingArguments` whose names begin with `shrink_perturb_`, without that prefix. On a stock
    `Trainer` it does all it does on a `RecyclingTrainer`.
    """

    method_class = ShrinkPerturb
