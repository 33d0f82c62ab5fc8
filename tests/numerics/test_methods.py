"""Every method against an independent formula, in a space where all parameters are one vector."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from problems import DETERMINISTIC, H, W, quadratic
from torch import Tensor
from torch.testing import assert_close

from sam_repro.optim import COMBINATIONS, EntropySGD, GradientStep
from sam_repro.optim.perturbations import build_perturbation


def slow_eps(name: str, w: Tensor, g: Tensor, rho: float, memory: Tensor) -> Tensor:
    """The formulae of the papers, one line each."""
    if name == "asam":
        return rho * w.abs() ** 2 * g / (w.abs() * g).norm()
    if name == "adaptive_official":
        return rho * w.abs() * g / g.norm()
    if name == "fisher":
        return rho * g / (1 + g**2) / (g**2 / (1 + g**2)).sum().sqrt()
    if name == "eigen":
        unit = g / g.norm()
        perp = memory - (memory @ unit) * unit
        return rho * (unit + 0.2 * math.copysign(1, g @ memory) * perp)
    d = {"sam": g, "friendly": g - memory, "vasso": 0.1 * memory + 0.9 * g}[name]
    return rho * d / d.norm()


def slow_direction(combine: str, g: Tensor, g_p: Tensor, g_m: Tensor, alpha: float, beta: float) -> Tensor:
    if combine == "ascent":
        return g_p - alpha * (g - (g @ g_p) / (g_p @ g_p) * g_p)
    if combine == "min_f_h":
        return g + alpha * (g_p - (g @ g_p) / (g @ g) * g)
    if combine == "weighted":
        return g_p + alpha * (g_p - g)
    if combine == "wsam":
        return g + alpha / (1 - alpha) * (g_p - g)
    if combine == "cr":
        return g_p + alpha * (g_p + g_m - 2 * g) + beta * (g_p - g_m)
    return g_p


def quartic(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """A loss that is not quadratic, in two parameters of different shapes."""
    w = torch.cat([tensors["a"].reshape(-1), tensors["b"]])
    return ((x @ w).tanh() + (x**2 @ w**2) + 0.1 * (x @ w) ** 4).mean()


def pieces(w: Tensor) -> dict[str, Tensor]:
    return {"a": w[:4].reshape(2, 2).clone().requires_grad_(), "b": w[4:].clone().requires_grad_()}


def slow_gradient(w: Tensor, x: Tensor) -> Tensor:
    w = w.clone().requires_grad_()
    (g,) = torch.autograd.grad(((x @ w).tanh() + (x**2 @ w**2) + 0.1 * (x @ w) ** 4).mean(), w)
    return g


@pytest.mark.parametrize("combine", [*COMBINATIONS, "cr"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_perturbation_with_every_combination(name, combine):
    w, x, memory = torch.randn(7).double(), torch.randn(6, 7).double(), torch.randn(7).double()
    memory = memory / memory.norm()
    alpha, beta, rho, perturb = 0.3, 0.2, 0.05, build_perturbation(name)
    pair = [memory[:4].reshape(2, 2), memory[4:]]
    if hasattr(perturb, "update_memory"):
        perturb.update_memory(pair)
    if name == "eigen":
        perturb.v = pair
    params = pieces(w)
    GradientStep(quartic, params, perturb=perturb, combine=combine, alpha=alpha, beta=beta, m=3)(x, rho=rho)
    expected = []
    for group in x.split(3):
        g = slow_gradient(w, group)
        eps = slow_eps(name, w, g, rho, memory)
        g_p, g_m = slow_gradient(w + eps, group), slow_gradient(w - eps, group)
        expected.append(slow_direction(combine, g, g_p, g_m, alpha, beta))
    found = torch.cat([p.grad.reshape(-1) for p in params.values()])
    assert_close(found, torch.stack(expected).mean(0), rtol=1e-9, atol=1e-11)
    if name in ("friendly", "vasso"):  # the memory takes the mean gradient, once a step
        weight, g = (0.1 if name == "friendly" else 0.9), slow_gradient(w, x)
        m = torch.cat([t.reshape(-1) for t in perturb.m])
        assert_close(m, (1 - weight) * memory + weight * g, rtol=1e-12, atol=1e-14)


def test_entropy_sgd_against_the_plain_walk():
    w, x = torch.randn(7).double(), torch.randn(6, 7).double()
    params = pieces(w)
    step = EntropySGD(quartic, params, m=1, steps=5, parts=3, lr=0.05, noise=0.01, gamma=0.5, scoping=0.1)
    for t in range(2):
        metrics = step(x, seed=9)
        generator = torch.Generator().manual_seed(9)
        y, mu, velocity = w.clone(), w.clone(), torch.zeros(7).double()
        for i in range(5):
            g = slow_gradient(y, x[i % 3 :: 3])
            velocity = 0.9 * velocity + g
            parts = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params.values()]
            noise = 0.01 / math.sqrt(0.5 * 0.05) * torch.cat([n.reshape(-1) for n in parts])
            y = y - 0.05 * (g + 0.9 * velocity + 0.5 * 1.1**t * (y - w) + noise)
            mu = 0.75 * mu + 0.25 * y
        found = torch.cat([p.grad.reshape(-1) for p in params.values()])
        assert_close(found, w - mu, rtol=1e-10, atol=1e-13)
        assert_close(metrics[3], F.cosine_similarity(slow_gradient(w, x[::3]), w - mu, dim=0))


def test_entropy_sgd_scoping_counts_and_stops_at_one_over_eta():
    step = EntropySGD(quadratic, {"w": W.clone().requires_grad_()}, steps=1, lr=0.1, gamma=0.03, scoping=0.9)
    seen = []
    for _ in range(12):
        seen.append(step.strength())
        step(H)
    assert seen[:3] == pytest.approx([0.03, 0.03 * 1.9, 0.03 * 1.9**2])
    assert seen[-1] == pytest.approx(10)
    step.calls = 100_000
    assert step.strength() == pytest.approx(10) and torch.isfinite(step(H)).all()
