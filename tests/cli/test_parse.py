import json
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_recycle.errors import UserError
from hf_recycle.runs.parse import parse_run
from hf_recycle.runs.recipes import load_recipes, recipe_names
from hf_recycle.runs.run_arguments import add_trainer_arguments
from hf_recycle.utils.command_line import Parser


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="some.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def refused(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_run(argv)
    assert "\n" not in str(caught.value)


def test_recipe_values_reach_all_three_classes_with_their_types(recipe):
    run = parse_run(
        [
            recipe(
                "model_type: bert\nmax_seq_length: 32\nlearning_rate: 1e-3\nmax_steps: 1e2\nrecycle_steps: 0.125\n"
                "recycle_layers: [0, 2]\nstreaming: false\neval_strategy: no\nreport_to: none\n"
                "lr_scheduler_kwargs: {min_lr: 1e-5}\n"
            )
        ]
    )
    assert run.model.model_type == "bert"
    assert run.data.max_seq_length == 32
    assert run.data.streaming is False
    assert run.training.learning_rate == 1e-3
    assert (run.training.max_steps, type(run.training.max_steps)) == (100, int)
    assert run.training.recycle_steps == 0.125
    assert run.training.recycle_layers == [0, 2]
    assert run.training.eval_strategy == "no"
    assert run.training.report_to == []
    assert run.training.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_a_preset_comes_before_everything_that_is_given(recipe):
    """A default that is given wins too, and null takes an argument of the preset back to its default."""
    path = recipe("preset: recommended\nrecycle_threshold: 0.1\n")
    run = parse_run([path, "--recycle_fraction", "0.01", "--recycle_end", "null"])
    assert (run.training.recycle_selection, run.training.recycle_min_share) == ("dormant", 0.2)
    assert (run.training.recycle_threshold, run.training.recycle_fraction) == (0.1, 0.01)
    assert run.training.recycle_end is None
    assert run.sources["recycle_selection"].endswith("preset/recommended.yaml")
    assert "preset" not in run.given, "the configuration that is written would change with it"
    assert parse_run([path, "--preset", "article"]).training.recycle_selection == "low_magnitude"
    refused(["--preset", "recomended"], "invalid choice: 'recomended'; did you mean recommended?")


def test_flags_win_in_both_forms(recipe):
    path = recipe("seed: 1\nlearning_rate: 1e-3\nrecycle_layers: [0]\nmasked_head: true\n")
    run = parse_run(
        [path, "--seed", "7", "--learning_rate=1e-4", "--recycle_layers", "1", "2", "--masked_head", "false"]
    )
    assert run.training.seed == 7
    assert run.training.learning_rate == 1e-4
    assert run.training.recycle_layers == [1, 2]
    assert run.training.masked_head is False


@pytest.mark.parametrize(
    ("flags", "value"),
    [(["--line_by_line"], True), (["--line_by_line", "false"], False), (["--line-by-line=true"], True), ([], False)],
)
def test_switches(flags, value):
    assert parse_run(flags).data.line_by_line is value


def test_switches_that_are_on_by_default():
    assert parse_run(["--no_masked_head"]).training.masked_head is False


def test_null_on_the_command_line_takes_back_what_a_recipe_set(recipe):
    path = recipe("recycle_steps: 10\nconfig_overrides: hidden_size=8\n")
    run = parse_run([path, "--recycle_steps", "null", "--config_overrides=null", "--model_name_or_path", "x"])
    assert run.training.recycle_steps is None
    assert run.model.config_overrides is None


def test_the_last_of_a_repeated_flag_counts():
    assert parse_run(["--seed", "1", "--seed=2"]).training.seed == 2


def test_a_value_may_begin_with_a_dash():
    assert parse_run(["--max_steps", "-1"]).training.max_steps == -1
    assert parse_run(["--run_name=-x"]).training.run_name == "-x"


