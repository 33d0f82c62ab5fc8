"""The engine of a run: from the configured method to the step that leaves its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from sam_repro.config.schema import Config, OptimConfig
from sam_repro.distributed.ranks import RUNNING, Ranks
from sam_repro.errors import UserError, plural
from sam_repro.models.layers.grouped import accept_groups
from sam_repro.models.layers.patch_linear import PatchLinear
from sam_repro.models.objective import in_mode, objective_of
from sam_repro.optim import (
    COMBINATIONS,
    Eigen,
    EntropySGD,
    GradientStep,
    LookSAMStep,
    PowerIteration,
    SyncedStep,
    build_perturbation,
)
from sam_repro.optim.perturbations import Perturbation
from sam_repro.training.memory import plan_passes

VANILLA_GROUP = 512  # images per group where groups do not matter: of the metrics' means, of nothing else


def gradient_step(
    cfg: Config, model: nn.Module, ranks: Ranks, *, local_batch: int, bf16: bool, steps_per_epoch: int = 0
) -> GradientStep:
    """The engine for this model and method, with passes of as many images as there is memory for. A collective.

    Args:
        local_batch: images per step of this rank.
        bf16: autocast the passes.
        steps_per_epoch: for Eigen-SAM's faithful release only.

    Raises:
        UserError: where m or the parts of a walk do not divide the batch, or a pass cannot be as configured.
    """
    o, stochastic = cfg.optim, draws_numbers(model)
    objective = objective_of(cfg, model, ranks.device, bf16=bf16)
    buffers = {n: b for n, b in model.named_buffers() if n.rsplit(".", 1)[-1] in RUNNING}
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    part = part_of(o, local_batch)
    m = group_of(o, part, alike=o.perturb == "none" and not buffers, stochastic=stochastic)
    fused = ranks.device.type == "cuda" and is_fused(o) and not stochastic
    products = torch.bfloat16 if bf16 and fused else torch.float32
    at_once = fused and o.perturb != "none" and not buffers and accept_groups(model, (PatchLinear,)) is not None
    if o.groups == "batched" and part > m and not at_once:
        raise UserError(f"optim.groups=batched: {cfg.model.name} with {o.name} cannot take several groups at once here")
    plan = plan_passes(
        cfg, objective, params, buffers, ranks, batch=part, m=m, at_once=at_once, itemsize=products.itemsize
    )
    compiled = ranks.device.type == "cuda" if cfg.train.compile is None else cfg.train.compile
    peers: dict[str, Any] = {"rank": ranks.rank, "world": ranks.world}
    peers["all_reduce"] = ranks.reduce_gradient_ if ranks.world > 1 else None
    options: dict[str, Any] = {"buffers": buffers, "m": m, "chunk": plan.images if at_once else min(plan.images, m)}
    options |= peers
    if o.perturb != "none":
        options["perturb"] = perturbation = perturbation_of(o, params)
        if isinstance(perturbation, Eigen):
            extra = {"compiled": compiled and o.eigen_mode == "eval", "m": m, "per_epoch": steps_per_epoch, **peers}
            options["pre_step"] = power_iteration(cfg, model, ranks, perturbation, params, buffers, extra)
    if fused:
        from sam_repro.optim.gpu.fused_step import FusedStep  # imports Triton, which only a GPU's torch has

        step = FusedStep(objective, params, products=products, compile=compiled, **method_of(cfg), **options)
    else:
        objective = torch.compile(objective, dynamic=False) if compiled else objective
        step = plain_step(cfg, objective, params, stochastic=stochastic, **options)
    step.plan = plan
    return step


def part_of(o: OptimConfig, local_batch: int) -> int:
    """Images of this rank in one gradient: the batch, or the part that an inner step of Entropy-SGD takes."""
    if o.kind != "entropy_sgd":
        return local_batch
    part, rest = divmod(local_batch, o.inner_parts)
    if rest:
        raise UserError(f"optim.inner_parts={o.inner_parts} does not divide the batch of {local_batch} per process")
    return part


def group_of(o: OptimConfig, part: int, *, alike: bool, stochastic: bool) -> int:
    """Images per group.

    Args:
        alike: whether the mean gradient is the same for all groups, so that only random numbers, which are drawn per
            group, ask for those of optim.m.
    """
    m = o.m or part
    if alike and (not stochastic or part % m):
        largest = max(d for d in range(1, min(part, VANILLA_GROUP) + 1) if part % d == 0)
        return largest if 8 * largest >= min(part, VANILLA_GROUP) else part
    if part % m:
        if o.kind == "entropy_sgd":
            raise UserError(f"optim.m={m} does not divide the {plural(part, 'image')} of an inner step")
        raise UserError(f"optim.m={m}, the group that BatchNorm sees, does not divide the batch of {part} per process")
    return m


def perturbation_of(o: OptimConfig, params: dict[str, nn.Parameter]) -> Perturbation:
    """The perturbation that the configuration describes."""
    return build_perturbation(
        o.perturb, eta=o.eta, scaled=["weight" in n for n in params] if o.weights_only else None,
        sigma=o.sigma, lam=o.lam, theta=o.theta, alpha=o.alpha if o.eigen_alpha is None else o.eigen_alpha,
        renormalise=o.renormalise, faithful=o.faithful_release,
    )  # fmt: skip


def power_iteration(
    cfg: Config,
    model: nn.Module,
    ranks: Ranks,
    perturbation: Eigen,
    params: dict[str, nn.Parameter],
    buffers: dict[str, torch.Tensor],
    extra: dict[str, Any],
) -> PowerIteration:
    """The power iteration that renews Eigen-SAM's eigenvector. `extra`: options that are not configured."""
    o = cfg.optim
    extra["per_epoch"] *= o.faithful_release
    return PowerIteration(
        perturbation, objective_of(cfg, model, ranks.device, bf16=False), params, buffers=buffers,
        around=partial(in_mode, model, training=o.eigen_mode == "train"), tf32=o.eigen_tf32,
        every=o.k, iterations=o.p, images=o.eigen_images, seed=cfg.seed, **extra,
    )  # fmt: skip


