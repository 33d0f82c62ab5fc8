"""SAM's iterates against the stochastic differential equations that stand for them, on a small problem.

What is simulated. SAM with one random sample i per step is

    w <- w - eta grad f_i(w + rho u_i),    u_i = grad f_i(w) / ||grad f_i(w)||.

Taylor's theorem in rho turns its gradient into G_i = G_i^(K) + O(rho^K), truncated after the K-th derivative:

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

The problem: f_i(w) = (a_1 tanh(b_1 x_i) + a_2 tanh(b_2 x_i) - y_i)^2 / 2 with w = (a_1, a_2, b_1, b_2), which is curved
in all orders. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STABILITY = 1e-12  # in the norm, as in SAM itself
START = (1.0, -0.5, 0.8, 1.5)

Series = list[np.ndarray]  # c_0, c_1, c_2 of c_0 + c_1 t + c_2 t^2


def regression(n: int = 8, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and noisy labels (n,) of a one-dimensional regression."""
    x = np.linspace(-2, 2, n)
    return x, np.sin(2 * x) + 0.5 * np.random.default_rng(seed).standard_normal(n)


def times(p: Series, q: Series) -> Series:
    """The product of two series, up to t^2."""
    return [p[0] * q[0], p[0] * q[1] + p[1] * q[0], p[0] * q[2] + p[1] * q[1] + p[2] * q[0]]


def gradient_series(w: np.ndarray, u: np.ndarray, x: np.ndarray, y: np.ndarray) -> Series:
    """grad f_i(w + t u) as a series in t: grad f_i, H_i u and D^3 f_i[u, u] / 2 at w.

    Args:
        w: (..., 4) weights.
        u: (..., n, 4) a direction for each sample.
        x, y: (n,) the samples.

    Returns:
        three arrays (..., n, 4).
    """
    w = np.broadcast_to(w[..., None, :], u.shape)
    zero = np.zeros(u.shape[:-1] + (2,))
    a, a_1, b, b_1 = w[..., :2], u[..., :2], w[..., 2:], u[..., 2:]
    x = x[:, None]
    tanh = np.tanh(b * x)
    slope = 1 - tanh**2
    s = [tanh, slope * b_1 * x, -tanh * slope * (b_1 * x) ** 2]
    s_squared = times(s, s)
    derivative = [1 - s_squared[0], -s_squared[1], -s_squared[2]]  # of tanh
    amplitude = [a, a_1, zero]
    outputs = [part.sum(-1, keepdims=True) for part in times(amplitude, s)]
    rest = [outputs[0] - y[:, None], *outputs[1:]]
    by_a, by_b = times(rest, s), times(rest, [part * x for part in times(amplitude, derivative)])
    return [np.concatenate(parts, -1) for parts in zip(by_a, by_b, strict=True)]


def all_gradients(w: np.ndarray, x: np.ndarray, y: np.ndarray, rho: float, order: int) -> np.ndarray:
    """(..., n, 4): G^(order) of every sample at weights w (..., 4); order 0 is SAM's gradient, not expanded."""
    still = np.zeros((*w.shape[:-1], len(x), 4))
    g = gradient_series(w, still, x, y)[0]
    u = g / (np.linalg.norm(g, axis=-1, keepdims=True) + STABILITY)
    if order == 0:
        moved = w[..., None, :] + rho * u
        return np.stack(
            [gradient_series(moved[..., i, :], still[..., i : i + 1, :], x[i : i + 1], y[i : i + 1])[0][..., 0, :]
             for i in range(len(x))], -2,
        )  # fmt: skip
    series = gradient_series(w, u, x, y)
    return sum((rho**k * series[k] for k in range(1, order)), start=g)


def loss_and_curvature(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean loss and the top eigenvalue of its Hessian at weights w (..., 4): two arrays (...)."""
    outputs = (w[..., None, :2] * np.tanh(w[..., None, 2:] * x[:, None])).sum(-1)
    columns = [gradient_series(w, np.broadcast_to(e, (*w.shape[:-1], len(x), 4)), x, y)[1].mean(-2) for e in np.eye(4)]
    return 0.5 * np.square(outputs - y).mean(-1), np.linalg.eigvalsh(np.stack(columns, -1))[..., -1]


@dataclass
class Comparison:
    """Means over replicas at every recorded step, by process ("sam", "sde1", "sde2", "sde3")."""

    steps: list[int]
    loss: dict[str, list[float]]
    top: dict[str, list[float]]  # E of the largest Hessian eigenvalue of the mean loss
    weights: dict[str, np.ndarray]  # (recorded, 4): E w

    def error(self, process: str) -> float:
        """max over recorded steps of ||E w_SAM - E X_process||: the weak error of the mean."""
        return float(np.linalg.norm(self.weights["sam"] - self.weights[process], axis=1).max())


def simulate(
    *,
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
        substeps: Euler-Maruyama steps per iterate.
        replicas: independent copies, over which means are taken: their error falls with its square root.
        record: iterates between recordings.

    Raises:
        ValueError: for a number that is not greater than 0.
    """
    if min(steps, substeps, replicas, record) < 1 or not eta > 0:
        raise ValueError("eta, steps, substeps, replicas and record must be greater than 0")
    x, y = regression()
    names = {"sam": 0} | {f"sde{k}": k for k in orders}
    result = Comparison(list(range(0, steps + 1, record)), {n: [] for n in names}, {n: [] for n in names}, {})
    for name, order in names.items():
        generator = np.random.default_rng(seed)
        w, means = np.tile(START, (replicas, 1)), []
        for step in range(steps + 1):
            if step % record == 0:
                means.append(w.mean(0))
                for record_of, values in zip((result.loss, result.top), loss_and_curvature(w, x, y), strict=True):
                    record_of[name].append(float(values.mean()))
            if order == 0:
                chosen = generator.integers(len(x), size=replicas)
                w = w - eta * all_gradients(w, x, y, rho, 0)[np.arange(replicas), chosen]
                continue
            for _ in range(substeps):
                g = all_gradients(w, x, y, rho, order)
                drift, dt = g.mean(1), eta / substeps
                # sum_i (G_i - mean) xi_i / sqrt(n) with standard normal xi has the covariance of the G_i.
                xi = generator.standard_normal((replicas, len(x)))
                noise = np.einsum("rnd,rn->rd", g - drift[:, None], xi) / len(x) ** 0.5
                w = w - dt * drift + (eta * dt) ** 0.5 * noise
        result.weights[name] = np.stack(means)
    return result
