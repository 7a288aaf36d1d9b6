"""The model card of a folder: what it says, that it is valid, and that nothing in a folder can act as markup."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt
from support.simulated_runs import write_run

from hf_recycle.card.card import write_card
from hf_recycle.card.merge import BEGIN, END
from hf_recycle.records import files

HOSTILE = "x</code><script>alert(1)</script>|[a](javascript:b)\n```\n" + END + "\n# Owned *b* `c`"
RUN = {
    "command": "hf-recycle train demo --max_steps 40",
    "arguments": {"learning_rate": 1e-3, "recycle_steps": 10},
    "defaults": {"seed": 42, "weight_decay": 0.0},
    "model": {"architecture": "BertForMaskedLM", "parameters": 1_234_567},
    "base_model": {"name": "lab/base", "revision": "0123abc"},
    "data": {"name": "books", "datasets": ["lab/books"], "files": []},
    "tokenizer": {"name": None, "vocabulary": 8192},
    "hardware": {"device": "CPU", "processes": 2, "engine": "DistributedDataParallel", "precision": "float32"},
    "seconds": 4000.0,
    "tokens": 81920,
    "versions": {"torch": "2.13.0"},
}


def describe(folder: Path, run: dict | None = None, architecture: str = "BertForMaskedLM") -> Path:
    """Adds to a simulated run what a trainer knows of it."""
    config = files.read_config(folder)
    files.write_config(folder, config | {"run": RUN if run is None else run})
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (folder / "trainer_state.json").write_text(json.dumps({"max_steps": 50, "epoch": 1.5}))
    return folder


def card_of(folder: Path, **kwargs) -> str:
    write_card(folder, **kwargs)
    return (folder / "README.md").read_text(encoding="utf-8")


def html_of(card: str) -> str:
    """As a site shows it: HTML in Markdown is let through."""
    text = card.split("---\n", 2)[2]
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def headings(card: str) -> list[str]:
    return re.findall(r"<h[12]>(.*?)</h[12]>", html_of(card))


def assert_no_empty_section(card: str) -> None:
    assert not re.search(r"</h[12]>\s*<h", html_of(card))
    assert not re.search(r"<tbody>\s*</tbody>|<ul>\s*</ul>|<code>\s*</code>", html_of(card))


@pytest.fixture
def without_figures(monkeypatch):
    """For tests that look at the words alone: figures take most of a card's time."""
    monkeypatch.setattr("hf_recycle.plots.run.figure_images", lambda *_, **__: {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return describe(folder)


@pytest.fixture(scope="module")
def card(folder) -> str:
    return card_of(folder, repo_id="lab/model")


def test_the_metadata_is_what_the_hub_expects(card):
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "fill-mask", "lab/base")
    assert data.datasets == ["lab/books"]
    assert data.tags == ["hf_recycle", "neuron-recycling", "masked-lm"]
    assert data.model_name == "model"
    assert all(isinstance(result, EvalResult) for result in data.eval_results)
    history = {result.metric_type: result for result in data.eval_results}
    assert history.keys() == {"loss", "perplexity", "accuracy"}
    assert history["loss"].dataset_type == "lab/books"
    assert history["perplexity"].metric_value == pytest.approx(2.718281828 ** history["loss"].metric_value, rel=1e-3)


def test_it_tells_the_run(card):
    assert headings(card) == [
        *("model", "How to use it", "Results", "What recycling did", "Training", "Limitations", "Citation")
    ]
    for fact in (
        "`BertForMaskedLM` of 1,234,567 parameters",
        "after 40 of 50 optimizer steps (1.5 passes over the data)",
        "started from those of `lab/base`, revision `0123abc`",
        "| `learning_rate` | `0.001` |",
        "2 × CPU",
        "67 min",
        "81,920, padding included",
        'AutoModelForMaskedLM.from_pretrained("lab/model")',
        "hf-recycle train demo --max_steps 40 --resume_from_checkpoint hf://lab/model",
        "hf-recycle report lab/model",
        "was not compared with a baseline",
        "@misc{krajewski2023neuron,",
        "one seed (seed 42)",
    ):
        assert fact in card
    assert "weight_decay" not in card  # a default, which the JSON beside the card has
    assert_no_empty_section(card)


def test_the_table_of_blocks_says_what_the_history_does(folder, card):
    stats, config = files.read_stats(folder), files.read_config(folder)
    rows = [line.split(" | ") for line in card.split("\n") if line.startswith("| layer.")]
    assert len(rows) == len(config["blocks"])
    for row, block in zip(rows, stats["blocks"], strict=True):
        assert row[2] == str(block["ever_recycled"])
        assert row[4] == str(block["recycling_events"])
        assert row[5] == max(block["times_recycled"], key=int)


def test_every_figure_is_there_and_shown_once(folder, card):
    shown = re.findall(r"\]\((figures/\w+\.png)\)", card)
    assert sorted(shown) == sorted(f"figures/{path.name}" for path in (folder / "figures").iterdir())
    assert len(shown) == len(set(shown)) == 4
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in shown)


