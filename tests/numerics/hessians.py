"""Hessians small enough to be written down or made dense, to compare products and eigenvalues with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from problems import quadratic, vector
from torch import nn

from sam_repro.curvature import Hessian

MODES = ["reverse", "forward"]


def diagonal(*values: float, w: torch.Tensor | None = None) -> Hessian:
    """The Hessian of w'Hw/2 with this diagonal H, at w (default 1)."""
    h = vector(*values)
    return Hessian(quadratic, {"w": torch.ones_like(h) if w is None else w}, [(h[None],)])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3)).double()


def data(n: int = 23) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


def objective_of(model: nn.Module):
    return lambda tensors, x, y: F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y)


def batches_of(x, y, size: int):
    return list(zip(x.split(size), y.split(size), strict=True))


def dense_hessian(model: nn.Module, x, y) -> torch.Tensor:
    """torch.func.hessian of the loss as a function of one flat vector: the slow obvious way."""
    params = dict(model.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def f(flat):
        parts = flat.split(sizes)
        tensors = {n: t.view_as(p) for (n, p), t in zip(params.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y)

    return torch.func.hessian(f)(torch.cat([p.detach().reshape(-1) for p in params.values()]))
