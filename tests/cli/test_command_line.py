import subprocess
import sys

import pytest

from hf_recycle.cli.help import help_text
from hf_recycle.cli.main import main
from hf_recycle.runs.recipes import recipe_names


def run(*words, module="hf_recycle.cli.main", **environment):
    code = f"import sys; from {module} import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, env=environment or None
    )


def test_the_top_level_loads_nothing_heavy():
    code = (
        "import sys; from hf_recycle.cli.main import main\n"
        "for words in (['--help'], ['--version'], ['train', '--list']):\n"
        "    assert main(words) == 0, words\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: hf-recycle COMMAND" in done.stdout
    assert "hf-recycle 0." in done.stdout
    assert all(name in done.stdout for name in recipe_names())


def test_without_a_command_it_shows_its_help(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_an_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian'; did you mean train?\n"


@pytest.mark.slow  # processes that import transformers
@pytest.mark.parametrize("module", ["hf_recycle.cli.main", "hf_recycle.train"])
def test_a_mistake_is_one_line_and_status_2(module):
    words = ["--recycle_step", "3"] if module == "hf_recycle.train" else ["train", "--recycle_step", "3"]
    done = run(*words, module=module)
    assert done.returncode == 2
    assert done.stderr == "error: unknown argument --recycle_step; did you mean --recycle_steps?\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonesuch"], "recipe 'nonesuch' is neither a file"),
        (["demo", "--recycle_fraction", "1.5"], "recycle_fraction"),
        (["demo", "--max_seq_length", "2"], "max_seq_length=2 is too short"),
        (["demo", "--train_file", "gone.txt"], "train_file='gone.txt' does not exist"),
    ],
)
def test_mistakes_of_every_kind(words, message, capsys):
    assert main(["train", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_only_the_first_process_of_a_launch_complains(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "nonesuch"]) == 2
    assert capsys.readouterr().err == ""


def test_help_has_our_arguments_first_and_the_trainers_on_demand():
    short, full = help_text(), help_text(everything=True)
    assert short.index("\nModel:") < short.index("\nData:") < short.index("\nMethod:")
    for name in ("model_type", "max_seq_length", "recycle_steps", "midpoint_weight", "magnitude_steps"):
        assert f"  --{name} " in short
    assert "  --adam_beta1 " not in short
    assert "  --adam_beta1 " in full
    assert max(map(len, short.splitlines())) <= 120


def test_help_of_train(capsys):
    assert main(["train", "--help"]) == 0
    assert capsys.readouterr().out == help_text() + "\n"
