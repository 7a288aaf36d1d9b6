"""`RecyclingTrainer`: a Hugging Face Trainer with the methods of this package."""

from contextlib import ExitStack
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging

from hf_recycle.arguments import RecyclingArguments
from hf_recycle.callbacks import (
    MagnitudeCallback,
    MidpointLossCallback,
    OvertrainingCallback,
    PruningCallback,
    RecyclingCallback,
)
from hf_recycle.callbacks.base import NeuronCallback
from hf_recycle.callbacks.recycling import check_layers
from hf_recycle.checkpoints import CheckpointMixin
from hf_recycle.engines import (
    can_recompute,
    can_use_onednn,
    check_can_overtrain,
    check_engine,
    drop_tied_aliases,
    leave_embeddings_ungrouped,
)
from hf_recycle.host_memory import sparse_tied_gradient
from hf_recycle.hub.resume import local_checkpoint
from hf_recycle.hub.run_meter import RunMeter
from hf_recycle.hub.trainer import HubMixin
from hf_recycle.launch_checks import check_same, shared_arguments
from hf_recycle.mlm.training import MaskedLanguageModelingMixin
from hf_recycle.neurons.blocks import full_shape
from hf_recycle.neurons.recomputation import Recomputation
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.onednn import is_available, is_faster, onednn_linear
from hf_recycle.recorder import HistoryRecorder

logger = logging.get_logger(__name__)

# In the order in which they act after an optimizer step.
CALLBACKS: tuple[type[NeuronCallback], ...] = (
    MidpointLossCallback,
    PruningCallback,
    RecyclingCallback,
    OvertrainingCallback,
    MagnitudeCallback,
)

_LOGGED_QUANTILES = {"magnitude_p10": 0.1, "magnitude_p50": 0.5, "magnitude_p90": 0.9}


