"""What the W&B client has stored of an offline run, read back with the client's own reader, `wandb leet inspect`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def stored(folder: Path) -> list[dict[str, Any]]:
    """Every record of every offline start in a run's folder, oldest start first: {"type": ..., <type>: ...}."""
    records = []
    for start in sorted(folder.glob("wandb/offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", str(start), "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if "No such command" in done.stderr:
            pytest.skip("this wandb cannot read its own files back")
        assert done.returncode == 0, done.stderr
        records += [json.loads(line) for line in done.stdout.splitlines()]
    return records


def only(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records of one type, without their wrapping."""
    return [r[kind] for r in records if r["type"] == kind]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged, step by step."""
    return [h["item"] for h in only(records, "history")]


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What W&B's table of runs will show."""
    return {k: v for update in only(records, "summary") for k, v in update["update"].items()}
