"""Killed at any moment, on a full disk, without a network: the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import only, row_of
from faulty import attempt
from safetensors.torch import load_file

from sam_repro.records.log import read_log
from sam_repro.training import checkpoint

TIMING = ("images_per_second", "step_seconds", "eta", "hours")
# Moments, and the largest number of them to let pass before the last.
MOMENTS = {"gradient": 9, "descent": 9, "save": 2, "rename": 2, "digest": 2, "evaluation": 1, "log": 3, "prune": 2}
BY_THE_CLOCK = ""
AT_THE_END = ("export 1", "row 1", "link 1")
KILLED = -9


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    where = tmp_path_factory.mktemp("quiet")
    code, output = attempt(where)
    assert code == 0, output
    return where


def assert_same(quiet: Path, other: Path, folder: str = "runs/tiny") -> None:
    """Weights bitwise; the log, with each step once; the counts; which images each step saw."""
    one, two = only(quiet, "runs/tiny/vit*"), only(other, f"{folder}/vit*")
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)
    logs = [[{k: v for k, v in r.items() if k not in TIMING} for r in read_log(d / "log.jsonl")] for d in (one, two)]
    assert logs[0] == logs[1]
    counts = [json.loads(only(w, "**/ledger/*.json").read_text())["evals"] for w in (quiet, other)]
    assert counts[0] == counts[1]
    seen = [dict(line.split(" ", 1) for line in (w / "batches.txt").read_text().splitlines()) for w in (quiet, other)]
    again = {tuple(line.split(" ", 1)) for line in (other / "batches.txt").read_text().splitlines()}
    assert seen[0] == seen[1] and len(again) == len(seen[0])  # a step that was repeated saw the same images


def test_an_epoch_shows_every_image_once(quiet):
    per_epoch = row_of(quiet)["steps_per_epoch"]
    steps = [line.split()[1:] for line in (quiet / "batches.txt").read_text().splitlines()]
    assert len(steps) == 120 > 2 * per_epoch
    for start in (0, per_epoch):
        seen = [name for step in steps[start : start + per_epoch] for name in step]
        assert len(seen) == len(set(seen)) == 32 * per_epoch


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_moments(quiet, tmp_path, times):
    """In a step, a save, an evaluation, before a rename, before the ledger row, and by the clock."""
    draw = random.Random(6)
    faults = [f"{moment} {draw.randint(1, n)}" for moment, n in MOMENTS.items() for _ in range(times)] + [BY_THE_CLOCK]
    draw.shuffle(faults)
    for fault in [*faults, *AT_THE_END]:
        code, output = attempt(tmp_path, fault=fault, after=0 if fault else draw.uniform(0.5, 1.5))
        assert code == KILLED, f"{fault}: {output}"
    code, output = attempt(tmp_path)
    assert code == 0 and "resumed at step 120" in output, output
    assert_same(quiet, tmp_path)
    left = {p.name.split("-")[0].split(".")[0] for p in only(tmp_path, "runs/tiny/vit*").iterdir()}
    assert left == {"config", "log", "model", "model_card", "step"}


def test_killed_in_the_last_evaluation(quiet, tmp_path):
    code, output = attempt(tmp_path, fault="evaluation 15")
    assert code == KILLED, output
    code, output = attempt(tmp_path)
    assert code == 0, output
    assert_same(quiet, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_costs_nothing_but_the_time(quiet, small_disk, tmp_path):
    folders = [f"log.runs_dir={small_disk}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    ballast = small_disk / "ballast"
    code, output = attempt(tmp_path, *folders, fault="gradient 20")
    kept = only(small_disk, "runs/vit*")
    assert code == KILLED and checkpoint.records(kept), output
    free = os.statvfs(small_disk)
    ballast.write_bytes(b"x" * (free.f_bavail * free.f_bsize - 400_000))
    code, output = attempt(tmp_path, *folders)
    assert code == 2 and "No space left on device" in output and "Traceback" not in output, output
    assert checkpoint.records(kept)
    ballast.unlink()
    code, output = attempt(tmp_path, *folders)
    assert code == 0 and "resumed at step" in output, output
    assert_same(quiet, tmp_path, "disk/runs")


def test_a_read_only_folder_is_one_sentence(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, output = attempt(tmp_path, f"log.runs_dir={small_disk}/runs")
    assert code == 2 and "error: cannot write in" in output and "Traceback" not in output, output


@pytest.mark.parametrize("network", [pytest.param("refuses", marks=pytest.mark.slow), "swallows"])
def test_wandb_without_a_network_neither_stops_nor_slows(quiet, tmp_path, network):
    """A planted key, and a server that is not there or never answers. The key is found nowhere afterwards."""
    key = "0123456789abcdef" * 2 + "01234567"
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    accepted = []
    if network == "swallows":
        server.listen(50)
        threading.Thread(target=lambda: accepted.append(server.accept()), daemon=True).start()
    env = {"WANDB_API_KEY": key, "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
    code, output = attempt(tmp_path, "log.wandb=online", fault="patience 2", **env)
    server.close()
    assert code == 0 and "sam-repro sync" in output, output
    assert_same(quiet, tmp_path)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
