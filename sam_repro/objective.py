"""From a configuration and a model to the function that the optimizer differentiates, and the engine around it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_repro.config import Config
from sam_repro.distributed import Ranks
from sam_repro.errors import UserError
from sam_repro.models import PatchLinear
from sam_repro.optim import GradientStep
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
    """(logits (B, classes), labels (B,)) -> mean loss. Sigmoid: sum over classes of binary cross-entropies."""
    if cfg.recipe.loss == "softmax":
        return lambda z, y: F.cross_entropy(z, y, label_smoothing=cfg.recipe.label_smoothing)
    return lambda z, y: (F.softplus(z).sum(1) - z.gather(1, y[:, None]).squeeze(1)).mean()


def gradient_step(cfg: Config, model: nn.Module, ranks: Ranks, *, local_batch: int, bf16: bool) -> GradientStep:
    """The engine for this model and method."""
    forward, loss = forward_of(cfg, model, ranks.device, bf16=bf16), loss_of(cfg)

    def objective(tensors: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return loss(forward(tensors, images), labels)

    buffers = {n: b for n, b in model.named_buffers() if n.rsplit(".", 1)[-1] in RUNNING}
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    m = cfg.optim.m
    if cfg.optim.perturb == "none" and not buffers:  # the mean gradient does not depend on the groups
        m = max(d for d in range(1, min(local_batch, VANILLA_GROUP) + 1) if local_batch % d == 0)
    stochastic = any(isinstance(mod, nn.Dropout) and mod.p > 0 for mod in model.modules())
    compiled = ranks.device.type == "cuda" if cfg.train.compile is None else cfg.train.compile
    method = {
        "buffers": buffers,
        "perturb": cfg.optim.perturb,
        "combine": cfg.optim.combine,
        "alpha": cfg.optim.alpha,
        "m": m,
        "all_reduce": ranks.sum_ if ranks.world > 1 else None,
        "rank": ranks.rank,
        "world": ranks.world,
    }
    if ranks.device.type == "cuda" and cfg.optim.perturb in FUSED and not stochastic:
        from sam_repro.optim.fused import FusedStep  # imports Triton, which only a GPU's torch has

        products = torch.bfloat16 if bf16 else torch.float32
        batchable = accept_groups(model, (PatchLinear,)) is not None
        groups = group_strategy(cfg, params, products, count=local_batch // m, batchable=batchable)
        return FusedStep(objective, params, groups=groups, products=products, compile=compiled, **method)
    if compiled:
        objective = torch.compile(objective, dynamic=False)
    return GradientStep(objective, params, stochastic=stochastic, **method)


FUSED = ("none", "sam")  # perturbations that optim/fused.py knows


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
