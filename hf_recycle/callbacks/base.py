"""What the callbacks share: settings without a prefix, and the model's table of neurons."""

from typing import Any, ClassVar

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback

from hf_recycle.neurons.optimizer import StepWatch
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.recorder import HistoryRecorder
from hf_recycle.settings import Settings


class NeuronCallback(TrainerCallback):
    """Base of the callbacks.

    Args:
        ff_pattern: layout of the feed-forward blocks of a model of unknown architecture, see `find_feed_forwards`.
        **settings: the method's settings, see `settings_class`.

    Raises:
        ValueError: for a value that is not allowed.
        TypeError: for an unknown setting.

    Attributes:
        settings: the validated settings.
        recorder: what happened. A `RecyclingTrainer` puts its own here, to save it with checkpoints.
        table: the neurons of the model being trained, from `on_train_begin` on.
    """

    settings_class: ClassVar[type[Settings]]

    def __init__(self, *, ff_pattern: str | None = None, **settings: Any):
        self.settings = self.settings_class(**settings)
        self.settings.validate()
        self.ff_pattern = ff_pattern
        self.recorder = HistoryRecorder()
        self.table: NeuronTable | None = None
        self._watch: StepWatch | None = None
        self._stepped = True

    def attach(self, model: nn.Module, state) -> None:
        """Finds the model's neurons; on a fresh start (step 0) with a clean slate."""
        self.table = NeuronTable.of(extract_model_from_parallel(model, keep_torch_compile=False), self.ff_pattern)
        if state.global_step == 0:
            self.table.start(state)

    def watch(self, optimizer) -> None:
        """Follows from now on, until training ends, which steps the optimizer takes."""
        self._let_go()
        self._watch, self._stepped = StepWatch(optimizer), True

    def note_step(self, state) -> None:
        """To be called on `on_optimizer_step`: settles whether the optimizer took the step, in `_stepped` and the
        table."""
        self._stepped = self._watch.taken
        self._watch.reset()
        self.table.note_step(state.global_step, self._stepped)

    def on_train_end(self, args, state, control, **kwargs):
        self._let_go()

    def _let_go(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        self._watch = None

    def scalars(self) -> dict[str, float]:
        """What to log now."""
        return {}
