"""The engine of a run: from the configured method to the step that leaves its gradient."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from sam_repro.config.schema import Config, OptimConfig
from sam_repro.distributed.ranks import RUNNING, Ranks
from sam_repro.errors import UserError
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

VANILLA_GROUP = 512  # images a pass where groups do not matter: bounds memory, changes nothing


def gradient_step(
    cfg: Config, model: nn.Module, ranks: Ranks, *, local_batch: int, bf16: bool, steps_per_epoch: int = 0
) -> GradientStep:
    """The engine for this model and method. `steps_per_epoch` is for Eigen-SAM's faithful release only."""
    objective = objective_of(cfg, model, ranks.device, bf16=bf16)
    buffers = {n: b for n, b in model.named_buffers() if n.rsplit(".", 1)[-1] in RUNNING}
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    o, m, part = cfg.optim, cfg.optim.m, local_batch
    if o.kind == "entropy_sgd":
        part, rest = divmod(local_batch, o.inner_parts)
        if rest:
            raise UserError(f"optim.inner_parts={o.inner_parts} does not divide the batch of {local_batch} a process")
    stochastic = draws_numbers(model)
    if o.perturb == "none" and not buffers and (not stochastic or part % (m or part)):
        # the mean gradient does not depend on the groups; random numbers do, which are drawn a group
        m = max(d for d in range(1, min(part, VANILLA_GROUP) + 1) if part % d == 0)
    if o.kind == "entropy_sgd" and part % (m or part):
        raise UserError(f"optim.m={m} does not divide the {part} images of an inner step")
    if part % (m or part):
        raise UserError(f"optim.m={m}, the group that BatchNorm sees, does not divide the batch of {part} a process")
    compiled = ranks.device.type == "cuda" if cfg.train.compile is None else cfg.train.compile
    peers = {
        "all_reduce": ranks.reduce_gradient_ if ranks.world > 1 else None,
        "rank": ranks.rank,
        "world": ranks.world,
    }
    if o.kind == "entropy_sgd":
        if compiled:
            objective = torch.compile(objective, dynamic=False)
        return EntropySGD(
            objective, params, buffers=buffers, m=m, stochastic=stochastic,
            steps=o.inner_steps, parts=o.inner_parts, lr=o.inner_lr, momentum=o.inner_momentum, noise=o.inner_noise,
            average=o.inner_average, gamma=o.gamma, scoping=o.scoping, **peers,
        )  # fmt: skip
    method: dict[str, Any] = {"buffers": buffers, "perturb": o.perturb, "combine": o.combine, "alpha": o.alpha, "m": m}
    method |= peers
    if o.perturb != "none":
        method["perturb"] = perturbation = build_perturbation(
            o.perturb, eta=o.eta, scaled=["weight" in n for n in params] if o.weights_only else None,
            sigma=o.sigma, lam=o.lam, theta=o.theta, alpha=o.alpha if o.eigen_alpha is None else o.eigen_alpha,
            renormalise=o.renormalise, faithful=o.faithful_release,
        )  # fmt: skip
        if isinstance(perturbation, Eigen):
            method["pre_step"] = PowerIteration(
                perturbation, objective_of(cfg, model, ranks.device, bf16=False), params, buffers=buffers,
                around=partial(in_mode, model, training=o.eigen_mode == "train"),
                compiled=compiled and o.eigen_mode == "eval", tf32=o.eigen_tf32,
                every=o.k, iterations=o.p, images=o.eigen_images, m=m, seed=cfg.seed,
                per_epoch=steps_per_epoch if o.faithful_release else 0, **peers,
            )  # fmt: skip
    method["reduce_dtype"] = torch.bfloat16 if cfg.train.reduce == "bf16" else None
    if ranks.device.type == "cuda" and is_fused(o) and not stochastic:
        from sam_repro.optim.gpu.fused_step import FusedStep  # imports Triton, which only a GPU's torch has

        products = torch.bfloat16 if bf16 else torch.float32
        batchable = accept_groups(model, (PatchLinear,)) is not None
        groups = group_strategy(cfg, params, products, count=local_batch // m, batchable=batchable)
        chunk = local_batch if groups == "batched" else m
        return FusedStep(objective, params, chunk=chunk, products=products, compile=compiled, **method)
    if compiled:
        objective = torch.compile(objective, dynamic=False)
    method |= {"beta": o.beta, "decoupled": o.decoupled, "stochastic": stochastic}
    if o.scope == "global" and o.perturb != "none":
        return SyncedStep(objective, params, **method)
    if o.every > 1:
        return LookSAMStep(objective, params, every=o.every, reuse=o.reuse, **method)
    return GradientStep(objective, params, **method)


def draws_numbers(model: nn.Module) -> bool:
    """Whether a training pass is random: torch's dropout, timm's DropPath and PatchDropout, or F.dropout(drop_rate).

    By the names that their rates have; a module that merely has such a name costs speed, not correctness.
    """
    return any(getattr(mod, rate, None) for mod in model.modules() for rate in ("p", "drop_prob", "prob", "drop_rate"))


def is_fused(o: OptimConfig) -> bool:
    """Whether optim/fused.py knows the method: one pass or two, in every step, each group on its own."""
    return o.every == 1 and not o.decoupled and o.combine in COMBINATIONS and o.scope == "group"


def group_strategy(
    cfg: Config, params: dict[str, nn.Parameter], products: torch.dtype, *, count: int, batchable: bool
) -> str:
    """How `count` groups of m images run on this GPU: all at once ("batched") where that is possible and fits."""
    if count == 1 or cfg.optim.perturb == "none" or not batchable:
        if cfg.optim.groups == "batched" and count > 1 and not batchable:
            raise UserError(f"optim.groups=batched: {cfg.model.name} has layers that cannot take a group's own weights")
        return "loop"
    if cfg.optim.groups != "auto":
        return cfg.optim.groups
    # A copy of the weights and two gradients a group; the rest of the free memory is for activations.
    needed = 3 * count * products.itemsize * sum(p.numel() for p in params.values())
    free, _ = torch.cuda.mem_get_info()
    if needed > free / 2:
        print(
            f"optim.groups=auto: {count} groups at once need {needed / 1e9:.1f} GB beside the activations, and "
            f"{free / 1e9:.1f} GB are free: one after the other",
            file=sys.stderr,
        )
        return "loop"
    return "batched"
