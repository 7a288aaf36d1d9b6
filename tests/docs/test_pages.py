"""Every code block of README and docs runs, or says why not and is still a command of ours; generated pages are new."""

import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pages import NOT_RUN, PAGES, ROOT, blocks, commands
from transformers import AutoModelForMaskedLM

from hf_recycle import RecyclingHistory, neuron_magnitudes
from hf_recycle.cli.main import make_parser
from hf_recycle.runs.parse import merge, run_flags
from hf_recycle.runs.recipes import describe_recipes

TESTED_ELSEWHERE = {"sae.md"}  # for its numbers, in tests/callbacks/test_sae_page.py
GENERATED = {"commands.md", "models.md", "arguments.md", "methods.md"}
MARKED = [
    pytest.param(words, id=f"{page.name}-{' '.join(words)[:60]}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "bash" and block.skipped
    for words in commands(block)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_has_a_language_and_a_reason_if_it_does_not_run(page):
    for block in blocks(page):
        assert block.language in ("python", "bash", "text", "yaml", "bibtex"), block.code
        if NOT_RUN in block.code:
            assert re.match(rf"{NOT_RUN}( here)?[:,] \w", block.code), block.code
        if block.language == "python":
            compile(block.code, page.name, "exec")


@pytest.mark.parametrize("words", MARKED)
def test_a_command_that_is_not_run_exists(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my.txt", "held_out.txt"):  # the reader's
        Path(name).write_text("some text\n")
    while re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    program = Path(words[0]).name
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    elif program in ("accelerate", "torchrun"):
        _parse(["train", *words[words.index("hf_recycle.train") + 1 :]])
    elif program in ("python", "pytest") and words[1] != "-m":
        assert (ROOT / words[1]).exists()
    elif program == "python":
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists() or (ROOT / words[2]).is_dir()
    elif program == "hf-recycle" and words[1] != "bench":  # that of version 0.1
        _parse(words[1:])
    else:
        assert program in ("pip", "cd", "git", "hf-recycle")


def _parse(words):
    options = make_parser().parse_args(words)
    packaged = set(re.findall(r"^\S+", describe_recipes(), re.MULTILINE))
    recipes = [name.removeprefix("recipes/").removesuffix(".yaml") for name in getattr(options, "recipes", ())]
    if recipes and packaged.issuperset(recipes):
        merge(recipes, run_flags(options) | {"use_cpu": True})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a reader: with `runs/demo`, in small, and the repository's folders that pages name."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    small = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=64"
    words = f"--config_overrides {small} --max_steps 8 --max_train_samples 64 --max_eval_samples 64 --use_cpu true"
    more = "--eval_steps 4 --save_strategy no --warmup_steps 0 --recycle_steps 2 --magnitude_steps 4"
    _run(folder, "-m", "hf_recycle.train", "demo", *words.split(), *more.split())
    return folder


def _run(folder, *words):
    """Python in a process of its own, in `folder`; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_code_of_the_pages_runs(folder):
    pages = [page for page in PAGES if page.name not in TESTED_ELSEWHERE | GENERATED]
    _run(folder, Path(__file__).with_name("run_pages.py"), *pages)


@pytest.mark.slow
def test_the_example_script_recycles(folder):
    (folder / "my.txt").write_text("the list is returned\na string is a sequence\n" * 16)
    words = "--train_file my.txt --tokenizer_name runs/demo --hidden_size 16 --num_hidden_layers 1 --output_dir script "
    words += "--max_steps 8 --recycle_steps 2 --recycle_fraction 0.125 --recycle_immunity 1 --use_cpu"
    _run(folder, "examples/run_mlm.py", *words.split())
    history = RecyclingHistory.from_pretrained(folder / "script")
    assert history.events["step"].unique().tolist() == [2, 4, 6]
    assert sum(counts.sum() for counts in history.counts.values()) == 3 * 8


@pytest.mark.slow
def test_the_example_analysis_shows_the_magnitudes_of_the_model(folder):
    printed = _run(folder, "examples/analyze_model.py", "runs/demo", "shown")
    [values] = neuron_magnitudes(AutoModelForMaskedLM.from_pretrained(folder / "runs" / "demo")).values()
    assert f"{values.median():.3f}" in printed
    assert (folder / "shown" / "magnitudes.svg").is_file()


@pytest.mark.long
def test_the_example_study_compares_its_arms(folder):
    words = "study examples/study.yaml --seeds 1 --arms low-magnitude --max_steps 8 --jobs 1 --use_cpu true"
    _run(folder, "-c", "import sys; from hf_recycle.cli.main import main; sys.exit(main(sys.argv[1:]))", *words.split())
    report = (folder / "runs" / "studies" / "study" / "report.md").read_text(encoding="utf-8")
    assert "| baseline |" in report
    assert "| low-magnitude" in report


def test_generated_pages_are_those_of_the_code():
    spec = spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    reference = module_from_spec(spec)
    spec.loader.exec_module(reference)
    for page, text in reference.renewed_pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: renew it with: make reference"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES if page.parent.name == "docs" and f" {page.name}\n" not in navigation]
    assert not missing


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link
