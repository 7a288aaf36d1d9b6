"""The statistics of a model's neurons, and what its recycling files say of them."""

from dataclasses import dataclass
from typing import Any

from hf_recycle.analysis.blocks import BlockStatistics, Thresholds, block_statistics
from hf_recycle.analysis.checkpoint import Checkpoint
from hf_recycle.analysis.source import Source
from hf_recycle.hub.address import HubAddress
from hf_recycle.records.files import CONFIG_FILE
from hf_recycle.records.history import RecyclingHistory


@dataclass(frozen=True)
class ModelAnalysis:
    """What `hf-recycle analyze` found in one model.

    Attributes:
        label: how the model is called in tables and figures.
        revision: the commit, of a repository.
        architecture, model_type: as the configuration names them.
        blocks: in the model's own order.
        history: what happened to its neurons, if it holds recycling files.
    """

    label: str
    revision: str | None
    architecture: str
    model_type: str
    blocks: list[BlockStatistics]
    history: RecyclingHistory | None

    @property
    def neurons(self) -> int:
        return sum(len(block.magnitudes) for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "model": self.label,
            "revision": self.revision,
            "architecture": self.architecture,
            "model_type": self.model_type,
            "neurons": self.neurons,
            "blocks": [block.to_json() for block in self.blocks],
            "recycling": None if self.history is None else self.history.stats,
        }


def analyze(
    source: Source,
    pattern: str | None = None,
    thresholds: Thresholds | None = None,
    ff_blocks: str | None = None,
) -> ModelAnalysis:
    """Measures every feed-forward neuron of a checkpoint; its weights pass through memory half a megabyte at a time.

    Args:
        source: the checkpoint.
        pattern, ff_blocks: see `find_feed_forwards`.
        thresholds: what counts as dead and as duplicate.

    Raises:
        UserError: it can't be read, is damaged or quantised, holds NaN, or has no feed-forward block that is known.
        RecyclingFileError: its recycling files are damaged.
    """
    checkpoint = Checkpoint(source, pattern, ff_blocks)
    blocks = [block_statistics(block, checkpoint.tiles, thresholds or Thresholds()) for block in checkpoint.blocks]
    return ModelAnalysis(
        label=source.label,
        revision=source.revision,
        architecture=type(checkpoint.model).__name__,
        model_type=checkpoint.config.model_type,
        blocks=blocks,
        history=recycling_history(source),
    )


def recycling_history(source: Source) -> RecyclingHistory | None:
    """What the checkpoint's recycling files record; None if it has none."""
    if source.file(CONFIG_FILE) is None:
        return None
    if source.folder is not None:
        return RecyclingHistory.from_pretrained(source.folder)
    where = str(HubAddress(source.name, source.subfolder.rstrip("/"))) if source.subfolder else source.name
    return RecyclingHistory.from_pretrained(where, source.revision, source.token)
