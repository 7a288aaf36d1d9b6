"""Optimizer state in 8 bits (torchao, bitsandbytes): read as float32, written back where it was edited.

Both keep a code for each number, a table with the value of each code, and one scale for each block of numbers that
follow each other in memory. A neuron's line may share blocks with other neurons: these keep their codes, unless a block
needs a larger scale; then they are rounded once more, as they are at every step of such an optimizer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BITSANDBYTES_BLOCK = 256  # it keeps the number nowhere


@dataclass(frozen=True)
class _Entry:
    """One entry of a state.

    Attributes:
        codes: uint8 `(parts, n)`, a view; AdEMAMix of bitsandbytes keeps two moments in one entry, others one.
        scales: float32 `(parts, blocks)`, a view.
        values: float32 `(256,)`, ascending: those of the codes.
        block: numbers in a block; the last one of a part may have fewer.
    """

    codes: Tensor
    scales: Tensor
    values: Tensor
    block: int

    def read(self) -> Tensor:
        """float32 `(parts, n)`."""
        return self.values[self.codes.long()] * self._spread(self.scales)

    def write(self, new: Tensor, old: Tensor) -> None:
        """Takes in `new` `(parts, n)`, where it differs from `old`, which was read."""
        edited = self._blocks(new != old)
        largest = self._blocks(new).abs().amax(-1)
        rescaled = edited.all(-1) | (largest > self.scales)
        self.scales[rescaled] = largest[rescaled]
        relative = new / self._spread(self.scales).clamp(min=torch.finfo(torch.float32).tiny)
        nearest = torch.bucketize(relative, (self.values[1:] + self.values[:-1]) / 2)
        here = self._spread(edited.any(-1))
        self.codes[here] = nearest.to(torch.uint8)[here]

    def _blocks(self, values: Tensor) -> Tensor:
        """`(parts, n)` as `(parts, blocks, block)`; a last block that is not full repeats its last number."""
        missing = self.scales.shape[1] * self.block - values.shape[1]
        return torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, self.block))

    def _spread(self, of_blocks: Tensor) -> Tensor:
        """`(parts, blocks)` as `(parts, n)`."""
        return of_blocks.repeat_interleave(self.block, dim=1)[:, : self.codes.shape[1]]


def is_quantized(state: Mapping[str, Any], key: str) -> bool:
    """Whether an entry of the state of one parameter is kept in 8 bits."""
    return _entry(state, key) is not None


@contextmanager
def dequantized(state: Mapping[str, Any], key: str) -> Iterator[Tensor]:
    """The entry as a float32 tensor of its own shape; what is edited there is in the state afterwards."""
    entry = _entry(state, key)
    assert entry is not None, "see is_quantized"
    old = entry.read()
    new = old.clone()
    yield new.view(state[key].shape)
    entry.write(new, old)


def _entry(state: Mapping[str, Any], key: str) -> _Entry | None:
    value = state[key]
    if type(value).__module__.startswith("torchao.") and hasattr(value, "block_size"):
        return _Entry(value.codes.view(1, -1), value.scale.view(1, -1), value.qmap, value.block_size)
    number = key.removeprefix("state")
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and f"qmap{number}" in state:
        scales = state[f"absmax{number}"]
        scales = scales if scales.dim() == 2 else scales.unsqueeze(0)
        return _Entry(value.view(len(scales), -1), scales, state[f"qmap{number}"], _BITSANDBYTES_BLOCK)
    return None
