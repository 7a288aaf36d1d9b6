import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import markdown_it
import numpy as np
import pytest
from matplotlib.image import imread

from hf_recycle.studies import figures, one_shot
from hf_recycle.studies.figures import FIGURES
from hf_recycle.studies.plan import Claim, FigurePlan, Removal
from hf_recycle.studies.report import arm_rows, count_tests, summary_table, write_report

ARMS = {"baseline": [2.0, 2.1, 2.05], "plain": [2.02, 2.09, 2.11], "no-ff": [2.5, 2.6, 2.4], "half": [2.2, 2.3, 2.2]}
HISTORIES = {"baseline": {"phases": 0}, "plain": {"phases": 5}, "half": {"d_ff": 20}}


@pytest.fixture
def curves(monkeypatch):
    from hf_recycle.analysis.pruning import PruneCurves

    shares = (0.0, 0.5, 1.0)
    monkeypatch.setattr(
        one_shot,
        "one_shot_curves",
        lambda run: PruneCurves(run.arm, "mlm", 9, shares, {"low_magnitude": [1, 2, 3], "random": [1, 2.5, 3]}),
    )
    monkeypatch.setattr(one_shot, "dead_share", lambda run: run.seed / 10)


def in_tasks(results):
    """The same runs as of four tasks in a row."""
    losses = [(25, 1.0), (50, 2.0), (60, 9.0), (75, 3.0), (100, 4.0)]
    runs = {key: replace(run, losses=losses, settings={"facts_tasks": 4}) for key, run in results.runs.items()}
    return replace(results, runs=runs)


@pytest.mark.parametrize("kind", list(FIGURES))
def test_every_kind_of_figure_shows_something(made_up, curves, kind):
    results = made_up(ARMS, HISTORIES)
    if kind == "tasks":
        results = in_tasks(results)
    figure = FIGURES[kind](results, FigurePlan(kind, "A title", tuple(ARMS)))
    drawn = [panel for panel in figure.axes if panel.lines or panel.patches or panel.collections]
    assert drawn
    assert "A title" in figure.get_suptitle() or "A title" in figure.axes[0].get_title()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    assert imread(buffer).std() > 0.02


@pytest.mark.parametrize("kind", list(FIGURES))
def test_figures_without_anything_to_show(made_up, curves, kind):
    results = made_up({"baseline": [2.0]})
    plan = FigurePlan(kind, "A title", ("baseline", "missing"))
    figure = FIGURES[kind](results, plan)
    assert (figure is None) == (kind != "losses")  # one run is a curve, but no comparison
    assert FIGURES[kind](results, FigurePlan(kind, "A title", ("missing",))) is None


def test_losses_are_means_over_seeds_and_the_baseline_is_black(made_up):
    results = made_up(ARMS)
    panel = FIGURES["losses"](results, FigurePlan("losses", "x", ("plain", "baseline"))).axes[0]
    lines = {line.get_label(): line for line in panel.lines}
    expected = np.mean([[value for _, value in run.evaluations] for run in results.of("plain")], axis=0)
    assert lines["plain"].get_ydata() == pytest.approx(expected)
    assert list(lines["plain"].get_xdata()) == [20, 40, 60, 80, 100]
    assert lines["baseline"].get_color() == "#000000"
    assert lines["plain"].get_color() != "#000000"


def test_widths_are_read_from_the_models(made_up):
    results = made_up(ARMS, HISTORIES)
    panel = FIGURES["widths"](results, FigurePlan("widths", "x", ("baseline", "no-ff", "half"))).axes[0]
    means = dict(zip(panel.lines[1].get_xdata(), panel.lines[1].get_ydata(), strict=True))
    assert means == pytest.approx({0: np.mean(ARMS["no-ff"]), 20: np.mean(ARMS["half"]), 40: np.mean(ARMS["baseline"])})


def test_densities_integrate_to_one(made_up):
    history = made_up({"baseline": [1.0]}, HISTORIES).of("baseline")[0].history
    last = history.magnitudes[history.magnitudes["step"] == history.magnitudes["step"].max()]
    middles, density = figures._density(last)
    assert density.sum() * (middles[1] - middles[0]) == pytest.approx(1)
    edges = np.array(last["edges"].to_list())
    mean = np.average(
        ((edges[:, 1:] + edges[:, :-1]) / 2).ravel(), weights=np.array(last["histogram"].to_list()).ravel()
    )
    assert np.average(middles, weights=density) == pytest.approx(mean, rel=0.02)


