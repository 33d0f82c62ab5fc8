"""Running the project's commands as a user would: in a process of its own, from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ["model=vit_s32", "optim=gsam", "debug=tiny", "train.device=cpu", "train.threads=1"]
ENV = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(where: Path, *arguments: str, program: str = "train.py", **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / program), *arguments]
    return subprocess.Popen(
        command, cwd=where, env=ENV | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def train(where: Path, *arguments: str, code: int = 0, **env: str) -> str:
    """The output of `python train.py`, whose exit code must be `code`."""
    process = start(where, *arguments, **env)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def row_of(where: Path) -> dict:
    return json.loads(only(where, "runs/tiny/ledger/*.json").read_text())
