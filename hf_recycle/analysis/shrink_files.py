"""What shrinking reads and writes: a model with its tokenizer, and the record of what was pruned."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoModel,
    AutoProcessor,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from hf_recycle.analysis.checkpoint import Checkpoint
from hf_recycle.analysis.shrink import check_pruned_are_zero
from hf_recycle.analysis.source import Source
from hf_recycle.errors import UserError, reason_of
from hf_recycle.hub.explain import explained
from hf_recycle.hub.fetch import check_small_files
from hf_recycle.neurons.find import find_feed_forwards
from hf_recycle.records.files import STATE_FILE

Processor = PreTrainedTokenizerBase | ProcessorMixin | ImageProcessingMixin | FeatureExtractionMixin

_PROCESSOR_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
)


def load_model(
    source: Source, pattern: str | None = None, ff_blocks: str | None = None
) -> tuple[PreTrainedModel, Processor | None]:
    """The model of the checkpoint's architecture in its own dtype, in evaluation mode, and its tokenizer or processor.

    Raises:
        UserError: it can't be loaded, or neurons that its recycling state calls pruned are not zero.
    """
    checkpoint = Checkpoint(source, pattern, ff_blocks)
    cls = _class_of(checkpoint)
    blocks = checkpoint.blocks  # refuses what has none, before anything large is read
    for piece in blocks[0].slices:
        next(iter(checkpoint.tiles(piece)))  # and what is damaged or incomplete
    where, revision = (source.folder, None) if source.folder else (source.name, source.revision)
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    if source.subfolder:
        options["subfolder"] = source.subfolder.rstrip("/")
    if source.folder is None:
        index, single = source.weight_map()
        options["use_safetensors"] = all(name.endswith(".safetensors") for name in (index or {"": single}).values())
        with explained(source.name):
            check_small_files(source.name, source.subfolder, source.revision, source.token)
    try:
        model = cls.from_pretrained(where, config=checkpoint.config, dtype="auto", **options).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source.name} could not be loaded: {reason_of(error)}") from error
    check_pruned_are_zero(find_feed_forwards(model, pattern, ff_blocks), _pruned_masks(source))
    return model, _processor(source, where, options.get("revision"))


def save_whole(folder: Path, model: PreTrainedModel, processor: Processor | None) -> None:
    """Saves into `folder`, which appears whole or not at all.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"output={str(folder)!r} can't be written ({error.strerror}); name another folder") from error
    try:
        model.save_pretrained(temporary)
        if processor is not None:
            processor.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private
        if folder.is_dir():
            folder.rmdir()  # an empty one, or this fails
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pruned_masks(source: Source) -> dict[str, Tensor]:
    """What the recycling state calls pruned: bool `(d_ff,)` for each block; empty without such a state."""
    path = source.file(STATE_FILE)
    if path is None:
        return {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = [key for key in file.keys() if key.endswith("/pruned")]  # noqa: SIM118
            return {key.removesuffix("/pruned"): file.get_tensor(key).to(torch.bool) for key in keys}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again") from error


def _class_of(checkpoint: Checkpoint) -> Any:
    """The class of the model, so that its head stays."""
    architecture = next(iter(checkpoint.config.architectures or ()), None)
    cls = AutoModel if architecture is None else getattr(transformers, architecture, None)
    if cls is None:
        raise UserError(
            f"{checkpoint.source.name} is a {architecture}, which is no class of transformers: its head would be lost; "
            "load it in Python and pass it to hf_recycle.analysis.shrink.shrink"
        )
    return cls


def _processor(source: Source, where: Path | str, revision: str | None) -> Processor | None:
    # Without files, transformers makes up an empty tokenizer.
    if not any(map(source.file, _PROCESSOR_FILES)):
        return None
    try:
        return AutoProcessor.from_pretrained(
            where, revision=revision or "main", subfolder=source.subfolder.rstrip("/"), trust_remote_code=False
        )
    except Exception:  # which error says that there is none depends on what is missing
        return None
