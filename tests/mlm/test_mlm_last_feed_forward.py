"""The last feed-forward block at the masked positions only, against the model as it is. That every family in the
table of heads gives the same loss and gradients is tested with the heads."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForMaskedLM

from hf_recycle.mlm.heads import find_masked_head
from hf_recycle.mlm.loss import padded_positions, target_positions

VOCABULARY = 41
WHERE = {"bert": "bert.encoder.layer", "distilbert": "distilbert.transformer.layer", "modernbert": "model.layers"}
DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "distilbert": {"dropout": 0.3, "attention_dropout": 0.3},
    "modernbert": {"embedding_dropout": 0.3, "attention_dropout": 0.3},
}


def tiny_model(model_type: str, **overrides) -> torch.nn.Module:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    if model_type == "distilbert":
        shape = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        **{**shape, **(special if model_type == "modernbert" else {}), **DROPOUT[model_type], **overrides},
    )
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(config).double().train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (3, 12); the very first token is masked."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (3, 12), generator=generator)
    masked = torch.rand(3, 12, generator=generator) < 0.3
    masked[0, 0] = True
    return ids, torch.where(masked, ids, -100)


def backward(model, logits, targets) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=-100)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def full(model):
    ids, labels = batch()
    torch.manual_seed(2)
    return backward(model, model(input_ids=ids).logits, labels)


def restricted(model, head, size: int | None = None):
    """With `size`, padded to so many positions."""
    ids, labels = batch()
    positions, targets = target_positions(labels), labels[labels != -100]
    if size is not None:
        positions, targets = padded_positions(labels, size)
    torch.manual_seed(2)
    with head.attached():
        with head.at(positions, None if size is None else targets == -100):
            logits = model(input_ids=ids).logits
        return backward(model, logits, targets)


def assert_same(left, right):
    torch.testing.assert_close(left[0], right[0], rtol=1e-6, atol=1e-6)
    for name, gradient in right[1].items():
        torch.testing.assert_close(left[1][name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def watched(forward, shapes):
    def note(hidden):
        shapes.append(hidden.shape)
        return forward(hidden)

    return note


@pytest.mark.parametrize("model_type", WHERE)
def test_only_masked_positions_and_the_same_dropout(model_type, monkeypatch):
    model = tiny_model(model_type)
    reference = full(model)
    head = find_masked_head(model)
    shapes = []
    for layer in model.get_submodule(WHERE[model_type]):
        linear = next(m for m in layer.modules() if getattr(m, "out_features", 0) in (20, 40) and m.in_features == 16)
        monkeypatch.setattr(linear, "forward", watched(linear.forward, shapes))
    assert_same(restricted(model, head), reference)
    count = int((batch()[1] != -100).sum())
    assert shapes == [(3, 12, 16), (count, 16)]
    assert_same(full(model), reference)
    assert shapes[2:] == [(3, 12, 16)] * 2


def test_padding_adds_nothing():
    """It points to position 0, which is masked itself."""
    model = tiny_model("bert")
    reference = full(model)
    assert_same(restricted(model, find_masked_head(model), size=20), reference)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "whole layers"])
def test_what_gradient_checkpointing_computes_again_is_the_same(how):
    model = tiny_model("bert")
    reference = full(model)
    head = find_masked_head(model)
    if how == "whole layers":
        layers = model.bert.encoder.layer
        for number, layer in enumerate(layers):
            layers[number] = checkpoint_wrapper(layer)
        result = restricted(model, head)
        gradients = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in result[1].items()}
        assert_same((result[0], gradients), reference)
    else:
        model.activation_checkpointing_enable({"use_reentrant": how == "reentrant"})
        assert_same(restricted(model, head), reference)
        assert_same(full(model), reference)  # not what an earlier forward pass computed


def test_behind_the_context_a_part_of_the_model_is_as_it_was():
    model = tiny_model("bert").eval()
    ids, _ = batch()
    layer, hidden = model.bert.encoder.layer[-1], torch.randn(2, 5, 16, dtype=torch.float64)
    before = model.bert(ids).last_hidden_state, layer.output.dense(layer.intermediate(hidden))
    restricted(model, find_masked_head(model))
    # First the block by itself, with no forward pass of the model in between.
    after = layer.output.dense(layer.intermediate(hidden)), model.bert(ids).last_hidden_state
    assert torch.equal(after[0], before[1])
    assert torch.equal(after[1], before[0])


@pytest.mark.parametrize("where", ["bert.encoder", "bert.encoder.layer.1", "bert.encoder.layer.1.intermediate"])
def test_a_hook_of_the_user_finds_what_it_would_find_without(where):
    model = tiny_model("bert")
    found = []
    module = model.get_submodule(where)
    handle = module.register_forward_hook(lambda _, __, output: found.append(output[0].detach()))
    reference = full(model)
    head = find_masked_head(model)
    assert_same(restricted(model, head), reference)
    assert torch.equal(*found)
    handle.remove()
    assert_same(restricted(model, head), reference)


def test_blocks_computed_in_chunks_of_the_sequence_are_left_alone():
    model = tiny_model("bert", chunk_size_feed_forward=4)
    assert_same(restricted(model, find_masked_head(model)), full(model))
