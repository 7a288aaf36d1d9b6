"""One training of a match, in a process of its own: it waits for its turn before every step."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.shapes import Shape, bench_tokenizer, packed_dataset

STOCK, OURS = "Trainer", "RecyclingTrainer"


@dataclass(frozen=True)
class Contestant:
    """A training to measure.

    Attributes:
        trainer: STOCK, which stands in for `run_mlm.py`: its Trainer, collator and columns, the head on all positions;
            or OURS.
        arguments: of its training arguments, those that differ from the defaults.
        switched: a method that is on at some steps and off at the others, see `benchmarks.switch`; None: all
            steps are alike.
    """

    name: str
    trainer: str
    shape: Shape
    arguments: Mapping[str, Any] = field(default_factory=dict)
    switched: str | None = None


@dataclass(frozen=True)
class Turn:
    """One optimizer step.

    Attributes:
        seconds: from the end of the step before to the end of this one, loading its batch included.
        waiting: of these, seconds until the batch was there.
        loss: of the batch, in nats per masked token.
        peak: most bytes held since the first turn began, above those of the idle process (CPU: resident; CUDA:
            allocated). None where the system does not tell.
    """

    seconds: float
    waiting: float
    loss: float
    peak: int | None


def compete(contestant: Contestant, steps: int, link: Connection) -> None:
    """The process: sends a message when it is ready, takes a step and sends a `Turn` for each message it gets; sends
    what went wrong as a text."""
    # What libraries print belongs in no table.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        with tempfile.TemporaryDirectory() as folder:
            _train(contestant, steps, link, folder)
    except EOFError:  # the match is over
        pass
    except BaseException as error:
        link.send(f"{type(error).__name__}: {error}")
        raise


def _train(contestant: Contestant, steps: int, link: Connection, folder: str) -> None:
    # Late: the parent process needs none of this.
    import torch
    from transformers import TrainerCallback

    from benchmarks.memory import Memory
    from benchmarks.switch import SWITCHES, is_on

    memory = Memory()
    trainer = make_trainer(contestant, steps, folder)

    class Turns(TrainerCallback):
        start = 0.0

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self.start if self.start else 0.0
            if state.global_step == 1:
                memory.restart()
            link.send(Turn(seconds, trainer.waiting, float(trainer.loss), memory.peak()))
            if state.global_step >= steps:
                control.should_training_stop = True
            link.recv()
            if switch is not None:
                switch(is_on(state.global_step + 1))
            self.start = time.perf_counter()

    trainer.add_callback(Turns())  # the last one, so that a step is over when it acts
    switch = None if contestant.switched is None else SWITCHES[contestant.switched](trainer)
    link.recv()
    trainer.train()


def make_trainer(contestant: Contestant, steps: int, folder: str) -> Any:
    """The contestant's trainer, for `steps` steps. It notes what a callback can't see: `waiting`, the seconds that the
    last batch took to come, and `loss`, that of the last step."""
    from transformers import Trainer, TrainingArguments, set_seed

    from hf_recycle import RecyclingArguments, RecyclingTrainer

    base: Any = Trainer if contestant.trainer == STOCK else RecyclingTrainer
    settings: Any = TrainingArguments if contestant.trainer == STOCK else RecyclingArguments

    class Observed(base):
        waiting, loss = 0.0, None

        def get_batch_samples(self, *args, **kwargs):
            start = time.perf_counter()
            try:
                return super().get_batch_samples(*args, **kwargs)
            finally:
                self.waiting = time.perf_counter() - start

        def training_step(self, *args, **kwargs):
            self.loss = super().training_step(*args, **kwargs)
            return self.loss

    shape = contestant.shape
    arguments = settings(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=shape.batch,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **contestant.arguments,
    )
    set_seed(arguments.seed)
    tokenizer = bench_tokenizer(shape.vocabulary)
    return Observed(
        model=shape.model(),
        args=arguments,
        # More than is used: data workers are ended with their data, which is not to be timed.
        train_dataset=packed_dataset(shape, sequences=shape.batch * (steps + 16)),
        data_collator=shape.collator(tokenizer),
        processing_class=tokenizer,
    )
