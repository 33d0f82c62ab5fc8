"""Hessian-vector products of a mean loss over any number of images, on any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_repro.optim.perturbations import to_real

# Mean loss of some images: objective(params, *batch) -> 0-d tensor. The contract of sam_repro.optim.two_pass.
Objective = Callable[..., Tensor]
Batch = tuple[Any, ...]


@contextmanager
def exact_arithmetic(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """Full fp32 products and an attention that can be differentiated twice, inside the block only.

    Fused attention has neither a double backward nor a forward derivative, so the unfused kernel replaces it. Autocast
    is off, and TF32 unless asked for: rounding weights to 10 bits is a perturbation as large as those that a
    curvature measures.
    """
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


class Hessian:
    """The Hessian of a mean loss as a linear operator: `hessian(v)` is H v, for a flat vector v.

        H v = sum_b n_b H_b v / sum_b n_b

    over all batches b of n_b images on all ranks, so that a ragged last batch and unequal ranks weigh as their images
    do. The model must be in eval mode (the caller's job): a Hessian of BatchNorm's batch statistics, or of another
    dropout mask at each product, is no Hessian of one function.

    Two ways to the same product. "reverse" differentiates `<grad f, v>` backward; where this rank has one batch, the
    graph of its gradient is kept, and a product costs one backward pass through it: 6 units of work where one that
    starts anew costs 9 and a gradient 3. "forward" differentiates grad f along v and keeps nothing between products.

    Args:
        objective: (params, *batch) -> mean loss of the images, a 0-d tensor.
        params: the parameters by name, all of one dtype (float32 or float64) and device. v follows their order.
        batches: what the objective takes; the first of each is a tensor whose first dimension counts images. Read once
            for every product.
        all_reduce: sums a flat tensor over the ranks in place; None for one rank.
        mode: "reverse" | "forward".
        keep: keep the gradient's graph of every batch (reverse only). None: if there is only one batch.
        compiled: torch.compile the gradient (reverse) or the product (forward). The objective must be traceable: no
            graph break, no change of a module's mode, no write to a buffer.
        tf32: allow TF32 in products on a GPU, whose relative error is then about 1e-3.

    Attributes:
        size, dtype, device: of the vectors it takes.
        products: how many it has made.
        after: called after every sweep over the images: a product, a gradient, a loss.

    Raises:
        ValueError: batches that can be read only once, no image on any rank, half precision, an unknown mode.
    """

    def __init__(
        self,
        objective: Objective,
        params: Mapping[str, Tensor],
        batches: Sequence[Batch],
        *,
        all_reduce: Callable[[Tensor], object] | None = None,
        mode: str = "reverse",
        keep: bool | None = None,
        compiled: bool = False,
        tf32: bool = False,
    ):
        if mode not in ("reverse", "forward"):
            raise ValueError(f"unknown mode '{mode}': reverse or forward")
        if iter(batches) is batches:
            raise ValueError("batches can be read only once; give a list, or an object that iterates anew every time")
        self.objective, self.batches, self.all_reduce, self.mode = objective, batches, all_reduce, mode
        self.tf32 = tf32
        self.params = {name: p.detach() for name, p in params.items()}
        first = next(iter(self.params.values()))
        self.dtype, self.device = first.dtype, first.device
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"curvature wants float32 or float64 parameters, not {self.dtype}")
        self.shapes = [p.shape for p in self.params.values()]
        self.sizes = [p.numel() for p in self.params.values()]
        self.size, self.products = sum(self.sizes), 0
        self.after: Callable[[], object] = lambda: None
        self.keep = len(batches) == 1 if keep is None else keep
        self.graphs: list[tuple[list[Tensor], Sequence[Tensor], int]] = []
        self.compiled = compiled
        self.tangent = torch.compile(self._tangent, dynamic=False) if compiled else self._tangent
        self.differentiate = torch.compile(self._traceable, dynamic=False) if compiled else self._gradient

    def __call__(self, v: Tensor) -> Tensor:
        """H v, a new flat vector, equal on all ranks."""
        vs = self.unflatten(v)
        with self._arithmetic():
            if self.compiled and not self.products:
                self._try_compiler(vs)
            self.products += 1
            return self._mean(self._parts(vs), length=self.size)

    def loss(self, point: Sequence[Tensor] | None = None) -> Tensor:
        """The mean loss over the same images in the same arithmetic, at these or other weights (a tensor per name)."""
        weights = list(self.params.values()) if point is None else point
        with self._arithmetic(), torch.no_grad():
            parts = (([self._loss(weights, batch)], len(batch[0])) for batch in self.batches)
            return self._mean(parts, length=1)[0]

    def gradient(self) -> tuple[Tensor, Tensor]:
        """(mean loss as a 0-d tensor, its flat gradient), over the same images."""
        leaves = [p.detach().requires_grad_() for p in self.params.values()]

        def parts() -> Iterator[tuple[list[Tensor], int]]:
            for batch in self.batches:
                loss = self._loss(leaves, batch)
                g = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
                yield [*g, loss.detach()], len(batch[0])

        with self._arithmetic():
            both = self._mean(parts(), length=self.size + 1)
        return both[-1], both[:-1]

    def dense(self) -> Tensor:
        """All of H, a (size, size) tensor: for small nets."""
        return torch.stack([self(e) for e in torch.eye(self.size, dtype=self.dtype, device=self.device)])

    def renew(self, params: Mapping[str, Tensor], batches: Sequence[Batch]) -> None:
        """Other weights and images for the same function; what was compiled stays."""
        self.params = {name: p.detach() for name, p in params.items()}
        self.batches, self.graphs = batches, []

    def flatten(self, tensors: Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
        """One flat vector from one tensor per parameter, in the order of `params`."""
        if isinstance(tensors, Mapping):
            tensors = [tensors[name] for name in self.params]
        return torch.cat([t.detach().reshape(-1) for t in tensors])

    def unflatten(self, v: Tensor) -> list[Tensor]:
        """Views of a flat vector in the shapes of the parameters."""
        return [part.view(shape) for part, shape in zip(v.split(self.sizes), self.shapes, strict=True)]

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Exact; and a compiled backward pass that may be called again, which must not recycle what it was given."""
        again = functorch_config.patch(donated_buffer=False) if self.compiled else nullcontext()
        with exact_arithmetic(self.device, tf32=self.tf32), again, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.script")  # torch's forward mode uses it itself
            yield

    def _loss(self, leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        return self.objective(dict(zip(self.params, leaves, strict=True)), *batch)

    def _parts(self, vs: list[Tensor]) -> Iterator[tuple[Sequence[Tensor], int]]:
        """(H_b v, number of images) of every batch."""
        if self.mode == "forward":
            return ((self.tangent(vs, batch), len(batch[0])) for batch in self.batches)
        return ((self._backward(leaves, g, vs), n) for leaves, g, n in self._graphs())

    def _try_compiler(self, vs: list[Tensor]) -> None:
        """One batch, before any reduction: where the compiler fails on a model, a run goes on with plain code."""
        try:
            next(self._parts(vs), None)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of whatever kind the compiler's parts raise
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"products with the Hessian run uncompiled: {reason}", stacklevel=3)
            self.compiled, self.tangent, self.differentiate = False, self._tangent, self._gradient

    def _graphs(self) -> Iterator[tuple[list[Tensor], Sequence[Tensor], int]]:
        """(weights, differentiable gradient, number of images) of every batch; remembered where `keep` says so."""
        if self.graphs:
            yield from self.graphs
            return
        kept = []
        for batch in self.batches:
            leaves = [p.detach().requires_grad_() for p in self.params.values()]
            g = self.differentiate(leaves, batch)
            if self.keep:
                kept.append((leaves, g, len(batch[0])))
            yield leaves, g, len(batch[0])
        self.graphs = kept

    def _gradient(self, leaves: list[Tensor], batch: Batch) -> Sequence[Tensor]:
        """The gradient of one batch, with its graph."""
        loss = self._loss(leaves, batch)
        return torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)

    def _traceable(self, leaves: list[Tensor], batch: Batch) -> Sequence[Tensor]:
        """The same for torch.compile: its backward pass is then the product, fused, with what it needs kept."""
        return torch.func.grad(lambda tensors: self._loss(tensors, batch))(leaves)

    def _backward(self, leaves: list[Tensor], g: Sequence[Tensor], vs: list[Tensor]) -> Sequence[Tensor]:
        """H v as the derivative of <g, v>. A gradient that is constant (a linear layer's, say) adds nothing."""
        pairs = [(gi, vi) for gi, vi in zip(g, vs, strict=True) if gi.requires_grad]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in leaves]
        outputs, directions = zip(*pairs, strict=True)
        return torch.autograd.grad(
            outputs, leaves, directions, retain_graph=self.keep, allow_unused=True, materialize_grads=True
        )

    def _tangent(self, vs: list[Tensor], batch: Batch) -> list[Tensor]:
        """H v as the derivative of grad f along v."""
        gradient = torch.func.grad(lambda leaves: self._loss(leaves, batch))
        return torch.func.jvp(gradient, (list(self.params.values()),), (list(vs),))[1]

    def _mean(self, parts: Iterator[tuple[Sequence[Tensor], int]], *, length: int) -> Tensor:
        """The mean of parts (tensors of `length` numbers in all) weighted by images: one reduction over the ranks."""
        total = torch.zeros(length + 1, dtype=self.dtype, device=self.device)
        for tensors, n in parts:
            total[:-1].add_(torch.cat([t.detach().reshape(-1) for t in tensors]), alpha=n)
            total[-1] += n
        if self.all_reduce is not None:
            self.all_reduce(total)
        self.after()
        if total[-1] == 0:
            raise ValueError("there are no images to take the loss of")
        return total[:-1] / total[-1]