@pytest.mark.parametrize(
    ("missing", "sections", "figures"),
    [
        ({"phases": 0}, ["Results", "Neurons"], 2),
        ({"losses": False}, ["What recycling did"], 3),
        ({"magnitudes": False}, ["Results", "What recycling did"], 3),
        ({"phases": 0, "losses": False, "magnitudes": False}, ["Neurons"], 0),
    ],
)
def test_less_to_tell_makes_a_shorter_card(tmp_path, missing, sections, figures):
    write_run(tmp_path, **missing)
    card = card_of(tmp_path)
    assert headings(card)[1:] == ["How to use it", *sections, "Limitations", "Citation"]
    assert len(list((tmp_path / "figures").iterdir())) == figures
    assert_no_empty_section(card)
    assert ("model-index" in card) == missing.get("losses", True)


@pytest.mark.parametrize(
    ("architecture", "auto_class", "pipeline"),
    [
        ("GPT2LMHeadModel", "AutoModelForCausalLM", "text-generation"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", None),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
        ("SomethingOfMyOwn", "AutoModel", None),
    ],
)
@pytest.mark.usefixtures("without_figures")
def test_other_models(tmp_path, architecture, auto_class, pipeline):
    write_run(tmp_path, phases=1)
    card = card_of(describe(tmp_path, architecture=architecture))
    assert f"import {auto_class}" in card
    assert ModelCard(card).data.pipeline_tag == pipeline
    assert "masked tokens" not in card


@pytest.mark.usefixtures("without_figures")
def test_hostile_facts_stay_text(tmp_path):
    write_run(tmp_path, blocks=("a." + HOSTILE.replace("/", "").replace("\n", " "), "b"))
    hostile = {
        "command": "hf-recycle train demo; rm -r x " + HOSTILE.replace("'", ""),
        "arguments": {HOSTILE: HOSTILE, "list": [HOSTILE]},
        "defaults": {"seed": HOSTILE},
        "model": {"architecture": HOSTILE},
        "base_model": {"name": HOSTILE, "revision": HOSTILE},
        "data": {"name": HOSTILE, "datasets": [HOSTILE], "files": [HOSTILE]},
        "tokenizer": {"name": HOSTILE, "vocabulary": 1},
        "hardware": {"device": HOSTILE, "processes": 1, "engine": HOSTILE, "precision": HOSTILE},
        "versions": {HOSTILE: HOSTILE},
    }
    card = card_of(describe(tmp_path, hostile, architecture=HOSTILE))
    html = html_of(card)
    assert "<script" not in html
    assert "href" not in html
    assert "<em>" not in html
    assert not [title for title in headings(card) if "Owned" in title]
    lines = card.rstrip().split("\n")
    assert lines.count(END) == lines.count(BEGIN) == 1
    assert lines[-1] == END
    assert "hf-recycle train 'demo;' rm -r x 'x</code>" in card  # as text of a command, which the shell does not run
    assert yaml.safe_load(card.split("---\n")[1]).keys() <= {"library_name", "metrics", "tags", "model-index"}
    rows = re.findall(r"<tr>(.*?)</tr>", html, flags=re.S)
    assert {row.count("<td") + row.count("<th") for row in rows} <= {2, 4, 10}  # no cell was split


@pytest.mark.usefixtures("without_figures")
def test_a_command_of_the_card_publishes_nothing(tmp_path):
    """Whoever pastes it may not write to the repository of the run."""
    write_run(tmp_path)
    command = "hf-recycle train demo --push_to_hub true --max_steps 40 --hub_model_id a/b --hub-strategy=end --seed 1"
    card = card_of(describe(tmp_path, RUN | {"command": command}), repo_id="lab/run")
    commands = [line for line in card.splitlines() if line.startswith("hf-recycle train")]
    expected = "hf-recycle train demo --max_steps 40 --seed 1"
    assert commands == [f"{expected} --resume_from_checkpoint hf://lab/run", expected]


@pytest.mark.usefixtures("without_figures")
def test_hand_edits_survive_the_next_card(tmp_path):
    write_run(tmp_path, phases=1)
    first = card_of(describe(tmp_path))
    edited = first.replace("---\n", "---\nlicense: mit\n", 1).replace(BEGIN, f"My words.\n\n{BEGIN}")
    (tmp_path / "README.md").write_text(edited)
    write_run(tmp_path, phases=2)
    second = card_of(describe(tmp_path))
    assert "My words." in second
    assert ModelCard(second).data.license == "mit"
    assert "2 selection phases" in second
    assert "1 selection phase." not in second
    assert card_of(tmp_path) == second


@pytest.mark.parametrize(
    ("run", "language", "license", "widget"),
    [
        ({"data": {"name": "built-in corpus"}, "tokenizer": {"mask": "<mask>"}}, "en", None, "<mask>"),
        ({"tokenizer": {"mask": "[M|]"}, "card": {"language": ["de", "en"]}}, ["de", "en"], None, "[M|]"),
        ({"tokenizer": {"mask": "[MASK]"}, "card": {"language": "de", "license": "mit"}}, "de", "mit", None),
        ({"tokenizer": None, "card": {"tags": ["a", "neuron-recycling"], "tasks": "other"}}, None, None, None),
    ],
)
@pytest.mark.usefixtures("without_figures")
def test_the_metadata_has_what_is_known(tmp_path, run, language, license, widget):
    write_run(tmp_path, phases=1)
    data = ModelCard(card_of(describe(tmp_path, run))).data
    assert (data.language, data.license) == (language, license)
    texts = [entry["text"] for entry in data.get("widget") or []]
    assert [widget in text for text in texts] == [True] * (widget is not None)
    assert data.tags[:3] == ["hf_recycle", "neuron-recycling", "masked-lm"]
    assert data.tags[3:] == (["a"] if "tags" in run.get("card", {}) else [])
    assert data.pipeline_tag == run.get("card", {}).get("tasks", "fill-mask")


@pytest.mark.usefixtures("without_figures")
def test_the_configuration_of_the_dataset_is_told(tmp_path):
    write_run(tmp_path, phases=1)
    card = card_of(describe(tmp_path, {"data": {"name": "x", "datasets": ["lab/books"], "config": "small|er"}}))
    assert {result.dataset_config for result in ModelCard(card).data.eval_results} == {"small|er"}
    assert "Trained on `lab/books`, configuration <code>small&#124;er</code>." in card


def test_a_name_that_is_no_repository_is_refused(tmp_path):
    with pytest.raises(ValueError, match="repo_id='a/b/c'"):
        write_card(tmp_path, repo_id="a/b/c")
