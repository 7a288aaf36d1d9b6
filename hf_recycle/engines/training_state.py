"""The state of a training that a checkpoint must hold beside the weights."""

from pathlib import Path

from transformers import Trainer
from transformers.trainer import SCALER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from hf_recycle.engines.optimizer_files import OPTIMIZER_FILES
from hf_recycle.errors import UserError
from hf_recycle.records.files import RECYCLING_FILES

logger = logging.get_logger(__name__)


def check_state_is_there(trainer: Trainer, folder: Path) -> None:
    """Refuses a checkpoint of ours without the state of optimizer, scheduler or random generators; of one that the
    stock Trainer wrote, which resumes without, it says so.

    Raises:
        UserError: names what is missing.
    """
    missing = _missing_state(trainer, folder)
    random_states = list(folder.glob("rng_state*.pth"))
    if not random_states:
        missing.append(_random_state_of(trainer))
    if missing and any(Path(folder, name).exists() for name in RECYCLING_FILES):
        raise UserError(
            f"The checkpoint {folder} holds no {' and no '.join(missing)}, without which training would silently go on "
            "as another one (save_only_model=True keeps only the model): resume from another checkpoint, or start a "
            f"new run from its weights (model_name_or_path={str(folder)!r})."
        )
    if missing:
        logger.warning(
            f"The checkpoint {folder} holds no {' and no '.join(missing)}: they begin anew, and the run will not be "
            "what it would have been without the interruption."
        )
    elif not Path(folder, _random_state_of(trainer)).is_file():
        logger.warning(
            f"The checkpoint {folder} holds the random states of {len(random_states)} processes and not the one of "
            f"process {trainer.args.process_index} of {trainer.args.world_size}: dropout and whatever else draws "
            "random numbers draws others than without the interruption."
        )


def _missing_state(trainer: Trainer, folder: Path) -> list[str]:
    if trainer.is_deepspeed_enabled:
        return []  # DeepSpeed's own files hold it, see `check_resumable`
    wanted = [(OPTIMIZER_FILES[0], OPTIMIZER_FILES), (SCHEDULER_NAME, (SCHEDULER_NAME,))]
    if getattr(trainer.accelerator, "scaler", None) is not None:
        wanted.append((SCALER_NAME, (SCALER_NAME,)))
    return [name for name, files in wanted if not any(Path(folder, file).exists() for file in files)]


def _random_state_of(trainer: Trainer) -> str:
    args = trainer.args
    return "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
