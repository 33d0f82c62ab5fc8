"""Layers that are being tried equal those that they would replace: without a GPU, by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_candidates_by_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("candidates_interpreted.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["gelu", "sums", "tokens"]
