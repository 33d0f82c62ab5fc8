"""What a study set out to see, and whether it was seen: one sentence a claim, with its certainty, from the ledger."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations
from typing import Any

from scipy.stats import spearmanr

from sam_repro.paper.outcome import Outcome
from sam_repro.paper.spec import Column, Table
from sam_repro.paper.stats import LEVEL, compare, interval, log_size, magnitudes


def judged(table: Table, found: list[Outcome]) -> list[str]:
    """A line of Markdown for every claim of a table."""
    by_id = {o.row.id: o for o in found}
    columns = {c.name: c for c in table.columns}
    lines = []
    for claim in table.claims:
        column = columns[claim.column]
        if claim.follows:
            word, why = association(found, column, columns[claim.follows])
        elif claim.falls_with:
            word, why = trend([o for o in found if claim.falls_with in o.row.point], claim.falls_with, column)
        else:
            word, why = contrast(by_id[claim.better], by_id[claim.than], column, lower=claim.lower)
        lines.append(f"**{word}**: {claim.text}. {why}")
    return lines


def contrast(better: Outcome, than: Outcome, column: Column, *, lower: bool) -> tuple[str, str]:
    """(word, evidence) on the claim that one row beats another: paired by seed; of a magnitude, their ratio."""
    ours, theirs = better.by_seed(column), than.by_seed(column)
    if column.magnitude:  # by their ratio
        ours, theirs = ({s: log_size(v) for s, v in x.items()} for x in (ours, theirs))
    tested = compare(theirs, ours)
    if tested is None:
        return "not run", ""
    shared = sorted(ours.keys() & theirs.keys())
    at = interval([ours[s] - theirs[s] for s in shared])
    unit = " points" if column.unit == "%" else f" {column.unit}" if column.unit else ""
    digits = column.digits + 1
    half = "" if at.half is None else f" ± {at.half:.{digits}f}"
    p = "" if tested.p is None else f", p = {tested.p:.2g}"
    why = f"{better.row.method} − {than.row.method}: {at.mean:+.{digits}f}{half}{unit} (n = {tested.n}{p})."
    if column.magnitude:
        low, mid, high = (f"{math.exp(at.mean + d):.2g}" for d in (-(at.half or 0), 0, at.half or 0))
        between = f", 95 % from {low} to {high}" if at.half is not None else ""
        why = f"{better.row.method} over {than.row.method}: a factor of {mid}{between} (n = {tested.n}{p})."
    seen = (at.mean < 0) == lower and at.mean != 0
    return word_of(tested.p, seen=seen), why


def association(found: list[Outcome], one: Column, other: Column) -> tuple[str, str]:
    """(word, evidence) on the claim that two columns order the rows alike: Spearman's rank correlation."""
    pairs = [(mean(o, one), mean(o, other)) for o in found]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(known) < 3:
        return "not run", ""
    for column, values in zip((one, other), zip(*known, strict=True), strict=True):
        if len(set(values)) == 1:
            return "open", f"{column.title} is the same at all {len(known)} points: there is nothing to rank."
    tested: Any = spearmanr(*zip(*known, strict=True))
    why = f"{one.title} and {other.title}: rank correlation {tested.statistic:.2f} over {len(known)} points "
    return word_of(float(tested.pvalue), seen=tested.statistic > 0), f"{why}(p = {tested.pvalue:.2g})."


def mean(o: Outcome, column: Column) -> float | None:
    """Mean over seeds, of magnitudes the geometric one; None without any."""
    values = list(o.by_seed(column).values())
    return (magnitudes if column.magnitude else interval)(values).mean if values else None


def trend(found: list[Outcome], key: str, column: Column) -> tuple[str, str]:
    """(word, evidence) on the claim that a column falls with a key of the grid, all other keys being equal.

    Counts pairs of points that fall. p is exact: how often independent random orders within each group of points would
    give at least as many (Mann 1945, one-sided, doubled).
    """
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for o in found:
        value = mean(o, column)
        if value is not None:
            others = tuple(sorted((k, v) for k, v in o.row.point.items() if k != key))
            groups.setdefault(others, []).append((o.row.point[key], value))
    pairs = [(a, b) for points in groups.values() for a, b in combinations(sorted(points), 2)]
    if not pairs:
        return "not run", ""
    falls = sum(b[1] < a[1] for a, b in pairs)
    random = Counter({0: 1})
    for points in groups.values():
        random = convolve(random, inversions(len(points)))
    total = sum(random.values())
    tails = [sum(n for k, n in random.items() if ok(k)) / total for ok in (lambda k: k >= falls, lambda k: k <= falls)]
    p = min(1.0, 2 * min(tails))
    why = f"{column.title} falls in {falls} of {len(pairs)} pairs of points that differ in nothing else (p = {p:.2g})."
    return word_of(p, seen=2 * falls > len(pairs)), why


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
    """confirmed and contradicted only where chance is unlikely; leans where it is not."""
    if p is not None and p < LEVEL:
        return "confirmed" if seen else "contradicted"
    return "open, leans to it" if seen else "open, leans against it"
