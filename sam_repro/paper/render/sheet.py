"""A table as text: the words and numbers that every format for people shares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sam_repro.paper.deviations import deviation_titles
from sam_repro.paper.outcomes import Cell, Order, Outcome, Provenance, Winner, order_of_methods, provenance_of, winners
from sam_repro.paper.render.numbers import hours_words, number, size
from sam_repro.paper.spec import Column, Table, TableRow
from sam_repro.paper.statistics import Interval


@dataclass(frozen=True)
class Sheet:
    """A table as text, the same for every format that people read."""

    title: str
    source: str
    header: list[str]
    lines: list[list[str]]
    orders: list[str]
    footnotes: list[str]
    provenance: list[str]


def sheet_of(table: Table, outcomes: list[Outcome]) -> Sheet:
    """The words and numbers of a table."""
    compared = {c.name: any(c.name in o.row.printed for o in outcomes) for c in table.columns}
    curves = [(name, title) for name, title in CURVES if any(o.metric(name) is not None for o in outcomes)]
    timed = any(o.step_ms is not None for o in outcomes)
    header = ["model", "method"]
    for c in table.columns:
        title = f"{c.title}, {c.unit}" if c.unit else c.title
        header += [title, "paper", "difference", "verdict"] if compared[c.name] else [title]
    header += [title for _, title in curves] + ["ms per step"] * timed
    lines = []
    for o in outcomes:
        line = [o.row.model, method_of(o.row) + "".join(f" [{w}]" for w in o.row.warnings)]
        for cell in o.cells:
            line += words_of(cell, o, compared=compared[cell.column.name])
        line += [number(o.metric(name), ".3f") for name, _ in curves] + [number(o.step_ms, ".1f")] * timed
        lines.append(line)
    return Sheet(
        title=table.title,
        source=table.source,
        header=header,
        lines=lines,
        orders=[
            *comparisons(order_of_methods(table, outcomes), table),
            *(chosen(w, table) for w in winners(table, outcomes)),
        ],
        footnotes=footnotes_of(table)
        + ([GAP] if curves else [])
        + [size_note(c, outcomes) for c in table.columns if c.magnitude],
        provenance=sentences_of(provenance_of(outcomes)),
    )


def method_of(row: TableRow) -> str:
    """A row's method with its place in the grid."""
    return ", ".join([row.method, *point_of(row)])


def point_of(row: TableRow) -> list[str]:
    """A row's place in its grid: ['alpha=0.2', 'rho_max=0.6']."""
    return [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in row.point.items()]


CURVES = (("surrogate_gap", "h"), ("cosine", "cos θ"))
GAP = (
    "h and cos θ are means over the last logged interval of training, per group of m augmented images, at each run's "
    "own ρ. So h compares methods only at equal ρ and m. The h in 2h/ρ² is another one: of fixed images, in evaluation "
    "mode"
)


def words_of(cell: Cell, o: Outcome, *, compared: bool) -> list[str]:
    """A cell as [ours, paper, difference, verdict], or [ours] where the paper has no such column.

    There the verdict stands in the cell where the number does not say it: pending, running, diverged.
    """
    digits = cell.column.digits
    if cell.ours is None:
        ours = "–"
    elif o.row.settings:
        ours = f"{cell.ours.mean:.{digits}f}"
    else:
        wanted = f" of {len(o.runs)}" if cell.ours.n < len(o.runs) else ""
        ours = f"{spread_of(cell.ours, digits + 1)} ({cell.ours.n}{wanted})"
    if not compared:
        if cell.verdict in ("measured", "one seed"):
            return [ours]
        return [cell.verdict if cell.ours is None else f"{ours}, {cell.verdict}"]
    printed = f"{cell.printed:.{digits}f}" if isinstance(cell.printed, (int, float)) else cell.printed or "–"
    difference = "–" if cell.difference is None else f"{cell.difference:+.{digits + 1}f}"
    return [ours, printed, difference, cell.verdict]


def spread_of(ours: Interval, digits: int) -> str:
    """Mean ± half-width; of magnitudes the geometric mean [range]. One seed has neither."""
    if ours.half is None:
        return f"{ours.mean:.{digits}f}" if ours.span is None else size(ours.mean)
    if ours.span is None:
        return f"{ours.mean:.{digits}f} ± {ours.half:.{digits}f}"
    low, high = map(size, ours.span)
    return f"{size(ours.mean)} [{low}–{high}]"


def size_note(column: Column, outcomes: Iterable[Outcome]) -> str:
    """What the numbers of a magnitude's column are; how many of them a sign was taken from."""
    signed = replace(column, magnitude=False)
    values = [v for o in outcomes for v in o.by_seed(signed).values()]
    negative = sum(v < 0 for v in values)
    lost = f"without its sign ({negative} of {len(values)} are negative); " if negative else ""
    return f"{column.title}: {lost}geometric mean and range over seeds"


def comparisons(orders: list[Order], table: Table) -> list[str]:
    """'ViT-B/32: GSAM against SAM: +0.41 points (paired by seed, n=3, p=0.02): significant', and how many are left."""
    column, sentences = table.columns[0] if table.columns else None, []
    for order in orders:
        if order.comparison is None or column is None:
            continue
        c = order.comparison
        p = "" if c.p is None else f", p={c.p:.2g}"
        unit = "points" if column.unit == "%" else column.unit
        difference = f"{c.difference:+.{column.digits + 1}f} {unit}".strip()
        sentences.append(
            f"{order.model}: {order.better} against {order.worse}: {difference} (paired by seed, n={c.n}{p}): {c.words}"
        )
    left = len(orders) - len(sentences)
    return sentences + [f"{left} comparison{'s' * (left > 1)} of one method with another pending"] * bool(left)


def chosen(winner: Winner, table: Table) -> str:
    """'ViT-B/32, GSAM: alpha=0.2 is best on minival (75.31 %, of 5 measured points of 6)'."""
    row = winner.outcome.row
    point = ", ".join(point_of(row))
    return (
        f"{row.model}, {row.method}: {point} is best on {table.select} "
        f"({winner.score:.2f} %, of {winner.measured} measured points of {winner.points})"
    )


def footnotes_of(table: Table) -> list[str]:
    """What a reader has to know: origins, the departures and contradictions that concern these rows."""
    cited = dict.fromkeys([*table.warnings, *(w for row in table.rows for w in row.warnings)])
    titles = deviation_titles()
    origins: dict[str, list[str]] = {}
    for row in table.rows:
        if row.origin:
            origins.setdefault(row.origin, []).append(row.id)
    origin_notes = [f"Origin of {', '.join(ids)}: {origin}." for origin, ids in origins.items()]
    return [*table.notes, *origin_notes, *(f"{w}: {titles.get(w, 'see docs/DEVIATIONS.md')}" for w in sorted(cited))]


def sentences_of(p: Provenance | None) -> list[str]:
    """Provenance in a few lines; without it no number may be printed."""
    if p is None:
        return ["No run is in the ledger yet."]
    return [
        f"{p.runs} runs, seeds {', '.join(map(str, p.seeds))}, {hours_words(p.hours)} processor hours, "
        f"{' to '.join(p.dates)}",
        f"commit {', '.join(p.commits)}; {'; '.join(p.hardware)}; {', '.join(p.versions)}",
        "Intervals are Student's t over seeds, 95 %; the number of seeds is in brackets. They leave out the error of "
        "the test set. p values are of two-sided paired t-tests, not corrected for the number of comparisons.",
    ]
