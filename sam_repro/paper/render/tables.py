"""Ours and the paper's numbers, as Markdown, LaTeX, HTML and CSV."""

from __future__ import annotations

import csv
import io

from sam_repro.paper.outcomes import Outcome
from sam_repro.paper.render.numbers import markdown_table
from sam_repro.paper.render.page import table_page
from sam_repro.paper.render.sheet import sheet_of
from sam_repro.paper.spec import Table


def render(table: Table, outcomes: list[Outcome], form: str) -> str:
    """The table in a format of FORMATS, with a line break at the end."""
    return FORMATS[form](table, outcomes)


def markdown(table: Table, outcomes: list[Outcome]) -> str:
    """GitHub's Markdown, its columns padded so that it also reads well on a terminal."""
    s = sheet_of(table, outcomes)
    out = [f"### {s.title}", "", f"Source: {s.source}", "", markdown_table(s.header, s.lines, padded=True)]
    for part in (s.orders, s.footnotes, s.provenance):
        out += ["", *(f"* {sentence}" for sentence in part)] if part else []
    return "\n".join(out) + "\n"


def brief(table: Table, outcomes: list[Outcome]) -> str:
    """Markdown of the rows alone, without notes and provenance."""
    s = sheet_of(table, outcomes)
    return markdown_table(s.header, s.lines, padded=True) + "\n"


def latex(table: Table, outcomes: list[Outcome]) -> str:
    """A booktabs table with notes."""
    s = sheet_of(table, outcomes)
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


def html(table: Table, outcomes: list[Outcome]) -> str:
    """A page of its own."""
    return table_page(sheet_of(table, outcomes))


CSV_HEADER = ("table", "row", "model", "method", "column", "mean", "half", "low", "high", "n", "paper", "difference")
CSV_HEADER += ("verdict", "commits", "runs")


def comma_separated(table: Table, outcomes: list[Outcome]) -> str:
    """One line a number: row, column, ours with interval, paper, difference, verdict, and the runs it came from."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for o in outcomes:
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


FORMATS = {"md": markdown, "brief": brief, "tex": latex, "html": html, "csv": comma_separated}
