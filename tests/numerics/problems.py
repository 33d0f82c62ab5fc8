"""Small problems whose gradients can be written down, and the slow obvious formulae to compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sam_repro.optim import GradientStep


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quadratic(tensors: dict[str, Tensor], hessians: Tensor) -> Tensor:
    """f(w) = mean over a batch of diagonal Hessians of w'Hw / 2."""
    return 0.5 * (hessians * tensors["w"] ** 2).sum(1).mean()


def gradient_of(
    w: Tensor, *batch: Tensor, rho: float = 0.0, objective=quadratic, clip: float = 0.0, **method
) -> Tensor:
    """The engine's gradient of an objective in one parameter, w."""
    p = w.clone().requires_grad_()
    step = GradientStep(objective, {"w": p}, **method)
    step(*batch, rho=rho)
    if clip:
        step.clip_(clip)
    assert p.grad is not None
    return p.grad.clone()


def network(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def data(n: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))


DATA = data()
