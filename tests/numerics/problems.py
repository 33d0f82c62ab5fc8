"""Small problems whose gradients can be written down, and the slow obvious formulae to compare with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sam_repro.optim import PERTURBATIONS, GradientStep
from sam_repro.optim.perturbations import Eigen, Friendly, Random, Vasso, build_perturbation


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


H = vector(1, 10)[None]  # one "image" whose loss has this diagonal Hessian
W, G, G_P = vector(1, 1), vector(1, 10), vector(1.0099503719, 10.9950371902)
SHARDS = torch.stack([vector(1, 1), vector(4, 0.25)])
DETERMINISTIC = [name for name in PERTURBATIONS if name != "random"]


def close(actual, expected, tol=6e-11):
    assert_close(torch.as_tensor(actual, dtype=torch.float64), expected, rtol=0, atol=tol)


def fresh(name: str):
    """A perturbation with something to remember, where it can remember."""
    perturb = build_perturbation(name)
    if isinstance(perturb, Friendly | Vasso):
        perturb.update_memory([vector(2, 3)])
    if isinstance(perturb, Eigen):
        perturb.v = [vector(0, 1)]
    if isinstance(perturb, Random):
        perturb.reseed(3)
    return perturb


def quadratic(tensors: dict[str, Tensor], hessians: Tensor) -> Tensor:
    """f(w) = mean over a batch of diagonal Hessians of w'Hw / 2."""
    return 0.5 * (hessians * tensors["w"] ** 2).sum(1).mean()


def gradient_of(
    w: Tensor, *batch: Tensor, rho: float = 0.0, objective=quadratic, clip: float = 0.0, **method
) -> Tensor:
    """The engine's gradient of an objective in one parameter, w."""
    p = w.clone().requires_grad_()
    step = GradientStep(objective, {"w": p}, **method)
    step(*batch, rho=rho)
    if clip:
        step.clip_(clip)
    assert p.grad is not None
    return p.grad.clone()


def network(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def data(n: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))


DATA = data()


class Peers:
    """all_reduce among threads, one per rank: the sum is taken in the same order everywhere."""

    def __init__(self, world: int):
        self.world, self.barrier, self.parts = world, threading.Barrier(world), [None] * world

    def of(self, rank: int) -> Callable[[Tensor], None]:
        def all_reduce(flat: Tensor) -> None:
            self.parts[rank] = flat.clone()
            self.barrier.wait()
            flat.copy_(torch.stack(self.parts).sum(0))
            self.barrier.wait()

        return all_reduce

    def run(self, work: Callable[[int, Callable[[Tensor], None]], Any]) -> list[Any]:
        """work(rank, all_reduce) of all ranks at the same time."""
        found: list[Any] = [None] * self.world

        def one(rank: int) -> None:
            try:
                found[rank] = work(rank, self.of(rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert None not in found
        return found
