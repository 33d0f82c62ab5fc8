"""Build a W&B workspace and a report for a table: its runs by model and method, and the panels of its claims.

  sam-repro dashboard table1 --entity my-team          # builds both with a key, else writes dashboard-table1.json
  sam-repro dashboard --push dashboard-table1.json     # later
  sam-repro dashboard demo --preview demo.svg          # what it would look like, from the ledger: no key needed

The report has the panels, and the table as `sam-repro table` prints it at that moment. The workspace has the panels.
Building needs `pip install wandb-workspaces`; writing the JSON needs nothing.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sam_repro.errors import UserError
from sam_repro.paper.ledger_join import join_table, search_first
from sam_repro.paper.outcomes import Outcome
from sam_repro.paper.render.dashboard import dashboard_of
from sam_repro.paper.render.dashboard_preview import draw_preview
from sam_repro.paper.render.style import RC
from sam_repro.paper.render.wandb_workspace import push
from sam_repro.paper.spec import load_table
from sam_repro.training.wandb_writer import has_key


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("table", nargs="?", help="name in results/paper/, or a path to a .yaml")
    parser.add_argument("--entity", default="", help="W&B user or team")
    parser.add_argument("--project", default="sam-repro")
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the table's own)")
    parser.add_argument("--push", type=Path, metavar="FILE", help="build from the JSON file of an earlier call")
    parser.add_argument("--preview", type=Path, metavar="FILE", help="draw what W&B would show, as .svg, .png or .pdf")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the JSON to this file, with or without a key"
    )


def run(args: Namespace) -> None:
    """Build workspace and report, or write them down."""
    if args.push is not None:
        try:
            tree = json.loads(args.push.read_text())
            assert isinstance(tree, dict) and {"table", "sections", "report"} <= tree.keys()
        except (OSError, ValueError, AssertionError) as error:
            reason = error if str(error) else "it was not written by `sam-repro dashboard`"
            raise UserError(f"cannot read {args.push}: {reason}") from None
        push(tree | ({"entity": args.entity} if args.entity else {}))
        return
    if args.table is None:
        raise UserError("name a table, or a file with --push")
    table = load_table(args.table)
    outcomes = join_table(table, args.ledger)
    tree = dashboard_of(table, outcomes, entity=args.entity, project=args.project)
    if not tree["groups"]:
        why = search_first([table], ledger=args.ledger) or "it asks for none"
        raise UserError(f"{table.name} has no runs yet: {why}")
    if args.preview is not None:
        preview(tree, outcomes, args.preview)
        return
    if args.output is None and has_key():
        push(tree)
        return
    path = args.output or Path(f"dashboard-{tree['table']}.json")
    try:
        path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    print(path)


def preview(tree: dict[str, Any], outcomes: list[Outcome], path: Path) -> None:
    """Draw what W&B would show."""
    import matplotlib

    rows = {row["run_id"]: row for o in outcomes for row in o.ledger}
    if not rows:
        raise UserError(f"no run of {tree['table']} is in the ledger yet, so there is nothing to draw")
    try:
        with matplotlib.rc_context(RC):
            draw_preview(tree, rows).savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    print(path)
