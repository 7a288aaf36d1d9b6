"""A study as its file describes it.

title: Does immunity break the vicious cycle?
scale: laptop              # recipes/scale/laptop.yaml comes before the recipes of every arm
seeds: 8
baseline: baseline         # the arm that the others are compared with
control: {lower: baseline, higher: no-ff}    # the positive control: losses that must differ
measure: final_eval_loss   # the one number that arms are compared by
tuning: {grid: {learning_rate: [1e-3, 3e-3], weight_decay: [0, 0.1]}, seeds: [101, 102]}    # for each arm, beforehand
removal: {arm: baseline, criteria: [obs, random], folds: [none, least_squares], shares: [0.5]}    # from final models
settings: {max_steps: 1000}    # of every arm
scales: {laptop: {eval_steps: 100}}    # of every arm at that scale
arms:
  baseline: {recipes: baseline}
  no-ff: {recipes: no-ff, about: no feed-forward neurons}
  immunity: {recipes: immunity-2, settings: {recycle_fraction: 0.05}, about: two phases of immunity}
figures:
  - {kind: losses, title: Immunity, arms: [baseline, immunity]}
claims:
  - {says: immunity costs something, lower: baseline, than: immunity}
statements: [vicious_cycle, immunity_hurts]

A study whose claims or statements judge losses must name a positive control; unless its two arms separate, every
verdict about losses is "can't tell". With `include`, the name of another study, it goes on from that one: arms,
figures, claims and statements are added.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_recycle.errors import UserError
from hf_recycle.runs.recipes import read_recipe
from hf_recycle.studies.plan import Arm, Claim, Control, FigurePlan, Removal, Study, Tuning
from hf_recycle.utils.recipe_files import recipe_root
from hf_recycle.utils.suggest import nearest

_KEYS = (
    "title",
    "about",
    "scale",
    "seeds",
    "baseline",
    "control",
    "measure",
    "tuning",
    "recipes",
    "settings",
    "scales",
    "arms",
    "figures",
    "claims",
    "removal",
    "statements",
)
_ARM_KEYS = ("recipes", "settings", "about")
_FIGURE_KEYS = ("kind", "title", "arms")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What the study itself decides, and how to say it instead.
_RESERVED = {
    "seed": "use the study's seeds",
    "output_dir": "use hf-recycle study --output",
    "resume_from_checkpoint": "a study resumes its runs by itself",
}


def study_names() -> list[str]:
    """Short names of the packaged studies."""
    return sorted(found.stem for found in (recipe_root() / "studies").glob("*.yaml"))


def find_study(name: str) -> Path:
    """The file of a study, given its path or its short name, such as `article`.

    Raises:
        UserError: there is none.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    short = name.removesuffix(".yaml").removeprefix("recipes/").removeprefix("studies/")
    if short in study_names():
        return recipe_root() / "studies" / f"{short}.yaml"
    raise UserError(
        f"study {name!r} is neither a file that ends in .yaml nor the name of a packaged study; "
        + nearest(short, study_names(), show_all=True)
    )


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Raises:
        UserError: an unknown key, arm, figure or statement, or a value of the wrong form.
    """
    # Late: they bring matplotlib.
    from hf_recycle.studies.figures import FIGURES
    from hf_recycle.studies.measures import MEASURES
    from hf_recycle.studies.verdicts import STATEMENTS, judges_losses

    where = f"study {path}"
    values = _read(path, ())
    check_known(where, "key", values, _KEYS)
    arms = values.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise UserError(f"{where}: arms={arms!r} must be a mapping of names to recipes and settings")
    parsed = tuple(_arm(where, str(name), arm) for name, arm in arms.items())
    names = [arm.name for arm in parsed]
    baseline, scale = values.get("baseline"), values.get("scale")
    scales = values.get("scales") or {}
    if not isinstance(scales, dict):
        raise UserError(f"{where}: scales={scales!r} must be a mapping of scales to settings")
    if baseline is not None:
        check_known(where, "arm", [baseline], names)
    statements = _names(where, "statements", values.get("statements"))
    check_known(where, "statement", statements, STATEMENTS)
    control = _control(where, values.get("control"), names)
    claims = tuple(_claim(where, claim, names) for claim in _list(where, "claims", values.get("claims")))
    of_losses = [name for name in statements if judges_losses(name)] + [claim.says for claim in claims]
    if of_losses and control is None:
        raise UserError(
            f"{where}: {', '.join(of_losses)} can't be judged without a positive control; name two arms whose losses "
            "must differ, as control: {lower: baseline, higher: no-ff}"
        )
    measure = str(values.get("measure") or Study.measure)
    check_known(where, "measure", [measure], MEASURES)
    seeds = parse_seeds(values.get("seeds", 1))
    return Study(
        name=path.stem,
        title=str(values.get("title") or path.stem),
        arms=parsed,
        seeds=seeds,
        baseline=baseline,
        about=str(values.get("about") or ""),
        scale=None if scale is None else str(scale),
        recipes=_names(where, "recipes", values.get("recipes")),
        settings=check_settings(where, values.get("settings")),
        scales={str(name): check_settings(where, settings) for name, settings in scales.items()},
        figures=tuple(_figure(where, plan, names, FIGURES) for plan in _list(where, "figures", values.get("figures"))),
        statements=statements,
        control=control,
        claims=claims,
        measure=measure,
        tuning=_tuning(where, values.get("tuning"), seeds),
        removal=_removal(where, values.get("removal"), names),
    )


def parse_seeds(value: Any) -> tuple[int, ...]:
    """`3` is seeds 1 to 3; a list, or "4,5,6", is those.

    Raises:
        UserError: for anything else.
    """
    given = value
    try:
        if isinstance(value, str):
            value = [int(part) for part in value.split(",")] if "," in value else int(value)
        if type(value) is int:
            value = list(range(1, value + 1))
        seeds = tuple(value) if isinstance(value, list) and all(type(seed) is int for seed in value) else ()
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={given!r} must be a number of seeds from 1, or a list of different seeds")
    return seeds


def check_settings(where: str, value: Any) -> dict[str, Any]:
    """Arguments for runs, as they are written in a study or on its command line.

    Raises:
        UserError: it is not a mapping of names, or sets what is the study's own affair.
    """
    value = value or {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where}: settings={value!r} must be a mapping of arguments to values")
    for name in value:
        if name in _RESERVED:
            raise UserError(f"{where}: {name} is not a setting of a study; {_RESERVED[name]}")
    return dict(value)


def check_known(where: str, what: str, given: Iterable[Any], known: Iterable[str]) -> None:
    """Refuse names that are not known.

    Raises:
        UserError: with the nearest known name.
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise UserError(f"{where}: unknown {what} {name!r}; {nearest(str(name), known, show_all=True)}")


