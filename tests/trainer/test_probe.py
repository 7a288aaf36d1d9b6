"""What a probe gathers, against autograd and a naive loop over positions; and that training never notices it."""

import pytest
import torch
from support.tiny_runs import losses, masked_sentences, tiny_bert, tiny_modernbert
from torch.utils.data import IterableDataset
from transformers import default_data_collator

from hf_recycle.methods import probe as probe_module
from hf_recycle.methods.magnitudes import Magnitudes
from hf_recycle.methods.probe import Probe
from hf_recycle.methods.recycling.selection import Signals
from hf_recycle.methods.registry import CRITERIA, GRADIENTS, STATISTICS, by_weights

WATCHED = {"recycle_steps": 1, "recycle_selection": "fisher", "recycle_probe_batches": 2, "recycle_reinit": "gradmax"}


@pytest.fixture
def probed(train):
    """`probed(model, **settings)`: the trainer and the probe of a run of one step, which has no phase."""

    def make(model, **settings):
        settings = {"max_steps": 1, "data": masked_sentences(), "collator": default_data_collator} | settings
        trainer = train(model=model, **WATCHED, **settings)
        return trainer, trainer.recycling.probe

    return make


def naive(trainer, batches, autocast):
    """The statistics of every block, position by position, from the model's own loss, computed whole."""
    model, blocks = trainer.model.eval(), trainer.neuron_table().blocks
    rows = [{name: [] for name in ("h", "g", "x", "delta")} for _ in blocks]
    gradients = [0.0] * len(blocks)
    for batch in batches:
        seen = {}

        def keep(key, seen=seen):
            def hook(module, args, output=None):
                value = args[0] if output is None else output
                value.retain_grad()
                seen[key] = value

            return hook

        handles = []
        for number, block in enumerate(blocks):
            out = block.out_slice.module
            handles += [
                out.register_forward_pre_hook(keep((number, "h"))),
                out.register_forward_hook(keep((number, "y"))),
            ]
            handles.append(block.in_slices[0].module.register_forward_pre_hook(keep((number, "x"))))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        counts = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for number in range(len(blocks)):
            found = {key: seen[number, key] for key in ("h", "y", "x")}
            rows[number]["h"].append(found["h"].detach()[counts].double())
            rows[number]["g"].append(found["h"].grad[counts].double())
            rows[number]["x"].append(found["x"].detach().flatten(0, 1).double())
            rows[number]["delta"].append(found["y"].grad.flatten(0, 1).double())
        for handle in handles:
            handle.remove()
    found = []
    for number, block in enumerate(blocks):
        h, g, x, delta = (torch.cat(rows[number][name]) for name in ("h", "g", "x", "delta"))
        in_rows = torch.cat([_lines(piece) for piece in block.in_slices], dim=1)
        gradients[number] = in_rows.abs().mean(1) / len(batches)
        found.append(
            {
                "mean": h.mean(0),
                "mean_abs": h.abs().mean(0),
                "second_moment": (h * h).mean(0),
                "cross_moment": sum(torch.outer(row, row) for row in h) / len(h),
                "taylor": (g * (h - h.mean(0))).square().mean(0),
                "in_gradient": gradients[number],
                "descent": sum(torch.outer(d, row) for d, row in zip(delta, x, strict=True)),
            }
        )
    model.zero_grad()
    return found


def batches_of(probe, step):
    return [batch for _, batch in probe._batches_of(step)]


def _lines(piece):
    """The gradient of the rows of the in-projection."""
    return piece.parameter.grad.narrow(0, piece.offset, piece.length).double()


@pytest.mark.parametrize("build", [lambda: tiny_bert(dropout=0.1), tiny_modernbert], ids=["ungated", "gated"])
@pytest.mark.parametrize(
    "setting", [{}, {"activation_checkpointing": True}, {"bf16": True}], ids=["plain", "ckpt", "bf16"]
)
def test_statistics_and_scores_against_a_naive_loop(probed, build, setting):
    """With the head on masked positions in training, where the last block is computed there only."""
    trainer, probe = probed(build(), **setting)
    found = probe.gather([0, 1], sorted(STATISTICS.keys() - {"token_inputs"}), step=7)
    expected = naive(trainer, batches_of(probe, 7), autocast="bf16" in setting)
    tolerance = {"rtol": 3e-2, "atol": 3e-5} if "bf16" in setting else {"rtol": 1e-4, "atol": 1e-9}
    for mine, theirs in zip(found, expected, strict=True):
        for name, values in theirs.items():
            assert values.abs().max() > 0, name
            torch.testing.assert_close(
                mine[name].double(), values, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )
    for block, *sides in zip(trainer.neuron_table().blocks, found, expected, strict=True):
        for name in set(CRITERIA) - set(by_weights(CRITERIA)):
            scores = [
                CRITERIA[name](Signals(block.magnitudes().detach(), lambda: None, block.out_columns, side))
                for side in sides
            ]
            assert scores[1].std() > 0
            torch.testing.assert_close(*scores, rtol=10 * tolerance["rtol"], atol=0, msg=lambda t, n=name: f"{n}: {t}")


