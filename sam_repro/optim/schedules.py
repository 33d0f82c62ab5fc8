"""Closed-form schedules: lr(step) and rho(lr). Nothing to save, nothing to resume."""

from __future__ import annotations

import math


def lr_at(
    step: int, total: int, *, peak: float, warmup: int = 0, kind: str = "linear", min_ratio: float = 0.01
) -> float:
    """The learning rate of one update: a linear warm-up times a decay over the updates after it.

        p = (step - warmup) / (total - warmup), within [0, 1]
        linear: peak (1 - (1 - min_ratio) p)    cosine: peak (1 + cos(pi p)) / 2    constant: peak

    Args:
        step: number of the update; the first is 0.
        total: updates of the whole run.
        peak: the rate at the end of the warm-up.
        warmup: updates over which the rate grows from 0, in proportion to `step`.
        kind: "linear" | "cosine" | "constant".
        min_ratio: of "linear", the last rate as a share of `peak`.

    Returns:
        the rate, not negative.

    Raises:
        ValueError: for an unknown `kind`.

    Source: the official configuration (big_vision, trainers/proj/gsam), linear with end 0.01.
    """
    progress = min(max((step - warmup) / max(total - warmup, 1), 0.0), 1.0)
    if kind == "linear":
        lr = peak * (1 - (1 - min_ratio) * progress)
    elif kind == "cosine":
        lr = peak * 0.5 * (1 + math.cos(math.pi * progress))
    elif kind == "constant":
        lr = peak
    else:
        raise ValueError(f"unknown schedule '{kind}': linear, cosine or constant")
    return lr * min(1.0, step / warmup) if warmup else lr


def rho_at(lr: float, *, lr_max: float, lr_min: float, rho_max: float, rho_min: float, faithful: bool = False) -> float:
    """The radius tied to the learning rate.

        rho = rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min)

    Args:
        lr: of this step.
        lr_max, lr_min: between which it moves after the warm-up. Where they are equal, rho is rho_max.
        rho_max, rho_min: the radii there, as norms of the perturbation of all weights.
        faithful: let rho be negative. In the warm-up lr starts below lr_min, where the formula falls under rho_min and
            even under 0, as in the reference; else it is clamped at 0 (D-05).

    Returns:
        the radius.

    Source: GSAM paper, Algorithm 1, step 0.
    """
    if lr_max == lr_min:
        return rho_max
    rho = rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)
    return rho if faithful else max(rho, 0.0)