def test_mappings_as_json():
    run = parse_run(["--lr_scheduler_kwargs", json.dumps({"min_lr": 0.5}), "--liger_kernel_config", '{"rope": true}'])
    assert run.training.lr_scheduler_kwargs == {"min_lr": 0.5}
    assert run.training.liger_kernel_config == {"rope": True}


def test_output_dir_is_named_after_the_recipes(recipe):
    assert parse_run(["scale/laptop", "plain"]).training.output_dir == str(Path("runs/laptop-plain").resolve())
    assert parse_run([recipe("seed: 3\n", "mine.yaml")]).training.output_dir == str(Path("runs/mine").resolve())
    assert parse_run(["demo", "--output_dir", "here"]).training.output_dir == str(Path("here").resolve())


def test_unknown_recipe_key_names_the_file_and_the_nearest(recipe):
    path = recipe("recycle_step: 3\n")
    refused([path], r"recipe .*some\.yaml: unknown argument recycle_step; did you mean recycle_steps\?")


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--recycle_step", "--recycle_steps"),
        ("--learning-rat=1", "--learning_rate"),
        ("--Max_Steps", "--max_steps"),
        ("--max_seq_len", "--max_seq_length"),
    ],
)
def test_unknown_flag_names_the_nearest(flag, nearest):
    refused([flag, "3"], f"unknown argument {flag.partition('=')[0]}; did you mean {nearest}\\?")


def test_a_flag_like_nothing_known_points_to_the_list():
    refused(["--xyzzy", "3"], "unknown argument --xyzzy; hf-recycle train --help lists the known ones")


def test_abbreviations_are_refused():
    refused(["--max_step", "3"], "unknown argument --max_step")


def test_wrong_types_name_the_argument_and_the_recipe(recipe):
    refused(["--seed", "many"], "argument --seed: invalid int value: 'many'")
    refused([recipe("seed: many\n")], r"recipe .*some\.yaml: seed: invalid int value: 'many'")
    refused([recipe("seed: 1\n"), "--seed", "many"], "^argument --seed")
    refused([recipe("seed: [1, 2]\n")], r"seed=\[1, 2\] must be one value, not a list")
    refused([recipe("seed: {a: 1}\n")], "seed takes one value, not the mapping .* recipes are flat")
    refused(["--fp16", "maybe"], "argument --fp16: 'maybe' must be true or false")
    refused(["--task", "nsp"], "argument --task: invalid choice: 'nsp'; known are clm, mlm")
    refused(["--seed"], "argument --seed: expected one argument")
    refused(["--optim", "adamw_torhc"], r"argument --optim: invalid choice: 'adamw_torhc'; did you mean adamw_torch\?")


def test_recipes_go_before_the_arguments():
    refused(["demo", "--seed", "1", "plain"], "unexpected 'plain'; names go before the arguments")
    refused(["-s", "1"], "unknown argument -s; hf-recycle train --help lists the known ones")


def test_values_that_the_classes_refuse(recipe):
    out_of_range = recipe("recycle_fraction: 2\n")
    with pytest.raises(ValueError, match=r"^recipe .*some\.yaml: recycle_fraction=2\.0 is not allowed"):
        parse_run([out_of_range])
    with pytest.raises(ValueError, match=r"^recycle_fraction=3\.0 is not allowed"):
        parse_run([out_of_range, "--recycle_fraction", "3"])
    with pytest.raises(ValueError, match="recycle_fraction"):
        parse_run(["--recycle_fraction", "2"])
    refused(["--tokenizer_vocab_size", "3"], "tokenizer_vocab_size=3 is too small")
    refused(
        ["demo", "--model_name_or_path", "x"],
        "config_overrides='hidden_size=.*' changes a model built from scratch, but model_name_or_path='x'",
    )


