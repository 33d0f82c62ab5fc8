"""The queue of `sam-repro run`, with a stand-in for the training half."""

from __future__ import annotations

import os
import signal
import sys
import types
from pathlib import Path

import pytest
import yaml
from paper_rows import fake_row

from sam_repro.cli.arguments import duration
from sam_repro.cli.main import main
from sam_repro.config.run_id import run_id
from sam_repro.config.schema import Config
from sam_repro.paper import ledger_join
from sam_repro.paper.ledger_join import runs_of
from sam_repro.paper.runs import Run
from sam_repro.paper.spec import load_table
from sam_repro.records import ledger
from sam_repro.records.lock import Held
from sam_repro.training.signals import Interrupted, StopSignal

Trained = list[str]
SAM = {"id": "v/sam", "model": "V", "method": "SAM", "overrides": ["optim=sam"]}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Replaces sam_repro.training.main: writes a row at once; the run ids in `diverge` or `stop` end as named."""
    names: Trained = []

    def train(cfg: Config, overrides: list[str]) -> dict:
        name = run_id(cfg)
        names.append(name)
        if "-sam-s1" in name and os.environ.get("STOP"):
            raise Interrupted(128 + signal.SIGTERM)
        if "-sam-s1" in name and os.environ.get("EARLY"):
            os.kill(os.getpid(), signal.SIGTERM)
        stop = StopSignal()
        if "-sam-s1" in name and os.environ.get("LATE"):
            os.kill(os.getpid(), signal.SIGTERM)
        stop.restore()
        if "-sam-s1" in name and os.environ.get("HELD"):
            raise Held("another process is at work")
        status = "diverged" if "-sam-s0" in name and os.environ.get("DIVERGE") else "done"
        row = fake_row(Run(name, tuple(overrides), cfg), 300, status=status)
        ledger.write_row(cfg.log.ledger_dir, row)
        return row

    module = types.ModuleType("sam_repro.training.main")
    module.main = train
    monkeypatch.setitem(sys.modules, "sam_repro.training.main", module)
    return names


def test_runs_what_is_missing_once(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--ledger", str(tmp_path), "--limit", "4"]) == 0
    assert len(trained) == 4
    assert main(["run", "demo", "--ledger", str(tmp_path)]) == 0
    assert len(trained) == len(set(trained)) == 9
    said = capsys.readouterr().err
    assert "4 of 9 runs in the ledger, 5 to go" in said and "(5/5) " in said and "about 0:0" in said
    row = ledger.read_row(next(tmp_path.glob("*-gsam-s2-*")))
    assert row["overrides"] == ["experiment=demo", "optim=gsam", "seed=2"]


def test_another_ledger_does_not_change_the_plan(trained: Trained, tmp_path: Path) -> None:
    """The configurations of a plan are kept and shared: what a queue sets for itself must not show in them."""
    before = [r.config for r in runs_of(load_table("demo"), load_table("demo").rows[0])]
    folder = before[0].log.ledger_dir
    assert main(["run", "demo", "--ledger", str(tmp_path)]) == 0
    after = [r.config for r in runs_of(load_table("demo"), load_table("demo").rows[0])]
    assert {cfg.log.ledger_dir for cfg in (*before, *after)} == {folder}


def test_rows_that_wait_for_a_search_say_what_to_type(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An empty ledger: no search is over, so `fig5` lacks three of its rows, and `study_tiny` all."""
    typed = {"fig5": "sam-repro run search_methods", "study_tiny": "sam-repro run study_tiny_search2"}
    for table, command in typed.items():
        for words in (["plan", table], ["status", table]):
            assert main([*words, "--ledger", str(tmp_path)]) == 0
            said = "".join(capsys.readouterr())
            assert f"more after a search; first type `{command}`" in said
    assert main(["run", "study_tiny", "--ledger", str(tmp_path)]) == 0
    assert f"first type `{typed['study_tiny']}`" in capsys.readouterr().err
    assert main(["estimate", "study_tiny", "--ledger", str(tmp_path)]) == 0
    assert "after study_tiny_search2\n" in capsys.readouterr().out
    assert main(["plan", "table1", "--ledger", str(tmp_path)]) == 0
    assert "search" not in capsys.readouterr().err


def test_a_diverged_run_does_not_end_the_queue(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIVERGE", "1")
    assert main(["run", "demo", "--ledger", str(tmp_path)]) == 3
    assert len(trained) == 9


def test_an_interrupted_run_ends_the_queue_with_its_code(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP", "1")
    assert main(["run", "demo", "--ledger", str(tmp_path)]) == 128 + signal.SIGTERM
    assert len(trained) == 5


def test_only_and_overrides_on_either_side_of_the_options(trained: Trained, tmp_path: Path) -> None:
    words = ["run", "demo", "--only", "*/gsam", "recipe.epochs=5", "--ledger", str(tmp_path), "recipe.lr=0.1"]
    assert main(words) == 0
    assert len(trained) == 3 and all("-gsam-" in name for name in trained)
    assert ledger.read_row(next(tmp_path.glob("*")))["config"]["recipe"]["epochs"] == 5


def test_a_pattern_that_matches_nothing_is_an_error(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--only", "vit_b32/*"]) == 2
    assert "matches no row" in capsys.readouterr().err


def test_durations() -> None:
    assert [duration(t) for t in ("90s", "9m", "2h", "45", "1.5d")] == [90, 540, 7200, 45, 129600]
    with pytest.raises(Exception, match="not a duration"):
        duration("soon")


@pytest.mark.parametrize(("when", "rows"), [("EARLY", 4), ("LATE", 5)])
def test_a_signal_that_a_run_does_not_hear_ends_the_queue(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, rows: int
) -> None:
    """Before it has its own handler, as in CUDA's start; and after its last look, as in its export."""
    monkeypatch.setenv(when, "1")
    assert main(["run", "demo", "--ledger", str(tmp_path)]) == 128 + signal.SIGTERM
    assert len(trained) == 5 and len(list(tmp_path.glob("*.json"))) == rows
    monkeypatch.delenv(when)
    assert main(["run", "demo", "--ledger", str(tmp_path)]) == 0


def test_a_run_at_work_elsewhere_is_left_out(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("HELD", "1")
    assert main(["run", "demo", "--ledger", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.json"))) == 8 and "is left out: another process" in capsys.readouterr().err


def test_a_run_whose_start_diverged_is_left_out(trained: Trained, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DIVERGE", "1")
    tuned = {"id": "v/tuned", "model": "V", "method": "SAM", "overrides": ["optim=vanilla"], "after": "start:v/sam"}
    head = {"title": "t", "source": "ours", "base": ["experiment=demo"], "columns": {"val": {"title": "v"}}, "seeds": 1}
    for name, rows in (("start", [SAM]), ("t", [SAM, tuned])):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(head | {"rows": rows}))
    tables = {name: load_table(str(tmp_path / f"{name}.yaml")) for name in ("start", "t")}
    monkeypatch.setattr(ledger_join, "load_table", tables.get)
    assert main(["run", str(tmp_path / "t.yaml"), "--ledger", str(tmp_path)]) == 3
    assert len(trained) == 1 and "from which it starts, diverged" in capsys.readouterr().err


def test_a_spent_budget_ends_the_queue_after_the_run_it_met(trained: Trained, tmp_path: Path, capsys) -> None:
    """The stand-in ignores signals, as a run in its last evaluation does."""
    assert main(["run", "demo", "--ledger", str(tmp_path), "--budget", "0.01s"]) == 0
    assert len(trained) < 9
    assert "the budget is spent" in capsys.readouterr().err
