"""Parameters that DeepSpeed ZeRO has sharded: float32 masters and copies that the model computes with.

The optimizer updates float32 masters, flattened and cut over processes; the model computes with copies. Stages 1 and 2
keep a whole copy of the model on each process, stage 3 a partition of it. In both, a process holds of each parameter
one range of its flattened master.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from hf_recycle.internals import of_deepspeed
from hf_recycle.neurons.slices import ParameterSlice, full_shape
from hf_recycle.neurons.storage.base import Fragments, Storage
from hf_recycle.neurons.storage.plain import whole
from hf_recycle.neurons.storage.tiles import Tile, tiles_of_range


class ZeroStorage(Storage):
    """What the stages share."""

    separate_masters = True

    def gradient_tiles(self, piece: ParameterSlice) -> list[Tile]:
        # DeepSpeed steps inside backward: gradients are scaled by hooks on the parameters, before they are cut.
        raise NotImplementedError("DeepSpeed gives no access to gradients between backward and the step")

    def sum_over_processes(self, piece: ParameterSlice, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values


class ReplicatedZeroStorage(ZeroStorage):
    """Stages 1 and 2: cut masters, whole copies."""

    def tiles(self, piece: ParameterSlice) -> list[Tile]:
        return _mapped(piece, None)

    def optimizer_state(self, optimizer, piece: ParameterSlice) -> dict[str, list[Tile] | Tensor]:
        # By key on every process, though some hold nothing of this parameter: means are taken together.
        keys = {key for state in optimizer.state.values() for key, value in state.items() if _is_flat(value)}
        return {key: _mapped(piece, key) for key in sorted(keys | of_deepspeed.state_keys(piece.parameter))}

    def group_of(self, piece: ParameterSlice, optimizer) -> int:
        return of_deepspeed.replicated_group(optimizer, piece.parameter)

    def stepped(self, piece: ParameterSlice, optimizer) -> Tensor:
        return of_deepspeed.replicated_masters(optimizer, piece.parameter)

    def publish(self, piece: ParameterSlice, index: Tensor) -> None:
        self.write_forward(piece, index, self.read(piece, index))

    def write_forward(self, piece: ParameterSlice, index: Tensor, fragments: Fragments) -> None:
        lines = self.gather(piece, index, fragments).reshape(len(index), -1)
        [tile] = whole(piece, piece.parameter)
        tile.write(tile.rows(index)[1], lines)

    def read_forward(self, piece: ParameterSlice, index: Tensor) -> Fragments:
        [tile] = whole(piece, piece.parameter)
        return self.shard(piece, index, tile.read(tile.rows(index)[1]))

    def clear(self, piece: ParameterSlice, index: Tensor) -> None:
        super().clear(piece, index)
        self.fill(whole(piece, piece.parameter), index, 0.0)

    def scale(self, piece: ParameterSlice, factors: Tensor) -> None:
        super().scale(piece, factors)
        # Each process scales its own copy. In half precision that rounds once more than a copy of the scaled master
        # would, until the engine's next step copies the masters again; in float32 it is the same.
        [tile] = whole(piece, piece.parameter)
        scaled = tile.values.float() * factors.to(tile.values.device, torch.float32).unsqueeze(1)
        tile.values.copy_(scaled)


class PartitionedZeroStorage(ZeroStorage):
    """Stage 3: cut masters, copies cut alike."""

    def tiles(self, piece: ParameterSlice) -> list[Tile]:
        return _partitioned(piece, of_deepspeed.master(piece.parameter))

    def optimizer_state(self, optimizer, piece: ParameterSlice) -> dict[str, list[Tile] | Tensor]:
        parameter = piece.parameter
        return {
            key: _partitioned(piece, of_deepspeed.master(parameter, key)) if _is_flat(value) else value
            for key, value in of_deepspeed.master_state(optimizer, parameter).items()
        }

    def group_of(self, piece: ParameterSlice, optimizer) -> int:
        return of_deepspeed.partitioned_group(piece.parameter)

    def stepped(self, piece: ParameterSlice, optimizer) -> Tensor:
        return of_deepspeed.partitioned_masters(piece.parameter)

    def publish(self, piece: ParameterSlice, index: Tensor) -> None:
        self.write_forward(piece, index, self.read(piece, index))

    def write_forward(self, piece: ParameterSlice, index: Tensor, fragments: Fragments) -> None:
        for tile, values in zip(_copies(piece), fragments, strict=True):
            tile.write(tile.rows(index)[1], values)
        of_deepspeed.refresh(piece.parameter)

    def read_forward(self, piece: ParameterSlice, index: Tensor) -> Fragments:
        return [tile.read(tile.rows(index)[1]) for tile in _copies(piece)]

    def clear(self, piece: ParameterSlice, index: Tensor) -> None:
        super().clear(piece, index)
        self.fill(_copies(piece), index, 0.0)
        of_deepspeed.refresh(piece.parameter)

    def scale(self, piece: ParameterSlice, factors: Tensor) -> None:
        super().scale(piece, factors)
        for master, copied in zip(self.tiles(piece), _copies(piece), strict=True):
            # The copies of others may hold something else, as those of neurons that fade in do.
            changed = (factors != 1)[copied.neurons].to(copied.values.device).unsqueeze(1)
            copied.values.copy_(torch.where(changed, master.values, copied.values))
        of_deepspeed.refresh(piece.parameter)


def _is_flat(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.numel() > 1


def _mapped(piece: ParameterSlice, key: str | None) -> list[Tile]:
    """Tiles of this process' fragment of the master (or of one optimizer state) of a parameter, stages 1 and 2."""
    held = of_deepspeed.fragment(piece.parameter, key)
    return [] if held is None else list(tiles_of_range(piece, *held, piece.matrix_shape[1]))


def _copies(piece: ParameterSlice) -> list[Tile]:
    """Tiles of what this process computes with, stage 3."""
    return _partitioned(piece, of_deepspeed.partition(piece.parameter))


def _partitioned(piece: ParameterSlice, partition: Tensor) -> list[Tile]:
    """Tiles of a stage 3 partition, without the padding behind the last one."""
    partition = partition.detach()
    start = dist.get_rank() * partition.numel()
    held = max(0, min(partition.numel(), full_shape(piece.parameter).numel() - start))
    return list(tiles_of_range(piece, partition[:held], start, piece.matrix_shape[1]))
