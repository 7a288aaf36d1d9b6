"""The distribution a block was initialised from, whatever the architecture.

A bare layer handed to `_init_weights` is a silent trap: T5, GPT-2 and ModernBERT choose the standard deviation in the
module *around* the layer, Switch Transformers in the one around all experts. So a fresh instance of the block's module
is initialised by the model's own initialiser, and then the modules around it, once, while a recorder notes which
elementwise random operations fill each parameter. Replaying them on `n` lines then draws `n` fresh neurons, at a cost
of `n` lines. An initialiser that is not elementwise (orthogonal, or a truncated normal by rejection) can't be replayed:
there, a fresh instance is built at every draw and its first lines are taken.
"""

import contextlib
import types
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_recycle.internals.of_torch import TorchDispatchMode, is_mutating, rebuilt
from hf_recycle.internals.of_transformers import INITIALIZED, initialize
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.neurons.slices import full_shape
from hf_recycle.neurons.storage.plain import whole

_aten = torch.ops.aten
# With the method that does the same and is called faster.
_DRAWS: dict[Any, Callable[..., Tensor]] = {
    _aten.normal_.default: Tensor.normal_,
    _aten.uniform_.default: Tensor.uniform_,
}
_FILLS: set[Any] = {_aten.zero_.default, _aten.fill_.Scalar}
_ADJUSTMENTS: set[Any] = {
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


class FreshModules:
    """Fresh instances of a model's modules, one at a time, and what their initialisation does.

    Args:
        model: the unwrapped model; only read, and not kept.
    """

    def __init__(self, model: nn.Module):
        # Weak: whoever keeps a distribution must not keep the whole model alive.
        self._model = weakref.ref(model)
        self._recorded: dict[str, dict[tuple[str, str], list[_Operation] | None]] = {}

    @property
    def model(self) -> nn.Module:
        """The model, as long as it lives."""
        model = self._model()
        assert model is not None, "whoever draws fresh weights keeps the model"
        return model

    def learn(self) -> None:
        """Learns what the modules are now: FSDP2 makes others of them, and ties them in another way."""
        _ = self._hollow

    @cached_property
    def _hollow(self) -> nn.Module:
        return _hollow_copy(self.model, {})

    def recipes(self, path: str) -> dict[tuple[str, str], list[_Operation] | None]:
        """How each parameter of the module at `path` is filled, by (path of its module within, its name).

        A list of operations, empty if nothing fills it; None if they can't be replayed. The experts of one module share
        the answer.
        """
        if path not in self._recorded:
            recorder = _Recorder()
            # On the CPU, not on the meta device: there some initialisers (torch's trunc_normal_) do nothing.
            with self.instance(path, recorder) as fresh:
                self._recorded[path] = {
                    (within, name): recorder.recipe(parameter)
                    for within, module in fresh.named_modules(remove_duplicate=False)
                    for name, parameter in module.named_parameters(recurse=False)
                }
        return self._recorded[path]

    @contextlib.contextmanager
    def instance(self, path: str, recorder: "_Recorder | None" = None, seed: int = 0):
        """What building the module at `path` anew gives: each layer's own constructor first, then the model's
        initialiser, children before parents. The global random state is left as it was."""
        fresh = self._hollow.get_submodule(path).to_empty(device="cpu")
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), recorder or contextlib.nullcontext():
                torch.manual_seed(seed)
                for submodule in fresh.modules():
                    if isinstance(submodule, Conv1D):
                        nn.init.normal_(submodule.weight, std=0.02)
                        nn.init.zeros_(submodule.bias)
                    elif callable(reset := getattr(submodule, "reset_parameters", None)):
                        reset()
                self._initialise(path, fresh)
            yield fresh
        finally:
            fresh.to_empty(device="meta")

    def _initialise(self, path: str, fresh: nn.Module) -> None:
        around = _upwards(path)
        owners = [
            module if isinstance(module, PreTrainedModel) else None
            for module in map(self._hollow.get_submodule, around)
        ]
        for position, place in enumerate(around):
            # In a composite model each part has its own initialiser.
            owner = next(filter(None, owners[position:]), None)
            if owner is None:
                return
            if position:
                initialize(owner, self._hollow.get_submodule(place))
            else:
                fresh.apply(partial(initialize, owner))


