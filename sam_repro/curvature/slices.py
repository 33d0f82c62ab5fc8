"""One- and two-dimensional slices of the loss around the weights, along filter-normalised or given directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sam_repro.optim.hessian import Hessian


def filter_normalised(params: Mapping[str, Tensor], *, seed: int = 0) -> list[Tensor]:
    """A random direction in which every filter is as long as the filter of the weights that it moves.

    d_ij <- d_ij / ||d_ij|| * ||w_ij|| for filter j of layer i (a row of a matrix, an output channel of a
    convolution); vectors (biases, norms) do not move. So a slice does not depend on how ReLU networks are scaled.
    Li et al. 2018, section 4.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for w in params.values():
        d = torch.randn(w.shape, generator=generator, dtype=w.dtype, device="cpu").to(w.device)
        if w.ndim < 2:
            direction.append(torch.zeros_like(w))
            continue
        within = tuple(range(1, w.ndim))
        scale = torch.linalg.vector_norm(w, dim=within, keepdim=True)
        scale = scale / torch.linalg.vector_norm(d, dim=within, keepdim=True)
        direction.append(d * scale)
    return direction


def moved(hessian: Hessian, directions: Sequence[Sequence[Tensor]], amounts: Sequence[float]) -> list[Tensor]:
    """w + sum_i amounts_i directions_i; the weights themselves are not written."""
    point = [p.clone() for p in hessian.params.values()]
    for direction, amount in zip(directions, amounts, strict=True):
        torch._foreach_add_(point, list(direction), alpha=amount)
    return point


def line(hessian: Hessian, direction: Sequence[Tensor], amounts: Sequence[float]) -> list[float]:
    """f(w + a d) for every a of `amounts`: the mean loss over the Hessian's images."""
    return [float(hessian.loss(moved(hessian, [direction], [a]))) for a in amounts]


def plane(
    hessian: Hessian, first: Sequence[Tensor], second: Sequence[Tensor], amounts: Sequence[float]
) -> list[list[float]]:
    """f(w + a d1 + b d2): one row for every b of `amounts`, one column for every a."""
    return [[float(hessian.loss(moved(hessian, [first, second], [a, b]))) for a in amounts] for b in amounts]
