"""The loop, and what it does at its intervals."""

from __future__ import annotations

import math
import time
from typing import Any

from sam_repro.config.schema import Config
from sam_repro.distributed.ranks import average_buffers
from sam_repro.errors import plural
from sam_repro.models.objective import forward_of
from sam_repro.training.data import Data, augment, batches
from sam_repro.training.evaluate import count_correct, evaluate_sets
from sam_repro.training.intervals import Intervals
from sam_repro.training.job import Job, lr_schedule_of, rho_of, step_seed
from sam_repro.training.memory import memory_sentence, whole_groups
from sam_repro.training.progress import Progress, save
from sam_repro.training.run import Run
from sam_repro.training.run_log import lag, rates


class Stopwatch:
    """Seconds spent in steps."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start counting again."""
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or restart."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds


def fit(cfg: Config, run: Run, data: Data, job: Job, progress: Progress) -> str:
    """Train from `progress` to the end: batch, gradient, update; then whatever is due.

    Returns:
        "done", or "diverged" where the loss or the gradient is not finite any more.

    Raises:
        Interrupted: after a signal, with everything saved.
    """
    lr_schedule, intervals, watch = lr_schedule_of(cfg, data.total), Intervals(cfg, run, data, job.monitor), Stopwatch()
    first_step = progress.step + 1
    job.model.train()
    for images, labels in batches(data.train, progress.step, data.total):
        lr = lr_schedule(progress.step)
        rho = rho_of(cfg, lr)
        for group in job.base.param_groups:
            group["lr"] = lr
        images, labels = augment(cfg, images, labels, step=progress.step, rank=run.ranks.rank)
        with whole_groups(job.step):
            metrics = job.step(images, labels, rho=rho, seed=step_seed(cfg.seed, progress.step))
        if cfg.recipe.clip:
            job.step.clip_(cfg.recipe.clip)
        job.base.step()
        job.step.apply_decoupled_(lr)
        progress.count(metrics)
        run.log.step()
        if progress.step == first_step:
            metrics.sum().item()  # wait for the device, this once
            progress.spend(watch.lap(), world=run.ranks.world, first=True)
            run.log.say(memory_sentence(job.step, run.ranks.device))
            run.log.say(f"the first step was done after {time.time() - run.process_start:.0f} s")
        run.ranks.pulse(progress.step)

        due = intervals.due(progress.step)
        if not due.anything:
            continue
        means = progress.means()
        progress.spend(watch.lap(), world=run.ranks.world)
        if due.log:
            run.log.record(log_line(cfg, run, data, job, progress, means, lr=lr, rho=rho))
            progress.start_interval()
        if not math.isfinite(means["loss"] + means["grad_norm"] + means["grad_norm_robust"]):
            older = f"older checkpoints, if any, are in {run.dir}"
            run.log.say(f"loss or gradient not finite at step {progress.step}: stopping; {older}")
            return "diverged"
        if due.evaluate:
            progress.counts = evaluate(cfg, run, data, job, progress.step)
        if due.measure:
            measure(cfg, run, data, job, progress)
        if due.save:
            save(cfg, run, data, job, progress, score=first_score(progress.counts) if due.evaluate else None)
            intervals.saved()
        if due.measure or due.save:
            watch.restart()
        if due.stop and progress.step < data.total:
            run.leave(due.stop, progress.step, data.total)
    return "done"


def log_line(
    cfg: Config, run: Run, data: Data, job: Job, progress: Progress, means: dict[str, float], *, lr: float, rho: float
) -> dict[str, Any]:
    """The record of the steps since the last one. Called on all ranks; each reports how long it waited."""
    left, batch = data.total - progress.step, cfg.recipe.batch_size
    return (
        {"step": progress.step, "epoch": progress.step / data.steps_per_epoch, **means, "lr": lr, "rho": rho}
        | rates(*progress.timed(), left, batch, progress.hours)
        | lag(run.ranks.each(run.ranks.waits.take()))
        | job.step.report(progress.seconds)
    )


def evaluate(cfg: Config, run: Run, data: Data, job: Job, step: int) -> dict[str, dict[str, Any]]:
    """Exact counts on every evaluation split, logged."""
    average_buffers(job.model, run.ranks)
    job.model.eval()
    forward = forward_of(cfg, job.model, run.ranks.device, bf16=run.bf16)
    counts: dict[str, dict[str, Any]] = {
        split: count_correct(lambda x: forward({}, x), loader, run.ranks) for split, loader in data.evaluation.items()
    }
    job.model.train()
    for split, count in counts.items():
        run.log.record({"step": step, "eval": split, **count})
    return counts


def first_score(counts: dict[str, dict[str, Any]]) -> float:
    """Accuracy on the first split, by which the best checkpoint is known."""
    first = next(iter(counts.values()))
    return first["correct"] / first["total"]


def measure(cfg: Config, run: Run, data: Data, job: Job, progress: Progress, *, final: bool = False) -> dict[str, Any]:
    """Measure and log the sharpness at these weights; empty if it is switched off."""
    if job.monitor is None:
        return {}
    if final:
        run.log.say(f"the weights are saved; measuring the sharpness on {plural(cfg.sharpness.images, 'image')}")
    rho = rho_of(cfg, lr_schedule_of(cfg, data.total)(max(progress.step - 1, 0)))

    def after(products: int) -> None:
        pause(run, data, progress, f"{plural(products, 'product')} with the Hessian")

    measured = job.monitor(progress.step, rho, final=final, after=after if final else None)
    if "problem" in measured:
        run.log.say(measured["problem"])
    else:
        run.log.record({"step": progress.step, "sharpness": measured})
    return measured


def evaluate_end(cfg: Config, run: Run, data: Data, job: Job, progress: Progress) -> dict[str, Any]:
    """After the last step: count on the test sets, into progress.counts, and return the final sharpness."""
    if data.test_sets:
        forward = forward_of(cfg, job.model.eval(), run.ranks.device, bf16=run.bf16)
        progress.counts |= evaluate_sets(
            lambda x: forward({}, x),
            cfg.data,
            data.test_sets,
            run.ranks,
            before=lambda part: pause(run, data, progress, part),
        )
    return measure(cfg, run, data, job, progress, final=True)


def pause(run: Run, data: Data, progress: Progress, doing: str) -> None:
    """After training, when everything is saved: leave if a signal came, else show progress. A collective."""
    if number := run.received():
        run.leave(number, progress.step, data.total)
    run.log.wait(doing)
