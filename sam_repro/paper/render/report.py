"""One self-contained page of everything: claims, tables, figures, curves of every run, costs, deviations."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sam_repro.errors import plural
from sam_repro.paper.claims import judged
from sam_repro.paper.deviations import deviations_path
from sam_repro.paper.estimate import row_costs
from sam_repro.paper.ledger_join import JoinedTable, join_tables
from sam_repro.paper.outcomes import Outcome, curve
from sam_repro.paper.render.chart import Chart, line_chart
from sam_repro.paper.render.numbers import hours_words
from sam_repro.paper.render.overview import EVIDENCE, is_study, summary
from sam_repro.paper.render.page import page
from sam_repro.paper.render.sheet import Sheet, method_of, sheet_of
from sam_repro.records.ledger import Row

SPEED = {"speed": "What a step costs", "scaling": "Many GPUs of one host"}  # figures of benchmarks/report.py


def report(names: list[str], ledger_dir: Path | None = None, figures_dir: Path | None = None) -> str:
    """The page as text.

    Args:
        names: tables; empty for all whose runs go to the committed ledger.
        ledger_dir: folder of ledger rows; None takes the tables' own.
        figures_dir: folder of the SVG files that go on the page, one per table; None leaves them out.
    """
    return assemble(join_tables(names, ledger_dir), figures_in(figures_dir) if figures_dir else {})


def assemble(tables: list[JoinedTable], figures: dict[str, Markup] | None = None) -> str:
    """The whole page: claims and evidence, studies, the papers' tables, runs, costs, deviations."""
    figures = figures or {}
    rows = {run_id: row for table in tables for run_id, row in table.rows.items()}
    studies, papers = ([t for t in tables if is_study(t.table) is mine] for mine in (True, False))
    return page(
        "report.html",
        title="Sharpness-aware training: what came out",
        summary=summary(tables),
        evidence=figures.get(EVIDENCE),
        claims=claims(tables),
        studies=begun_and_pending(studies, figures),
        papers=begun_and_pending(papers, figures),
        speed=[(title, figures[name]) for name, title in SPEED.items() if name in figures],
        runs=[run_entry(row) for _, row in sorted(rows.items())],
        costs=[costs(table) for table in tables],
        deviations=deviations(),
    )


def figures_in(folder: Path) -> dict[str, Markup]:
    """{name: figure} of a folder's SVG files as they stand inside a page: without prolog, metadata and ids."""
    figures = {}
    for path in sorted(folder.glob("*.svg")):
        text = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>", "", path.read_text(), flags=re.DOTALL)
        text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", text)
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = re.sub(r' width="([\d.]+)pt" height="[\d.]+pt"', r' style="max-width: \1pt"', text, count=1)
        figures[path.stem] = Markup(text)
    return figures


def claims(tables: list[JoinedTable]) -> dict[str, list[dict[str, str]]]:
    """The claims that could be tested: those decided, the confirmed ones first, and those open."""
    entries = [
        {
            "word": j.word,
            "text": j.text,
            "effect": effect + end,
            "limits": limits.lstrip(),
            "table": t.table.name,
            "title": short(t),
        }
        for t in tables
        for j in judged(t.table, t.outcomes)
        if j.p is not None
        for effect, end, limits in [j.why.partition(").")]
    ]
    entries.sort(key=lambda claim: not claim["word"].startswith("confirmed"))
    return {
        "decided": [claim for claim in entries if not claim["word"].startswith("open")],
        "open": [claim for claim in entries if claim["word"].startswith("open")],
    }


def short(joined: JoinedTable) -> str:
    """A table's title as it stands below a heading: without "Study: ", with a capital where a word begins it."""
    first, _, rest = joined.table.title.removeprefix("Study: ").partition(" ")
    return f"{first[0].upper() + first[1:] if len(first) > 1 else first} {rest}"


def begun_and_pending(tables: list[JoinedTable], figures: dict[str, Markup]) -> dict[str, list[dict[str, Any]]]:
    """The tables that have a number of ours, and those that have none."""
    entries = [table_entry(joined, figures) for joined in tables]
    return {"begun": [e for e in entries if e["begun"]], "pending": [e for e in entries if not e["begun"]]}


def state_of(joined: JoinedTable, *, begun: bool) -> str:
    """How far a table is."""
    if joined.problem:
        return f"cannot be planned yet: {joined.problem}"
    if not joined.runs:
        return "needs no run" if begun else "planned when its search is done"
    return f"{len(joined.rows)} of {plural(len(joined.runs), 'run')}"


def table_entry(joined: JoinedTable, figures: dict[str, Markup]) -> dict[str, Any]:
    """A table that folds, with its figure where it has runs."""
    t, outcomes = joined.table, joined.outcomes
    title_words = [t.name, t.title, *t.warnings]  # words that every row answers to
    sheet = sheet_of(t, outcomes)
    begun = any(cell.ours for o in outcomes for cell in o.cells) or bool(joined.rows)
    return {
        "name": t.name,
        "title": short(joined),
        "source": t.source,
        "state": state_of(joined, begun=begun),
        "begun": begun,
        "figure": figures.get(t.name) if joined.rows else None,
        "words": " ".join([*title_words, *(f"{r.id} {r.model} {r.method} {' '.join(r.warnings)}" for r in t.rows)]),
        "title_words": " ".join(title_words),
        "sheet": without_runs(sheet) if not joined.rows and ("paper" in sheet.header or not begun) else sheet,
        "links": [links_of(o) for o in outcomes],
        "ids": [o.row.id for o in outcomes],
    }


