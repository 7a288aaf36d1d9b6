"""The numbers of the page on scaling."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_recycle import find_feed_forwards
from hf_recycle.neurons.table import BlockState

DOCS = Path(__file__).parents[2] / "docs"
_SPEC = importlib.util.spec_from_file_location("scaling_numbers", DOCS / "scaling_numbers.py")
scaling = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(scaling)


def test_the_page_on_scaling_has_the_numbers_of_its_script():
    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert scaling.renew(text) == text, "renew it with: python docs/scaling_numbers.py docs/scaling.md"


@pytest.mark.parametrize("shape", scaling.MODELS, ids=lambda shape: shape.title)
def test_the_shapes_are_those_of_the_models(shape):
    heads = shape.d_model // 64
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=shape.key_value_width // 64,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    blocks = find_feed_forwards(model)
    assert sum(block.num_neurons for block in blocks) == shape.neurons
    assert sum(p.numel() for block in blocks for p in block.parameters()) == shape.ff_weights


def test_the_state_of_a_neuron_takes_what_the_page_says():
    state = BlockState.fresh(10)
    assert sum(values.nbytes for values in vars(state).values() if values is not None) == 25 * 10


def test_sizes_for_people():
    assert [scaling.size(n) for n in (999, 1000, 999_600, 1.5e9, 2e15)] == [
        "999 B",
        "1 kB",
        "1 MB",
        "1.5 GB",
        "2e+03 TB",
    ]
