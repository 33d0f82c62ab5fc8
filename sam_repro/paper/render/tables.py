"""Ours beside the paper's numbers, as Markdown, LaTeX, HTML and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sam_repro.paper.deviations import deviation_titles
from sam_repro.paper.outcomes import (
    Cell,
    Order,
    Outcome,
    Provenance,
    Winner,
    order_of_methods,
    provenance_of,
    winners,
)
from sam_repro.paper.spec import Column, Table, TableRow
from sam_repro.paper.statistics import Interval


def render(table: Table, found: list[Outcome], form: str) -> str:
    """The table in a format of FORMATS, with a line break at the end."""
    return FORMATS[form](table, found)


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


def sheet_of(table: Table, found: list[Outcome]) -> Sheet:
    """The words and numbers of a table."""
    compared = {c.name: any(c.name in o.row.printed for o in found) for c in table.columns}
    curves = [(name, title) for name, title in CURVES if any(o.metric(name) is not None for o in found)]
    timed = any(o.step_ms is not None for o in found)
    header = ["model", "method"]
    for c in table.columns:
        title = f"{c.title}, {c.unit}" if c.unit else c.title
        header += [title, "paper", "difference", "verdict"] if compared[c.name] else [title, "verdict"]
    header += [title for _, title in curves] + ["ms a step"] * timed
    lines = []
    for o in found:
        method = ", ".join([o.row.method, *point_of(o.row)])
        line = [o.row.model, method + "".join(f" [{w}]" for w in o.row.warnings)]
        for cell in o.cells:
            line += words_of(cell, o, compared=compared[cell.column.name])
        line += [number(o.metric(name), 3) for name, _ in curves] + [number(o.step_ms, 1)] * timed
        lines.append(line)
    return Sheet(
        title=table.title,
        source=table.source,
        header=header,
        lines=lines,
        orders=[
            *comparisons(order_of_methods(table, found), table),
            *(chosen(w, table) for w in winners(table, found)),
        ],
        footnotes=footnotes_of(table)
        + ([GAP] if curves else [])
        + [size_note(c, found) for c in table.columns if c.magnitude],
        provenance=sentences_of(provenance_of(found)),
    )


def point_of(row: TableRow) -> list[str]:
    """A row's place in its grid: ['alpha=0.2', 'rho_max=0.6']."""
    return [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in row.point.items()]


CURVES = (("surrogate_gap", "h"), ("cosine", "cos θ"))
GAP = (
    "h and cos θ: of training steps (groups of m augmented images), mean over the last logged interval, at each "
    "run's own ρ; h compares methods only at equal ρ and m. 2h/ρ² has another h: of fixed images, in evaluation mode"
)


def words_of(cell: Cell, o: Outcome, *, compared: bool) -> list[str]:
    """A cell as [ours, paper, difference, verdict], or [ours, verdict] where the paper has no such column."""
    digits = cell.column.digits
    if cell.ours is None:
        ours = "–"
    else:
        wanted = f" of {len(o.runs)}" if cell.ours.n < len(o.runs) else ""
        ours = f"{spread_of(cell.ours, digits + 1)} ({cell.ours.n}{wanted})"
    if not compared:
        return [ours, cell.verdict]
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


def size_note(column: Column, found: Iterable[Outcome]) -> str:
    """What the numbers of a magnitude's column are; how many of them a sign was taken from."""
    signed = replace(column, magnitude=False)
    values = [v for o in found for v in o.by_seed(signed).values()]
    negative = sum(v < 0 for v in values)
    lost = f"without its sign ({negative} of {len(values)} are negative); " if negative else ""
    return f"{column.title}: {lost}geometric mean and range over seeds"


def size(value: float) -> str:
    """Three digits, all of them from 1,000 on: 0.512, 13.5, 107,140."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def number(value: float | None, digits: int) -> str:
    """A plain number, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def comparisons(orders: list[Order], table: Table) -> list[str]:
    """'ViT-B/32: GSAM against SAM: +0.41 points (paired by seed, n=3, p=0.02): significant', and how many are left."""
    column, said = table.columns[0] if table.columns else None, []
    for order in orders:
        if order.comparison is None or column is None:
            continue
        c = order.comparison
        p = "" if c.p is None else f", p={c.p:.2g}"
        unit = "points" if column.unit == "%" else column.unit
        difference = f"{c.difference:+.{column.digits + 1}f} {unit}".strip()
        said.append(
            f"{order.model}: {order.better} against {order.worse}: {difference} (paired by seed, n={c.n}{p}): {c.words}"
        )
    left = len(orders) - len(said)
    return said + [f"{left} comparison{'s' * (left > 1)} of one method with another pending"] * bool(left)


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
    said = [f"Origin of {', '.join(ids)}: {origin}." for origin, ids in origins.items()]
    return [*table.notes, *said, *(f"{w}: {titles.get(w, 'see docs/DEVIATIONS.md')}" for w in sorted(cited))]


