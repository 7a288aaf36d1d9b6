"""The head on masked positions gives the loss and the gradients of the full head, for every family in the
table."""

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertForMaskedLM,
    BertForPreTraining,
)

from hf_recycle.mlm.heads import HEADS, find_masked_head
from hf_recycle.mlm.loss import target_positions

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FAMILY = {
    "albert": {"embedding_size": 8},
    "convbert": {"embedding_size": 8},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "distilbert": {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 24,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "electra": {"embedding_size": 8},
    "big_bird": {"attention_type": "original_full"},
    "esmc": {"d_model": 16, "n_heads": 2, "n_layers": 2},
    "eurobert": {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "mask_token_id": 4,
        "num_key_value_heads": 2,
    },
    "gte": {"pad_token_id": 0},
    "longformer": {"attention_window": [8, 8], "pad_token_id": 1},
    "mobilebert": {
        "embedding_size": 16,
        "true_hidden_size": 8,
        "intra_bottleneck_size": 8,
        "num_feedforward_networks": 2,
    },
    "nystromformer": {"num_landmarks": 12, "segment_means_seq_len": 12},
    "roc_bert": {
        "pronunciation_vocab_size": 70,
        "shape_vocab_size": 70,
        "pronunciation_embed_dim": 4,
        "shape_embed_dim": 4,
    },
    "squeezebert": {"embedding_size": 16, **{f"{part}_groups": 1 for part in ("q", "k", "v", "intermediate")}},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "esm": {"pad_token_id": 1, "mask_token_id": 4, "token_dropout": True},
    "modernbert": {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 4,
        "global_attn_every_n_layers": 2,
    },
    "rembert": {"input_embedding_size": 8, "output_embedding_size": 12, "classifier_dropout_prob": 0.0},
    "roformer": {"embedding_size": 16},
}
FAMILY["squeezebert"] |= {"post_attention_groups": 1, "output_groups": 1}
FAMILY |= {
    name: {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "dropout": 0.0, "attention_dropout": 0.0}
    for name in ("flaubert", "xlm")
}
IN_FLOAT32 = {"longformer"}  # its masks are, and in float64 its own gradients are NaN
REQUIRED = ["bert", "roberta", "roberta-prelayernorm", "distilbert", "electra", "modernbert", "albert"]


def tiny_model(model_type: str, **overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **FAMILY.get(model_type, {}), **overrides})
    model = AutoModelForMaskedLM.from_config(config).train()
    if model_type not in IN_FLOAT32:
        model = model.double()
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mistake in their gradients could hide
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def batch(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs (3, 12) with padding, and labels with an uneven number of masked tokens in each row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (3, 12), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 9:] = 0
    labels = torch.full_like(ids, -100)
    if kind == "uneven":
        labels[0, [1, 2, 3, 7, 11]] = ids[0, [1, 2, 3, 7, 11]]
        labels[2, 4] = ids[2, 4]
    elif kind == "all":
        labels = ids.clone()
    return {"input_ids": ids, "attention_mask": attention}, labels


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def full_head(model, inputs, labels):
    logits = model(**inputs).logits
    assert logits.shape == (*labels.shape, VOCABULARY)
    loss = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), ignore_index=-100, reduction="sum")
    return loss, gradients(model, loss)


def masked_head(model, head, inputs, labels):
    positions = target_positions(labels)
    with head.at(positions):
        logits = model(**inputs).logits
    assert logits.shape == (len(positions), VOCABULARY)
    loss = F.cross_entropy(logits, labels.view(-1)[positions], reduction="sum")
    return loss, gradients(model, loss)


