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


def test_a_slot_goes_on_where_the_last_one_ended(tmp_path):
    """benchmarks/all.sh at toy size: what a file has is kept, to the bit, and what is new comes beside it."""

    def slot(parties: str, budget: int) -> dict[str, dict]:
        environ = ENV | {"TOY": "1", "PYTHON": sys.executable, "PARTS": "step curvature", "SAM_REPRO_COMMIT": "a" * 40}
        environ |= {"PARTIES": parties, "BUDGET": str(budget)}
        command = ["bash", str(ROOT / "benchmarks/all.sh"), str(tmp_path)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0 and "exit code" not in done.stdout, done.stdout + done.stderr
        files = (tmp_path / f"cpu-{name}-vit_digits.json" for name in ("step", "curvature"))
        rows = [row for path in files if path.exists() for row in json.loads(path.read_text())["entries"]]
        return {row.get("method") or row["party"]: row for row in rows}

    first = slot("vanilla floor", 200)
    assert {"vanilla", "floor", "reverse"} <= set(first)
    assert slot("vanilla floor", 5) == first  # less than a part needs: nothing is begun, nothing is lost
    second = slot("vanilla floor gsam-m4", 200)
    assert {name: second[name] for name in first if name != "floor"} == {n: r for n, r in first.items() if n != "floor"}
    assert second["gsam"]["over_floor"] == second["gsam"]["seconds"] / second["floor"]["seconds"]
