"""Rates against a machine whose clock, and so whose speed, is ours; shares of the floor against hand-made numbers."""

from dataclasses import astuple, replace
from itertools import cycle

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import machine
from benchmarks.floor import STEPS, Step, matrix_product_flops, memory_traffic
from benchmarks.machine import Rate
from benchmarks.reach import Floor, Peak, Reach, reach, step_floor

FLOPS, BYTES = 1e6, 1e5


class KnownMachine(TorchFunctionMode):
    """Every call advances the clock by what it costs at `FLOPS` and `BYTES` per second, times the next of `factors`.

    Attributes:
        onednn: how many times faster the products of oneDNN are.
    """

    def __init__(self, factors=(1.0,), onednn=0.5) -> None:
        super().__init__()
        self.now, self.calls, self.factors, self.onednn = 0.0, 0, cycle(factors), onednn

    def multiply(self, rows, weight):
        self.now += 2 * rows.shape[0] * rows.shape[1] * weight.shape[0] / FLOPS / self.onednn

    def __torch_function__(self, function, types, args=(), kwargs=None):
        seconds = {
            "mm": lambda: 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1] / FLOPS,
            "sum": lambda: args[0].nbytes / BYTES,
            "copy_": lambda: (args[0].nbytes + args[1].nbytes) / BYTES,
            "add_": lambda: 2 * args[0].nbytes / BYTES,
        }.get(getattr(function, "__name__", ""))
        if seconds:
            self.now += seconds() * next(self.factors)
            self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def known_machine(monkeypatch):
    def start(*factors, **speeds) -> KnownMachine:
        known = KnownMachine(factors or (1.0,), **speeds)
        monkeypatch.setattr(machine.time, "perf_counter", lambda: known.now)
        monkeypatch.setattr(machine, "is_available", lambda: True)
        monkeypatch.setattr(machine, "multiply", known.multiply)
        return known

    return start


def test_rates_are_those_of_the_machine(known_machine):
    sizes = [(3, 5, 7), (40, 30, 20)]
    with known_machine() as known:
        products = machine.matrix_product_rates(sizes, repeats=3)
        assert known.now > 6 * machine.LEAST_SECONDS, "too short to be measured by a real clock"
        memory = machine.memory_rates(size=400, repeats=3)
    assert list(products) == sizes
    assert list(memory) == ["read", "copy", "update"]
    for rates, expected in ((products, FLOPS), (memory, BYTES)):
        for rate in rates.values():
            assert astuple(rate) == pytest.approx([expected] * 3)


@pytest.mark.parametrize(("onednn", "best"), [(0.5, 1), (2, 2)])
def test_the_faster_library_counts(onednn, best, known_machine):
    with known_machine(onednn=onednn):
        rates = machine.matrix_product_rates([(30, 30, 30)], repeats=2)
        double = machine.matrix_product_rates([(30, 30, 30)], dtype=torch.float64, repeats=2)
    assert rates[30, 30, 30].median == pytest.approx(best * FLOPS)
    assert double[30, 30, 30].median == pytest.approx(FLOPS)  # oneDNN is for float32 here


def test_an_unsteady_machine_shows_in_the_quartiles(known_machine):
    # Long enough that a measurement is one call: the first two warm up and settle that.
    with known_machine(1, 1, 1, 2, 4, 1, 2, 4, 1, onednn=0.1) as known:
        rate = machine.matrix_product_rates([(300, 300, 300)], repeats=7)[300, 300, 300]
        assert known.calls == 9
    assert (rate.low, rate.median, rate.high) == pytest.approx((FLOPS / 4, FLOPS / 2, FLOPS))


def test_sizes_are_those_of_the_step():
    step = Step(layers=2, d_model=6, d_ff=10, vocabulary=50, batch=4, sequence=5)
    assert machine.product_sizes(step) == [(20, 6, 10), (20, 10, 6), (6, 20, 10), (3, 6, 50)]


def test_a_device_that_works_later_is_waited_for(monkeypatch):
    clock, queue = [0.0], [5.0]  # something else is under way on the device

    def synchronize(device):
        clock[0] += sum(queue)
        queue.clear()

    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    rate = machine._rate(lambda: queue.append(0.001), 7, torch.device("cuda"), repeats=2)
    assert astuple(rate) == pytest.approx([7000] * 3)
    assert clock[0] - 5 > 2 * machine.LEAST_SECONDS, "what was under way counted as the first call"


def test_the_best_medians_are_the_peak():
    slow, fast, unsteady = Rate(2, 1, 3), Rate(5, 4, 6), Rate(4, 1, 9)
    assert Peak.measured({"a": slow, "b": fast}, {"c": unsteady, "d": slow}) == Peak(5, 4)


@pytest.mark.parametrize("masked_head", [False, True])
def test_the_floor_is_products_and_then_passes(masked_head):
    step = STEPS["4 layers × 256"]
    floor = step_floor(step, Peak(FLOPS, BYTES), masked_head=masked_head, element_size=2)
    traffic = memory_traffic(step, masked_head=masked_head, element_size=2)
    passes = traffic["AdamW"] + traffic["loss: logits read, their gradient written"]
    products = sum(matrix_product_flops(step, masked_head=masked_head).values()) / FLOPS
    assert floor == Floor(products, passes / BYTES, pytest.approx(sum(traffic.values()) / BYTES))
    assert floor.seconds == products + passes / BYTES
    assert floor.overlapped == max(floor.products, floor.traffic)


def test_without_arithmetic_or_without_traffic_the_other_bounds_the_step():
    floor = Floor(products=3, passes=2, traffic=4)
    assert floor.overlapped == 4
    assert replace(floor, traffic=1).overlapped == 3


def test_a_step_at_the_floor_reaches_all_of_it_and_one_twice_as_long_half():
    floor = Floor(products=3, passes=1, traffic=2)
    assert reach(4, floor) == Reach(of_floor=1, utilisation=0.75)
    assert reach(8, floor) == Reach(of_floor=0.5, utilisation=0.375)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_time_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match="seconds="):
        reach(seconds, Floor(1, 1, 1))
