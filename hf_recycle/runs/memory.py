"""How much memory a training needs, found out on shapes and on one small parameter."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel, Trainer, TrainingArguments

_SAMPLE = 64  # side of a matrix


def optimizer_bytes_per_value(args: TrainingArguments) -> float | None:
    """Bytes of state that the optimizer of these arguments keeps for each value it trains; None if it can't be made by
    itself."""
    sample = nn.Parameter(torch.zeros(_SAMPLE, _SAMPLE))
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = cls([sample], **options)
        sample.grad = torch.ones_like(sample)
        optimizer.step()
        state = optimizer.state[sample].values()
    except Exception:  # of a package that is missing, for one device alone, or made for a whole model
        return None
    return sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor)) / sample.numel()


def activation_bytes(model: PreTrainedModel, shape: tuple[int, int], *, head_share: float = 1) -> int | None:
    """Bytes that a forward pass keeps for the backward pass, at most; None if the model does not compute on shapes.

    Args:
        model: as it is trained; on the meta device nothing is computed.
        shape: sequences and tokens of each.
        head_share: the share of the positions that what follows the base model is computed on.
    """
    ids = torch.zeros(shape, dtype=torch.long, device=model.device)
    try:
        whole, base = _Kept(model), _Kept(model)
        with base.counting():
            below = model.base_model(input_ids=ids)  # held until its tensors are counted
        with whole.counting():
            above = model(input_ids=ids, labels=ids)
    except Exception:  # it takes other inputs, or asks for values
        return None
    del below, above
    return round(base.bytes + head_share * (whole.bytes - base.bytes))


class _Kept:
    """Counts what autograd keeps beside the parameters, every storage once."""

    def __init__(self, model: nn.Module):
        self._seen = {StorageWeakRef(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
        self.bytes = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        with saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (reference := StorageWeakRef(storage)) not in self._seen:
            self._seen.add(reference)
            self.bytes += storage.nbytes()
        return tensor
