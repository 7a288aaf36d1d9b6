"""What a method is: its settings, and what it does around each optimizer step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn
from transformers import TrainingArguments

from hf_recycle.batches.extra_batches import ExtraBatches
from hf_recycle.methods.settings import Settings
from hf_recycle.neurons.blocks import FeedForward, NeuronSlice
from hf_recycle.neurons.optimizer_state import StepWatch
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.records.recorder import HistoryRecorder

Histograms = dict[str, tuple[int, Tensor]]
"""By name: the step that the values `(n,)` are of, and the values."""

LossOf = Callable[[nn.Module, Mapping[str, Any]], Tensor]
TokenLossesOf = Callable[[nn.Module, Mapping[str, Any]], Tensor | None]


@dataclass(frozen=True)
class Run:
    """One training, as its methods see it.

    Attributes:
        model: as the Trainer calls it: unwrapped under DDP and compile, wrapped under FSDP.
        optimizer: wrapped or not.
        args: the Trainer's arguments.
        step, max_steps: where the training starts and ends, in steps of the Trainer.
        checkpoint: the folder it goes on from; None: it begins, or a stock Trainer goes on and does not tell.
        table: the model's neurons.
        recorder: where methods note what they do.
        watch: which steps the optimizer takes.
        train_dataloader: the Trainer's.
        loss_of: the loss of a batch, to be averaged over processes; None: the one that the model returns.
        token_losses_of: the loss of each token of a batch, `(batch, sequence)`, zero where nothing is predicted; None,
            also as its answer: those that the model returns.
        attached: within this context, the backward pass of `loss_of` may compute parts of the forward pass again.
        extra_batches: extra batches of the training data, by their seed and the argument that asks for them; None: over
            the data of the loader.
    """

    model: nn.Module
    optimizer: Any
    args: TrainingArguments
    step: int
    max_steps: int
    checkpoint: str | None
    table: NeuronTable
    recorder: HistoryRecorder
    watch: StepWatch
    train_dataloader: Any
    loss_of: LossOf | None
    token_losses_of: TokenLossesOf | None
    attached: Callable[[], AbstractContextManager]
    extra_batches: Callable[[int, str], ExtraBatches] | None

    def is_trained(self, block: FeedForward) -> bool:
        """Whether the optimizer changes a block's weights now: they may be frozen, also for a while only."""
        return not block.is_frozen and all(map(self.watch.is_optimized, block.weight_slices))

    def frozen(self) -> set[int]:
        """Indices of the blocks that are not trained now."""
        return {index for index, block in enumerate(self.table.blocks) if not self.is_trained(block)}


@dataclass(frozen=True)
class StepInfo:
    """The step of the Trainer that has just ended.

    Attributes:
        step: its number, from 1.
        optimizer_steps: steps that the optimizer has taken: what schedules and seeds count in.
        stepped: whether the optimizer took this one; a gradient scaler that found an overflow skips it.
        max_steps: the last step of the training.
        rate: the learning rate that the step had for a slice's parameter; 0 for one that is not optimized.
        loss_is_finite: whether the loss of the whole batch was, over accumulated batches and processes. Waits for the
            device, and all processes have to ask.
    """

    step: int
    optimizer_steps: int
    stepped: bool
    max_steps: int
    rate: Callable[[NeuronSlice], float | Tensor]
    loss_is_finite: Callable[[], bool]


def refuse_half_precision(pieces: Iterable[NeuronSlice], argument: str) -> None:
    """Refuses slices in which small steps are lost, unless the optimizer steps float32 masters beside them.

    Args:
        argument: the one that switched the method on, with its value.

    Raises:
        ValueError: as said.
    """
    half = [piece.dtype for piece in pieces if piece.dtype.itemsize < 4 and not piece.storage.separate_masters]
    if half:
        raise ValueError(
            f"{argument} can't be used with {half[0]} weights, in which its small steps are lost: load the model in "
            "float32 and train with bf16=True or fp16=True (autocast) instead."
        )


SettingsT = TypeVar("SettingsT", bound=Settings)


class Method(Generic[SettingsT]):
    """Base of the methods. `NeuronMethods` calls them, in the order in which they act.

    Attributes:
        settings_class: the settings it takes.
        changes_weights: it writes weights, and does not only look at them.
        needs_loss: it asks `StepInfo.loss_is_finite`.
        given: the settings as the user gave them.
        settings: the settings in force; from `start` on with steps instead of fractions, see `Settings.resolve`.
    """

    settings_class: ClassVar[type[Settings]]
    changes_weights: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False

    def __init__(self, settings: SettingsT):
        self.given = self.settings = settings
        self._run: Run | None = None

    @property
    def has_started(self) -> bool:
        """Whether a training has begun."""
        return self._run is not None

    @property
    def run(self) -> Run:
        """The training, from `start` on."""
        if self._run is None:
            raise RuntimeError(f"{type(self).__name__} is used before training begins.")
        return self._run

    @property
    def table(self) -> NeuronTable:
        """The neurons of the model being trained, from `start` on."""
        return self.run.table

    def check_blocks(self, blocks: list[FeedForward]) -> None:
        """Raises a ValueError for settings that do not fit the model; called before anything else."""

    def start(self, run: Run, settings: SettingsT) -> None:
        """Training begins, anew or from a checkpoint. Raises a ValueError for what can't work.

        Args:
            settings: resolved.
        """
        self._run, self.settings = run, settings

    def before_clipping(self) -> None:
        """Gradients are complete and not clipped yet; on a stock Trainer, which has no such event, clipped."""

    def before_step(self) -> None:
        """The optimizer is about to step."""

    def after_optimizer_step(self, stepped: bool) -> None:
        """The optimizer has stepped, or skipped the step; gradients are still there."""

    def after_step(self, info: StepInfo) -> None:
        """The step of the Trainer has ended, but for logging, evaluating and saving."""

    def stop(self) -> None:
        """Training ends: by itself or by an exception."""

    def acting_steps(self, max_steps: int) -> Sequence[int] | None:
        """The steps at which the method acts in a training of so many, by the settings in force; None: at every one."""
        return None

    def scalars(self) -> dict[str, float]:
        """What to log now."""
        return {}

    def take_histograms(self) -> Histograms:
        """What to log as histograms now; what was taken is not given again."""
        return {}
