"""What a study set out to see, and whether it was seen: one sentence per claim, with its certainty, from the ledger."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, takewhile
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr

from sam_repro.errors import plural
from sam_repro.paper.outcomes import Outcome, summary
from sam_repro.paper.spec import Column, Table
from sam_repro.paper.statistics import LEVEL, compare, interval, log_size

CERTAIN = ("confirmed", "contradicted")
EXACT = 7  # points at most whose 5,040 orders are all counted


@dataclass(frozen=True)
class Judgement:
    """What became of a claim."""

    word: str  # confirmed | contradicted (either on these test images) | open, with its leaning | not run
    text: str
    why: str  # effect, interval, number of seeds, and what limits them
    p: float | None  # of its test, if it could be tested

    @property
    def line(self) -> str:
        """A line of Markdown."""
        return f"**{self.word}**: {self.text}. {self.why}".rstrip()


def judged(table: Table, outcomes: list[Outcome]) -> list[Judgement]:
    """A judgement for every claim of a table."""
    by_id = {o.row.id: o for o in outcomes}
    columns = {c.name: c for c in table.columns}
    lines = []
    for claim in table.claims:
        column = columns[claim.column]
        if claim.follows:
            used = outcomes
            word, why, p = association(used, column, columns[claim.follows])
        elif claim.falls_with:
            used = [o for o in outcomes if claim.falls_with in o.row.point]
            word, why, p = trend(used, claim.falls_with, column)
        else:
            used = [by_id[claim.better], by_id[claim.than]]
            word, why, p = contrast(*used, column, lower=claim.lower)
        hardware = sorted({row["hardware"] for o in used for row in o.ledger})
        if p is not None and len(hardware) > 1:
            why += f" The runs used different hardware: {', '.join(hardware)}."
        lines.append(Judgement(word, claim.text, why, p))
    return lines


def surviving(ps: Sequence[float]) -> int:
    """How many of these p-values stay below LEVEL after Holm's correction for their number."""
    return sum(1 for _ in takewhile(lambda ranked: ranked[1] <= LEVEL / (len(ps) - ranked[0]), enumerate(sorted(ps))))


def contrast(better: Outcome, than: Outcome, column: Column, *, lower: bool) -> tuple[str, str, float | None]:
    """(word, evidence, p) on the claim that one row beats another: paired by seed; of a magnitude, their ratio."""
    ours, theirs = better.by_seed(column), than.by_seed(column)
    if column.magnitude:  # by their ratio
        ours, theirs = ({s: log_size(v) for s, v in x.items()} for x in (ours, theirs))
    tested = compare(theirs, ours)
    diverged = sum(row["status"] == "diverged" for outcome in (better, than) for row in outcome.ledger)
    without = f"Runs that diverged, left out: {diverged}." if diverged else ""
    if tested is None:
        return "not run", without, None
    shared = sorted(ours.keys() & theirs.keys())
    at = interval([ours[s] - theirs[s] for s in shared])
    unit = " points" if column.unit == "%" else f" {column.unit}" if column.unit else ""
    digits = column.digits + 1
    half = "" if at.half is None else f" ± {at.half:.{digits}f}"
    p = "" if tested.p is None else f", p = {tested.p:.2g}"
    why = f"{better.row.method} − {than.row.method}: {at.mean:+.{digits}f}{half}{unit} (n = {tested.n}{p})."
    if column.magnitude:
        logs = (at.mean + d for d in (-(at.half or 0), 0, at.half or 0))
        low, mid, high = (f"{math.exp(log) if log < 700 else math.inf:.2g}" for log in logs)  # one size may be zero
        between = f", 95 % from {low} to {high}" if at.half is not None else ""
        why = f"{better.row.method} over {than.row.method}: a factor of {mid}{between} (n = {tested.n}{p})."
    word = word_of(tested.p, seen=(at.mean < 0) == lower and at.mean != 0)
    images, chance = sampling(better, than, column)
    if word in CERTAIN and images and abs(at.mean) < math.hypot(at.half or 0, chance):
        word += " on these test images"
        why += f" Another {plural(images, 'test image', ',')} could move this by up to ± {chance:.{digits}f} points"
        why += " (95 %, if the methods err independently)."
    return word, f"{why} {without}".rstrip(), tested.p


