"""The share of tokens that is masked, as a schedule over a training."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

SHAPES = ("steps", "linear")


class MaskRates:
    """A piecewise constant or linear share of masked tokens, a pure function of the optimizer step.

    Args:
        points: from when to which share, such as `{"0": 0.3, "0.8": 0.15}`. When: a whole number is an optimizer step,
            a number with a point in [0, 1] a share of the training. Before the first point its share holds, after the
            last one the last.
        shape: "steps": a share holds until the next point; "linear": it changes evenly to that of the next point.

    Raises:
        ValueError: the text names no points, or an unknown shape.
    """

    def __init__(self, points: Mapping[str, float], shape: str = "steps") -> None:
        if shape not in SHAPES:
            raise ValueError(f"mlm_probability_shape={shape!r} is unknown; use {' or '.join(SHAPES)}")
        if not isinstance(points, Mapping) or not points:
            raise ValueError(f"mlm_probability_schedule={points!r} must be a mapping, such as {{0: 0.3, 0.8: 0.15}}")
        self._points = [(_when(key), _share(key, value)) for key, value in points.items()]
        self._linear = shape == "linear"

    def at(self, steps: npt.NDArray[np.int64], of: int) -> npt.NDArray[np.float64]:
        """The share at each of some optimizer steps, counted from 0, of a training of `of` steps.

        Raises:
            ValueError: points that are not in order in a training of that length.
        """
        whens = np.array([round(when * of) if isinstance(when, float) else when for when, _ in self._points])
        if (np.diff(whens) <= 0).any():
            raise ValueError(f"mlm_probability_schedule: its points fall on steps {whens.tolist()} of {of}: order them")
        shares = np.array([share for _, share in self._points])
        if self._linear:
            return np.interp(steps, whens, shares)
        return shares[np.maximum(np.searchsorted(whens, steps, side="right") - 1, 0)]


def _when(key: object) -> int | float:
    text = str(key)
    try:
        when = float(text) if any(mark in text for mark in ".eE") else int(text)
    except ValueError:
        when = -1
    if not (when >= 0 and (isinstance(when, int) or when <= 1)):
        raise ValueError(
            f"mlm_probability_schedule: {key!r} must be a step, or a share of the training from 0.0 to 1.0"
        )
    return when


def _share(key: object, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(
            f"mlm_probability_schedule: the share {value!r} at {key} must lie between 0 and 1, both excluded"
        )
    return float(value)
