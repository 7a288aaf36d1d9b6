"""`RecyclingArguments`: one field for every setting, with the name, default and checks that users rely on."""

import dataclasses
import math
import re
from typing import get_type_hints

import hypothesis
import pytest
from hypothesis import strategies as st
from transformers import HfArgumentParser, TrainingArguments

from hf_recycle import RecyclingArguments
from hf_recycle.methods.pruning import make_schedule as make_pruning_schedule
from hf_recycle.methods.recycling.callback import make_schedule
from hf_recycle.methods.settings import METHODS, MagnitudeSettings, MidpointSettings, PruningSettings, RecyclingSettings

# The interface as it is documented.
DOCUMENTED = {
    "recycle_steps": None,
    "recycle_start": 0,
    "recycle_end": None,
    "recycle_fraction": 0.01,
    "recycle_fraction_schedule": "constant",
    "recycle_selection": "low_magnitude",
    "recycle_threshold": None,
    "recycle_min_share": 0.0,
    "recycle_scope": "layer",
    "recycle_reinit": "initial",
    "recycle_noise_scale": 0.05,
    "recycle_immunity": 0,
    "recycle_maturity": 0,
    "recycle_fold": "none",
    "recycle_probe_batches": 8,
    "recycle_smooth_steps": 0,
    "recycle_optimizer_state": "reset",
    "recycle_layers": None,
    "recycle_seed": None,  # that is `seed`, as it is when training begins
    "midpoint_weight": 0.0,
    "midpoint_distance": "l1",
    "midpoint_center": "mean",
    "midpoint_log": False,
    "midpoint_below_only": False,
    "prune_fraction": 0.0,
    "prune_start": 0,
    "prune_end": None,
    "prune_steps": 100,
    "prune_schedule": "linear",
    "prune_selection": "low_magnitude",
    "prune_fold": "none",
    "prune_probe_batches": 8,
    "prune_seed": None,
    "overtrain_steps": None,
    "overtrain_batches": 0,
    "overtrain_subset": "all",
    "overtrain_fraction": 1.0,
    "overtrain_seed": None,
    "l2_init_weight": 0.0,
    "l2_init_parts": ["all"],
    "shrink_perturb_steps": None,
    "shrink_perturb_keep": 0.9,
    "shrink_perturb_seed": None,
    "magnitude_steps": None,
    "masked_head": True,
}


@pytest.fixture
def make(tmp_path):
    def build(**arguments) -> RecyclingArguments:
        return RecyclingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)

    return build


def test_documented_names_and_defaults(make):
    arguments = make()
    assert {name: getattr(arguments, name) for name in DOCUMENTED} == DOCUMENTED


def test_no_other_fields_of_a_method():
    inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
    own = {item.name for item in dataclasses.fields(RecyclingArguments)} - inherited
    prefixes = tuple(method.prefix for method in METHODS)
    assert {name for name in own if name.startswith(prefixes)} == set(DOCUMENTED) - {"masked_head"}


def test_fields_mirror_the_settings(make):
    """Name, default, type and help of every setting."""
    flat = {item.name: item for item in dataclasses.fields(RecyclingArguments)}
    hints = get_type_hints(RecyclingArguments)
    count = 0
    for method in METHODS:
        for item in dataclasses.fields(method):
            field = flat[method.prefix + item.name]
            assert field.default == item.default
            assert field.default_factory == item.default_factory
            # Not field.type, which HfArgumentParser rewrites in place.
            assert hints[field.name] == get_type_hints(method)[item.name]
            assert field.metadata["help"] == item.metadata["help"]
            count += 1
        arguments = make()
        assert arguments.method_settings(method) == method()
    assert count == len(DOCUMENTED) - 1


def test_values_arrive_in_the_settings(make):
    arguments = make(recycle_steps=5, recycle_layers=[1], midpoint_weight=0.5, magnitude_steps=0.1)
    assert arguments.method_settings(RecyclingSettings).layers == [1]
    assert arguments.method_settings(RecyclingSettings).enabled
    assert arguments.method_settings(MidpointSettings).weight == 0.5
    assert arguments.method_settings(MagnitudeSettings).steps == 0.1
    flat = arguments.method_arguments()
    assert flat["recycle_steps"] == 5
    assert set(DOCUMENTED) <= set(flat)


