"""Eigenvalues of an operator that is only known by its products: Lanczos, power iteration, spectral density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sam_repro.errors import plural
from sam_repro.optim.hessian import power_step

BLOCK = 8  # basis vectors that are allocated together
BREAKDOWN = 1e-2  # in units of the dtype's epsilon times ||T||: below it a residual is rounding


class Operator(Protocol):
    """A symmetric linear map of flat vectors, such as sharpness.Hessian."""

    size: int
    dtype: torch.dtype
    device: torch.device
    all_reduce: Callable[[Tensor], object] | None  # sums a tensor over the ranks in place; None for one rank

    def __call__(self, v: Tensor) -> Tensor:
        """The product with v."""
        ...


@dataclass
class Eigenpairs:
    """Approximate eigenpairs. Values and residuals are float64 on the host, vectors where the operator is.

    `residuals` are relative, ||Hv - lambda v|| / |lambda|; an eigenvalue of H lies within residual * |lambda| of
    each value. `products` counts what they cost. `history` has (value, residual) of the first pair after each product.
    """

    values: Tensor  # (n,)
    vectors: Tensor  # (n, size), unit rows
    residuals: Tensor  # (n,)
    products: int
    history: list[tuple[float, float]]

    @property
    def value(self) -> float:
        """The first eigenvalue."""
        return float(self.values[0])


def random_unit(operator: Operator, seed: int) -> Tensor:
    """A random unit vector, equal on all ranks: drawn on the host from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(operator.size, dtype=operator.dtype, generator=generator, device="cpu").to(operator.device)
    return v / v.norm()


def agreed(operator: Operator, *numbers: float) -> list[float]:
    """The mean of all ranks' numbers, the same bits on each: what decides whether there is another product.

    Ranks have equal vectors, but their inner products may differ in the last bits (other processors or libraries), and
    a rank that stopped alone would leave the others in a product.
    """
    if operator.all_reduce is None:
        return list(numbers)
    total = torch.tensor([*numbers, 1.0], dtype=torch.float64, device=operator.device)
    operator.all_reduce(total)
    return (total[:-1] / total[-1]).tolist()


# Which Ritz values (ascending) an answer consists of, best first.
SELECTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "magnitude": lambda theta, n: theta.abs().argsort(descending=True)[:n],
    "top": lambda theta, n: theta.argsort(descending=True)[:n],
    "bottom": lambda theta, n: theta.argsort()[:n],
}


