"""Plain weights beside those of an engine: written from shards, read into shards, one tensor at a time."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


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
def load_plain_weights(model: nn.Module, folder: Path, aliases: Mapping[str, str]) -> None:
    """Loads a folder's safetensors into a model, sharded or not; each process reads its own, a tensor at a time.

    Args:
        aliases: names that the model's parameters once had, to those they have, see `drop_tied_aliases`.

    Raises:
        ValueError: if the weights are not those of the model.
    """
    targets = dict(model.state_dict(keep_vars=True))
    missing = {id(tensor): name for name, tensor in targets.items()}
    for name, values in _tensors(folder):
        target = targets.get(aliases.get(name, name))
        if target is None or target.shape != values.shape:
            raise ValueError(f"The weights in {folder} are not those of the model: {name} does not fit.")
        missing.pop(id(target), None)
        target.copy_(cut_like(target, values))
    if missing:
        raise ValueError(f"The weights in {folder} are not those of the model: {min(missing.values())} is missing.")


def cut_like(target: Tensor, values: Tensor) -> Tensor:
    """Whole `values`, the same on every process, laid out like a parameter of the same shape; no communication."""
    values = values.to(target.device)
    if not isinstance(target, DTensor):
        return values
    return distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    names = {SAFE_WEIGHTS_NAME}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    for file_name in sorted(names):
        # The name of a file and nothing else, whatever the index says.
        with safe_open(Path(folder, Path(file_name).name), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
