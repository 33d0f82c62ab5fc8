"""Show finished and interrupted runs in W&B from their log.jsonl, for clusters without network and runs without W&B.

  sam-repro sync runs                                  # every run folder in runs/, online with a key, else offline
  sam-repro sync runs/vit_b32-gsam-s0-1a2b3c4d --mode offline

A run keeps its id, so syncing again, or after the run went on, adds to the same W&B run.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import yaml

from sam_repro.errors import UserError
from sam_repro.records.log import metrics_of, read_log
from sam_repro.training.wandb_writer import has_key


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder", help="run folders, or folders of them")
    parser.add_argument("--project", help="W&B project, instead of the runs' own")
    parser.add_argument("--entity", help="W&B user or team")
    parser.add_argument("--mode", choices=("auto", "online", "offline"), default="auto")


def run(args: Namespace) -> None:
    """Replay every run; print where it went."""
    folders = [f for folder in args.folders for f in run_folders(folder)]
    mode = args.mode if args.mode != "auto" else "online" if has_key() else "offline"
    for i, folder in enumerate(folders, 1):
        print(f"({i}/{len(folders)}) {folder}: {replay(folder, project=args.project, entity=args.entity, mode=mode)}")
    if mode == "offline":
        print("offline: push with `wandb sync` once there is a key (WANDB_API_KEY, or `wandb login`)", file=sys.stderr)


def run_folders(folder: Path) -> list[Path]:
    """The folder itself where it is a run's, else the runs' folders in it."""
    inner = (*sorted(folder.glob("*")), *sorted(folder.glob("*/*")))  # runs/<run_id>, runs/demo/<run_id>
    found = [f for f in (folder, *inner) if (f / "log.jsonl").is_file()]
    if not found:
        raise UserError(f"{folder} is no run folder and has none: there is no log.jsonl")
    return found


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
            id=folder.name,
            name=folder.name,
            group=config["log"]["group"],
            dir=str(folder),
            mode=mode,  # pyright: ignore[reportArgumentType]: one of the choices
            resume="allow",
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as error:
        raise UserError(f"W&B did not start: {error}") from None
    for step, metrics in sorted(by_step.items()):
        synced.log(metrics, step=step)
    where = synced.url if mode == "online" else str(Path(synced.dir).parent)
    synced.finish()
    return where or folder.name
