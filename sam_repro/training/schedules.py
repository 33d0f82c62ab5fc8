"""What changes from step to step of a run: learning rate, radius, seed, batch. Closed forms, so nothing to resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from sam_repro.config.schema import Config
from sam_repro.data.loaders.build import Loader
from sam_repro.optim import lr_at, rho_at


def lr_schedule_of(cfg: Config, total: int) -> Callable[[int], float]:
    """step -> learning rate."""
    r = cfg.recipe
    return lambda step: lr_at(step, total, peak=r.lr, warmup=r.warmup_steps, kind=r.schedule, min_ratio=r.lr_min_ratio)


def rho_of(cfg: Config, lr: float) -> float:
    """The radius at learning rate `lr`."""
    o, r = cfg.optim, cfg.recipe
    if o.rho_schedule == "constant":
        return o.rho_max
    lr_min = 0.0 if r.schedule == "cosine" else r.lr * r.lr_min_ratio  # where lr_at ends
    return rho_at(lr, lr_max=r.lr, lr_min=lr_min, rho_max=o.rho_max, rho_min=o.rho_min, faithful=o.faithful_rho)


def step_seed(seed: int, step: int) -> int:
    """One seed a step, for dropout: a function of the run's seed and the step alone, so that resuming is exact."""
    return (seed * 10_000_019 + step) % 2**63  # of what torch's generators take


def batches(loader: Loader, done: int, total: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of updates `done` ... `total` - 1, starting in the middle of an epoch if need be."""
    while done < total:
        epoch, start = divmod(done, len(loader))
        for batch in loader.epoch(epoch, start):
            yield batch
            done += 1
            if done == total:
                return
