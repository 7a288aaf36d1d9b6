"""The tree of commands: help, versions, mistakes, completion, and that none of it waits for torch."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from support.simulated_runs import write_run

from hf_recycle import __version__
from hf_recycle.cli.main import COMMANDS, main
from hf_recycle.runs.launcher import LAUNCH_OPTIONS
from hf_recycle.runs.recipes import recipe_names


def test_help_of_every_command_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from hf_recycle.cli.main import COMMANDS, main\n"
        "words = [['--help'], ['--version'], ['train', '--list'], *([name, '--help'] for name in COMMANDS)]\n"
        "assert not any(map(main, words))\n"
        "assert {main(words) for words in (['trian'], ['analyze'], ['push', 'a'], ['shrink', 'm', '--x'])} == {2}\n"
        "heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"hf-recycle {__version__}\n" in done.stdout
    assert all(name in done.stdout for name in recipe_names())


def test_without_a_command_it_shows_its_help(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert out.startswith("usage: hf-recycle ")
    assert all(re.search(rf"^    {name} +\S", out, re.M) for name in COMMANDS)


@pytest.mark.parametrize("width", [60, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_wide_as_the_terminal(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: hf-recycle {command}")
    lines = [line for line in out.splitlines() if not line.startswith("  hf-recycle ")]  # a command stays one line
    assert max(map(len, lines)) <= width
    assert width < 100 or max(map(len, lines)) > 100
    # Every argument says what it is for.
    assert not re.search(r"^  -\S+( \S+)?$\n  -", out, re.M)


def test_help_of_train_has_our_arguments_first_and_the_trainers_on_demand(capsys):
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert main(["train", "--seed", "1", "--help-all"]) == 0
    full = capsys.readouterr().out
    headings = [short.index(f"\n{name}:") for name in ("several processes", "model", "data", "methods", "training")]
    assert headings == sorted(headings)
    for name in ("model_type", "max_seq_length", "recycle_steps", "midpoint_weight", "masked_head", *LAUNCH_OPTIONS):
        assert f"  --{name} " in short
    assert "  --adam_beta1 " not in short
    assert "  --adam_beta1 FLOAT" in full


def test_a_reader_that_ends_early_is_no_error(monkeypatch):
    """As in `hf-recycle train --list | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["train", "--list"]) == 141


def test_an_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian'; did you mean train?\n"


@pytest.mark.slow
def test_a_mistake_is_one_line_and_status_2_also_as_a_module():
    words = [sys.executable, "-m", "hf_recycle.train", "demo", "--recycle_step", "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: unknown argument --recycle_step; did you mean --recycle_steps?\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train nonesuch", "recipe 'nonesuch' is neither a file"),
        ("train", "name a recipe, such as demo"),
        ("train demo --recycle_step 3", "unknown argument --recycle_step; did you mean --recycle_steps?"),
        ("train demo --recycle_fraction 1.5", "recycle_fraction"),
        ("train demo --max_seq_length 2", "max_seq_length=2 is too short"),
        ("train demo --train_file gone.txt", "train_file='gone.txt' does not exist"),
        ("train demo --print_config --dry_run", "argument --dry_run: not allowed with argument --print_config"),
        ("train demo -q -v", "argument -v/--verbose: not allowed with argument -q/--quiet"),
        ("train demo --dry-rum", "unknown argument --dry-rum; did you mean --dry_run?"),
        ("--verison", "unknown argument --verison; did you mean --version?"),
        ("analyze", "the following arguments are required: MODEL; see hf-recycle analyze --help"),
        ("analyze model --dead", "argument --dead: expected one argument"),
        ("analyze model --dead half", "argument --dead: invalid float value: 'half'"),
        ("analyze model --json other", "unexpected 'other'; names go before the arguments"),
        ("shrink model --fracton 0.3", "unknown argument --fracton; did you mean --fraction?"),
        ("study", "the following arguments are required: STUDY; see hf-recycle study --help"),
        ("report", "the following arguments are required: RUN_OR_REPO; see hf-recycle report --help"),
        ("push folder", "the following arguments are required: REPO; see hf-recycle push --help"),
        ("pull", "the following arguments are required: REPO; see hf-recycle pull --help"),
        ("pull user/repo --revison x", "unknown argument --revison; did you mean --revision?"),
    ],
)
def test_mistakes_of_every_kind(words, message, capsys):
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_only_the_first_process_of_a_launch_complains(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "nonesuch"]) == 2
    assert capsys.readouterr().err == ""


def test_report_says_as_json_where_the_page_is(tmp_path, capsys):
    write_run(tmp_path)
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--output", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(page)}
    assert page.is_file()


@pytest.mark.slow
def test_quiet_is_heard_by_libraries_that_come_later():
    code = (
        "import sys; from hf_recycle.cli.main import main; main(['train', '--list', sys.argv[1]])\n"
        "import transformers; print(transformers.logging.get_verbosity())\n"
    )
    for flag, level in (("--quiet", 40), ("-v", 20)):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == str(level)


@pytest.mark.long
def test_progress_bars_are_for_terminals(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)  # commands that ran in this process have set it
    # An argument of the Trainer: reading it imports transformers, and tqdm with it.
    code = (
        "import sys; from hf_recycle.cli.main import main; main(['train', '--list', '--seed', '5', *sys.argv[1:]])\n"
        "assert 'tqdm' in sys.modules; import tqdm; list(tqdm.tqdm([1]))\n"
    )
    words = [sys.executable, "-c", code]
    for more, shown in (([], True), (["-q"], False)):
        reader, terminal = os.openpty()
        subprocess.run([*words, *more], stdout=subprocess.DEVNULL, stderr=terminal, check=True)
        os.write(terminal, b"end")
        said = b""
        while not said.endswith(b"end"):
            said += os.read(reader, 1000)
        assert (said != b"end") == shown, said
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    assert done.stderr == ""


def test_a_log_has_each_line_of_a_run_when_it_is_known(capsys):
    assert main(["train", "demo", "--print_config"]) == 0
    assert sys.stdout.line_buffering


@pytest.mark.skipif(find_spec("argcomplete") is None, reason="argcomplete is not installed")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("hf-recycle s", {"shrink", "study"}),
        ("hf-recycle train scale/lap", {"scale/laptop"}),
        ("hf-recycle train mi", {"midpoint-1", "mine.yaml"}),
        ("hf-recycle train demo --learning_rate 1 --recycle_selection high", {"high_magnitude"}),
        ("hf-recycle train --gradient_acc", {"--gradient_accumulation_steps"}),
        ("hf-recycle train --accelerate_config zero", {"zero2", "zero3"}),
        ("hf-recycle study article-", {"article-full"}),
        ("hf-recycle shrink m --fr", {"--fraction"}),
    ],
)
def test_completion_without_torch(line, offered, tmp_path):
    (tmp_path / "mine.yaml").touch()
    answer = tmp_path / "answer"
    code = (
        "import os, sys; sys.argv = ['hf-recycle']\n"
        "def leave(status):\n    assert not {'torch', 'transformers'} & set(sys.modules)\n    end(status)\n"
        "end, os._exit = os._exit, leave\n"
        "from hf_recycle.cli.main import main; main()\n"
    )
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | asked, cwd=tmp_path, timeout=60, check=True)
    assert offered <= set(answer.read_text().split("\n"))


def test_without_argcomplete_a_shell_gets_no_answer_and_nothing_else_suffers():
    code = (
        "import sys; sys.modules['argcomplete'] = None\n"
        "from hf_recycle.cli.main import main; sys.exit(main(['--version']))\n"
    )
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, capture_output=True, check=True).stdout
    asked = os.environ | {"_ARGCOMPLETE": "1"}
    assert subprocess.run(words, capture_output=True, env=asked, check=False).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize(("given", "in_force"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_wait_asleep_unless_the_user_wants_otherwise(given, in_force):
    code = "from hf_recycle.cli.main import main; main(['--version']); import torch"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | {"OMP_DISPLAY_ENV": "true"}
    )
    # What OpenMP says of itself when torch loads it.
    assert re.search(rf"OMP_WAIT_POLICY *= *'{in_force}'", done.stderr, re.IGNORECASE), done.stderr
