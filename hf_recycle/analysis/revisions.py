"""How a repository's neurons moved from revision to revision."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi

from hf_recycle.analysis.model import analyze, recycling_history
from hf_recycle.analysis.source import INDEX, WEIGHTS, Source
from hf_recycle.analysis.tables import table
from hf_recycle.errors import UserError
from hf_recycle.hub.address import locate
from hf_recycle.hub.explain import explained
from hf_recycle.records.files import CONFIG_FILE
from hf_recycle.records.naming import short_names


@dataclass(frozen=True)
class RevisionState:
    """A model's neurons at one revision.

    Attributes:
        name: its tag, or the beginning of the commit's hash.
        commit: the commit's hash.
        step: optimizer steps done, where recycling files say so.
        quantiles: `{block: {level: magnitude}}`, in the model's own order of blocks.
        times_recycled: `{block: mean times a neuron was recycled}`; empty without recycling files.
        ever_recycled: share of all neurons recycled at least once; None without recycling files.
    """

    name: str
    commit: str
    step: int | None
    quantiles: dict[str, dict[str, float]]
    times_recycled: dict[str, float]
    ever_recycled: float | None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return dict(vars(self))


def analyze_revisions(
    repo: str, wanted: str, pattern: str | None = None, token: str | None = None
) -> list[RevisionState]:
    """The neurons at several revisions of a repository, oldest first.

    Where a revision holds recycling files, only these are downloaded: they record the magnitudes too. Elsewhere the
    weights are read.

    Args:
        repo: a repository of the Hub.
        wanted: "all", for every commit of the main branch that holds a model, and every tag; or revisions, separated by
            commas. Revisions that brought nothing new are left out of "all".
        pattern: see `find_feed_forwards`.
        token: token for a private repository.

    Raises:
        UserError: it can't be read, or holds no model at any revision.
    """
    repo, inside, revision = locate(repo)
    if inside or revision:
        raise UserError(f"revisions={wanted!r} takes a whole repository; write {repo}, without folder and revision")
    if Path(repo).expanduser().exists():
        raise UserError(f"revisions={wanted!r} applies to repositories of the Hub, and {repo!r} is a folder")
    if wanted != "all":
        return [_state(Source(repo, name, token), name, pattern) for name in filter(None, wanted.split(","))]
    states: list[RevisionState] = []
    for commit, name in _revisions(repo, token):
        source = Source(repo, commit, token)
        if not _holds_a_model(source):
            continue  # as a rule the commit that made the repository, or one before the weights
        state = _state(source, name, pattern)
        if not any((state.step, state.quantiles) == (other.step, other.quantiles) for other in states):
            states.append(state)
    if not states:
        raise UserError(
            f"{repo} holds no model at any revision: none has a config.json with recycling files or with {WEIGHTS} "
            "beside it (other formats of weights are not read from the Hub)"
        )
    if all(state.step is not None for state in states):
        states.sort(key=lambda state: state.step or 0)
    return states


def revisions_text(states: Sequence[RevisionState]) -> str:
    """A table with a row for each revision: median magnitude of each block (at most six), and what was recycled."""
    blocks = list(states[-1].quantiles)
    if len(blocks) > 6:
        blocks = [blocks[i] for i in np.linspace(0, len(blocks) - 1, 6).round().astype(int)]
    names = short_names(list(states[-1].quantiles), width=16)
    rows = [("revision", "step", "recycled", *(names[block] for block in blocks))]
    for state in states:
        medians = (_cell(state.quantiles.get(block), lambda levels: f"{levels['0.5']:.4g}") for block in blocks)
        recycled = _cell(state.ever_recycled, lambda share: f"{100 * share:.1f}%")
        rows.append((state.name, _cell(state.step, lambda step: f"{step:,}"), recycled, *medians))
    note = "recycled: share of the neurons recycled at least once; then the median magnitude of each block"
    return f"{len(states)} revisions\n{table(rows)}\n{note}"


def _cell(value: Any, show: Any) -> str:
    return "-" if value is None else show(value)


def _revisions(repo: str, token: str | None) -> list[tuple[str, str]]:
    """(commit, name) of every commit of the main branch, oldest first, and of every tag that is on none of them."""
    with explained(repo):
        api = HfApi(token=token)
        commits = [commit.commit_id for commit in api.list_repo_commits(repo)][::-1]
        tags = {tag.target_commit: tag.name for tag in api.list_repo_refs(repo).tags}
    found = [(commit, tags.get(commit, commit[:8])) for commit in commits]
    return found + [(commit, name) for commit, name in tags.items() if commit not in commits]


def _holds_a_model(source: Source) -> bool:
    """Whether there is something to analyze. The weights come last, because asking for them downloads them."""
    named = source.file("config.json") is not None
    return named and any(source.file(name) is not None for name in (CONFIG_FILE, INDEX, WEIGHTS))


def _state(source: Source, name: str, pattern: str | None) -> RevisionState:
    history = recycling_history(source)
    if history is None:
        analysis = analyze(source, pattern)
        quantiles = {block.name: block.quantiles for block in analysis.blocks}
        return RevisionState(name, source.revision or name, None, quantiles, {}, None)
    stats = history.stats
    return RevisionState(
        name,
        source.revision or name,
        stats["step"],
        {block["name"]: block["magnitude_quantiles"] or {} for block in stats["blocks"]},
        {block["name"]: block["recycling_events"] / block["neurons"] for block in stats["blocks"]},
        stats["neurons"]["ever_recycled"] / max(1, stats["neurons"]["total"]),
    )
