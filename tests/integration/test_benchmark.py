"""benchmarks/step.py on a CPU, as anybody can run it: every party works, and the ratios are those of its figures."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest
from commands import ENV, ROOT

PARTIES = ["timm", "vanilla", "floor", "ours-vanilla", "ours-floor", "gsam-m16", "gsam-m4"]


def test_step(tmp_path):
    words = [
        "--device",
        "cpu",
        "--models",
        "vit_digits",
        "--size",
        "32",
        "--batch",
        "16",
        "--m",
        "16",
        "4",
        "--rounds",
        "3",
        "--steps",
        "1",
    ]
    output = tmp_path / "cpu.json"
    command = [sys.executable, str(ROOT / "benchmarks/step.py"), *words, "--output", str(output), "--parties", *PARTIES]
    done = subprocess.run(command, env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["hardware"].startswith("CPU") and len(result["commit"]) in (7, 40)
    rows = {e["method"] + (f"-m{e['m']}" if e["method"] == "gsam" else ""): e for e in result["entries"]}
    assert list(rows) == PARTIES
    for row in rows.values():
        assert row["seconds"] == statistics.median(row["rounds"]) > 0
        assert row["images_per_second"] == pytest.approx(16 / row["seconds"])
    for party in PARTIES[3:]:
        assert rows[party]["over_floor"] == pytest.approx(rows[party]["seconds"] / rows["floor"]["seconds"])
