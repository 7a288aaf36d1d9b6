"""Scores and removal without a Trainer, against hooks and algebra by hand."""

import pytest
import torch
from test_pruning_curves import subject

from hf_recycle import find_feed_forwards
from hf_recycle.analysis.data_scores import ModelNeurons, least
from hf_recycle.errors import UserError
from hf_recycle.methods.folding import DAMPING
from hf_recycle.methods.recycling.selection import CRITERIA

FAMILIES = ("bert", "gpt2", "modernbert")  # ungated, Conv1D, gated


def activations(model, blocks, number, batches):
    """What the out-projection of a block is given, `(tokens, d_ff)`, float64."""
    seen = []
    hook = blocks[number].out_slice.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"])
    hook.remove()
    return torch.cat([each.flatten(0, -2) for each in seen]).double()


def gradients(model, block, batches):
    """∂(mean loss of a batch)/∂h, `(tokens, d_ff)`."""
    found = []
    for batch in batches:
        held = []

        def hold(module, args, held=held):
            held.append(args[0])
            args[0].retain_grad()

        hook = block.out_slice.module.register_forward_pre_hook(hold)
        model(**batch).loss.backward()
        hook.remove()
        found.append(held[0].grad.flatten(0, -2))
    model.zero_grad()
    return torch.cat(found).double()


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_the_formulas(name, family_named, perturb):
    text = subject(family_named(name), perturb)
    blocks = find_feed_forwards(text.model)
    columns = [block.out_columns().double() for block in blocks]
    neurons = text.neurons(blocks)
    h = [activations(text.model, blocks, number, text.batches) for number in range(len(blocks))]
    g = [gradients(text.model, block, text.batches) for block in blocks]
    expected = {
        "dormant": [each.abs().mean(0) / each.abs().mean() for each in h],
        "wanda": [each.square().mean(0).sqrt() * v.abs().sum(1) for each, v in zip(h, columns, strict=True)],
        "flap": [each.var(0, correction=0) * v.square().sum(1) for each, v in zip(h, columns, strict=True)],
        "fisher": [(dh * (each - each.mean(0))).square().mean(0) for each, dh in zip(h, g, strict=True)],
    }
    for criterion, wanted in expected.items():
        for found, values in zip(neurons.scores(criterion, [3, 3]), wanted, strict=True):
            torch.testing.assert_close(found.double(), values, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("fold", ["none", "mean", "least_squares"])
def test_what_is_removed_is_folded_block_by_block(name, fold, family_named, perturb):
    family = family_named(name)
    text = subject(family, perturb)
    model = text.model
    blocks = find_feed_forwards(model)
    if fold == "mean" and blocks[0].out_bias is None:
        with pytest.raises(UserError, match="fold='mean' adds to the bias"):
            text.neurons(blocks).remove([torch.tensor([0])] * len(blocks), fold)
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    removed = [torch.tensor([1, 5, 11]), torch.tensor([0, 2, 30])]
    with text.neurons(blocks).without(removed, fold):
        found = {key: value.clone() for key, value in model.state_dict().items()}
        loss = text.loss()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    intact = [activations(model, blocks, number, text.batches) for number in range(len(blocks))]
    for number, (block, index) in enumerate(zip(blocks, removed, strict=True)):
        out = family.matrices(model, block.name)[2]  # (d_model, d_ff)
        stays = [n for n in range(block.num_neurons) if n not in index]
        h = activations(model, blocks, number, text.batches)  # of what its predecessors have become
        with torch.no_grad():
            if fold == "mean":
                block.out_bias.parameter.add_((intact[number].mean(0)[index] @ out[:, index].double().T).float())
            if fold == "least_squares":
                moments = h.T @ h / len(h)
                moments += DAMPING * moments.diagonal().mean() * torch.eye(len(moments))
                wanted = moments[stays][:, index] @ out[:, index].double().T
                out[:, stays] += torch.linalg.solve(moments[stays][:, stays], wanted).T.float()
            block.zero_(index)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6)
    assert text.loss() == pytest.approx(loss, rel=1e-4)


def test_the_surgeons_order_serves_every_number(family_named, perturb):
    text = subject(family_named("bert"), perturb)
    blocks = find_feed_forwards(text.model)
    neurons = text.neurons(blocks)
    ten = neurons.scores("obs", [10, 10])
    for few in (1, 4):
        for all_at_once, some in zip(ten, neurons.scores("obs", [few, few]), strict=True):
            assert torch.equal(least(all_at_once, few), least(some, few))


@pytest.mark.parametrize("criterion", ["obs", "dormant", "fisher"])
def test_without_a_text_a_criterion_that_looks_at_data_is_refused(criterion, family_named):
    model = family_named("bert").build()
    with pytest.raises(UserError, match=f"criterion='{criterion}' looks at what neurons do on data; pass eval_file"):
        ModelNeurons(model, find_feed_forwards(model)).scores(criterion, [1, 1])


@pytest.mark.parametrize("fold", ["mean", "least_squares"])
def test_a_dead_layer_has_nothing_to_fold(fold, family_named, perturb):
    """Its second moments are zero, and singular."""
    text = subject(family_named("bert"), perturb)
    blocks = find_feed_forwards(text.model)
    for block in blocks:
        block.zero_(torch.arange(42))
    before = {key: value.clone() for key, value in text.model.state_dict().items()}
    neurons = text.neurons(blocks)
    index = least(neurons.scores("obs", [9, 9])[0], 9)
    neurons.remove([index, index], fold)
    assert all(torch.equal(value, before[key]) for key, value in text.model.state_dict().items())


def test_all_criteria_score(family_named, perturb):
    text = subject(family_named("gpt2"), perturb)
    neurons = text.neurons(find_feed_forwards(text.model))
    for criterion in CRITERIA:
        for scores in neurons.scores(criterion, [5, 5]):
            assert scores.isfinite().all()
            assert scores.std() > 0


def test_activations_that_are_not_finite_are_refused(family_named, perturb):
    text = subject(family_named("bert"), perturb)
    blocks = find_feed_forwards(text.model)
    blocks[1].write(
        torch.tensor([3]), {role: value + torch.inf for role, value in blocks[1].read(torch.tensor([3])).items()}
    )
    with pytest.raises(UserError, match="criterion='wanda' needs finite activations"):
        text.neurons(blocks).scores("wanda", [1, 1])
