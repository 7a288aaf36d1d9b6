"""The head of a causal model in chunks gives the loss and the gradients of the full head."""

import ast
import copy
import inspect
import pickle
import textwrap

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from hf_recycle.mlm import chunked_head
from hf_recycle.mlm.causal_classes import CHANGED_LOGITS, LOGITS_OF_THE_HEAD
from hf_recycle.mlm.chunked_head import find_chunked_head, summed_head_loss
from hf_recycle.mlm.plain_loss import plain_loss_of

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Each with a head of its own: tied or not, with a bias, behind other layers, with what follows it (`.float()`).
FAMILIES = {
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "llama": {},
    "bert": {"is_decoder": True, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    "electra": {"is_decoder": True, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "embedding_size": 8},
    "gptj": {"n_embd": 16, "rotary_dim": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "mamba": {"state_size": 4},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0},
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Five tokens each, which does not divide the 24 of a batch."""
    monkeypatch.setattr(chunked_head, "_LOGITS", 5 * VOCABULARY)
    monkeypatch.setattr(chunked_head, "_ROWS", {"cpu": 5})


def tiny_model(model_type: str, **overrides) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES.get(model_type, {}), **overrides})
    return AutoModelForCausalLM.from_config(config).train()


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs (2, 12) and labels, some of them -100."""
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[1, 7:] = -100
    return {"input_ids": ids, "use_cache": False}, labels


def moved(labels: torch.Tensor) -> torch.Tensor:
    """What each position predicts, by a loop."""
    targets = torch.full_like(labels, -100)
    for place in range(labels.shape[1] - 1):
        targets[:, place] = labels[:, place + 1]
    return targets


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def by_the_model(model, inputs, labels):
    loss = model(**inputs, labels=labels).loss
    return loss.detach(), gradients(model, loss)


def in_chunks(model, inputs, labels):
    targets = moved(labels)
    with find_chunked_head(model).at(targets):
        loss = model(**inputs).logits / (targets != -100).sum()
    return loss.detach(), gradients(model, loss)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_loss_and_gradients_are_those_of_the_model(model_type):
    model = tiny_model(model_type)
    (expected, wanted), (found, given) = by_the_model(model, *batch()), in_chunks(model, *batch())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in wanted.items():
        assert (gradient is None) == (given[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", sorted(LOGITS_OF_THE_HEAD))
def test_the_source_of_each_class_says_so(name):
    """The logits are assigned once, by a module of the model, and go as they are into `loss_function` with the labels;
    nothing is added to that loss but what routers give."""
    assert _changes_of_logits(name) == 0


@pytest.mark.parametrize("name", sorted(CHANGED_LOGITS))
def test_and_so_does_that_of_each_class_that_changes_its_logits(name):
    assert _changes_of_logits(name) > 0


def _changes_of_logits(name: str) -> int:
    source = textwrap.dedent(inspect.getsource(getattr(transformers, name).forward))
    nodes = list(ast.walk(ast.parse(source)))
    (call,) = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "self.loss_function"]
    given = {key.arg: key.value for key in call.keywords}
    logits, labels = (*call.args, *(given.get(key) for key in ("logits", "labels")[len(call.args) :]))[:2]
    assert ast.unparse(labels) == "labels"
    assert "shift_labels" not in given
    values = {"loss": [], "labels": [], logits.id: []}
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                values.get(ast.unparse(target), []).append(node.value)
    assert not values["labels"]
    added = [ast.unparse(v) for v in values["loss"] if not ast.unparse(v).startswith(("None", "self.loss_function"))]
    assert all("aux_loss" in value for value in added), added
    head = values[logits.id][0]
    while isinstance(head.func if isinstance(head, ast.Call) else None, ast.Attribute) and head.func.attr in (
        "float",
        "contiguous",
    ):
        head = head.func.value
    of_the_model = isinstance(head, ast.Call) and ast.unparse(head.func).startswith("self.")
    return len(values[logits.id]) - of_the_model


def case(dtype=torch.float32, n=23, bias=True):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(n, 8, generator=generator), torch.randn(VOCABULARY, 8, generator=generator)
    targets = torch.randint(VOCABULARY, (n,), generator=generator)
    targets[::4] = -100
    values = [hidden.to(dtype), weight.to(dtype), torch.randn(VOCABULARY, generator=generator).to(dtype)][: 2 + bias]
    return [value.requires_grad_() for value in values], targets


def reference(values, targets):
    logits = F.linear(*values).float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def chunked(values, targets):
    return summed_head_loss(*values, *[None] * (3 - len(values)), targets)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (1, 2)])
def test_of_what_is_trained(bias, frozen):
    values, targets = case(bias=bias)
    for place in frozen[: 1 + bias]:
        values[place].requires_grad_(False)
    results = []
    for loss_of in (reference, chunked):
        loss = loss_of(values, targets)
        (loss * 0.125).backward()
        results.append((loss, *(value.grad for value in values)))
        for value in values:
            value.grad = None
    for expected, found in zip(*results, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_under_autocast_it_computes_in_the_precision_of_the_full_head():
    values, targets = case(n=203)
    in_float32 = gradient_of(reference, values, targets)
    with torch.autocast("cpu", torch.bfloat16):
        full, ours = (gradient_of(loss_of, values, targets) for loss_of in (reference, chunked))
    for usual, found in zip(full, ours, strict=True):
        assert found.dtype == torch.float32
        assert (found - usual).norm() < 0.004 * usual.norm()
    assert (full[0] - in_float32[0]).abs() > 10 * (full[0] - ours[0]).abs()


def gradient_of(loss_of, values, targets) -> list[torch.Tensor]:
    loss = loss_of(values, targets)
    return [loss.detach(), *torch.autograd.grad(loss, values)]


def test_in_bfloat16_sums_over_chunks_are_not_rounded():
    values, targets = case(torch.bfloat16, n=2003)
    truth = gradient_of(reference, [value.detach().float().requires_grad_() for value in values], targets)
    ours = gradient_of(chunked, values, targets)
    assert ours[2].dtype == torch.bfloat16
    assert (ours[2] - truth[2]).norm() < 0.01 * truth[2].norm()


def test_no_array_is_larger_than_a_chunk_of_logits(monkeypatch):
    values, targets = case(n=200)
    shapes = []
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim: shapes.append(x.shape) or F.log_softmax(x, dim))
    chunked(values, targets).backward()
    assert max(shape[0] for shape in shapes) == 5
    assert sum(shape[0] for shape in shapes) == 200


def test_nothing_to_predict_gives_zero():
    values, targets = case()
    loss = chunked(values, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0
    assert all((value.grad == 0).all() for value in values)


def test_a_second_backward_pass_is_refused():
    loss = chunked(*case())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_scores_are_losses_and_predictions_of_each_token():
    model, (inputs, labels) = tiny_model("gpt2").eval(), batch()
    targets = moved(labels)
    with torch.no_grad():
        logits = model(**inputs).logits
        with find_chunked_head(model).at(targets, scores=True):
            losses, predictions = model(**inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert predictions.tolist() == logits.argmax(-1).flatten().tolist()


def test_outside_the_model_is_as_it_was():
    model, (inputs, labels) = tiny_model("gpt2").eval(), batch()
    head = find_chunked_head(model)
    with head.at(moved(labels)):
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        inside = model(**inputs).logits
    assert inside.dim() == 0
    assert "forward" not in vars(model.lm_head)
    for other in (model, *twins):
        assert other(**inputs).logits.shape == (2, 12, VOCABULARY)


class Shouting(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_hook():
    model = tiny_model("gpt2")
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def with_own_head():
    model = tiny_model("llama")
    model.lm_head = Shouting(16, VOCABULARY, bias=False)
    return model


def with_own_forward():
    model = tiny_model("gpt2")
    model.forward = lambda *args, **kwargs: None
    return model


REFUSED = {
    "a soft cap": lambda: tiny_model("gemma2", head_dim=8, num_key_value_heads=2),
    "a scale": lambda: tiny_model("cohere", num_key_value_heads=2),
    "a hook on the head": with_hook,
    "a head of the user's": with_own_head,
    "a forward of the user's": with_own_forward,
    "a router's loss": lambda: tiny_model("mixtral", output_router_logits=True),
    "half precision": lambda: tiny_model("gpt2").half(),
    "no language model": lambda: nn.Linear(3, 3),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    assert find_chunked_head(REFUSED[what]()) is None


@pytest.mark.parametrize("what", ["a soft cap", "a scale"])
def test_logits_that_are_changed_make_a_plain_loss_all_the_same(what):
    model, (inputs, labels) = REFUSED[what](), batch()
    assert plain_loss_of(model) == "clm"
    outputs = model(**inputs, labels=labels)
    torch.testing.assert_close(
        F.cross_entropy(outputs.logits.flatten(0, 1), moved(labels).flatten(), ignore_index=-100), outputs.loss
    )