def _read(path: Path, inside: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a study file, merged into that of the study it includes."""
    if path.resolve() in inside:
        raise UserError(f"study {path} includes itself; take its name out of include")
    try:
        values = read_recipe(path)
    except UserError as error:
        raise UserError(str(error).replace("recipe", "study", 1)) from error
    included = values.pop("include", None)
    if included is None:
        return values
    beside = path.parent / str(included)
    other = _read(beside if beside.is_file() else find_study(str(included)), (*inside, path.resolve()))
    merged = {**other, **values}
    for key in ("arms", "settings", "scales"):
        mine, theirs = values.get(key) or {}, other.get(key) or {}
        if isinstance(mine, dict) and isinstance(theirs, dict):
            merged[key] = {**theirs, **mine}
    for key in ("figures", "claims", "statements"):
        mine, theirs = values.get(key) or [], other.get(key) or []
        if isinstance(mine, list) and isinstance(theirs, list):
            merged[key] = [*theirs, *(item for item in mine if item not in theirs)]
    return merged


def _arm(where: str, name: str, value: Any) -> Arm:
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: arm {name!r} must be named with letters, digits, '.', '_' and '-'")
    where = f"{where}, arm {name!r}"
    value = value or {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r} is not a mapping; write its recipes and settings")
    check_known(where, "key", value, _ARM_KEYS)
    recipes = _names(where, "recipes", value.get("recipes"))
    return Arm(name, recipes, check_settings(where, value.get("settings")), str(value.get("about") or ""))


def _control(where: str, value: Any, arms: Sequence[str]) -> Control | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"lower", "higher"} or value["lower"] == value["higher"]:
        raise UserError(f"{where}: control={value!r} must name two arms, as {{lower: baseline, higher: no-ff}}")
    check_known(f"{where}, control", "arm", value.values(), arms)
    return Control(**value)


def _claim(where: str, value: Any, arms: Sequence[str]) -> Claim:
    if not isinstance(value, dict) or set(value) != {"says", "lower", "than"}:
        raise UserError(
            f"{where}: claim {value!r} must be of the form {{says: in words, lower: one arm, than: another}}"
        )
    check_known(f"{where}, claim {value['says']!r}", "arm", [value["lower"], value["than"]], arms)
    return Claim(str(value["says"]), value["lower"], value["than"])


def _removal(where: str, value: Any, arms: Sequence[str]) -> Removal | None:
    from hf_recycle.methods.registry import CRITERIA, FOLDS

    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"arm", "criteria", "folds", "shares"}:
        raise UserError(
            f"{where}: removal={value!r} must be of the form "
            "{arm: baseline, criteria: [obs], folds: [none, least_squares], shares: [0.25, 0.5]}"
        )
    where = f"{where}, removal"
    check_known(where, "arm", [value["arm"]], arms)
    criteria, folds = (_names(where, key, value[key]) for key in ("criteria", "folds"))
    check_known(where, "criterion", criteria, CRITERIA)
    check_known(where, "fold", folds, FOLDS)
    shares = _list(where, "shares", value["shares"])
    if not shares or shares != sorted(shares) or not all(0 < share < 1 for share in shares):
        raise UserError(f"{where}: shares={shares!r} must be numbers between 0 and 1, ascending")
    return Removal(value["arm"], criteria, folds, tuple(shares))


def _tuning(where: str, value: Any, seeds: Sequence[int]) -> Tuning | None:
    if value is None:
        return None
    grid = value.get("grid") if isinstance(value, dict) and set(value) == {"grid", "seeds"} else None
    if not isinstance(grid, dict) or not all(isinstance(tried, list) and tried for tried in grid.values()):
        raise UserError(
            f"{where}: tuning={value!r} must be of the form "
            "{grid: {learning_rate: [1e-3, 3e-3]}, seeds: [101, 102]}"
        )
    check_settings(f"{where}, tuning", grid)
    own = parse_seeds(value["seeds"])
    if common := set(own) & set(seeds):
        raise UserError(f"{where}: tuning on seed {min(common)}, a seed of the study; tune on other seeds")
    return Tuning({name: tuple(tried) for name, tried in grid.items()}, own)


def _figure(where: str, value: Any, arms: Sequence[str], kinds: Iterable[str]) -> FigurePlan:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: figure {value!r} is not a mapping; write its kind, title and arms")
    where = f"{where}, figure"
    check_known(where, "key", value, _FIGURE_KEYS)
    kind, chosen = value.get("kind"), _names(where, "arms", value.get("arms")) or tuple(arms)
    check_known(where, "kind", [kind], kinds)
    check_known(f"{where} {kind!r}", "arm", chosen, arms)
    return FigurePlan(str(kind), str(value.get("title") or kind), chosen)


def _list(where: str, key: str, value: Any) -> list[Any]:
    if not isinstance(value or [], list):
        raise UserError(f"{where}: {key}={value!r} must be a list")
    return value or []


def _names(where: str, key: str, value: Any) -> tuple[str, ...]:
    names = _list(where, key, [value] if isinstance(value, str) else value)
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: {key}={value!r} must be a name or a list of names")
    return tuple(names)
