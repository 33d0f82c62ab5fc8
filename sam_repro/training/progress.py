"""How far a run is: what its checkpoints hold, and going on from them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from sam_repro.config.run_id import config_hash
from sam_repro.config.schema import Config
from sam_repro.distributed.ranks import average_buffers
from sam_repro.errors import UserError, plural
from sam_repro.optim import METRICS
from sam_repro.training import checkpoint
from sam_repro.training.data import Data
from sam_repro.training.job import Job
from sam_repro.training.run import Run, hardware


@dataclass
class Progress:
    """How far a run is. These fields and the job's states are its checkpoint. A new field needs a default."""

    totals: Tensor  # (len(METRICS),): sums over the steps since the last line of the log, on the device
    counted: int = 0  # those steps
    step: int = 0  # updates made
    seconds: float = 0.0  # of these steps; evaluation, measurements and saves are not counted
    interval: float = 0.0  # seconds of the steps since the last line of the log
    starts: int = 0  # those of these steps that were the first of a process, which compiles
    starting: float = 0.0  # their seconds
    hours: float = 0.0  # of processors; of a shared one, this run's share
    sharing: int = 1  # the most runs that ever shared this one's GPU
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the last evaluation, by split

    @classmethod
    def from_checkpoint(cls, state: dict[str, Any], *, world: int) -> Progress:
        """The fields in a checkpoint, which may be an older version's that lacked some of them."""
        state = {"hours": state["seconds"] * world / 3600} | state
        return cls(**{f.name: state[f.name] for f in fields(cls) if f.name in state})

    def state_dict(self) -> dict[str, Any]:
        """This part of a checkpoint."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def count(self, metrics: Tensor) -> None:
        """One more update, with its metrics (len(METRICS),)."""
        self.totals += metrics
        self.counted += 1
        self.step += 1

    def means(self) -> dict[str, float]:
        """The metrics' means since the last line of the log. Waits for the device."""
        return dict(zip(METRICS, (self.totals / self.counted).tolist(), strict=True))

    def spend(self, seconds: float, *, world: int, first: bool = False) -> None:
        """Count `seconds` of the last steps, on `world` processors. `first`: with this process's first step."""
        self.seconds += seconds
        self.interval += seconds
        if first:
            self.starts, self.starting = self.starts + 1, self.starting + seconds
        self.hours += seconds * world / 3600 / runs_per_gpu()

    def timed(self) -> tuple[float, int]:
        """Seconds and number of the interval's steps; the first step of a process is left out if there are others."""
        if self.counted > self.starts:
            return self.interval - self.starting, self.counted - self.starts
        return self.interval, self.counted

    def start_interval(self) -> None:
        """A line of the log was written."""
        self.totals, self.counted, self.interval = torch.zeros_like(self.totals), 0, 0.0
        self.starts, self.starting = 0, 0.0


def runs_per_gpu() -> int:
    """How many runs share this one's GPU now, as `sam-repro run --per-gpu` says."""
    return int(os.environ.get("SAM_REPRO_SHARING", "1"))


def resume(cfg: Config, run: Run, data: Data, job: Job) -> Progress:
    """Load the newest good checkpoint into `job`, begin the log, and say where the run stands.

    Raises:
        UserError: see find_checkpoint.
    """
    state, sentences = find_checkpoint(cfg, run, manifest=data.train.manifest)
    progress = Progress(torch.zeros(len(METRICS), device=run.ranks.device))
    if state is not None:
        job.load_state_dict(state)
        progress = Progress.from_checkpoint(state, world=run.ranks.world)
        if progress.step < data.total:  # only the last evaluation is not made again
            progress.counts = {}
    progress.sharing = max(progress.sharing, runs_per_gpu())
    run.log.start(progress.step, data.total)
    for sentence in sentences:
        run.log.say(sentence)
    run.log.say(
        f"{run.name}: {plural(data.total, 'step')} of {plural(cfg.recipe.batch_size, 'image')} "
        f"({data.total / data.steps_per_epoch:.1f} epochs) on {run.ranks.world} x {hardware(run.ranks)}, "
        f"{'bf16' if run.bf16 else 'fp32'}, {data.train.backend} loader"
        + (f", resumed at step {progress.step}" if progress.step else "")
    )
    run.log.say(f"{data.train.backend} loader: {data.train.reason}")
    return progress


def find_checkpoint(cfg: Config, run: Run, *, manifest: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest good checkpoint that rank 0 finds, on all ranks, and a sentence for each damaged one.

    Raises:
        UserError: if it is of another configuration, or of other training images than those called `manifest`.
    """
    state, sentences, ranks = None, [], run.ranks
    if ranks.main:
        state, sentences = checkpoint.load_newest(run.dir, config_hash=config_hash(cfg), device=ranks.device)
    step = int(ranks.first(state["step"] if state else -1))
    if step >= 0 and not ranks.main:
        state = checkpoint.load_step(run.dir, step, ranks.device)
    if state is not None and state.get("manifest", manifest) != manifest:
        raise UserError(
            f"{run.dir} was begun with other training images (manifest {state['manifest']}; {cfg.data.root} now: "
            f"{manifest}); give these another data.name, or remove that folder"
        )
    return state, sentences


def save(cfg: Config, run: Run, data: Data, job: Job, progress: Progress, *, score: float | None = None) -> None:
    """Save everything that the next step depends on; rank 0 writes, all ranks must call.

    Raises:
        UserError: if the checkpoint cannot be written, or another process has taken the run over.
    """
    average_buffers(job.model, run.ranks)
    state = job.state_dict() | progress.state_dict() | {"manifest": data.train.manifest}
    if run.lock is not None:
        run.lock.check()
        checkpoint.save(run.dir, state, step=progress.step, config_hash=config_hash(cfg), score=score)