def test_padding_is_left_out(probed):
    rows = masked_sentences()
    for number, row in enumerate(rows):
        row["attention_mask"] = [1] * (12 - number % 5) + [0] * (number % 5)
        row["labels"] = [
            label if kept else -100 for label, kept in zip(row["labels"], row["attention_mask"], strict=True)
        ]
    trainer, probe = probed(tiny_bert(), data=rows)
    names = ["mean_abs", "cross_moment", "taylor"]
    [found] = probe.gather([1], names, step=3)
    expected = naive(trainer, batches_of(probe, 3), autocast=False)[1]
    for name in names:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-9)


def test_it_is_a_pure_function_of_seed_and_step(probed):
    _, probe = probed(tiny_bert())
    first = probe.gather([0], ["mean"], step=5)[0]["mean"]
    torch.rand(3)
    assert torch.equal(probe.gather([0], ["mean"], step=5)[0]["mean"], first)
    assert not torch.equal(probe.gather([0], ["mean"], step=6)[0]["mean"], first)


def test_cross_moments_are_computed_when_looked_up_and_kept_for_one_block(probed, monkeypatch):
    _, probe = probed(tiny_bert())
    ran, add_up = [], probe_module._sum_over_processes
    monkeypatch.setattr(probe_module, "_sum_over_processes", lambda sums: ran.append(len(sums)) or add_up(sums))
    first, second = probe.gather([0, 1], ["cross_moment"], step=2)
    assert ran == [2], "for the diagonals"
    for each in (second, second, first, first):
        torch.testing.assert_close(each["cross_moment"].diagonal().double(), each["second_moment"])
    assert ran == [2, 1, 1]


@pytest.mark.parametrize("names", [["mean_abs", "cross_moment"], sorted(GRADIENTS)], ids=["forward", "gradients"])
def test_training_goes_on_as_if_nothing_had_happened(train, monkeypatch, names):
    """Dropout, data order, gradients under way and flags: the losses are those of a run without probes, to the bit."""
    plain = train("plain", magnitude_steps=1, max_steps=6)
    probes = []

    def look(method, info):
        before = [p.requires_grad for p in method.run.model.parameters()], method.run.model.training
        probe = Probe(method.run, 3, 2, dict.fromkeys(names, "a test"), "a test")
        probes.append(probe.gather([0, 1], names, info.optimizer_steps)[1][names[-1]])
        assert before == ([p.requires_grad for p in method.run.model.parameters()], method.run.model.training)

    monkeypatch.setattr(Magnitudes, "after_step", look)
    watched = train("watched", magnitude_steps=1, max_steps=6)
    assert losses(watched) == losses(plain)
    assert len(probes) == 6
    assert all(probe.abs().sum() > 0 for probe in probes)


def test_a_stream_is_refused_before_training(train):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(masked_sentences())

    with pytest.raises(
        ValueError, match=r"recycle_selection='dormant' needs a training set with a length.*Stream is a st"
    ):
        train(data=Stream(), recycle_steps=2, recycle_selection="dormant", collator=default_data_collator)


def test_too_large_moments_are_refused_with_their_bytes(train, monkeypatch):
    zeros = torch.zeros

    def limited(*size, **kwargs):
        if len(size) == 2 and size[0] * size[1] == 7 * 32 * 32:
            raise RuntimeError("not enough memory: you tried to allocate 28672 bytes.")
        return zeros(*size, **kwargs)

    monkeypatch.setattr("hf_recycle.methods.probe.torch.zeros", limited)
    with pytest.raises(
        ValueError, match=r"no room on cpu for the 28,672 bytes of the moments of bert\.encoder\.layer\.0"
    ):
        train(recycle_steps=2, recycle_selection="obs")
