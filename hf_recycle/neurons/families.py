"""Where each model family keeps the projections of its feed-forward blocks.

To add a family, add one entry to `FAMILIES`. The layers of a model whose type is not listed are matched against every
known layout, and failing that by shape (`hf_recycle.neurons.find`).
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
_QFORMER_LIKE = (*_BERT_LIKE, Layout(("intermediate_query.dense",), "output_query.dense"))
_T5_LIKE = (Layout(("wi",), "wo"), Layout(("wi_0", "wi_1"), "wo"))
_LLAMA_LIKE = (Layout(("gate_proj", "up_proj"), "down_proj"),)
_FUSED_LLAMA_LIKE = (Layout(("gate_up_proj",), "down_proj", fused=True),)
_NEOX_LIKE = (Layout(("dense_h_to_4h",), "dense_4h_to_h"),)
_BART_LIKE = (Layout(("fc1",), "fc2"),)
_GPT_LIKE = (Layout(("c_fc",), "c_proj"),)
_GPTJ_LIKE = (Layout(("fc_in",), "fc_out"),)
_FUSED_BART_LIKE = (Layout(("fc1",), "fc2", fused=True),)
_WAV2VEC_LIKE = (Layout(("intermediate_dense",), "output_dense"),)

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
    "gpt2": _GPT_LIKE,
    "gpt_bigcode": _GPT_LIKE,
    "gpt_neo": _GPT_LIKE,
    "starcoder2": _GPT_LIKE,
    "gptj": _GPTJ_LIKE,
    "codegen": _GPTJ_LIKE,
    "gpt_neox": _NEOX_LIKE,
    "falcon": _NEOX_LIKE,
    "bloom": _NEOX_LIKE,
    "opt": _BART_LIKE,
    "phi": _BART_LIKE,
    "bart": _BART_LIKE,
    "mbart": _BART_LIKE,
    "marian": _BART_LIKE,
    "pegasus": _BART_LIKE,
    "m2m_100": _BART_LIKE,
    "whisper": _BART_LIKE,
    "vit": _BART_LIKE,
    "clip": _BART_LIKE,
    "wav2vec2": _WAV2VEC_LIKE,
    "hubert": _WAV2VEC_LIKE,
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "phi3": _FUSED_LLAMA_LIKE,
    "glm": _FUSED_LLAMA_LIKE,
    "glm4": _FUSED_LLAMA_LIKE,
    "nemotron": (Layout(("up_proj",), "down_proj"),),
    "lfm2": (Layout(("w1", "w3"), "w2"),),
    "moonshine": (*_BART_LIKE, *_FUSED_BART_LIKE),
    "moshi": _FUSED_BART_LIKE,
    "kyutai_speech_to_text": _FUSED_BART_LIKE,
    "clvp": (Layout(("fc1.proj",), "fc2", fused=True), *_GPT_LIKE),
    "blip_2_qformer": _QFORMER_LIKE,
    "instructblip_qformer": _QFORMER_LIKE,
    "instructblipvideo_qformer": _QFORMER_LIKE,
    "lilt": (*_BERT_LIKE, Layout(("layout_intermediate.dense",), "layout_output.dense")),
    "lxmert": (
        *_BERT_LIKE,
        Layout(("lang_inter.dense",), "lang_output.dense"),
        Layout(("visn_inter.dense",), "visn_output.dense"),
    ),
    "granitemoeshared": (Layout(("input_linear",), "output_linear", fused=True),),
    "granitemoehybrid": (Layout(("input_linear",), "output_linear", fused=True),),
    "perceiver": (Layout(("dense1",), "dense2"),),
    "timesfm": (Layout(("gate_proj",), "down_proj"),),
    "poolformer": (Layout(("output.conv1",), "output.conv2"),),
    "mobilevitv2": (Layout(("ffn.conv1.convolution",), "ffn.conv2.convolution"),),
    "squeezebert": (Layout(("intermediate.conv1d",), "output.conv1d"),),
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
