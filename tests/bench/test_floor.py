"""The counted step against real models: torch's counter of operations, their tensors, their optimizer's state."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)

from benchmarks import floor
from benchmarks.floor import Step
from hf_recycle.mlm.heads import find_masked_head

PAGE = Path(__file__).parents[2] / "docs" / "floor.md"


@dataclass(frozen=True)
class Encoder:
    """A family, and the names in it of the linear layers of each part."""

    model: type
    config: type
    gated: bool
    parts: dict[str, tuple[str, ...]]

    def build(self, step: Step, heads: int) -> nn.Module:
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
        config = self.config(
            vocab_size=step.vocabulary,
            hidden_size=step.d_model,
            intermediate_size=step.d_ff,
            num_hidden_layers=step.layers,
            num_attention_heads=heads,
            max_position_embeddings=step.sequence + 2,
            **special,
        )
        config._attn_implementation = "eager"  # torch's counter does not know every fused attention of the CPU
        return self.model(config)


BERT_PARTS = {
    "attention projections": ("query", "key", "value", "attention.output.dense"),
    "feed-forward": ("intermediate.dense", "[0-9].output.dense"),
    "head transform": ("transform.dense", "lm_head.dense"),
    "decoder": ("decoder",),
}
MODERN_PARTS = {
    "attention projections": ("Wqkv", "attn.Wo"),
    "feed-forward": ("mlp.Wi", "mlp.Wo"),
    "head transform": ("head.dense",),
    "decoder": ("decoder",),
}
ENCODERS = [
    Encoder(BertForMaskedLM, BertConfig, False, BERT_PARTS),
    Encoder(RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormConfig, False, BERT_PARTS),
    Encoder(ModernBertForMaskedLM, ModernBertConfig, True, MODERN_PARTS),
]
every_encoder = pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder.config.model_type)


@st.composite
def steps(draw, gated: bool) -> tuple[Step, int]:
    """A step of small, odd shape, and a number of attention heads."""
    heads = draw(st.integers(1, 3))
    batch, sequence = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    step = Step(
        layers=draw(st.integers(1, 3)),
        d_model=heads * 2 * draw(st.integers(1, 5)),
        d_ff=draw(st.integers(1, 23)),
        vocabulary=draw(st.integers(5, 40)),
        batch=batch,
        sequence=sequence,
        masked_share=draw(st.integers(1, batch * sequence)) / (batch * sequence),
        gated=gated,
    )
    return step, heads


class Run:
    """A forward and a backward pass of a real model, with the tensors and operations that were seen."""

    def __init__(self, encoder: Encoder, step: Step, heads: int, masked_head: bool) -> None:
        self.model = encoder.build(step, heads)
        self.linear = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)}
        self.entering: dict[str, torch.Tensor] = {}
        self.leaving: dict[str, torch.Tensor] = {}
        self._names = {layer: name for name, layer in self.linear.items()}
        ids = torch.randint(1, step.vocabulary, (step.batch, step.sequence))
        positions = torch.randperm(step.tokens)[: step.masked_tokens]
        head = find_masked_head(self.model)
        # For all modules at once: hooks of the model's own would be a user's, who gets whole activations.
        watching = register_module_forward_hook(self._keep)
        with head.at(positions) if masked_head else nullcontext():
            with FlopCounterMode(display=False) as forward:
                self.logits = self.model(input_ids=ids).logits
            with FlopCounterMode(display=False) as backward:
                self.logits.sum().backward()
        watching.remove()
        self.by_module = {name: sum(operations.values()) for name, operations in forward.get_flop_counts().items()}
        # The angles of rotary position embeddings are a product too, with a factor of width one.
        angles = sum(count for name, count in self.by_module.items() if name.endswith("rotary_emb"))
        self.forward, self.backward = forward.get_total_flops() - angles, backward.get_total_flops()

    def _keep(self, module, args, output):
        if module in self._names:
            name = self._names[module]
            self.entering[name], self.leaving[name] = args[0].detach(), output.detach()

    def named(self, endings: tuple[str, ...]) -> list[str]:
        """The linear layers whose names end so; a digit stands for any layer's number."""
        ends = tuple(ending.replace("[0-9]", str(digit)) for ending in endings for digit in range(3))
        return [name for name in self.linear if name.endswith(ends)]


