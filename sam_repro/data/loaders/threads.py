"""How many threads decode images."""

from __future__ import annotations

import os

MAX_WORKERS = 16


def usable_cores() -> int:
    """The cores that this process may use; all of them on macOS, which cannot keep a process from some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(configured: int, world: int) -> int:
    """Decoding threads of this rank: as configured, else this rank's share of the cores, 1 to 16.

    SLURM's cores are those of a task: of one rank, or of all ranks of a node where the task is torchrun.
    """
    if configured > 0:
        return configured
    of_task = int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1 if of_task else world))
    cores = (of_task or usable_cores()) // ranks
    return min(max(cores, 1), MAX_WORKERS)
