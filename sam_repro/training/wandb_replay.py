"""A run's log replayed to W&B after the fact: the same as `wandb_writer` sends while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sam_repro.errors import DIVERGED, UserError
from sam_repro.records.ledger import read_row, row_path
from sam_repro.records.log import metrics_of, read_log
from sam_repro.training.wandb_run import begin, end


def replay(folder: Path, *, project: str | None, entity: str | None, mode: str) -> str:
    """Log one run's records, pictures and ledger row; returns the run's address, or the folder of its offline files."""
    import wandb

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder} has no readable config.yaml: {error}") from None
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_log(folder / "log.jsonl"):
        by_step.setdefault(record["step"], {}).update(metrics_of(record))
    try:
        synced = begin(folder, config, mode=mode, project=project or "", entity=entity)
    except wandb.errors.Error as error:
        raise UserError(f"W&B did not start: {error}") from None
    for step, metrics in sorted(by_step.items()):
        synced.log(metrics, step=step)
    where = synced.url if mode == "online" else str(Path(synced.dir).parent)
    path = row_path(config["log"]["ledger_dir"], folder.name)
    row = read_row(path) if path.exists() else None
    end(synced, folder, row, code=DIVERGED if row and row["status"] == "diverged" else 0)
    return where or folder.name
