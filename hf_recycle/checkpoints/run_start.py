"""What a training begins with: a folder of its own, and a checkpoint that is whole and can be read."""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint
from transformers.utils import logging

from hf_recycle.checkpoints.claims import claimed
from hf_recycle.checkpoints.file_list import check_list
from hf_recycle.engines.replica_checksum import on_every_process
from hf_recycle.errors import UserError, first_line
from hf_recycle.trainer.base import NeuronTrainer

logger = logging.get_logger(__name__)


class RunStartMixin(NeuronTrainer):
    """Claims the run's folder and checks the checkpoint, before anything of either is used."""

    def train(self, resume_from_checkpoint=None, trial=None, *args, **kwargs):
        folder = Path(self._get_output_dir(trial))
        saves = SaveStrategy(self.args.save_strategy) != SaveStrategy.NO
        if saves and self.args.save_on_each_node and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UserError(
                "save_on_each_node=True works with DistributedDataParallel alone: with FSDP and DeepSpeed each machine "
                "would have its part of a checkpoint only; name an output_dir that all machines share."
            )
        with claimed(folder, self.args) if saves else contextlib.nullcontext():
            return super().train(self._checked(resume_from_checkpoint), trial, *args, **kwargs)

    def _checked(self, resume_from_checkpoint):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if not isinstance(resume_from_checkpoint, str | os.PathLike) or not Path(resume_from_checkpoint).is_dir():
            return resume_from_checkpoint  # the Trainer says so
        checkpoint = Path(os.path.abspath(resume_from_checkpoint))  # a callback may change the working directory
        on_every_process(lambda: self._check_files(checkpoint), here=self.args.should_save)
        on_every_process(lambda: _check_state(checkpoint))
        return str(checkpoint)

    def _check_files(self, checkpoint: Path) -> None:
        of_known_size = check_list(checkpoint)
        if of_known_size and self.args.verify_checkpoint:
            logger.warning(
                f"{checkpoint} was saved without verify_checkpoint, so only the size of {', '.join(of_known_size)} "
                "could be checked."
            )

    # ---- Reading ----

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with _reading(resume_from_checkpoint, "the weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _reading(checkpoint, "optimizer or scheduler"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint):
        with _reading(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with _reading(checkpoint, "the random state"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        assert best is not None
        on_every_process(lambda: self._check_files(Path(best)), here=self.args.should_save)
        with _reading(best, "the weights"):
            super()._load_best_model()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # DeepSpeed reads its files here.
        with _reading(resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)


@contextlib.contextmanager
def _reading(folder: str | None, what: str | None = None) -> Iterator[None]:
    """What libraries say about the files of a checkpoint becomes a sentence that names the file.

    Args:
        folder: None reads nothing.
        what: is read within, and nothing else is done; None: other errors are possible too and pass as they are.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        found = _unreadable_file(Path(folder)) if folder is not None else None
        if folder is None or (found is None and what is None):
            raise
        if not Path(folder).is_dir():
            raise UserError(str(error)) from error  # as the Trainer says it
        path, problem = found or (folder, f"{what} in it can't be loaded into this run ({first_line(error)})")
        raise UserError(f"{path}: {problem}; restore it, or use another checkpoint") from error


def _unreadable_file(folder: Path) -> tuple[Path, str] | None:
    """The first file of a checkpoint whose format is broken, and what is wrong with it; None if all are well-formed.

    Nothing is unpickled, so it does not matter who wrote them.
    """
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safetensors.safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as archive:  # as `torch.save` writes
                    if damaged := archive.testzip():
                        raise ValueError(f"its part {damaged} is damaged")
            elif path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
        except Exception as error:  # whatever a library says of it
            return path, f"it can't be read ({first_line(error)})"
    return None


def _check_state(checkpoint: Path) -> None:
    path = checkpoint / TRAINER_STATE_NAME
    try:
        step = TrainerState.load_from_json(str(path)).global_step
        if type(step) is not int or step < 0:
            raise ValueError(f"global_step is {step!r}")
    except Exception as error:  # it may hold anything
        raise UserError(
            f"{path}: it can't be read ({first_line(error)}); restore it, or use another checkpoint"
        ) from error
