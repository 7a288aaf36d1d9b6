"""Checkpoints across engines: which engine wrote one, whether this one can go on from it, and how.

One process, DDP and FSDP2 (full or sharded state dicts) go on from each other's checkpoints, with any number of
processes. DeepSpeed's hold partitions of its own making: they go on with the same kind of ZeRO and the same number of
processes, or after DeepSpeed's own conversion to a universal checkpoint.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, Trainer, __version__
from transformers.core_model_loading import WeightTransform
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import CONFIG_NAME, logging

from hf_recycle.engines.adapter_weights import check_adapter
from hf_recycle.engines.optimizer_checks import check_when_loaded
from hf_recycle.engines.optimizer_files import load_optimizer
from hf_recycle.engines.plain_weights import (
    check_all_loaded,
    gather_weights,
    has_plain_weights,
    load_plain_weights,
)
from hf_recycle.engines.replica_checksum import on_every_process
from hf_recycle.engines.training_state import check_state_is_there
from hf_recycle.engines.weight_names import conversions_of
from hf_recycle.errors import UserError

logger = logging.get_logger(__name__)

# What Accelerate calls a model's files under FSDP, by type of state dict.
_FSDP_FILES = {"SHARDED_STATE_DICT": "pytorch_model_fsdp_0", "FULL_STATE_DICT": "pytorch_model_fsdp.bin"}


class EngineCheckpointMixin(Trainer):
    """Plain weights in the checkpoints of every engine, and resuming from those of another where that is possible.

    Expects `self.tied_aliases`, see `drop_tied_aliases`.
    """

    model: nn.Module
    tied_aliases: dict[str, str]
    _conversions: list[WeightTransform] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if isinstance(resume_from_checkpoint, str):
            on_every_process(lambda: self._check_can_resume(Path(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_can_resume(self, folder: Path) -> None:
        if folder.is_dir():  # else the Trainer says so
            check_resumable(self, folder)
            check_state_is_there(self, folder)

    # ---- Writing ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        assert folder is not None
        if self.is_fsdp_enabled and _state_dict_type(self) == "SHARDED_STATE_DICT":
            # The stock Trainer writes no weights then but those that only FSDP reads.
            os.makedirs(folder, exist_ok=True)
            self._save(folder, state_dict=gather_weights(self._unwrapped(), Path(folder), self.args.should_save))
        super().save_model(folder, _internal_call=_internal_call)

    def _unwrapped(self):
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # ---- Reading ----

    def _prepare_for_training(self, *args, **kwargs):
        if self.is_fsdp_enabled:
            self._conversions = conversions_of(self._unwrapped())  # now, because FSDP renames the model's class
        return super()._prepare_for_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        if self._reads_plain_weights(folder):
            _warn_of_another_version(folder)
            self._load_plain_weights(folder)
            return
        with self._reading_as_written(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            check_adapter(self._unwrapped(), folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        check_when_loaded(self.optimizer, self.lr_scheduler, self.model, checkpoint)
        if checkpoint is not None and self._is_of_another_engine(checkpoint):
            load_optimizer(self.optimizer, self._unwrapped(), Path(checkpoint), self.tied_aliases)
            scheduler = Path(checkpoint, SCHEDULER_NAME)
            if scheduler.is_file():
                self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))
            return
        with self._reading_as_written(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        folder = Path(self.state.best_model_checkpoint)
        if self._reads_plain_weights(folder):
            logger.info(f"Loading best model from {folder} (score: {self.state.best_metric}).")
            self._load_plain_weights(folder)
            return
        with self._reading_as_written(str(folder)):
            super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            check_adapter(self._unwrapped(), folder)

    def _reads_plain_weights(self, folder: Path) -> bool:
        """Whether the weights come from safetensors: also where the stock Trainer would read them without the
        conversions of `from_pretrained`. DeepSpeed and FSDP read what they wrote themselves, and PEFT its adapters."""
        if self.is_deepspeed_enabled:
            return False
        return self._is_of_another_engine(folder) or (not self.is_fsdp_enabled and has_plain_weights(folder))

    def _load_plain_weights(self, folder: Path) -> None:
        load_plain_weights(self._unwrapped(), folder, self.tied_aliases, self._conversions)

    def _issue_warnings_after_load(self, load_result) -> None:
        # Of weights that are no safetensors, which the stock Trainer reads.
        model = self._unwrapped()
        check_all_loaded(model, set(model.state_dict()) - set(load_result.missing_keys), "the checkpoint")
        super()._issue_warnings_after_load(load_result)

    def _is_of_another_engine(self, folder: str | Path) -> bool:
        return not self.is_deepspeed_enabled and self.is_fsdp_enabled != (_fsdp_type(Path(folder)) is not None)

    @contextlib.contextmanager
    def _reading_as_written(self, folder: str | None) -> Iterator[None]:
        """FSDP reads one type of state dict, the one it is set to write: for now, that of the checkpoint."""
        found = _fsdp_type(Path(folder)) if self.is_fsdp_enabled and folder else None
        if found is None or found == _state_dict_type(self):
            yield
            return
        plugin = self.accelerator.state.fsdp_plugin
        settings = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
        before = {name: getattr(plugin, name) for name in settings}
        for name in settings:
            setattr(plugin, name, None)
        plugin.set_state_dict_type(found)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(plugin, name, value)


def check_resumable(trainer: Trainer, folder: Path) -> None:
    """Refuses a checkpoint that the trainer's engine can't go on from, by what lies in its folder.

    Raises:
        UserError: with the reason and the way out.
    """
    partitions = zero_partitions(folder)
    anew = f"start a new run from its weights (model_name_or_path={str(folder)!r})"
    if not trainer.is_deepspeed_enabled:
        if partitions:
            raise UserError(
                f"The checkpoint {folder} was written by DeepSpeed, and its optimizer state can't be read without it: "
                f"resume with DeepSpeed, or {anew}."
            )
        if _fsdp_type(folder) and not trainer.is_fsdp_enabled and not has_plain_weights(folder):
            raise UserError(
                f"The checkpoint {folder} was written by FSDP without plain weights beside its own: resume it with "
                "FSDP, or convert it with `accelerate merge-weights`."
            )
        return
    if not partitions:
        raise UserError(
            f"The checkpoint {folder} was not written by DeepSpeed, which resumes its own only: resume without "
            f"DeepSpeed, or {anew}."
        )
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    _check_partitions(folder, partitions, config, trainer.accelerator.num_processes, anew)


def _check_partitions(folder: Path, partitions: Path, config: dict, processes: int, anew: str) -> None:
    convert = (
        f"`python -m deepspeed.checkpoint.ds_to_universal --input_folder {partitions} "
        f"--output_folder {partitions}_universal --inject_missing_state`"
    )
    stages = {True: "stage 3", False: "stage 1 or 2"}
    written, now = _is_stage_3(partitions), config.get("zero_optimization", {}).get("stage", 0) == 3
    if written != now:
        raise UserError(
            f"The checkpoint {folder} was written by ZeRO {stages[written]} and this run has {stages[now]}, whose "
            f"partitions are others: resume with {stages[written]}, or {anew}."
        )
    if config.get("checkpoint", {}).get("load_universal"):
        if not Path(folder, "latest_universal").is_file():
            raise UserError(
                f"checkpoint.load_universal is true and {folder} holds no universal checkpoint: convert it with "
                f"{convert}."
            )
    elif (then := _partition_count(partitions)) != processes:
        raise UserError(
            f"The checkpoint {folder} holds the partitions of {then} processes and this run has {processes}: start "
            f"{then}, or convert it with {convert} and set checkpoint.load_universal to true in the DeepSpeed "
            f"configuration, or {anew}."
        )


def zero_partitions(folder: Path) -> Path | None:
    """The folder inside a checkpoint that holds the partitions DeepSpeed wrote, or None."""
    latest = Path(folder, "latest")
    if not latest.is_file():
        return None
    name = latest.read_text()[:1000].strip()
    return Path(folder, Path(name).name)


def _is_stage_3(partitions: Path) -> bool:
    # Only this stage cuts the model too.
    return any(partitions.glob("*zero_pp_rank_*_model_states.pt"))


def _partition_count(partitions: Path) -> int:
    ranks = (re.search(r"zero_pp_rank_(\d+)_", path.name) for path in partitions.glob("*_optim_states.pt"))
    return len({rank[1] for rank in ranks if rank})


def _warn_of_another_version(folder: Path) -> None:
    if not Path(folder, CONFIG_NAME).is_file():
        return
    written = PreTrainedConfig.from_json_file(Path(folder, CONFIG_NAME)).transformers_version
    if written not in (None, __version__):
        logger.warning(
            f"The checkpoint {folder} was made with transformers {written} (now {__version__}), so the run may differ "
            "from what it would have been."
        )


def _fsdp_type(folder: Path) -> str | None:
    return next((kind for kind, name in _FSDP_FILES.items() if Path(folder, name).exists()), None)


def _state_dict_type(trainer: Trainer) -> str:
    return trainer.accelerator.state.fsdp_plugin.state_dict_type.name
