"""A run's log replayed to W&B after the fact: the same metrics as `wandb_writer` sends while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sam_repro.errors import UserError
from sam_repro.records.log import metrics_of, read_log
from sam_repro.training.wandb_writer import identity


def replay(folder: Path, *, project: str | None, entity: str | None, mode: str) -> str:
    """Log one run's records; returns the run's address, or the folder of its offline files."""
    import wandb

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder} has no readable config.yaml: {error}") from None
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_log(folder / "log.jsonl"):
        by_step.setdefault(record["step"], {}).update(metrics_of(record))
    try:
        synced = wandb.init(
            project=project or config["log"]["project"],
            entity=entity,
            dir=str(folder),
            mode=mode,  # pyright: ignore[reportArgumentType]: one of the choices
            resume="allow",
            **identity(config, folder.name),
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as error:
        raise UserError(f"W&B did not start: {error}") from None
    for step, metrics in sorted(by_step.items()):
        synced.log(metrics, step=step)
    where = synced.url if mode == "online" else str(Path(synced.dir).parent)
    synced.finish()
    return where or folder.name
