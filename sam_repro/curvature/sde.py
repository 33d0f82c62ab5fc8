"""SAM's iterates against the stochastic differential equations that stand for them, on a small problem.

What is simulated. SAM with one random sample i a step is

    w <- w - eta grad f_i(w + rho u_i),    u_i = grad f_i(w) / ||grad f_i(w)||.

Taylor's theorem in rho turns its gradient into G_i = G_i^(K) + O(rho^(K-1)), truncated after the K-th derivative:

    G_i^(1) = grad f_i
    G_i^(2) = G_i^(1) + rho H_i u_i                            (= grad of f_i + rho ||grad f_i||)
    G_i^(3) = G_i^(2) + rho^2/2 D^3 f_i[u_i, u_i]              (= rho^2/2 grad (u' H_i u) at fixed u = u_i)

and the SDE of order K has its mean as drift and its covariance over i as diffusion,

    dX = -E_i[G_i^(K)(X)] dt + sqrt(eta) Cov_i(G_i^(K)(X))^(1/2) dW,    t = eta * steps,

a weak approximation with error O(eta + rho^K): K = 2 is the SDE of Compagnoni et al. 2023, K = 3 adds the "gradient of
the Hessian along the direction of the gradient" by which the Eigen-SAM paper (section 4, its SDE 6) extends it. We have
that paper's reviews and not its equations at hand: the third-order term above is our derivation from Taylor's theorem,
and the diffusion is the exact covariance of the truncated gradient where the papers may truncate it further. Drift and
diffusion are exact sums over all samples, no eigenvector is estimated, and the SDE is integrated by Euler-Maruyama.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

STABILITY = 1e-12  # in the norm, as in SAM itself


def regression(n: int = 8, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and noisy labels (n,) of a one-dimensional regression, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-2, 2, n, dtype=torch.float64)
    return x, torch.sin(2 * x) + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)


def network_loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """f_i(w) = (a_1 tanh(b_1 x) + a_2 tanh(b_2 x) - y)^2 / 2 with w = (a_1, a_2, b_1, b_2): curved in all orders."""
    a, b = w[:2], w[2:]
    return 0.5 * ((a * torch.tanh(b * x)).sum() - y) ** 2


def taylor(f: Callable[[Tensor], Tensor], w: Tensor, rho: float, order: int) -> Tensor:
    """G^(order) of one loss at w; order 0 stands for SAM's gradient itself, not expanded."""
    g = grad(f)(w)
    u = g / (torch.linalg.vector_norm(g) + STABILITY)
    if order == 0:
        return grad(f)(w + rho * u)

    def curvature(point: Tensor) -> Tensor:
        return jvp(grad(f), (point,), (u,))[1]

    terms = [g]
    if order >= 2:
        terms.append(rho * curvature(w))
    if order >= 3:
        terms.append(rho**2 / 2 * jvp(curvature, (w,), (u,))[1])
    return torch.stack(terms).sum(0)


def all_gradients(loss: Loss, w: Tensor, x: Tensor, y: Tensor, rho: float, order: int) -> Tensor:
    """(replicas, n, d): G^(order) of every sample at every replica's weights w (replicas, d)."""

    def one(wi: Tensor, xi: Tensor, yi: Tensor) -> Tensor:
        return taylor(lambda v: loss(v, xi, yi), wi, rho, order)

    return vmap(vmap(one, (None, 0, 0)), (0, None, None))(w, x, y)


@dataclass
class Comparison:
    """Means over replicas at every recorded step, by process ("sam", "sde1", "sde2", "sde3")."""

    steps: list[int]
    loss: dict[str, list[float]]
    top: dict[str, list[float]]  # E of the largest Hessian eigenvalue of the mean loss
    weights: dict[str, Tensor]  # (recorded, d): E w

    def error(self, process: str) -> float:
        """max over recorded steps of ||E w_SAM - E X_process||: the weak error of the mean."""
        return float((self.weights["sam"] - self.weights[process]).norm(dim=1).max())


def simulate(
    loss: Loss = network_loss,
    *,
    data: tuple[Tensor, Tensor] | None = None,
    start: Tensor | None = None,
    rho: float = 0.3,
    eta: float = 0.01,
    steps: int = 200,
    substeps: int = 1,
    replicas: int = 1000,
    record: int = 20,
    seed: int = 0,
    orders: tuple[int, ...] = (1, 2, 3),
) -> Comparison:
    """Run SAM and the SDEs from the same weights.

    Args:
        eta, steps: SAM's learning rate and number of iterates; the SDEs run to t = eta * steps.
        substeps: Euler-Maruyama steps an iterate.
        replicas: independent copies, over which means are taken: their error falls with its square root.
        record: iterates between recordings.
    """
    if min(steps, substeps, replicas, record) < 1 or not eta > 0:
        raise ValueError("eta, steps, substeps, replicas and record must be greater than 0")
    x, y = regression() if data is None else data
    w0 = torch.tensor([1.0, -0.5, 0.8, 1.5], dtype=torch.float64) if start is None else start
    names = {"sam": 0} | {f"sde{k}": k for k in orders}
    result = Comparison([], {n: [] for n in names}, {n: [] for n in names}, {})

    def mean_loss(v: Tensor) -> Tensor:
        return vmap(loss, (None, 0, 0))(v, x, y).mean()

    for name, order in names.items():
        generator = torch.Generator().manual_seed(seed)
        w, means = w0.expand(replicas, -1).clone(), []
        for step in range(steps + 1):
            if step % record == 0:
                means.append(w.mean(0))
                result.loss[name].append(float(vmap(mean_loss)(w).mean()))
                result.top[name].append(float(torch.linalg.eigvalsh(vmap(hessian(mean_loss))(w))[:, -1].mean()))
            if order == 0:
                g = all_gradients(loss, w, x, y, rho, 0)
                chosen = torch.randint(len(x), (replicas,), generator=generator)
                w = w - eta * g[torch.arange(replicas), chosen]
                continue
            for _ in range(substeps):
                g = all_gradients(loss, w, x, y, rho, order)
                drift, dt = g.mean(1), eta / substeps
                # sum_i (G_i - mean) xi_i / sqrt(n) with standard normal xi has the covariance of the G_i.
                xi = torch.randn(replicas, len(x), generator=generator, dtype=w.dtype)
                noise = torch.einsum("rnd,rn->rd", g - drift[:, None], xi) / len(x) ** 0.5
                w = w - dt * drift + (eta * dt) ** 0.5 * noise
        result.weights[name] = torch.stack(means)
    result.steps = list(range(0, steps + 1, record))
    return result
