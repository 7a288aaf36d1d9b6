"""A study as its file describes it: arms, seeds, and what to draw and to check of them.

title: Does immunity break the vicious cycle?
scale: laptop              # recipes/scale/laptop.yaml comes before the recipes of every arm
seeds: 3
baseline: baseline         # the arm that the others are compared with
settings: {max_steps: 1000}    # of every arm
arms:
  baseline: {recipes: baseline}
  immunity: {recipes: immunity-2, settings: {recycle_fraction: 0.05}, about: two phases of immunity}
figures:
  - {kind: losses, title: Immunity, arms: [baseline, immunity]}
statements: [vicious_cycle]
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_recycle.cli.recipes import load_recipes, read_recipe, recipe_root
from hf_recycle.errors import UserError
from hf_recycle.suggest import nearest

_KEYS = ("title", "about", "scale", "seeds", "baseline", "recipes", "settings", "arms", "figures", "statements")
_ARM_KEYS = ("recipes", "settings", "about")
_FIGURE_KEYS = ("kind", "title", "arms")
# Where a run goes and how it talks; the result does not depend on them.
_NOT_A_RESULT = ("output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Arm:
    """One thing to try: recipes, and settings that win over them."""

    name: str
    recipes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""


@dataclass(frozen=True)
class FigurePlan:
    """A figure of the report: its kind (see `hf_recycle.studies.figures`), its title and the arms in it."""

    kind: str
    title: str
    arms: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a study.

    Attributes:
        settings: every argument that differs from its default, flat.
        key: hash of the settings and the package's version, so that equal runs are done once.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any]
    key: str

    @property
    def folder(self) -> str:
        return f"{self.arm}-seed{self.seed}-{self.key}"


@dataclass(frozen=True)
class Study:
    """What a study file says, checked."""

    name: str
    title: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    baseline: str | None = None
    about: str = ""
    scale: str | None = None
    recipes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: tuple[FigurePlan, ...] = ()
    statements: tuple[str, ...] = ()

    def runs(self) -> list[PlannedRun]:
        """Every run, seed by seed, so that an interrupted study has whole comparisons.

        Raises:
            UserError: for an unknown recipe, with the arm that names it.
        """
        return [self._run(arm, seed) for seed in self.seeds for arm in self.arms]

    def _run(self, arm: Arm, seed: int) -> PlannedRun:
        scale = (f"scale/{self.scale}",) if self.scale else ()
        try:
            recipe = load_recipes([*scale, *self.recipes, *arm.recipes])
        except UserError as error:
            raise UserError(f"study {self.name!r}, arm {arm.name!r}: {error}") from error
        merged = {**recipe.values, **self.settings, **arm.settings, "seed": seed}
        settings = {name: value for name, value in sorted(merged.items()) if value is not None}
        return PlannedRun(arm.name, seed, settings, run_key(settings))

    def changed(
        self,
        *,
        scale: str | None = None,
        seeds: Sequence[int] | None = None,
        arms: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Study:
        """A copy with another scale or seeds, fewer arms, or more settings for every arm.

        Raises:
            UserError: for an arm that the study does not have.
        """
        chosen = self.arms
        if arms is not None:
            names = [arm.name for arm in self.arms]
            for name in arms:
                if name not in names:
                    raise UserError(f"study {self.name!r} has no arm {name!r}; {nearest(name, names, show_all=True)}")
            chosen = tuple(arm for arm in self.arms if arm.name in arms or arm.name == self.baseline)
        kept = {arm.name for arm in chosen}
        figures = [replace(plan, arms=tuple(arm for arm in plan.arms if arm in kept)) for plan in self.figures]
        return replace(
            self,
            scale=scale or self.scale,
            seeds=tuple(seeds) if seeds is not None else self.seeds,
            arms=chosen,
            settings={**self.settings, **(settings or {})},
            figures=tuple(plan for plan in figures if plan.arms),
        )


def find_study(name: str) -> Path:
    """The file of a study, given its path or its short name, such as `article`.

    Raises:
        UserError: there is none.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    short = name.removesuffix(".yaml").removeprefix("recipes/").removeprefix("studies/")
    names = sorted(found.stem for found in (recipe_root() / "studies").glob("*.yaml"))
    if short in names:
        return recipe_root() / "studies" / f"{short}.yaml"
    raise UserError(
        f"study {name!r} is neither a file that ends in .yaml nor the name of a packaged study; "
        + nearest(short, names, show_all=True)
    )


