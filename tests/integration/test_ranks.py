"""Several processes: what the others do when one dies, hangs, gives up or is slow; torchrun's restarts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ENV, ROOT, TINY, only, row_of, start, train
from safetensors.torch import load_file

from sam_repro import heartbeat
from sam_repro.distributed import init_ranks
from sam_repro.heartbeat import LOST
from sam_repro.log import read_log

LONG = [*TINY, "recipe.steps=4000", "train.deterministic=true"]


def free_port() -> str:
    return str(20_000 + time.time_ns() % 20_000)


def start_ranks(where: Path, *arguments: str, world: int = 2, **env: str) -> list[subprocess.Popen[str]]:
    meeting = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    meeting |= {"MASTER_PORT": free_port(), **env}
    return [start(where, *arguments, **meeting, RANK=str(r), LOCAL_RANK=str(r)) for r in range(world)]


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Until rank 0 says so."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen))


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    return [p.communicate(timeout=120)[0] for p in processes]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("victim", [pytest.param(0, marks=SLOW), 1])
def test_a_killed_rank_ends_the_others_with_one_sentence(tmp_path, victim):
    ranks = start_ranks(tmp_path, *LONG)
    wait_for(ranks[0], "[3/4000]")
    ranks[victim].kill()
    outputs = finish(ranks)
    rest = 1 - victim
    assert ranks[rest].returncode == LOST, outputs[rest]
    assert "error: " in outputs[rest] and "Traceback" not in outputs[rest]
    run_dir = only(tmp_path, "runs/tiny/vit*")
    if rest == 0:
        assert "another rank" in (run_dir / "error.txt").read_text() and not (run_dir / "lock").exists()


def test_a_hanging_rank_is_named(tmp_path):
    """Stopped, not dead: no connection breaks, and only the clock can tell."""
    ranks = start_ranks(tmp_path, *LONG, "train.timeout_minutes=0.2")
    wait_for(ranks[0], "[3/4000]")
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        output = ranks[0].communicate(timeout=120)[0]
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == LOST
    assert "no progress for 1" in output and "the others wait for rank 1 on " in output
    assert "wait for rank 1" in only(tmp_path, "runs/tiny/vit*/error.txt").read_text()


def test_an_error_of_one_rank_is_the_message_and_the_code_of_all(tmp_path):
    """Rank 0 is refused because the run is another's; rank 1 says why it ends too."""
    holder = start(tmp_path, *LONG)
    wait_for(holder, "[2/4000]")
    ranks = start_ranks(tmp_path, *LONG)
    try:
        outputs = finish(ranks)
    finally:
        holder.kill()
        holder.communicate()
    assert [p.returncode for p in ranks] == [2, 2], outputs
    assert "error: another process is at work" in outputs[0]
    assert "rank 0 on " in outputs[1] and "gave up: another process is at work" in outputs[1]


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_its_code(tmp_path):
    ranks = start_ranks(tmp_path, *LONG)
    wait_for(ranks[0], "[3/4000]")
    ranks[1].send_signal(signal.SIGUSR2)
    outputs = finish(ranks)
    assert [p.returncode for p in ranks] == [128 + signal.SIGUSR2] * 2, outputs
    assert "the same command goes on from there" in outputs[0]


def finishing(rank: int, port: str) -> None:
    """One of two ranks; rank 0 has more to do at the end than a rank may be silent for."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    heartbeat.BEAT, heartbeat.SILENT = 0.2, 1.0
    ranks = init_ranks("cpu")
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


def test_the_log_says_which_rank_is_slow(tmp_path):
    """Rank 1 sleeps before every step."""
    sleepy = tmp_path / "sitecustomize.py"
    sleepy.write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1' and 'train.py' in ' '.join(sys.orig_argv):\n"
        "    import time\n"
        "    from sam_repro.optim.step import GradientStep\n"
        "    call = GradientStep.__call__\n"
        "    GradientStep.__call__ = lambda *a, **k: (time.sleep(0.3), call(*a, **k))[1]\n"
    )
    ranks = start_ranks(tmp_path, *TINY, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    outputs = finish(ranks)
    assert [p.returncode for p in ranks] == [0, 0], outputs
    logged = [r for r in read_log(only(tmp_path, "runs/tiny/vit*/log.jsonl")) if "eval" not in r]
    assert all(r["slowest_rank"] == 1 and 0.2 < r["lag_seconds"] < 1 for r in logged[1:])
    assert "of a step is waiting for rank 1" in outputs[0]


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=SLOW)])
def test_torchrun_restarts_from_the_last_checkpoint(tmp_path, victim):
    """kill -9 of a worker; torchrun --max-restarts brings all back; the weights of a quiet run, bitwise."""
    steps = [*TINY, "recipe.steps=30", "train.save_every_steps=5", "train.deterministic=true", "train.log_every=5"]
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir(), killed.mkdir()
    undisturbed = start_ranks(quiet, *steps)
    outputs = finish(undisturbed)
    assert [p.returncode for p in undisturbed] == [0, 0], outputs
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    launch += ["--master-port", free_port(), "--monitor-interval=0.5", str(ROOT / "train.py"), *steps]
    process = subprocess.Popen(launch, cwd=killed, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(process, "[10/30]")
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


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1, 4)])
def test_another_number_of_processes_after_every_checkpoint(tmp_path, worlds):
    """2 ranks, then 1, then 4, each from the checkpoint of the one before: the weights of 1 rank throughout."""
    steps = [*TINY, "recipe.base=sgd", "recipe.lr=0.05", "recipe.steps=24", "train.save_every_steps=1"]
    alone, changing = tmp_path / "alone", tmp_path / "changing"
    alone.mkdir(), changing.mkdir()
    train(alone, *steps)
    for stage, world in enumerate(worlds):
        ranks = start_ranks(changing, *steps, world=world) if world > 1 else [start(changing, *steps)]
        if stage < len(worlds) - 1:
            wait_for(ranks[0], f"[{8 * stage + 7}/24]")
            ranks[-1].send_signal(signal.SIGTERM)
        outputs = finish(ranks)
        assert {p.returncode for p in ranks} == {0 if stage == len(worlds) - 1 else 128 + signal.SIGTERM}, outputs
    assert "resumed at step" in outputs[0] and row_of(changing)["world"] == worlds[-1]
    a, b = (load_file(only(w, "runs/tiny/vit*/model.safetensors")) for w in (alone, changing))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
