"""A W&B workspace for a table: its runs grouped by model and method, and the panels that its claims are about.

  sam-repro dashboard table1 --entity my-team          # builds it with a key, else writes dashboard-table1.json
  sam-repro dashboard --push dashboard-table1.json     # later

Building needs `pip install wandb-workspaces`; writing the JSON needs nothing.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sam_repro.errors import UserError
from sam_repro.paper.spec import Table, load_table
from sam_repro.paper.sync import has_key

# section: panels, each (title, metrics over steps)
PANELS = {
    "The surrogate gap": [
        ("Surrogate gap h", ["surrogate_gap"]),
        ("cos θ", ["cosine"]),
        ("Radius ρ", ["rho"]),
    ],
    "Training": [
        ("Loss, clean and perturbed", ["loss", "loss_robust"]),
        ("Gradient norms", ["grad_norm", "grad_norm_robust"]),
        ("Learning rate", ["lr"]),
    ],
    "Speed": [("Images a second", ["images_per_second"]), ("Processor hours", ["hours"])],
}


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("table", nargs="?", help="name in results/paper/, or a path to a .yaml")
    parser.add_argument("--entity", default="", help="W&B user or team")
    parser.add_argument("--project", default="sam-repro")
    parser.add_argument("--push", type=Path, metavar="FILE", help="build what an earlier call wrote")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON here, key or no key")


def run(args: Namespace) -> None:
    """Build the workspace, or write it down."""
    if args.push is not None:
        try:
            tree = json.loads(args.push.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {args.push}: {error}") from None
        print(build(tree | ({"entity": args.entity} if args.entity else {})).save().url)
        return
    if args.table is None:
        raise UserError("name a table, or a file with --push")
    tree = dashboard_of(load_table(args.table), entity=args.entity, project=args.project)
    if args.output is None and has_key():
        print(build(tree).save().url)
        return
    path = args.output or Path(f"dashboard-{tree['table']}.json")
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    print(path)


def dashboard_of(table: Table, *, entity: str, project: str) -> dict[str, Any]:
    """The workspace as plain data."""
    accuracy = [(f"{c.title}, %", [f"{c.name}/accuracy"]) for c in table.columns if c.value is None]
    curvature = [(c.title, [c.value]) for c in table.columns if c.value and c.value.startswith("sharpness.")]
    sections = {"Accuracy": accuracy, "Curvature": curvature, **PANELS}
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
            for name, panels in sections.items()
            if panels
        ],
    }


def build(tree: dict[str, Any]) -> Any:
    """The workspace object of the public wandb-workspaces API, not yet saved."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError("building a workspace needs `pip install wandb-workspaces`") from None
    if not tree.get("entity"):
        raise UserError("W&B workspaces belong to a user or team: give --entity")
    sections = [
        ws.Section(
            name=section["name"],
            panels=[wr.LinePlot(title=p["title"], x="Step", y=p["y"], smoothing_factor=0) for p in section["panels"]],
            is_open=True,
        )
        for section in tree["sections"]
    ]
    runs = ws.RunsetSettings(
        filters=[ws.Metric("Group").isin([tree["run_group"]])],
        groupby=[ws.Config(key) for key in tree["group_by"]],
    )
    return ws.Workspace(
        entity=tree["entity"],
        project=tree["project"],
        name=tree["name"],
        sections=sections,
        runset_settings=runs,
        auto_generate_panels=False,
    )
