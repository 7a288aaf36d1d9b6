"""The rows on selection phases, from measurements made up."""

import pytest

from benchmarks import phases
from benchmarks.phase_cost import SHAPES, PhaseCost, Timing
from benchmarks.row import Effort


def made_up(power):
    """Costs of all shapes whose phases take three reads at first and grow with this power of the weights."""
    smallest = next(iter(SHAPES.values())).weights

    def cost(shape, repetitions):
        scale = shape.weights / smallest
        times = {"read": scale, "magnitudes": 2 * scale, "phase_keep": 3 * scale**power, "phase_reset": 9 * scale}
        return PhaseCost(
            shape,
            0.01,
            repetitions,
            **{name: Timing.of([noise * t for noise in (1, 2, 1)]) for name, t in times.items()},
        )

    return cost


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_growth_and_ratios(power, monkeypatch):
    monkeypatch.setattr(phases, "phase_cost", made_up(power))
    (bench,) = phases.BENCHES
    found = bench.run(Effort(3, quick=False))
    sizes = [shape.weights for shape in SHAPES.values()]
    assert found["phase-growth"].value.median == pytest.approx(power)
    assert found["phase"].value.median == pytest.approx(3 * (sizes[-1] / sizes[0]) ** (power - 1))
    assert found["magnitudes-read"].value.median == pytest.approx(2)
    assert set(found) == {row.name for row in bench.rows}
    assert "up to 9.0×" in found["phase"].note