class Krylov:
    """An orthonormal basis Q of span{q, Hq, H^2 q, ...} and T = Q H Q', grown by one product at a time.

    H q_j = beta_{j-1} q_{j-1} + alpha_j q_j + beta_j q_{j+1}. Every new vector is orthogonalised twice against all
    former ones (full reorthogonalisation), so no eigenvalue appears as a ghost, and the residual of a Ritz pair
    (theta, Q's) is beta_k |s_k| without another product. Where the space is exhausted (beta = 0) it goes on from a
    random vector orthogonal to it, which finds repeated eigenvalues. Memory: one vector a product.
    """

    def __init__(self, operator: Operator, start: Tensor, *, capacity: int, seed: int):
        self.operator, self.seed, self.capacity = operator, seed, min(capacity, operator.size)
        self.blocks: list[Tensor] = []  # of the basis, BLOCK rows each: memory grows with the products made
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.next: Tensor | None = start / start.norm()

    @property
    def steps(self) -> int:
        """Products made, the dimension of the space."""
        return len(self.alpha)

    def grow(self) -> None:
        """One product."""
        k = self.steps
        if self.next is None:
            self.next = self._orthogonal(random_unit(self.operator, self.seed + k))
        if k == BLOCK * len(self.blocks):
            rows = min(BLOCK, self.capacity - k)
            self.blocks.append(torch.empty(rows, len(self.next), dtype=self.next.dtype, device=self.next.device))
        q = self.blocks[-1][k % BLOCK].copy_(self.next)
        w = self.operator(q)
        alpha = float(torch.dot(q, w))
        w = self._against(self._against(w, k + 1), k + 1)
        alpha, beta = agreed(self.operator, alpha, float(w.norm()))
        if alpha != alpha or abs(alpha) == float("inf"):
            raise ValueError("the Hessian product is not finite: the loss diverges at these weights")
        self.alpha.append(alpha)
        scale = max(map(abs, self.alpha + self.beta), default=0.0)
        self.exhausted = beta <= BREAKDOWN * self.operator.size**0.5 * torch.finfo(w.dtype).eps * scale
        self.beta.append(0.0 if self.exhausted else beta)
        self.next = None if self.exhausted else w / beta

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """(theta (k,) ascending, s (k, k) columns, ||H y - theta y|| (k,)) in float64 on the host."""
        t = torch.diag(torch.tensor(self.alpha, dtype=torch.float64))
        off = torch.tensor(self.beta[:-1], dtype=torch.float64)
        theta, s = torch.linalg.eigh(t + torch.diag(off, 1) + torch.diag(off, -1))
        return theta, s, self.beta[-1] * s[-1].abs()

    def combine(self, coefficients: Tensor) -> Tensor:
        """Rows of coefficients (n, k) times the basis: (n, size)."""
        parts = coefficients.to(self.blocks[0]).split(BLOCK, dim=1)
        total = parts[0] @ self.blocks[0][: parts[0].shape[1]]
        for c, q in zip(parts[1:], self.blocks[1:], strict=True):
            total.addmm_(c, q[: c.shape[1]])
        return total

    def _against(self, w: Tensor, k: int) -> Tensor:
        """w without its components along the first k basis vectors."""
        for i, block in enumerate(self.blocks):
            q = block[: max(0, k - BLOCK * i)]
            w = torch.addmv(w, q.T, q @ w, alpha=-1)
        return w

    def _orthogonal(self, v: Tensor) -> Tensor:
        v = self._against(self._against(v, self.steps), self.steps)
        return v / v.norm()


def relative(residual: Tensor, value: Tensor) -> Tensor:
    """residual / |value|; 0 / 0 is 0."""
    return torch.where(residual == 0, residual, residual / value.abs())


