"""The statistics of one block's neurons."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_recycle.analysis.bimodality import dip, dip_p_value
from hf_recycle.analysis.duplicates import duplicates
from hf_recycle.analysis.scan import Tiles, scan
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.records.recorder import HISTOGRAM_BINS, QUANTILE_LEVELS, magnitude_quantiles

BIMODAL_P = 0.01
"""A block is called bimodal when the dip test rejects one mode with a p-value below this."""


@dataclass(frozen=True)
class Thresholds:
    """Where the lines are drawn.

    Attributes:
        dead: a neuron is *dead* if its magnitude is below `dead` times the median magnitude of those of the block's
            neurons whose magnitude is not zero, or zero.
        duplicate: cosine from which a neuron duplicates an earlier one (see `hf_recycle.analysis.duplicates`).
    """

    dead: float = 0.01
    duplicate: float = 0.99


@dataclass(frozen=True)
class BlockStatistics:
    """What one block's weights say of its neurons.

    Attributes:
        name: name of the block.
        magnitudes: float32 `(d_ff,)`.
        zero: neurons whose in-row or out-column is zero.
        dead, duplicate: indices of such neurons, int64, ascending.
        dip, dip_p: Hartigan's dip of the magnitudes that are not zero, and the p-value of one mode.
    """

    name: str
    magnitudes: npt.NDArray[np.float32]
    zero: int
    dead: npt.NDArray[np.int64]
    duplicate: npt.NDArray[np.int64]
    dip: float
    dip_p: float

    @property
    def bimodal(self) -> bool:
        return bool(self.dip_p < BIMODAL_P)

    @property
    def mean(self) -> float:
        return float(self.magnitudes.mean(dtype=np.float64))

    @property
    def std(self) -> float:
        return float(self.magnitudes.std(dtype=np.float64))

    @property
    def variation(self) -> float:
        """Coefficient of variation: standard deviation over mean; 0 where every magnitude is zero."""
        return self.std / self.mean if self.mean else 0.0

    @property
    def quantiles(self) -> dict[str, float]:
        levels = magnitude_quantiles(self.magnitudes) or []
        return {f"{level:g}": value for level, value in zip(QUANTILE_LEVELS, levels, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        counts, edges = np.histogram(self.magnitudes.astype(np.float64), bins=HISTOGRAM_BINS)
        return {
            "name": self.name,
            "neurons": len(self.magnitudes),
            "mean": self.mean,
            "std": self.std,
            "coefficient_of_variation": self.variation,
            "quantiles": self.quantiles,
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "dip": self.dip,
            "dip_p_value": self.dip_p,
            "bimodal": self.bimodal,
            "zero": self.zero,
            "dead": self.dead.tolist(),
            "duplicate": self.duplicate.tolist(),
        }


def block_statistics(block: FeedForward, tiles: Tiles, thresholds: Thresholds) -> BlockStatistics:
    """Measures one block; its weights are read once, or twice if neurons may be duplicates.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    scanned = scan(block, tiles)
    magnitudes = scanned.magnitudes.numpy()
    alive = magnitudes[magnitudes > 0].astype(np.float64)
    floor = thresholds.dead * np.median(alive) if len(alive) else 0.0
    measured = dip(alive)
    return BlockStatistics(
        name=block.name,
        magnitudes=magnitudes,
        zero=int((~scanned.has_direction).sum()),
        dead=np.flatnonzero((magnitudes < floor) | (magnitudes == 0)),
        duplicate=duplicates(block, tiles, scanned, thresholds.duplicate).numpy(),
        dip=measured,
        dip_p=dip_p_value(measured, len(alive)),
    )
