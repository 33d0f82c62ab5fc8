"""A dashboard (render.dashboard) as a workspace and a report of W&B's public API."""

from __future__ import annotations

import unicodedata
from typing import Any

from sam_repro.errors import UserError

SEEDS = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}  # of a group: its line or bar, and what is around it
MOST_RUNS = 100  # in a panel; W&B shows 10 unless told otherwise


def push(tree: dict[str, Any]) -> None:
    """Save both; print where they are."""
    workspace, report = build_workspace(tree), build_report(tree)
    try:
        print(workspace.save().url)
        report.save()
        print(report.url)
    except Exception as error:  # the client's, of many kinds: no network, a wrong key, no right to the project
        raise UserError(f"W&B refused: {' '.join(str(error).split())[:300]}") from error


def modules(tree: dict[str, Any]) -> tuple[Any, Any]:
    """wandb-workspaces' reports and workspaces."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError("building a workspace needs `pip install wandb-workspaces`") from None
    if not tree.get("entity"):
        raise UserError("a W&B workspace belongs to a user or a team: add --entity NAME")
    return wr, ws


def panel_of(panel: dict[str, Any], wr: Any) -> Any:
    """One panel: lines over steps, bars of the last values, or points over a setting."""
    title, y, log_y = panel["title"], panel["y"], panel.get("log_y", False)
    if panel["kind"] == "bars":
        return wr.BarPlot(title=title, metrics=y, **SEEDS)
    if panel["kind"] == "points":
        x = wr.Config(panel["x"])
        return wr.ScatterPlot(title=title, x=x, y=wr.SummaryMetric(y[0]), log_x=panel["log_x"], log_y=log_y)
    return wr.LinePlot(title=title, x="Step", y=y, log_y=log_y, smoothing_factor=0, **SEEDS)


def filter_of(tree: dict[str, Any]) -> str:
    """The table's runs as W&B's expression."""
    return f"Metric('ID') in {[run for group in tree['groups'] for run in group['runs']]}"


def columns_of(tree: dict[str, Any]) -> list[str]:
    """The columns of the table of runs."""
    return ["run:displayName", *(f"summary:{name}" for name in tree["columns"])]


def build_workspace(tree: dict[str, Any]) -> Any:
    """The workspace object, not yet saved."""
    wr, ws = modules(tree)
    return ws.Workspace(
        entity=tree["entity"],
        project=tree["project"],
        name=without_signs(tree["name"]),
        sections=[
            ws.Section(name=s["name"], panels=[panel_of(p, wr) for p in s["panels"]], is_open=True)
            for s in tree["sections"]
        ],
        settings=ws.WorkspaceSettings(max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=filter_of(tree),
            groupby=[ws.Config(key) for key in tree["group_by"]],
            order=[ws.Ordering(ws.Summary(tree["columns"][0]), ascending=False)],
            run_settings={run: ws.RunSettings(color=g["colour"]) for g in tree["groups"] for run in g["runs"]},
            group_colors={ws.GroupPath(*group["path"]): group["colour"] for group in tree["groups"]},
            pinned_columns=columns_of(tree),
        ),
        auto_generate_panels=False,
    )


def without_signs(text: str) -> str:
    """A title without =, |, + and the like, which W&B takes for emojis in the name of a workspace."""
    return " ".join("".join(" " if unicodedata.category(c).startswith("S") else c for c in text).split())


def build_report(tree: dict[str, Any]) -> Any:
    """The report object, not yet saved: the table as it stands, the commands, the sections over the table's runs."""
    wr, _ = modules(tree)
    command = f"sam-repro run {tree['table']}\nsam-repro table {tree['table']}"
    blocks = [wr.TableOfContents(), wr.H1(text=tree["name"]), wr.MarkdownBlock(text=tree["report"]["text"])]
    blocks += [wr.CodeBlock(code=command, language="markdown")]
    for section in tree["sections"]:
        runs = wr.Runset(
            entity=tree["entity"],
            project=tree["project"],
            name=tree["table"],
            filters=filter_of(tree),
            groupby=[f"config.{key}" for key in tree["group_by"]],
            order=[wr.OrderBy(wr.SummaryMetric(tree["columns"][0]), ascending=False)],
            run_settings={run: wr.RunSettings(color=g["colour"]) for g in tree["groups"] for run in g["runs"]},
            pinned_columns=columns_of(tree),
        )
        colours = {group_of(tree, group, wr): group["colour"] for group in tree["groups"]}
        panels = [panel_of(panel, wr) for panel in section["panels"]]
        blocks += [wr.H2(text=section["name"])]
        blocks += [wr.PanelGrid(runsets=[runs], panels=panels, custom_run_colors=colours)]
    return wr.Report(
        entity=tree["entity"],
        project=tree["project"],
        title=tree["name"][:128],
        description=tree["report"]["description"],
        blocks=blocks,
        width="fluid",
    )


def group_of(tree: dict[str, Any], group: dict[str, Any], wr: Any) -> Any:
    """A group of runs as a report calls it."""
    keys = zip(tree["group_by"], group["path"], strict=True)
    named = tuple(wr.RunsetGroupKey(key=wr.Config(key), value=value) for key, value in keys)
    return wr.RunsetGroup(runset_name=tree["table"], keys=named)
