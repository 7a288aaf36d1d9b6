"""Tokens drawn in proportion to their loss: against a naive computation of all losses, however batches are cut."""

from types import SimpleNamespace

import pytest
import torch
from support.causal import llama
from support.tiny_runs import labelled_sentences, masked_sentences, tiny_bert, tiny_modernbert
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_recycle import RecyclingCallback
from hf_recycle.methods.token_draw import TokenDraw
from hf_recycle.utils.seeds import generator_for

SAMPLE = {"recycle_steps": 1, "recycle_reinit": "sample", "recycle_probe_batches": 2, "max_steps": 1}


class Layer:
    """A block of which only its input is looked at."""

    name = "layer"
    out_slice = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, width):
        self.in_slices = [SimpleNamespace(width=width)]


def draw(losses, inputs, count, cuts=(), step=0):
    """The drawn rows of `inputs` `(samples, tokens, width)`, from batches that end at the samples `cuts`."""
    drawn = TokenDraw([Layer(inputs.shape[-1])], count, seed=3, step=step, argument="a test")
    for first, last in zip((0, *cuts), (*cuts, len(losses)), strict=True):
        drawn.see(0, None, (inputs[first:last],))
        drawn.take(losses[first:last], first)
    return drawn.drawn()[0]


def numbered(samples, tokens):
    return torch.arange(float(samples * tokens)).view(samples, tokens, 1)


def test_tokens_are_drawn_in_proportion_to_their_loss():
    """One of four in 4,000 draws each: within five standard deviations."""
    losses = torch.tensor([[1.0, 0.0], [4.0, 5.0]])
    found = torch.cat([draw(losses, numbered(2, 2), 1, step=step) for step in range(4000)])
    shares = torch.bincount(found.flatten().long(), minlength=4) / 4000
    assert shares[1] == 0
    assert (shares - losses.flatten() / 10).abs().max() < 5 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize("count", [1, 5, 30])
def test_it_does_not_matter_how_samples_are_batched(count):
    """No token twice, and no more than there are with a loss."""
    losses = torch.rand(7, 4, generator=torch.Generator().manual_seed(1)).clamp(min=0.3) - 0.3
    whole = draw(losses, numbered(7, 4), count)
    assert torch.equal(draw(losses, numbered(7, 4), count, cuts=(1, 4)), whole)
    assert len(whole.unique()) == len(whole) == min(count, int((losses > 0).sum()))
    assert (losses.flatten()[whole.long()] > 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_makes_an_input_that_is_not(bad):
    losses = torch.ones(3, 4)
    losses[1, 2] = bad
    assert not draw(losses, numbered(3, 4), 2, cuts=(2,)).isfinite().all()


MODELS = {
    "ungated": (lambda: tiny_bert(0.1), masked_sentences, lambda labels: labels),
    "gated": (tiny_modernbert, masked_sentences, lambda labels: labels),
    "causal": (llama, labelled_sentences, lambda labels: F.pad(labels[:, 1:], (0, 1), value=-100)),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("setting", [{}, {"activation_checkpointing": True}], ids=["plain", "ckpt"])
def test_inputs_are_those_of_the_tokens_by_a_head_on_all_positions(train, kind, setting):
    """In training the last block is computed at masked positions only, and a causal head in chunks."""
    build, made, targets_of = MODELS[kind]
    trainer = train(model=build(), data=made(), collator=default_data_collator, **SAMPLE, **setting)
    probe = trainer.recycling.probe
    model, blocks = trainer.model.eval(), trainer.neuron_table().blocks
    tokens = []
    for first, batch in probe._batches_of(4):
        seen = {}
        hooks = [
            block.in_slices[0].module.register_forward_pre_hook(
                lambda _, args, number=number, seen=seen: seen.update({number: args[0]})
            )
            for number, block in enumerate(blocks)
        ]
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        [hook.remove() for hook in hooks]
        for row, labels in enumerate(targets_of(batch["labels"])):
            generator = generator_for(probe._seed, 4, first + row, "token")
            lots = torch.rand(len(labels), dtype=torch.float64, generator=generator)
            for place, label in enumerate(labels):
                if label != -100:
                    loss = float(F.cross_entropy(logits[row, place], label))
                    key = float(-torch.log1p(-lots[place])) / loss
                    tokens.append((key, [seen[number][row, place] for number in range(len(blocks))]))
    tokens.sort(key=lambda token: token[0])
    for number, found in enumerate(probe.gather([0, 1], ["token_inputs"], 4, 5)):
        torch.testing.assert_close(found["token_inputs"], torch.stack([inputs[number] for _, inputs in tokens[:5]]))


def test_a_loss_that_no_token_has_is_refused_before_training(train, tmp_path):
    class Own(type(tiny_bert())):
        def forward(self, input_ids=None, labels=None):
            return {"loss": super().forward(input_ids=input_ids, labels=labels).loss}

    model = tiny_bert()
    model.__class__ = Own
    message = r"recycle_reinit='sample' needs the loss of each token, and the forward of Own returns none"
    with pytest.raises(ValueError, match=message):
        train(model=model, data=masked_sentences(), collator=default_data_collator, **SAMPLE)
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
    with pytest.raises(ValueError, match="needs the loss of each token, and the forward of BertForMaskedLM returns"):
        Trainer(
            tiny_bert(), args, train_dataset=masked_sentences(), callbacks=[RecyclingCallback(steps=1, reinit="sample")]
        ).train()


def test_losses_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"a test needs the input of layer at every token that has a loss, \(2, 3\),"):
        draw(torch.ones(2, 3), numbered(2, 4), 1)
