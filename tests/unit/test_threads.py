"""How many threads decode images."""

from __future__ import annotations

import pytest

from sam_repro.data.loaders.threads import usable_cores, worker_count


@pytest.mark.parametrize(
    ("environment", "world", "threads"),
    [
        ({"SLURM_CPUS_PER_TASK": "12"}, 8, 12),  # srun: a task is a rank
        ({"SLURM_CPUS_PER_TASK": "64", "LOCAL_WORLD_SIZE": "8"}, 16, 8),  # torchrun within a task of 8 ranks
        ({"SLURM_CPUS_PER_TASK": "2", "LOCAL_WORLD_SIZE": "8"}, 8, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 8, 6),
        ({}, 2, 12),
        ({}, 1, 16),
    ],
)
def test_threads_are_this_ranks_share_of_the_cores(environment, world, threads, monkeypatch):
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(24)))
    assert worker_count(0, world) == threads and worker_count(3, world) == 3


def test_macos_which_has_no_affinity_counts_every_core(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 10)
    assert usable_cores() == 10
