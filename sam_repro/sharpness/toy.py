"""The toy of GSAM's Fig. 3: a surface with sharp minima beside a ridge that leads to a flat one, and three ways down.

The paper prints no formula for its surface; this one is ours, made so that it shows what the figure's caption says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sam_repro.optim.step import GradientStep

FLAT = (3.2, 0.0)  # centre of the flat basin
SHARP = ((0.75, -0.45), (1.55, 0.45))  # centres of the sharp wells, on either side of the ridge y = 0
START = (-0.8, -0.05)


def surface(w: Tensor) -> Tensor:
    """f(w) for w (..., 2): a broad bowl minus two narrow Gaussian wells.

        f = 0.05 |w - flat|^2 - 0.5 sum_i exp(-|w - sharp_i|^2 / (2 0.2^2))

    The top eigenvalue at the bottom of a well is about 0.5 / 0.2^2 = 12.6, in the flat basin 0.1.
    """
    bowl = 0.05 * (w - w.new_tensor(FLAT)).square().sum(-1)
    wells = [torch.exp(-(w - w.new_tensor(c)).square().sum(-1) / (2 * 0.2**2)) for c in SHARP]
    return bowl - 0.5 * sum(wells)


@dataclass
class Path:
    """A trajectory: points (steps + 1, 2) and the top Hessian eigenvalue where it ends."""

    points: Tensor
    top: float = field(default=0.0)


def descend(perturb: str, combine: str, *, rho: float, alpha: float, lr: float, steps: int, start: tuple) -> Path:
    """Gradient descent on the surface with one method."""
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    method = {"perturb": perturb, "combine": combine, "alpha": alpha}
    step = GradientStep(lambda tensors, _: surface(tensors["w"]), {"w": w}, **method)
    nothing, points = torch.zeros(1), [w.detach().clone()]
    for _ in range(steps):
        step(nothing, rho=rho)
        with torch.no_grad():
            assert w.grad is not None
            w -= lr * w.grad
        points.append(w.detach().clone())
    curvature = torch.autograd.functional.hessian(surface, w.detach())
    assert isinstance(curvature, Tensor)
    return Path(torch.stack(points), float(torch.linalg.eigvalsh(curvature)[-1]))


def trajectories(
    *, rho: float = 0.2, alpha: float = 0.6, lr: float = 0.1, steps: int = 600, start: tuple = START
) -> dict[str, Path]:
    """SGD, SAM and GSAM from the same start. SGD ends at the bottom of a well, SAM up its slope, GSAM outside it.

    With fixed rho neither SAM nor GSAM stands still at a minimum of f. The paper's GSAM reaches the flat minimum of
    its surface; on this one it does not (its end is flat, top eigenvalue 0.8 against 12.5 for SGD).
    """
    methods = {"sgd": ("none", "robust"), "sam": ("sam", "robust"), "gsam": ("sam", "ascent")}
    settings = {"rho": rho, "alpha": alpha, "lr": lr, "steps": steps, "start": start}
    return {name: descend(*method, **settings) for name, method in methods.items()}
