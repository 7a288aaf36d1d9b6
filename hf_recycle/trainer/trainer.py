"""`RecyclingTrainer`: a Hugging Face Trainer with the methods of this package."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hf_recycle.arguments import MUON, RecyclingArguments, check_training_numbers
from hf_recycle.card.run_meter import RunMeter
from hf_recycle.checkpoints.resuming import CheckpointMixin
from hf_recycle.checkpoints.run_start import RunStartMixin
from hf_recycle.checkpoints.termination import save_after_step
from hf_recycle.engines.checks import (
    can_recompute,
    can_use_onednn,
    check_can_overtrain,
    check_engine,
    drop_tied_aliases,
    leave_embeddings_ungrouped,
)
from hf_recycle.engines.launch import check_same, shared_arguments
from hf_recycle.hub.pull.resume import local_checkpoint
from hf_recycle.hub.push.trainer import HubMixin
from hf_recycle.methods.all import CALLBACKS
from hf_recycle.methods.base import Method
from hf_recycle.methods.coordinator import NeuronCallback, NeuronMethods
from hf_recycle.methods.overtraining.callback import Overtraining
from hf_recycle.neurons.slices import full_shape
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.speed.onednn import is_available, onednn_forwards
from hf_recycle.speed.recomputation import recomputing_forwards
from hf_recycle.trainer.language_modeling import LanguageModelingMixin
from hf_recycle.trainer.muon import MuonWithAdamW, muon_arguments
from hf_recycle.trainer.trackers import GROUP, log_histograms
from hf_recycle.utils.forwards import Forward, replaced_forwards

logger = logging.get_logger(__name__)

_LOGGED_QUANTILES = {"magnitude_p10": 0.1, "magnitude_p50": 0.5, "magnitude_p90": 0.9}


class RecyclingTrainer(RunStartMixin, HubMixin, CheckpointMixin, LanguageModelingMixin):
    """A `transformers.Trainer` that recycles feed-forward neurons while it trains.

    Same signature and methods as `Trainer`; `args` is a `RecyclingArguments`, and the callbacks that it asks for are
    added by themselves. With every method, `masked_head` and, for causal models, `chunked_head` off it trains and
    evaluates exactly as `Trainer` does.

    Beyond the methods it gives: checkpoints that are whole or absent and resume to the bit, the history of every neuron
    in them, for masked language models a loss normalised over the masked tokens of the whole batch, the head computed
    on masked positions only, and evaluation on fixed masks, and for causal ones the head computed in chunks.

    Raises:
        TypeError: if `args` is not a `RecyclingArguments`.
        ValueError: for what can't work, before training starts: a model without feed-forward blocks, `nn.DataParallel`,
            FSDP version 1, fewer processes or another engine than the launcher was asked for.
    """

    @wraps(Trainer.__init__, assigned=())  # type: ignore[misc]  # for whoever asks for its signature
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
        self.neuron_methods = NeuronMethods(
            loss_of=self.loss_of,
            token_losses_of=self.token_losses_of,
            attached=self.head_attached,
            extra_batches=self.extra_batches,
        )
        self.tied_aliases = {}
        self.meter = RunMeter()
        # What the caller knows of the run and the trainer can't, for its card: keys of `run_schema.RUN_SCHEMA`.
        self.run_context: dict[str, Any] = {}
        words = {"license": args.hub_license, "language": args.hub_language}
        self.card_words = {name: value for name, value in words.items() if value}
        super().__init__(model, args, *positional, **kwargs)
        check_engine(self)
        save_after_step(self)
        self._settle_arguments()
        self.neuron_methods.release()  # callbacks of the user's may train elsewhere before they do here
        self.set_up_language_modeling()
        self._savings: list[Callable[[], AbstractContextManager]] = []

    def _settle_arguments(self) -> None:
        """Has the coordinator run what the arguments, as they are now, and the user's own callbacks ask for.

        Raises:
            ValueError: for a value that is not allowed, a method that is asked for twice, or one that the model, the
                engine or this PyTorch can't have.
        """
        if self.args.onednn_linear and not is_available():
            raise ValueError(
                "onednn_linear=True, but this PyTorch is without oneDNN or it is switched off: leave it out."
            )
        check_training_numbers(self.args)
        methods, fronts = self._asked_for()
        where = [_said_once(name, [self.args, *fronts]) for name in ("ff_pattern", "ff_blocks")]
        NeuronTable.forget_unless(self._unwrapped_model(), *where)
        self.neuron_methods.ff_pattern, self.neuron_methods.ff_blocks = where
        self.neuron_methods.use(methods, fronts)
        table = self.neuron_table()  # a model without blocks is refused here
        if table is not None:
            for method in methods:
                method.check_blocks(table.blocks)
        if any(isinstance(method, Overtraining) for method in methods):
            check_can_overtrain(self)
        # Among the callbacks only while there is something to run.
        if bool(methods) != (self.neuron_methods in self.callback_handler.callbacks):
            (self.add_callback if methods else self.remove_callback)(self.neuron_methods)

    def _asked_for(self) -> tuple[list[Method], list[NeuronCallback]]:
        """The methods that the arguments, as they are now, and the user's callbacks ask for, and these callbacks."""
        methods: list[Method] = []
        fronts: list[NeuronCallback] = []
        for cls in CALLBACKS:
            settings = self.args.method_settings(cls.method_class.settings_class)
            own = [callback for callback in self.callback_handler.callbacks if isinstance(callback, cls)]
            if own and (settings.enabled or len(own) > 1):
                raise ValueError(
                    f"{cls.__name__} is passed in callbacks and {settings.prefix}* arguments ask for it too: use one."
                    if settings.enabled
                    else f"{cls.__name__} is passed {len(own)} times in callbacks: pass it once."
                )
            asked = [cls.method_class(settings), *(front.method for front in own)]
            methods += [method for method in asked if method.given.enabled]
            fronts += own
        return methods, fronts

    @property
    def steps_aside(self) -> bool:
        """Whether every method and the head of ours are off. Then training, evaluation, collator and batches are those
        of the stock Trainer."""
        methods = self.neuron_methods.methods if self.is_in_train else self._asked_for()[0]
        return not (methods or self._own_head_is_on)

    # ---- Training ----

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        check_same(self._start(max_steps, resume_from_checkpoint))
        # The last moment at which the model is not wrapped or sharded.
        if not self.steps_aside and (table := self.neuron_table()) is not None:
            table.fresh.learn()
        self.settle_loss()
        self._enable_optimizations()
        if self.is_fsdp_enabled:
            leave_embeddings_ungrouped(self.accelerator.state.fsdp_plugin, self.model)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _enable_optimizations(self) -> None:
        """Settles what saves memory and time in this training."""
        table = self.neuron_table()
        forwards: dict[nn.Module, Forward] = {}
        if self.args.onednn_linear and can_use_onednn(self):
            forwards |= onednn_forwards(self.model)
        if self.args.recompute_activations and not self.steps_aside and table is not None and can_recompute(self):
            forwards |= recomputing_forwards(table.blocks, forwards)
        self._savings = [partial(replaced_forwards, forwards), self.head_attached]

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Within the context, memory and time are saved: only while a batch is computed, so that callbacks meet, copy
        and save the model as it is without."""
        with ExitStack() as stack:
            for saving in self._savings:
                stack.enter_context(saving())
            yield

    def _start(self, max_steps: int, resume_from_checkpoint: str | None) -> dict[str, Any]:
        """All that the processes of a training must have in common when it starts, by name."""
        config = getattr(self.model, "config", None)
        start = shared_arguments(self.args) | self.recycling_arguments()
        checkpoint = Path(resume_from_checkpoint).name if resume_from_checkpoint else None
        start |= {"max_steps": max_steps, "the checkpoint": checkpoint}
        start |= {f"the model's {name}": value for name, value in (config.to_dict() if config else {}).items()}
        start |= {f"the shape of {name}": full_shape(value) for name, value in self.model.named_parameters()}
        return start | {"the number of training examples": getattr(self.train_dataset, "__len__", lambda: None)()}

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        if args.optim != MUON:
            return Trainer.get_optimizer_cls_and_kwargs(args, model)
        return MuonWithAdamW, muon_arguments(args, model)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if self.is_fsdp_enabled:
            # Only now, so that the optimizer numbers the parameters as it does without FSDP.
            self.tied_aliases |= drop_tied_aliases(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As `Trainer.train`; `resume_from_checkpoint` may also be `hf://user/repo[@revision][/folder]`, with
        `last-checkpoint` or `checkpoint-N` as folder, by default the newest one.

        Raises:
            UserError: if the checkpoint can't be downloaded from the Hub, or is not to be trusted.
        """
        try:
            checkpoint = local_checkpoint(resume_from_checkpoint, self.args)
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.neuron_methods.release()
            self._savings = []
            self.meter.stop()

    def _hp_search_setup(self, trial) -> None:
        super()._hp_search_setup(trial)
        self._settle_arguments()  # of a trial or changed since; callbacks may have been added too

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.meter.count(inputs)
        with self._saving():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.neuron_methods.note_loss(loss)
        return loss

    def loss_of(self, model, batch) -> torch.Tensor:
        with self._saving():
            return super().loss_of(model, batch)

    def _clip_grad_norm(self, model):
        self.neuron_methods.before_clipping()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        # The one that is called when clipping is off.
        self.neuron_methods.before_clipping()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.neuron_methods.methods and (table := self.neuron_table()) is not None:
            logs |= {f"{GROUP}/{name}": value for name, value in self._neuron_scalars(table).items()}
        super().log(logs, start_time)
        histograms = self.neuron_methods.take_histograms()
        if self.is_world_process_zero():
            log_histograms(self.callback_handler.callbacks, histograms)
        self.recorder.log(self.model_step, logs)

    def _neuron_scalars(self, table: NeuronTable) -> dict[str, float]:
        scalars = self.neuron_methods.scalars()
        magnitudes = torch.cat(list(table.magnitudes().values()))
        for name, level in _LOGGED_QUANTILES.items():
            # kthvalue, because torch.quantile refuses more than 16 million values.
            scalars[name] = float(magnitudes.kthvalue(max(1, round(level * len(magnitudes)))).values)
        return scalars


def _said_once(name: str, where: list[RecyclingArguments | NeuronCallback]) -> str | None:
    """What the arguments and the user's callbacks say, one of them or all alike."""
    said = {getattr(each, name) for each in where} - {None, ""}
    if len(said) > 1:
        raise ValueError(f"{name} is given as {' and as '.join(map(repr, sorted(said)))}: all methods need the same.")
    return next(iter(said), None)
