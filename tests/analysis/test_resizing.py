"""Models of another width against masked, folded and unchanged ones."""

import pytest
import torch
from test_pruning_curves import subject

from hf_recycle import find_feed_forwards
from hf_recycle.analysis.data_scores import ModelNeurons, least
from hf_recycle.analysis.resize import ResizeSettings, resize_model, values_for
from hf_recycle.errors import UserError

FAMILIES = ("bert", "gpt2", "modernbert")  # ungated, Conv1D, fused and gated


def resized(text, width, **settings):
    blocks = find_feed_forwards(text.model)
    given = ResizeSettings(**settings)
    return resize_model(text.neurons(blocks, given.seed), values_for(text.model, blocks, width), given)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", [("random", "none"), ("obs", "least_squares"), ("dormant", "none")])
def test_a_narrower_model_computes_what_the_masked_and_folded_one_does(name, how, family_named, perturb):
    criterion, fold = how
    family = family_named(name)
    text = subject(family, perturb)
    before = {key: value.clone() for key, value in text.model.state_dict().items()}
    new = resized(text, 30, criterion=criterion, fold=fold)

    assert all(torch.equal(value, before[key]) for key, value in text.model.state_dict().items())
    assert [block.num_neurons for block in new.blocks] == [30, 30]
    blocks = find_feed_forwards(text.model)
    neurons = text.neurons(blocks)
    gone = [least(scores, 12) for scores in neurons.scores(criterion, [12, 12])]
    for number, index in enumerate(gone):
        assert sorted([*new.former[number].tolist(), *index.tolist()]) == list(range(42))
    with neurons.without(gone, fold):
        torch.testing.assert_close(family.logits(new.model), family.logits(text.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("birth", ["zero_out", "split", "gradmax"])
def test_a_wider_model_computes_the_same_where_the_birth_promises_it(name, birth, family_named, perturb):
    family = family_named(name)
    text = subject(family, perturb)
    new = resized(text, 64, birth=birth)
    assert [block.num_neurons for block in new.blocks] == [64, 64]
    torch.testing.assert_close(family.logits(new.model), family.logits(text.model), rtol=1e-4, atol=1e-5)
    assert new.former[0].tolist() == [*range(42), *[-1] * 22]
    new.model.zero_grad()
    new.model(**family.inputs()).logits.square().sum().backward()
    index = torch.arange(42, 64)
    for block in new.blocks:
        assert all(value.isfinite().all() for value in block.read(index).values())
        assert block.norms()[0][42:].min() > 0
        out = block.out_slice
        [tile] = out.storage.gradient_tiles(out)
        assert (tile.values[index].norm(dim=1) > 0).float().mean() > 0.5, "newborns get gradients"


@pytest.mark.parametrize("birth", ["initial", "matched_normal", "copy_noise"])
def test_other_births_change_the_new_neurons_alone(birth, family_named, perturb):
    text = subject(family_named("bert"), perturb)
    blocks = find_feed_forwards(text.model)
    one, again, other = (resized(text, 50, birth=birth, seed=seed) for seed in (1, 1, 2))
    for old, first, second, third in zip(blocks, one.blocks, again.blocks, other.blocks, strict=True):
        for index, equal in ((torch.arange(42), True), (torch.arange(42, 50), False)):
            found = [block.read(index)["in"] for block in (first, second, third)]
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2]) == equal
        assert torch.equal(first.read(torch.arange(42))["out"], old.read(torch.arange(42))["out"])
    if birth == "matched_normal":
        std = blocks[0].read(torch.arange(42))["in"].std()
        assert 0.7 < one.blocks[0].read(torch.arange(42, 50))["in"].std() / std < 1.4


def test_neurons_come_back_when_wider_follows_narrower(family_named, perturb):
    """Growing by neurons that add nothing and taking those away again is the identity."""
    family = family_named("bert")
    text = subject(family, perturb)
    wide = resized(text, 48)
    blocks = find_feed_forwards(wide.model)
    back = resize_model(ModelNeurons(wide.model, blocks), values_for(wide.model, blocks, 42), ResizeSettings())
    for key, value in text.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[key], value)


def test_pruned_neurons_go_first(family_named, perturb):
    text = subject(family_named("bert"), perturb)
    blocks = find_feed_forwards(text.model)
    masks = [torch.zeros(42, dtype=torch.bool) for _ in blocks]
    masks[0][[7, 30]] = True
    values = values_for(text.model, blocks, 40)
    new = resize_model(text.neurons(blocks), values, ResizeSettings("high_magnitude"), pruned=masks)
    assert not {7, 30} & set(new.former[0].tolist())


@pytest.mark.parametrize(
    ("width", "settings", "message"),
    [
        (0, {}, "width=0 must be at least 1"),
        (42, {}, "width=42 is the width that the model has"),
        (85, {"birth": "split"}, r"needs a neuron of its own .* has 42 for 43; widen it to at most 84"),
        (10**9, {}, r"1,000,000,000 neurons a block take [\d,]+ bytes with the optimizer's state, and [\d,]+ are free"),
    ],
)
def test_widths_that_can_not_be(width, settings, message, family_named, perturb):
    with pytest.raises(UserError, match=message):
        resized(subject(family_named("bert"), perturb), width, **settings)


def test_gradmax_without_a_text_is_refused(family_named):
    model = family_named("bert").build()
    blocks = find_feed_forwards(model)
    with pytest.raises(UserError, match="birth='gradmax' looks at what neurons do on data; pass eval_file"):
        resize_model(ModelNeurons(model, blocks), values_for(model, blocks, 64), ResizeSettings(birth="gradmax"))


def test_a_birth_that_draws_tokens_is_refused(family_named, perturb):
    with pytest.raises(UserError, match="birth='sample' draws tokens while a model is trained"):
        resized(subject(family_named("bert"), perturb), 64, birth="sample")


def test_blocks_of_several_widths_need_a_part():
    from test_shrinking import fields_apart

    model = fields_apart()["encoder-decoder"]
    with pytest.raises(UserError, match="can't be given to blocks of 44 to 60 neurons; pass ff_blocks"):
        values_for(model, find_feed_forwards(model), 32)