def assert_same(left, right):
    in_double = left[0].dtype == torch.float64
    of_loss = {"rtol": 1e-10, "atol": 1e-10} if in_double else {"rtol": 1e-6, "atol": 1e-6}
    close = {"rtol": 1e-9, "atol": 1e-10} if in_double else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(left[0], right[0], **of_loss)
    for name, gradient in right[1].items():
        assert (left[1][name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(left[1][name], gradient, **close, msg=name)


def test_the_required_families_are_in_the_table():
    assert set(REQUIRED) <= set(HEADS)


@pytest.mark.parametrize("model_type", sorted(HEADS))
@pytest.mark.parametrize("kind", ["uneven", "none", "all"])
def test_loss_and_all_gradients_equal_the_full_head(model_type, kind):
    model = tiny_model(model_type)
    inputs, labels = batch(kind)
    reference = full_head(model, inputs, labels)
    head = find_masked_head(model)
    assert head is not None
    result = masked_head(model, head, inputs, labels)
    assert_same(result, reference)
    touched = sum(g.abs().sum() for g in result[1].values() if g is not None)
    assert (touched == 0) == (kind == "none")
    assert_same(full_head(model, inputs, labels), reference)  # the hook is idle again


def test_sequences_that_are_padded_inside():
    """BigBird's sparse attention works in whole blocks, so its layers see 32 tokens of 30."""
    sizes = {"block_size": 4, "num_random_blocks": 1}
    model = tiny_model("big_bird", attention_type="block_sparse", **sizes).eval()  # which draws no random blocks
    lengths = []
    block = model.bert.encoder.layer[-1].intermediate
    watching = block.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    ids = torch.randint(5, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(30) % 4 != 0, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    reference = full_head(model, inputs, labels)
    watching.remove()
    assert set(lengths) == {32}
    assert_same(masked_head(model, find_masked_head(model), inputs, labels), reference)


@pytest.mark.parametrize("model_type", REQUIRED)
def test_a_copy_is_independent(model_type):
    model = tiny_model(model_type)
    inputs, labels = batch("uneven")
    reference = full_head(model, inputs, labels)
    head = find_masked_head(model)
    with head.at(target_positions(labels)):
        twin = copy.deepcopy(model)  # at the worst moment
        assert_same(full_head(twin, inputs, labels), reference)
    twin_head = find_masked_head(twin)
    assert_same(masked_head(twin, twin_head, inputs, labels), reference)
    with twin_head.at(target_positions(labels)):
        assert_same(full_head(model, inputs, labels), reference)


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_on_the_model_within_the_contexts_only():
    model = tiny_model("bert")
    head = find_masked_head(model)
    assert hooks(model) == 0
    with head.attached():
        on = hooks(model)
        with head.at(target_positions(batch("uneven")[1])):
            assert hooks(model) == on > 0
        assert hooks(model) == on
    assert hooks(model) == 0


def test_an_error_in_the_context_leaves_the_hook_idle():
    model = tiny_model("bert")
    inputs, labels = batch("uneven")
    head = find_masked_head(model)
    with pytest.raises(RuntimeError), head.at(target_positions(labels)):
        raise RuntimeError
    assert model(**inputs).logits.shape == (*labels.shape, VOCABULARY)


def test_the_head_keeps_no_model_alive():
    model = tiny_model("bert")
    head = find_masked_head(model)
    gone = weakref.ref(model)
    gc.disable()  # a reference cycle would outlive the last reference
    try:
        del model
        assert head is not None
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_compiled_model_needs_one_graph_for_all_counts():
    model = tiny_model("bert")
    inputs, labels = batch("uneven")
    reference = full_head(model, inputs, labels)
    head = find_masked_head(model)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    seen = {}
    for n in (6, 5, 4, 3):
        positions = target_positions(labels)[:n]
        with head.at(positions):
            seen[n] = compiled(**inputs).logits
        assert seen[n].shape == (n, VOCABULARY)
    loss = F.cross_entropy(seen[6], labels.view(-1)[target_positions(labels)], reduction="sum")
    assert_same((loss, gradients(model, loss)), reference)
    assert len(graphs) <= 2  # one for the first count, one for any


def test_wrapped_in_ddp(tmp_path):
    model = tiny_model("bert")
    inputs, labels = batch("uneven")
    reference = full_head(model, inputs, labels)
    head = find_masked_head(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with head.at(target_positions(labels)):
            logits = wrapped(**inputs).logits
        loss = F.cross_entropy(logits, labels[labels != -100], reduction="sum")
        assert_same((loss, gradients(model, loss)), reference)
    finally:
        torch.distributed.destroy_process_group()


class OwnForward(BertForMaskedLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnName(BertForMaskedLM):
    pass


def tiny_config(model_type: str, **overrides):
    return AutoConfig.for_model(model_type, **{**COMMON, **overrides})


def test_models_whose_head_is_not_known_get_none():
    bert = tiny_config("bert")
    assert find_masked_head(OwnForward(bert)) is None
    assert find_masked_head(BertForPreTraining(bert)) is None  # its `cls` also predicts the next sentence
    assert find_masked_head(torch.nn.Linear(2, 2)) is None
    reformer = {"attn_layers": ["local"], "axial_pos_embds": False, "is_decoder": False}  # layers of another kind
    assert find_masked_head(AutoModelForMaskedLM.from_config(tiny_config("reformer", **reformer))) is None
    deberta = AutoModelForMaskedLM.from_config(tiny_config("deberta-v2", legacy=False))
    assert find_masked_head(deberta) is None
    assert find_masked_head(OwnName(bert)) is not None


def test_a_head_of_the_users_is_not_restricted():
    """It may look at other positions."""

    class Smooth(torch.nn.Module):
        def forward(self, hidden):
            return hidden + hidden.roll(1, dims=1)

    model = tiny_model("bert")
    model.cls.predictions.transform = torch.nn.Sequential(Smooth(), model.cls.predictions.transform)
    assert find_masked_head(model) is None


SHARED = {
    "inner groups": ("albert", {"inner_group_num": 4, "num_hidden_groups": 1, "num_hidden_layers": 4}),
    "one group": ("albert", {"num_hidden_groups": 1, "num_hidden_layers": 2}),
    "an encoder that runs its layers twice": ("bert", {}),
    "the last layer first": ("roberta", {}),
    "something behind the layer": ("electra", {}),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_last_block_that_is_not_computed_once_and_last_is_not_restricted(case):
    """The head still is, and gives the same loss and gradients."""
    model_type, overrides = SHARED[case]
    model = tiny_model(model_type, **overrides)
    encoder = model.base_model.encoder
    if model_type == "bert":

        class Twice(type(encoder)):
            def forward(self, hidden, *args, **kwargs):
                again = super().forward(hidden, *args, **kwargs)[0]
                return super().forward(again, *args, **kwargs)

        encoder.__class__ = Twice
    elif model_type == "roberta":
        encoder.layer = torch.nn.ModuleList([encoder.layer[1], encoder.layer[0], encoder.layer[1]])
        model.config.num_hidden_layers = 3
    elif model_type == "electra":

        class Mixing(type(encoder.layer[-1])):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                return output + output.roll(1, dims=1)

        encoder.layer[-1].__class__ = Mixing
    inputs, labels = batch("uneven")
    reference = full_head(model, inputs, labels)
    head = find_masked_head(model)
    assert head is not None
    assert_same(masked_head(model, head, inputs, labels), reference)
