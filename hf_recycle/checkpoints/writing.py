"""Writing checkpoints that are whole or absent, with the state of every neuron in them."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_gather
from transformers.training_args import ParallelMode
from transformers.utils import logging

from hf_recycle.card.run_facts import run_facts
from hf_recycle.card.words import Words, told_facts
from hf_recycle.checkpoints.continuation import ContinuationMixin
from hf_recycle.checkpoints.file_list import write_list
from hf_recycle.checkpoints.run_folder import checkpoint_folder, install, keep_only, rotate, staging_folder
from hf_recycle.records.file_set import FileSet, write_files
from hf_recycle.records.run_schema import run_problem
from hf_recycle.records.summary import summarize
from hf_recycle.utils.whole_files import sync_tree

logger = logging.get_logger(__name__)

# Kept with the neurons, because `trainer_state.json` has no place for them.
RUNNING_LOSS, LAST_LOGGED = "trainer/running_loss", "trainer/last_logged_step"


class CheckpointWritingMixin(ContinuationMixin):
    """Writes each checkpoint under another name and renames it last, with the recycling files and a list of all files
    inside.
    """

    card_words: Words

    def _save_checkpoint(self, model, trial) -> None:
        # The steps of Trainer._save_checkpoint, with the folder renamed between writing and pushing.
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = checkpoint_folder(run_dir, self.state.global_step)
        staging = staging_folder(final)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # of an attempt that failed, with a full disk for example
        self._wait_for_everyone()

        self.save_model(str(staging), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        if self.state.best_global_step:
            best = checkpoint_folder(run_dir, self.state.best_global_step)
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self._export_callback_states()
            self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            self.write_card(staging, figures=False)  # they are drawn for what is published, beside training
        self._wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            write_list(staging, self.state.global_step, checksum_all=self.args.verify_checkpoint)
            sync_tree(staging)
            install(final)
        self._wait_for_everyone()

        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate(run_dir, self.args.save_total_limit, self.state.global_step, self.state.best_model_checkpoint)

    def _finalize_training(self, trial, num_train_samples, start_time):
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            keep_only(Path(self._get_output_dir(trial)), Path(best))  # as the Trainer does, which deletes in place
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        each = self.args.save_on_each_node and self.args.should_save and hasattr(self.model, "should_save_on_this_rank")
        with _saving_here(self.model) if each else contextlib.nullcontext():
            super()._save(output_dir, state_dict)

    def _export_callback_states(self) -> None:
        stateful = [cb for cb in [*self.callback_handler.callbacks, self.control] if isinstance(cb, ExportableState)]
        states: dict[str, Any] = cast(Any, self.state.stateful_callbacks)  # which is declared as what it comes from
        for callback in stateful:
            name, state = type(callback).__name__, callback.state()
            # A callback that is new since the checkpoint this run resumed from has no entry yet.
            if isinstance(states.get(name), list):
                states[name].append(state)
            else:
                states[name] = state

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

    def write_card(self, folder: str | os.PathLike[str], *, figures: bool = True) -> None:
        """Writes the model card of `folder`, on the process that saves. Training never stops for it: a failure
        causes one warning."""
        if not self.args.should_save or self.neuron_table() is None:
            return
        try:
            # Late, because it brings pandas, which a run that saves nothing can do without.
            from hf_recycle.card.card import write_card

            name = self.hub_model_id or self.args.hub_model_id
            # Its namespace is not known as long as the Hub can't be reached.
            repo_id = name if name and "/" in name else None
            write_card(folder, repo_id=repo_id, told=told_facts(self.card_words), figures=figures)
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
        own_tokens = torch.tensor([self.meter.own_tokens], device=self.args.device)
        tokens = int(nested_gather(own_tokens, self.args.parallel_mode).sum())
        if not self.args.should_save:
            return
        os.makedirs(folder, exist_ok=True)
        if running_loss is not None:
            tensors[RUNNING_LOSS] = running_loss.detach().float().reshape(1).cpu()
            tensors[LAST_LOGGED] = torch.tensor([self._globalstep_last_logged])
        blocks = [{"name": b.name, "num_neurons": b.num_neurons, "gated": b.gated} for b in table.blocks]
        config = {"arguments": self.recycling_arguments(), "blocks": blocks, "run": self._run_facts(tokens)}
        if resolved := self.resolved_arguments():
            config["resolved"] = resolved
        if self.made_with is not None:
            config["training"] = self.made_with
        write_files(folder, FileSet(config, tensors, self.recorder.to_table(), statistics))

    def statistics(self) -> dict[str, Any]:
        """The summary of the run so far: the content of `recycling_stats.json`.

        Raises:
            ValueError: the model has no feed-forward blocks.
        """
        table = self.neuron_table()
        if table is None:
            raise ValueError("the model has no feed-forward blocks, so nothing is known of its neurons.")
        return summarize(
            table.counts,
            table.magnitudes(),
            self.recorder,
            step=self.model_step,
            pruned=table.pruned,
            fading_in=table.fading_in,
            immune=self.immune_neurons(),
        )


@contextlib.contextmanager
def _saving_here(model: nn.Module) -> Iterator[None]:
    """Within it `save_pretrained` writes on this process, whatever its rank: by itself it does on the first alone."""
    shown: Any = model
    shown.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del shown.should_save_on_this_rank
