"""What the article's authors published, beside what a study measured.

Source: *Neuron Recycling* and the plots of its research code, for BERT Medium after about 79,000 steps of 80,000. Arms
have the names of `recipes/studies/article.yaml`.
"""

from collections import Counter
from dataclasses import dataclass

from hf_recycle.studies.results import StudyResults

# Training losses of two series of runs, each with a baseline of its own.
_LOSSES = (
    {
        "baseline": 1.853,
        "plain": 1.854,
        "immunity-2": 1.873,
        "immunity-6": 1.912,
        "matched-normal": 1.889,
        "midpoint-1e-7": 1.855,
        "midpoint-1e-3": 1.861,
        "midpoint-1": 1.863,
        "ff-quarter": 1.924,
        "ff-half": 1.893,
        "ff-double": 1.814,
        "no-ff": 2.036,
    },
    {
        "baseline": 1.847,
        "copy-noise-01pct": 1.847,
        "copy-noise-05pct": 1.873,
        "smooth-01pct": 1.852,
        "smooth-1pct": 1.878,
        "prune-low": 2.071,
        "prune-high": 2.111,
        "prune-random": 2.120,
    },
)

PUBLISHED_LOSS_DIFFERENCES = {
    arm: round(loss - series["baseline"], 3) for series in _LOSSES for arm, loss in series.items() if arm != "baseline"
}
"""Training loss minus that of the baseline of the same series, in nats."""

PUBLISHED_COUNTS = {
    "plain": {0: 1799, 1: 30, 2: 11, 3: 4, 4: 2, 5: 9, 6: 33, 7: 160},
    "immunity-2": {0: 1347, 1: 108, 2: 452, 3: 141},
    "immunity-6": {0: 613, 1: 1435},
    "matched-normal": {0: 1285, 1: 355, 2: 231, 3: 105, 4: 58, 5: 13, 6: 1},
}
"""Neurons of one layer of 2,048 by how often they were recycled in 7 phases of 10%."""


@dataclass(frozen=True)
class CountsRow:
    """Shares of the neurons by how often they were recycled.

    Attributes:
        here: times recycled to share, over all layers and seeds.
        published: the same; None if nothing was published.
    """

    arm: str
    here: dict[int, float]
    published: dict[int, float] | None


def counts_rows(results: StudyResults) -> list[CountsRow]:
    """A row for each arm that a figure of the study shows recycle counts of; none if nothing was published of any."""
    arms = dict.fromkeys(arm for plan in results.study.figures if plan.kind == "recycle_counts" for arm in plan.arms)
    rows = []
    for arm in arms:
        counts = [block for run in results.of(arm) if run.history for block in run.history.counts.values()]
        if any(block.any() for block in counts):
            here = sum((Counter(block.tolist()) for block in counts), Counter())
            published = PUBLISHED_COUNTS.get(arm)
            rows.append(CountsRow(arm, _shares(here), None if published is None else _shares(published)))
    return rows if any(row.published for row in rows) else []


def _shares(counts: dict[int, int]) -> dict[int, float]:
    total = sum(counts.values())
    return {times: counts[times] / total for times in sorted(counts)}
