"""What torch keeps to itself (seen in torch 2.13)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The way to watch every operation that `torch.testing` and the extension guide use; no public module has it.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


# ---- Tensors and operations ----


def version_of(tensor: Tensor) -> int:
    """How many times the tensor was changed in place. A view's changes count for what it is a view of."""
    return tensor._version


def is_mutating(operation: Any) -> bool:
    """Whether an operation of ATen, as `__torch_dispatch__` gets it, changes one of its arguments."""
    return operation._schema.is_mutable


def assert_on_device(condition: Tensor, message: str) -> None:
    """Raises unless `condition`, a boolean scalar, is true; an accelerator does it later, so that nobody waits for it.

    Raises:
        RuntimeError: with `message`, on the CPU; as an error of the device elsewhere.
    """
    torch._assert_async(condition, message)


def linear_by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`rows` `(m, k)` @ `weight` `(n, k)`.T + `bias` `(n,)`: float32 `(m, n)`, without autograd. The operation that
    `torch.compile` makes linear layers of on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def may_be_dynamic(tensor: Tensor, dimension: int) -> None:
    """Lets compiled code take any size of a dimension from the first call on, where it can."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


# ---- Autograd ----


def is_in_backward() -> bool:
    """Whether this thread computes a backward pass just now: hooks of the forward pass run in it where checkpointing
    computes again."""
    return torch._C._current_graph_task_id() != -1


def keeps_saved_tensors() -> bool:
    """Whether what is saved for the backward pass is kept as it is, and hooks may change that."""
    autograd = torch._C._autograd
    enabled = autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return enabled and autograd._top_saved_tensors_default_hooks(True) is None


def transforms_are_active() -> bool:
    """Whether the code runs under a transform of `torch.func` (vmap, grad, ...)."""
    return torch._C._are_functorch_transforms_active()


def saved_input(node: Any) -> Tensor:
    """The input that a node of the graph (`GeluBackward0`, `SiluBackward0`) keeps for its derivative."""
    return node._saved_self


def saved_approximation(node: Any) -> str:
    """The `approximate` that a `GeluBackward0` was computed with."""
    return node._saved_approximate


# ---- Modules ----


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks before and behind the forward pass of `module` itself."""
    return _hooks([module], _FORWARD_HOOKS)


def all_hooks(modules: Iterable[nn.Module]) -> list[Callable[..., Any]]:
    """The hooks of the forward and the backward pass of all these modules."""
    return _hooks(modules, _FORWARD_HOOKS + _BACKWARD_HOOKS)


def _hooks(modules: Iterable[nn.Module], kinds: tuple[str, ...]) -> list[Callable[..., Any]]:
    return [hook for module in modules for kind in kinds for hook in getattr(module, kind).values()]


def rebuilt(
    module: nn.Module,
    attributes: Mapping[str, Any],
    tensor: Callable[[Tensor], Tensor],
    child: Callable[[nn.Module], nn.Module],
) -> nn.Module:
    """A module of the class of `module` (of the one that FSDP2 has made its own of), made without its constructor and
    without hooks.

    `copy.deepcopy` would copy all that modules keep beside tensors, which may be anything.

    Args:
        attributes: what it has beside tensors and children.
        tensor: its parameters and buffers, from those of `module`.
        child: its children, from those of `module`.
    """
    cls = module.__class__
    cls = cls.__mro__[getattr(cls, "_orig_cls_mro_index", 0)]
    fresh = cls.__new__(cls)
    fresh.__dict__.update({name: {} if name.endswith("_hooks") else value for name, value in attributes.items()})
    for kind, make in (("_parameters", tensor), ("_buffers", tensor), ("_modules", child)):
        # Names without a value stay: a layer without a bias has the name "bias".
        values = vars(module)[kind].items()
        fresh.__dict__[kind] = {name: None if value is None else make(value) for name, value in values}
    return fresh
