"""`optim=muon`: Muon for the matrices in a model's layers and AdamW for everything else, as one optimizer.

Sources: K. Jordan et al., *Muon: An optimizer for hidden layers in neural networks* (2024). The scale of its steps,
with which learning rate and weight decay can stay those of AdamW: Liu et al., *Muon is Scalable for LLM Training*
(arXiv:2502.16982). The steps themselves are those of PyTorch.
"""

from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from hf_recycle.errors import UserError
from hf_recycle.neurons.layers import Layers

_OF_MUON = ("params", "lr", "weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")
_OF_ADAMW = ("params", "lr", "weight_decay", "betas", "eps", "fused")
_SCALES = ("match_rms_adamw", "original")


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some matrices, AdamW for the other parameters: one list of groups, one state, one `state_dict`.

    Args:
        params: parameters, or groups of them. A group that says `use_muon` is left as it is; others are split.
        lr, weight_decay: of both; weight decay is decoupled in both.
        betas, eps, fused: of AdamW.
        momentum, nesterov, ns_steps, adjust_lr_fn: of Muon, see `torch.optim.Muon`.
        hidden: the matrices that Muon gets.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        fused: bool = True,
        hidden: Collection[nn.Parameter] = (),
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "fused": fused,
            "use_muon": False,
        }
        super().__init__(_split(list(params), {id(parameter) for parameter in hidden}), defaults)

    @cached_property
    def _halves(self) -> tuple[tuple[bool, torch.optim.Optimizer, tuple[str, ...]], ...]:
        nothing = [torch.zeros(1, 1)]  # no optimizer is made without a parameter; each step brings its own
        return (True, torch.optim.Muon(nothing), _OF_MUON), (False, torch.optim.AdamW(nothing), _OF_ADAMW)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for use_muon, inner, names in self._halves:
            mine = [group for group in self.param_groups if group["use_muon"] == use_muon]
            inner.state = self.state
            inner.param_groups = [inner.defaults | {name: group[name] for name in names} for group in mine]
            inner.step()
        return loss


def _split(groups: list[Any], hidden: set[int]) -> list[dict[str, Any]]:
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    split = []
    for group in groups:
        if "use_muon" in group:
            split.append(group)
            continue
        parameters = list(group["params"])
        for use_muon in (True, False):
            mine = [parameter for parameter in parameters if (id(parameter) in hidden) == use_muon]
            if mine:
                split.append({**group, "params": mine, "use_muon": use_muon})
    return split


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices in a model's layers: neither embeddings, nor the head, nor what experts keep in 3-D."""
    layers = Layers(model)
    return [
        parameter
        for path, module in layers.modules.items()
        if layers.layer_of(path) and not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 2 and parameter.requires_grad
    ]


def muon_arguments(args: TrainingArguments, model: nn.Module) -> dict[str, Any]:
    """What a Trainer makes `MuonWithAdamW` with.

    Raises:
        UserError: for an option of `optim_args` that is unknown or has no allowed value; if no layer has a matrix.
    """
    hidden = hidden_matrices(model)
    if not hidden:
        raise UserError(
            f"optim=muon finds no matrix to train in a layer of {type(model).__name__}: it is for models that are a "
            "stack of layers; use optim=adamw_torch"
        )
    return {
        "hidden": hidden,
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **_options(args.optim_args),
    }


def _options(text: str | None) -> dict[str, Any]:
    known = {
        "momentum": (_number, "a number in [0, 1)"),
        "nesterov": ({"true": True, "false": False}.__getitem__, "true or false"),
        "ns_steps": (_count, "an integer from 1 to 99"),
        "adjust_lr_fn": (dict(zip(_SCALES, _SCALES, strict=True)).__getitem__, f"one of {', '.join(_SCALES)}"),
    }
    found = {}
    for word in (text or "").replace(" ", "").split(","):
        name, _, value = word.partition("=")
        if not word:
            continue
        if name not in known:
            raise UserError(f"optim_args={text!r}: muon has no option {name!r}, only {', '.join(known)}")
        read, allowed = known[name]
        try:
            found[name] = read(value.lower())
        except (KeyError, ValueError):
            raise UserError(f"optim_args={text!r}: {name} must be {allowed}") from None
    return found


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value < 100:
        raise ValueError
    return value
