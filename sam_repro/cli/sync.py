"""Send finished and interrupted runs to W&B from their log.jsonl, after training without a network or without W&B.

  sam-repro sync runs                                  # every run folder in runs/, online with a key, else offline
  sam-repro sync runs/vit_b32-gsam-s0-1a2b3c4d --mode offline

A run keeps its id. If you sync it again, or after it went on, the new lines go to the same W&B run.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from sam_repro.errors import UserError
from sam_repro.training.wandb_replay import replay
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
    """The folder itself if it is a run's, else the run folders in it."""
    inner = (*sorted(folder.glob("*")), *sorted(folder.glob("*/*")))  # runs/<run_id>, runs/demo/<run_id>
    run_folders = [f for f in (folder, *inner) if (f / "log.jsonl").is_file()]
    if not run_folders:
        raise UserError(f"{folder} is not a run folder and contains none: it has no log.jsonl")
    return run_folders
