"""Where to look: the perturbation eps that a sharpness-aware step adds to the weights.

A perturbation maps (params, grads, rho) to eps, one tensor a parameter, new memory each. `rho` is a float or a
0-d tensor; it may be negative only where a caller asked for the reference's warm-up (docs/DEVIATIONS.md, D-05).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = list[Tensor]
Perturbation = Callable[[Tensors, Tensors, float | Tensor], Tensors]

# GSAM paper, section 2.1: added to the norm, so that a zero gradient gives a zero perturbation.
STABILITY = 1e-12


def squared_norm(xs: Tensors) -> Tensor:
    """The sum of squares over all tensors, as a 0-d tensor."""
    return torch.stack(torch._foreach_norm(xs)).square().sum()


def inner(xs: Tensors, ys: Tensors) -> Tensor:
    """The Euclidean inner product over all tensors, as a 0-d tensor."""
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(xs, ys, strict=True)]).sum()


def sam(params: Tensors, grads: Tensors, rho: float | Tensor) -> Tensors:
    """SAM's first-order ascent direction: eps = rho g / (||g|| + 1e-12).

    One norm over all parameters. Foret et al. 2021, eq. 2; GSAM paper, Algorithm 1, step 1a.
    """
    scale = rho / (squared_norm(grads).sqrt() + STABILITY)
    return list(torch._foreach_mul(grads, scale))


PERTURBATIONS: dict[str, Perturbation] = {"sam": sam}
