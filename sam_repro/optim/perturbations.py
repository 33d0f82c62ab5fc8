"""Where to look: the perturbation eps that a sharpness-aware step adds to the weights.

A perturbation maps (params, grads, rho) to eps. `params`, `grads` and eps are lists with one tensor per parameter, of
its shape; eps is new memory. `rho`, a float or a 0-d tensor, is the radius: the norm of eps over all parameters, in
the perturbation's own metric. It is negative only where a caller asked for the reference's warm-up (D-05).

Those without memory are functions. Those with memory are small classes with the same call, state_dict() and
load_state_dict(). An engine whose step has several groups of images uses the two halves of their call:
`eps_from_memory` takes the memory as it is, `update_memory` changes it once per step, when the mean gradient is known.
So the memory depends neither on the order of the groups nor on the ranks that they were spread over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor]
Perturbation = Callable[[Tensors, Tensors, float | Tensor], Tensors]

# GSAM paper, section 2.1: added to the norm, so that a zero gradient gives a zero perturbation.
STABILITY = 1e-12

RENORMALISE = ("none", "v_perp", "sum")


def to_real(x: Tensor) -> Tensor:
    """x in numbers that sums of squares can be made of: real (a complex number is a pair) and at least fp32.

    Half precision squares 256 to infinity and 2e-4 to 0. x itself where it is real and wide enough.
    """
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.float() if x.element_size() < 4 else x


def from_real(x: Tensor, like: Tensor) -> Tensor:
    """Inverse of to_real: in the dtype of `like`."""
    return (torch.view_as_complex(x.contiguous()) if like.is_complex() else x).to(like.dtype)


def together(xs: Sequence[Tensor]) -> Tensor:
    """0-d tensors as one vector, on the device of the first."""
    return torch.stack([x.to(xs[0].device) for x in xs])


def squared_norm(xs: Tensors) -> Tensor:
    """The sum of squares over all tensors, in fp32 at least, as a 0-d tensor."""
    return together(torch._foreach_norm([to_real(x) for x in xs])).square().sum()


def inner(xs: Tensors, ys: Tensors) -> Tensor:
    """The Euclidean inner product over all tensors, in fp32 at least, as a 0-d tensor."""
    pairs = zip(xs, ys, strict=True)
    return together([torch.dot(to_real(x).reshape(-1), to_real(y).reshape(-1)) for x, y in pairs]).sum()


def multiply(xs: Sequence[Tensor], factor: float | Tensor) -> Tensors:
    """factor x for every tensor: new memory, wherever each tensor is."""
    if isinstance(factor, Tensor) and any(x.device != factor.device for x in xs):
        return [x * factor.to(x.device) for x in xs]
    return list(torch._foreach_mul(xs, factor))


def sam(params: Tensors, grads: Tensors, rho: float | Tensor) -> Tensors:
    """SAM's first-order ascent direction: eps = rho g / (||g|| + 1e-12).

    One norm over all parameters. Foret et al. 2021, eq. 2; GSAM paper, Algorithm 1, step 1a.
    """
    return multiply(grads, rho / (squared_norm(grads).sqrt() + STABILITY))


def asam(
    params: Tensors, grads: Tensors, rho: float | Tensor, *, eta: float = 0.0, scaled: Sequence[bool] | None = None
) -> Tensors:
    """ASAM's ascent in a ball that scales with the weights: eps = rho T^2 g / ||T g||, T = |w| + eta.

    T is 1 for parameters that are not `scaled`; Kwon et al. scale those whose name contains "weight", and None scales
    all, as davda54/sam's `adaptive` does. Kwon et al. 2021, eq. 8; their class has eta 0.01, their example 0.
    """
    sizes = [t.abs().add_(eta) for t in params]
    if scaled is not None:
        sizes = [t if s else torch.ones_like(t) for t, s in zip(sizes, scaled, strict=True)]
    stretched = torch._foreach_mul(grads, sizes)
    scale = rho / (squared_norm(list(stretched)).sqrt() + STABILITY)
    torch._foreach_mul_(stretched, sizes)
    return multiply(stretched, scale)


def adaptive_official(params: Tensors, grads: Tensors, rho: float | Tensor) -> Tensors:
    """The reference's `adaptive_perturbation`: eps = rho |w| g / (||g|| + 1e-12). This is not ASAM.

    The first power of |w| and an unweighted norm, so that eps does not follow a rescaling of the weights (D-26).
    google-research/big_vision, trainers/proj/gsam.
    """
    return list(torch._foreach_mul(sam(params, grads, rho), torch._foreach_abs(params)))


def fisher(params: Tensors, grads: Tensors, rho: float | Tensor, *, eta: float = 1.0) -> Tensors:
    """Fisher-SAM's ascent in the ball of the Fisher metric: eps = rho F^-1 g / sqrt(g' F^-1 g).

    F^-1 = 1 / (1 + eta g^2), elementwise: the squared gradient of the group stands for the diagonal empirical Fisher
    matrix. Kim et al. 2022, eq. 8; there is no official code.
    """
    steps = [g / (1 + eta * g.square()) for g in grads]
    scale = rho / (inner(list(grads), steps).clamp(min=0).sqrt() + STABILITY)
    return multiply(steps, scale)


class MomentumPerturbation:
    """A perturbation along g corrected by a running mean m of gradients; `name` is m's in the checkpoint."""

    def __init__(self) -> None:
        self.m: Tensors | None = None

    def __call__(self, params: Tensors, grads: Tensors, rho: float | Tensor) -> Tensors:
        """eps, then the memory of this gradient: for loops whose step has one gradient."""
        eps = self.eps_from_memory(params, grads, rho)
        self.update_memory(grads)
        return eps

    def eps_from_memory(self, params: Tensors, grads: Tensors, rho: float | Tensor) -> Tensors:
        """eps = rho d / (||d|| + 1e-12), from the memory as it is."""
        return sam(params, list(grads) if self.m is None else self.direction(grads, self.m), rho)

    def update_memory(self, grads: Tensors) -> None:
        """The memory after a step with this mean gradient: the first gradient is the first memory."""
        if self.m is None:
            self.m = [g.clone() for g in grads]
        else:
            torch._foreach_lerp_(self.m, grads, self.weight)

    def direction(self, grads: Tensors, m: Tensors) -> Tensors:
        """d, a function of the gradient and the memory."""
        raise NotImplementedError

    @property
    def weight(self) -> float:
        """Of the new gradient in the running mean."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The running mean; empty before the first step."""
        return {} if self.m is None else {"m": self.m}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict()."""
        self.m = [t.clone() for t in state["m"]] if "m" in state else None


class Friendly(MomentumPerturbation):
    """Friendly-SAM: perturb along what is left of g when its running mean is taken away.

        d_t = g_t - sigma m_{t-1},  m_t = lam m_{t-1} + (1 - lam) g_t,  eps = rho d_t / ||d_t||

    The mean takes the gradient, not d (a port that mixes them up gives another mean); d_1 = m_1 = g_1. Li et al. 2024,
    eq. 13; nblt/F-SAM.
    """

    def __init__(self, *, sigma: float = 1.0, lam: float = 0.9):
        super().__init__()
        self.sigma, self.lam = sigma, lam

    def direction(self, grads: Tensors, m: Tensors) -> Tensors:
        """g - sigma m."""
        return list(torch._foreach_sub(grads, m, alpha=self.sigma))

    @property
    def weight(self) -> float:
        """1 - lam."""
        return 1 - self.lam


class Vasso(MomentumPerturbation):
    """VaSSO: perturb along a running mean of gradients, which is less noisy than one of them.

        d_t = (1 - theta) d_{t-1} + theta g_t,  d_0 = g,  eps = rho d_t / ||d_t||

    Li and Giannakis 2023, eq. 4; BingcongLi/VaSSO, whose theta 0.9 is the weight of the new gradient.
    """

    def __init__(self, *, theta: float = 0.9):
        super().__init__()
        self.theta = theta

    def direction(self, grads: Tensors, m: Tensors) -> Tensors:
        """(1 - theta) d + theta g."""
        return list(torch._foreach_lerp(m, grads, self.theta))

    @property
    def weight(self) -> float:
        """Theta."""
        return self.theta


def group_seed(seed: int, number: int) -> int:
    """The seed of group `number` (over all ranks) in the step that has `seed`: one that torch's generators take."""
    return (seed * 1_000_003 + number) % 2**63