class InitialDistribution:
    """Draws fresh weights for the neurons of one block.

    Args:
        modules: those of the model that the block belongs to.
        block: the block.
    """

    def __init__(self, modules: FreshModules, block: FeedForward):
        holder = modules.model.get_submodule(block.holder)
        paths = {id(module): path for path, module in holder.named_modules()}
        self._block, self._modules = block, modules
        self._widths = {piece.role: () if piece.is_bias else (piece.width,) for piece in block.slices}
        self._places = {piece.role: (paths[id(piece.module)], piece.attribute) for piece in block.slices}
        recipes = modules.recipes(block.holder)
        self._recipes = {role: recipes[place] for role, place in self._places.items()}

    def sample(self, n: int, generator: torch.Generator, roles: Collection[str] | None = None) -> dict[str, Tensor]:
        """Fresh weights of `n` neurons, float32 on the CPU: `{role: (n, width)}`, biases `(n,)`.

        Args:
            roles: the slices to draw; all by default.

        Raises:
            ValueError: if nothing in the model initialises one of them.
        """
        roles = self._recipes.keys() if roles is None else roles
        recipes = {role: recipe for role in roles if (recipe := self._recipes[role]) is not None}
        for role, recipe in recipes.items():
            if not recipe:
                raise ValueError(
                    f"recycle_reinit: nothing in the model initialises {role!r} of {self._block.name}, so a fresh "
                    "neuron can't be drawn from its initial distribution; use recycle_reinit='copy_noise'."
                )
        if len(recipes) < len(roles):
            return self._sample_instance(n, generator, roles)
        drawn = {}
        for role, recipe in recipes.items():
            drawn[role] = torch.empty(n, *self._widths[role])
            for operation in recipe:
                operation.replay(drawn[role], generator)
        return drawn

    def _sample_instance(self, n: int, generator: torch.Generator, roles: Collection[str]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {role: [] for role in roles}
        for start in range(0, max(n, 1), self._block.num_neurons):
            seed = int(torch.randint(2**62, (), generator=generator))
            with self._modules.instance(self._block.holder, seed=seed) as fresh:
                for piece in self._block.slices:
                    path, name = self._places[piece.role]
                    if piece.role in parts:
                        [tile] = whole(piece, getattr(fresh.get_submodule(path), name))
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
        if is_mutating(function) and args and isinstance(args[0], Tensor):
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
        elif whole and plain and function in _ADJUSTMENTS and (known := self._operations.get(key)):
            known.append(operation)
        else:
            self._operations[key] = None

    def recipe(self, tensor: Tensor) -> list[_Operation] | None:
        """The operations that fill `tensor`; empty if none does, None if they can't be replayed."""
        return self._operations.get(_storage_key(tensor), [])


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _upwards(path: str) -> list[str]:
    """The path and those of the modules around it, the innermost first."""
    names = path.split(".") if path else []
    return [".".join(names[:depth]) for depth in range(len(names), -1, -1)]


def _hollow_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of `module` without its weights: every tensor on the meta device. What modules keep beside tensors is
    shared, but for hooks and functions, which may hold the model."""
    if id(module) in memo:
        return memo[id(module)]
    attributes = {
        name: value
        for name, value in vars(module).items()
        if name != INITIALIZED and not isinstance(value, types.FunctionType | types.MethodType | partial)
    }
    fresh = memo[id(module)] = rebuilt(
        module, attributes, partial(_hollow, memo=memo), partial(_hollow_copy, memo=memo)
    )
    return fresh


def _hollow(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        empty = torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty.float()) if is_parameter and tensor.is_floating_point() else empty
    return memo[id(tensor)]
