import math

import pytest
import torch
from torch.nn import functional as F

from hf_recycle import find_feed_forwards
from hf_recycle.analysis.evaluation import LanguageModel
from hf_recycle.analysis.pruning import PruneSettings, measure_curve
from hf_recycle.errors import UserError
from hf_recycle.methods.recycling.selection import CRITERIA
from hf_recycle.methods.registry import by_weights
from hf_recycle.mlm.tasks import TASKS


def batches(task):
    generator = torch.Generator().manual_seed(2)
    for rows in (3, 2):
        tokens = torch.randint(5, 67, (rows, 9), generator=generator)
        labels = tokens.where(torch.rand(tokens.shape, generator=generator) < 0.4, -100) if task == "mlm" else tokens
        yield {"input_ids": tokens, "labels": labels}


def subject(family, perturb):
    task = "clm" if family.name == "gpt2" else "mlm"
    made = list(batches(task))
    shift = task == "clm"
    tokens = sum(int((batch["labels"][:, shift:] != -100).sum()) for batch in made)
    return LanguageModel(perturb(family.build()), TASKS[task], made, tokens)


def loss_by_hand(model, task, made):
    total = count = 0
    for batch in made:
        logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"]
        if task == "clm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        for row in range(len(labels)):
            for position in (labels[row] != -100).nonzero().flatten():
                total -= float(F.log_softmax(logits[row, position].double(), -1)[labels[row, position]])
                count += 1
    return total / count


@pytest.mark.parametrize("criterion", list(by_weights(CRITERIA)))
@pytest.mark.parametrize("name", ["bert", "gpt2", "modernbert", "albert"])
def test_a_curve_is_the_loss_with_the_out_columns_masked(name, criterion, family_named, perturb):
    family = family_named(name)
    model = subject(family, perturb)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    blocks = find_feed_forwards(model.model)

    losses = measure_curve(model, blocks, criterion, PruneSettings(shares=(0, 0.5, 1), seed=3))

    with torch.no_grad():
        assert losses[0] == pytest.approx(loss_by_hand(model.model, model.task.name, model.batches), rel=1e-5)
        assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
        for block in blocks:
            order = block.magnitudes().argsort(descending=criterion == "high_magnitude")
            if criterion != "random":
                family.matrices(model.model, block.name)[2][:, order[:21]] = 0
        if criterion != "random":
            assert losses[1] == pytest.approx(loss_by_hand(model.model, model.task.name, model.batches), rel=1e-5)
        for block in blocks:
            family.matrices(model.model, block.name)[2][:] = 0
        assert losses[2] == pytest.approx(loss_by_hand(model.model, model.task.name, model.batches), rel=1e-5)


def test_random_depends_on_its_seed_alone(family_named, perturb):
    model = subject(family_named("bert"), perturb)
    blocks = find_feed_forwards(model.model)
    one, again, other = (
        measure_curve(model, blocks, "random", PruneSettings(shares=(0.5,), seed=seed)) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_an_interrupted_measurement_leaves_the_model_whole(family_named, perturb, monkeypatch):
    model = subject(family_named("bert"), perturb)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    monkeypatch.setattr(LanguageModel, "loss", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_curve(model, find_feed_forwards(model.model), "random", PruneSettings(shares=(0.7,)))
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


def test_settings_in_words():
    settings = PruneSettings.parse("random, low_magnitude", "1,0.25,0", 3, None)
    assert (settings.criteria, settings.shares) == (("random", "low_magnitude"), (0, 0.25, 1))
    assert PruneSettings.parse(None, None, 0, None).criteria == tuple(by_weights(CRITERIA))
    for shares in ("1.5", "-0.1", "half", "", str(math.nan)):
        with pytest.raises(UserError, match="must be numbers in"):
            PruneSettings.parse(None, shares, 0, None)
    with pytest.raises(UserError, match=r"criteria='low' is unknown; .*low_magnitude"):
        PruneSettings.parse("low", None, 0, None)
