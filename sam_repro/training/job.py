"""What is trained, and how: the model, the method's step, the base optimizer, and their learning rate and radius."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sam_repro.config.schema import Config
from sam_repro.curvature.monitor import Monitor
from sam_repro.errors import UserError
from sam_repro.models.build import build_model
from sam_repro.models.pretrained import start_from
from sam_repro.optim import GradientStep, PowerIteration, build_base, decay_groups, lr_at, rho_at
from sam_repro.training.data import Data
from sam_repro.training.method import gradient_step
from sam_repro.training.run import Run


@dataclass(frozen=True)
class Job:
    """A model and everything that changes it."""

    model: nn.Module
    step: GradientStep  # images in, the method's gradient in `.grad`
    base: torch.optim.Optimizer  # takes that gradient
    monitor: Monitor | None  # of the curvature, where it is wanted

    def state_dict(self) -> dict[str, Any]:
        """The job's part of a checkpoint. All ranks must call it."""
        return {"model": self.model.state_dict(), "base": self.base.state_dict(), "method": self.step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the part of a checkpoint that state_dict() made."""
        self.model.load_state_dict(state["model"])
        self.base.load_state_dict(state["base"])
        self.step.load_state_dict(state["method"])


def build_job(cfg: Config, run: Run, data: Data) -> Job:
    """Build the model on the device, from given weights if asked, and the optimizers of cfg.optim and cfg.recipe.

    Raises:
        UserError: for a model, a method or an optimizer that cannot be built as configured.
    """
    ranks = run.ranks
    model = build_model(
        cfg.model, num_classes=cfg.data.num_classes, image_size=cfg.data.image_size, loss=cfg.recipe.loss
    ).to(ranks.device)
    if cfg.model.family == "resnet" and ranks.device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # the layout that tensor cores convolve in
    if cfg.init:
        run.log.say(start_from(model, cfg.init))
    step = gradient_step(
        cfg, model, ranks, local_batch=data.local_batch, steps_per_epoch=data.steps_per_epoch, bf16=run.bf16
    )
    if isinstance(step.pre_step, PowerIteration) and cfg.optim.eigen_images == "fixed":
        step.pre_step.fix(*(t.clone() for t in next(iter(data.train.epoch(0, 0)))))
    monitor = Monitor(cfg, model, step, ranks) if cfg.sharpness.images else None
    return Job(model, step, base_optimizer(cfg, model), monitor)


def base_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of cfg.recipe over the model's parameters."""
    recipe = cfg.recipe
    try:
        return build_base(
            recipe.base,
            decay_groups(model.named_parameters(), recipe.weight_decay, decay=recipe.decay),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            betas=(recipe.betas[0], recipe.betas[1]),
            eps=recipe.eps,
        )
    except ValueError as error:
        raise UserError(f"recipe.base: {error}") from None


def lr_schedule_of(cfg: Config, total: int) -> Callable[[int], float]:
    """step -> learning rate, in a run of `total` steps."""
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
    """The seed of a step's dropout: a function of the run's seed and the step alone, so that resuming is exact."""
    return (seed * 10_000_019 + step) % 2**63  # of what torch's generators take
