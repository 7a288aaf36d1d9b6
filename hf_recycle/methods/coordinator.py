"""The coordinator of the methods, which is all that a Trainer calls, and the base of the public callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, ClassVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from hf_recycle.batches.extra_batches import ExtraBatches
from hf_recycle.engines.replica_checksum import true_everywhere
from hf_recycle.methods.base import Histograms, LossOf, Method, Run, StepInfo, TokenLossesOf
from hf_recycle.methods.saved_weights import check_weights_are_saved
from hf_recycle.methods.settings import Settings
from hf_recycle.neurons.optimizer_state import StepWatch
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.records.recorder import HistoryRecorder
from hf_recycle.utils.suggest import nearest

logger = logging.get_logger(__name__)


class NeuronMethods(TrainerCallback):
    """Runs methods around each optimizer step, in the order in which they act.

    It owns what they share: the table of the model's neurons, the recorder of what happens to them, and the watch on
    the optimizer.

    Args:
        ff_pattern: layout of the feed-forward blocks of a model of unknown architecture, see `find_feed_forwards`.
        ff_blocks: of a composite model, the part whose blocks are meant, see `find_feed_forwards`.
        loss_of, token_losses_of, attached, extra_batches: see `Run`.

    Attributes:
        methods: those that are on, in their order.
        recorder: what happened. It is saved by a `RecyclingTrainer` only.
        table: the neurons of the model being trained, from `on_train_begin` on.
        checkpoint: the folder that a `RecyclingTrainer` resumes from, or None.
        began_with: settings of a run that is resumed, resolved for the training as it was when it began, by prefix.
    """

    def __init__(
        self,
        *,
        ff_pattern: str | None = None,
        ff_blocks: str | None = None,
        loss_of: LossOf | None = None,
        token_losses_of: TokenLossesOf | None = None,
        attached: Callable[[], AbstractContextManager] = nullcontext,
        extra_batches: Callable[[int, str], ExtraBatches] | None = None,
    ):
        self.ff_pattern, self.ff_blocks = ff_pattern, ff_blocks
        self.methods: list[Method] = []
        self.recorder = HistoryRecorder()
        self.table: NeuronTable | None = None
        self.began_with: dict[str, Settings] = {}
        self.checkpoint: str | None = None
        self._loss_of, self._token_losses_of = loss_of, token_losses_of
        self._attached, self._extra_batches = attached, extra_batches
        self._fronts: list[NeuronCallback] = []
        self._watch: StepWatch | None = None
        self._finite: Tensor | None = None

    # ---- Before training ----

    def use(self, methods: Iterable[Method], fronts: Iterable[NeuronCallback] = ()) -> None:
        """Takes over `methods`, in their order, and those of `fronts`, which do nothing by themselves from now on."""
        self.release()
        self._fronts = list(fronts)
        self.methods = list(methods)
        for front in self._fronts:
            front.leader = self
        self.use_recorder(self.recorder)

    def use_recorder(self, recorder: HistoryRecorder) -> None:
        """Makes `recorder` the place where methods note what happens."""
        for each in (self, *self._fronts):
            each.recorder = recorder

    def release(self) -> None:
        """Ends what a training began, and lets the fronts work by themselves again, on a stock Trainer, say."""
        self._stop()
        for front in self._fronts:
            front.leader = None
        self._fronts = []

    def resolved(self, max_steps: int, seed: int) -> dict[str, Settings]:
        """The settings of each method in a training of so many steps, by prefix. A run that is resumed keeps the steps
        that it began with."""
        found = {}
        for method in self.methods:
            prefix, now = method.given.prefix, method.given.resolve(max_steps, seed)
            began = found[prefix] = self.began_with.get(prefix, now)
            for name in now.differing(began):
                logger.warning(
                    f"{prefix}{name} stays {getattr(began, name)}, as when this run began: in a training of "
                    f"{max_steps} steps it would be {getattr(now, name)}."
                )
        return found

    # ---- Events ----

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        self._stop()
        if not self.methods:
            return
        model_alone = extract_model_from_parallel(model, keep_torch_compile=False)
        self.table = NeuronTable.of(model_alone, self.ff_pattern, self.ff_blocks)
        for front in self._fronts:
            front.table = self.table
        if state.global_step == 0:
            self.table.start(state)
        self._watch = StepWatch(optimizer)
        run = Run(
            model=model,
            optimizer=optimizer,
            args=args,
            step=state.global_step,
            max_steps=state.max_steps,
            checkpoint=self.checkpoint,
            table=self.table,
            recorder=self.recorder,
            watch=self._watch,
            train_dataloader=train_dataloader,
            loss_of=self._loss_of,
            token_losses_of=self._token_losses_of,
            attached=self._attached,
            extra_batches=self._extra_batches,
        )
        if any(method.changes_weights for method in self.methods):
            check_weights_are_saved(model_alone, self.table.blocks)
        resolved = self.resolved(state.max_steps, args.seed)
        for method in self.methods:
            method.check_blocks(self.table.blocks)
            method.start(run, resolved[method.given.prefix])

    def note_loss(self, loss: Tensor) -> None:
        """Notes the loss of one of the batches of a step; nothing waits for the device."""
        if any(method.needs_loss for method in self.methods):
            finite = torch.isfinite(loss.detach())
            self._finite = finite if self._finite is None else self._finite & finite

    def before_clipping(self) -> None:
        """To be called before gradients are clipped, where the Trainer can."""
        for method in self._acting():
            method.before_clipping()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for method in self._acting():
            method.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._watch is None or self.table is None:
            return
        self.table.note_step(state.global_step, self._watch.stepped)
        for method in self._acting():
            method.after_optimizer_step(self._watch.stepped)

    def on_step_end(self, args, state, control, **kwargs):
        if self._watch is None or self.table is None:
            return
        info = StepInfo(
            step=state.global_step,
            optimizer_steps=self.table.optimizer_steps(state.global_step),
            stepped=self._watch.stepped,
            max_steps=state.max_steps,
            rate=self._watch.rate,
            loss_is_finite=self._loss_is_finite,
        )
        for method in self._acting():
            method.after_step(info)
        self._watch.reset()
        self._finite = None

    def on_train_end(self, args, state, control, **kwargs):
        self._stop()

    def _acting(self) -> list[Method]:
        return self.methods if self._watch is not None else []

    def _loss_is_finite(self) -> bool:
        return self._finite is None or true_everywhere(self._finite)

    def _stop(self) -> None:
        """Ends what `on_train_begin` began, if it did."""
        if self._watch is not None:
            self._watch.remove()
            for method in self.methods:
                method.stop()
        self._watch = self._finite = None

    def scalars(self) -> dict[str, float]:
        """What to log now."""
        found = {name: value for method in self.methods for name, value in method.scalars().items()}
        return found | self.recorder.idle_shares()

    def take_histograms(self) -> Histograms:
        """What to log as histograms now."""
        return {name: found for method in self.methods for name, found in method.take_histograms().items()}


class NeuronCallback(NeuronMethods):
    """Base of the public callbacks: one method for a stock `Trainer`.

    A `RecyclingTrainer` that is given one takes its method over and runs it with the others, in the order in which
    methods act; the callback's own events do nothing there.

    Args:
        ff_pattern: layout of the feed-forward blocks of a model of unknown architecture, see `find_feed_forwards`.
        ff_blocks: of a composite model, the part whose blocks are meant, see `find_feed_forwards`.
        **settings: the method's settings, see `RecyclingArguments`, without their prefix.

    Raises:
        ValueError: for a value that is not allowed.
        TypeError: for an unknown setting.

    Attributes:
        method: the method.
        leader: the coordinator of a `RecyclingTrainer` that has taken the method over, or None.
    """

    method_class: ClassVar[type[Method]]

    def __init__(self, *, ff_pattern: str | None = None, ff_blocks: str | None = None, **settings: Any):
        super().__init__(ff_pattern=ff_pattern, ff_blocks=ff_blocks)
        settings_class = self.method_class.settings_class
        known = [setting.name for setting in fields(settings_class)]
        for name in settings:
            if name not in known:
                meant = nearest(name.removeprefix(settings_class.prefix), known)
                raise TypeError(f"{type(self).__name__} has no setting {name!r}; {meant}")
        checked = settings_class(**settings)
        checked.validate()
        self.method = self.method_class(checked)
        self.leader: NeuronMethods | None = None

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self.method.settings

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        if self.leader is not None:
            return
        self.methods = [self.method] if self.method.given.enabled else []
        super().on_train_begin(args, state, control, model, optimizer, train_dataloader, **kwargs)
