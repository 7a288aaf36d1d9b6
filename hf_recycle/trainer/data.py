"""What a Trainer does differently with its data: random numbers by example, order by epoch, streams that resume."""

import inspect
from pathlib import Path

import datasets
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_recycle.batches.clock import TrainingClock
from hf_recycle.batches.extra_batches import ExtraBatches
from hf_recycle.batches.loaders import base_loader, make_reproducible, set_sampler_epoch
from hf_recycle.batches.numbered import NumberedStream
from hf_recycle.batches.seeded import EVALUATION_SEED
from hf_recycle.batches.stream_state import StreamState
from hf_recycle.internals.of_datasets import is_split_by_node
from hf_recycle.trainer.base import NeuronTrainer

logger = logging.get_logger(__name__)


class ReproducibleDataMixin(NeuronTrainer):
    """Batches as a pure function of (seed, epoch, example), so that a resumed run gets those of an uninterrupted one.

    The collator stays the user's own object and does what it would do at that moment; so do the datasets and the
    samplers. Only their random numbers are others: see `make_reproducible`. Evaluations get the same masks always.
    """

    def set_up_data(self) -> None:
        """To be called once, at the end of `__init__`."""
        self._clock, self._no_clock = TrainingClock(), TrainingClock()
        self._stream_ends_unannounced = False
        self._stream_state: StreamState | None = None
        self._batches_to_skip = 0

    @property
    def _deterministic(self) -> bool:
        """Whether batches are as said above, by the arguments as they are now; else they are the stock Trainer's."""
        chosen = self.args.deterministic_masking
        return not self.steps_aside if chosen is None else chosen

    # ---- Loaders ----

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if self._deterministic and self.args.world_size > 1 and isinstance(dataset, IterableDataset):
            self._check_stream(dataset, is_training)
            # Of a wrapped stream every process reads all and takes its part, as of torch's streams. Accelerate gives
            # each process some shards of one of `datasets`: if they are uneven, every process is in another epoch.
            dataset = dataset if self._dispatches_streams() else NumberedStream(dataset, self._clock, self._seed())
        loader = super()._get_dataloader(
            dataset, description, batch_size, sampler_fn, is_training=is_training, dataloader_key=dataloader_key
        )
        if self._deterministic:
            self._make_reproducible(loader, is_training)
        return loader

    def _make_reproducible(self, loader, is_training: bool) -> None:
        seed = self._seed() if is_training else EVALUATION_SEED
        if not make_reproducible(loader, seed, self._clock if is_training else self._no_clock):
            logger.warning_once(
                f"get_train_dataloader gives a {type(loader).__name__}, whose random numbers can't be reached: a "
                "resumed run will get other batches than an uninterrupted one, and will not equal it to the bit."
            )
        elif self.args.dataloader_persistent_workers:
            # They draw a seed from the global generator when they start, which is at another time in a resumed run.
            base_loader(loader).generator = torch.Generator().manual_seed(seed)

    def _seed(self) -> int:
        seeds = (getattr(self.data_collator, "seed", None), self.args.data_seed, self.args.seed)
        return next(seed for seed in seeds if seed is not None)

    def _dispatches_streams(self) -> bool:
        """Whether process 0 reads streams for all."""
        chosen = self.accelerator.dispatch_batches
        return chosen is None or chosen

    def _check_stream(self, dataset, is_training: bool) -> None:
        processes = self.args.world_size
        if is_split_by_node(dataset):
            raise ValueError(
                f"The stream was split by split_dataset_by_node, and the Trainer splits it once more over {processes} "
                "processes, so that most examples would never be seen: pass the whole stream."
            )
        if not is_training and not self._dispatches_streams():
            raise ValueError(
                f"dispatch_batches=False can't evaluate on a stream with {processes} processes, which would count some "
                "examples twice: leave it out, or evaluate on a dataset with a length."
            )

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self._clock.set_training(max_steps, self.get_total_train_batch_size(self.args))
        if self._deterministic:
            self._make_reproducible(train_dataloader, is_training=True)  # the user may have made it
            self._stream_state = self._state_of(train_dataloader)
            if self._stream_state is not None and resume_from_checkpoint is not None:
                self._stream_state.load(resume_from_checkpoint, self._batches_to_skip)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _state_of(self, loader) -> StreamState | None:
        """The state of the stream behind a loader, if this process reads all of it, itself and in order."""
        base = base_loader(loader)
        stream = getattr(base, "dataset", None)
        if not isinstance(stream, NumberedStream) or base.num_workers or self.args.world_size > 1:
            return None
        return stream.keep_state(base.batch_size)

    def _save_rng_state(self, output_dir) -> None:
        super()._save_rng_state(output_dir)
        if self._stream_state is not None:
            self._stream_state.save(output_dir, self._batches_of_epoch(self.state)[1])

    def evaluation_loop(self, dataloader, *args, **kwargs):
        if self._deterministic:
            self._make_reproducible(dataloader, is_training=False)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    # ---- Epochs ----

    def _run_epoch(self, *args, **kwargs):
        given = inspect.signature(super()._run_epoch).bind(*args, **kwargs).arguments
        epoch, resumes = given["epoch"], given["resume_from_checkpoint"] is not None
        skips = resumes and epoch == given["epochs_trained"] and not self.args.ignore_data_skip
        skipped = given["steps_trained_in_current_epoch"] // self.args.gradient_accumulation_steps if skips else 0
        self._clock.set_epoch(epoch, first_step=self.state.global_step - skipped)
        if self._deterministic:
            set_sampler_epoch(given["train_dataloader"], epoch)
        super()._run_epoch(*args, **kwargs)

    def set_initial_training_values(self, args, dataloader):
        self._stream_ends_unannounced = not has_length(dataloader)
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._deterministic or not self._stream_ends_unannounced or len(samples) == num_batches:
            return samples, items
        # The end of a stream. Too few batches for an optimizer step are left out: the stock Trainer adds their
        # gradients to those of the next epoch's first step, and a checkpoint in between would lose them.
        self.state.epoch = float(self._clock.epoch + 1)
        self.control.should_epoch_stop = True
        return [], None

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        progress = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if checkpoint is not None and progress[1] and self._dispatches_a_table():
            raise ValueError(
                "dispatch_batches=True can't resume in the middle of an epoch of a dataset with indices, because "
                "Accelerate skips too few batches: leave it out, which gives the same batches."
            )
        saved = Path(checkpoint, TRAINER_STATE_NAME) if checkpoint is not None else None
        if not self._deterministic or not self._stream_ends_unannounced or saved is None or not saved.is_file():
            return progress
        # The stock Trainer takes all that was trained for one epoch.
        epoch, batches = self._batches_of_epoch(TrainerState.load_from_json(str(saved)))
        self._batches_to_skip = 0 if self.args.ignore_data_skip else batches
        return epoch, self._batches_to_skip

    def _dispatches_a_table(self) -> bool:
        options = self.accelerator
        several = self.args.world_size > 1 and not isinstance(self.train_dataset, IterableDataset)
        return self._deterministic and several and bool(options.dispatch_batches) and not options.split_batches

    def _batches_of_epoch(self, state: TrainerState) -> tuple[int, int]:
        """The epoch of a stream without length, and how many of its batches were taken: the state has them as a share
        of the batches that all steps together would take."""
        epoch = int(state.epoch)
        return epoch, round((state.epoch - epoch) * state.max_steps * self.args.gradient_accumulation_steps)

    # ---- Extra batches ----

    def extra_batches(self, seed: int, wanted_by: str) -> ExtraBatches:
        """Extra batches of the training set, with an order and masks of their own.

        Args:
            wanted_by: the argument that asks for it, for messages.

        Raises:
            ValueError: if the training set is a stream.
        """
        dataset, collator = self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="extra batches")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="extra batches")
        return ExtraBatches(dataset, collator, seed, wanted_by)
