"""How much memory a training needs, found out on shapes and on one small parameter."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_recycle.arguments import MUON
from hf_recycle.trainer.muon import hidden_matrices

_SAMPLE = 256  # side of a matrix: beside it, a table of the values of 8-bit codes is small


def optimizer_bytes(args: TrainingArguments, model: PreTrainedModel) -> int | None:
    """Bytes of state that the optimizer of these arguments keeps for a model; None if it can't be made by itself."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if args.optim == MUON:  # two moments by AdamW, one by Muon
        return 4 * (2 * trained - sum(matrix.numel() for matrix in hidden_matrices(model)))
    each = _optimizer_bytes_per_value(args)
    return None if each is None else round(each * trained)


def _optimizer_bytes_per_value(args: TrainingArguments) -> float | None:
    sample = nn.Parameter(torch.zeros(_SAMPLE, _SAMPLE))
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = cls([sample], **options)
        sample.grad = torch.ones_like(sample)
        optimizer.step()
        state = optimizer.state[sample].values()
    except Exception:  # of a package that is missing, for one device alone, or made for a whole model
        return None
    tensors = (part for value in state if isinstance(value, Tensor) for part in _parts(value))
    return sum(part.numel() * part.element_size() for part in tensors) / sample.numel()


def _parts(value: Tensor) -> list[Tensor]:
    """What a tensor is kept as: one in 8 bits is codes, scales and a table."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


def activation_bytes(
    model: PreTrainedModel, shape: tuple[int, int], *, head_share: float = 1, in_chunks: bool = False
) -> int | None:
    """Bytes that a forward pass keeps for the backward pass, at most; None if the model does not compute on shapes.

    Activations that are computed again in the backward pass are counted too.

    Args:
        model: as it is trained; on the meta device nothing is computed.
        shape: sequences and tokens of each.
        head_share: the share of the positions that what follows the base model is computed on.
        in_chunks: the output layer is computed in chunks: it keeps gradients of its input and weights, and no logits.
    """
    ids = torch.zeros(shape, dtype=torch.long, device=model.device)
    # Models of transformers look for padding among the values, of which shapes have none.
    padding, model.config.pad_token_id = model.config.pad_token_id, None
    try:
        whole, base = _Kept(model), _Kept(model)
        with base.counting():
            below = model.base_model(input_ids=ids)  # held until its tensors are counted
        with whole.counting():
            above = model(input_ids=ids, labels=ids)
    except Exception:  # it takes other inputs, or asks for values
        return None
    finally:
        model.config.pad_token_id = padding
    del below, above
    if in_chunks:
        head = model.get_output_embeddings()
        return base.bytes + 4 * (ids.numel() * head.in_features + sum(p.numel() for p in head.parameters()))
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
