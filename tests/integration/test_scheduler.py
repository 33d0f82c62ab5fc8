"""`sam-repro run --per-gpu`: real workers, real runs of a toy; a worker killed, a budget spent, a sweep."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sam_repro.cli.main import main
from sam_repro.errors import UserError
from sam_repro.paper.ledger_join import unique_runs
from sam_repro.paper.runs import Run
from sam_repro.paper.spec import load_table
from sam_repro.records.ledger import read_ledger
from sam_repro.runner import scheduler
from sam_repro.runner.scheduler import Scheduler, gpu_slots

TINY = ["debug=tiny", "model=vit_s32", "train.device=cpu", "train.threads=1", "recipe.batch_size=16"]


def table(tmp_path: Path, name: str, rows: list[dict], *base: str, **more) -> str:
    """A table whose runs and rows stay in tmp_path."""
    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    tree = {"title": "toy", "source": "not of a paper", "columns": {"val": {"title": "val"}}, "seeds": 1}
    tree |= {"base": [*TINY, *folders, *base], "rows": [{"model": "ViT", "method": r["id"]} | r for r in rows]} | more
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def methods(*names: str) -> list[dict]:
    return [{"id": f"vit/{name}", "overrides": [f"optim={name}"]} for name in names]


def rows(tmp_path: Path) -> dict[str, dict]:
    return {row["config"]["optim"]["name"]: row for row in read_ledger(tmp_path / "ledger")}


@pytest.mark.slow
def test_a_killed_worker_costs_one_run_and_the_next_call_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = table(tmp_path, "t", methods("vanilla", "sam", "gsam"), "recipe.steps=80")

    def kill() -> None:
        locks: list[Path] = []
        while not locks:
            time.sleep(0.05)
            locks = list((tmp_path / "runs").glob("vit_s32-vanilla-*/lock"))
        os.kill(yaml.safe_load(locks[0].read_text())["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert main(["run", name, "--gpus", "1", "--per-gpu", "2"]) == 1
    killer.join()
    assert set(rows(tmp_path)) == {"sam", "gsam"}
    assert rows(tmp_path)["sam"]["sharing"] == 2
    said = capsys.readouterr().err
    assert "vanilla-s0" in said and "died" in said and "code -9" in said
    assert main(["run", name, "--per-gpu", "1"]) == 0
    assert set(rows(tmp_path)) == {"vanilla", "sam", "gsam"} and rows(tmp_path)["vanilla"]["sharing"] == 1


@pytest.mark.slow
def test_a_spent_budget_saves_and_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = table(tmp_path, "t", methods("sam"), "recipe.steps=100000", "optim.m=4")  # never done in time
    assert main(["run", name, "--per-gpu", "1", "--budget", "15s"]) == 0
    assert "the budget is spent: 1 runs save" in capsys.readouterr().err
    assert not rows(tmp_path) and list((tmp_path / "runs").glob("*/step-*.pt"))
    assert main(["run", name, "--per-gpu", "1", "--budget", "15s"]) == 0
    assert "resumed at step" in (tmp_path / "runs" / "pool" / "worker-0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["0.001s", "1s"])  # before there is a worker, and while it imports
def test_a_budget_that_ends_before_a_run_has_begun(tmp_path: Path, capsys, budget: str) -> None:
    name = table(tmp_path, "t", methods("sam"), "recipe.steps=100000")
    assert main(["run", name, "--per-gpu", "1", "--budget", budget]) == 0
    assert "vit_s32-sam-s0" in (said := capsys.readouterr().err) and " stopped after " in said
    assert not list((tmp_path / "runs").glob("*/lock"))


@pytest.mark.slow
def test_a_run_that_does_not_save_in_time_is_ended(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "GRACE", 1.0)
    name = table(tmp_path, "t", methods("sam"), "recipe.steps=100000")

    def freeze() -> None:
        while not (locks := list((tmp_path / "runs").glob("*/lock"))):
            time.sleep(0.05)
        os.kill(yaml.safe_load(locks[0].read_text())["pid"], signal.SIGSTOP)

    threading.Thread(target=freeze, daemon=True).start()
    assert main(["run", name, "--per-gpu", "1", "--budget", "40s"]) == 0
    assert "it had not saved after 1 s" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failing_run_is_told_and_the_next_has_a_new_worker(tmp_path: Path) -> None:
    impossible = {"id": "vit/impossible", "overrides": ["optim=sam", "optim.m=7"]}
    path = table(tmp_path, "t", [impossible, *methods("vanilla", "sam")])
    runs, workers, said = list(unique_runs([load_table(path)]).values()), [], []

    def say(sentence: str) -> None:
        said.append(sentence)
        workers.append(queue.workers[0].process.pid)

    queue = Scheduler(lambda: runs, gpu_slots(1, 1), say=say)
    assert queue.work() == 1
    assert "failed" in said[0] and "optim.m=7 does not divide" in said[0]
    assert workers[0] != workers[1] == workers[2]
    assert set(rows(tmp_path)) == {"vanilla", "sam"}


def test_workers_that_cannot_start_fail_their_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    name = table(tmp_path, "t", methods("vanilla", "sam"))
    assert main(["run", name, "--per-gpu", "2"]) == 1
    assert capsys.readouterr().err.count("failed after 0 s: no worker could be started") == 2


class FakeWorker:
    """A GPU of which every run fails at once, and one whose runs take a moment."""

    process = SimpleNamespace(poll=lambda: 0)

    def __init__(self, gpu: str, *_):
        self.gpu = gpu

    def do(self, r: Run, ledger_dir: Path) -> dict[str, str]:
        if self.gpu == "1":
            return {"status": "failed", "why": "uncorrectable ECC error"}
        time.sleep(0.3)
        (ledger_dir / f"{r.run_id}.json").write_text("{}")
        return {"status": "done"}

    def stop(self, number: int) -> None: ...

    def close(self) -> None: ...


def fake_runs(tmp_path: Path, count: int) -> list[Run]:
    config: Any = SimpleNamespace(log=SimpleNamespace(runs_dir=str(tmp_path), ledger_dir=str(tmp_path)))
    return [Run(f"r{i}", (f"r{i}",), config) for i in range(count)]


def test_a_broken_gpu_does_not_eat_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "WorkerProcess", FakeWorker)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runs, said = fake_runs(tmp_path, 8), []
    queue = Scheduler(lambda: runs, gpu_slots(2, 1), ledger_dir=tmp_path, say=said.append)
    assert queue.work() == 1
    assert sorted(queue.outcomes.values()) == ["done"] * 5 + ["failed"] * 3
    assert "worker 1 on GPU 1 stops: 3 runs in a row failed there" in said


def test_a_plan_that_cannot_be_read_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "WorkerProcess", FakeWorker)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = fake_runs(tmp_path, 2)
    runs, said, asked = [first, replace(second, after=first)], [], []

    def plan() -> list[Run]:
        asked.append(1)
        if len(asked) in (4, 5, 6):  # while the first run ends and the second waits for it
            raise UserError("half a file")
        return runs

    queue = Scheduler(plan, gpu_slots(1, 2), ledger_dir=tmp_path, say=said.append)
    monkeypatch.setattr(scheduler, "lost_start", lambda *_: "")  # the fake rows have no status
    assert queue.work() == 0
    assert queue.outcomes == {"r0": "done", "r1": "done"} and any("half a file" in sentence for sentence in said)


@pytest.mark.parametrize("words", [[], ["--per-gpu", "1"]])
def test_a_row_takes_the_winner_of_a_sweep_in_one_call(tmp_path: Path, capsys, words: list[str]) -> None:
    grid = {"id": "vit/sam", "overrides": ["optim=sam", "data.train_fraction=0.8"], "grid": {"recipe.lr": [0.01, 1e-9]}}
    sweep = table(tmp_path, "sweep", [grid], "recipe.steps=30", select="minival")
    tuned = {"id": "vit/tuned", "overrides": ["optim=gsam"], "tuned": f"{sweep}:vit/sam"}
    name = table(tmp_path, "final", [tuned])
    assert main(["table", name]) == 0
    assert "pending" in capsys.readouterr().out
    assert main(["run", sweep, name, *words]) == 0
    row = rows(tmp_path)["gsam"]
    assert row["config"]["recipe"]["lr"] == 0.01 and "recipe.lr=0.01" in row["overrides"]
    assert main(["table", name]) == 0
    assert "pending" not in capsys.readouterr().out


def test_a_plan_runs_as_its_table_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = table(tmp_path, "t", methods("vanilla", "sam"))
    main(["plan", name])
    (tmp_path / "plan.tsv").write_text(capsys.readouterr().out)
    assert main(["run", str(tmp_path / "plan.tsv")]) == 0
    assert main(["run", name]) == 0
    assert "0 to go" in capsys.readouterr().err and len(rows(tmp_path)) == 2


@pytest.mark.slow
def test_compiled_code_of_a_worker_s_former_runs_changes_nothing(tmp_path: Path) -> None:
    compiled = [
        "train.compile=true",
        "recipe.steps=6",
        "train.log_every=1",
        "optim=gsam",
        "optim.m=4",
        "sharpness.images=0",
    ]
    kinds = {
        "a": [],
        "smooth": ["recipe.label_smoothing=0.2"],
        "other": ["model.alpha=0.9"],
        "mean": ["data.mean=[0.1,0.2,0.3]"],
    }
    rows = [{"id": f"vit/{name}", "overrides": [*more, "recipe.loss=softmax"]} for name, more in kinds.items()]

    def losses(name: str, rows: list[dict]) -> dict[str, list]:
        folder = tmp_path / name
        folder.mkdir()
        assert main(["run", table(folder, name, rows, *compiled), "--per-gpu", "1"]) == 0
        return {r["run_id"]: r["curves"]["train"]["loss"] for r in read_ledger(folder / "ledger")}

    together = losses("together", rows)
    alone = [losses(f"alone{i}", [row]) for i, row in enumerate(rows)]
    assert together == {k: v for one in alone for k, v in one.items()}
    assert len({tuple(v) for v in together.values()}) == len(kinds)
