"""The verdict on a run's health: one table of thresholds, each with its source."""

import dataclasses
from typing import Any

# Worst first; the worst verdict with a reason counts, and without any the run is healthy.
VERDICTS = ("exploding", "overfit", "nothing learned", "strong", "healthy")

OWN = "our choice"
DRIFT = "Stable Audio 3, pull request 104: 0.984 (0.975 to 0.993) in a healthy adapter, 0.24 to 0.5 in overfit ones"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A verdict, and the number and threshold that lead to it.

    number   a key of ``numbers_of``
    above    whether values above the threshold count; otherwise those below it
    words    the reason, with the value as {value}
    """

    verdict: str
    number: str
    above: bool
    threshold: float
    words: str
    source: str

    def holds(self, numbers: dict[str, float | None]) -> bool:
        value = numbers.get(self.number)
        return value is not None and (value >= self.threshold if self.above else value < self.threshold)


# If magnitudes stay, an update of ratio r orthogonal to W0 has a drift of 1 / sqrt(1 + r^2).
RULES = (
    Rule("exploding", "not_finite", True, 1, "{value:.0f} layers hold values that are not finite", OWN),
    Rule(
        *("exploding", "update_ratio", True, 4.0, "the update is {value:.2f} times as large as the weights"),
        f"as a drift of 0.24. {DRIFT}",
    ),
    Rule(
        *("exploding", "validation_over_base", True, 2.0, "validation loss is {value:.2f} times the base's"),
        OWN,
    ),
    Rule(
        *("overfit", "drift", False, 0.5, "magnitudes are {value:.2f} of the norms they replace"),
        DRIFT,
    ),
    Rule(
        *("overfit", "update_ratio", True, 1.27, "the update is {value:.2f} times as large as the weights"),
        "seen in an overfit adapter of Stable Audio 3",
    ),
    Rule(
        *("overfit", "training_over_validation", False, 0.5, "training loss is {value:.2f} of validation loss"),
        f"{OWN}: losses of equal clips differ by less, although their timesteps are drawn otherwise",
    ),
    Rule(
        *("overfit", "validation_over_base", True, 1.05, "validation loss is {value:.2f} times the base's"),
        f"{OWN}: the same noise and timesteps, so that chance is far smaller",
    ),
    Rule(
        *("nothing learned", "change", False, 1e-4, "weights have moved by {value:.1e} of their size"),
        f"{OWN}: a twentieth of the step in which bfloat16 holds them",
    ),
    Rule(
        *("strong", "drift", False, 0.9, "magnitudes are {value:.2f} of the norms they replace"),
        f"{OWN}, between healthy and overfit. {DRIFT}",
    ),
    Rule(
        *("strong", "drift", True, 1.1, "magnitudes are {value:.2f} of the norms they replace"),
        f"{OWN}, as far from 1 as 0.9",
    ),
    Rule(
        *("strong", "update_ratio", True, 0.5, "the update is {value:.2f} times as large as the weights"),
        "as a drift of 0.9",
    ),
    Rule(
        *("strong", "negative", True, 0.01, "{value:.1%} of the magnitudes are negative: they turn their rows round"),
        OWN,
    ),
)
ALL_IS_WELL = "no threshold is reached"


def numbers_of(row: dict[str, Any], losses: dict[str, float]) -> dict[str, float | None]:
    """The numbers that the rules use; None if unknown.

    row      of ``health_numbers.summary``
    losses   "training", "validation" and "gain" (validation minus the base's), as far as known
    """
    drift, ratio = row["drift"] or {}, row["update_ratio"]
    mean = drift.get("mean")
    moved = [ratio] if mean is None or ratio is None else [ratio, abs(mean - 1)]
    training, validation, gain = (losses.get(name) for name in ("training", "validation", "gain"))
    base = None if validation is None or gain is None else validation - gain
    return {
        "not_finite": sum(layer["update_ratio"] is None for layer in row["layers"]),
        "update_ratio": ratio,
        "drift": mean,
        "negative": drift.get("negative"),
        "change": None if ratio is None else max(moved),
        "training_over_validation": training / validation if training is not None and validation else None,
        "validation_over_base": validation / base if base else None,
    }


def judge(row: dict[str, Any], losses: dict[str, float]) -> tuple[str, list[str]]:
    """The verdict and its reasons. Parameters as for ``numbers_of``."""
    numbers = numbers_of(row, losses)
    holding = [rule for rule in RULES if rule.holds(numbers)]
    if not holding:
        return VERDICTS[-1], [ALL_IS_WELL]
    verdict = min((rule.verdict for rule in holding), key=VERDICTS.index)
    return verdict, [rule.words.format(value=numbers[rule.number]) for rule in holding if rule.verdict == verdict]
