"""What to descend: the direction made of the clean gradient g and the robust gradient g_p = grad f(w + eps).

Every combination here is linear, a g + b g_p, with coefficients that depend on three inner products only. So a
combination maps (<g,g>, <g,g_p>, <g_p,g_p>, alpha) to (a, b), and the step needs no further pass over the
parameters to know its direction. A coefficient that is always the same is a plain float.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Coefficient = float | Tensor
Combination = Callable[[Tensor, Tensor, Tensor, float], tuple[Coefficient, Coefficient]]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0: the projection on a zero vector."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))


def robust(gg: Tensor, ggp: Tensor, gpgp: Tensor, alpha: float) -> tuple[Coefficient, Coefficient]:
    """SAM: descend g_p. Foret et al. 2021, eq. 3."""
    return 0.0, 1.0


def ascent(gg: Tensor, ggp: Tensor, gpgp: Tensor, alpha: float) -> tuple[Coefficient, Coefficient]:
    """GSAM: descend g_p and ascend the part of g orthogonal to it.

    g_gsam = g_p - alpha g_perp, with g_perp = g - c g_p and c = <g,g_p> / ||g_p||^2, which is
    -alpha g + (1 + alpha c) g_p. To first order the ascent leaves f_p unchanged and lowers h = f_p - f.
    GSAM paper, Algorithm 1, steps 3 and 4; one projection over all parameters.
    """
    if alpha == 0:
        return 0.0, 1.0
    return -alpha, 1 + alpha * ratio(ggp, gpgp)


COMBINATIONS: dict[str, Combination] = {"robust": robust, "ascent": ascent}