def method_of(cfg: Config) -> dict[str, Any]:
    """The combination, for any two-pass engine."""
    reduce_dtype = torch.bfloat16 if cfg.train.reduce == "bf16" else None
    return {"combine": cfg.optim.combine, "alpha": cfg.optim.alpha, "reduce_dtype": reduce_dtype}


def plain_step(cfg: Config, objective: Any, params: dict[str, nn.Parameter], **options: Any) -> GradientStep:
    """The engine of any method on any device."""
    o = cfg.optim
    if o.kind == "entropy_sgd":
        return EntropySGD(
            objective, params, steps=o.inner_steps, parts=o.inner_parts, lr=o.inner_lr, momentum=o.inner_momentum,
            noise=o.inner_noise, average=o.inner_average, gamma=o.gamma, scoping=o.scoping, **options,
        )  # fmt: skip
    options |= method_of(cfg) | {"beta": o.beta, "decoupled": o.decoupled}
    if o.scope == "global" and o.perturb != "none":
        return SyncedStep(objective, params, **options)
    if o.every > 1:
        return LookSAMStep(objective, params, every=o.every, reuse=o.reuse, **options)
    return GradientStep(objective, params, **options)


def draws_numbers(model: nn.Module) -> bool:
    """Whether a training pass is random: torch's dropout, timm's DropPath and PatchDropout, or F.dropout(drop_rate).

    By the names that their rates have; a module that merely has such a name costs speed, not correctness.
    """
    return any(getattr(mod, rate, None) for mod in model.modules() for rate in ("p", "drop_prob", "prob", "drop_rate"))


def is_fused(o: OptimConfig) -> bool:
    """Whether optim/gpu/fused_step.py knows the method: one pass or two, in every step, each group on its own."""
    two_passes = o.kind == "two_pass" and o.every == 1 and o.combine in COMBINATIONS
    return two_passes and not o.decoupled and o.scope == "group"
