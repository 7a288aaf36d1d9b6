"""What the callbacks share: settings without a prefix, and the model's table of neurons."""

from typing import Any, ClassVar

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback

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

    def attach(self, model: nn.Module, state) -> None:
        """Finds the model's neurons; on a fresh start (step 0) with a clean slate."""
        self.table = NeuronTable.of(extract_model_from_parallel(model, keep_torch_compile=False), self.ff_pattern)
        if state.global_step == 0:
            self.table.start(state)

    def scalars(self) -> dict[str, float]:
        """What to log now."""
        return {}
