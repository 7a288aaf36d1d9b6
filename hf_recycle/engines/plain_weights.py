"""Plain weights beside those of an engine: written from shards, read into shards, one tensor at a time."""

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.core_model_loading import WeightTransform
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_recycle.engines.weight_names import as_in_model, conversions_of, is_left_out, is_obsolete
from hf_recycle.errors import UserError


@torch.no_grad()
def gather_weights(model: nn.Module, folder: Path, keep: bool) -> dict[str, Tensor]:
    """The state dict of a sharded model as whole tensors on the CPU; to be called on every process.

    No process ever has more than one gathered tensor in its memory: those that are kept lie in files under `folder`,
    mapped into memory and already without a name, so that nothing is left of them when the process ends.

    Args:
        keep: whether this process wants them; the others get an empty dict.
    """
    gathered: dict[int, Tensor] = {}
    names = model.state_dict(keep_vars=True)
    for tensor in {id(tensor): tensor for tensor in names.values()}.values():  # tied weights stay tied
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            gathered[id(tensor)] = _on_disk(whole.detach(), folder)
    return {name: gathered[id(tensor)] for name, tensor in names.items()} if keep else {}


def _on_disk(tensor: Tensor, folder: Path) -> Tensor:
    if not tensor.numel():
        return tensor.cpu()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.copy_(tensor.reshape(-1)).view(tensor.shape)


def has_plain_weights(folder: Path) -> bool:
    """Whether `from_pretrained` finds safetensors in a folder."""
    return any(Path(folder, name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


@torch.no_grad()
def load_plain_weights(
    model: nn.Module,
    folder: Path,
    aliases: Mapping[str, str] | None = None,
    conversions: list[WeightTransform] | None = None,
) -> None:
    """Loads a folder's safetensors into a model, as `from_pretrained` would; each process reads its own.

    Into a sharded model a tensor at a time.

    Args:
        aliases: names that the model's parameters once had, to those they have, see `drop_tied_aliases`.
        conversions: see `conversions_of`, by default those of the model as it is.

    Raises:
        UserError: if the folder holds no safetensors, or if its weights are not those of the model: every tensor of the
            model must be there but for tied ones and those that `save_pretrained` leaves out, and no other one.
    """
    if not has_plain_weights(folder):
        raise UserError(f"The checkpoint {folder} holds no {SAFE_WEIGHTS_NAME} to load the weights from.")
    aliases = aliases or {}
    conversions = conversions_of(model) if conversions is None else conversions
    targets = model.state_dict(keep_vars=True)
    names = {**targets, **{gone: targets[stays] for gone, stays in aliases.items()}}
    loaded: set[str] = set()
    whole: dict[str, Tensor] = {}
    try:
        with _opened(folder) as tensors:
            for name, values in as_in_model(tensors, model, names, conversions):
                target = names.get(name)
                if target is None and is_obsolete(model, name):
                    continue
                if target is None or target.shape != values.shape:
                    raise ValueError(f"{name} does not fit")
                name = aliases.get(name, name)
                loaded.add(name)
                if isinstance(target, DTensor):
                    target.copy_(cut_like(target, values))
                else:
                    whole[name] = values
    except ValueError as error:
        raise UserError(f"The weights in {folder} are not those of the model: {error}.") from error
    check_all_loaded(model, loaded, folder)
    model.load_state_dict(whole, strict=False)


def check_all_loaded(model: nn.Module, loaded: Collection[str], folder: Path | str) -> None:
    """Refuses weights that would leave a tensor of the model as it was, whatever it was.

    Args:
        loaded: names of the model's state dict that were there. A tied tensor needs one of its names only, and what
            `save_pretrained` leaves out on purpose none.

    Raises:
        UserError: names the first one that is missing.
    """
    targets = model.state_dict(keep_vars=True)
    there = {id(targets[name]) for name in loaded}
    lost = [
        name
        for name, tensor in targets.items()
        if name not in loaded and id(tensor) not in there and not is_left_out(model, name)
    ]
    if lost:
        more = f" and {len(lost) - 1} more are missing" if len(lost) > 1 else " is missing"
        raise UserError(f"The weights in {folder} are not those of the model: {lost[0]}{more}.")


def cut_like(target: Tensor, values: Tensor) -> Tensor:
    """Whole `values`, the same on every process, laid out like a parameter of the same shape; no communication."""
    values = values.to(target.device)
    if not isinstance(target, DTensor):
        return values
    return distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)


@contextmanager
def _opened(folder: Path) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """Reads a tensor, for the name of each in a folder's safetensors."""
    index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    names = {SAFE_WEIGHTS_NAME}
    if not Path(folder, SAFE_WEIGHTS_NAME).is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    with ExitStack() as stack:
        tensors: dict[str, Callable[[], Tensor]] = {}
        for file_name in sorted(names):
            # The name of a file and nothing else, whatever the index says.
            file = stack.enter_context(safe_open(Path(folder, Path(file_name).name), framework="pt"))
            tensors |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
        yield tensors
