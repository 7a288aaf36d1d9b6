import pytest
import torch
from transformers import AutoConfig

from hf_recycle import find_feed_forwards
from hf_recycle.analysis.shrink import ShrinkSettings, check_pruned_are_zero, removed_neurons, shrink
from hf_recycle.errors import UserError

WIDTHS = ("intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim")


def mask_by_hand(family, model, block, index):
    """What pruning means: the out-columns are zero, the rest stays."""
    out = family.matrices(model, block.name)[2]
    out[:, index] = 0


def test_the_smaller_model_computes_what_the_masked_one_does(family, perturb, tmp_path):
    model = perturb(family.build())
    for number, block in enumerate(find_feed_forwards(model)):
        # Each layer keeps other neurons, and another number of them.
        mask_by_hand(family, model, block, torch.randperm(block.num_neurons)[: 25 - 3 * (number % 2)])
    expected = family.logits(model)

    shrunk = shrink(model, ShrinkSettings(multiple_of=4))
    shrunk.model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()

    width = 17 if family.name == "albert" else 20
    width = -(-width // 4) * 4
    assert shrunk.d_ff == width
    assert [block.num_neurons for block in find_feed_forwards(loaded)] == [width] * len(shrunk.kept)
    config = AutoConfig.from_pretrained(tmp_path)
    assert width in [getattr(config, name, None) for name in WIDTHS]
    assert torch.allclose(family.logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(family.logits(model), expected), "the original is untouched"
    assert loaded.num_parameters() < model.num_parameters()


def test_a_fraction_removes_the_least_important_neurons(perturb, family_named):
    family = family_named("llama")
    model = perturb(family.build())
    block = find_feed_forwards(model)[1]
    order = block.magnitudes().argsort()
    kept = shrink(model, ShrinkSettings(fraction=0.3)).kept[block.name]
    assert kept.tolist() == sorted(order[int(0.3 * 42) :].tolist())
    kept = shrink(model, ShrinkSettings(fraction=0.3, criterion="high_magnitude")).kept[block.name]
    assert kept.tolist() == sorted(order[:-12].tolist())


def test_rounding_up_never_widens(family_named):
    model = family_named("bert").build()
    shrunk = shrink(model, ShrinkSettings(fraction=0.05, multiple_of=64))
    assert shrunk.d_ff == 42
    assert {len(index) for index in shrunk.kept.values()} == {40}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_stays(dtype, family_named):
    model = family_named("bert").build().to(dtype)
    assert shrink(model, ShrinkSettings(fraction=0.5)).model.dtype == dtype


def test_fractions_in_decimal():
    blocks = find_feed_forwards(torch.nn.Sequential(torch.nn.Linear(4, 10), torch.nn.Linear(10, 4)), "0 -> 1")
    assert len(removed_neurons(blocks, ShrinkSettings(fraction=0.3))[0]) == 3
    with pytest.raises(UserError, match=r"fraction=1\.0 leaves block .* with none of its 10 neurons"):
        removed_neurons(blocks, ShrinkSettings(fraction=1.0))


def test_what_can_not_be_shrunk(family_named):
    model = family_named("bert").build()
    with pytest.raises(UserError, match="no neuron of this model is pruned"):
        shrink(model, ShrinkSettings())
    for block in find_feed_forwards(model):
        block.out_slice.parameter.data.zero_()
    with pytest.raises(UserError, match="every neuron of this model is pruned"):
        shrink(model, ShrinkSettings())


def test_neurons_called_pruned_must_be_zero(family_named):
    family = family_named("gpt2")
    model = family.build()
    first, second = find_feed_forwards(model)
    masks = {block.name: torch.zeros(block.num_neurons, dtype=torch.bool) for block in (first, second)}
    masks[second.name][[3, 5]] = True
    mask_by_hand(family, model, second, torch.tensor([3]))
    with pytest.raises(UserError, match=rf"block {second.name}: 1 neurons that the recycling state calls pruned"):
        check_pruned_are_zero([first, second], masks)
    mask_by_hand(family, model, second, torch.tensor([5]))
    check_pruned_are_zero([first, second], masks)
