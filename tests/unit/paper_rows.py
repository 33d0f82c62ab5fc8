"""Ledger rows of the documented form for the tests of the paper half; never written under results/."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sam_repro.config.compose import to_dict
from sam_repro.config.run_id import config_hash
from sam_repro.paper.runs import Run
from sam_repro.records import ledger


def fake_row(run: Run, correct: int, *, total: int = 360, status: str = "done", gap: float = 0.1) -> dict[str, Any]:
    """A row as sam_repro.training.main writes it, with curves that look like training."""
    steps = list(range(11, 331, 11))
    decay = [math.exp(-s / 80) for s in steps]
    curves: dict[str, Any] = {
        "step": steps,
        "loss": [0.05 + 2 * d for d in decay],
        "loss_robust": [0.05 + gap + 2.2 * d for d in decay],
        "surrogate_gap": [gap * (1 + 3 * d) for d in decay],
        "cosine": [0.9 + 0.08 * d - gap / 10 for d in decay],
        "grad_norm": [0.5 + d for d in decay],
        "grad_norm_robust": [0.6 + d for d in decay],
        "lr": [2e-3 * d for d in decay],
        "rho": [0.1 + 0.3 * d for d in decay],
        "step_seconds": [0.05] * len(steps),
    }
    share = [1 - 0.6 * math.exp(-s / 60) for s in steps[1::2]]
    share[-1] = 1.0
    evals = [
        {"step": s, "eval": "val", "correct": round(correct * c), "total": total}
        for s, c in zip(steps[1::2], share, strict=True)
    ]
    return {
        "run_id": run.run_id,
        "status": status,
        "seed": run.config.seed,
        "step": 330,
        "steps": 330,
        "steps_per_epoch": 11,
        "evals": {"val": {"correct": correct, "total": total}} if status == "done" else {},
        "config": to_dict(run.config),
        "config_hash": config_hash(run.config),
        "overrides": list(run.overrides),
        "manifest": "0" * 16,
        "backend": "torch",
        "m": 64,
        "world": 1,
        "hardware": "CPU test",
        "dtype": "fp32",
        "hours": 0.01,
        "finished": "2026-01-02T03:04:05Z",
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {"python": "3.11", "torch": "2.6.0"},
        "cpu": "test",
        "cores": 2,
        "curves": {"train": curves, "eval": evals},
    }


def write_rows(ledger_dir: Path, runs: list[Run], correct: list[int], **more: Any) -> None:
    """A row a run with these counts."""
    for run, count in zip(runs, correct, strict=True):
        ledger.write_row(ledger_dir, fake_row(run, count, **more))
