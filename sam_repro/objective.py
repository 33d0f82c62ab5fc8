"""From a configuration and a model to the function that the optimizer differentiates, and the engine around it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_repro.config import Config
from sam_repro.config_optim import OptimConfig
from sam_repro.distributed import Ranks
from sam_repro.errors import UserError
from sam_repro.models import PatchLinear
from sam_repro.optim import (
    COMBINATIONS,
    Eigen,
    EntropySGD,
    EveryK,
    GlobalStep,
    GradientStep,
    PowerIteration,
    build_perturbation,
)
from sam_repro.optim.grouped import accept_groups, spread_loose

RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # BatchNorm's statistics, by name
VANILLA_GROUP = 512  # images a pass where groups do not matter: bounds memory, changes nothing


def forward_of(
    cfg: Config, model: nn.Module, device: torch.device, *, bf16: bool
) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """(params | buffers, uint8 images (B, 3, H, W)) -> fp32 logits (B, classes); {} means the model's own.

    Parameters may have a leading dimension of groups (optim/grouped.py) where the model's layers accept them.
    """
    mean = 255 * torch.tensor(cfg.data.mean, device=device).view(1, 3, 1, 1)
    scale = 1 / (255 * torch.tensor(cfg.data.std, device=device).view(1, 3, 1, 1))
    layout = torch.channels_last if cfg.model.family == "resnet" else torch.contiguous_format
    own = dict(model.named_parameters())
    loose = {name: own[name].ndim for name in accept_groups(model, (PatchLinear,)) or ()}

    def forward(tensors: dict[str, Tensor], images: Tensor) -> Tensor:
        x = ((images.float() - mean) * scale).contiguous(memory_format=layout)
        tensors = spread_loose(tensors, loose, len(images))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return torch.func.functional_call(model, tensors, (x,)).float()

    return forward


def loss_of(cfg: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits (B, classes), labels (B,)) -> mean loss. Sigmoid: sum over classes of binary cross-entropies.

    With mixup the labels are targets (B, classes).
    """
    if cfg.recipe.loss == "softmax":
        return lambda z, y: F.cross_entropy(z, y, label_smoothing=cfg.recipe.label_smoothing)

    def sigmoid(z: Tensor, y: Tensor) -> Tensor:
        chosen = (z * y).sum(1) if y.ndim == 2 else z.gather(1, y[:, None]).squeeze(1)
        return (F.softplus(z).sum(1) - chosen).mean()

    return sigmoid


def objective_of(cfg: Config, model: nn.Module, device: torch.device, *, bf16: bool) -> Callable[..., Tensor]:
    """(params | buffers, images, labels) -> mean loss, not compiled. Products with its Hessian want bf16=False."""
    forward, loss = forward_of(cfg, model, device, bf16=bf16), loss_of(cfg)

    def objective(tensors: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return loss(forward(tensors, images), labels)

    return objective


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
            method["before"] = PowerIteration(
                perturbation, objective_of(cfg, model, ranks.device, bf16=False), params, buffers=buffers,
                around=partial(in_mode, model, training=o.eigen_mode == "train"),
                compiled=compiled and o.eigen_mode == "eval", tf32=o.eigen_tf32,
                every=o.k, iterations=o.p, images=o.eigen_images, m=m, seed=cfg.seed,
                per_epoch=steps_per_epoch if o.faithful_release else 0, **peers,
            )  # fmt: skip
    method["reduce_dtype"] = torch.bfloat16 if cfg.train.reduce == "bf16" else None
    if ranks.device.type == "cuda" and is_fused(o) and not stochastic:
        from sam_repro.optim.fused import FusedStep  # imports Triton, which only a GPU's torch has

        products = torch.bfloat16 if bf16 else torch.float32
        batchable = accept_groups(model, (PatchLinear,)) is not None
        groups = group_strategy(cfg, params, products, count=local_batch // m, batchable=batchable)
        return FusedStep(objective, params, groups=groups, products=products, compile=compiled, **method)
    if compiled:
        objective = torch.compile(objective, dynamic=False)
    method |= {"beta": o.beta, "decoupled": o.decoupled, "stochastic": stochastic}
    if o.scope == "global" and o.perturb != "none":
        return GlobalStep(objective, params, **method)
    if o.every > 1:
        return EveryK(objective, params, every=o.every, reuse=o.reuse, **method)
    return GradientStep(objective, params, **method)


def draws_numbers(model: nn.Module) -> bool:
    """Whether a training pass is random: torch's dropout, timm's DropPath and PatchDropout, or F.dropout(drop_rate).

    By the names that their rates have; a module that merely has such a name costs speed, not correctness.
    """
    return any(getattr(mod, rate, None) for mod in model.modules() for rate in ("p", "drop_prob", "prob", "drop_rate"))


def is_fused(o: OptimConfig) -> bool:
    """Whether optim/fused.py knows the method: one pass or two, in every step, each group on its own."""
    return o.every == 1 and not o.decoupled and o.combine in COMBINATIONS and o.scope == "group"


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode inside the block."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


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


def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """BatchNorm's running statistics become their mean over the ranks, as the reference's at evaluation."""
    if ranks.world > 1:
        for name, buffer in model.named_buffers():
            if name.endswith(RUNNING[:2]):
                ranks.sum_(buffer).div_(ranks.world)
