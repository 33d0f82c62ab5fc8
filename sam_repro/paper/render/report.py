"""One self-contained page of everything: tables, curves of every run, costs, deviations."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from sam_repro.paper.deviations import deviations_path
from sam_repro.paper.estimate import row_costs
from sam_repro.paper.ledger_join import JoinedTable, join_tables
from sam_repro.paper.outcomes import Outcome, curve
from sam_repro.paper.render.chart import Chart, line_chart
from sam_repro.paper.render.numbers import hours_words
from sam_repro.paper.render.page import page
from sam_repro.paper.render.sheet import method_of, sheet_of
from sam_repro.records.ledger import Row

OVERVIEW = ("table", "rows", "runs", "of", "within", "above", "below", "diverged", "one seed", "pending")


def report(names: list[str], ledger_dir: Path | None = None) -> str:
    """The page as text.

    Args:
        names: tables; empty for all whose runs go to the committed ledger.
        ledger_dir: folder of ledger rows; None takes the tables' own.
    """
    return assemble(join_tables(names, ledger_dir))


def assemble(tables: list[JoinedTable]) -> str:
    """The whole page."""
    rows = {run_id: row for table in tables for run_id, row in table.rows.items()}
    return page(
        "report.html",
        title="Sharpness-aware training, reproduced",
        tiles=tiles(tables, rows),
        overview_header=OVERVIEW,
        tables=[table_entry(table) for table in tables],
        runs=[run_entry(row) for _, row in sorted(rows.items())],
        costs=[costs(table) for table in tables],
        deviations=deviations(),
    )


def tiles(tables: list[JoinedTable], rows: dict[str, Row]) -> list[tuple[str, str]]:
    """The few numbers that say where the project stands, with what they are."""
    verdicts = Counter(c.verdict for table in tables for o in table.outcomes for c in o.cells)
    wanted = len(set().union(*(table.runs for table in tables)))
    judged = verdicts["within"] + verdicts["above"] + verdicts["below"]
    return [
        (f"{len(rows)} / {wanted}", "runs in the ledger"),
        (f"{judged}", "numbers compared"),
        (f"{verdicts['within']}", "within the paper's"),
        (f"{verdicts['below']}", "below"),
        (f"{verdicts['above']}", "above"),
        (f"{verdicts['not in our sources']}", "not in our sources"),
        (f"{hours_words(sum(row.get('hours', 0) for row in rows.values()))} h", "processor hours"),
    ]


def table_entry(joined: JoinedTable) -> dict[str, Any]:
    """A table that folds, open where it has results; and its line in the overview."""
    t, outcomes = joined.table, joined.outcomes
    verdicts = Counter(c.verdict for o in outcomes for c in o.cells)
    counts = [len(t.rows), len(joined.rows), len(joined.runs), *(verdicts[word] for word in OVERVIEW[4:])]
    title_words = [t.name, t.title, *t.warnings]  # words that every row answers to
    return {
        "name": t.name,
        "title": t.title,
        "source": t.source,
        "state": f"cannot be planned yet: {joined.problem}"
        if joined.problem
        else f"{len(joined.rows)} of {len(joined.runs)} runs",
        "counts": [str(count or "–") for count in counts],
        "words": " ".join([*title_words, *(f"{r.id} {r.model} {r.method} {' '.join(r.warnings)}" for r in t.rows)]),
        "title_words": " ".join(title_words),
        "open": bool(joined.rows) or t.name == "table1",
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
