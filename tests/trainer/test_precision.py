"""bf16 autocast and bf16 weights in real runs, against a training loop written out by hand in which new and old weights
are parameters apart, mixed inside the forward pass."""

import math

import pytest
import torch
from support.tiny_runs import masked_sentences, tiny_bert
from transformers import TrainerCallback

from hf_recycle import RecyclingTrainer

STEPS, BATCH, FF, LR, MAX_NORM = 12, 4, 32, 1e-2, 0.5
SMOOTH = {"recycle_steps": 3, "recycle_fraction": 0.125, "recycle_smooth_steps": 6, "recycle_end": 6}
METHODS = {
    "plain": {"recycle_steps": 3, "recycle_fraction": 0.125},
    "immunity_matched": {
        "recycle_steps": 2,
        "recycle_fraction": 0.25,
        "recycle_immunity": 2,
        "recycle_reinit": "matched_normal",
    },
    "smooth": SMOOTH,
    "midpoint": {"midpoint_weight": 5.0, "midpoint_distance": "l2"},
}
LAYERS = [f"bert.encoder.layer.{layer}" for layer in range(2)]
# How the parameters of one neuron are named, and where it lies in them.
ROLES = {"in": "intermediate.dense.weight", "in.bias": "intermediate.dense.bias", "out": "output.dense.weight"}


class Fresh(TrainerCallback):
    """Notes the weights that each phase gives its neurons: the only thing the loop takes over."""

    def __init__(self):
        self.values = {}

    def bind(self, trainer):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        table = self._trainer.neuron_table()
        for name, block, neurons in zip(LAYERS, table.blocks, table.states, strict=True):
            index = (neurons.last_step == state.global_step).nonzero().flatten()
            if not len(index):
                continue
            values = block.read(index)
            if neurons.fade_in is not None:
                rows = [neurons.fade_in.index.tolist().index(i) for i in index.tolist()]
                values = {role: v[rows] for role, v in neurons.fade_in.lines(block)[1].items()}
            self.values[state.global_step, name] = values


@pytest.fixture
def run(arguments):
    def train(dtype=torch.float32, **settings):
        fresh = Fresh()
        trainer = RecyclingTrainer(
            model=tiny_bert(dropout=0.0).to(dtype),
            args=arguments(
                max_steps=STEPS,
                optim="adamw_torch",
                adam_epsilon=1e-3,
                max_grad_norm=MAX_NORM,
                lr_scheduler_type="constant",
                train_sampling_strategy="sequential",
                masked_head=False,
                **settings,
            ),
            train_dataset=masked_sentences(STEPS * BATCH),
            callbacks=[fresh],
        )
        fresh.bind(trainer)
        # After the callback that recycles.
        trainer.add_callback(trainer.pop_callback(fresh))
        trainer.train()
        return trainer, fresh.values

    return train


