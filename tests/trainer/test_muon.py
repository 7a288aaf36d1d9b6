"""`optim=muon`: the steps are those of torch's Muon and AdamW; it is chosen by name, saved, resumed and reset."""

import copy

import pytest
import torch
from support.tiny_runs import masked_sentences, tiny_bert, tiny_t5
from test_resume import interrupt_and_compare
from torch import nn

from hf_recycle import RecyclingTrainer
from hf_recycle.engines.checks import check_engine
from hf_recycle.errors import UserError
from hf_recycle.runs.parse import parse_run
from hf_recycle.trainer.muon import MuonWithAdamW, hidden_matrices


def names_of(model, parameters):
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_muon_gets_the_matrices_in_layers():
    bert = tiny_bert(layers=1)
    layer = "bert.encoder.layer.0."
    parts = [f"attention.self.{part}" for part in ("query", "key", "value")]
    parts += ["attention.output.dense", "intermediate.dense", "output.dense"]
    assert names_of(bert, hidden_matrices(bert)) == {f"{layer}{part}.weight" for part in parts}
    t5 = tiny_t5()  # whose first layers hold an embedding of positions
    found = names_of(t5, hidden_matrices(t5))
    assert not [name for name in found if "relative_attention_bias" in name or "shared" in name or "lm_head" in name]
    assert "decoder.block.0.layer.2.DenseReluDense.wi.weight" in found


def test_steps_are_those_of_muon_and_adamw():
    """To the bit, with weight decay, in groups of their own, after a copy, and after its state was loaded anew."""
    models = [tiny_bert(0.0, layers=1) for _ in range(2)]
    hidden = [hidden_matrices(model) for model in models]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = MuonWithAdamW(models[0].parameters(), **settings, betas=(0.8, 0.95), hidden=hidden[0])
    others = [p for p in models[1].parameters() if all(p is not h for h in hidden[1])]
    muon = torch.optim.Muon(hidden[1], **settings, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, **settings, betas=(0.8, 0.95), fused=True)
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.1, 6) for each in (optimizer, muon, adamw)]
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        for own, reference in zip(*(model.parameters() for model in models), strict=True):
            own.grad = torch.randn(own.shape, generator=generator)
            reference.grad = own.grad.clone()
        if step == 3:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer.state.clear()
            optimizer.load_state_dict(state)
        for each in (optimizer, muon, adamw):
            each.step()
        for schedule in schedules:
            schedule.step()
        for own, reference in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(own, reference)
    assert {key for state in optimizer.state.values() for key in state} == {
        "momentum_buffer",
        "exp_avg",
        "exp_avg_sq",
        "step",
    }


def test_resume_is_exact(train):
    whole, _ = interrupt_and_compare(
        train, 5, max_steps=9, optim="muon", recycle_steps=3, recycle_fraction=0.1, weight_decay=0.1
    )
    assert type(whole.optimizer.optimizer) is MuonWithAdamW
    # Two phases of 3 and 3 of 32 neurons in 2 layers: 16 numbers of momentum each in and out, two moments of the bias.
    assert whole.neuron_table().optimizer_entries_reset == 6 * 2 * (16 + 16 + 2)
    assert whole.state.log_history[-2]["recycling/optimizer_entries_reset"] == 6 * 2 * (16 + 16 + 2)


def test_the_recycled_lines_of_the_momentum_are_cleared(arguments):
    trainer = RecyclingTrainer(
        model=tiny_bert(0.0),
        args=arguments(max_steps=3, optim="muon", recycle_steps=2, recycle_fraction=0.25),
        train_dataset=masked_sentences(),
    )
    cleared = {}

    def look(*_):
        for block in trainer.neuron_table().blocks:
            for piece in block.weight_slices:
                momentum = trainer.optimizer.optimizer.state[piece.parameter]["momentum_buffer"]
                cleared[piece.parameter] = (momentum == 0).all(dim=1 - piece.dim).nonzero().flatten().tolist()

    trainer.callback_handler.callbacks[-1].on_step_end = _then(trainer.callback_handler.callbacks[-1], look, at=2)
    trainer.train()
    recycled = [row["recycled"] for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"]
    assert [len(index) for index in recycled] == [8, 8]
    assert list(cleared.values()) == [index for index in recycled for _ in range(2)]


def _then(callback, look, at):
    original = callback.on_step_end

    def on_step_end(args, state, control, **kwargs):
        result = original(args, state, control, **kwargs)
        if state.global_step == at:
            look()
        return result

    return on_step_end


def test_it_is_chosen_on_the_command_line(tmp_path):
    given = ["--output_dir", str(tmp_path), "--optim", "muon", "--optim_args", "momentum=0.9,adjust_lr_fn=original"]
    args = parse_run(given).training
    assert args.optim == "muon"
    assert args.to_dict()["optim"] == "muon"
    made, options = RecyclingTrainer.get_optimizer_cls_and_kwargs(args, tiny_bert())
    optimizer = made(tiny_bert().parameters(), **options)
    assert (optimizer.defaults["momentum"], optimizer.defaults["adjust_lr_fn"]) == (0.9, "original")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("momentum=1", "momentum must be a number in"),
        ("nesterov=maybe", "nesterov must be true or false"),
        ("ns_steps=0", "ns_steps must be an integer from 1 to 99"),
        ("adjust_lr_fn=none", "adjust_lr_fn must be one of match_rms_adamw, original"),
        ("rank=4", "muon has no option 'rank', only momentum, nesterov"),
    ],
)
def test_options_that_are_not_allowed(arguments, given, message):
    with pytest.raises(UserError, match=message):
        RecyclingTrainer.get_optimizer_cls_and_kwargs(arguments(optim="muon", optim_args=given), tiny_bert())


def test_what_it_is_not_for(arguments):
    with pytest.raises(ValueError, match=r"optim='moun' is not allowed: it must be one of adamw_torch, .*muon\."):
        arguments(optim="moun")
    flat = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(UserError, match="optim=muon finds no matrix to train in a layer of Sequential"):
        RecyclingTrainer.get_optimizer_cls_and_kwargs(arguments(optim="muon"), flat)


def test_deepspeed_is_refused(arguments, monkeypatch):
    trainer = RecyclingTrainer(model=tiny_bert(), args=arguments(optim="muon"), train_dataset=masked_sentences())
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(UserError, match="optim=muon can't be used with DeepSpeed, which flattens the matrices"):
        check_engine(trainer)
