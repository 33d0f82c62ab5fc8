"""Derive every published number from the ledger again and compare."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from sam_repro.config.compose import compose_config
from sam_repro.errors import UserError
from sam_repro.paper.ledger_join import join_table, join_tables
from sam_repro.paper.render.overview import costs, overview
from sam_repro.paper.render.report import assemble
from sam_repro.paper.render.tables import FORMATS, render
from sam_repro.paper.spec import load_table
from sam_repro.records.ledger import read_row
from sam_repro.records.row_schema import seal_of

BLOCK = re.compile(r"(<!-- sam-repro (table[^\n]*?) -->\n)(.*?)(<!-- sam-repro end -->)", re.DOTALL)


def rows_problems(folder: Path) -> Iterator[str]:
    """Rows that cannot be what training wrote."""
    for path in sorted(folder.glob("*.json")):
        try:
            row = read_row(path)
        except UserError as error:
            yield str(error)
            continue
        if not row["run_id"].endswith(f"-s{row['seed']}-{row['config_hash']}"):
            yield f"{path}: the run id {row['run_id']} does not fit the seed or the configuration"
        if row["status"] == "done" and not row["evals"]:
            yield f"{path}: done, but without an evaluation"
        if row.get("seal") != seal_of(row):
            yield f"{path}: the row is not what its seal says: it was changed after training wrote it"
        last = {e["eval"]: e["correct"] for e in row.get("curves", {}).get("eval", [])}
        for name in last.keys() & row["evals"].keys():
            if last[name] != row["evals"][name]["correct"]:
                yield f"{path}: {name} has {row['evals'][name]['correct']} correct, but its curve ends at {last[name]}"


def table4_problems() -> Iterator[str]:
    """Where configs/model and configs/recipe differ from the paper's Table 4."""
    for row in load_table("table4").rows:
        model = row.id.split("/")[0]
        literal = ["recipe=resnet_table4"] if model.startswith("resnet") else []
        cfg = compose_config([f"model={model}", "optim=gsam", *literal])
        ours = {"rho_max": cfg.optim.rho_max, "rho_min": cfg.optim.rho_min, "alpha": cfg.optim.alpha}
        ours |= {"lr": cfg.recipe.lr, "lr_min": cfg.recipe.lr * cfg.recipe.lr_min_ratio, "epochs": cfg.recipe.epochs}
        ours |= {"weight_decay": cfg.recipe.weight_decay, "warmup_steps": cfg.recipe.warmup_steps}
        for key, printed in row.printed.items():
            assert isinstance(printed, (int, float))
            if abs(ours[key] - printed) > 1e-9:
                yield f"Table 4, {row.model}: {key} is {printed:g} in the paper and {ours[key]:g} in the configurations"


def generated(root: Path) -> Iterator[tuple[Path, str]]:
    """(path, text as it should be) of every generated file and of every document with generated blocks."""
    ledger_dir = root / "results" / "runs"
    rows = ledger_dir if ledger_dir.is_dir() else None
    parts, demo = join_tables([], rows), join_tables(["demo"], rows)
    yield root / "results" / "index.html", assemble(parts)
    drawn = {path.stem for path in (root / "results" / "figures").glob("*.svg")}
    yield root / "results" / "README.md", overview(parts, costs([*demo, *parts]), drawn)
    for path in sorted([root / "README.md", *(root / "docs").rglob("*.md"), *(root / "benchmarks").glob("*.md")]):
        text = path.read_text() if path.is_file() else ""
        if BLOCK.search(text):
            yield path, BLOCK.sub(lambda block: block[1] + fill(block[2]) + block[4], text)


def fill(command: str) -> str:
    """What `sam-repro <command>` prints."""
    _, *words = shlex.split(command)
    parser = ArgumentParser(prog="sam-repro table", exit_on_error=False)
    parser.add_argument("table")
    parser.add_argument("--format", choices=sorted(FORMATS), default="md")
    parser.add_argument("--ledger", type=Path)
    args = parser.parse_args(words)
    table = load_table(args.table)
    return render(table, join_table(table, args.ledger), args.format)
