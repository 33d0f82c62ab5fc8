"""The two-pass engine on an NVIDIA GPU: the same gradient with as few bytes and launches as the method allows.

Three things make it cheap. (1) What a product reads is kept in the dtype that it reads: under bf16 autocast the
leaves of matrices and convolutions are bf16 tensors, so no pass casts them and their gradients move half the bytes. The
values are those of autocast, which rounds w + eps to bf16 in the same way. (2) Norm, perturbation, inner products
and combination are one fused pass each (triton_kernels.py). (3) Everything between the input copy and the gradient is
captured once in a CUDA graph and replayed; in two, with the perturbation between them, where that is neither SAM's nor
Eigen-SAM's.

A batch goes through the network in chunks, one after the other, each a replay of the same graph. A chunk is
* several whole groups of m images at once (models/layers/grouped.py): in the clean pass they share the weights, in the
  robust pass every layer multiplies each group with its own;
* one group;
* or a micro-batch of a group: the graph ends in a sum of gradients, and norm, perturbation and combination are graphs
  of their own, replayed once per group.
A last chunk that is smaller than the others has a graph of its own. All graphs share one pool of memory.

With SAM_REPRO_LANES=2, chunks of whole groups go through the network two at a time, on two streams within one graph:
one fills the processors that the other leaves idle at the end of a kernel. Not measured; the plan of memory knows of
one.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_repro.optim.base_optimizer import is_kernel
from sam_repro.optim.combinations import ratio
from sam_repro.optim.gpu import triton_kernels as kernels
from sam_repro.optim.memory import cut
from sam_repro.optim.perturbations import STABILITY, Tensors, group_seed, sam
from sam_repro.optim.two_pass import GradientStep, metrics_of

LANES = int(os.environ.get("SAM_REPRO_LANES", "1"))  # chunks at once
WARMUP = 3  # calls before capture: compilation, autotuning, workspaces


def aligned(weight: Tensor) -> bool:
    """Whether rows and columns of a matrix in bf16 begin at multiples of 16 bytes.

    Others, such as those over a Mixer's 49 tokens, stay in fp32, so that the compiled pass can cast and pad them at
    once. It did not make Mixer-B/32 faster (benchmarks/NOTES.md).
    """
    return weight.ndim != 2 or all(side % 8 == 0 for side in weight.shape)


@dataclass
class Chunk:
    """Images that go through the network at once: where a graph finds them, and what it leaves behind.

    Args:
        groups: at once; 1 for a group or a part of one.
        share: of a group's images, 1 unless it is a micro-batch.
        weight: of one group in the mean over all groups of all ranks.
        add: to what the flat buffer holds; not where the batch is a single chunk.
        inputs: images, labels, ...: static memory.
        clean, perturbed: leaves at w and at w + eps, with a leading dimension of groups if there are several.
        work: see there.
    """

    groups: int
    share: float
    weight: float
    add: bool
    inputs: list[Tensor]
    clean: Tensors
    perturbed: Tensors
    work: list[dict[str, Tensor]]  # running statistics of either pass
    twins: list[Chunk] = field(init=False, default_factory=list)  # for chunks that go with this one, a lane each
    loss: Tensor = field(init=False)  # of the clean pass, and its gradient and ||g||^2 per group
    g: Tensors = field(init=False, default_factory=list)
    gg: Tensor = field(init=False)
    loss_p: Tensor = field(init=False)  # likewise of the robust pass
    g_p: Tensors = field(init=False, default_factory=list)
    replays: dict[str, Callable[[], None]] = field(init=False, default_factory=dict)

    def load(self, part: tuple[Tensor, ...]) -> Chunk:
        """Copy images, labels, ... to where the graphs read them."""
        for static, tensor in zip(self.inputs, part, strict=True):
            static.copy_(tensor, non_blocking=True)
        return self


class FusedStep(GradientStep):
    """GradientStep for any perturbation with a linear combination, fp32 parameters on one CUDA device.

    Args:
        arguments, keywords: GradientStep's.
        chunk: images per pass at most, cut down to whole groups; 0 sets no limit. More than m gives the objective
            parameters with a leading dimension of groups (models/layers/grouped.py) and the images of all these groups,
            and wants the mean loss over all of them; no buffers.
        products: dtype of the leaves of matrices and convolutions: bf16 under autocast, else fp32.
        compile: torch.compile the passes.
        graph: capture in a CUDA graph; off for debugging.
    """

    def __init__(
        self,
        *arguments,
        products: torch.dtype = torch.float32,
        compile: bool = True,
        graph: bool = True,
        **keywords,
    ):
        super().__init__(*arguments, **keywords)
        assert not self.stochastic
        self.graph_wanted = graph
        # Perturbations of the form a g + b v are kernels too, and the whole step is one graph.
        self.remembers = hasattr(self.perturb, "coefficients") and not getattr(self.perturb, "faithful", False)
        self.inline = self.perturb is None or self.perturb is sam or self.remembers
        several = self.perturb is not None and (self.chunk == 0 or self.chunk >= 2 * self.m > 0)
        self.dtypes = [
            products if is_kernel(n, p) and (several or aligned(p)) else torch.float32
            for n, p in zip(self.names, self.params, strict=True)
        ]
        # A kernel launch serves leaves of one dtype.
        self.dtype_groups = [
            [i for i, d in enumerate(self.dtypes) if d == dtype] for dtype in dict.fromkeys(self.dtypes)
        ]
        device = self.params[0].device
        self.tables = [
            kernels.PointerTable([self.params[i].numel() for i in same], device) for same in self.dtype_groups
        ]
        self.views, self.second_views = (
            [strided_like(p, v) for p, v in zip(self.params, views, strict=True)] if views else []
            for views in (self.views, self.second_views)
        )
        self.weights = [p.detach() for p in self.params]
        self.clean = [
            w if d == torch.float32 else torch.empty_like(w, dtype=d)
            for w, d in zip(self.weights, self.dtypes, strict=True)
        ]
        self.v = [torch.zeros_like(w) for w in self.weights] if self.remembers else []
        self.rho = torch.zeros((), device=device)
        if compile:
            logging.getLogger("torch._inductor.select_algorithm").setLevel(logging.ERROR)  # a line a batched product
            self.objective = torch.compile(self.objective, dynamic=False)
        self.lanes = LANES if self.inline and self.perturb is not None and not self.keep_clean else 1
        self.sides = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(self.lanes - 1)]
        self.chunks: dict[int, Chunk] = {}  # by their images; 0: a group that is cut in others
        self.losses = torch.zeros(2, device=device)  # of such a group, in either pass
        self.size, self.pool = 0, None  # of the batch; of all graphs

    # ---- the step ----------------------------------------------------------------------------------------------------

    def images_per_pass(self, groups: int, m: int) -> int:
        """Images in a pass: several whole groups, one, or a micro-batch."""
        if self.perturb is None or 0 < self.chunk < 2 * m or groups == 1:
            return super().images_per_pass(groups, m)
        assert not self.buffers, "running statistics cannot be batched"
        return min(self.chunk // m or groups, groups) * m

    def _local(self, batch: tuple[Tensor, ...], rho: float, seed: int) -> tuple[dict[str, Tensor], int]:
        """This rank's part of the step into the flat buffer; its running statistics, summed over so many groups."""
        groups, m = self.groups_of(batch)
        images = self.images_per_pass(groups, m)
        self.rho.fill_(rho)
        self._cast()
        if self.remembers and self.perturb.v is not None:  # pyright: ignore[reportOptionalMemberAccess]
            torch._foreach_copy_(self.v, self.perturb.v)  # pyright: ignore[reportOptionalMemberAccess]
        if len(batch[0]) != self.size:
            self._forget()
            self.size = len(batch[0])
        work = [
            (cut(part, images), group_seed(seed, self.rank * groups + i * max(images // m, 1)))
            for i, part in enumerate(cut(batch, max(images, m)))
        ]
        if not self.chunks:
            self._allocate([part for parts, _ in work for part in parts], images, m)
            some = [(shapes(parts), seed) for parts, seed in (*work[: self.lanes], work[-1])]
            self._warm_up(lambda: self._sweep(some, rho))
        if images < self.size or self.keep_clean:
            self.flat.zero_()
        return self._sweep(work, rho), groups

    def _sweep(self, work: list[tuple[list[tuple], int]], rho: float) -> dict[str, Tensor]:
        """Chunks of some groups into the flat buffer, each with its seed; their running statistics, summed.

        Args:
            work: (one chunk of whole groups, or the micro-batches of one group; seed of the first group).
        """
        totals = {name: torch.zeros_like(b) for name, b in self.buffers.items()}
        for (parts, seed), *more in bundles(work, 1 if 0 in self.chunks else self.lanes):
            if 0 in self.chunks:
                self._group_in_parts(parts, rho, seed)
                continue
            chunk = self.chunks[len(parts[0][0])].load(parts[0])
            chunks = [chunk, *(twin.load(p[0]) for twin, (p, _) in zip(chunk.twins, more, strict=False))]
            for each in chunks:
                self._each(torch._foreach_copy_, each.work[0], self.buffers)
            if more:
                self._run(chunk, f"step of {len(chunks)}", lambda _, chunks=chunks: self._together(chunks))
            elif self.inline:
                self._run(chunk, "step", self._whole)
            else:
                self._run(chunk, "clean", self._clean)
                self._perturb_eagerly(chunk, rho, seed)
                self._run(chunk, "robust", self._robust)
            for each in chunks:
                self._each(torch._foreach_add_, totals, each.work[0])
        return totals

    def _group_in_parts(self, parts: list[tuple], rho: float, seed: int) -> None:
        """One group, accumulated over micro-batches: g over all of them, one perturbation, g_p over all of them."""
        group = self.chunks[0]
        torch._foreach_zero_([*group.g, *group.g_p, self.losses])
        for part in parts:
            self._run(self.chunks[len(part[0])].load(part), "clean", self._add_clean)
        self._run(group, "perturb", self._finish_clean)
        if self.perturb is None:
            return
        if not self.inline:
            self._perturb_eagerly(group, rho, seed)
        for part in parts:
            self._run(self.chunks[len(part[0])].load(part), "robust", self._add_robust)
        self._run(group, "direction", self._direction)

    def _allocate(self, parts: list[tuple], images: int, m: int) -> None:
        """Chunks for all parts, with static memory: before anything is freed that it could break up."""
        robust = self.perturb is not None
        memory, *others = [  # of the perturbed leaves of the largest chunk, in each lane
            [
                torch.empty(max(images // m, 1) * w.numel(), dtype=d, device=w.device)
                for w, d in zip(self.weights if robust else [], self.dtypes, strict=False)
            ]
            for _ in range(self.lanes if images >= m else 1)
        ]
        for part in shapes(parts):
            self.chunks[len(part[0])] = chunk = self._chunk(part, memory, m)
            chunk.twins = [self._chunk(part, other, m) for other in others]
        if images < m:
            self.chunks[0] = group = self._chunk((), memory, m)
            group.g = [torch.zeros_like(w) for w in self.weights]
            group.g_p = [torch.zeros_like(w) for w in self.weights] if robust else []
            group.loss, group.loss_p = self.losses

    def _chunk(self, part: tuple[Tensor, ...], memory: Tensors, m: int) -> Chunk:
        """A chunk for images like these; () is a whole group that is cut in others."""
        images = len(part[0]) if part else 0
        lead = (images // m,) if images >= 2 * m else ()
        perturbed = [
            space.as_strided((*lead, *w.shape), (*(w.numel() for _ in lead), *w.stride()))
            for space, w in zip(memory, self.weights, strict=False)
        ]
        return Chunk(
            groups=max(images // m, 1),
            share=min(images / m, 1.0),
            weight=m / (self.size * self.world),
            add=max(images, m) < self.size,
            inputs=[torch.empty_like(t) for t in part],
            clean=[w.expand(*lead, *w.shape) for w in self.clean],
            perturbed=perturbed,
            work=[{n: b.clone() for n, b in self.buffers.items()} for _ in range(2)],
        )

    def _forget(self) -> None:
        """Drop the graphs, their pool, and their static memory."""
        self.chunks, self.pool = {}, None
        for table in self.tables:
            table.forget()

    def _cast(self) -> None:
        """The weights in the dtype that products read."""
        for same, table in zip(self.dtype_groups, self.tables, strict=True):
            if self.dtypes[same[0]] != torch.float32:
                kernels.perturb(table, pick(self.weights, same), None, pick(self.clean, same), None)

    def _warm_up(self, work: Callable[[], object]) -> None:
        """Do some work a few times without graphs, on a side stream: what is compiled, tuned and allocated once.

        All of it comes before the first capture, which gives the memory of its passes back.
        """
        if not self.graph_wanted:
            return
        self.graph_wanted, stream = False, torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    work()
        finally:
            self.graph_wanted = True
        torch.cuda.current_stream().wait_stream(stream)
        for images, chunk in self.chunks.items():
            if images:
                chunk.g, chunk.g_p = [], []

    def _run(self, chunk: Chunk, name: str, body: Callable[[Chunk], None]) -> None:
        """A part of the step: captured when it is wanted first, and replayed."""
        if not self.graph_wanted:
            body(chunk)
            return
        if name not in chunk.replays:
            graph = torch.cuda.CUDAGraph()
            # One pool for all graphs: they never run at the same time, and what one leaves for the next is alive while
            # that is captured. Only this thread's calls are captured: the loader's go on allocating and copying.
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                body(chunk)
            for table in self.tables:
                table.flush()
            chunk.replays[name] = graph.replay
        chunk.replays[name]()

    # ---- parts of the step: what graphs are made of ------------------------------------------------------------------

    def _whole(self, chunk: Chunk) -> None:
        """One chunk of whole groups, from its images to the flat buffer."""
        self._clean(chunk)
        if self.perturb is not None:
            self._robust(chunk)
        chunk.g, chunk.g_p = [], []  # hold no gradients longer than the step does

    def _together(self, chunks: list[Chunk]) -> None:
        """Some chunks side by side, each on a stream of its own; into the flat buffer one after the other."""
        sides: list[Any] = self.sides[: len(chunks) - 1]
        here = torch.cuda.current_stream() if sides[0] else None
        for side in filter(None, sides):
            side.wait_stream(here)
        for chunk, side in zip(chunks, [None, *sides], strict=True):
            with torch.cuda.stream(side):  # None is the stream that we are on
                self._clean(chunk)
                chunk.loss_p, chunk.g_p = self._differentiate(chunk, chunk.perturbed, chunk.work[1])
        for side in filter(None, sides):
            here.wait_stream(side)  # pyright: ignore[reportOptionalMemberAccess]
        for chunk in chunks:
            self._direction(chunk)
            chunk.g, chunk.g_p = [], []

    def _clean(self, chunk: Chunk) -> None:
        """The pass at w, and w + eps where a kernel makes it."""
        chunk.loss, chunk.g = self._differentiate(chunk, chunk.clean, chunk.work[0])
        self._finish_clean(chunk)

    def _robust(self, chunk: Chunk) -> None:
        """The pass at w + eps, and the direction into the flat buffer."""
        chunk.loss_p, chunk.g_p = self._differentiate(chunk, chunk.perturbed, chunk.work[1])
        self._direction(chunk)

    def _add_clean(self, chunk: Chunk) -> None:
        """The pass at w of a micro-batch, added to the group's."""
        self._accumulate(chunk, 0, *self._differentiate(chunk, chunk.clean, {}))

    def _add_robust(self, chunk: Chunk) -> None:
        """The pass at w + eps of a micro-batch, added to the group's."""
        self._accumulate(chunk, 1, *self._differentiate(chunk, chunk.perturbed, {}))

    def _accumulate(self, chunk: Chunk, number: int, loss: Tensor, g: Tensors) -> None:
        """Loss and gradient of a micro-batch into the group's."""
        group = self.chunks[0]
        share = self.rho.new_full((1,), chunk.share)
        self.losses[number] += chunk.share * loss
        self._combine(g, None, share, torch.zeros_like(share), group.g_p if number else group.g, add=True)

    def _finish_clean(self, chunk: Chunk) -> None:
        """What follows from g of whole groups: ||g||^2, the flat buffer's share of g, and w + eps."""
        g, groups = chunk.g, chunk.groups
        chunk.gg = gg = self._sum(lambda same, table: kernels.squares(table, pick(g, same), groups))
        one, zero = torch.full_like(gg, chunk.weight), torch.zeros_like(gg)
        if self.perturb is None:
            self._combine(g, None, one, zero, self.views, add=chunk.add)
            self._report(chunk, chunk.loss, gg, zero + 1)
            return
        if self.keep_clean:
            self._combine(g, None, one, zero, self.second_views, add=True)
        if not self.inline:
            return
        a, b = self.rho / (gg.sqrt() + STABILITY), None
        if self.remembers:
            gv, vv = self._sum(
                lambda same, table: torch.stack(
                    kernels.inner(table, pick(g, same), pick(self.v, same), groups, shared=True)
                )
            )
            a, b = self.perturb.coefficients(gg, gv, vv, self.rho)
        for same, table in zip(self.dtype_groups, self.tables, strict=True):
            v = pick(self.v, same) if self.remembers else None
            w, perturbed = pick(self.weights, same), pick(chunk.perturbed, same)
            kernels.perturb(table, w, pick(g, same), perturbed, a, v=v, b=b)

    @torch.no_grad()
    def _perturb_eagerly(self, chunk: Chunk, rho: float, seed: int) -> None:
        """w + eps of each group by a perturbation that is no kernel: in fp32, between the graphs."""
        for i in range(chunk.groups):
            g, perturbed = chunk.g, chunk.perturbed
            if chunk.groups > 1:
                g, perturbed = [x[i] for x in g], [x[i] for x in perturbed]
            eps = self._perturbation([x.float() for x in g], rho, seed + i)
            torch._foreach_add_(eps, self.weights)
            torch._foreach_copy_(perturbed, eps)

    def _direction(self, chunk: Chunk) -> None:
        """What follows from g and g_p of whole groups: the direction and the metrics into the flat buffer."""
        g, g_p, gg = chunk.g, chunk.g_p, chunk.gg
        ggp, gpgp = self._sum(
            lambda same, table: torch.stack(kernels.inner(table, pick(g, same), pick(g_p, same), chunk.groups))
        )
        a, b = self.combine(gg, ggp, gpgp, self.alpha)
        used = [not isinstance(x, float) or x != 0 for x in (a, b)]
        a, b = (torch.zeros_like(gg) + x * chunk.weight for x in (a, b))
        self._combine(g if used[0] else None, g_p if used[1] else None, a, b, self.views, add=chunk.add)
        self._report(chunk, chunk.loss_p, gpgp, ratio(ggp, (gg * gpgp).sqrt()))

    def _sum(self, part: Callable[[list[int], kernels.PointerTable], Tensor]) -> Tensor:
        """A reduction's parts over the leaves of each dtype, summed."""
        return torch.stack([part(same, table) for same, table in zip(self.dtype_groups, self.tables, strict=True)]).sum(
            0
        )

    def _combine(
        self, g: Tensors | None, g_p: Tensors | None, a: Tensor, b: Tensor, out: Tensors, *, add: bool
    ) -> None:
        for same, table in zip(self.dtype_groups, self.tables, strict=True):
            kernels.combine(table, g and pick(g, same), g_p and pick(g_p, same), pick(out, same), a=a, b=b, add=add)

    def _report(self, chunk: Chunk, loss_p: Tensor, gpgp: Tensor, cosine: Tensor) -> None:
        """The metrics of a chunk's groups, summed. A loss is the mean over them already."""
        losses = [loss.expand_as(cosine) for loss in (chunk.loss, loss_p)]
        sums = metrics_of(*losses, chunk.gg, gpgp, cosine).sum(1) * chunk.weight
        self.metrics.add_(sums) if chunk.add else self.metrics.copy_(sums)

    def _differentiate(self, chunk: Chunk, leaves: Tensors, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensors]:
        """Mean loss and each group's gradient at `leaves` on a chunk's images, in memory laid out as the weights'."""
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        loss = self.objective(dict(zip(self.names, leaves, strict=True)) | buffers, *chunk.inputs)
        total = loss * chunk.groups  # the sum over groups of their mean losses
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach(), [laid_out(g, w) for g, w in zip(grads, self.weights, strict=True)]


def bundles(work: list[tuple[list[tuple], int]], most: int) -> Iterator[list[tuple[list[tuple], int]]]:
    """Neighbours of equal size, in at most so many at once."""
    for _, same in itertools.groupby(work, lambda one: len(one[0][0][0])):
        while some := list(itertools.islice(same, most)):
            yield some


def shapes(parts: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """One part of each number of images."""
    return list({len(part[0]): part for part in parts}.values())


def pick(tensors: Tensors, indices: list[int]) -> Tensors:
    """The tensors of one dtype."""
    return [tensors[i] for i in indices]


def strided_like(p: Tensor, storage: Tensor) -> Tensor:
    """A view of the contiguous `storage` with the strides of `p`, which may be channels-last."""
    return storage.view(-1).as_strided(p.shape, p.stride(), storage.storage_offset())


def laid_out(g: Tensor, w: Tensor) -> Tensor:
    """`g`, perhaps with a leading dimension of groups, strided as `w` within a group; copied only if it is not."""
    strides = w.stride() if g.ndim == w.ndim else (w.numel(), *w.stride())
    return (
        g if g.stride() == strides else torch.empty_strided(g.shape, strides, dtype=g.dtype, device=g.device).copy_(g)
    )