@every_encoder
@given(data=st.data(), masked_head=st.booleans())
@settings(max_examples=10)
def test_operations_are_those_that_torch_counts(encoder, data, masked_head):
    step, heads = data.draw(steps(encoder.gated))
    run = Run(encoder, step, heads, masked_head)
    counted = floor.matrix_product_flops(step, masked_head=masked_head)
    root = type(run.model).__name__
    parts = {
        part: sum(run.by_module[f"{root}.{name}"] for name in run.named(endings))
        for part, endings in encoder.parts.items()
    }
    parts["attention scores and values"] = run.forward - sum(parts.values())
    assert counted == {part: 3 * operations for part, operations in parts.items()}
    assert sum(counted.values()) == run.forward + run.backward


@every_encoder
@given(data=st.data(), masked_head=st.booleans())
@settings(max_examples=10)
def test_tensors_are_those_of_the_model(encoder, data, masked_head):
    step, heads = data.draw(steps(encoder.gated))
    run = Run(encoder, step, heads, masked_head)
    weights = floor.matrix_weights(step)
    for part, endings in encoder.parts.items():
        assert weights[part] == sum(run.linear[name].weight.numel() for name in run.named(endings))

    # Queries, keys, values and, when gated, both halves of the hidden values leave a linear layer; the rest enters one.
    leaving = [run.leaving[name] for name in run.named(("query", "key", "value", "Wqkv", "mlp.Wi"))]
    entering = [tensor for name, tensor in run.entering.items() if not name.endswith("mlp.Wo")]
    kept = {(tensor.data_ptr(), tensor.shape): tensor.numel() for tensor in leaving + entering}
    assert floor.stored_activations(step, masked_head=masked_head) == sum(kept.values())

    optimizer = torch.optim.AdamW([layer.weight for layer in run.linear.values()])
    optimizer.step()
    moments = sum(s[name].numel() for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    total, logits = sum(weights.values()), run.logits.numel()
    traffic = floor.memory_traffic(step, masked_head=masked_head)
    assert sum(traffic.values()) == 4 * sum(
        [
            total + total + total,  # forward, backward, gradients
            2 * sum(kept.values()),
            2 * (logits + logits),  # logits and their gradient, each written and read
            total + total + moments,  # AdamW reads
            total + moments,  # AdamW writes
        ]
    )


@given(data=st.data(), masked_head=st.booleans(), gated=st.booleans())
def test_narrow_numbers_change_what_the_products_touch_and_not_the_optimizer(data, masked_head, gated):
    step, _ = data.draw(steps(gated))
    wide, narrow = (floor.memory_traffic(step, masked_head=masked_head, element_size=size) for size in (4, 2))
    same = {part for part in wide if narrow[part] == wide[part]}
    assert same == {"gradients of weights written", "AdamW"}
    assert all(2 * narrow[part] == wide[part] for part in wide.keys() - same)


@given(data=st.data(), gated=st.booleans())
def test_masking_every_token_makes_the_heads_equal(data, gated):
    step = replace(data.draw(steps(gated))[0], masked_share=1)
    for count in (floor.matrix_product_flops, floor.memory_traffic):
        assert count(step, masked_head=True) == count(step, masked_head=False)


def test_the_tables_say_how_many_times_the_full_head_is_the_masked_one():
    rows = [line.split("|")[2:-1] for line in floor.floor_tables().splitlines() if line.startswith("| full / masked")]
    for cells, count in zip(rows, (floor.matrix_product_flops, floor.memory_traffic), strict=True):
        ratios = [
            sum(count(step, masked_head=False).values()) / sum(count(step, masked_head=True).values())
            for step in floor.STEPS.values()
        ]
        assert [cell.strip() for cell in cells] == ["", f"{ratios[0]:.2f}", "", f"{ratios[1]:.2f}"]
    assert rows[0][1].strip() == "1.57"  # worked out elsewhere, for BERT Medium


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"d_ff": 0}, "d_ff=0"), ({"masked_share": 0}, "masked_share=0"), ({"masked_share": 1.5}, "masked_share=1.5")],
)
def test_impossible_shapes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(floor.STEPS["BERT Medium"], **wrong)


def test_the_page_shows_what_the_command_prints():
    text = PAGE.read_text(encoding="utf-8")
    assert floor.renew(text) == text, "renew it with: python -m benchmarks.floor docs/floor.md"
    command = [sys.executable, "-m", "benchmarks.floor"]
    assert subprocess.run(command, capture_output=True, check=True).stdout.decode() in text
