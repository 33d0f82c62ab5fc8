"""Base optimizers and which parameters they decay. Plain torch.optim objects own all the state."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_kernel(name: str, parameter: Tensor) -> bool:
    """Whether the reference decays this parameter: matrices and convolutions, not biases, norms or embeddings."""
    return parameter.ndim >= 2 and name.endswith("weight") and "embed." not in name.replace("patch_embed.", "")


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, *, decay: str = "kernels"
) -> list[dict]:
    """Two parameter groups, decayed and not. `decay` is "kernels" (the reference) or "all"."""
    decayed, plain = [], []
    for name, parameter in named_parameters:
        (decayed if decay == "all" or is_kernel(name, parameter) else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_base(
    name: str,
    groups: list[dict],
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """The base optimizer: "sgd" (coupled L2) or "adamw" (decoupled decay times lr), fused on a GPU."""
    fused = all(p.is_cuda for group in groups for p in group["params"]) or None
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
    raise ValueError(f"unknown base optimizer '{name}': adamw or sgd")
