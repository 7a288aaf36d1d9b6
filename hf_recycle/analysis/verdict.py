"""The rule by which `analyze --ceiling` judges a model: is there anything to recycle, and are the neurons needed?

1. At least `WORTH_RECYCLING` of the neurons are dead or dormant: recycle them.
2. Fewer are, and half of the neurons can go for less than `NOISE_SDS` standard deviations of noise: nothing to recycle,
   because the model does not need the neurons that it has.
3. Otherwise: nothing to recycle, because the neurons are in use.

The noise is the standard deviation of the mean cost, from the paired differences of the batches' losses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_recycle.methods.activity import WORTH_RECYCLING
from hf_recycle.methods.presets import preset_values

HALF = 0.5
"""The share of neurons whose removal the rule looks at."""

NOISE_SDS = 3.0
"""A cost of fewer standard deviations is noise."""

RECYCLE, SPARE, IN_USE = "recycle", "nothing to recycle: neurons to spare", "nothing to recycle: neurons in use"


@dataclass(frozen=True)
class Cost:
    """What taking neurons away costs.

    Attributes:
        mean: loss after minus loss before, nats per predicted token.
        sd: standard deviation of that mean.
    """

    mean: float
    sd: float

    @classmethod
    def paired(cls, before: Sequence[float], after: Sequence[float], tokens: Sequence[int]) -> "Cost":
        """From the summed losses of the same batches, two or more of them, and their numbers of predicted tokens.

        The mean is a ratio of sums; its standard deviation is that of the batches' residuals.
        """
        total, count = sum(tokens), len(tokens)
        differences = [second - first for first, second in zip(before, after, strict=True)]
        mean = sum(differences) / total
        residuals = [each - mean * size for each, size in zip(differences, tokens, strict=True)]
        return cls(mean, math.sqrt(sum(each * each for each in residuals) * count / (count - 1)) / total)

    @property
    def is_noise(self) -> bool:
        return self.mean < NOISE_SDS * self.sd or self.mean <= 0

    def __str__(self) -> str:
        return f"{self.mean:+z.4f} nats (SD {self.sd:.4f})"


@dataclass(frozen=True)
class Verdict:
    """What the rule says.

    Attributes:
        name: `RECYCLE`, `SPARE` or `IN_USE`.
        sentences: the same in words, with the numbers that it rests on.
    """

    name: str
    sentences: tuple[str, ...]


def judge(neurons: int, dead: int, dormant: int, half: Cost) -> Verdict:
    """Applies the rule.

    Args:
        neurons: of the whole model, without pruned ones.
        dead: of these, neurons that never fired.
        dormant: of these, dormant neurons, the dead among them.
        half: what taking away half of every layer costs, by the best criterion and fold.
    """
    idle = (
        f"{dormant:,} of {neurons:,} neurons ({_percent(dormant, neurons)}) are dead or dormant, {dead:,} of them dead"
    )
    level = f"{100 * WORTH_RECYCLING:g}%"
    if dormant >= WORTH_RECYCLING * neurons:
        return Verdict(
            RECYCLE,
            (
                f"Recycle: {idle}, at least the {level} from which it is worth it.",
                "preset=recommended would recycle them, "
                f"at most {100 * preset_values('recommended')['recycle_fraction']:g}% of a layer in each phase.",
            ),
        )
    left_alone = "preset=recommended would leave this model alone."
    if half.is_noise:
        return Verdict(
            SPARE,
            (
                f"Nothing to recycle here: {idle}, fewer than {level}; and the model does not need those that it has: "
                f"half of every layer can go for {half}, less than {NOISE_SDS:g} SD.",
                left_alone,
            ),
        )
    return Verdict(
        IN_USE,
        (
            f"Nothing to recycle here: {idle}, fewer than {level}; the others are in use: taking away half of every "
            f"layer costs {half}, more than {NOISE_SDS:g} SD.",
            left_alone,
        ),
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0%"
