"""Resuming exactly: the state of every neuron, and what the Trainer forgets."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_recycle.card.run_meter import RunMeter
from hf_recycle.checkpoints.continuation import ContinuationMixin
from hf_recycle.checkpoints.finished_runs import FinishedRunMixin
from hf_recycle.checkpoints.resumed_settings import began_with
from hf_recycle.checkpoints.writing import LAST_LOGGED, RUNNING_LOSS, CheckpointWritingMixin
from hf_recycle.hub.pull.pull import is_pulled
from hf_recycle.hub.pull.resume import forget_foreign_best
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.records import files
from hf_recycle.records.history_checks import check_agreement
from hf_recycle.records.recorder import HistoryRecorder


class CheckpointMixin(CheckpointWritingMixin, FinishedRunMixin, ContinuationMixin):
    """Checkpoints that are whole or absent, hold the recycling files, and resume exactly."""

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        progress = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._resumed_loss = None
        self.neuron_methods.began_with = {}
        self.neuron_methods.checkpoint = resume_from_checkpoint
        if resume_from_checkpoint is None:
            self.neuron_methods.use_recorder(HistoryRecorder())
            self.meter.start({"seconds": 0.0, "tokens": 0})
            if (table := self.neuron_table()) is not None:
                table.reset()
        else:
            if is_pulled(resume_from_checkpoint):
                forget_foreign_best(self.state, resume_from_checkpoint, self.args.output_dir)
            self.load_recycling_files(resume_from_checkpoint)
        return progress

    def load_recycling_files(self, folder: str | os.PathLike[str]) -> None:
        """Takes the neurons' state and history from a checkpoint; a checkpoint without recycling files (from a stock
        Trainer) leaves every neuron as never recycled.

        Raises:
            RecyclingFileError: if a file is missing, damaged or does not fit the model or the settings.
        """
        table = self.neuron_table()
        present = [name for name in files.RECYCLING_FILES if Path(folder, name).exists()]
        if table is None or not present:
            self.neuron_methods.use_recorder(HistoryRecorder())
            self.meter.start({})  # how long the stock Trainer has trained it is not known
            if table is not None:
                table.reset()
            return
        missing = set(files.RECYCLING_FILES) - set(present)
        if missing:
            raise files.RecyclingFileError(
                f"The checkpoint {folder} holds {present[0]} but not {sorted(missing)[0]}: restore it, or remove the "
                "recycling files to resume it as a checkpoint of a stock Trainer."
            )
        config = files.read_config(folder)
        _check_same_blocks(folder, config["blocks"], table)
        self.neuron_methods.began_with = began_with(
            folder, config, self.recycling_arguments(), self.state.max_steps, self.args.seed
        )
        tensors = files.read_state(folder, config["blocks"])
        try:
            table.load_state_dict(tensors)
        except ValueError as error:
            raise files.RecyclingFileError(
                f"{Path(folder, files.STATE_FILE)} does not fit the model: {error}"
            ) from None
        history = files.read_history(folder, config["blocks"])
        check_agreement(Path(folder), config, tensors, history)
        self.neuron_methods.use_recorder(HistoryRecorder.from_table(history))
        self.meter.start(config.get("run", {}))
        self.checkpoint_made_with = config.get("training")
        if RUNNING_LOSS in tensors and LAST_LOGGED in tensors:
            self._resumed_loss = float(tensors[RUNNING_LOSS][0]), int(tensors[LAST_LOGGED][0])

    def _run_epoch(self, *args, **kwargs) -> None:
        if self._resumed_loss is not None:
            # The part of a logging interval that lies before the checkpoint, so that the next logged loss is that
            # of the uninterrupted run.
            running_loss, self._globalstep_last_logged = self._resumed_loss
            self._tr_loss += running_loss
            # The train_loss that is reported at the end is a mean over the steps of this call alone.
            self._total_loss_scalar -= running_loss
            self._resumed_loss = None
        super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        folder = self.state.best_model_checkpoint
        assert folder is not None
        if not Path(folder).is_dir():
            return  # said by the stock Trainer; the model is that of the last step
        # The time and the tokens that the run has taken, and not those of its best checkpoint; and no part of a logging
        # interval is left over for a training that may follow.
        running, self.meter = self.meter, RunMeter()
        self.load_recycling_files(folder)
        self.meter, self._resumed_loss = running, None
        self.best_step = self.state.best_global_step


def _check_same_blocks(folder, saved: Iterable[dict[str, Any]], table: NeuronTable) -> None:
    before = {block["name"]: block["num_neurons"] for block in saved}
    now = {block.name: block.num_neurons for block in table.blocks}
    for name in [*before, *now]:
        if before.get(name) != now.get(name):
            raise files.RecyclingFileError(
                f"The checkpoint {folder} has {before.get(name, 'no')} neurons in block {name!r} and the model has "
                f"{now.get(name, 'none')}: resume it with the model it was made with."
            )