class RecyclingTrainer(HubMixin, CheckpointMixin, MaskedLanguageModelingMixin):
    """A `transformers.Trainer` that recycles feed-forward neurons while it trains.

    Same signature and methods as `Trainer`; `args` is a `RecyclingArguments`, and the callbacks that it asks for are
    added by themselves. With every method and `masked_head` off it trains and evaluates exactly as `Trainer` does.

    Beyond the methods it gives: checkpoints that are whole or absent and resume to the bit, the history of every neuron
    in them, and for masked language models a loss normalised over the masked tokens of the whole batch, the head
    computed on masked positions only, and evaluation on fixed masks.

    Raises:
        TypeError: if `args` is not a `RecyclingArguments`.
        ValueError: for what can't work, before training starts: a model without feed-forward blocks, `nn.DataParallel`,
            FSDP version 1, fewer processes or another engine than the launcher was asked for.
    """

    @wraps(Trainer.__init__, assigned=())  # for whoever asks for its signature
    def __init__(self, model=None, args: RecyclingArguments | None = None, *positional, **kwargs):
        if args is None:
            args = RecyclingArguments(output_dir="tmp_trainer")
        if not isinstance(args, RecyclingArguments):
            raise TypeError(
                f"RecyclingTrainer needs RecyclingArguments, not {type(args).__name__}: it takes every field of "
                "TrainingArguments, so the name is all that changes."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which transformers would use through nn.DataParallel; "
                f"run `accelerate launch --num_processes {args.n_gpu} <your script>`, or set CUDA_VISIBLE_DEVICES=0."
            )
        self.recorder, self.tied_aliases = HistoryRecorder(), {}
        self.meter = RunMeter()
        # What the caller knows of the run and the trainer can't, for its card: keys of `run_schema.RUN_SCHEMA`.
        self.run_context: dict[str, Any] = {}
        super().__init__(model, args, *positional, **kwargs)
        self._add_callbacks()
        self._wire_callbacks()
        check_engine(self)
        table = self.neuron_table()  # a model without blocks is refused here
        if self.recycling is not None:
            check_layers(self.recycling.settings, len(table.blocks))
        seed = args.seed if args.data_seed is None else args.data_seed
        deterministic, self._onednn = args.deterministic_masking, args.onednn_linear
        if deterministic is None:
            deterministic = not self.steps_aside
        if self._onednn is None:
            self._onednn = not self.steps_aside and is_faster()
        if self._onednn and not is_available():
            raise ValueError(
                "onednn_linear=True, but this PyTorch is without oneDNN or it is switched off: leave it out."
            )
        self.set_up_masked_language_modeling(deterministic_masking=deterministic, seed=seed)
        self._last_loss: torch.Tensor | None = None
        self._savings = ExitStack()

    def _add_callbacks(self) -> None:
        """Adds a callback for each method that the arguments ask for."""
        for cls in CALLBACKS:
            settings = self.args.method_settings(cls.settings_class)
            own = [callback for callback in self.callback_handler.callbacks if isinstance(callback, cls)]
            if own and (settings.enabled or len(own) > 1):
                raise ValueError(
                    f"{cls.__name__} is passed in callbacks and {settings.prefix}* arguments ask for it too: use one."
                    if settings.enabled
                    else f"{cls.__name__} is passed {len(own)} times in callbacks: pass it once."
                )
            if settings.enabled:
                values = {item.name: getattr(settings, item.name) for item in fields(settings)}
                self.add_callback(cls(ff_pattern=self.args.ff_pattern, **values))

    def _wire_callbacks(self) -> None:
        """Wires the callbacks of methods that the trainer has now, its own and the user's."""
        callbacks = self.callback_handler.callbacks
        places = [place for place, callback in enumerate(callbacks) if isinstance(callback, CALLBACKS)]
        # In the places that they have between them, in the order in which methods act.
        wired = [callbacks[place] for cls in CALLBACKS for place in places if isinstance(callbacks[place], cls)]
        for place, callback in zip(places, wired, strict=True):
            callbacks[place] = callback
        for callback in wired:
            if getattr(callback.settings, "seed", 0) is None:
                # Now, because a checkpoint that is resumed is compared before training begins.
                callback.settings.seed = self.args.seed
            if isinstance(callback, RecyclingCallback):
                callback.loss_is_finite = self._loss_is_finite
            if isinstance(callback, OvertrainingCallback) and callback.settings.enabled:
                check_can_overtrain(self)
                callback.loss_of, callback.second_pass = self.loss_of, self.second_pass
        self.neuron_callbacks = wired
        self._share_recorder(wired)

    @property
    def steps_aside(self) -> bool:
        """Whether every method and `masked_head` are off. Then training, evaluation, collator and batches are those of
        the stock Trainer."""
        return not (self.args.masked_head or self.neuron_callbacks)

    # ---- Neurons ----

    @property
    def recycling(self) -> RecyclingCallback | None:
        """The callback that recycles, or None if recycling is off."""
        return next((cb for cb in self.neuron_callbacks if isinstance(cb, RecyclingCallback)), None)

    def neuron_table(self) -> NeuronTable | None:
        """The state of the current model's neurons; None if it has no feed-forward blocks and no method needs any.

        Raises:
            ValueError: if a method is on and the model has no feed-forward block.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        patterns = [self.args.ff_pattern, *(callback.ff_pattern for callback in self.neuron_callbacks)]
        try:
            return NeuronTable.of(model, next(filter(None, patterns), None))
        except ValueError:
            if self.neuron_callbacks or self.args.ff_pattern:
                raise
            return None

    def use_recorder(self, recorder: HistoryRecorder) -> None:
        """Makes `recorder` the place where this trainer and its callbacks note what happens."""
        self.recorder = recorder
        self._share_recorder(self.neuron_callbacks)

    def _share_recorder(self, callbacks: list[NeuronCallback]) -> None:
        for callback in callbacks:
            callback.recorder = self.recorder

    def recycling_arguments(self) -> dict[str, Any]:
        """The settings in force, flat."""
        arguments = self.args.method_arguments()
        for callback in self.neuron_callbacks:
            prefix = callback.settings.prefix
            arguments |= {
                prefix + item.name: getattr(callback.settings, item.name) for item in fields(callback.settings)
            }
        # As in the JSON of a checkpoint, which knows no tuples.
        return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}

    def immune_neurons(self) -> int:
        """Neurons that the next selection phase may not take because of their immunity."""
        begun = self.recycling is not None and self.recycling.table is not None
        return self.recycling.immune() if begun else 0

    # ---- Training ----

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        check_same(self._start(max_steps, resume_from_checkpoint))
        # The last moment at which the model is not wrapped or sharded.
        if self.recycling is not None:
            for view in self.neuron_table().views:
                view.learn_distribution()
        self._economize()
        if self.is_fsdp_enabled:
            leave_embeddings_ungrouped(self.accelerator.state.fsdp_plugin, self.model)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _economize(self) -> None:
        """Saves memory and time until the end of the training."""
        self._savings.close()  # of an attempt with a larger batch
        table = self.neuron_table()
        if self.args.recompute_activations and not self.steps_aside and table is not None and can_recompute(self):
            self._savings.callback(Recomputation(table.blocks).remove)
        if self._onednn and can_use_onednn(self):
            self._savings.enter_context(onednn_linear(self.model))
        if self.can_sum_sparsely():
            self._savings.enter_context(sparse_tied_gradient(self.model))

    def _start(self, max_steps: int, resume_from_checkpoint: str | None) -> dict[str, Any]:
        """All that the processes of a training must have in common when it starts, by name."""
        config = getattr(self.model, "config", None)
        start = shared_arguments(self.args) | self.recycling_arguments()
        checkpoint = Path(resume_from_checkpoint).name if resume_from_checkpoint else None
        start |= {"max_steps": max_steps, "the checkpoint": checkpoint}
        start |= {f"the model's {name}": value for name, value in (config.to_dict() if config else {}).items()}
        start |= {f"the shape of {name}": full_shape(value) for name, value in self.model.named_parameters()}
        return start | {"the number of training examples": getattr(self.train_dataset, "__len__", lambda: None)()}

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if self.is_fsdp_enabled:
            # Only now, so that the optimizer numbers the parameters as it does without FSDP.
            self.tied_aliases |= drop_tied_aliases(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As `Trainer.train`; `resume_from_checkpoint` may also be `hub://user/repo[/folder][@revision]`, with
        `last-checkpoint` or `checkpoint-N` as folder, by default the newest one.

        Raises:
            UserError: if the checkpoint can't be had from the Hub, or is not to be trusted.
        """
        self._wire_callbacks()  # with those that were added since
        try:
            checkpoint = local_checkpoint(resume_from_checkpoint, self.args)
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._savings.close()
            self.meter.stop()

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.meter.count(inputs)
        self._last_loss = super().training_step(model, inputs, num_items_in_batch)
        return self._last_loss

    def _loss_is_finite(self) -> bool:
        if self._last_loss is None:  # training steps are the user's
            return True
        # Asked at selection phases only: it waits for the device.
        finite = torch.isfinite(self._last_loss).reshape(1)
        return bool(self.accelerator.gather(finite).all())

    def _clip_grad_norm(self, model):
        self._before_clipping()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        # The one that is called when clipping is off.
        self._before_clipping()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _before_clipping(self) -> None:
        if self.recycling is not None:
            self.recycling.scale_gradients()

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.neuron_callbacks:
            logs |= self._neuron_scalars()
        super().log(logs, start_time)
        self.recorder.log(self.state.global_step, logs)

    def _neuron_scalars(self) -> dict[str, float]:
        scalars: dict[str, float] = {}
        for callback in self.neuron_callbacks:
            scalars |= callback.scalars()
        magnitudes = torch.cat(list(self.neuron_table().magnitudes().values()))
        for name, level in _LOGGED_QUANTILES.items():
            # kthvalue, because torch.quantile refuses more than 16 million values.
            scalars[name] = float(magnitudes.kthvalue(max(1, round(level * len(magnitudes)))).values)
        return scalars
