"""Several processes: what the others do when one dies, hangs, gives up or is slow; torchrun's restarts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ENV, ROOT, TINY, only, row_of
from faulty import Attempt, attempt
from safetensors.torch import load_file

from sam_repro.curvature import lanczos, power_iteration
from sam_repro.distributed import heartbeat
from sam_repro.distributed.ranks import Ranks, init_ranks
from sam_repro.errors import LOST, UserError
from sam_repro.records.log import read_log

LONG = ("recipe.steps=4000", "train.log_every=1", "train.save_every_steps=0", "train.eval_every_epochs=0")


def free_port() -> str:
    return str(20_000 + time.time_ns() % 20_000)


def start_ranks(where: Path, *arguments: str, world: int = 2, faults: tuple[str, ...] = ("",) * 4) -> list[Attempt]:
    meeting = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    meeting["MASTER_PORT"] = free_port()
    env = [meeting | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
    return [Attempt(where, *arguments, fault=faults[r], **env[r]) for r in range(world)]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Attempt]]:
    """Two ranks that have made three steps of many."""
    ranks = start_ranks(tmp_path, *LONG, "train.timeout_minutes=0.2")
    ranks[0].reach("[3/4000]")
    yield ranks
    for rank in ranks:
        rank.process.kill()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_with_one_sentence(two, tmp_path, victim):
    two[victim].send(signal.SIGKILL)
    rest = two[1 - victim]
    assert rest.end() == LOST, rest.output
    assert "error: " in rest.output and "Traceback" not in rest.output
    run_dir = only(tmp_path, "runs/tiny/vit*")
    if victim == 1:
        assert "another rank" in (run_dir / "error.txt").read_text() and not (run_dir / "lock").exists()


def test_a_hanging_rank_is_named(two, tmp_path):
    """Stopped, not dead: no connection breaks, and only the clock can tell."""
    two[1].send(signal.SIGSTOP)
    assert two[0].end(60) == LOST
    assert "no progress for 1" in two[0].output and "the others wait for rank 1 on " in two[0].output
    assert "wait for rank 1" in only(tmp_path, "runs/tiny/vit*/error.txt").read_text()


def test_an_error_of_one_rank_is_the_message_and_the_code_of_all(two, tmp_path):
    """Two more are started. Their rank 0 is refused, because the run is another's; rank 1 says why it ends too."""
    second = tmp_path / "second"
    second.mkdir()
    (second / "runs").symlink_to(tmp_path / "runs")
    ranks = start_ranks(second, *LONG)
    assert [r.end() for r in ranks] == [2, 2], ranks[1].output
    assert "error: another process is at work" in ranks[0].output
    assert "rank 0 on " in ranks[1].output and "gave up: another process is at work" in ranks[1].output


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_its_code(two):
    two[1].send(signal.SIGUSR2)
    assert [r.end() for r in two] == [128 + signal.SIGUSR2] * 2
    assert "the same command goes on from there" in two[0].output


def finishing(rank: int, port: str) -> None:
    """One of two ranks; rank 0 has more to do at the end than a rank may be silent for."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    heartbeat.BEAT, heartbeat.SILENT = 0.2, 1.0
    ranks = init_ranks("cpu", watch_minutes=1)
    if rank == 0:
        time.sleep(3)
    ranks.finish()
    ranks.close()


def test_ranks_that_are_done_wait_for_the_one_that_still_writes():
    port, spawn = free_port(), multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=finishing, args=(rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]


class Inexact:
    """diag(1 ... 300), summed over the ranks; the sums that rank 1 sees are rounded otherwise than those of rank 0."""

    size, dtype, device = 300, torch.float32, torch.device("cpu")

    def __init__(self, ranks: Ranks):
        self.ranks, self.all_reduce = ranks, ranks.sum_

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        product = self.ranks.sum_(torch.arange(1.0, 301) * v / self.ranks.world)
        return product + 1e-3 * self.ranks.rank * torch.randn(300)


def stopping(rank: int, port: str, results: multiprocessing.Queue) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = init_ranks("cpu", watch_minutes=0.2)
    made = [lanczos(Inexact(ranks), tol=tol).products for tol in (1e-1, 1e-2, 1e-3, 3e-4)]
    made += [power_iteration(Inexact(ranks), steps=50, tol=tol).products for tol in (0.1, 0.05, 0.03, 0.02)]
    results.put(made)
    ranks.finish()
    ranks.close()


def test_ranks_whose_arithmetic_differs_look_for_eigenvalues_together():
    port, spawn = free_port(), multiprocessing.get_context("spawn")
    results = spawn.Queue()
    ranks = [spawn.Process(target=stopping, args=(rank, port, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    made = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert made[0] == made[1]


def test_the_log_says_which_rank_is_slow(tmp_path):
    ranks = start_ranks(tmp_path, "recipe.steps=9", faults=("", "sleep 600"))
    assert [r.end() for r in ranks] == [0, 0], ranks[0].output
    logged = [r for r in read_log(only(tmp_path, "runs/tiny/vit*/log.jsonl")) if "eval" not in r]
    assert [r["slowest_rank"] for r in logged[1:]] == [1, 1] and logged[1]["lag_seconds"] > 0.2
    assert "of a step is waiting for rank 1" in ranks[0].output


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_restarts_from_the_last_checkpoint(tmp_path, victim):
    """kill -9 of a worker; torchrun --max-restarts brings all back; the weights of a quiet run, bitwise."""
    steps = [*TINY, "recipe.steps=30", "train.save_every_steps=5", "train.deterministic=true", "train.log_every=5"]
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    killed.mkdir()
    undisturbed = start_ranks(quiet, *steps, "train.eval_every_epochs=0")
    assert [r.end() for r in undisturbed] == [0, 0], undisturbed[0].output
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    launch += ["--master-port", free_port(), "--monitor-interval=0.5", str(ROOT / "train.py"), *steps]
    process = subprocess.Popen(launch, cwd=killed, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert any("[10/30]" in line for line in process.stdout)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {rank_of(pid): int(pid) for pid in workers}
    os.kill(ranks[victim], signal.SIGKILL)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert "resumed at step" in output
    a, b = (load_file(only(w, "runs/tiny/vit*/model.safetensors")) for w in (quiet, killed))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert row_of(killed)["world"] == 2
    logged = [r["step"] for r in read_log(only(killed, "runs/tiny/vit*/log.jsonl")) if "eval" not in r]
    assert logged == [5, 10, 15, 20, 25, 30]


def rank_of(pid: str) -> int:
    """The RANK in a process's environment."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(p[5:]) for p in pairs if p.startswith(b"RANK=")), -1)


