import itertools

import pytest

from hf_recycle.errors import UserError
from hf_recycle.runs.recipes import (
    describe_recipes,
    find_recipe,
    load_recipes,
    read_recipe,
    recipe_names,
    run_name,
)
from hf_recycle.utils import recipe_files
from hf_recycle.utils.recipe_files import recipe_root


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="some.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_later_recipes_win_and_sources_are_remembered(recipe):
    first = recipe("seed: 1\nmax_steps: 10\n", "a.yaml")
    second = recipe("seed: 2\n", "b.yaml")
    merged = load_recipes([str(first), str(second)])
    assert merged.values == {"seed": 2, "max_steps": 10}
    assert merged.sources == {"seed": str(second), "max_steps": str(first)}
    assert load_recipes([str(second), str(first)]).values["seed"] == 1


def test_null_takes_an_argument_back_to_its_default(recipe):
    paths = [recipe("recycle_steps: 0.1\n", "a.yaml"), recipe("recycle_steps: null\n", "b.yaml")]
    assert load_recipes(map(str, paths)).values == {"recycle_steps": None}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-7", 1e-7),
        ("1E5", 1e5),
        ("-2.5e-3", -2.5e-3),
        (".5e1", 5.0),
        ("0.125", 0.125),
        ("12", 12),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("null", None),
        ("bert-base", "bert-base"),
        ("'1e-7'", "1e-7"),
        ("1e-7x", "1e-7x"),
        ("[1, 2e1]", [1, 20.0]),
    ],
)
def test_values_are_read_as_people_write_them(recipe, text, value):
    read = read_recipe(recipe(f"key: {text}\n"))["key"]
    assert read == value
    assert type(read) is type(value)


def test_a_key_given_twice(recipe):
    with pytest.raises(UserError, match=r"some\.yaml: seed is given twice, in lines 1 and 3"):
        read_recipe(recipe("seed: 1\nmax_steps: 2\nseed: 3\n"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "1: 2\n"])
def test_not_a_mapping(recipe, text):
    with pytest.raises(UserError, match="is not a mapping; write one 'argument: value' a line"):
        read_recipe(recipe(text))


def test_broken_yaml_is_one_sentence(recipe):
    with pytest.raises(UserError, match=r"some\.yaml: .* in line 2") as caught:
        read_recipe(recipe("a: 1\nb: : 2\n"))
    assert "\n" not in str(caught.value)


def test_an_empty_recipe_has_no_arguments(recipe):
    assert read_recipe(recipe("# nothing yet\n")) == {}


def test_short_names_find_packaged_recipes():
    assert {"demo", "plain", "scale/laptop", "scale/article"} <= set(recipe_names())
    assert find_recipe("scale/laptop") == recipe_root() / "scale" / "laptop.yaml"
    assert find_recipe("recipes/demo.yaml").samefile(find_recipe("demo"))


def test_studies_are_no_recipes():
    assert not [name for name in recipe_names() if "studies" in name]
    with pytest.raises(UserError, match="recipe 'studies/article' is neither"):
        find_recipe("studies/article")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("midpoint-l2", {"midpoint_distance": "l2"}),
        ("midpoint-log", {"midpoint_log": True}),
        ("midpoint-median", {"midpoint_center": "median"}),
        ("midpoint-below", {"midpoint_below_only": True}),
    ],
)
def test_midpoint_variants_change_one_thing(name, changed):
    assert load_recipes([name]).values == load_recipes(["midpoint-1"]).values | changed


def test_a_wheel_has_them_inside_the_package(tmp_path, monkeypatch):
    package = tmp_path / "hf_recycle"
    (package / "utils").mkdir(parents=True)
    (package / "recipes").mkdir()
    (package / "recipes" / "mine.yaml").write_text("# My own.\nseed: 4\n")
    monkeypatch.setattr(recipe_files, "__file__", str(package / "utils" / "recipe_files.py"))
    assert load_recipes(["mine"]).values == {"seed": 4}
    assert describe_recipes() == "mine  My own."


def test_an_unknown_name_lists_the_nearest_and_all():
    with pytest.raises(UserError, match=r"recipe 'immunity-3' .* did you mean immunity-\d\?") as caught:
        find_recipe("immunity-3")
    assert all(name in str(caught.value) for name in recipe_names())


def test_names_of_runs():
    assert run_name(["demo"]) == "demo"
    assert run_name(["scale/laptop", "my/plain.yaml"]) == "laptop-plain"
    assert run_name([]) == "train"


def test_every_recipe_says_what_it_is():
    lines = describe_recipes().splitlines()
    assert len(lines) == len(recipe_names())
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_nothing_is_written_in_both_a_scale_and_a_method():
    names = recipe_names()
    scales = [name for name in names if name.startswith("scale/")]
    methods = [name for name in names if "/" not in name and not names_a_model(name)]
    for scale, method in itertools.product(scales, methods):
        both = set(load_recipes([scale]).values) & set(load_recipes([method]).values)
        # A recipe that is about weight decay has to set it.
        assert both <= {"magnitude_steps", method.replace("-", "_")}, (scale, method)


def names_a_model(name):
    return "model_type" in load_recipes([name]).values


def test_a_recipe_may_include_others(recipe):
    recipe("seed: 1\nmax_steps: 10\n", "base.yaml")
    recipe("max_steps: 20\n", "longer.yaml")
    path = recipe("include: [base.yaml, longer.yaml, plain]\nseed: 5\nrecycle_fraction: 0.5\n", "mine.yaml")
    merged = load_recipes([str(path)])
    assert (merged.values["seed"], merged.values["max_steps"], merged.values["recycle_fraction"]) == (5, 20, 0.5)
    assert merged.values["recycle_steps"] == read_recipe(find_recipe("plain"))["recycle_steps"]
    assert "include" not in merged.values
    assert merged.sources["max_steps"].endswith("longer.yaml")


def test_includes_that_cannot_work(recipe):
    recipe("include: b.yaml\n", "a.yaml")
    path = recipe("include: a.yaml\n", "b.yaml")
    with pytest.raises(UserError, match="includes itself"):
        load_recipes([str(path)])
    with pytest.raises(UserError, match=r"include=\{'a': 1\} must be the name of a recipe"):
        load_recipes([str(recipe("include: {a: 1}\n"))])
    with pytest.raises(UserError, match="recipe 'nowhere' is neither"):
        load_recipes([str(recipe("include: nowhere\n"))])
