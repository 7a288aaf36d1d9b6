"""Checkpoints that are whole or absent, and hold the state of every neuron."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.training_args import ParallelMode
from transformers.utils import logging

from hf_recycle import files
from hf_recycle.engine_checkpoints import EngineCheckpointMixin
from hf_recycle.history_checks import check_agreement
from hf_recycle.hub.card_words import told_facts
from hf_recycle.hub.pull import is_pulled
from hf_recycle.hub.resume import forget_foreign_best
from hf_recycle.hub.run_facts import run_facts
from hf_recycle.hub.run_meter import RunMeter
from hf_recycle.neurons.table import NeuronTable
from hf_recycle.recorder import HistoryRecorder
from hf_recycle.resumed_settings import began_with
from hf_recycle.run_schema import run_problem
from hf_recycle.statistics import summarize

logger = logging.get_logger(__name__)

_STAGING = "tmp-"  # a name that the Trainer does not take for a checkpoint
_RUNNING_LOSS, _LAST_LOGGED = "trainer/running_loss", "trainer/last_logged_step"


class CheckpointMixin(EngineCheckpointMixin):
    """Writes each checkpoint under another name and renames it last, with the recycling files inside, and resumes
    from it exactly.

    Expects `self.recorder`, `self.meter`, `self.neuron_table()` and `self.recycling_arguments()`.
    """

    recorder: HistoryRecorder
    meter: RunMeter
    card_words: dict[str, Any]

    # ---- Writing ----

    def _save_checkpoint(self, model, trial) -> None:
        # The steps of Trainer._save_checkpoint, with the folder renamed between writing and pushing.
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final, staging = run_dir / name, run_dir / f"{_STAGING}{name}"
        if self.args.should_save:
            _remove_leftovers(run_dir)
        self._wait_for_everyone()

        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self._export_callback_states()
            self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            self.write_card(staging)
            _sync_folder(staging)
        self._wait_for_everyone()
        if self.args.should_save:
            _rename(staging, final)
        self._wait_for_everyone()

        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _export_callback_states(self) -> None:
        stateful = [cb for cb in [*self.callback_handler.callbacks, self.control] if isinstance(cb, ExportableState)]
        for callback in stateful:
            name, state = type(callback).__name__, callback.state()
            # A callback that is new since the checkpoint this run resumed from has no entry yet.
            if isinstance(self.state.stateful_callbacks.get(name), list):
                self.state.stateful_callbacks[name].append(state)
            else:
                self.state.stateful_callbacks[name] = state

    def _wait_for_everyone(self) -> None:
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED and dist.is_initialized():
            dist.barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        super().save_model(folder, _internal_call=True)
        self.write_recycling_files(folder)
        if _internal_call:
            return
        self.write_card(folder)
        # As the stock method does, but with our files in the folder.
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def write_card(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model card of `folder`, on the process that saves. Training never stops for it: what keeps it from
        being written is said once."""
        if not self.args.should_save or self.neuron_table() is None:
            return
        try:
            # Late, because it brings matplotlib, which a run that saves nothing can do without.
            from hf_recycle.hub.card import write_card

            name = self.hub_model_id or self.args.hub_model_id
            # Its namespace is not known as long as the Hub can't be reached.
            write_card(folder, repo_id=name if name and "/" in name else None, told=told_facts(self.card_words))
        except Exception as error:  # a card is drawn by libraries that may fail in any way
            logger.warning_once(f"No model card is written ({type(error).__name__}: {error}); training goes on.")

    def _run_facts(self, tokens: int) -> dict[str, Any]:
        try:
            facts = run_facts(self)
            problem = run_problem(facts)
        except Exception as error:  # they are told for the reader; a checkpoint is whole without
            problem = f"{type(error).__name__}: {error}"
        if problem:
            logger.warning_once(f"The facts of the run are not recorded ({problem}); training goes on.")
        return ({} if problem else facts) | self.meter.reading(tokens)

    def write_recycling_files(self, folder: str | os.PathLike[str]) -> None:
        """Writes the four recycling files; a model without feed-forward blocks has none."""
        table = self.neuron_table()
        if table is None:
            return
        running_loss = getattr(self, "_tr_loss", None)
        if running_loss is not None:
            running_loss = nested_gather(running_loss, self.args.parallel_mode).mean()
        # Before the other processes leave: both gather what is sharded.
        tensors, statistics = table.state_dict(), self.statistics()
        tokens = torch.tensor([self.meter.own_tokens], device=self.args.device)
        tokens = int(nested_gather(tokens, self.args.parallel_mode).sum())
        if not self.args.should_save:
            return
        os.makedirs(folder, exist_ok=True)
        if running_loss is not None:
            tensors[_RUNNING_LOSS] = running_loss.detach().float().reshape(1).cpu()
            tensors[_LAST_LOGGED] = torch.tensor([self._globalstep_last_logged])
        blocks = [{"name": b.name, "num_neurons": b.num_neurons, "gated": b.gated} for b in table.blocks]
        config = {"arguments": self.recycling_arguments(), "blocks": blocks, "run": self._run_facts(tokens)}
        if resolved := self.resolved_arguments():
            config["resolved"] = resolved
        files.write_config(folder, config)
        files.write_state(folder, tensors)
        files.write_history(folder, self.recorder.to_table())
        files.write_stats(folder, statistics)

    def statistics(self) -> dict[str, Any]:
        """The summary of the run so far: the content of `recycling_stats.json`."""
        table = self.neuron_table()
        return summarize(
            table.counts,
            table.magnitudes(),
            self.recorder,
            step=self.state.global_step,
            pruned=table.pruned,
            in_transition=table.in_transition,
            immune=self.immune_neurons(),
        )

    # ---- Reading ----

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        progress = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._resumed_loss: tuple[float, int] | None = None
        self.neuron_methods.began_with = {}
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
        tensors, _ = files.read_state(folder, config["blocks"])
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
        if _RUNNING_LOSS in tensors and _LAST_LOGGED in tensors:
            self._resumed_loss = float(tensors[_RUNNING_LOSS][0]), int(tensors[_LAST_LOGGED][0])

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
        # The time and the tokens that the run has taken, and not those of its best checkpoint; and no part of a logging
        # interval is left over for a training that may follow.
        running, self.meter = self.meter, RunMeter()
        self.load_recycling_files(self.state.best_model_checkpoint)
        self.meter, self._resumed_loss = running, None


def _check_same_blocks(folder, saved: Iterable[dict[str, Any]], table: NeuronTable) -> None:
    before = {block["name"]: block["num_neurons"] for block in saved}
    now = {block.name: block.num_neurons for block in table.blocks}
    for name in [*before, *now]:
        if before.get(name) != now.get(name):
            raise files.RecyclingFileError(
                f"The checkpoint {folder} has {before.get(name, 'no')} neurons in block {name!r} and the model has "
                f"{now.get(name, 'none')}: resume it with the model it was made with."
            )


def _remove_leftovers(run_dir: Path) -> None:
    """Removes what a killed run left half written."""
    for leftover in run_dir.glob(f"{_STAGING}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _rename(staging: Path, final: Path) -> None:
    if final.exists():  # a resumed run that saves a step again
        replaced = staging.with_name(f"{_STAGING}{final.name}-replaced")
        os.replace(final, replaced)
        os.replace(staging, final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.replace(staging, final)
    _sync_path(final.parent)


def _sync_folder(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
