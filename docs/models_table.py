"""The table of docs/models.md: what is found in every architecture of the installed transformers.

`python docs/models_table.py docs/models.md` renews it, in two minutes: models are built on the meta device, without
weights, from their default configuration with at most eight layers and eight experts.
"""

import contextlib
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.pages import renew_between
from hf_recycle.neurons.find import survey
from hf_recycle.neurons.left_out import alike, summary

FULL, PARTIAL, REFUSED, NOT_BUILT = "full", "partial", "refused", "not built"
MEANING = {
    FULL: "every module of a layer that looks like a feed-forward block is one",
    PARTIAL: "so are some; the others are counted and named before training",
    REFUSED: "none is found; training with a method is refused, with this reason",
    NOT_BUILT: "transformers itself does not build it here",
}
_SECONDS = 20  # for one architecture
_COUNTS = ("layer", "block", "depth", "expert")  # in names of what is counted
_CLASSES = (
    auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    auto.MODEL_MAPPING_NAMES,
)
# What configurations lack by default and their models need.
_NEEDED = {
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
}


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        model_type: as its configuration names it.
        architecture: name of its class.
        result: `FULL`, `PARTIAL`, `REFUSED` or `NOT_BUILT`.
        blocks: names of the blocks, layers and experts as stars.
        reason: what was left out, or why there is nothing.
    """

    model_type: str
    architecture: str
    result: str
    blocks: tuple[str, ...] = ()
    reason: str = ""


def architectures() -> dict[str, str]:
    """The class of every model type: with its pretraining head, if it has one."""
    found = {}
    for model_type in CONFIG_MAPPING:
        names = next((names[model_type] for names in _CLASSES if model_type in names), None)
        if names is not None:
            found[model_type] = names if isinstance(names, str) else names[0]
    return found


def sweep(wanted: Iterable[str] | None = None) -> Iterator[Row]:
    """A row for every architecture, or for some model types."""
    known = architectures()
    for model_type in known if wanted is None else wanted:
        yield look_at(model_type, known[model_type])


def look_at(model_type: str, name: str) -> Row:
    """Builds a model of one type on the meta device and looks for its blocks."""
    with _limited(_SECONDS):
        try:
            model = build(model_type, name)
        except Exception as error:  # transformers has many reasons
            return Row(model_type, name, NOT_BUILT, reason=_first_line(error))
        try:
            found = survey(model)
        except ValueError as error:
            return Row(model_type, name, REFUSED, reason=str(error).partition(". ")[2])
        kinds = tuple(name for (name,) in alike((block.name,) for block in found.blocks))
        return Row(model_type, name, PARTIAL if found.left_out else FULL, kinds, summary(found.left_out))


def build(model_type: str, name: str) -> PreTrainedModel:
    """A model without weights, small if it can be."""
    cls = getattr(transformers, name)
    values = _NEEDED.get(model_type, {})
    for shorten in (True, False):
        config = cls.config_class(**values)
        if shorten:
            _shorten(config)
        with contextlib.suppress(Exception if shorten else ()), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(config)
    raise AssertionError("the second attempt returns or raises")


def _shorten(config: PreTrainedConfig, most: int = 8) -> None:
    values = dict(vars(config))
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            _shorten(value, most)
        elif type(value) is int and value > most and any(word in name for word in _COUNTS) and "size" not in name:
            setattr(config, name, most)
            for other, items in values.items():
                if isinstance(items, list) and len(items) == value:
                    setattr(config, other, items[:most])


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_) -> None:
        raise TimeoutError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:160] if lines else type(error).__name__


def line(row: Row) -> str:
    """A row of the table in Markdown."""
    blocks = ", ".join(f"`{name}`" for name in row.blocks)
    reason = row.reason.replace("|", "\\|").replace("*", "\\*")
    return f"| {row.model_type} | {row.architecture} | {row.result} | {blocks} | {reason} |"


def page(rows: list[Row]) -> str:
    """Markdown: totals, then a row for each architecture."""
    totals = Counter(row.result for row in rows)
    lines = [
        f"transformers {transformers.__version__}: {len(rows)} architectures.",
        "",
        "| result | architectures | meaning |",
        "|---|---|---|",
        *(f"| {result} | {totals[result]} | {meaning} |" for result, meaning in MEANING.items()),
        "",
        "| model type | class | result | blocks | left out, or why there are none |",
        "|---|---|---|---|---|",
    ]
    lines += map(line, rows)
    return "\n".join(lines)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    path = Path(sys.argv[1])
    table = page(list(sweep()))
    path.write_text(renew_between(path.read_text(encoding="utf-8"), "models", table), encoding="utf-8")