class Random:
    """A control: eps = rho n / ||n|| with n standard normal, whatever the gradient is.

    Draws from torch's generator, or after `reseed` from its own, so that an engine can give every group its noise.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    def __call__(self, params: Tensors, grads: Tensors, rho: float | Tensor) -> Tensors:
        """eps, of another direction at every call."""
        generator = None
        if self.seed is not None:
            generator = torch.Generator(params[0].device).manual_seed(self.seed)
        noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device) for p in params]
        return sam(params, noise, rho)

    def reseed(self, seed: int) -> None:
        """The seed of the next call."""
        self.seed = seed


class Eigen:
    """Eigen-SAM's perturbation, from an eigenvector v that PowerIteration or EigenSAM renews.

        g^ = g / (||g|| + 1e-12),  v_perp = v - <v, g^> g^,  eps = rho (g^ + alpha sign(<g, v>) v_perp)

    One inner product over all parameters. Because of the sign, v and -v give the same eps. Before the first v, eps is
    SAM's. Luo et al. 2024, Algorithm 2, as released (RitianLuo/EigenSAM): nothing is rescaled, so
    ||eps|| = rho sqrt(1 + alpha^2 ||v_perp||^2).

    Args:
        alpha: weight of the eigenvector's part.
        renormalise: "none" | "v_perp" (to length 1) | "sum" (eps to length rho).
        faithful: before there is a v, perturb by rho g as the release does, not by rho g / ||g|| (D-29).

    Attributes:
        v: one tensor per parameter, of length 1 in all; None before the first estimate.

    Raises:
        ValueError: for an unknown `renormalise`.
    """

    def __init__(self, *, alpha: float = 0.2, renormalise: str = "none", faithful: bool = False):
        if renormalise not in RENORMALISE:
            raise ValueError(f"unknown renormalisation '{renormalise}': {', '.join(RENORMALISE)}")
        self.alpha, self.renormalise, self.faithful = alpha, renormalise, faithful
        self.v: Tensors | None = None

    def __call__(self, params: Tensors, grads: Tensors, rho: float | Tensor) -> Tensors:
        """eps, of the gradient of one group."""
        if self.v is None:
            return multiply(grads, rho) if self.faithful else sam(params, grads, rho)
        v = [x.to(g) for x, g in zip(self.v, grads, strict=True)]
        unit = sam(params, grads, 1.0)
        along = inner(unit, v)
        v_perp = torch._foreach_sub(v, multiply(unit, along))
        weight = self.alpha * torch.sign(along)
        if self.renormalise == "v_perp":
            weight = weight / (squared_norm(list(v_perp)).sqrt() + STABILITY)
        torch._foreach_add_(unit, multiply(v_perp, weight))
        return sam(params, unit, rho) if self.renormalise == "sum" else multiply(unit, rho)

    def coefficients(self, gg: Tensor, gv: Tensor, vv: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) with eps = a g + b v, from `<g,g>`, `<g,v>`, `<v,v>`: the call above, for a fused engine.

        Without a vector (v = 0) this is SAM's perturbation, except with `faithful`.
        """
        length = gg.sqrt() + STABILITY
        along = gv / length
        weight = self.alpha * torch.sign(along)
        square = (vv - along.square()).clamp(min=0)  # ||v_perp||^2
        if self.renormalise == "v_perp":
            weight = weight / (square.sqrt() + STABILITY)
        if self.renormalise == "sum":
            rho = rho / ((1 + weight.square() * square).sqrt() + STABILITY)
        return rho * (1 - weight * along) / length, rho * weight

    def state_dict(self) -> dict[str, Any]:
        """The eigenvector; empty before the first estimate."""
        return {} if self.v is None else {"v": self.v}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict()."""
        self.v = [t.clone() for t in state["v"]] if "v" in state else None


# A function is used as it is; a class is built, with its defaults, for every optimizer.
PERTURBATIONS: dict[str, Any] = {
    "sam": sam,
    "asam": asam,
    "adaptive_official": adaptive_official,
    "fisher": fisher,
    "friendly": Friendly,
    "vasso": Vasso,
    "eigen": Eigen,
    "random": Random,
}


def build_perturbation(name: str, **options: Any) -> Perturbation:
    """The perturbation called `name`.

    Args:
        name: in PERTURBATIONS.
        options: its arguments (eta, sigma, lam, theta, ...); those that it does not take are left out.

    Returns:
        a function, or an object with memory, that maps (params, grads, rho) to eps.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PERTURBATIONS:
        raise ValueError(f"unknown perturbation '{name}': none, {', '.join(PERTURBATIONS)}")
    entry = PERTURBATIONS[name]
    taken = {k: v for k, v in options.items() if k in inspect.signature(entry).parameters}
    return entry(**taken) if isinstance(entry, type) else partial(entry, **taken) if taken else entry
