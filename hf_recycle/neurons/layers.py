"""Which layer of a model a module lies in, and whether its name or class says that it mixes tokens or neurons."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache

from torch import nn

from hf_recycle.neurons.linear import is_linear

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|(^|_)ff($|_|\d)|experts?$|intermediate", re.IGNORECASE)
_BESIDE = re.compile(r"(^|\.)\d+\..*(norm|router|adapter_module)")
_MIXER = re.compile(r"attn|attention|mixer|mamba|ssm|rwkv|recurrent|(^|_)att($|_)|linear_?rnn|ssd", re.IGNORECASE)


class Layers:
    """The layers of a model: the elements of its lists of modules of one class.

    Attributes:
        modules: every module by its path, in the model's own order; without those in whose place a PEFT adapter trains
            others.
    """

    def __init__(self, model: nn.Module):
        named = model.named_modules()
        self.modules = {path: module for path, module in named if "original_module" not in path.split(".")}
        self._lists = {path for path, module in self.modules.items() if _is_list_of_layers(module)}
        self._layers: dict[str, str] = {}
        for path, module in self.modules.items():
            parent = path.rpartition(".")[0]
            is_layer = path and parent in self._lists and any(module.children())
            self._layers[path] = path if is_layer else self._layers.get(parent, "")
        self._roles: dict[str, str | None] = {}

    def __bool__(self) -> bool:
        return bool(self._lists)

    def layer_of(self, path: str) -> str:
        """The path of the innermost layer that a module is or lies in; "" outside of them."""
        while path not in self._layers:  # shared, or inside of what PEFT has put around a module
            path = path.rpartition(".")[0]
        return self._layers[path]

    def within_one(self, paths: Iterable[str]) -> bool:
        """Whether some modules lie in one layer, or together in a part of the model that has no layers: what is made of
        embeddings and a head, or of two layers, is no block."""
        paths = list(paths)
        [layer, *others] = {self.layer_of(path) for path in paths}
        if others:
            return False
        parent = common_parent(paths)
        return bool(layer) or not any(path == parent or _is_inside(path, parent) for path in self._lists)

    def mixes_tokens(self, path: str) -> bool:
        """Whether a module belongs to attention, a state-space mixer or the like, by the innermost name or class within
        its layer that tells."""
        layer = self.layer_of(path)
        while path != layer:
            if role := self._role(path):
                return role == "mixer"
            path = path.rpartition(".")[0]
        return False

    def is_mixer(self, path: str) -> bool:
        """Whether the name or class of this very module says that it mixes tokens."""
        return self._role(path) == "mixer"

    def is_feed_forward(self, path: str) -> bool:
        """Whether the name or class of this very module says that it is a feed-forward block, or a part of one."""
        return self._role(path) == "feed-forward"

    def _role(self, path: str) -> str | None:
        if path not in self._roles:
            # The class first: hybrids call all the parts that layers may have by one name.
            texts = type(self.modules[path]).__name__, path.rpartition(".")[2]
            self._roles[path] = next(filter(None, map(role_of_name, texts)), None)
        return self._roles[path]

    def children(self, path: str) -> Iterator[str]:
        """Paths of a module's children."""
        for name, _ in self.modules[path].named_children():
            child = f"{path}.{name}" if path else name
            if child in self.modules:  # a shared module has one path only
                yield child


def lies_beside(path: str) -> bool:
    """Whether a module lies in a norm, a router or an adapter of a layer, whose linear layers are no block of it."""
    return _BESIDE.search(path) is not None


@cache
def role_of_name(text: str) -> str | None:
    """ "feed-forward", "mixer" or None: what the name of a class or a module says that it does."""
    if _FEED_FORWARD.search(text):
        return "feed-forward"
    return "mixer" if _MIXER.search(text) else None


def _is_list_of_layers(module: nn.Module) -> bool:
    """Two elements of one class, or a single one, but in an nn.Sequential, which may be how a block is written."""
    if not isinstance(module, _CONTAINERS):
        return False
    inner = [child for child in module.children() if any(child.children()) and any(map(is_linear, child.modules()))]
    classes = Counter(map(type, inner))
    alone = len(inner) == len(module) == 1 and not isinstance(module, nn.Sequential)
    return alone or max(classes.values(), default=0) > 1


def _is_inside(path: str, parent: str) -> bool:
    return not parent or path.startswith(f"{parent}.")


def common_parent(paths: Iterable[str]) -> str:
    """The path that some paths have in common."""
    common = []
    for names in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)
