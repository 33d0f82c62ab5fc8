"""Tables with what came out of them: what the report, the status and the overview go through."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from sam_repro.errors import UserError
from sam_repro.paper.outcomes import Outcome, outcomes
from sam_repro.paper.spec import Table, load_table, table_names
from sam_repro.records.ledger import Row


@dataclass(frozen=True)
class Part:
    """A table with what came out of it, or why it cannot be planned."""

    table: Table
    found: list[Outcome]
    problem: str = ""

    @property
    def runs(self) -> set[str]:
        """Run ids wanted."""
        return {r.run_id for o in self.found for r in o.runs}

    @property
    def rows(self) -> dict[str, Row]:
        """Ledger rows by run id."""
        return {row["run_id"]: row for o in self.found for row in o.ledger}


def parts_of(names: list[str], ledger_dir: Path | None = None) -> list[Part]:
    """The tables joined with the ledger; one that does not compose is reported as such instead of ending it all."""
    if ledger_dir is not None and not ledger_dir.is_dir():
        raise UserError(f"there is no folder {ledger_dir} with ledger rows")
    parts = []
    every = names or sorted((n for n in table_names() if n != "demo"), key=place)
    for name in tqdm(every, desc="tables", leave=False, disable=None):  # composing them all takes a while
        table = load_table(name)
        try:
            parts.append(Part(table, outcomes(table, ledger_dir)))
        except UserError as error:
            if names:
                raise
            print(f"{name}: {error}", file=sys.stderr)
            printed = replace(table, rows=tuple(replace(row, overrides=None) for row in table.rows))
            parts.append(Part(table, outcomes(printed, ledger_dir), str(error)))
    return parts


def place(name: str) -> tuple[int, str]:
    """Tables before figures, GSAM before Eigen-SAM, searches last."""
    kinds = ("table", "fig", "eigen", "study", "search")
    return next((i for i, kind in enumerate(kinds) if name.startswith(kind)), len(kinds)), name