def test_another_number_of_processes_after_every_checkpoint(tmp_path):
    """2 ranks, then 1, then 4, each from the checkpoint of the one before: the weights of 1 rank throughout.

    With SGD: AdamW turns the sign of a gradient that is zero but for rounding into a full step.
    """
    steps = ("recipe.base=sgd", "recipe.lr=0.05", "recipe.steps=24", "train.log_every=1", "train.eval_every_epochs=0")
    alone, changing = tmp_path / "alone", tmp_path / "changing"
    assert attempt(alone, *steps)[0] == 0
    for stop, world in ((5, 2), (12, 1), (0, 4)):
        ranks = start_ranks(changing, *steps, world=world) if world > 1 else [Attempt(changing, *steps)]
        if stop:
            ranks[0].reach(f"[{stop}/24]")
            ranks[-1].send(signal.SIGTERM)
        assert {r.end() for r in ranks} == {128 + signal.SIGTERM if stop else 0}, ranks[0].output
    one, other = row_of(alone), row_of(changing)
    assert "resumed at step" in ranks[0].output and other["world"] == 4
    assert one["evals"]["val"]["total"] == other["evals"]["val"]["total"] == 64
    a, b = (load_file(only(w, "runs/tiny/vit*/model.safetensors")) for w in (alone, changing))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


HALF = {
    "RANK is set, but WORLD_SIZE is not": {"RANK": "0"},
    "WORLD_SIZE is set, but RANK is not": {"WORLD_SIZE": "2"},
    "RANK is set, but MASTER_PORT is not": {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
    "RANK is set, but MASTER_ADDR is not": {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
    "RANK=zero is not a whole number": {"RANK": "zero", "WORLD_SIZE": "2"},
    "MASTER_PORT=any is not a whole number": {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_PORT": "any",
        "MASTER_ADDR": "::1",
    },
    "WORLD_SIZE=-1 is not a whole number": {"RANK": "0", "WORLD_SIZE": "-1"},
    "rank 2 of 2 processes does not exist": {"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "1", "MASTER_ADDR": "::1"},
    "RANK is set, but SLURM_LOCALID is not": {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
}


@pytest.mark.parametrize("sentence", HALF)
def test_launcher_variables_that_are_set_in_part_are_one_sentence(sentence, monkeypatch):
    for name, value in HALF[sentence].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        init_ranks("cpu")


ALONE = [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}]


@pytest.mark.parametrize("env", ALONE)
def test_one_process_needs_no_launcher(env, monkeypatch):
    """The last one is a shell in an allocation of four tasks, of which none was started."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    ranks = init_ranks("cpu")
    assert (ranks.rank, ranks.world) == (0, 1)


def test_one_rank_says_what_is_wrong_with_the_words_of_all(tmp_path):
    both = [Attempt(tmp_path, "recipe.momentum=7", RANK=str(rank)) for rank in range(2)]
    assert [a.end() for a in both] == [2, 2]
    assert "error: recipe.momentum=7" in both[0].output and not both[1].output
