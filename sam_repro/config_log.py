"""The part of the schema that says what a run writes down and measures of itself. Nothing here changes a result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LogConfig:
    """Where a run leaves its files. Nothing here changes a result."""

    runs_dir: str = "runs"  # <runs_dir>/<run_id>: config, log.jsonl, checkpoints, final weights
    ledger_dir: str = "results/runs"  # one immutable JSON a finished run
    wandb: str = "auto"  # auto: online with a key, else offline | online | offline | disabled
    project: str = "sam-repro"  # of W&B
    group: str | None = None  # W&B group, such as table1/vit_b32
    progress: str = "auto"  # auto: a bar on a terminal, else lines | bar | lines


@dataclass
class SharpnessConfig:
    """Curvature of the training loss, measured at the end of a run and, if asked for, while it trains."""

    images: int = 512  # of the training split, the classes in turn, centre-cropped; 0: nothing is measured
    every: int = 0  # steps between measurements; 0: only at the end
    batch: int = 32  # images a pass of each rank: bounds memory, changes nothing