def hours_words(hours: float) -> str:
    """Two digits, all of them from 100 on: 0.073, 12, 4,300."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def sentences_of(p: Provenance | None) -> list[str]:
    """Provenance in a few lines; without it no number may be printed."""
    if p is None:
        return ["No run is in the ledger yet."]
    return [
        f"{p.runs} runs, seeds {', '.join(map(str, p.seeds))}, {hours_words(p.hours)} processor hours, "
        f"{' to '.join(p.dates)}",
        f"commit {', '.join(p.commits)}; {'; '.join(p.hardware)}; {', '.join(p.versions)}",
        "Intervals: 95 %, Student's t over seeds (their number in brackets); they hold no error of the test set. "
        "p: two-sided paired t-test, not corrected for the number of comparisons.",
    ]


# ---- formats -------------------------------------------------------------------------------------------------------


def markdown(table: Table, found: list[Outcome]) -> str:
    """GitHub's Markdown, its columns padded so that it also reads well on a terminal."""
    s = sheet_of(table, found)
    header, *lines = ([text.replace("|", r"\|") for text in line] for line in (s.header, *s.lines))
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    out = [f"### {s.title}", "", f"Source: {s.source}", ""]
    for line in (header, ["-" * width for width in widths], *lines):
        out.append("| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |")
    for part in (s.orders, s.footnotes, s.provenance):
        out += ["", *(f"* {sentence}" for sentence in part)] if part else []
    return "\n".join(out) + "\n"


def latex(table: Table, found: list[Outcome]) -> str:
    """A booktabs table with notes."""
    s = sheet_of(table, found)
    rows = [" & ".join(map(tex, line)) + r" \\" for line in s.lines]
    notes = [rf"\par\footnotesize {tex(sentence)}" for sentence in (*s.orders, *s.footnotes, *s.provenance)]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{tex(s.title)}}}",
            rf"\begin{{tabular}}{{{'ll' + 'r' * (len(s.header) - 2)}}}",
            r"\toprule",
            " & ".join(map(tex, s.header)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *notes,
            r"\end{table}",
            "",
        ]
    )


TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "²": "$^2$"}
TEX |= {"±": r"$\pm$", "×": r"$\times$", "<": "$<$", ">": "$>$", "⊥": r"$\perp$", "ε": r"$\epsilon$"}
TEX |= {"θ": r"$\theta$", "ρ": r"$\rho$", "α": r"$\alpha$", "λ": r"$\lambda$", "σ": r"$\sigma$", "η": r"$\eta$"}
TEX |= {"|": "$|$"} | {c: "\\" + c for c in "&%$#_{}"}


def tex(text: str) -> str:
    """Text with the characters that LaTeX would take for something else."""
    return "".join(TEX.get(c, c) for c in text)


def html(table: Table, found: list[Outcome]) -> str:
    """A page of its own."""
    from sam_repro.paper.render.html import page, table_html

    return page(table.title, table_html(sheet_of(table, found)))


CSV_HEADER = ("table", "row", "model", "method", "column", "mean", "half", "low", "high", "n", "paper", "difference")
CSV_HEADER += ("verdict", "commits", "runs")


def comma_separated(table: Table, found: list[Outcome]) -> str:
    """One line a number: row, column, ours with interval, paper, difference, verdict, and the runs it came from."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for o in found:
        done = [row for row in o.ledger if row["status"] == "done"]
        for cell in o.cells:
            ours = cell.ours
            mean, n, span = (ours.mean, ours.n, ours.span) if ours else (None, 0, None)
            half = ours.half if ours and span is None else None  # of magnitudes the mean is geometric: low and high
            low, high = span or (None, None)
            commits = " ".join(sorted({row["commit"][:8] for row in done}))
            runs = " ".join(row["run_id"] for row in done)
            line = [table.name, o.row.id, o.row.model, o.row.method, cell.column.name, mean, half, low, high, n]
            writer.writerow([*line, cell.printed, cell.difference, cell.verdict, commits, runs])
    return out.getvalue()


FORMATS = {"md": markdown, "tex": latex, "html": html, "csv": comma_separated}
