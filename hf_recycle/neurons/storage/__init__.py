"""How the lines of a `NeuronSlice` are stored: as plain tensors, as DTensors, or by DeepSpeed ZeRO."""

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_recycle.internals.of_deepspeed import has_cut_master, is_partitioned
from hf_recycle.neurons.storage.base import Fragments, Storage
from hf_recycle.neurons.storage.dtensor import DTensorStorage
from hf_recycle.neurons.storage.plain import PlainStorage
from hf_recycle.neurons.storage.zero import PartitionedZeroStorage, ReplicatedZeroStorage

__all__ = ["Fragments", "Storage", "storage_of"]

_PLAIN, _DTENSOR = PlainStorage(), DTensorStorage()
_REPLICATED_ZERO, _PARTITIONED_ZERO = ReplicatedZeroStorage(), PartitionedZeroStorage()


def storage_of(parameter: Tensor) -> Storage:
    """The storage of a parameter, as it is now: engines take parameters over when training begins."""
    if isinstance(parameter, DTensor):
        return _DTENSOR
    if is_partitioned(parameter):
        return _PARTITIONED_ZERO
    if has_cut_master(parameter):
        return _REPLICATED_ZERO
    return _PLAIN
