"""What the papers call sharpness: the surrogate gap, the eigenvalue it stands for, and the perturbation's alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sam_repro.optim.hessian import Hessian
from sam_repro.optim.perturbations import PERTURBATIONS, inner, squared_norm


def sharpness(hessian: Hessian, rho: float) -> dict[str, float]:
    """The surrogate gap h at radius rho, and what it says about the dominant eigenvalue.

        h = f_p - f,  f_p = f(w + rho g / ||g||)

    At a minimum sigma_max ~ 2h / rho^2. Elsewhere 2h / rho^2 = 2||g|| / rho + g'Hg / ||g||^2 + O(rho), so the first
    term is given on its own. It says nothing about curvature. The estimate is an eigenvalue only if ||g|| << rho
    sigma_max.

    Args:
        hessian: of the loss; its images and weights are those of f.
        rho: the radius, a norm over all weights.

    Returns:
        rho, loss, loss_robust, surrogate_gap, grad_norm; estimate = 2h/rho^2, first_order = 2||g||/rho, and their
        difference curvature, which is g'Hg/||g||^2 <= sigma_max up to O(rho).

    Raises:
        ValueError: for a radius that is not positive.

    Source: GSAM paper, Lemma 3.3.
    """
    if not rho > 0:
        raise ValueError(f"the surrogate gap needs a radius greater than 0, not {rho}")
    f, g = hessian.gradient()
    (eps,) = PERTURBATIONS["sam"]([g], [g], rho)
    moved = [p + e for p, e in zip(hessian.params.values(), hessian.unflatten(eps), strict=True)]
    f_p = float(hessian.loss(moved))
    h, norm = f_p - float(f), float(g.norm())
    estimate, first_order = 2 * h / rho**2, 2 * norm / rho
    return {
        "rho": rho,
        "loss": float(f),
        "loss_robust": f_p,
        "surrogate_gap": h,
        "grad_norm": norm,
        "estimate": estimate,
        "first_order": first_order,
        "curvature": estimate - first_order,
    }


def alignment(eps: Tensor | Sequence[Tensor] | Mapping[str, Tensor], v: Tensor) -> float:
    """How well a perturbation is aligned with an eigenvector: `|<eps, v>| / (||eps|| ||v||)`.

    Args:
        eps: a flat vector (n,), or tensors of n numbers in all.
        v: a flat vector (n,), in the same order.

    Returns:
        a number from 0 to 1; 0 for a zero eps.

    Source: Eigen-SAM paper, section 4: SAM lowers the top eigenvalue as far as its perturbation is aligned with v.
    """
    if not isinstance(eps, Tensor):
        tensors = eps.values() if isinstance(eps, Mapping) else eps
        eps = torch.cat([t.reshape(-1) for t in tensors])
    norms = float(eps.norm() * v.norm())
    return abs(float(torch.dot(eps, v))) / norms if norms else 0.0


def seen_in_bf16(weights: Sequence[Tensor], eps: Sequence[Tensor]) -> tuple[float, float]:
    """What a pass in bf16 sees of a perturbation: d = bf16(w + eps) - bf16(w), compared with eps.

    A step of eps that is small compared with the spacing of bf16 at w is either lost or made as large as that spacing.

    Args:
        weights, eps: tensors in fp32 or wider, of equal shapes.

    Returns:
        (||d|| / ||eps||, cos(d, eps)); zeros for a zero eps, and a cosine of 0 where nothing is left.
    """
    d = [(w + e).bfloat16().to(e.dtype) - w.bfloat16().to(e.dtype) for w, e in zip(weights, eps, strict=True)]
    length, seen = float(squared_norm(list(eps)).sqrt()), float(squared_norm(d).sqrt())
    product = float(inner(d, list(eps)))
    return seen / length if length else 0.0, product / (seen * length) if seen * length else 0.0