def without_runs(sheet: Sheet) -> Sheet:
    """A table that no run has filled: one column for the paper's four, and a setting of ours only where it differs."""
    paper = [i for i, title in enumerate(sheet.header) if title == "paper"]
    header = [*sheet.header[:2], *(f"{sheet.header[i - 1]} (paper)" for i in paper)]
    lines = []
    for line in sheet.lines:
        differs = [line[i + 2] == "differs" for i in paper]
        values = [f"{line[i]}; ours {line[i - 1]}" if d else line[i] for i, d in zip(paper, differs, strict=True)]
        lines.append([*line[:2], *values])
    return replace(sheet, header=header, lines=lines)


def links_of(o: Outcome) -> dict[str, Any]:
    """Where a row's method leads: to its first run, to those of other seeds, to its deviations."""
    runs = [(row["seed"], row["run_id"]) for row in o.ledger]
    seeds = [(f"seed {seed}", run_id) for seed, run_id in runs[1:]]
    return {
        "method": method_of(o.row),
        "run": runs[0][1] if runs else "",
        "small": [*seeds, *((warning, warning) for warning in o.row.warnings)],
    }


def run_entry(row: Row) -> dict[str, Any]:
    """A run that folds: result, curves, provenance and the command that repeats it."""
    scores = ", ".join(f"{k} {100 * v['correct'] / v['total']:.2f} %" for k, v in row["evals"].items())
    return {
        "run_id": row["run_id"],
        "state": f"{row['status']}: {scores}" if scores else row["status"],
        "charts": charts_of(row),
        "facts": facts_of(row),
        "command": "python train.py " + shlex.join(row.get("overrides", [])),
    }


def charts_of(row: Row) -> list[Chart]:
    """The curves of a run, those that it has."""
    steps = curve(row, "step")
    points = {
        name: [(s, v) for s, v in zip(steps, curve(row, name), strict=False) if s is not None and v is not None]
        for name in ("loss", "loss_robust", "surrogate_gap", "cosine", "lr", "rho")
    }
    accuracy: dict[str, list[tuple[float, float]]] = {}
    for e in row.get("curves", {}).get("eval", []):
        accuracy.setdefault(e["eval"], []).append((e["step"], 100 * e["correct"] / e["total"]))
    measured = row.get("curves", {}).get("sharpness", [])
    charts = [line_chart(f"accuracy on {name}, %", line) for name, line in accuracy.items()]
    charts.append(line_chart("loss, clean and perturbed", points["loss"], points["loss_robust"]))
    if any(rho for _, rho in points["rho"]):
        charts += [line_chart("surrogate gap h", points["surrogate_gap"]), line_chart("cos θ", points["cosine"])]
    for title, key in (("λ_max of the Hessian", "lambda_max"), ("|cos(ε, v)|", "alignment")):
        charts.append(line_chart(title, [(m["step"], m[key]) for m in measured if key in m]))
    charts.append(line_chart("learning rate", points["lr"], digits=2))
    return [chart for chart in charts if chart is not None]


def facts_of(row: Row) -> str:
    """Hardware, hours, commit and curvature of a run."""
    facts = f"{row.get('world', 1)} x {row['hardware']}, {row.get('dtype', '')}, m = {row.get('m', '–')}, "
    facts += f"{row.get('hours', 0):.3g} processor hours, {row.get('finished', '')}, commit {row['commit'][:12]}"
    facts += " with local changes" if row["dirty"] else ""
    s = row.get("sharpness", {})
    if "lambda_max" in s:
        facts += f"; λ_max {s['lambda_max']:.4g} (residual {s['residual']:.1g}), 2h/ρ² {s['estimate']:.4g} at ρ "
        facts += f"{s['rho']:.3g}, |cos(ε, v)| {s['alignment']:.3f}, on {plural(s['images'], 'training image')}"
    return facts


def costs(joined: JoinedTable) -> tuple[str, str, str, str]:
    """(title, images, EFLOP planned, hours spent) of a table; `sam-repro estimate` adds hours and money."""
    known = row_costs(joined.table, joined.outcomes, []).values()
    eflop, images = sum(c.eflop or 0 for c in known), sum(c.images for c in known)
    spent = sum(row.get("hours", 0.0) for row in joined.rows.values())
    return (
        joined.table.title,
        f"{images:.3g}",
        f"{eflop:.3g}" if eflop else "–",
        hours_words(spent) if spent else "–",
    )


def deviations() -> list[tuple[str, str, str]]:
    """(id, title, text) of the entries of docs/DEVIATIONS.md."""
    path = deviations_path()
    text = path.read_text() if path.is_file() else ""
    entries = re.findall(r"^## (D-\d+) (.+)\n((?:(?!^#).*\n?)*)", text, flags=re.MULTILINE)
    return [(key, title, " ".join(body.split())) for key, title, body in entries]
