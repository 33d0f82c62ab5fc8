"""The little statistics of a table: intervals over seeds, verdicts, paired comparisons. All distributions are scipy's,
which is imported when it is needed: it takes half a second."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sam_repro.paper.spec import UNREADABLE

LEVEL = 0.05  # of every test and, as 1 - LEVEL, of every interval


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % t-interval, in the unit of the values."""

    mean: float
    half: float | None  # None with one seed: no interval exists
    n: int
    span: tuple[float, float] | None = None  # of a magnitude: the seeds' range, and `mean` is geometric


def log_size(value: float) -> float:
    """The logarithm of a size; a zero is as small as can be."""
    return math.log(max(value, 1e-300))


def magnitudes(values: list[float]) -> Interval:
    """The geometric mean of sizes that spread over orders of magnitude, and their range (at least one, positive)."""
    logs = list(map(log_size, values))
    mean, n = math.exp(math.fsum(logs) / len(logs)), len(values)
    return Interval(mean, None if n == 1 else 0.0, n, (min(values), max(values)))


def interval(values: list[float]) -> Interval:
    """Mean and half-width of the 95 % t-interval of independent values (at least one)."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None, 1)
    from scipy.stats import sem, t

    return Interval(mean, float(t.ppf(1 - LEVEL / 2, len(values) - 1) * sem(values)), len(values))


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `total` independent trials (at least one)."""
    from scipy.stats import binomtest

    low, high = binomtest(correct, total).proportion_ci(1 - LEVEL, method="wilson")
    return float(low), float(high)


def verdict(ours: Interval | None, printed: float | str | None, *, digits: int = 1) -> str:
    """One word on a number against the paper's.

    The paper prints one number without an interval, rounded to `digits` decimals: "within" means that our interval,
    widened by half a unit of that rounding, holds it.
    """
    if printed == UNREADABLE:
        return UNREADABLE
    if ours is None:
        return "pending"
    if ours.half is None:
        return "one seed"
    if printed is None:
        return "measured"
    assert not isinstance(printed, str)
    low, high = ours.span or (ours.mean - ours.half, ours.mean + ours.half)
    if low - 0.5 * 10**-digits <= printed <= high + 0.5 * 10**-digits:
        return "within"
    return "above" if ours.mean > printed else "below"


@dataclass(frozen=True)
class Comparison:
    """One method against another, paired by seed."""

    difference: float  # mean of (better - worse), in the unit of the values
    p: float | None  # two-sided, of the paired t-test; None with fewer than two pairs
    n: int

    @property
    def words(self) -> str:
        """The judgement in words."""
        if self.p is None:
            return "not testable with one seed"
        if self.p >= LEVEL:
            return "not significant"
        return "significant" if self.difference > 0 else "significant, the other way round"


def compare(worse: dict[int, float], better: dict[int, float]) -> Comparison | None:
    """The paired t-test of {seed: value} over the seeds that both have; None where they share none."""
    seeds = sorted(worse.keys() & better.keys())
    if not seeds:
        return None
    differences = [better[s] - worse[s] for s in seeds]
    n, mean = len(seeds), math.fsum(differences) / len(seeds)
    if n == 1:
        return Comparison(mean, None, 1)
    if max(differences) - min(differences) <= 1e-9 * abs(mean):  # all equal, as small test sets make them: only signs
        return Comparison(mean, 1.0 if mean == 0 else 0.5 ** (n - 1), n)
    from scipy.stats import ttest_1samp

    return Comparison(mean, float(ttest_1samp(differences, 0.0).pvalue), n)  # pyright: ignore[reportAttributeAccessIssue]
