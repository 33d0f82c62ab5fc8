"""`sam-repro status`: every state that a run can be in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paper_rows import fake_row

from sam_repro.cli.main import main
from sam_repro.paper.ledger_join import unique_runs
from sam_repro.paper.spec import load_table
from sam_repro.records import failure, ledger
from sam_repro.records.lock import RunLock

RECORD = {"step": 200, "loss": 1.25, "eta": 600.0}


def test_every_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runs = list(unique_runs([load_table("demo")]).values())
    rows, folders = tmp_path / "rows", [tmp_path / "runs" / "demo" / r.run_id for r in runs]
    ledger.write_row(rows, fake_row(runs[0], 180))
    ledger.write_row(rows, fake_row(runs[1], 0, status="diverged"))
    for folder in folders[2:5]:
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text(json.dumps(RECORD) + "\n")
    lock = RunLock(folders[2])
    failure.note(folders[3], "rank 3 on gpu07 gave up:\nout of memory")
    assert main(["status", "demo", "--ledger", str(rows)]) == 0
    lock.release()
    head, counts, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[1:] == ["done", "diverged", "failed", "running", "stopped", "waiting", "hours"]
    assert counts.split()[1:7] == ["1", "1", "1", "1", "1", "4"]
    said = dict(line.strip().split(": ", 1) for line in lines)
    assert said[runs[0].run_id] == "done val 50.00 %"
    assert said[runs[1].run_id] == "diverged at step 330"
    assert said[runs[2].run_id] == "running at step 200, loss 1.2500, 0:10:00 left"
    assert said[runs[3].run_id].startswith("failed 20")
    assert said[runs[3].run_id].endswith("rank 3 on gpu07 gave up: out of memory")
    assert said[runs[4].run_id] == "stopped at step 200, loss 1.2500, 0:10:00 left"
    assert said[runs[5].run_id] == "waiting"


def test_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    assert main(["status", "demo", "--ledger", "rows", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["demo"]["waiting"] == 9 and len(told["runs"]) == 9