class LossHessian:
    """The Hessian of a loss whose graph is at hand, as a linear operator on flat vectors: v -> H v.

    For loops that can only evaluate their loss. Half precision parameters and complex ones are fp32 and pairs in v.

    Args:
        loss: a 0-d tensor with its graph, made in `exact_arithmetic`.
        params: what it is differentiated by, on any devices; v lives on the first's.
        average: averages a flat tensor over the ranks in place; None for one rank.
    """

    def __init__(self, loss: Tensor, params: Sequence[Tensor], *, average: Callable[[Tensor], object] | None = None):
        self.params, self.average = params, average
        g = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
        self.g = [to_real(x) for x in g]
        self.curved = [i for i, x in enumerate(g) if x.requires_grad]  # not where a gradient is constant

    def __call__(self, v: Tensor) -> Tensor:
        """H v, a new flat vector."""
        vs = self.unflatten(v)
        hv = torch.autograd.grad(
            [self.g[i] for i in self.curved], self.params, [vs[i] for i in self.curved],
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        flat = self.flatten([to_real(x) for x in hv])
        if self.average is not None:
            self.average(flat)
        return flat

    def start(self, seed: int = 0) -> Tensor:
        """A random unit vector, the same on every rank."""
        generator = torch.Generator().manual_seed(seed)
        v = self.flatten([torch.randn(x.shape, generator=generator, dtype=x.dtype, device="cpu") for x in self.g])
        return v / v.norm()

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """One flat vector of one tensor per parameter."""
        return torch.cat([t.detach().reshape(-1).to(self.g[0].device) for t in tensors])

    def unflatten(self, v: Tensor) -> list[Tensor]:
        """Inverse of flatten: each part where its parameter is."""
        parts = v.split([x.numel() for x in self.g])
        return [part.view(x.shape).to(x) for part, x in zip(parts, self.g, strict=True)]


def power_step(operator: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration, v <- H v / ||H v||.

    Args:
        operator: a symmetric map of flat vectors.
        v: (n,) a unit vector.

    Returns:
        (the next v, H v), both (n,). Where H v is zero or not finite, the next v is v. The Rayleigh quotient of v is
        <v, H v>.

    Source: Eigen-SAM paper, Algorithm 1.
    """
    hv = operator(v)
    length = hv.norm()
    return torch.where(torch.isfinite(length) & (length > 0), hv / length, v), hv