def test_recycle_counts_add_up(made_up):
    results = made_up(ARMS, HISTORIES)
    figure = FIGURES["recycle_counts"](results, FigurePlan("recycle_counts", "x", ("plain", "no-ff")))
    (panel,) = figure.axes
    assert sum(bar.get_height() for bar in panel.patches) == pytest.approx(1)


def test_a_row_of_the_table(made_up):
    results = made_up({"baseline": [2.0, 2.0, 2.0], "plain": [1.5, 1.6, 1.7]})
    row = {row.arm: row for row in arm_rows(results)}["plain"]
    assert row.difference.mean == pytest.approx(-0.4)
    assert row.median == 1.6
    assert row.spread == pytest.approx(0.1)
    assert row.values == pytest.approx({1: 1.5, 2: 1.6, 3: 1.7})


def test_the_number_of_tests_is_stated(made_up, tmp_path):
    results = made_up(
        {**ARMS, "single": [2.0]},
        HISTORIES,
        statements=["recycling_does_not_beat_the_baseline", "vicious_cycle", "matched_normal_hurts"],
        control=("baseline", "no-ff"),
        claims=(Claim("it helps", "plain", "half"), Claim("it was not run", "plain", "gone")),
    )
    assert list(count_tests(results).values()) == [3, 0, 1, 2, 1]  # one seed is no test, nor is what lacks an arm
    for page in write_report(results, tmp_path, "command", jobs=1):
        text = page.read_text()
        assert re.search(
            r"Tests made: 7(\*\*|</strong>), of which differences from the baseline 3, shares taken away 0, cla", text
        )


@pytest.mark.parametrize("separates", [True, False])
def test_the_positive_control_is_reported(made_up, tmp_path, separates):
    losses = ARMS if separates else {**ARMS, "no-ff": ARMS["baseline"]}
    results = made_up(
        losses,
        HISTORIES,
        statements=["recycling_does_not_beat_the_baseline", "vicious_cycle"],
        control=("baseline", "no-ff"),
    )
    for page in write_report(results, tmp_path, "command", jobs=1):
        text = " ".join(page.read_text().split())
        assert "Positive control: baseline minus no-ff" in text
        assert ("so losses can be judged" in text) == separates
        assert ("of losses nothing can be told here" in text) == (not separates)
        assert len(re.findall(r"(?:\*\*|<strong>)can(?:'|&#39;)t tell", text)) == (not separates)


def test_what_is_taken_away_is_compared_with_the_whole_models(made_up, monkeypatch, tmp_path):
    from hf_recycle.analysis.pruning import PruneCurves

    def curves(run, removal):
        losses = {"random, none": [1.0, 2.0, 4.0], "obs, mean": [1.0, 1.1, 1.2 + run.seed / 10]}
        return PruneCurves(run.arm, "mlm", 9, (0.0, *removal.shares), losses)

    monkeypatch.setattr(one_shot, "removal_curves", curves)
    results = made_up(ARMS, removal=Removal("baseline", ("random", "obs"), ("none", "mean"), (0.25, 0.5)))
    page = write_report(results, tmp_path, "command", jobs=1)[0].read_text()
    table = page.partition("## Taken away at once")[2]
    assert table.index("obs, mean") < table.index("random, none")
    assert "| random, none | +1.0000 [+1.0000, +1.0000] | +3.0000" in table
    assert "+0.4000 [" in table  # the mean of 0.3, 0.4 and 0.5
    assert count_tests(results)["shares taken away"] == 4


@pytest.mark.parametrize("separates", [True, False])
def test_claims_are_judged_where_the_control_separates(made_up, tmp_path, separates):
    results = made_up(
        {"baseline": [2.0, 2.1, 2.05], "worse": [2.5, 2.6, 2.4], "same": [2.0, 2.11, 2.04]},
        control=("baseline", "worse" if separates else "same"),
        claims=(Claim("a | b", "baseline", "worse"), Claim("the reverse", "worse", "baseline")),
    )
    text = write_report(results, tmp_path, "command", jobs=1)[0].read_text()
    found = re.findall(r"^\| (a \\\| b|the reverse) \| \*\*(.*?)\*\*", text, re.M)
    assert [verdict for _, verdict in found] == (["holds", "does not hold"] if separates else ["can't tell"] * 2)


