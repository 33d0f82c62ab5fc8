"""The process group, from torchrun's or srun's environment; one process per GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from sam_repro.distributed.heartbeat import Heart, Waits, attempt, first_line, open_store
from sam_repro.errors import RankLost, UserError, out_of_memory, plural

# The heartbeat notices a lost rank first and says which; this is for where it cannot.
MARGIN = timedelta(minutes=2)


T = TypeVar("T")


@dataclass
class Ranks:
    """This process among its peers. All methods are no-ops or identities for one process.

    Collectives raise RankLost, in one sentence, when another rank died.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    heart: Heart | None = None

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())  # torch's memory calls want a number
        self.waits = Waits(self.device)

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def pulse(self, step: int | None = None) -> None:
        """This rank got on; `step` updates are made."""
        if self.heart is not None:
            self.heart.pulse(step)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks in place."""
        if self.world > 1:
            self._together(lambda: dist.all_reduce(tensor))
        return tensor

    def reduce_gradient_(self, tensor: torch.Tensor) -> None:
        """sum_, and remember how long this rank waited: `waits`."""
        self.waits.timed(self.sum_, tensor)

    def each(self, value: float) -> list[float]:
        """The values of all ranks, on all ranks."""
        if self.world == 1:
            return [value]
        values = torch.zeros(self.world, dtype=torch.float64, device=self.device)
        values[self.rank] = value

        def gather() -> list[float]:
            dist.all_reduce(values)
            return values.tolist()

        return self._together(gather)

    def max(self, value: float) -> float:
        """The largest value of all ranks, on all ranks."""
        return max(self.each(value))

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks get the same answer."""
        return self.max(float(flag)) > 0

    def first(self, value: float) -> float:
        """Rank 0's value, on all ranks."""
        return self.each(value)[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def _together(self, call: Callable[[], T]) -> T:
        """Run something that waits for the other ranks."""
        if self.heart is not None:
            self.heart.me["waits"] = True
        try:
            return call()
        except RuntimeError as error:  # gloo's and NCCL's word for a peer that is gone
            ours = out_of_memory(error) or "CUDA error" in str(error)
            if self.heart is None or ours:
                raise
            raise self.heart.why(error) from error
        finally:
            self.pulse()

    def finish(self) -> None:
        """All ranks did all they had to: stop watching, and leave together."""
        if self.heart is not None:
            self.barrier()  # hearts beat until the slowest is here: rank 0 may still be writing
            self.heart.stop()
            self.barrier()  # none takes the store away while another looks

    def farewell(self, sentence: str, code: int) -> None:
        """This rank ends before its time: tell the others why, so that they do not wait."""
        if self.heart is not None and not self.heart.stopped.is_set():
            self.heart.farewell(sentence, code)

    def on_loss(self, call: Callable[[str], None]) -> None:
        """What to do before this process ends because of another."""
        if self.heart is not None:
            self.heart.on_loss = call

    def close(self) -> None:
        """Leave the process group."""
        if self.heart is not None:
            self.heart.stop()
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device called `name`: "auto" takes this rank's GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if name == "cpu" and wanted and Path("/dev/nvidiactl").exists():
            raise UserError(
                f"torch sees no GPU, but CUDA_VISIBLE_DEVICES={wanted}; train.device=cpu trains without one"
            )
    require_device(name)
    if name == "cuda":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def require_device(name: str) -> None:
    """Raise UserError where the device called `name` is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"train.device={name} must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no GPU here")


def init_ranks(device: str, watch_minutes: float | None = None) -> Ranks:
    """Join the process group that torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_NTASKS) started.

    A single process that neither started is a group of one and needs no environment.

    Args:
        watch_minutes: the ranks watch each other, and one that gets nowhere for this long ends and says for whom it
            waited. For work that ends together, with finish(). None: only the process group's own time-out.

    Raises:
        UserError: if the device is not there, or the launcher's variables are set in part.
        RankLost: if the ranks did not meet.
    """
    env = os.environ
    rank, world, local_rank, local_world = launched()
    where = pick_device(device, local_rank)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if where.type == "cuda" else "gloo"
        limit = timedelta(minutes=watch_minutes or 10)
        try:
            store = next(iter(dist.rendezvous("env://", rank, world, timeout=limit)))[0]
            store = dist.PrefixStore(attempt(), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit + MARGIN)
            limits = {"rank": rank, "world": world, "limit": limit.total_seconds()}
            heart = Heart(open_store(), **limits) if watch_minutes else None
        except (RuntimeError, ValueError) as error:
            meeting = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
            raise RankLost(f"the {world} ranks did not meet at {meeting} ({first_line(error)})") from error
        return Ranks(rank, world, local_rank, local_world, where, heart)
    return Ranks(rank, world, local_rank, local_world, where)


def launched() -> tuple[int, int, int, int]:
    """(rank, world, rank on this node, ranks on this node), as the launcher's variables say; (0, 1, 0, 1) without one.

    SLURM's count in a step: in a shell of `salloc -n4`, SLURM_NTASKS is 4 and nothing else was started.
    """
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        rank, world = variable("RANK", 0 if env.get("WORLD_SIZE") == "1" else None), variable("WORLD_SIZE")
        if world > 1:
            variable("MASTER_PORT")
            if not env.get("MASTER_ADDR"):
                raise UserError(f"RANK is set, but MASTER_ADDR is not; {LAUNCH}")
        needed = world > 1 and torch.cuda.device_count() > 1  # else all ranks of a node would take its first GPU
        local_rank, local_world = variable("LOCAL_RANK", None if needed else 0), variable("LOCAL_WORLD_SIZE", 1)
    elif "SLURM_PROCID" in env and variable("SLURM_STEP_NUM_TASKS", 1) > 1:
        rank, world, local_rank = variable("SLURM_PROCID"), variable("SLURM_STEP_NUM_TASKS"), variable("SLURM_LOCALID")
        local_world = int(env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "localhost")))
        env.setdefault("MASTER_PORT", str(20000 + variable("SLURM_JOB_ID", 0) % 20000))
    else:
        return 0, 1, 0, 1
    if not rank < world:
        raise UserError(f"rank {rank} of {plural(world, 'process')} does not exist: they count from 0; {LAUNCH}")
    return rank, world, local_rank, local_world


LAUNCH = "torchrun and srun set all that ranks need; for one process, unset RANK and WORLD_SIZE"


def variable(name: str, default: int | None = None) -> int:
    """A whole number, 0 or greater, that a launcher left in the environment."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isascii() or not text.isdigit():
        other = "WORLD_SIZE" if name == "RANK" else "RANK"
        wrong = f"{name}={text} is not a whole number of 0 or more" if text else f"{other} is set, but {name} is not"
        raise UserError(f"{wrong}; {LAUNCH}")
    return int(text)


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: "gpu[003-010,12],cpu1" gives "gpu003"."""
    return re.sub(r"\[(\d+)[^\]]*\]?.*", r"\1", nodelist.split(",")[0])


RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # BatchNorm's statistics, by name


def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """BatchNorm's running statistics become their mean over the ranks, as the reference's at evaluation."""
    if ranks.world > 1:
        for name, buffer in model.named_buffers():
            if name.endswith(RUNNING[:2]):
                ranks.sum_(buffer).div_(ranks.world)
