"""What a study is: arms, seeds, and what to draw and to check of them. `plan_file` reads one from its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_recycle.errors import UserError
from hf_recycle.runs.recipes import load_recipes
from hf_recycle.studies.key import run_key
from hf_recycle.utils.suggest import nearest


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
class Control:
    """The positive control of a study: two arms whose losses must differ, by all that is known. Where they don't, the
    study is too short, too small or too noisy to judge losses at all.

    Attributes:
        lower, higher: the arms that must end with the lower and with the higher loss.
    """

    lower: str
    higher: str


@dataclass(frozen=True)
class Claim:
    """What a study asks of two arms, written down before they ran: that `lower` ends below `than`.

    Attributes:
        says: the claim in words.
    """

    says: str
    lower: str
    than: str


@dataclass(frozen=True)
class Tuning:
    """Settings that are chosen for each arm on seeds of their own, before the runs that are compared. Those that an arm
    sets itself, or the command line, are not chosen.

    Attributes:
        grid: setting -> the values to try.
        seeds: none of them is a seed of the study.
    """

    grid: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Removal:
    """Neurons to take away from the final models of an arm, at once and with nothing trained afterwards.

    Attributes:
        arm: whose models.
        criteria, folds: each criterion is tried with each fold.
        shares: of each layer's neurons, ascending, each in (0, 1).
    """

    arm: str
    criteria: tuple[str, ...]
    folds: tuple[str, ...] = ("none",)
    shares: tuple[float, ...] = (0.25, 0.5)


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a study.

    Attributes:
        settings: every argument that differs from its default, flat.
        key: hash of all that the result depends on, see `hf_recycle.studies.key`.
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
    """What a study file says, checked.

    Attributes:
        settings: of every arm; an arm's own win over them.
        scales: further settings of every arm at one scale, by its name.
        overrides: of every arm; they win over everything.
        control: must separate before anything is said of losses.
        measure: the one number of a run that arms are compared by, see `hf_recycle.studies.measures`.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    baseline: str | None = None
    about: str = ""
    scale: str | None = None
    recipes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    figures: tuple[FigurePlan, ...] = ()
    statements: tuple[str, ...] = ()
    control: Control | None = None
    claims: tuple[Claim, ...] = ()
    measure: str = "final_eval_loss"
    tuning: Tuning | None = None
    removal: Removal | None = None

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
        common = {**self.settings, **self.scales.get(self.scale or "", {})}
        merged = {**recipe.values, **common, **arm.settings, **self.overrides, "seed": seed}
        settings = {name: value for name, value in sorted(merged.items()) if value is not None}
        return PlannedRun(arm.name, seed, settings, run_key(settings))

    def changed(
        self,
        *,
        scale: str | None = None,
        seeds: Sequence[int] | None = None,
        arms: Sequence[str] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Study:
        """A copy with another scale or seeds, fewer arms (the baseline stays), or settings that win over all others.

        Raises:
            UserError: for an arm that the study does not have.
        """
        chosen = self.arms
        if arms is not None:
            names = [arm.name for arm in self.arms]
            for name in arms:
                if name not in names:
                    raise UserError(f"study {self.name!r} has no arm {name!r}; {nearest(name, names, show_all=True)}")
            if not arms:
                raise UserError(f"study {self.name!r}: no arm is named; {nearest('', names, show_all=True)}")
            chosen = tuple(arm for arm in self.arms if arm.name in arms or arm.name == self.baseline)
        kept = {arm.name for arm in chosen}
        figures = [replace(plan, arms=tuple(arm for arm in plan.arms if arm in kept)) for plan in self.figures]
        return replace(
            self,
            scale=scale or self.scale,
            seeds=tuple(seeds) if seeds is not None else self.seeds,
            arms=chosen,
            overrides={**self.overrides, **(overrides or {})},
            figures=tuple(plan for plan in figures if plan.arms),
        )