class Loop:
    """The same training, by hand."""

    def __init__(self, dtype, autocast, fresh, **settings):
        self.model = tiny_bert(dropout=0.0).to(dtype)
        self.autocast, self.fresh, self.settings = autocast, fresh, settings
        self.new = {n: p.detach().clone().requires_grad_() for n, p in self.model.named_parameters()}
        self.old = {n: p.detach().clone() for n, p in self.new.items()}
        self.started = {layer: torch.full((FF,), -math.inf, dtype=torch.float64) for layer in LAYERS}
        self.last_phase = {layer: torch.full((FF,), -99) for layer in LAYERS}
        self.smooth = settings.get("recycle_smooth_steps", 0)
        self.optimizer = torch.optim.AdamW(self.new.values(), lr=LR, eps=1e-3, weight_decay=0.0)
        self.recycled, self.phases, self.done = [], 0, 0

    def alpha(self, layer):
        age = self.done - self.started[layer]
        return (age / self.smooth).clamp(max=1.0) if self.smooth else torch.ones(FF, dtype=torch.float64)

    def effective(self):
        weights = dict(self.new)
        for layer in LAYERS:
            alpha = self.alpha(layer).float()
            for role, name in ROLES.items():
                key = f"{layer}.{name}"
                a = {"in": alpha[:, None], "in.bias": alpha, "out": alpha[None]}[role]
                # x = α·x_new + (1 − α)·x_old, and the gradient rounded once.
                mixed = a * self.new[key].float() + (1 - a) * self.old[key].float()
                weights[key] = torch.where(a == 1, self.new[key], mixed.to(self.new[key].dtype))
        return weights

    def train(self):
        data = masked_sentences(STEPS * BATCH)
        for step in range(1, STEPS + 1):
            batch = data[(step - 1) * BATCH : step * BATCH]
            ids, labels = (torch.tensor([sample[key] for sample in batch]) for key in ("input_ids", "labels"))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                logits = torch.func.functional_call(self.model, self.effective(), (ids,)).logits
            loss = torch.nn.functional.cross_entropy(
                logits.float()[labels != -100], labels[labels != -100], reduction="sum"
            )
            (loss / (labels != -100).sum()).backward()
            torch.nn.utils.clip_grad_norm_(self.new.values(), MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done = step
            with torch.no_grad():
                self.phase(step)
            if "midpoint_weight" in self.settings:
                self.midpoint()
        return self

    def phase(self, step):
        every = self.settings.get("recycle_steps", math.inf)
        if step % every or step == STEPS or step > self.settings.get("recycle_end", STEPS):
            return
        self.phases += 1
        now = self.effective()
        k = int(self.settings["recycle_fraction"] * FF)
        for layer in LAYERS:
            w_in, w_out = (now[f"{layer}.{ROLES[role]}"].float() for role in ("in", "out"))
            magnitudes = w_in.norm(dim=1) * w_out.norm(dim=0)
            immune = self.phases - self.last_phase[layer] <= self.settings.get("recycle_immunity", 0)
            magnitudes[immune | (self.alpha(layer) < 1)] = math.inf
            index = magnitudes.argsort()[:k].sort().values
            self.recycled.append(index.tolist())
            values = self.fresh[step, layer]
            for role, name in ROLES.items():
                key = f"{layer}.{name}"
                where = (slice(None), index) if role == "out" else (index,)
                self.old[key][where] = now[key][where].detach()
                self.new[key][where] = values[role].T if role == "out" else values[role]
                state = self.optimizer.state[self.new[key]]
                others = torch.ones(FF, dtype=torch.bool)
                others[index] = False
                second = state["exp_avg_sq"]
                state["exp_avg"][where] = 0
                mean = (second[:, others] if role == "out" else second[others]).double().mean()
                second[where] = mean.to(second.dtype)
            self.started[layer][index] = step
            self.last_phase[layer][index] = self.phases

    def midpoint(self):
        loss = 0
        for layer in LAYERS:
            w_in, w_out = (self.new[f"{layer}.{ROLES[role]}"] for role in ("in", "out"))
            magnitudes = w_in.norm(dim=1) * w_out.norm(dim=0)
            loss = loss + ((magnitudes - magnitudes.mean().detach()) ** 2).sum()
        loss.backward()
        with torch.no_grad():
            for parameter in self.new.values():
                if parameter.grad is not None:
                    parameter -= LR * self.settings["midpoint_weight"] * parameter.grad
                    parameter.grad = None


PRECISIONS = {
    "float32": (torch.float32, False),
    "bf16 autocast": (torch.float32, True),
    "bf16 weights": (torch.bfloat16, False),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_as_a_loop_by_hand(precision, method, run):
    """The same neurons, and the same weights: to float32 rounding, and bf16 weights all but a few in the last place."""
    dtype, autocast = PRECISIONS[precision]
    if dtype == torch.bfloat16 and method == "midpoint":
        with pytest.raises(ValueError, match=r"midpoint_weight=5.0 can't be used with torch.bfloat16 weights"):
            run(dtype, **METHODS[method])
        return
    trainer, fresh = run(dtype, bf16=autocast, **METHODS[method])
    loop = Loop(dtype, autocast, fresh, **METHODS[method]).train()
    chosen = [row["recycled"] for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase"]
    assert chosen == loop.recycled
    assert len(chosen) >= 4 or method == "midpoint"
    expected, found = loop.effective(), dict(trainer.model.named_parameters())
    for name, weights in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_end_of_a_transition_is_exactly_x_new(precision, run):
    """With a learning rate of zero x_new is what the phase drew, to the bit, in the dtype of the weights."""
    dtype, autocast = PRECISIONS[precision]
    trainer, fresh = run(dtype, bf16=autocast, **SMOOTH | {"learning_rate": 0.0})
    assert len(fresh) == 4
    assert not trainer.neuron_table().fading_in
    table = trainer.neuron_table()
    for (step, layer), values in fresh.items():
        block, state = table.blocks[LAYERS.index(layer)], table.states[LAYERS.index(layer)]
        index = (state.last_step == step).nonzero().flatten()
        if step == 3:
            assert len(index)
        for role, lines in block.read(index).items():
            assert lines.dtype == dtype
            if len(index) == len(values[role]):
                assert torch.equal(lines, values[role])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_in_mid_transition(dtype, run):
    settings = SMOOTH | {"bf16": dtype == torch.float32, "save_strategy": "steps", "save_steps": 4}
    whole, _ = run(dtype, **settings)
    weights = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    resumed = RecyclingTrainer(
        model=tiny_bert(dropout=0.0).to(dtype), args=whole.args, train_dataset=masked_sentences(STEPS * BATCH)
    )
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    for name, parameter in resumed.model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, weights[name]), name
    for key, values in whole.neuron_table().state_dict().items():
        assert torch.equal(values, resumed.neuron_table().state_dict()[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_weights_are_those_of_their_values(dtype):
    """In the weights' own precision the sums would have lost all but the first digits."""
    from hf_recycle import find_feed_forwards

    model = tiny_bert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    for block in find_feed_forwards(model.to(dtype)):
        for piece in block.slices:
            values = piece.parameter.detach().double()
            mean, std = piece.storage.mean_std(piece)
            torch.testing.assert_close(mean, values.mean(), rtol=1e-9, atol=0)
            torch.testing.assert_close(std, values.std(), rtol=1e-5, atol=0)
        w_in, w_out = (block[role].parameter.detach().double() for role in ("in", "out"))
        expected = (w_in.norm(dim=1) * w_out.norm(dim=0)).float()
        assert block.magnitudes().dtype == torch.float32
        torch.testing.assert_close(block.magnitudes(), expected, rtol=1e-6, atol=0)
