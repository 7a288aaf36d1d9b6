"""Every optimizer that the Trainer knows by name, in real runs: it works, its state handled as documented, or it is
refused before training in one sentence."""

import copy

import pytest
import torch
from support.tiny_runs import assert_same_weights, masked_sentences, tiny_bert
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.training_args import OptimizerNames

from hf_recycle import RecyclingTrainer

PLAIN = {"recycle_steps": 3, "recycle_fraction": 0.25, "max_steps": 7}
SMOOTH = PLAIN | {"recycle_smooth_steps": 2}
# What runs on a CPU without further packages.
WORKING = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
OPTIONS = {"sgd": "momentum=0.9", "rmsprop": "momentum=0.9,centered=True"}
FIRST = {"exp_avg", "momentum_buffer", "grad_avg"}


class States(TrainerCallback):
    """Copies the optimizer's state before and after the phase at step 3."""

    def __init__(self):
        self.copies = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 3:
            inner = optimizer.optimizer
            names = {parameter: name for name, parameter in model.named_parameters()}
            self.copies.append({names[p]: copy.deepcopy(values) for p, values in inner.state.items()})


@pytest.fixture
def run(arguments):
    def train(optimizer=None, masked=48, **settings):
        before, after = States(), States()
        trainer = RecyclingTrainer(
            model=tiny_bert(dropout=0.0),
            args=arguments(**settings),
            train_dataset=masked_sentences(masked),
            optimizer_cls_and_kwargs=None if optimizer is None else (optimizer, {"lr": 1e-2}),
        )
        # Right before and after the methods act.
        trainer.remove_callback(trainer.neuron_methods)
        for callback in (before, trainer.neuron_methods, after):
            trainer.add_callback(callback)
        trainer.train()
        return trainer, before.copies, after.copies

    return train


def lines(name: str, values: torch.Tensor, index: list[int], width: tuple) -> torch.Tensor | None:
    """Which entries of a state tensor belong to the neurons `index`, bool; None: to no single neuron."""
    where = torch.zeros(values.shape, dtype=torch.bool)
    out = name.endswith("output.dense.weight")
    if values.shape == width:
        where[(slice(None), index) if out else (index,)] = True
    elif values.shape == (width[1] if out else width[0],):  # Adafactor: one number for each neuron
        where[index] = True
    else:
        return None
    return where


