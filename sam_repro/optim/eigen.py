"""Eigen-SAM's estimate of the top eigenvector of the Hessian: a few power iterations now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_repro.optim.perturb import Eigen, Tensors, inner, sam, squared_norm


class PowerIteration:
    """Renew an Eigen's v every k calls: p times v <- H v / ||H v||, from the former v. Luo et al. 2024, Algorithm 1.

    Called with the batch before every step. The first estimate is made at call k (calls count from 0), as in the
    release, which however counts inside an epoch (`per_epoch`; D-29). v goes to the eigenvector of largest |lambda|.
    The start is drawn from a seed and products are summed over the ranks, so that v is the same on all of them.

    Products are made in float32 (float64 for float64 parameters), TF32 and autocast off, and with the unfused
    attention kernel, since fused attention cannot be differentiated twice. All of this ends with the product.

    Args:
        eigen: whose v is renewed.
        objective: (params | buffers, *batch) -> mean loss, in full precision, not compiled, in the mode (eval or train)
            that the Hessian is wanted in. It gets throw-away copies of the buffers.
        params, buffers: as the step's.
        every, iterations: k and p.
        images: "group" (rank 0's first m images) | "batch" (the step's, all ranks) | "fixed" (those given to `fix`).
        tf32: allow TF32 in products on a GPU, whose relative error is then about 1e-3.
        m: images a pass; 0 takes all at once. One pass keeps its graph for all p products.
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
        tf32: bool = False,
        m: int = 0,
        per_epoch: int = 0,
        seed: int = 0,
        all_reduce: Callable[[Tensor], object] | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        if every < 1 or iterations < 1:
            raise ValueError(f"power iteration every k={every} steps with p={iterations} products: both at least 1")
        if images not in ("group", "batch", "fixed"):
            raise ValueError(f"unknown images '{images}' for the eigenvector: group, batch, fixed")
        self.eigen, self.objective, self.params, self.buffers = eigen, objective, dict(params), dict(buffers or {})
        self.every, self.iterations, self.images, self.m, self.per_epoch = every, iterations, images, m, per_epoch
        self.tf32, self.seed, self.all_reduce, self.rank, self.world = tf32, seed, all_reduce, rank, world
        self.fixed: tuple[Tensor, ...] | None = None
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
        v = self.eigen.v or self._start()
        gpus = [v[0].device] if v[0].is_cuda else []
        with exact_arithmetic(v[0].device, tf32=self.tf32), torch.random.fork_rng(gpus):
            graphs = self._graphs(batch)
            for _ in range(self.iterations):
                hv = self._product(v, graphs)
                length = squared_norm(hv).sqrt()
                found = torch.isfinite(length) & (length > 0)
                quotient = inner(v, hv)
                v = [torch.where(found, x / length, y) for x, y in zip(hv, v, strict=True)]
        self.eigen.v = v
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

    def _leaves(self) -> Tensors:
        full = [p if p.dtype == torch.float64 else p.float() for p in self.params.values()]
        return [p.detach().requires_grad_() for p in full]

    def _start(self) -> Tensors:
        """A unit vector, the same on every rank and device type."""
        generator = torch.Generator().manual_seed(self.seed)
        v = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in self._leaves()]
        return sam(v, v, 1.0)

    def _chunks(self, batch: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The images of this rank, in passes of m."""
        if self.images == "fixed":
            if self.fixed is None:
                raise ValueError("images='fixed', but no images were given to fix()")
            batch = self.fixed
        chunks = list(zip(*(t.split(self.m or len(t)) for t in batch), strict=True))
        if self.images == "group":
            return chunks[:1] if self.rank == 0 else []
        return chunks

    def _graphs(self, batch: tuple[Tensor, ...]) -> Callable[[], Iterator[tuple[Tensors, Tensors, float]]]:
        """How to go through (leaves, differentiable gradient, weight) of all passes, once a product."""
        chunks = self._chunks(batch)
        total = sum(len(chunk[0]) for chunk in chunks) * (1 if self.images == "group" else self.world)
        means = {name: self._mean(b) for name, b in self.buffers.items()}

        def graphs() -> Iterator[tuple[Tensors, Tensors, float]]:
            for i, chunk in enumerate(chunks):
                leaves = self._leaves()
                buffers = {name: b.clone() for name, b in means.items()}
                torch.manual_seed((self.seed + self.calls) * 1_000_003 + self.rank * len(chunks) + i)
                loss = self.objective(dict(zip(self.params, leaves, strict=True)) | buffers, *chunk)
                g = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
                yield leaves, list(g), len(chunk[0]) / total

        if len(chunks) > 1:
            return graphs
        kept = list(graphs())
        return lambda: iter(kept)

    def _mean(self, buffer: Tensor) -> Tensor:
        """A copy of a running statistic, averaged over the ranks, whose steps leave each its own."""
        mean = buffer.clone()
        if self.all_reduce is not None and mean.is_floating_point():
            self.all_reduce(mean)
            mean.div_(self.world)
        return mean

    def _product(self, v: Tensors, graphs: Callable[[], Iterator[tuple[Tensors, Tensors, float]]]) -> Tensors:
        """H v: the derivative of <grad f, v>, mean over the passes, one reduction over the ranks."""
        total = torch.cat([torch.zeros_like(x).reshape(-1) for x in v])
        for leaves, g, weight in graphs():
            curved = [i for i, gi in enumerate(g) if gi.requires_grad]
            if curved:
                outputs, directions = [g[i] for i in curved], [v[i] for i in curved]
                hv = torch.autograd.grad(
                    outputs, leaves, directions, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                total.add_(torch.cat([x.reshape(-1) for x in hv]), alpha=weight)
        if self.all_reduce is not None:
            self.all_reduce(total)
        return [part.view_as(x) for part, x in zip(total.split([x.numel() for x in v]), v, strict=True)]


@contextmanager
def exact_arithmetic(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """fp32 arithmetic (or TF32) and an attention that can be differentiated twice, inside the block only."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
