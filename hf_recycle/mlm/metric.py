"""The share of masked tokens predicted exactly, as an `evaluate` metric that ships with the package."""

import math
import os
from typing import Any

import datasets
import evaluate

_DESCRIPTION = "The share of masked tokens that a masked language model predicts exactly."
_INPUTS = """
Args:
    predictions: token ids predicted, one for each masked token.
    references: the tokens that were masked.

Returns:
    accuracy: share of the predictions that equal their reference, NaN where there is none.
"""


class MaskedAccuracy(evaluate.Metric):
    """Accuracy over masked tokens. It needs no network, and by default keeps what is added in memory and
    writes no file, so that any number of processes may use it at once."""

    def __init__(self, *args: Any, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=tokens, format="numpy"
        )

    def _build_data_dir(self) -> str:
        # The base class makes the folder even when it will write nothing there; the home may be read-only.
        if self.keep_in_memory:
            return os.path.join(self._data_dir_root, self.name, self.config_name)
        return super()._build_data_dir()

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict | None:
        """Accuracy over what was added and what is given here: `{"accuracy": float}`, NaN over nothing."""
        if self.writer is None and (predictions is None or len(predictions) == 0):
            return {"accuracy": math.nan}
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float((predictions == references).mean()) if len(references) else math.nan}
