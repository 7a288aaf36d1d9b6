"""What shrinking reads and writes: a model with its tokenizer, and the record of what was pruned."""

import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_recycle.analysis.checkpoint import Checkpoint
from hf_recycle.analysis.shrink import check_pruned_are_zero
from hf_recycle.analysis.source import Source
from hf_recycle.errors import UserError
from hf_recycle.files import STATE_FILE
from hf_recycle.hub.explain import explained
from hf_recycle.hub.fetch import check_small_files
from hf_recycle.neurons.find import find_feed_forwards


def load_model(source: Source, pattern: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model of the checkpoint's architecture in its own dtype, in evaluation mode, and its tokenizer if it has one.

    Raises:
        UserError: it can't be loaded, or neurons that its recycling state calls pruned are not zero.
    """
    checkpoint = Checkpoint(source, pattern)
    blocks = checkpoint.blocks  # refuses what has none, before anything large is read
    for piece in blocks[0].slices:
        next(iter(checkpoint.tiles(piece)))  # and what is damaged or incomplete
    cls = getattr(transformers, (checkpoint.config.architectures or [""])[0], AutoModel)
    where, revision = (source.folder, None) if source.folder else (source.name, source.revision)
    options = {} if revision is None else {"revision": revision}
    if source.subfolder:
        options["subfolder"] = source.subfolder.rstrip("/")
    if source.folder is None:
        options["use_safetensors"] = True
        with explained(source.name):
            check_small_files(source.name, source.subfolder, source.revision, source.token)
    try:
        model = cls.from_pretrained(where, config=checkpoint.config, dtype="auto", **options).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().split("\n", 1)[0] or type(error).__name__).rstrip(". ")
        raise UserError(f"{source.name} could not be loaded: {reason}") from error
    check_pruned_are_zero(find_feed_forwards(model, pattern), _pruned_masks(source))
    return model, _tokenizer(where, options.get("revision"), source.subfolder)


def save_whole(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Saves into `folder`, which appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
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


def _tokenizer(where: Path | str, revision: str | None, subfolder: str) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision or "main", subfolder=subfolder.rstrip("/"))
    except (OSError, ValueError, KeyError):
        return None