def lanczos(
    operator: Operator,
    n: int = 1,
    *,
    which: str = "magnitude",
    tol: float = 1e-3,
    max_steps: int = 100,
    start: Tensor | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The n extreme eigenpairs by Lanczos with full reorthogonalisation, best first.

    Stops as soon as all n relative residuals are at most `tol`, or after `max_steps` products; `residuals` say which.
    An eigenvalue's error is at most its residual, and about its square over the gap: tol=1e-3 gives six digits.

    Args:
        operator: a symmetric map, such as a Hessian.
        n: how many eigenpairs.
        which: "magnitude" (largest |lambda|, sign kept) | "top" (largest) | "bottom" (smallest).
        tol: relative residual ||Hv - lambda v|| / |lambda| at which to stop.
        max_steps: products at most; each keeps one vector in memory.
        start: (size,) first vector, such as a former eigenvector; None draws one from `seed`.

    Returns:
        values (n,), vectors (n, size), residuals (n,) and what they cost.

    Raises:
        ValueError: more eigenvalues than the operator or `max_steps` has, or a product that is not finite.
    """
    if which not in SELECTIONS:
        raise ValueError(f"unknown end of the spectrum '{which}': {', '.join(SELECTIONS)}")
    if not 1 <= n <= min(operator.size, max_steps):
        raise ValueError(f"cannot find {plural(n, 'eigenvalue')} of {operator.size} in {plural(max_steps, 'step')}")
    start = random_unit(operator, seed) if start is None else start
    krylov, history = Krylov(operator, start, capacity=max_steps, seed=seed + 1), []
    while True:
        krylov.grow()
        theta, s, residuals = krylov.ritz()
        chosen = SELECTIONS[which](theta, n)
        errors = relative(residuals, theta)[chosen]
        history.append((float(theta[chosen[0]]), float(errors[0])))
        found = krylov.steps >= n and bool((errors <= tol).all())
        if agreed(operator, found)[0] > 0 or krylov.steps == krylov.capacity:
            break
    return Eigenpairs(theta[chosen], krylov.combine(s[:, chosen].T), errors, krylov.steps, history)


def dominant(operator: Operator, *, tol: float = 1e-3, max_steps: int = 100, start: Tensor | None = None) -> Eigenpairs:
    """The eigenpair of largest |lambda|, sign kept: sigma_max of the GSAM paper, section 3.3.

    Arguments, result and errors are those of `lanczos` with n = 1: `.value` and `.vectors[0]`.
    """
    return lanczos(operator, 1, tol=tol, max_steps=max_steps, start=start)


def power_iteration(
    operator: Operator,
    *,
    steps: int = 100,
    tol: float = 0.0,
    start: Tensor | None = None,
    seed: int = 0,
    visit: Callable[[Tensor], object] = lambda v: None,
) -> Eigenpairs:
    """The dominant eigenpair as the papers compute it: v <- Hv / ||Hv||, `steps` times, then its Rayleigh quotient.

    Args:
        operator: a symmetric map, such as a Hessian.
        steps: iterations at most; they cost one product each, and one more at the end.
        tol: relative residual at which to stop.
        start: (size,) first vector; None draws one from `seed`.
        visit: sees the vector before each iteration and after the last.

    Returns:
        one eigenpair; its `history` has the Rayleigh quotient and the relative residual of the vectors visited.

    Raises:
        ValueError: for steps < 1.

    Source: Eigen-SAM paper, Algorithm 1.
    """
    if steps < 1:
        raise ValueError(f"power iteration takes at least 1 step, not {steps}")
    v = random_unit(operator, seed) if start is None else start / start.norm()
    history: list[tuple[float, float]] = []
    while True:
        visit(v)
        following, w = power_step(operator, v)
        value = torch.dot(v, w)
        residual = relative((w - value * v).norm(), value)
        residual = agreed(operator, float(residual))[0]
        history.append((float(value), residual))
        if len(history) > steps or residual <= tol or not w.any():
            break
        v = following
    values, residuals = (torch.tensor([x], dtype=torch.float64) for x in history[-1])
    return Eigenpairs(values, v[None], residuals, len(history), history)


@dataclass
class SpectralDensity:
    """A probability measure on the eigenvalues: weights (n,) at nodes (n,), float64 on the host, and its cost."""

    nodes: Tensor
    weights: Tensor
    products: int

    def smoothed(self, grid: Tensor, width: float) -> Tensor:
        """The density on `grid`, every node a Gaussian of standard deviation `width`."""
        z = (grid[:, None] - self.nodes) / width
        return (torch.exp(-0.5 * z**2) * self.weights).sum(1) / (width * (2 * torch.pi) ** 0.5)


def spectral_density(operator: Operator, *, probes: int = 1, steps: int = 50, seed: int = 0) -> SpectralDensity:
    """Stochastic Lanczos quadrature: the distribution of all eigenvalues, from probes * steps products.

    For a random unit q, Lanczos turns q' g(H) q into sum_i s_{1i}^2 g(theta_i), exactly for polynomials up to degree
    2 steps - 1; its mean over q is tr g(H) / size.

    Args:
        operator: a symmetric map, such as a Hessian.
        probes: random vectors q, drawn from `seed`.
        steps: products per probe; as many vectors are kept meanwhile.

    Returns:
        weights that sum to 1 at (at most) probes * steps nodes.

    Raises:
        ValueError: for less than one probe or step.

    Source: Ubaru, Chen and Saad 2017.
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"a spectral density takes at least 1 probe of 1 step, not {probes} of {steps}")
    nodes, weights, products = [], [], 0
    for probe in range(probes):
        start = random_unit(operator, seed + probe)
        krylov = Krylov(operator, start, capacity=steps, seed=seed + probes + probe)
        krylov.grow()
        while krylov.steps < krylov.capacity and krylov.next is not None:
            krylov.grow()
        theta, s, _ = krylov.ritz()
        nodes.append(theta)
        weights.append(s[0] ** 2 / probes)
        products += krylov.steps
    return SpectralDensity(torch.cat(nodes), torch.cat(weights), products)
