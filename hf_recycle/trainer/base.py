"""`NeuronTrainer`: what all parts of `RecyclingTrainer` know of its model's neurons."""

import os
from typing import Any

from torch import nn
from transformers import Trainer

from hf_recycle.arguments import RecyclingArguments
from hf_recycle.card.run_meter import RunMeter
from hf_recycle.methods.coordinator import NeuronMethods
from hf_recycle.methods.recycling.callback import Recycling
from hf_recycle.methods.settings import flat
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.records.recorder import HistoryRecorder


class NeuronTrainer(Trainer):
    """Base of the mixins. `RecyclingTrainer` sets the attributes before anything else.

    Attributes:
        neuron_methods: the coordinator of the methods.
        meter: seconds and tokens of the run.
    """

    args: RecyclingArguments
    model: nn.Module
    neuron_methods: NeuronMethods
    meter: RunMeter
    hub_model_id: str | None  # type: ignore[assignment]  # the Trainer sets None first
    _known_model: tuple[nn.Module, nn.Module] | None = None  # the model as wrapped, and without that

    # ---- Neurons ----

    @property
    def recorder(self) -> HistoryRecorder:
        """What happened to the neurons so far."""
        return self.neuron_methods.recorder

    @property
    def recycling(self) -> Recycling | None:
        """The method that recycles, or None if recycling is off."""
        return next((method for method in self.neuron_methods.methods if isinstance(method, Recycling)), None)

    def neuron_table(self) -> NeuronTable | None:
        """The state of the current model's neurons; None if it has no feed-forward blocks and no method needs any.

        Raises:
            ValueError: if a method is on and the model has no feed-forward block.
        """
        methods = self.neuron_methods
        try:
            return NeuronTable.of(self._unwrapped_model(), methods.ff_pattern, methods.ff_blocks)
        except ValueError:
            if methods.methods or methods.ff_pattern or methods.ff_blocks:
                raise
            return None

    def recycling_arguments(self) -> dict[str, Any]:
        """The settings as they were given, flat."""
        where = {"ff_pattern": self.neuron_methods.ff_pattern, "ff_blocks": self.neuron_methods.ff_blocks}
        arguments = self.args.method_arguments() | where
        for method in self.neuron_methods.methods:
            arguments |= flat(method.given)
        return arguments

    def resolved_arguments(self) -> dict[str, Any]:
        """The settings in force of the methods that are on, flat, with steps instead of shares of the training; empty
        before training."""
        methods = [method for method in self.neuron_methods.methods if method.has_started]
        return {name: value for method in methods for name, value in flat(method.settings).items()}

    def immune_neurons(self) -> int:
        """Neurons that the next selection phase may not take because of their immunity."""
        table = self.neuron_table()
        return 0 if self.recycling is None or table is None else self.recycling.immune(table)

    def _unwrapped_model(self) -> nn.Module:
        # Once for each model: accelerate looks for DeepSpeed's files every time, which takes longer than a small step.
        if self._known_model is None or self._known_model[0] is not self.model:
            self._known_model = self.model, self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return self._known_model[1]

    # ---- What other parts do ----

    @property
    def steps_aside(self) -> bool:
        """Whether everything of ours is off. Then training, evaluation, collator and batches are those of the stock
        Trainer."""
        raise NotImplementedError

    def write_recycling_files(self, folder: str | os.PathLike[str]) -> None:
        """Writes the four recycling files into `folder`."""
        raise NotImplementedError

    def write_card(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model card of what lies in `folder`."""
        raise NotImplementedError
