"""Stages of a run: from which step on its feed-forward blocks have which share of their neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hf_recycle.errors import UserError
from hf_recycle.methods.schedule import resolve_steps


@dataclass(frozen=True)
class Stages:
    """`{0: 0.5, 0.1: 1.0}`: half the neurons for the first tenth of the training, then all.

    Attributes:
        starts: where each begins, in steps, or as a share below 1 of the training; the first is 0.
        shares: of the neurons.
    """

    starts: tuple[float, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, given: Mapping[Any, Any]) -> Stages:
        """From what a recipe or the command line says.

        Raises:
            UserError: no such mapping.
        """
        try:
            pairs = sorted((float(start), float(share)) for start, share in given.items())
        except (TypeError, ValueError):
            pairs = []
        starts, shares = tuple(start for start, _ in pairs), tuple(share for _, share in pairs)
        steps = all(math.isfinite(start) and (start < 1 or start.is_integer()) for start in starts)
        if not pairs or starts[0] != 0 or not steps or not all(0 < share <= 1 for share in shares):
            raise UserError(
                f"ff_stages={dict(given)} must map steps (from 0 on; below 1: a share of the training) to shares of "
                "the neurons above 0 and up to 1, such as {0: 0.5, 0.1: 1.0}"
            )
        if any(first == second for first, second in pairwise(shares)):
            raise UserError(
                f"ff_stages={dict(given)} has two stages of one width after each other; leave the later out"
            )
        return cls(starts, shares)

    def in_steps(self, max_steps: int) -> Stages:
        """With whole steps for a training of so many.

        Raises:
            UserError: two begin at once, or one when the training is over.
        """
        starts = tuple(resolve_steps(start, max_steps) or 0 for start in self.starts)
        told = dict(zip(self.starts, self.shares, strict=True))
        if len(set(starts)) < len(starts) or list(starts) != sorted(starts) or starts[-1] >= max_steps:
            raise UserError(
                f"ff_stages={told} begin at steps {', '.join(map(str, starts))} of {max_steps:,}; each must begin "
                "later than the one before it, and before the end"
            )
        return Stages(starts, self.shares)

    def end_after(self, step: int) -> int | None:
        """The step at which the stage of step `step` ends; None: with the training. Needs whole steps."""
        return next((int(start) for start in self.starts if start > step), None)

    def change_at(self, step: int) -> tuple[float, float] | None:
        """The shares before and after, if a stage but the first begins at step `step`. Needs whole steps."""
        if step not in self.starts[1:]:
            return None
        number = self.starts.index(step)
        return self.shares[number - 1], self.shares[number]