def test_the_seed_of_the_training_is_the_default_when_training_begins(make):
    for given, expected in (({"seed": 7}, 7), ({"seed": 7, "recycle_seed": 3}, 3), ({"seed": 7, "recycle_seed": 0}, 0)):
        assert make(**given).method_settings(RecyclingSettings).resolve(10, make(**given).seed).seed == expected
    copied = dataclasses.replace(make(), seed=5)
    assert copied.method_settings(RecyclingSettings).resolve(10, copied.seed).seed == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recycle_fraction": 0}, r"recycle_fraction=0 is not allowed: it must be a number in \(0, 1\]"),
        ({"recycle_fraction": 1.5}, r"recycle_fraction=1\.5 is not allowed"),
        ({"recycle_steps": 1.5}, r"recycle_steps=1\.5 is not allowed: it must be an integer number of steps"),
        ({"recycle_start": 20, "recycle_end": 10}, "recycle_start=20 is after recycle_end=10"),
        ({"recycle_selection": "x"}, "recycle_selection='x' is not allowed: it must be one of low_magnitude"),
        ({"recycle_reinit": "x"}, "recycle_reinit='x' is not allowed: it must be one of initial"),
        ({"recycle_immunity": -1}, "recycle_immunity=-1 is not allowed: it must be an integer >= 0"),
        ({"recycle_smooth_steps": 1.5}, r"recycle_smooth_steps=1\.5 is not allowed"),
        ({"recycle_optimizer_state": "x"}, "recycle_optimizer_state='x' is not allowed: it must be one of reset"),
        ({"midpoint_weight": -1}, "midpoint_weight=-1 is not allowed: it must be a number >= 0"),
        ({"midpoint_distance": "l3"}, "midpoint_distance='l3' is not allowed: it must be one of l1, l2"),
        ({"magnitude_steps": 2.5}, r"magnitude_steps=2\.5 is not allowed"),
    ],
)
def test_messages_name_the_field_the_value_and_what_is_allowed(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


INF, NAN = math.inf, math.nan


@hypothesis.given(
    method=st.sampled_from(METHODS),
    number=st.one_of(
        st.sampled_from([0, -0.0, 5e-324, 1e-300, 2**53, 2**63, 10**30, 10**400, 1e30, 1.7e308, INF, -INF, NAN, -1]),
        st.floats(),
        st.integers(),
    ),
    total=st.sampled_from([1, 7, 2**53]),
    data=st.data(),
)
def test_every_number_is_refused_in_a_sentence_or_works(method, number, total, data):
    numeric = [item.name for item in dataclasses.fields(method) if type(item.default) in (int, float, type(None))]
    names = data.draw(st.sets(st.sampled_from([name for name in numeric if name != "layers"]), min_size=1))
    refusal = None
    try:
        _use(method(**dict.fromkeys(names, number)), total)
    except ValueError as error:
        refusal = str(error)
    assert refusal is None or re.fullmatch(rf".*{method.prefix}.*\.", refusal)


def _use(settings, total):
    """As a training of `total` steps does."""
    settings.validate(settings.prefix)
    settings, step = settings.resolve(total, 42), min(5, total)
    if isinstance(settings, RecyclingSettings) and settings.enabled:
        schedule = make_schedule(settings, total)
        assert len(schedule.phases_until(total)) >= 0
        assert not schedule.is_phase(step) or 0 <= schedule.quota(step, 100) <= 100
    if isinstance(settings, PruningSettings) and settings.enabled:
        assert 0 <= make_pruning_schedule(settings, total).target(step, 100) <= 100


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": 2**63},
        {"num_train_epochs": INF},
        {"num_train_epochs": NAN},
        {"learning_rate": INF},
        {"learning_rate": NAN},
        {"learning_rate": 1e300},
        {"weight_decay": -INF},
        {"max_grad_norm": NAN},
    ],
    ids=str,
)
def test_numbers_of_the_trainer_that_no_training_comes_well_out_of(make, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(
        ValueError, match=f"^{name}={re.escape(repr(value))} is not allowed: it must be a number, at most"
    ):
        make(**arguments)


def test_no_clipping_may_be_written_as_an_infinite_norm(make):
    assert make(max_grad_norm=INF).max_grad_norm == INF


@pytest.mark.parametrize("value", [None, 0, 1, 1.0, 0.5, 100_000, 0.0001])
def test_steps_that_are_allowed(make, value):
    assert make(recycle_steps=value, magnitude_steps=value).recycle_steps == value


@pytest.mark.parametrize("bounds", [(0, 0), (10, 10), (0.5, 100), (100, 0.5), (1, None), (0, 0.5)])
def test_bounds_that_may_be_right(make, bounds):
    """A fraction and a number of steps can't be compared before the length of training is known."""
    start, end = bounds
    make(recycle_start=start, recycle_end=end)


def test_every_argument_can_be_parsed_from_a_command_line(make, tmp_path):
    parser = HfArgumentParser(RecyclingArguments)
    line = f"--output_dir {tmp_path} --use_cpu --recycle_steps 10 --recycle_fraction 0.1 --recycle_layers 0 2"
    line += " --recycle_end 0.5 --midpoint_weight 1e-7 --midpoint_log --masked_head false --recycle_immunity 2"
    (arguments,) = parser.parse_args_into_dataclasses(line.split())
    assert (arguments.recycle_steps, arguments.recycle_fraction, arguments.recycle_layers) == (10, 0.1, [0, 2])
    assert (arguments.recycle_end, arguments.midpoint_weight, arguments.midpoint_log) == (0.5, 1e-7, True)
    assert arguments.masked_head is False
    assert arguments.recycle_immunity == 2


def test_a_token_is_in_no_text_of_the_arguments(tmp_path):
    arguments = RecyclingArguments(output_dir=str(tmp_path), hub_token="hf_not_to_be_seen")
    assert "hf_not_to_be_seen" not in repr(arguments) + str(arguments)
