"""The model card: `README.md` and `figures/` of a checkpoint or an output folder."""

import functools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from transformers.utils import logging

from hf_recycle.card.caveats import comparisons, limitations
from hf_recycle.card.citation import CITATION
from hf_recycle.card.escape import markdown_code, markdown_text, one_line
from hf_recycle.card.facts import BUILT_IN_CORPUS, FIGURES, block_columns, card_facts, facts_of
from hf_recycle.card.merge import BEGIN, compose_card, merge_card
from hf_recycle.card.run_facts import is_repo_id
from hf_recycle.card.templates import load_template
from hf_recycle.records.history import RecyclingHistory
from hf_recycle.utils.whole_files import write_bytes

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"


def write_card(
    folder: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    told: Mapping[str, Any] | None = None,
    figures: bool = True,
) -> None:
    """Write `README.md` and `figures/*.png` into a checkpoint or output folder, from what lies in it alone.

    A card that is there already keeps what was written into it by hand (see `merge_card`).

    Args:
        folder: holds the recycling files.
        repo_id: the repository that the folder is published in, for the commands in the card.
        told: facts that replace those of the folder (see `words.told_facts`).
        figures: draw them, which takes most of the time; else `card_for` draws them when the folder is published.

    Raises:
        RecyclingFileError: a recycling file is missing or damaged.
        ValueError: `repo_id` is no name of a repository.
    """
    if repo_id is not None and not is_repo_id(repo_id):
        raise ValueError(f"repo_id={repo_id!r} is no name of a repository: write it as user/name.")
    folder = Path(folder)
    history = RecyclingHistory.of_own_run(folder)
    facts = facts_of(history, folder, repo_id) | dict(told or {})
    images: dict[str, bytes] = {}
    if figures:
        # matplotlib takes a second to import, and only who draws needs it.
        from hf_recycle.plots.run import figure_images

        images = figure_images(history, unigram_entropy=facts["unigram_entropy"])
        (folder / "figures").mkdir(exist_ok=True)
    for name, image in images.items():
        write_bytes(folder / "figures" / name, image)
    write_bytes(folder / CARD_FILE, _renewed(folder, facts, images).encode("utf-8"))


def card_for(folder: Path, repo_id: str) -> tuple[str, dict[str, bytes]]:
    """The card of a folder for the repository it is published in, and those of its figures that are not in the folder,
    as {path: PNG}; another process draws them, since training may go on meanwhile.

    A card that was not made by us, or was made for this repository with its figures, is given as it is.

    Raises:
        ValueError: a recycling file is missing or damaged.
    """
    from hf_recycle.plots.beside import figures_beside

    card = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    there = [name for name in FIGURES if (folder / "figures" / name).is_file()]
    if BEGIN not in card or (there and f'from_pretrained("{repo_id}")' in card):
        return card, {}
    facts = card_facts(folder, repo_id)
    if there:
        return _renewed(folder, facts, there), {}
    try:
        images = figures_beside(folder, facts["unigram_entropy"])
    except RuntimeError as error:
        logger.warning("The card of %s has no figures: %s.", folder, error)
        images = {}
    return _renewed(folder, facts, images), {f"figures/{name}": image for name, image in images.items()}


def _renewed(folder: Path, facts: dict[str, Any], figures: Iterable[str]) -> str:
    path = folder / CARD_FILE
    theirs = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return merge_card(theirs, render_card(facts | {"figures": {name: FIGURES[name] for name in figures}}))


def render_card(facts: Mapping[str, Any]) -> str:
    """The card of these facts (see `card_facts`), with nothing of the user's in it."""
    text = _template().render(
        facts=facts,
        columns=block_columns(facts),
        comparisons=comparisons(facts),
        limitations=limitations(facts),
        citation=CITATION,
    )
    return compose_card(card_header(facts), re.sub(r"\n{3,}", "\n\n", text))


def card_header(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a card, in the types of `huggingface_hub.ModelCardData`."""
    base, pipeline = facts["base_model"], facts["pipeline_tag"]
    tags = ["hf_recycle", "neuron-recycling", facts["task"].tag, *facts["more_tags"]]
    data = ModelCardData(
        language=facts["language"],
        license=facts["license"],
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=list(dict.fromkeys(tag for tag in tags if tag)),
        base_model=base["name"] if base and is_repo_id(base["name"]) else None,
        datasets=facts["datasets"] or None,
        metrics=sorted({kind for kind, _, _ in facts["evaluation"] if kind != "loss"}) or None,
        widget=[{"text": facts["widget"]}] if facts["widget"] else None,
        model_name=one_line(facts["name"]) if facts["evaluation"] else None,
        eval_results=_eval_results(facts) or None,
    )
    return data.to_dict()


def _eval_results(facts: Mapping[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=facts["pipeline_tag"] or "other",
            dataset_type=kind,
            dataset_name=name,
            dataset_config=facts["dataset_config"] if kind in facts["datasets"][:1] else None,
            dataset_args=args,
            dataset_split="validation",
            metric_type=metric,
            metric_name=words,
            metric_value=value,
        )
        for name, kind, args in facts.get("evaluated_on") or [(*_evaluated_on(facts), None)]
        for metric, words, value in facts["evaluation"]
    ]


def _evaluated_on(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Name and type of the evaluation's dataset; both are required, so they may have to say that they don't know."""
    if facts["datasets"]:
        return facts["datasets"][0], facts["datasets"][0]
    if facts["data_name"] == BUILT_IN_CORPUS:
        return "documentation of Python (built-in corpus of hf_recycle)", "builtin"
    if facts["data_files"]:
        return one_line(facts["data_files"][-1]), "text"
    return "unknown", "unknown"


@functools.cache
def _template() -> jinja2.Template:
    return load_template("template.md.jinja", text=markdown_text, code=markdown_code, line=one_line)
