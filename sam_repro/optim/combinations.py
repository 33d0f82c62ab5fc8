"""What to descend: the direction made of the clean gradient g and the robust gradient g_p = grad f(w + eps).

Every combination here is linear, a g + b g_p, with coefficients that depend on three inner products only. So a
combination maps (<g,g>, <g,g_p>, <g_p,g_p>, alpha) to (a, b), and the step needs no further pass over the
parameters to know its direction. The inner products are 0-d tensors, or vectors with one number per group of images,
and so are a and b; a coefficient that is always the same is a plain float. CR-SAM needs a third gradient and stands
apart.
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


def min_f_h(gg: Tensor, ggp: Tensor, gpgp: Tensor, alpha: float) -> tuple[Coefficient, Coefficient]:
    """min(f, h): descend g and the part of g_p orthogonal to it, g + alpha (g_p - (<g,g_p> / ||g||^2) g).

    To first order the second part leaves f unchanged and lowers f_p, and so h. GSAM paper, section 6.4; the
    reference's `minimize_fp=False`.
    """
    return 1 - alpha * ratio(ggp, gg), alpha


def weighted(gg: Tensor, ggp: Tensor, gpgp: Tensor, alpha: float) -> tuple[Coefficient, Coefficient]:
    """min(f_p + lambda h): descend (1 + lambda) g_p - lambda g, lambda being `alpha`. GSAM paper, Table 2."""
    return -alpha, 1 + alpha


def wsam(gg: Tensor, ggp: Tensor, gpgp: Tensor, alpha: float) -> tuple[Coefficient, Coefficient]:
    """WSAM: descend f + k (f_p - f), k = gamma / (1 - gamma), gamma being `alpha` < 1: (1 - k) g + k g_p.

    Coupled: the whole direction goes through the base optimizer. With the step's `decoupled`, only g does.
    gamma = 1/2 is SAM. Yue et al. 2023, eq. 6 and Algorithms 1 and 2.
    """
    k = alpha / (1 - alpha)
    return 1 - k, k


def cr(alpha: float, beta: float) -> tuple[float, float, float]:
    """CR-SAM: coefficients of g, g_p and g_m = grad f(w - eps).

    g_p + gamma (g_p + g_m - 2 g) + beta (g_p - g_m), gamma being `alpha`: SAM, and the gradients of the second
    difference f_p + f_m - 2 f and of f_p - f_m. Wu et al. 2024, as released (TrustAIoT/CR-SAM).
    """
    return -2 * alpha, 1 + alpha + beta, alpha - beta


COMBINATIONS: dict[str, Combination] = {
    "robust": robust,
    "ascent": ascent,
    "min_f_h": min_f_h,
    "weighted": weighted,
    "wsam": wsam,
}
THREE_PASSES = {"cr": cr}