@pytest.mark.parametrize("mode", ["reset", "zero", "keep"])
@pytest.mark.parametrize("optim", WORKING)
def test_state_of_recycled_neurons(optim, mode, run):
    trainer, [before], [after] = run(optim=optim, optim_args=OPTIONS.get(optim), recycle_optimizer_state=mode, **PLAIN)
    rows = [row for row in trainer.recorder.to_table().to_pylist() if row["kind"] == "phase" and row["step"] == 3]
    shapes = {name: tuple(p.shape) for name, p in trainer.model.named_parameters()}
    changed = set()
    for name, state in before.items():
        index = next((row["recycled"] for row in rows if name.startswith(row["block"])), None)
        mine = "intermediate.dense" in name or (name.endswith("output.dense.weight") and "attention" not in name)
        for key, old in state.items():
            expected = old
            if mine and mode != "keep" and isinstance(old, torch.Tensor) and old.dim():
                where = lines(name, old, index, shapes[name])
                if where is not None:
                    assert len(index) == 8
                    scalar = 0.0 if key in FIRST or mode == "zero" else float(old[~where].double().mean())
                    expected = torch.where(where, scalar, old)
                    changed.add(key)
            if isinstance(old, torch.Tensor):
                torch.testing.assert_close(after[name][key], expected, rtol=1e-6, atol=0, msg=f"{name} {key}")
            else:
                assert after[name][key] == old
    expected_keys = {
        "adamw_torch": {"exp_avg", "exp_avg_sq"},
        "adamw_torch_fused": {"exp_avg", "exp_avg_sq"},
        "adafactor": {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"},
        "sgd": {"momentum_buffer"},
        "adagrad": {"sum"},
        "rmsprop": {"square_avg", "momentum_buffer", "grad_avg"},
    }
    assert changed == (set() if mode == "keep" else expected_keys[optim])


@pytest.mark.parametrize("optim", WORKING)
def test_smooth_recycling_resumes(optim, arguments, run):
    settings = SMOOTH | {"optim": optim, "optim_args": OPTIONS.get(optim), "save_strategy": "steps", "save_steps": 4}
    whole, _, _ = run(**settings)
    resumed = RecyclingTrainer(model=tiny_bert(dropout=0.0), args=whole.args, train_dataset=masked_sentences(48))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert sum(int(counts.sum()) for counts in resumed.neuron_table().counts.values()) == 32
    assert_same_weights(whole, resumed)


# ---- Stand-ins for packages that are not installed, with their names and the layout of their state ----


def stand_in(package: str, name: str, make_state, base=torch.optim.Optimizer):
    """An optimizer class of another package: SGD in what it does, with `make_state(parameter)` for its state."""

    def __init__(self, params, lr=1e-3, **_):
        torch.optim.Optimizer.__init__(self, params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter] = self.state[parameter] or make_state(parameter)
                    parameter.sub_(group["lr"] * parameter.grad)

    return type(name, (base,), {"__init__": __init__, "step": step, "__module__": package})


def blockwise_8bit(parameter):
    blocks = -(-parameter.numel() // 256)
    eight = {f"state{i}": torch.zeros(parameter.shape, dtype=torch.uint8) for i in (1, 2)}
    maps = {f"qmap{i}": torch.linspace(-1, 1, 256) for i in (1, 2)}
    return {"step": 0, **eight, **maps, **{f"absmax{i}": torch.zeros(blocks) for i in (1, 2)}}


def full_state(*keys):
    return lambda parameter: {"step": 0, **{key: torch.zeros_like(parameter) for key in keys}}


KNOWN = {
    "adamw_bnb_8bit": (stand_in("bitsandbytes.optim.adamw", "AdamW", blockwise_8bit), 2),
    "lion_32bit": (stand_in("bitsandbytes.optim.lion", "Lion", full_state("state1")), 1),
    "adamw_torch_8bit": (stand_in("torchao.optim.adam", "AdamW8bit", full_state("exp_avg", "exp_avg_sq")), 2),
    "stable_adamw": (
        stand_in("optimi.stableadamw", "StableAdamW", full_state("exp_avg", "exp_avg_sq", "kahan_comp")),
        3,
    ),
}
PROJECTED = "it keeps the moments of projected gradients"
UNKNOWN = {
    "adamw_anyprecision": (
        stand_in("torchdistx.optimizers", "AnyPrecisionAdamW", full_state("exp_avg", "exp_avg_sq", "compensation")),
        "its state is unknown",
    ),
    "apex": (
        stand_in("apex.optimizers.fused_adam", "FusedAdam", full_state("exp_avg", "exp_avg_sq")),
        "its state is unknown",
    ),
    "galore_adamw": (stand_in("galore_torch.adamw", "AdamW", lambda p: {"step": 0, "projector": object()}), PROJECTED),
    "apollo_adamw": (
        stand_in("apollo_torch.apollo", "APOLLOAdamW", lambda p: {"step": 0, "projector": object()}),
        PROJECTED,
    ),
    "grokadamw": (
        stand_in("grokadamw", "GrokAdamW", full_state("exp_avg", "exp_avg_sq", "grok_ema")),
        "it keeps its state outside of the optimizer's own",
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_state_of_other_packages_is_reset(name, run):
    """With the packages themselves: tests/neurons/test_quantized_state.py, test_optimizers_page.py."""
    cls, moments = KNOWN[name]
    trainer, _, _ = run(cls, recycle_optimizer_state="reset", **PLAIN)
    # 8 of 32 neurons in 2 blocks and 2 phases, with 16 weights in, a bias and 16 weights out.
    assert trainer.neuron_table().optimizer_entries_reset == 8 * 2 * 2 * 33 * moments


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_state_is_refused_before_training(name, run):
    cls, why = UNKNOWN[name]
    package = cls.__module__.partition(".")[0]
    message = rf"can't be used with {cls.__name__} of {package}: {why}.*; use recycle_optimizer_state='keep'"
    steps = []
    counting = type(cls.__name__, (cls,), {"step": lambda self, closure=None: steps.append(1)})
    counting.__module__ = cls.__module__
    for mode in ("reset", "zero"):
        with pytest.raises(ValueError, match=message):
            run(counting, recycle_optimizer_state=mode, **PLAIN)
    assert not steps


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_state_is_kept(name, run):
    """`keep` needs to know nothing of it."""
    trainer, [before], [after] = run(UNKNOWN[name][0], recycle_optimizer_state="keep", **SMOOTH)
    assert sum(int(counts.sum()) for counts in trainer.neuron_table().counts.values()) == 32
    for parameter, state in before.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(after[parameter][key], value)


IN_BACKWARD = "it updates weights during the backward pass"
NO_WAY = {
    "lomo": (stand_in("lomo_optim.lomo", "Lomo", full_state()), IN_BACKWARD),
    "adalomo": (stand_in("lomo_optim.adalomo", "AdaLomo", full_state()), IN_BACKWARD),
    "galore_adamw_layerwise": (
        type(
            "Dummy",
            (LayerWiseDummyOptimizer,),
            {"__init__": lambda self, params, lr: LayerWiseDummyOptimizer.__init__(self)},
        ),
        IN_BACKWARD,
    ),
    **{
        f"schedule_free_{kind.lower()}": (
            stand_in("schedulefree", f"{kind}ScheduleFree", full_state("z", "exp_avg_sq")),
            "it keeps a second copy of the weights",
        )
        for kind in ("AdamW", "RAdam", "SGD")
    },
}


@pytest.mark.parametrize(
    ("method", "field"),
    [
        (PLAIN | {"recycle_optimizer_state": "keep"}, "recycle_steps=3"),
        (SMOOTH, "recycle_steps=3"),
        ({"midpoint_weight": 0.1}, "midpoint_weight=0.1"),
        ({"prune_fraction": 0.5, "prune_steps": 1}, "prune_fraction=0.5"),
        ({"overtrain_steps": 2, "overtrain_batches": 1}, "overtrain_steps=2"),
        ({"l2_init_weight": 0.5}, "l2_init_weight=0.5"),
        ({"shrink_perturb_steps": 2}, "shrink_perturb_steps=2"),
    ],
)
@pytest.mark.parametrize("name", NO_WAY)
def test_what_no_method_can_work_with_is_refused(name, method, field, arguments):
    cls, why = NO_WAY[name]
    trainer = RecyclingTrainer(
        model=tiny_bert(),
        args=arguments(**method),
        train_dataset=masked_sentences(),
        optimizer_cls_and_kwargs=(cls, {"lr": 1e-3}),
    )
    with pytest.raises(
        ValueError, match=rf"^{field} can't be used with {cls.__name__} of \w+: {why}.*use optim='adamw_torch'"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_unknown_entries_of_a_subclass_are_refused_at_the_first_step(run):
    """Only then is the state made."""
    for state, what in (
        ({"slow": (16, 32)}, "'slow' is unknown"),
        ({"absmax": (9,)}, "'absmax' is unknown"),
        ({"exp_avg": (2, 3)}, "'exp_avg' is not laid out like the weights"),
    ):
        cls = stand_in(
            "more",
            "AdamWithMore",
            lambda p, s=state: {k: torch.zeros(p.shape if k == "slow" else shape) for k, shape in s.items()},
            base=torch.optim.Adam,
        )
        with pytest.raises(ValueError, match=f"AdamWithMore of more: its state {what}"):
            run(cls, **PLAIN | {"recycle_steps": 5})


def test_a_phase_that_finds_nothing_to_reset_is_an_error(run, monkeypatch):
    monkeypatch.setattr("hf_recycle.methods.recycling.phase.reset_state", lambda *_: 0)
    with pytest.raises(ValueError, match=r"with AdamW: nothing of its state was found to reset after neurons were rec"):
        run(**PLAIN)


class MatricesOnly(torch.optim.Muon):
    """Muon takes nothing else; biases stay as they are."""

    def __init__(self, groups, lr):
        super().__init__([p for group in groups for p in group["params"] if p.dim() == 2], lr=lr)


def test_muon(run):
    trainer, [before], [after] = run(MatricesOnly, **PLAIN)
    [first, _] = [
        row["recycled"]
        for row in trainer.recorder.to_table().to_pylist()
        if row["kind"] == "phase" and row["step"] == 3
    ]
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    expected = before[name]["momentum_buffer"].clone()
    assert expected[first].any()
    expected[first] = 0
    assert torch.equal(after[name]["momentum_buffer"], expected)


def test_every_name_is_accounted_for():
    """A name that transformers adds must be looked at."""
    known = set(WORKING) | set(KNOWN) | set(UNKNOWN) | set(NO_WAY)
    alike = {
        "bitsandbytes": "adamw_8bit ademamix ademamix_8bit lion_8bit paged_adamw_32bit paged_adamw_8bit "
        "paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop_bnb rmsprop_bnb_8bit "
        "rmsprop_bnb_32bit",
        "torchao": "adamw_torch_4bit",
        "galore_torch": "galore_adamw_8bit galore_adafactor galore_adamw_8bit_layerwise galore_adafactor_layerwise",
        "apollo_torch": "apollo_adamw_layerwise",
        "other devices, AdamW in all but name": "adamw_torch_xla adamw_torch_npu_fused",
    }
    for names in alike.values():
        known |= set(names.split())
    assert {name.value for name in OptimizerNames} == known - {"apex"}
