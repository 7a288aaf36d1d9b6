"""The masked language modelling head, computed on the masked positions only.

A head maps every hidden state to logits over the whole vocabulary, and the loss then ignores about 85% of
them. It works position by position, so it can as well be given the masked positions alone: the loss and the
gradients are the same, the work a sixth. A forward pre-hook on the head's first module does that without
touching the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_recycle.mlm.last_feed_forward import LastFeedForward, find_last_feed_forward
from hf_recycle.mlm.plain_loss import comes_with_a_library, has_known_forward
from hf_recycle.speed.host_memory import give_back_freed_memory
from hf_recycle.utils.hooks import PassingHook, registered

HEADS: dict[str, str] = {
    "albert": "predictions",
    "bert": "cls",
    "big_bird": "cls",
    "camembert": "lm_head",
    "convbert": "generator_predictions",
    "data2vec-text": "lm_head",
    "deberta": "cls",
    "deberta-v2": "cls",
    "distilbert": "vocab_transform",
    "electra": "generator_predictions",
    "ernie": "cls",
    "esm": "lm_head",
    "esmc": "lm_head",
    "eurobert": "lm_head",
    "flaubert": "pred_layer",
    "fnet": "cls",
    "gte": "lm_head",
    "ibert": "lm_head",
    "jina_embeddings_v3": "lm_head",
    "layoutlm": "cls",
    "longformer": "lm_head",
    "megatron-bert": "cls",
    "mobilebert": "cls",
    "modernbert": "head",
    "mpnet": "lm_head",
    "nomic_bert": "cls",
    "nystromformer": "cls",
    "rembert": "cls",
    "roberta": "lm_head",
    "roberta-prelayernorm": "lm_head",
    "roc_bert": "cls",
    "roformer": "cls",
    "squeezebert": "cls",
    "tapas": "cls",
    "xlm": "pred_layer",
    "xlm-roberta": "lm_head",
    "xlm-roberta-xl": "lm_head",
    "xmod": "lm_head",
    "yoso": "cls",
}
"""`config.model_type` to the dotted path of the first module of the head. From that module to the logits the
forward must be position-wise and call the module with the hidden states as first positional argument; so must
what lies between the last feed-forward block and it."""

_PAD_INSIDE = {"big_bird", "longformer"}
"""Families whose layers see longer sequences than their head, padded to whole blocks or windows of attention: positions
of the one are none of the other."""


class _KeepPositions:
    """Forward pre-hook that keeps the hidden states at `positions`, or does nothing while that is None.

    It knows nothing of the model, so it keeps none alive, and a copied or pickled model gets an idle hook.
    """

    def __init__(self) -> None:
        self.positions: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        if self.positions is None:
            return None
        hidden, *rest = args
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            give_back_freed_memory(hidden.device)
        return (hidden.flatten(0, -2).index_select(0, self.positions), *rest)

    def __reduce__(self) -> tuple:
        return type(self), ()


class MaskedHead:
    """Restricts the head that starts with `module` to chosen positions, and the last feed-forward block if one is
    given."""

    def __init__(self, module: nn.Module, feed_forward: LastFeedForward | None = None) -> None:
        self._keep = _KeepPositions()
        self._feed_forward = feed_forward
        self._hooks = [PassingHook(module, self._keep), *(feed_forward.hooks if feed_forward is not None else ())]
        self._attached = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the context, the hooks are on the model, idle outside `at`: for a backward pass that computes parts of
        the forward pass again, as with gradient checkpointing. Copies made outside have no hooks."""
        if self._attached:
            yield
            return
        self._attached = True
        try:
            with registered(self._hooks):
                yield
        finally:
            self._attached = False

    @contextmanager
    def at(self, positions: torch.Tensor, padding: torch.Tensor | None = None) -> Iterator[None]:
        """Within the context, the head sees the hidden states at `positions` only.

        Args:
            positions: int64 `(n,)`, indices into the flattened `(batch * sequence)`, on the model's device.
                n may be 0: the logits are then `(0, vocabulary)` and the backward pass gives zero gradients.
                They are unique, but for padding.
            padding: bool `(n,)`, true where a position is there only to fill up, and its logits are not used.

        `model(**inputs_without_labels).logits` is `(n, vocabulary)` there; labels must not be given, for
        they no longer match. Hidden states behind the last feed-forward block mean nothing at other positions.
        Outside the context the model is as it was.
        """
        with self.attached():
            self._set(positions, padding)
            try:
                yield
            finally:
                self._set(None, None)

    def _set(self, positions: torch.Tensor | None, padding: torch.Tensor | None) -> None:
        self._keep.positions = positions
        if self._feed_forward is not None:
            self._feed_forward.set(positions, padding)


def find_masked_head(model: nn.Module) -> MaskedHead | None:
    """A `MaskedHead` on the (unwrapped) masked language model, or None where its head is not known to be
    position-wise: a family that is not in `HEADS`, another kind of model, a class with a forward of its own, or a head
    with a module of the user's in it."""
    kind = getattr(getattr(model, "config", None), "model_type", None) or ""
    path = HEADS.get(kind)
    if path is None or not has_known_forward(model):
        return None
    try:
        first = model.get_submodule(path)
    except AttributeError:  # a variant of the family built otherwise, such as DeBERTa with `legacy=False`
        return None
    if not all(map(comes_with_a_library, first.modules())):
        return None
    alike = kind not in _PAD_INSIDE
    return MaskedHead(first, find_last_feed_forward(model) if alike else None)