@pytest.mark.parametrize("diverged", [float("nan"), float("inf")])
def test_a_run_that_diverged(made_up, tmp_path, diverged):
    """Its arm has no numbers, and none is made up for it; those of the other arms are as they were."""
    losses = {"baseline": [2.0, 2.1, 2.05], "plain": [2.02, diverged, 2.11], "half": [2.2, 2.3, 2.2]}
    results = made_up(
        losses,
        figures=[("losses", "Losses", losses), ("differences", "Differences", losses)],
        statements=["recycling_does_not_beat_the_baseline"],
    )
    for page in write_report(results, tmp_path / "report", "command", jobs=1):
        text = page.read_text()
        assert "a run diverged" in text
        assert not re.search(r"\b(nan|inf)\b", re.sub(r'data:image[^"]*', "", text))
        assert "Figures not drawn" not in text
    markdown = (tmp_path / "report" / "report.md").read_text()
    table = markdown.partition("## Results")[2].partition("±:")[0]
    cells = {row.strip("| ").split(" | ")[0]: row.strip("| ").split(" | ") for row in table.splitlines()}
    median = "a run diverged" if np.isnan(diverged) else "2.1100"
    assert cells["plain"][1:6] == ["3", median, "a run diverged", "–", "1"]
    assert cells["half"][4] == "0.250"
    assert "plain minus baseline: a run diverged" in markdown
    assert "**can't tell**" in markdown
    table = summary_table(arm_rows(results)).splitlines()
    assert re.fullmatch(rf"plain +3  {median} +a run diverged", table[2])
    everywhere = made_up({"all": [diverged]}, figures=[("losses", "Losses", ["all"])])
    assert "Figures not drawn" not in write_report(everywhere, tmp_path / "all", "command", jobs=1)[0].read_text()


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.frames, self.paths, self.text, self.open = [], [], 0, [], []

    def handle_starttag(self, tag, attrs):
        self.paths += tag == "path"
        if dict(attrs).get("class") == "frame":
            self.frames.append(dict(attrs)["aria-label"])
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_two_pages(made_up, curves, tmp_path):
    results = made_up(
        ARMS,
        HISTORIES,
        failures={("plain", 4): "out | of memory", ("broken", 1): "no <luck>"},
        about={"plain": "ten | percent"},
        figures=[("losses", "Losses", ARMS), ("widths", "One width", ["baseline"])],
        statements=["wider_is_better", "vicious_cycle"],
    )
    folder = tmp_path / "report"
    pages = write_report(results, folder, "hf-recycle study made-up", jobs=2)
    assert pages == [folder / "report.md", folder / "report.html"]
    markdown = pages[0].read_text()
    rendered = markdown_it.MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    assert rendered.count("<table>") >= 3
    assert "ten | percent" in rendered
    assert '<img src="figures/01-losses.png" alt="Losses"' in rendered
    assert (folder / "figures" / "01-losses.png").stat().st_size > 5000
    assert "One width: no finished run has what it shows" in markdown
    page = _Page()
    page.feed(pages[1].read_text())
    assert not page.open
    assert not page.images
    assert page.frames == ["Losses"]
    assert (folder / "figures" / "01-losses.svg").read_text().count("<path") == page.paths
    text = " ".join("".join(page.text).split())
    for words in (
        "A study & its <report>",
        "out | of memory",
        "no <luck>",
        "hf-recycle study made-up",
        "ten | percent",
    ):
        assert words in text
    assert "2.0500 ± 0.0500" in text
    assert "2.0500 ± 0.0500" in markdown
    assert "2 runs at a time" in text
    without_script = re.sub(r"<script>.*?</script>", "", pages[1].read_text(), flags=re.DOTALL)
    assert "http" not in without_script.replace("http-equiv", "")  # self-contained
    table = summary_table(arm_rows(results))
    assert len(table.splitlines()) == 5
    # The unfinished arm is in no table, and named.
    assert "broken, seed 2" in text


def test_a_figure_that_breaks_costs_only_itself(made_up, tmp_path, monkeypatch):
    def broken(results, plan):
        raise RuntimeError("no way")

    monkeypatch.setitem(FIGURES._functions, "widths", broken)
    results = made_up(ARMS, figures=[("widths", "Wide", ["baseline"]), ("losses", "Losses", ["baseline"])])
    old = tmp_path / "report" / "figures" / "09-old.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    page = write_report(results, tmp_path / "report", "command", jobs=1)[0].read_text()
    assert "Wide: RuntimeError: no way" in page
    assert [path.name for path in sorted(old.parent.iterdir())] == ["02-losses.png", "02-losses.svg"]
