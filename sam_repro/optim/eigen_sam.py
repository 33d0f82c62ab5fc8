"""Eigen-SAM's estimate of the top eigenvector of the Hessian: a few power iterations now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sam_repro.optim.hessian import Hessian, power_step
from sam_repro.optim.memory import cut, halving
from sam_repro.optim.perturbations import Eigen, group_seed


class PowerIteration:
    """Renew an Eigen's v every k calls: p times v <- H v / ||H v||, from the former v. Luo et al. 2024, Algorithm 1.

    Called with the batch before every step. The first estimate is made at call k (calls count from 0), as in the
    release, which however counts inside an epoch (`per_epoch`; D-29). v goes to the eigenvector of largest |lambda|.
    The first v is drawn from a seed, and products are summed over the ranks. So v is the same on all ranks.

    Products are made in float32 (float64 for float64 parameters), TF32 and autocast off, and with the unfused
    attention kernel, since fused attention cannot be differentiated twice. All of this ends with the product.

    Args:
        eigen: whose v is renewed.
        objective: (params | buffers, *batch) -> mean loss, in full precision, not compiled. It gets throw-away copies
            of the buffers.
        params, buffers: as the step's.
        every, iterations: k and p.
        images: "group" (rank 0's first m images) | "batch" (the step's, all ranks) | "fixed" (those given to `fix`).
        around: a context for the products: the mode (eval or train) that the Hessian is wanted in.
        mode, compiled: how a product is made, as Hessian's. One pass of m images keeps its graph for all p products;
            compiled products draw no dropout masks and write no buffers.
        tf32: allow TF32 in products on a GPU, whose relative error is then about 1e-3.
        m: images per pass; 0 takes all at once.
        per_epoch: count steps modulo this number; 0 counts all steps.
        seed: of the first v, and of dropout masks in train mode.
        all_reduce, rank, world: as the step's.

    Raises:
        ValueError: for k or p < 1, an unknown `images`, or "fixed" without images.
    """

    def __init__(
        self,
        eigen: Eigen,
        objective: Callable[..., Tensor],
        params: Mapping[str, Tensor],
        *,
        buffers: Mapping[str, Tensor] | None = None,
        every: int = 100,
        iterations: int = 5,
        images: str = "group",
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        mode: str = "reverse",
        compiled: bool = False,
        tf32: bool = False,
        m: int = 0,
        per_epoch: int = 0,
        seed: int = 0,
        all_reduce: Callable[[Tensor], object] | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        if every < 1 or iterations < 1:
            raise ValueError(f"power iteration with k={every} and p={iterations}: both must be at least 1")
        if images not in ("group", "batch", "fixed"):
            raise ValueError(f"unknown images '{images}' for the eigenvector: group, batch, fixed")
        self.eigen, self.objective, self.params, self.buffers = eigen, objective, dict(params), dict(buffers or {})
        self.every, self.iterations, self.images, self.m, self.per_epoch = every, iterations, images, m, per_epoch
        self.around, self.mode, self.compiled, self.tf32, self.seed = around, mode, compiled, tf32, seed
        self.all_reduce, self.rank, self.world = all_reduce, rank, world
        self.fixed: tuple[Tensor, ...] | None = None
        self.hessian: Hessian | None = None
        self.images_per_pass = 0  # where memory lacked for more; 0: m
        self.calls, self.products, self.seconds, self.eigenvalue = 0, 0, 0.0, 0.0

    def fix(self, *batch: Tensor) -> None:
        """The images of this rank that all estimates are made on, for images="fixed"."""
        self.fixed = batch

    def __call__(self, *batch: Tensor) -> None:
        """Count a step whose batch this is, and renew v if it is one of every k."""
        index = self.calls % self.per_epoch if self.per_epoch else self.calls
        self.calls += 1
        if index and index % self.every == 0:
            self.renew(*batch)

    def renew(self, *batch: Tensor) -> None:
        """p products on these images (or the fixed ones); the last Rayleigh quotient is left in `eigenvalue`."""
        start = self._clock()
        hessian = self._operator(batch)
        v = self._start(hessian) if self.eigen.v is None else hessian.flatten(self.eigen.v)
        quotient = v.new_zeros(())
        with self.around(), torch.random.fork_rng([v.device] if v.is_cuda else []):
            for _ in range(self.iterations):
                former = v
                v, hv = power_step(lambda x: self._product(hessian, x), former)
                quotient = torch.dot(former, hv)
        hessian.graphs = []
        self.eigen.v = hessian.unflatten(v)
        self.eigenvalue = quotient.item()  # waits for the device, so that the clock is right
        self.products += self.iterations
        self.seconds += self._clock() - start

    def report(self, seconds: float) -> dict[str, float]:
        """What the estimates cost so far: products, seconds, their share of `seconds`; and the last lambda."""
        share = self.seconds / seconds if seconds else 0.0
        report = {"products": self.products, "product_seconds": self.seconds, "product_share": share}
        return report | {"eigenvalue": self.eigenvalue}

    def state_dict(self) -> dict[str, Any]:
        """The count of steps and the costs. v belongs to the Eigen."""
        return {key: getattr(self, key) for key in ("calls", "products", "seconds", "eigenvalue")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict()."""
        vars(self).update(state)

    def _clock(self) -> float:
        if next(iter(self.params.values())).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _product(self, hessian: Hessian, v: Tensor) -> Tensor:
        """H v, in smaller passes where memory lacks: known before this rank's part is reduced with the others'."""
        batches = hessian.batches

        def attempt(images: int) -> Tensor:
            if images < largest:
                self.images_per_pass = images
                parts = [(*part, *batch[-2:]) for batch in batches for part in cut(batch[:-2], images)]
                hessian.keep = False
                hessian.renew(hessian.params, parts)
            return hessian(v)

        largest = max((len(images) for images, *_ in batches), default=1)
        return halving(attempt, largest, doing="a product with the Hessian")[0]

    def _start(self, hessian: Hessian) -> Tensor:
        """A unit vector, the same on every rank and device type."""
        generator = torch.Generator().manual_seed(self.seed)
        v = hessian.flatten(
            [torch.randn(s, generator=generator, dtype=hessian.dtype, device="cpu") for s in hessian.shapes]
        )
        return v.to(hessian.device) / v.norm()

    def _operator(self, batch: tuple[Tensor, ...]) -> Hessian:
        """The Hessian of the mean loss over the images wanted, at the weights as they are, in passes of m images."""
        weights = {n: p if p.dtype == torch.float64 else p.float() for n, p in self.params.items()}
        means = {name: self._mean(b) for name, b in self.buffers.items()}
        chunks, seed = self._chunks(batch), self.seed + self.calls
        batches = [(*c, means, group_seed(seed, self.rank * len(chunks) + i)) for i, c in enumerate(chunks)]
        if self.hessian is None:  # once, so that it is compiled once
            options = {"mode": self.mode, "compiled": self.compiled, "tf32": self.tf32}
            self.hessian = Hessian(self._objective, weights, batches, all_reduce=self.all_reduce, **options)
        self.hessian.keep = len(batches) == 1
        self.hessian.renew(weights, batches)
        return self.hessian

    def _objective(self, leaves: dict[str, Tensor], *chunk: Any) -> Tensor:
        """The loss of (images, ..., buffers, seed)."""
        *images, buffers, seed = chunk
        if not self.compiled:
            torch.manual_seed(seed)  # the same dropout masks in every product
        copies = {name: b.clone() for name, b in buffers.items()}
        return self.objective({**leaves, **copies}, *images)  # torch 2.6 cannot compile | of dictionaries

    def _chunks(self, batch: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The images of this rank, in passes of m or fewer."""
        if self.images == "fixed":
            if self.fixed is None:
                raise ValueError("images='fixed', but no images were given to fix()")
            batch = self.fixed
        groups = cut(batch, self.m or len(batch[0]))
        if self.images == "group":
            groups = groups[:1] if self.rank == 0 else []
        return [part for group in groups for part in cut(group, self.images_per_pass or len(group[0]))]

    def _mean(self, buffer: Tensor) -> Tensor:
        """A copy of a running statistic, averaged over the ranks, whose steps leave each its own."""
        mean = buffer.clone()
        if self.all_reduce is not None and mean.is_floating_point():
            self.all_reduce(mean)
            mean.div_(self.world)
        return mean
