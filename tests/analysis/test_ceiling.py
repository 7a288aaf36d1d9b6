"""What `analyze --ceiling` measures, against loops over positions and against models that were really shrunk."""

import pytest
import torch
from test_pruning_curves import batches, loss_by_hand, subject
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_recycle import find_feed_forwards
from hf_recycle.analysis.ceiling import feed_forward_share_of_flops, measure
from hf_recycle.analysis.data_scores import least
from hf_recycle.analysis.evaluation import LanguageModel
from hf_recycle.analysis.shrink import ShrinkSettings, shrink
from hf_recycle.analysis.verdict import IN_USE, RECYCLE, judge
from hf_recycle.mlm.tasks import TASKS

DEAD, HARDLY, PRUNED = [3, 11, 20], 7, 15


def made_by_hand(name, family_named, perturb):
    """A tiny language model, with a text to look at; in its first block some neurons are idle by construction."""
    family = family_named(name)
    text = subject(family, perturb)
    model = text.model
    if name == "bert":
        model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    # What a gate multiplies, or what ReLU is given; an input of -10 never becomes positive.
    row, shut = ("up", 0.0) if family.gated else ("in", -10.0)
    with torch.no_grad():
        first = [dict(family.neuron_parts(model, find_feed_forwards(model)[0].name, i)) for i in range(42)]
        for i in DEAD:
            first[i][row].zero_()
            first[i][f"{row}.bias"].fill_(shut)
        for part in (row, f"{row}.bias"):
            first[HARDLY][part].mul_(1e-4)
        first[PRUNED]["out"].zero_()
    others = [{key: value.flip(1) for key, value in batch.items()} for batch in batches(text.task.name)]
    return family, LanguageModel(model, TASKS[text.task.name], list(text.batches), text.tokens, others)


def idle_by_hand(text, block):
    """Which neurons never fire, and which hardly do, position by position."""
    rows = []
    hook = block.out_slice.module.register_forward_pre_hook(
        lambda module, args: rows.extend(args[0].flatten(0, -2).tolist())
    )
    with torch.no_grad():
        for batch in (*text.batches, *text.others):
            text.model(input_ids=batch["input_ids"])
    hook.remove()
    neurons = range(len(rows[0]))
    means = [sum(abs(row[i]) for row in rows) / len(rows) for i in neurons]
    level = 0.025 * sum(means) / len(means)
    return [i for i in neurons if not any(row[i] for row in rows)], [i for i in neurons if means[i] <= level]


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_idle_neurons_are_those_of_a_loop_over_positions(name, family_named, perturb):
    family, text = made_by_hand(name, family_named, perturb)
    blocks = find_feed_forwards(text.model)
    before = {key: value.clone() for key, value in text.model.state_dict().items()}
    found, curve = measure(text, blocks, [0.25, 0.5], 0.99)
    assert all(torch.equal(value, before[key]) for key, value in text.model.state_dict().items())
    for each, block in zip(found, blocks, strict=True):
        dead, dormant = idle_by_hand(text, block)
        pruned = [PRUNED] if block is blocks[0] else []
        assert each.dead == [i for i in dead if i not in pruned]
        assert each.dormant == [i for i in dormant if i not in pruned]
        assert each.neurons == block.num_neurons - len(pruned)
    assert set(found[0].dead) >= {*DEAD}
    assert set(found[0].dormant) >= {*DEAD, HARDLY}
    assert len(found[0].dormant) < 20

    # The loss of the curve is that of the model without them, on the batches that nobody looked at.
    neurons = text.neurons(blocks)
    for point in curve:
        count = [round(point.share * block.num_neurons) for block in blocks]
        removed = [least(*pair) for pair in zip(neurons.scores("obs", count), count, strict=True)]
        with torch.no_grad(), neurons.without(removed, "least_squares"):
            assert point.loss == pytest.approx(loss_by_hand(text.model, text.task.name, text.batches), rel=1e-5)
            for block, index in zip(blocks, removed, strict=True):
                assert (family.matrices(text.model, block.name)[2][:, index] == 0).all()
        assert point.cost.mean == pytest.approx(point.loss - text.loss(), abs=1e-6)
    one = text.neurons(blocks[1:])
    with one.without([least(one.scores("obs", [21])[0], 21)], "least_squares"):
        without = text.loss()
    assert found[1].half.mean == pytest.approx(without - text.loss(), abs=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "modernbert"])
def test_savings_are_those_of_a_model_that_was_shrunk(name, family_named, perturb):
    text = subject(family_named(name), perturb)
    blocks = find_feed_forwards(text.model)
    [point] = measure(text, blocks, [0.5], 0.99)[1]
    share = feed_forward_share_of_flops(text, blocks)
    small = shrink(text.model, ShrinkSettings(fraction=0.5, multiple_of=1)).model
    assert point.parameters == text.model.num_parameters() - small.num_parameters()
    counts = []
    for model in (text.model, small):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=text.batches[0]["input_ids"])
        counts.append(counter.get_total_flops())
    assert point.flops == pytest.approx(0.5 * share)
    assert point.flops == pytest.approx(1 - counts[1] / counts[0], rel=1e-9)


@pytest.mark.parametrize(("dead", "name"), [(0, IN_USE), (8, IN_USE), (20, RECYCLE)])
def test_the_verdict_on_a_model_that_says_what_it_means(dead, name, family_named, perturb):
    """Its labels are its own predictions, so that each neuron that is taken away costs something."""
    family = family_named("bert")
    text = subject(family, perturb)
    text.model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    blocks = find_feed_forwards(text.model)
    with torch.no_grad():
        for block in blocks:
            family.matrices(text.model, block.name)[2].mul_(3.0)
        text.model.bert.encoder.layer[0].intermediate.dense.weight[:dead] = 0.0
        text.model.bert.encoder.layer[0].intermediate.dense.bias[:dead] = -10.0
        generator = torch.Generator().manual_seed(1)
        made = []
        for _ in range(8):
            tokens = torch.randint(5, 67, (4, 9), generator=generator)
            made.append({"input_ids": tokens, "labels": text.model(input_ids=tokens).logits.argmax(-1)})
    text = LanguageModel(text.model, TASKS["mlm"], made[:4], 4 * 36, made[4:])
    found, [point] = measure(text, blocks, [0.5], 0.99)
    assert sum(len(block.dead) for block in found) >= dead
    neurons, dead, dormant = (
        sum(block.neurons for block in found),
        *(sum(len(getattr(block, kind)) for block in found) for kind in ("dead", "dormant")),
    )
    assert judge(neurons, dead, dormant, point.cost).name == name
