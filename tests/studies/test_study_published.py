"""Measured numbers beside the published ones."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hf_recycle.studies.published import PUBLISHED_COUNTS, PUBLISHED_LOSS_DIFFERENCES, counts_rows
from hf_recycle.studies.report import write_report

FIGURES = [("recycle_counts", "Times", ["plain", "own", "baseline"])]


@pytest.fixture
def results(made_up):
    arms = {"baseline": [2.0, 2.1], "plain": [2.2, 2.1], "own": [2.0, 2.0]}
    return made_up(arms, {name: {"phases": 5} for name in ("plain", "own")}, figures=FIGURES)


def test_published_counts_are_of_whole_layers_and_of_seven_phases():
    for arm, counts in PUBLISHED_COUNTS.items():
        assert sum(counts.values()) == 2048, arm
        # 7 phases of 204.8 neurons
        assert abs(sum(times * neurons for times, neurons in counts.items()) - 7 * 204.8) <= 7, arm


def test_differences_are_taken_within_a_series():
    assert PUBLISHED_LOSS_DIFFERENCES["plain"] == 0.001
    assert PUBLISHED_LOSS_DIFFERENCES["copy-noise-01pct"] == 0
    assert PUBLISHED_LOSS_DIFFERENCES["smooth-1pct"] == 0.031
    assert PUBLISHED_LOSS_DIFFERENCES["ff-double"] == -0.039
    assert "baseline" not in PUBLISHED_LOSS_DIFFERENCES


def test_shares_over_layers_and_seeds(results):
    plain, own = counts_rows(results)  # the baseline recycled nothing
    assert (plain.arm, own.arm) == ("plain", "own")
    counts = Counter(int(n) for run in results.of("plain") for block in run.history.counts.values() for n in block)
    assert plain.here == pytest.approx({times: counts[times] / counts.total() for times in counts})
    assert sum(plain.here.values()) == pytest.approx(1)
    assert plain.published[7] == 160 / 2048
    assert own.published is None


def test_the_pages_set_them_side_by_side(results, tmp_path):
    for page in write_report(results, tmp_path, "hf-recycle study x", jobs=1):
        text = page.read_text()
        assert "7: 7.8%" in text
        assert "+0.001" in text
        assert f"{np.mean([0.2, 0.0]):+.4f}" in text


def test_nothing_published_and_nothing_recycled_say_nothing(made_up, tmp_path):
    for page in write_report(made_up({"baseline": [2.0], "own": [2.1]}), tmp_path, "hf-recycle study x", jobs=1):
        assert "published" not in page.read_text()


def test_arms_that_only_share_a_name_with_published_ones_say_nothing(made_up, tmp_path):
    """`plain` is recycling in the article, and ordinary training elsewhere."""
    arms, recycled = {"plain": [2.0, 2.1], "own": [2.0, 2.0]}, {"own": {"phases": 5}}
    results = made_up(arms, recycled, figures=[("recycle_counts", "Times", ["own"])])
    results = replace(results, study=replace(results.study, baseline="plain"))
    for page in write_report(results, tmp_path, "hf-recycle study x", jobs=1):
        assert "published" not in page.read_text()
