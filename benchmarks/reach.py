"""How near a measured step comes to the floor of the machine it ran on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.floor import FLOAT32, Step, matrix_product_flops, pass_bytes, product_bytes
from benchmarks.machine import Rate


@dataclass(frozen=True)
class Peak:
    """The best a machine can do, as measured or as its maker states it."""

    flops_per_second: float
    bytes_per_second: float

    @classmethod
    def measured(cls, products: Mapping[Any, Rate], memory: Mapping[Any, Rate]) -> "Peak":
        """The best medians among what `matrix_product_rates` and `memory_rates` return."""
        return cls(*(max(rate.median for rate in rates.values()) for rates in (products, memory)))


@dataclass(frozen=True)
class Floor:
    """Seconds that a step takes at least.

    Attributes:
        products: of its matrix products, all at the peak rate, which covers what memory they touch.
        passes: of the loss and AdamW, at the peak bandwidth.
        traffic: of all memory traffic, that of the products included, at the peak bandwidth.
    """

    products: float
    passes: float
    traffic: float

    @property
    def seconds(self) -> float:
        """Kernel after kernel, as torch runs them: products and passes."""
        return self.products + self.passes

    @property
    def overlapped(self) -> float:
        """Were all traffic hidden behind arithmetic, or the other way round."""
        return max(self.products, self.traffic)


def step_floor(step: Step, peak: Peak, *, masked_head: bool, element_size: int = FLOAT32) -> Floor:
    """The floor of `step` on a machine; `element_size` as for `product_bytes`."""
    products = sum(product_bytes(step, masked_head=masked_head, element_size=element_size).values())
    passes = sum(pass_bytes(step, masked_head=masked_head, element_size=element_size).values())
    return Floor(
        sum(matrix_product_flops(step, masked_head=masked_head).values()) / peak.flops_per_second,
        passes / peak.bytes_per_second,
        (products + passes) / peak.bytes_per_second,
    )


@dataclass(frozen=True)
class Reach:
    """Shares of a measured time, 1 at best.

    Attributes:
        of_floor: `Floor.seconds` over the measured seconds.
        utilisation: model FLOPs utilisation: seconds of the matrix products at the peak rate over the measured seconds.
    """

    of_floor: float
    utilisation: float


def reach(seconds: float, floor: Floor) -> Reach:
    """How near a step that took `seconds` came to its `floor`.

    Raises:
        ValueError: if `seconds` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: give the measured time of a step, above 0")
    return Reach(floor.seconds / seconds, floor.products / seconds)
