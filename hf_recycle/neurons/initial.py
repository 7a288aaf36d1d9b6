"""The distribution a block was initialised from, whatever the architecture.

A bare layer handed to `_init_weights` is a silent trap: T5, GPT-2 and ModernBERT choose the standard deviation in the
module *around* the layer. So a fresh instance of the block's own class is initialised by the model's own initialiser,
once, while a recorder notes which elementwise random operations fill each parameter. Replaying them on `n` lines then
draws `n` fresh neurons, at a cost of `n` lines. An initialiser that is not elementwise (orthogonal, or a truncated
normal by rejection) can't be replayed: there, a fresh instance is built at every draw and its first lines are taken.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_recycle.neurons.blocks import FeedForward, full_shape
from hf_recycle.neurons.storage.plain import whole

_aten = torch.ops.aten
# With the method that does the same and is called faster.
_DRAWS = {_aten.normal_.default: Tensor.normal_, _aten.uniform_.default: Tensor.uniform_}
_FILLS = {_aten.zero_.default, _aten.fill_.Scalar}
_ADJUSTMENTS = {
    _aten.mul_.Tensor,
    _aten.mul_.Scalar,
    _aten.add_.Tensor,
    _aten.add_.Scalar,
    _aten.erfinv_.default,
    _aten.clamp_.default,
}


@dataclass(frozen=True)
class _Operation:
    function: Callable
    arguments: tuple

    def replay(self, values: Tensor, generator: torch.Generator) -> None:
        draw = _DRAWS.get(self.function)
        if draw is not None:
            draw(values, *self.arguments, generator=generator)
        else:
            self.function(values, *self.arguments)


class InitialDistribution:
    """Draws fresh weights for the neurons of one block.

    Args:
        model: the unwrapped model the block belongs to; only read, and not kept.
        block: the block.
    """

    def __init__(self, model: nn.Module, block: FeedForward):
        owner = _owner(model, block.name)
        holder = model.get_submodule(block.name)
        paths = {id(module): path for path, module in holder.named_modules()}
        hollow = _hollow_copy(holder)
        recorder = _Recorder()
        # On the CPU, not on the meta device: there some initialisers (torch's trunc_normal_) do nothing.
        fresh = _fresh_instance(hollow, owner, recorder)
        self._block = block
        self._widths = {p.role: () if p.is_bias else (p.width,) for p in block.slices}
        self._recipes = {
            piece.role: recorder.recipe(getattr(fresh.get_submodule(paths[id(piece.module)]), piece.attribute))
            for piece in block.slices
        }
        if None in self._recipes.values():
            self._hollow, self._paths = hollow, paths
            # Weak: whoever keeps this distribution must not keep the whole model alive.
            self._owner = weakref.ref(owner) if owner is not None else lambda: None

    def sample(self, n: int, generator: torch.Generator, roles: Collection[str] | None = None) -> dict[str, Tensor]:
        """Fresh weights of `n` neurons, float32 on the CPU: `{role: (n, width)}`, biases `(n,)`.

        Args:
            roles: the slices to draw; all by default.

        Raises:
            ValueError: if nothing in the model initialises one of them.
        """
        roles = self._recipes.keys() if roles is None else roles
        for role in roles:
            if self._recipes[role] == []:
                raise ValueError(
                    f"recycle_reinit: nothing in the model initialises {role!r} of {self._block.name}, so a fresh "
                    "neuron can't be drawn from its initial distribution; use recycle_reinit='copy_noise'."
                )
        if any(self._recipes[role] is None for role in roles):
            return self._sample_instance(n, generator, roles)
        drawn = {}
        for role in roles:
            drawn[role] = torch.empty(n, *self._widths[role])
            for operation in self._recipes[role]:
                operation.replay(drawn[role], generator)
        return drawn

    def _sample_instance(self, n: int, generator: torch.Generator, roles: Collection[str]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {role: [] for role in roles}
        for start in range(0, max(n, 1), self._block.num_neurons):
            seed = int(torch.randint(2**62, (), generator=generator))
            fresh = _fresh_instance(self._hollow, self._owner(), seed=seed)
            for piece in self._block.slices:
                parameter = getattr(fresh.get_submodule(self._paths[id(piece.module)]), piece.attribute)
                if piece.role in parts:
                    [tile] = whole(piece, parameter)
                    lines = tile.values[: n - start].clone()
                    parts[piece.role].append(lines.squeeze(1) if piece.is_bias else lines)
        return {role: torch.cat(lines) for role, lines in parts.items()}


class _Recorder(TorchDispatchMode):
    """Notes the operations that write to each tensor, until something can't be replayed line by line."""

    def __init__(self):
        super().__init__()
        self._operations: dict[int, list[_Operation] | None] = {}
        self._shapes: dict[int, torch.Size] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.is_mutable and args and isinstance(args[0], Tensor):
            self._note(function, args[0], args[1:], kwargs or {})
        return result

    def _note(self, function, target: Tensor, arguments: tuple, kwargs: dict) -> None:
        key = _storage_key(target)
        whole = target.numel() * target.element_size() == target.untyped_storage().nbytes()
        plain = not any(isinstance(argument, Tensor) for argument in arguments)
        plain &= not {name for name, value in kwargs.items() if value is not None} - {"generator"}
        operation = _Operation(function, arguments)
        if whole and plain and function in {*_DRAWS, *_FILLS}:
            self._operations[key] = [operation]
        elif whole and plain and function in _ADJUSTMENTS and self._operations.get(key):
            self._operations[key].append(operation)
        else:
            self._operations[key] = None

    def recipe(self, tensor: Tensor) -> list[_Operation] | None:
        """The operations that fill `tensor`; empty if none does, None if they can't be replayed."""
        return self._operations.get(_storage_key(tensor), [])


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _owner(model: nn.Module, name: str) -> PreTrainedModel | None:
    """The innermost `PreTrainedModel` around a block: in a composite model each part has its own initialiser."""
    parts = name.split(".") if name else []
    paths = [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
    return next((m for m in map(model.get_submodule, paths) if isinstance(m, PreTrainedModel)), None)


def _hollow_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` without its weights: every tensor on the meta device."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty(full_shape(parameter), device="meta"))
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    fresh = copy.deepcopy(module, memo)
    for submodule in fresh.modules():
        # The flag says "loaded or initialised already", and makes the initialiser skip the module.
        submodule.__dict__.pop("_is_hf_initialized", None)
    return fresh


def _fresh_instance(
    hollow: nn.Module, owner: PreTrainedModel | None, recorder: "_Recorder | None" = None, seed: int = 0
) -> nn.Module:
    """What building the module anew gives: each layer's own constructor first, then the model's initialiser, children
    before parents; the global random state is left as it was."""
    fresh = copy.deepcopy(hollow).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), recorder or contextlib.nullcontext():
        torch.manual_seed(seed)
        for submodule in fresh.modules():
            if isinstance(submodule, Conv1D):
                nn.init.normal_(submodule.weight, std=0.02)
                nn.init.zeros_(submodule.bias)
            elif callable(getattr(submodule, "reset_parameters", None)):
                submodule.reset_parameters()
        if owner is not None:
            fresh.apply(owner._init_weights)
    return fresh
