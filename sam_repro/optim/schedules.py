"""Closed-form schedules: lr(step) and rho(lr). Nothing to save, nothing to resume."""

from __future__ import annotations

import math


def lr_at(
    step: int, total: int, *, peak: float, warmup: int = 0, kind: str = "linear", min_ratio: float = 0.01
) -> float:
    """The learning rate of update `step` (the first is 0) out of `total`.

    Linear warm-up from 0 over `warmup` updates, times a decay over the remaining ones: "linear" from `peak` to
    `min_ratio` peak, "cosine" to 0 by half a period, or "constant". The official configuration's schedule
    (big_vision, linear with end 0.01).
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
    """The radius tied to the learning rate: rho_min + (rho_max - rho_min)(lr - lr_min)/(lr_max - lr_min).

    GSAM paper, Algorithm 1, step 0. In the warm-up lr starts below lr_min, where the formula falls under rho_min
    and even under zero; it is clamped at 0 unless `faithful` asks for the reference's behaviour (D-05). A
    constant learning rate gives rho_max.
    """
    if lr_max == lr_min:
        return rho_max
    rho = rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)
    return rho if faithful else max(rho, 0.0)
