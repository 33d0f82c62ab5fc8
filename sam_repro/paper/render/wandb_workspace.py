"""A W&B workspace and a report of a table, as data and as W&B objects."""

from __future__ import annotations

from typing import Any

from sam_repro.errors import UserError
from sam_repro.paper.outcomes import Outcome
from sam_repro.paper.render.tables import render
from sam_repro.paper.spec import Table

# section: panels, each (title, metrics over steps)
PANELS = {
    "The surrogate gap": [
        ("Surrogate gap h", ["surrogate_gap"]),
        ("cos θ", ["cosine"]),
        ("Radius ρ", ["rho"]),
    ],
    "Curvature": [
        ("λ_max", ["sharpness/lambda_max"]),
        ("2h/ρ² and its first-order part", ["sharpness/estimate", "sharpness/first_order"]),
        ("|cos(ε, v)|", ["sharpness/alignment"]),
    ],
    "Training": [
        ("Loss, clean and perturbed", ["loss", "loss_robust"]),
        ("Gradient norms", ["grad_norm", "grad_norm_robust"]),
        ("Learning rate", ["lr"]),
    ],
    "Speed": [("Images per second", ["images_per_second"]), ("Processor hours", ["hours"])],
}


def dashboard_of(table: Table, outcomes: list[Outcome], *, entity: str, project: str) -> dict[str, Any]:
    """Workspace and report as plain data."""
    accuracy = [(f"{c.title}, %", [f"{c.name}/accuracy"]) for c in table.columns if c.value is None]
    group = next((o.partition("=")[2] for o in table.base if o.startswith("log.group=")), table.name)
    return {
        "table": table.name,
        "name": table.title,
        "entity": entity,
        "project": project,
        "run_group": group,
        "group_by": ["model.name", "optim.name"],
        "sections": [
            {"name": name, "panels": [{"title": title, "y": y} for title, y in panels]}
            for name, panels in ({"Accuracy": accuracy} | PANELS).items()
            if panels
        ],
        "report": {"description": table.source, "text": render(table, outcomes, "md")},
    }


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
        raise UserError("W&B workspaces belong to a user or team: give --entity")
    return wr, ws


def panels_of(section: dict[str, Any], wr: Any) -> list[Any]:
    """A section's line plots."""
    return [wr.LinePlot(title=p["title"], x="Step", y=p["y"], smoothing_factor=0) for p in section["panels"]]


def build_workspace(tree: dict[str, Any]) -> Any:
    """The workspace object of the public wandb-workspaces API, not yet saved."""
    wr, ws = modules(tree)
    return ws.Workspace(
        entity=tree["entity"],
        project=tree["project"],
        name=tree["name"],
        sections=[ws.Section(name=s["name"], panels=panels_of(s, wr), is_open=True) for s in tree["sections"]],
        runset_settings=ws.RunsetSettings(
            filters=f"Metric('Group') in ['{tree['run_group']}']",
            groupby=[ws.Config(key) for key in tree["group_by"]],
        ),
        auto_generate_panels=False,
    )


def build_report(tree: dict[str, Any]) -> Any:
    """The report object, not yet saved: the table as it stands, then each section's panels over the table's runs."""
    wr, _ = modules(tree)
    blocks = [wr.TableOfContents(), wr.H1(text=tree["name"]), wr.MarkdownBlock(text=tree["report"]["text"])]
    for section in tree["sections"]:
        runs = wr.Runset(
            entity=tree["entity"],
            project=tree["project"],
            name=tree["run_group"],
            filters=f"Metric('Group') in ['{tree['run_group']}']",
            groupby=[f"config.{key}" for key in tree["group_by"]],
        )
        blocks += [wr.H2(text=section["name"]), wr.PanelGrid(runsets=[runs], panels=panels_of(section, wr))]
    return wr.Report(
        entity=tree["entity"],
        project=tree["project"],
        title=tree["name"],
        description=tree["report"]["description"],
        blocks=blocks,
        width="fluid",
    )
