"""The dashboard of a table as plain data: its runs, their groups and colours, the panels of its figure, the report."""

from __future__ import annotations

import json
from typing import Any

from sam_repro.config.compose import to_dict
from sam_repro.config.run_id import UNHASHED_KEYS
from sam_repro.config.schema import Config
from sam_repro.paper.outcomes import Outcome
from sam_repro.paper.render.figures import method_key
from sam_repro.paper.render.style import marks_of
from sam_repro.paper.render.tables import render
from sam_repro.paper.spec import Column, Table

EIGENVALUE = "sharpness/lambda_abs"  # its size spans decades: on a logarithmic axis
# section: panels, each (kind, title, metrics); the accuracies come first
PANELS = {
    "Accuracy and loss": [
        ("lines", "Loss, clean and perturbed", ["loss", "loss_robust"]),
        ("lines", "Gradient norms", ["grad_norm", "grad_norm_robust"]),
    ],
    "The surrogate gap": [
        ("lines", "Surrogate gap h", ["surrogate_gap"]),
        ("lines", "cos θ", ["cosine"]),
        ("lines", "Radius ρ", ["rho"]),
    ],
    "Curvature": [
        ("lines", "|λ_max|", [EIGENVALUE]),
        ("lines", "2h/ρ² and its first-order part", ["sharpness/estimate", "sharpness/first_order"]),
        ("lines", "|cos(ε, v)|", ["sharpness/alignment"]),
    ],
    "Cost": [
        ("lines", "Images per second", ["images_per_second"]),
        ("bars", "Processor hours", ["hours"]),
        ("bars", "Memory at its peak, GB", ["peak_GB"]),
    ],
}
# After the table's own columns, what runs can be sorted by (records.ledger.summary_of).
COLUMNS = (EIGENVALUE, "surrogate_gap", "hours", "images_per_second", "peak_GB")


def dashboard_of(table: Table, outcomes: list[Outcome], *, entity: str, project: str) -> dict[str, Any]:
    """Workspace and report as plain data.

    W&B's id of a run is its run id, so the runs are the table's, whatever group they were started in.
    """
    accuracies = [("lines", f"{c.title}, %", [f"{c.name}/accuracy"]) for c in table.columns if c.value is None]
    usual = PANELS | {"Accuracy and loss": accuracies + PANELS["Accuracy and loss"]}
    sections = [{"name": "The figure", "panels": figure_panels(table, outcomes)}]
    sections += [
        {"name": name, "panels": [panel_of(kind, title, y) for kind, title, y in panels]}
        for name, panels in usual.items()
    ]
    keys, marks = group_keys(outcomes), marks_of({o.row.id: method_key(o) for o in outcomes})
    groups = [
        {
            "path": [text_of(settings(o.runs[0].config)[key]) for key in keys],
            "colour": marks[o.row.id].colour,
            "runs": [run.run_id for run in o.runs],
        }
        for o in outcomes
        if o.runs
    ]
    own = [metric for c in table.columns if (metric := metric_of(c))]
    return {
        "table": table.name,
        "name": table.title,
        "entity": entity,
        "project": project,
        "columns": list(dict.fromkeys([*own, *COLUMNS])),  # the first one sorts the runs
        "group_by": keys,
        "groups": groups,
        "sections": [section for section in sections if section["panels"]],
        "report": {"description": table.source, "text": render(table, outcomes, "md")},
    }


def figure_panels(table: Table, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """The panels of the table's figure: curves as lines, dots as bars, a sweep as points over its setting."""
    columns = {c.name: c for c in table.columns}
    kind, panels = table.figure.get("kind", "dots"), []
    x = swept_key(outcomes) if kind == "sweep" else ""
    for name in table.figure.get("panels", list(columns)) if kind != "toy" else []:
        column = columns.get(name)
        metric = metric_of(column) if column else name
        if metric is None:
            continue
        shape = "lines" if kind == "curves" else "points" if x else "bars"
        panel = panel_of(shape, f"{column.title}, {column.unit}".removesuffix(", ") if column else name, [metric])
        panels.append(panel | ({"x": x, "log_x": bool(table.figure.get("log_x"))} if x else {}))
    return panels


def panel_of(kind: str, title: str, y: list[str]) -> dict[str, Any]:
    """One panel as data."""
    return {"kind": kind, "title": title, "y": y} | ({"log_y": True} if y == [EIGENVALUE] else {})


def metric_of(column: Column) -> str | None:
    """Where W&B has a column's value; None for a setting or a computed one, which it has not."""
    if column.value is None:
        return f"{column.name}/accuracy"
    if column.value.startswith(("config.", "toy.")):
        return None
    if column.value == "sharpness.lambda_max" and column.magnitude:
        return EIGENVALUE
    return column.value.removeprefix("last.").replace(".", "/")


def settings(config: Config) -> dict[str, Any]:
    """{dotted key: value} of everything that may tell the rows of a table apart; the method's own keys first."""
    tree = {"optim": {}} | to_dict(config)
    flat = {f"{node}.{k}": v for node, keys in tree.items() if isinstance(keys, dict) for k, v in keys.items()}
    return {k: v for k, v in flat.items() if k not in UNHASHED_KEYS and k.partition(".")[0] not in UNHASHED_KEYS}


def group_keys(outcomes: list[Outcome]) -> list[str]:
    """The settings by which W&B puts the seeds of a row together: model, method, and what else tells rows apart."""
    configs = [settings(o.runs[0].config) for o in outcomes if o.runs]
    keys = ["model.name", "optim.name"]

    def told_apart(by: list[str]) -> int:
        return len({tuple(map(text_of, (config[key] for key in by))) for config in configs})

    for key in configs[0] if configs else []:
        if told_apart([*keys, key]) > told_apart(keys):
            keys.append(key)
    return keys


def swept_key(outcomes: list[Outcome]) -> str:
    """The setting that is a sweep's abscissa; "" where there is none."""
    rows = [(o.row.x, settings(o.runs[0].config)) for o in outcomes if o.runs and isinstance(o.row.x, (int, float))]
    return next((key for key in rows[0][1] if all(config[key] == x for x, config in rows)), "") if rows else ""


def text_of(value: Any) -> str:
    """A setting as W&B's page writes it."""
    whole = isinstance(value, float) and value.is_integer()
    return value if isinstance(value, str) else json.dumps(int(value) if whole else value)
