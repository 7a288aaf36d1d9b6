"""Where each model family keeps the projections of its feed-forward blocks.

To add a family, add one entry to `FAMILIES`. A model whose type is not listed is matched against every known layout,
and failing that by shape (`hf_recycle.neurons.find`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Paths of a block's linear layers, relative to a module that holds them all.

    Attributes:
        ins: the in-projection; two paths for a gated block that keeps its two halves apart.
        out: the out-projection.
        fused: one in-projection of `2 * d_ff` rows holds both halves of a gated block: neuron *i* is rows *i* and
            *i + d_ff*.
    """

    ins: tuple[str, ...]
    out: str
    fused: bool = False

    @property
    def gated(self) -> bool:
        return self.fused or len(self.ins) == 2

    def __str__(self) -> str:
        return f"{'fused:' if self.fused else ''}{' + '.join(self.ins)} -> {self.out}"


_BERT_LIKE = (Layout(("intermediate.dense",), "output.dense"),)
_T5_LIKE = (Layout(("wi",), "wo"), Layout(("wi_0", "wi_1"), "wo"))
_LLAMA_LIKE = (Layout(("gate_proj", "up_proj"), "down_proj"),)

FAMILIES: dict[str, tuple[Layout, ...]] = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "roberta-prelayernorm": _BERT_LIKE,
    "xlm-roberta": _BERT_LIKE,
    "camembert": _BERT_LIKE,
    "electra": _BERT_LIKE,
    "deberta": _BERT_LIKE,
    "deberta-v2": _BERT_LIKE,
    "mpnet": _BERT_LIKE,
    "esm": _BERT_LIKE,
    "distilbert": (Layout(("lin1",), "lin2"),),
    "albert": (Layout(("ffn",), "ffn_output"),),
    "modernbert": (Layout(("Wi",), "Wo", fused=True),),
    "t5": _T5_LIKE,
    "mt5": _T5_LIKE,
    "gpt2": (Layout(("c_fc",), "c_proj"),),
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
}


def known_layouts() -> tuple[Layout, ...]:
    """Every layout of every family, each once."""
    return tuple(dict.fromkeys(layout for layouts in FAMILIES.values() for layout in layouts))


def parse_layout(pattern: str) -> Layout:
    """Reads a user's layout: `"fc1 -> fc2"`, `"gate + up -> down"` or `"fused:Wi -> Wo"`.

    Raises:
        ValueError: if the pattern has another form.
    """
    text = pattern.strip()
    fused = text.startswith("fused:")
    left, arrow, out = text.removeprefix("fused:").partition("->")
    ins = tuple(part.strip() for part in left.split("+"))
    if not arrow or not out.strip() or not all(ins) or len(ins) > (1 if fused else 2):
        raise ValueError(
            f"ff_pattern={pattern!r} must have the form 'in -> out', 'gate + up -> out' or 'fused:in -> out', "
            "with paths of linear layers as model.named_modules() spells them."
        )
    return Layout(ins, out.strip(), fused)