def sampling(one: Outcome, other: Outcome, column: Column) -> tuple[int, float]:
    """(test images, half-width of the 95 % interval that drawing them leaves to a difference of accuracies, in points).

    1.96 sqrt(p (1 - p) / n + q (1 - q) / n), of two methods that err independently. They see the same images, so
    that it is an upper bound; seeds do not lower it. (0, 0) of a column that counts no images.
    """
    counts = [[row["evals"][column.name] for row in o.ledger if column.name in row["evals"]] for o in (one, other)]
    if column.value is not None or not all(counts):
        return 0, 0.0
    images = min(c["total"] for rows in counts for c in rows)
    shares = [fmean(c["correct"] / c["total"] for c in rows) for rows in counts]
    return images, 196 * math.sqrt(sum(p * (1 - p) for p in shares) / images)


def association(outcomes: list[Outcome], one: Column, other: Column) -> tuple[str, str, float | None]:
    """(word, evidence, p) on the claim that two columns order the rows alike: Spearman's rank correlation."""
    pairs = [(mean(o, one), mean(o, other)) for o in outcomes]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(known) < 3:
        return "not run", "", None
    for column, values in zip((one, other), zip(*known, strict=True), strict=True):
        if len(set(values)) == 1:
            return (
                "open",
                f"{column.title} is the same at all {plural(len(known), 'point')}: there is nothing to rank.",
                None,
            )
    r, p = rank_correlation(*zip(*known, strict=True))
    why = f"{one.title} and {other.title}: rank correlation {r:.2f} over {plural(len(known), 'point')} (p = {p:.2g})."
    return word_of(p, seen=r > 0), why, p


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Spearman's r and its two-sided p: exact for few points, any perfect order of which is sure to Student's t."""
    tested: Any = spearmanr(a, b)
    r, p = float(tested.statistic), float(tested.pvalue)
    if len(a) <= EXACT:
        x, y = (rankdata(values) - (len(a) + 1) / 2 for values in (a, b))
        products = np.array(list(permutations(y))) @ x
        p = float(np.mean(abs(products) >= abs(x @ y) - 1e-9))
    return r, max(p, 2 / math.factorial(len(a)))  # of one perfect order and its reverse


def mean(o: Outcome, column: Column) -> float | None:
    """Mean over seeds, of magnitudes the geometric one; None without any."""
    interval = summary(list(o.by_seed(column).values()), column)
    return interval.mean if interval else None


def trend(outcomes: list[Outcome], key: str, column: Column) -> tuple[str, str, float | None]:
    """(word, evidence, p) on the claim that a column falls with a key of the grid, all other keys being equal.

    Counts pairs of points that fall. p is exact: how often independent random orders within each group of points would
    give at least as many (Mann 1945, one-sided, doubled). Equal values speak for neither side: a tie counts against
    whichever tail is asked.
    """
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for o in outcomes:
        value = mean(o, column)
        if value is not None:
            others = tuple(sorted((k, v) for k, v in o.row.point.items() if k != key))
            groups.setdefault(others, []).append((o.row.point[key], value))
    pairs = [(a, b) for points in groups.values() for a, b in combinations(sorted(points), 2)]
    if not pairs:
        return "not run", "", None
    falls, ties = (sum(test(b[1], a[1]) for a, b in pairs) for test in (operator.lt, operator.eq))
    random = Counter({0: 1})
    for points in groups.values():
        random = convolve(random, inversions(len(points)))
    at_least = sum(n for k, n in random.items() if k >= falls)
    at_most = sum(n for k, n in random.items() if k <= falls + ties)
    p = min(1.0, 2 * min(at_least, at_most) / sum(random.values()))
    of = plural(len(pairs), "pair")
    why = f"{column.title} falls in {falls} of {of} of points that differ in nothing else (p = {p:.2g})."
    return word_of(p, seen=2 * falls + ties > len(pairs)), why, p


def inversions(n: int) -> Counter[int]:
    """{pairs that fall: orders of n values}: the Mahonian numbers."""
    counts = Counter({0: 1})
    for i in range(1, n):
        counts = convolve(counts, Counter(range(i + 1)))
    return counts


def convolve(a: Counter[int], b: Counter[int]) -> Counter[int]:
    """The distribution of the sum of two independent counts."""
    out: Counter[int] = Counter()
    for i, m in a.items():
        for j, n in b.items():
            out[i + j] += m * n
    return out


def word_of(p: float | None, *, seen: bool) -> str:
    """confirmed and contradicted only where chance is unlikely; leans where it is no more likely than not."""
    if p is None or p > 0.5:
        return "open"
    if p < LEVEL:
        return CERTAIN[0] if seen else CERTAIN[1]
    return "open, leans to it" if seen else "open, leans against it"
