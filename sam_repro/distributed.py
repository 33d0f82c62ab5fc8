"""The process group, from torchrun's or srun's environment; one process a GPU."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sam_repro.errors import UserError

# A rank that hangs or dies ends the others after this long; a compile on one rank must fit in it.
TIMEOUT = timedelta(minutes=10)


@dataclass
class Ranks:
    """This process among its peers. All methods are no-ops or identities for one process."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks get the same answer."""
        if self.world == 1:
            return flag
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)).item())

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def close(self) -> None:
        """Leave the process group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device called `name`: "auto" takes this rank's GPU, or the CPU where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("train.device=cuda, but torch sees no GPU here")
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    if name != "cpu":
        raise UserError(f"train.device={name}: auto, cpu or cuda")
    return torch.device("cpu")


def init_ranks(device: str) -> Ranks:
    """Join the process group that torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_NTASKS) started.

    A single process that neither started is a group of one and needs no environment.
    """
    env = os.environ
    if "RANK" in env:
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank, local_world = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    elif "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
        local_rank = int(env["SLURM_LOCALID"])
        local_world = int(env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "localhost")))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))
    else:
        rank, world, local_rank, local_world = 0, 1, 0, 1
    where = pick_device(device, local_rank)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=TIMEOUT)
    return Ranks(rank, world, local_rank, local_world, where)


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: "gpu[003-010,12],cpu1" gives "gpu003"."""
    return re.sub(r"\[(\d+)[^\]]*\]?.*", r"\1", nodelist.split(",")[0])