def run_recipes():
    """Every scale with every method, every complete recipe, and every data recipe with a scale."""
    names = recipe_names()
    complete = [name for name in names if "/" not in name and "model_type" in load_recipes([name]).values]
    scales = [name for name in names if name.startswith("scale/")]
    methods = [name for name in names if "/" not in name and name not in complete]
    data = [name for name in names if name.startswith("data/")]
    assert complete
    assert scales
    assert methods
    products = [(scale, method) for scale in scales for method in methods]
    return [*((name,) for name in complete), *products, *((scales[0], name) for name in data)]


@pytest.mark.parametrize("names", run_recipes(), ids="+".join)
def test_every_recipe_parses(names):
    # fp16 is refused on a machine without a GPU; nothing else may be.
    run = parse_run([*names, "--fp16", "false"])
    wanted = load_recipes(names).values
    parts = [vars(run.model), vars(run.data), vars(run.training)]
    for key, value in wanted.items():
        if isinstance(value, int | float) and key != "fp16":
            found = next(part[key] for part in parts if key in part)
            assert found == value, key
    kinds = {"mlm": ("bert", "roberta-prelayernorm"), "clm": ("gpt2", "llama")}
    assert run.model.model_type in kinds[run.model.task]
    assert run.training.report_to == []


def test_the_article_has_the_published_settings():
    run = parse_run(["scale/article", "plain", "--fp16", "false"])
    args = run.training
    assert (args.max_steps, args.per_device_train_batch_size, args.learning_rate) == (80_000, 256, 1e-3)
    assert (args.weight_decay, args.max_grad_norm, args.lr_scheduler_type, args.warmup_steps) == (0, 0, "constant", 0)
    assert (args.recycle_fraction, args.recycle_optimizer_state) == (0.1, "keep")
    assert args.recycle_steps * args.max_steps == args.recycle_start * args.max_steps == 10_000
    assert args.magnitude_steps * args.max_steps == 2_500
    often = parse_run(["scale/article", "smooth-1pct", "--fp16", "false"]).training
    assert often.recycle_steps * often.max_steps == often.recycle_smooth_steps * often.max_steps == 1_000


def test_a_hyphen_and_an_underscore_are_the_same():
    for words in (
        ["--max-seq-length", "32", "--learning-rate=1e-4"],
        ["--max_seq-length=32", "--learning_rate", "1e-4"],
    ):
        run = parse_run(words)
        assert (run.data.max_seq_length, run.training.learning_rate) == (32, 1e-4)


WORDS = {int: "3", float: "0.25", str: "word", json.loads: '{"a": true}'}


def test_the_trainers_arguments_are_read_as_transformers_reads_them():
    """Each alone, by `HfArgumentParser`: values that are whole, and a second one where there may be several."""
    theirs = HfArgumentParser(TrainingArguments, add_help=False, allow_abbrev=False)
    ours = Parser(add_help=False)
    add_trainer_arguments(ours)
    hints = get_type_hints(TrainingArguments)
    compared = 0
    for action in theirs._actions:
        name = action.dest
        # One that no word can be, and one for which a text is as good as a list of enums.
        if name in ("parallelism_config", "debug") or action.nargs == 0:
            continue
        if get_origin(action.type) is dict:
            action.type = json.loads
        boolean = bool in (hints[name], *get_args(hints[name]))
        for word in action.choices or (["true", "False"] if boolean else [WORDS[action.type]]):
            words = [f"--{name}", word] + [word] * (action.nargs == "+")
            assert vars(ours.parse_args(words)) == {name: getattr(theirs.parse_args(words), name)}, words
            compared += 1
    assert compared > 150


def test_where_every_value_comes_from(recipe):
    path = recipe("seed: 1\nmax_steps: 10\nrecycle_steps: 5\nlogging_steps: 2\n")
    run = parse_run(["plain", path, "--max_steps", "20", "--recycle_steps", "null"])
    assert run.given["max_steps"] == 20
    assert "recycle_steps" not in run.given
    assert (run.sources["seed"], run.sources["max_steps"]) == (path, "command line")
    assert run.sources["output_dir"] == "default, named after the recipes"