def load_study(path: Path) -> Study:
    """Read and check a study file; the arms of the studies it `include`s come first.

    Raises:
        UserError: an unknown key, arm, figure or statement, or a value of the wrong form.
    """
    from hf_recycle.studies.figures import FIGURES
    from hf_recycle.studies.statements import STATEMENTS

    values = read_recipe(path)
    where = f"study {path}"
    included = values.pop("include", None)
    if included is not None:
        parent = read_recipe(path.parent / included)
        values = {**parent, **values, "arms": {**parent.get("arms", {}), **(values.get("arms") or {})}}
        for key in ("figures", "statements"):
            values[key] = [*parent.get(key, []), *[item for item in values.get(key, []) if item not in parent[key]]]
    _known(where, values, _KEYS)
    arms = values.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise UserError(f"{where}: arms={arms!r} must be a mapping of names to recipes and settings")
    parsed = tuple(_arm(where, str(name), arm) for name, arm in arms.items())
    names = [arm.name for arm in parsed]
    baseline = values.get("baseline")
    figures = tuple(_figure(where, plan, names, FIGURES) for plan in values.get("figures") or [])
    statements = tuple(values.get("statements") or ())
    for name, known, what in (
        *[(name, STATEMENTS, "statement") for name in statements],
        *([(baseline, names, "arm")] if baseline is not None else []),
    ):
        if name not in known:
            raise UserError(f"{where}: unknown {what} {name!r}; {nearest(str(name), list(known), show_all=True)}")
    return Study(
        name=path.stem,
        title=str(values.get("title") or path.stem),
        arms=parsed,
        seeds=parse_seeds(values.get("seeds", 1)),
        baseline=baseline,
        about=str(values.get("about") or ""),
        scale=values.get("scale"),
        recipes=_names(where, values.get("recipes")),
        settings=_settings(where, values.get("settings")),
        figures=figures,
        statements=statements,
    )


def parse_seeds(value: Any) -> tuple[int, ...]:
    """`3` is seeds 1 to 3; a list, or "4,5,6", is those.

    Raises:
        UserError: for anything else.
    """
    try:
        if isinstance(value, str) and "," in value:
            value = [int(part) for part in value.split(",")]
        seeds = tuple(int(part) for part in value) if isinstance(value, list) else tuple(range(1, int(value) + 1))
    except (TypeError, ValueError):
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={value!r} must be a number of seeds from 1, or a list of different seeds")
    return seeds


def run_key(settings: Mapping[str, Any]) -> str:
    """A hash of what a run's result depends on."""
    from hf_recycle.files import package_version

    content = {name: value for name, value in settings.items() if name not in _NOT_A_RESULT}
    text = json.dumps([package_version(), content], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _arm(where: str, name: str, value: Any) -> Arm:
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: arm {name!r} must be named with letters, digits, '.', '_' and '-'")
    value = value or {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: arm {name!r} is {value!r}; write its recipes and settings")
    where = f"{where}, arm {name!r}"
    _known(where, value, _ARM_KEYS)
    recipes, settings = _names(where, value.get("recipes")), _settings(where, value.get("settings"))
    return Arm(name, recipes, settings, str(value.get("about") or ""))


def _figure(where: str, value: Any, arms: list[str], kinds: Mapping[str, Any]) -> FigurePlan:
    if not isinstance(value, dict):
        raise UserError(f"{where}: figure {value!r} must name its kind and arms")
    _known(f"{where}, figure", value, _FIGURE_KEYS)
    kind, chosen = value.get("kind"), _names(where, value.get("arms")) or tuple(arms)
    if kind not in kinds:
        raise UserError(f"{where}: unknown kind of figure {kind!r}; {nearest(str(kind), list(kinds), show_all=True)}")
    for name in chosen:
        if name not in arms:
            raise UserError(
                f"{where}: figure {kind!r} names an unknown arm {name!r}; {nearest(name, arms, show_all=True)}"
            )
    return FigurePlan(kind, str(value.get("title") or kind), chosen)


def _known(where: str, value: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in value:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(str(key), keys, show_all=True)}")


def _names(where: str, value: Any) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else value or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where}: {value!r} must be a name or a list of names")
    return tuple(value)


def _settings(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise UserError(f"{where}: settings={value!r} must be a mapping of arguments to values")
    return dict(value or {})
