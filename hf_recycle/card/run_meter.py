"""How long a run has trained and on how many tokens, over all its resumes."""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class RunMeter:
    """Counts on this process. `tokens` and `seconds` go on from what a checkpoint holds; None is unknown."""

    def __init__(self) -> None:
        self.start({"seconds": 0.0, "tokens": 0})

    def start(self, before: Mapping[str, Any]) -> None:
        """Begin to count, after the `seconds` and `tokens` (of all processes) of `before`."""
        self._seconds_before, self._tokens_before = before.get("seconds"), before.get("tokens")
        self.own_tokens = 0
        self._began: float | None = time.monotonic()
        self._own_seconds = 0.0

    def stop(self) -> None:
        """Training has ended: time counts no more."""
        if self._began is not None:
            self._own_seconds += time.monotonic() - self._began
        self._began = None

    def count(self, inputs: Any) -> None:
        """Count the positions of a training batch; a batch without `input_ids` has none."""
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if isinstance(ids, Tensor):
            self.own_tokens += ids.numel()

    def reading(self, tokens: int) -> dict[str, Any]:
        """Seconds and tokens so far; `tokens` is the sum of `own_tokens` over all processes."""
        own = self._own_seconds + (0.0 if self._began is None else time.monotonic() - self._began)
        seconds = None if self._seconds_before is None else round(self._seconds_before + own, 3)
        return {"seconds": seconds, "tokens": None if self._tokens_before is None else self._tokens_before + tokens}
