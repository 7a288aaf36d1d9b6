"""Statements of the article that show at small scale, on real trainings: two seeds of five arms on the built-in corpus.

What each test asserts, it computes from the runs themselves; that the study says so too is asserted beside it. Seeds 1
to 6 gave: plain recycling leaves 74–78% of the neurons untouched and takes 8–10% of them four times or more; immunity
leaves 30%, `matched_normal` 51–53%; medians of magnitudes grow 2.2–2.4 times; the midpoint loss leaves 14–23% of the
spread; pruning costs 1.9–4.8 times as much at random as with small neurons first, with large ones 1.5–2.4 times that.
"""

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from hf_recycle import train
from hf_recycle.studies.one_shot import one_shot_curves
from hf_recycle.studies.plan import Arm, Study
from hf_recycle.studies.results import StudyResults, collect
from hf_recycle.studies.runner import SETTINGS_FILE
from hf_recycle.studies.verdicts import CANT_TELL, HOLDS, STATEMENTS, UNCLEAR, check

pytestmark = pytest.mark.long

D_MODEL, D_FF, LAYERS = 64, 256, 2
ARMS = ("baseline", "plain", "immunity-6", "matched-normal", "midpoint-1")
SEEDS = (1, 2)
SETTINGS = {
    "config_overrides": f"hidden_size={D_MODEL},num_hidden_layers={LAYERS},num_attention_heads=2,"
    f"intermediate_size={D_FF},hidden_act=relu,hidden_dropout_prob=0,attention_probs_dropout_prob=0,"
    "max_position_embeddings=34",
    # Few tokens, so that feed-forward layers matter after few steps.
    "tokenizer_vocab_size": 512,
    "max_seq_length": 32,
    "max_steps": 300,
    "eval_steps": 300,
    "max_eval_samples": 128,
    "save_strategy": "no",
    "magnitude_steps": 150,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The study, trained in this process: starting one for each run takes longer than the run."""
    arms = tuple(Arm(name, (name,)) for name in ARMS)
    study = Study("statements", "Statements", arms, SEEDS, "baseline", scale="laptop", settings=SETTINGS)
    root, runs = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_RECYCLE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("hf_recycle.plots.run._figures", lambda *_: {})
        for run in study.runs():
            folder = root / run.folder
            folder.mkdir()
            settings = folder / SETTINGS_FILE
            settings.write_text(yaml.safe_dump({**run.settings, "output_dir": str(folder)}))
            assert train.main([str(settings)]) == 0
            runs[run.arm, run.seed] = collect(run, folder)
        yield StudyResults(study, runs, {})


def assert_holds(name, results):
    """The study says so too."""
    found = check(name, results)[1]
    assert found.verdict == HOLDS, found.measured


def counts(run):
    """How often each neuron was recycled, of all layers."""
    return np.concatenate(list(run.history.counts.values()))


def magnitudes(run):
    """(layers, d_ff), from the weights in the final model's file."""
    weights = load_file(f"{run.folder}/model.safetensors")
    layers = [f"roberta_prelayernorm.encoder.layer.{i}" for i in range(LAYERS)]
    first = [weights[f"{layer}.intermediate.dense.weight"].norm(dim=1) for layer in layers]
    second = [weights[f"{layer}.output.dense.weight"].norm(dim=0) for layer in layers]
    return np.array([(one * two).numpy() for one, two in zip(first, second, strict=True)])


# Of 7 phases of 10% drawn at random, 48% of the neurons see none and 0.3% see four or more.


def test_plain_recycling_is_a_vicious_cycle(results):
    for run in results.of("plain"):
        times = counts(run)
        assert (times == 0).mean() > 0.65
        assert (times >= 4).mean() > 0.04
    assert_holds("vicious_cycle", results)


@pytest.mark.parametrize(("arm", "untouched", "often"), [("immunity-6", 0.35, 0), ("matched-normal", 0.6, 0.02)])
def test_what_breaks_the_cycle(results, arm, untouched, often):
    for run, plain in results.paired(arm, "plain"):
        times = counts(run)
        # As many neurons were recycled, and others.
        assert times.sum() == counts(plain).sum() > 0.6 * times.size
        assert (times == 0).mean() < min(untouched, 0.85 * (counts(plain) == 0).mean())
        assert (times >= 4).mean() <= often
    assert_holds(f"{arm.removesuffix('-6').replace('-', '_')}_breaks_the_cycle", results)


def test_one_shot_pruning_order(results):
    """Small neurons cost least, random ones more, large ones the most: mean over partly pruned models."""
    for run in results.of("baseline"):
        losses = one_shot_curves(run).losses
        criteria = ("low_magnitude", "random", "high_magnitude")
        low, drawn, high = (np.mean(losses[name][1:-1]) - losses[name][0] for name in criteria)
        assert drawn > 1.4 * low
        assert high > 1.25 * drawn
        assert high > 0.015  # nats: the feed-forward layers matter
    # How many hundredths of a nat they matter depends on the seed, and the study asks for two to call it shown.
    # Without a positive control the study itself says nothing of losses.
    assert check("one_shot_pruning_order", results)[1].verdict == CANT_TELL
    assert STATEMENTS["one_shot_pruning_order"].__wrapped__(results).verdict in (HOLDS, UNCLEAR)


def test_magnitudes_grow(results):
    initial = 0.02**2 * D_MODEL  # of weights drawn from N(0, 0.02²), up to 1% for the mean of norms
    for run in results.of("baseline"):
        assert np.median(magnitudes(run), axis=1).min() > 1.4 * initial
    assert_holds("magnitudes_grow", results)


def test_the_midpoint_loss_collapses_the_spread_of_magnitudes(results):
    def spread(run):
        low, middle, high = np.quantile(magnitudes(run), [0.1, 0.5, 0.9], axis=1)
        return ((high - low) / middle).max()

    for run, baseline in results.paired("midpoint-1", "baseline"):
        assert spread(run) < 0.35 * spread(baseline)
    assert_holds("midpoint_evens_magnitudes", results)
