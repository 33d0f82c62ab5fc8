"""Derive every published number from the ledger again and compare."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from sam_repro.errors import UserError
from sam_repro.paper.deviations import OF_COLUMNS, deviations_of
from sam_repro.paper.ledger_join import join_table, join_tables, runs_of
from sam_repro.paper.outcomes import computed, is_as_printed
from sam_repro.paper.render.overview import costs, overview
from sam_repro.paper.render.report import assemble, figures_in
from sam_repro.paper.render.tables import FORMATS, render
from sam_repro.paper.spec import load_table, table_names
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


def settings_problems() -> Iterator[str]:
    """Where configs/ differ from the settings that a paper prints (GSAM's Table 4)."""
    for table in map(load_table, table_names("paper")):
        for row in (row for row in table.rows if row.settings):
            for column in table.columns:
                ours, printed = computed(row, column), row.printed[column.name]
                if ours is None or not is_as_printed(ours, printed):
                    where = f"{table.title}, {row.model}: {column.name}"
                    yield f"{where} is {printed} in the paper and {ours} in the configurations"


def warnings_problems() -> Iterator[str]:
    """Rows that do not cite a deviation that concerns their runs or columns: what shares runs shares warnings."""
    for table in map(load_table, table_names("paper")):
        columns = {OF_COLUMNS[c.name] for c in table.columns if c.name in OF_COLUMNS}
        for row in table.rows:
            concerned = columns | {d for r in runs_of(table, row, seeds=1) for d in deviations_of(r.config)}
            if lacking := concerned - {*table.warnings, *row.warnings}:
                yield f"table {table.name}, row {row.id}: it does not cite {', '.join(sorted(lacking))}"


def generated(root: Path) -> Iterator[tuple[Path, str]]:
    """(path, text as it should be) of every generated file and of every document with generated blocks."""
    ledger_dir = root / "results" / "runs"
    rows = ledger_dir if ledger_dir.is_dir() else None
    parts, demo = join_tables([], rows), join_tables(["demo"], rows)
    figures = figures_in(root / "results" / "figures")
    yield root / "results" / "index.html", assemble(parts, figures)
    yield root / "results" / "README.md", overview(parts, costs([*demo, *parts]), set(figures))
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
