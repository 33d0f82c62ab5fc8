"""One self-contained page of everything: claims, tables, figures, curves of every run, costs, deviations."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sam_repro.paper.claims import judged
from sam_repro.paper.deviations import deviations_path
from sam_repro.paper.estimate import row_costs
from sam_repro.paper.ledger_join import JoinedTable, join_tables
from sam_repro.paper.outcomes import Outcome, curve
from sam_repro.paper.render.chart import Chart, line_chart
from sam_repro.paper.render.numbers import hours_words
from sam_repro.paper.render.overview import EVIDENCE, is_study, summary
from sam_repro.paper.render.page import page
from sam_repro.paper.render.sheet import method_of, sheet_of
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
    ordered = sorted(tables, key=lambda joined: not is_study(joined.table))
    entries = [table_entry(joined, figures) for joined in ordered]
    return page(
        "report.html",
        title="Sharpness-aware training: what came out",
        summary=summary(tables),
        evidence=figures.get(EVIDENCE),
        claims=claims(tables),
        begun=[entry for entry in entries if entry["runs"]],
        pending=[entry for entry in entries if not entry["runs"]],
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
        {"word": j.word, "text": j.text, "why": j.why, "table": t.table.name, "title": t.table.title}
        for t in tables
        for j in judged(t.table, t.outcomes)
        if j.p is not None
    ]
    entries.sort(key=lambda claim: not claim["word"].startswith("confirmed"))
    return {
        "decided": [claim for claim in entries if not claim["word"].startswith("open")],
        "open": [claim for claim in entries if claim["word"].startswith("open")],
    }


def table_entry(joined: JoinedTable, figures: dict[str, Markup]) -> dict[str, Any]:
    """A table that folds, with its figure where it has runs."""
    t, outcomes = joined.table, joined.outcomes
    title_words = [t.name, t.title, *t.warnings]  # words that every row answers to
    return {
        "name": t.name,
        "title": t.title,
        "source": t.source,
        "state": f"cannot be planned yet: {joined.problem}"
        if joined.problem
        else f"{len(joined.rows)} of {len(joined.runs)} runs",
        "runs": len(joined.rows),
        "figure": figures.get(t.name) if joined.rows else None,
        "words": " ".join([*title_words, *(f"{r.id} {r.model} {r.method} {' '.join(r.warnings)}" for r in t.rows)]),
        "title_words": " ".join(title_words),
        "sheet": sheet_of(t, outcomes) if outcomes else None,
        "links": [links_of(o) for o in outcomes],
        "ids": [o.row.id for o in outcomes],
    }


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
        facts += f"{s['rho']:.3g}, |cos(ε, v)| {s['alignment']:.3f}, on {s['images']} training images"
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
