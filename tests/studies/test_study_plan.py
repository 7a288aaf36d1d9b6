import pytest

from hf_recycle.cli.study import check_runs
from hf_recycle.errors import UserError
from hf_recycle.studies.plan import Control
from hf_recycle.studies.plan_file import find_study, load_study, parse_seeds, study_names

STUDY = """\
title: Two arms
scale: laptop
seeds: 2
baseline: baseline
settings: {max_steps: 50, learning_rate: 1e-4}
arms:
  baseline: {recipes: baseline}
  hot: {recipes: [plain, immunity-2], settings: {recycle_fraction: 0.3, learning_rate: 1e-2}, about: more of it}
figures:
  - {kind: losses, title: Both, arms: [baseline, hot]}
  - {kind: differences}
statements: [vicious_cycle]
"""
REMOVAL = "removal: {arm: hot, criteria: [obs], folds: [mean], shares: [0.25, 0.5]}"
CLAIMS = "claims: [{says: it helps, lower: hot, than: baseline}]"


@pytest.fixture
def study(tmp_path):
    def load(text=STUDY, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return load_study(path)

    return load


def test_what_a_file_says(study):
    found = study()
    assert (found.name, found.title, found.seeds, found.baseline) == ("mine", "Two arms", (1, 2), "baseline")
    assert [arm.name for arm in found.arms] == ["baseline", "hot"]
    assert found.arms[1].about == "more of it"
    assert [(plan.kind, plan.arms) for plan in found.figures] == [
        ("losses", ("baseline", "hot")),
        ("differences", ("baseline", "hot")),
    ]


def test_what_wins(study):
    runs = {(run.arm, run.seed): run.settings for run in study().runs()}
    assert [key for key in runs] == [("baseline", 1), ("hot", 1), ("baseline", 2), ("hot", 2)]  # noqa: C416
    hot = runs["hot", 2]
    assert hot["seed"] == 2
    assert hot["recycle_immunity"] == 2  # the later recipe
    assert hot["recycle_fraction"] == 0.3  # the arm's setting over its recipe
    assert hot["learning_rate"] == 1e-2  # the arm's setting over the study's
    assert runs["baseline", 1]["learning_rate"] == 1e-4  # the study's over the scale's
    assert hot["max_steps"] == 50
    assert "recycle_steps" not in runs["baseline", 1]  # null in the recipe
    command_line = study().changed(overrides={"learning_rate": 0.5, "recycle_fraction": None}).runs()
    assert {run.settings["learning_rate"] for run in command_line} == {0.5}
    assert not any("recycle_fraction" in run.settings for run in command_line)


def test_settings_of_one_scale(study):
    found = study(STUDY + "scales: {laptop: {max_steps: 9, learning_rate: 0.1}, article: {max_steps: 8}}\n")
    runs = found.runs()
    assert [run.settings["max_steps"] for run in runs] == [9] * 4
    assert [run.settings["learning_rate"] for run in runs] == [0.1, 1e-2] * 2  # an arm's own wins
    assert {run.settings["max_steps"] for run in found.changed(scale="article").runs()} == {8}
    assert {run.settings["max_steps"] for run in found.changed(scale="bert-medium").runs()} == {50}


def test_equal_settings_have_one_key_and_changed_ones_another(study):
    runs = study().runs()
    assert len({run.key for run in runs}) == 4
    assert [run.key for run in study(STUDY.replace("title: Two arms", "title: Renamed")).runs()] == [
        run.key for run in runs
    ]
    renamed = study(STUDY.replace("hot", "cold")).runs()
    assert renamed[1].key == runs[1].key
    assert renamed[1].folder != runs[1].folder
    slower = study(STUDY.replace("1e-4", "2e-4")).runs()
    assert slower[0].key != runs[0].key
    assert slower[1].key == runs[1].key  # it has a rate of its own


def test_fewer_arms_keep_the_baseline_and_the_figures_that_are_left(study):
    text = STUDY.replace("statements", "  - {kind: widths, title: Hot alone, arms: [hot]}\nstatements")
    found = study(text).changed(arms=["baseline"])
    assert [arm.name for arm in found.arms] == ["baseline"]
    assert [plan.title for plan in found.figures] == ["Both", "differences"]
    assert [arm.name for arm in study(text).changed(arms=["hot"]).arms] == ["baseline", "hot"]
    with pytest.raises(UserError, match=r"study 'mine' has no arm 'hto'; did you mean hot\?"):
        study().changed(arms=["hto"])
    with pytest.raises(UserError, match="study 'mine': no arm is named"):
        study().changed(arms=[])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: 2", "seed: 2", r"unknown key 'seed'; did you mean seeds\?"),
        ("about: more", "abut: more", r"arm 'hot': unknown key 'abut'; did you mean about\?"),
        ("kind: losses", "kind: loses", r"figure: unknown kind 'loses'; did you mean losses\?"),
        ("kind: losses", "kid: losses", r"figure: unknown key 'kid'; did you mean kind\?"),
        ("arms: [baseline, hot]", "arms: [baseline, hit]", r"unknown arm 'hit'; did you mean hot\?"),
        ("[vicious_cycle]", "[vicious_circle]", r"unknown statement 'vicious_circle'; did you mean vicious_cycle\?"),
        ("[vicious_cycle]", "vicious_circle", r"unknown statement 'vicious_circle'"),
        ("baseline: baseline", "baseline: base", r"unknown arm 'base'; did you mean baseline\?"),
        ("  hot:", "  '../hot':", "arm '../hot' must be named with letters"),
        ("{recipes: baseline}", "[baseline]", r"arm 'baseline': \['baseline'\] is not a mapping"),
        ("recipes: baseline", "recipes: {a: 1}", "must be a list"),
        ("recycle_fraction: 0.3", "seed: 3", "arm 'hot': seed is not a setting of a study; use the study's seeds"),
        ("max_steps: 50", "output_dir: x", "output_dir is not a setting of a study; use hf-recycle study --output"),
        ("scale: laptop", "scales: laptop", "scales='laptop' must be a mapping"),
        ("scale: laptop", "scales: {laptop: {seed: 3}}", "seed is not a setting of a study"),
        ("seeds: 2", "seeds: 2.5", "seeds=2.5 must be a number of seeds"),
        ("seeds: 2", "seeds: 0", "seeds=0 must be a number of seeds"),
        ("seeds: 2", "seeds: [1, 1]", r"seeds=\[1, 1\] must be a number of seeds"),
        (
            "[vicious_cycle]",
            "[wider_is_better, vicious_cycle]",
            "wider_is_better can't be judged without a positive con",
        ),
        ("baseline: baseline", "control: baseline", "control='baseline' must name two arms, as {lower: baseline, hi"),
        ("baseline: baseline", "control: {lower: hot, higher: hot}", "must name two arms"),
        ("baseline: baseline", "control: {lower: hit, higher: hot}", r"control: unknown arm 'hit'; did you mean hot\?"),
        ("baseline: baseline", "measure: final_loss", r"unknown measure 'final_loss'; did you mean final_eval_loss\?"),
        ("baseline: baseline", f"{CLAIMS}", "it helps can't be judged without a positive control"),
        ("baseline: baseline", "claims: [{says: a, lower: hot}]", "claim {'says': 'a', 'lower': 'hot'} must be of the"),
        ("baseline: baseline", CLAIMS.replace("lower: hot", "lower: hit"), r"claim 'it helps': unknown arm 'hit'; did"),
        ("baseline: baseline", "tuning: {grid: {learning_rate: [1, 2]}, seeds: [2, 9]}", "on seed 2, a seed of the st"),
        ("baseline: baseline", "tuning: {grid: {learning_rate: 1}, seeds: [9]}", "tuning=.* must be of the form {grid"),
        ("baseline: baseline", "tuning: {grid: {seed: [1, 2]}, seeds: [9]}", "tuning: seed is not a setting of a stu"),
        (
            "baseline: baseline",
            REMOVAL.replace("[obs]", "[obz]"),
            r"removal: unknown criterion 'obz'; did you mean obs",
        ),
        ("baseline: baseline", REMOVAL.replace("[mean]", "[men]"), r"removal: unknown fold 'men'; did you mean mean"),
        ("baseline: baseline", REMOVAL.replace("0.25, 0.5", "0.5, 0.25"), r"removal: shares=\[0.5, 0.25\] must be num"),
        ("baseline: baseline", REMOVAL.replace("arm: hot", "arms: hot"), "removal=.* must be of the form {arm: base"),
        ("title: Two arms", "title: [", "^study .*mine.yaml: .* in line 3"),
        ("title: Two arms", "include: nowhere", "study 'nowhere' is neither a file"),
    ],
)
def test_mistakes_are_told_in_one_sentence(study, old, new, message):
    assert old in STUDY
    with pytest.raises(UserError, match=message) as caught:
        study(STUDY.replace(old, new, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("old", "new"), [("plain,", "plian,"), ("scale: laptop", "scale: laptob")])
def test_an_unknown_recipe_names_its_arm(study, old, new):
    with pytest.raises(UserError, match=r"study 'mine', arm '(hot|baseline)': recipe .* did you mean"):
        study(STUDY.replace(old, new)).runs()


def test_a_study_without_arms(study):
    with pytest.raises(UserError, match="arms=None must be a mapping"):
        study("title: Nothing\n")


def test_a_study_may_include_another(study):
    study()
    found = study(
        "include: mine.yaml\nseeds: 1\nsettings: {max_steps: 7}\n"
        "arms: {cold: {}, hot: {recipes: plain}}\nstatements: [vicious_cycle, magnitudes_grow]\n",
        "more.yaml",
    )
    assert [arm.name for arm in found.arms] == ["baseline", "hot", "cold"]
    assert found.arms[1].recipes == ("plain",)
    assert (found.title, found.seeds) == ("Two arms", (1,))
    assert found.settings == {"max_steps": 7, "learning_rate": 1e-4}
    assert found.statements == ("vicious_cycle", "magnitudes_grow")
    assert len(found.figures) == 2
    with pytest.raises(UserError, match="includes itself"):
        study("include: circle.yaml\narms: {a: {}}\n", "circle.yaml")


def test_a_positive_control(study):
    text = STUDY.replace("[vicious_cycle]", "[immunity_hurts]\ncontrol: {lower: baseline, higher: hot}")
    assert study(text).control == Control(lower="baseline", higher="hot")
    assert study("include: mine.yaml\narms: {cold: {}}\n", "more.yaml").control == Control("baseline", "hot")
    assert study().control is None  # of counts alone something can be said without


def test_seeds():
    assert parse_seeds(3) == parse_seeds("3") == (1, 2, 3)
    assert parse_seeds("4,5,7") == parse_seeds([4, 5, 7]) == (4, 5, 7)
    for wrong in (0, -1, "x", "1,x", [], None, True, [1, -2], [1, "2"], {"a": 1}):
        with pytest.raises(UserError, match="must be a number of seeds"):
            parse_seeds(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", study_names())
def test_packaged_studies_have_runs(name):
    found = load_study(find_study(f"recipes/studies/{name}.yaml"))
    assert len({run.key for run in found.runs()}) == len(found.arms) * len(found.seeds)
    assert all(arm.about or arm.name == found.baseline for arm in found.arms)
    assert found.statements or found.claims
    if found.name not in ("article", "article-full", "device"):  # which say that they can't tell losses
        assert found.tuning
        assert found.control
        assert len(found.seeds) == 8
    for run in found.runs():  # where there is no neuron, none can be measured
        assert run.settings.get("ff_factor") != 0 or not run.settings.get("magnitude_steps"), run.arm
    check_runs([found.changed(seeds=found.seeds[:1])])


def test_the_full_study_has_every_arm_of_the_main_line():
    main, full = (load_study(find_study(name)) for name in ("article", "article-full"))
    assert 12 <= len(main.arms) <= 14
    assert {arm.name for arm in main.arms} < {arm.name for arm in full.arms}
    assert len(main.seeds) == 3
