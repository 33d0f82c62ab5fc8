"""Which runs of some tables are finished, and which can never start."""

from __future__ import annotations

from pathlib import Path

from sam_repro.errors import UserError
from sam_repro.paper.runs import Run
from sam_repro.records.ledger import read_row, row_path


def tables_and_overrides(words: list[str], command: str) -> tuple[list[str], list[str]]:
    """(names, key=value words) of a command line. Raises UserError where no table is named."""
    names = [word for word in words if "=" not in word]
    if not names:
        raise UserError(f"no table is named; see sam-repro {command} --help")
    return names, [word for word in words if "=" in word]


def finished(r: Run, ledger_dir: Path | None = None) -> bool:
    """Whether the ledger has the row of a run; it lies where the run's configuration says, unless given."""
    return row_path(ledger_dir or r.config.log.ledger_dir, r.run_id).exists()


def lost_start(r: Run, ledger_dir: Path | None = None) -> str:
    """Why a run has no weights to start from: the run that was to make them is over, and diverged. Else ''."""
    if r.after is None or not finished(r.after, ledger_dir):
        return ""
    row = read_row(row_path(ledger_dir or r.after.config.log.ledger_dir, r.after.run_id))
    return "" if row["status"] == "done" else f"{r.after.run_id}, from which it starts, {row['status']}"
