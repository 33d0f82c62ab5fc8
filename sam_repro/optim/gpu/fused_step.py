"""The two-pass engine on an NVIDIA GPU: the same gradient with as few bytes and launches as the method allows.

Three things make it cheap. (1) What a product reads is kept in the dtype that it reads: under bf16 autocast the
leaves of matrices and convolutions are bf16 tensors, so no pass casts them and their gradients move half the bytes. The
values are those of autocast, which rounds w + eps to bf16 in the same way. (2) Norm, perturbation, inner products
and combination are one fused pass each (kernels.py). (3) Everything between the input copy and the gradient is
captured once in a CUDA graph and replayed; in two, with the perturbation between them, where that is neither SAM's nor
Eigen-SAM's.

Groups of m images run either one after the other ("loop") or all at once ("batched", grouped.py): in the clean pass
they share the weights, in the robust pass every layer multiplies each group with its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam_repro.optim.base_optimizer import is_kernel
from sam_repro.optim.combinations import ratio
from sam_repro.optim.gpu import triton_kernels as kernels
from sam_repro.optim.perturbations import STABILITY, Tensors, group_seed, sam
from sam_repro.optim.two_pass import GradientStep

WARMUP = 3  # calls before capture: compilation, autotuning, workspaces


def aligned(weight: Tensor) -> bool:
    """Whether rows and columns of a matrix in bf16 begin at multiples of 16 bytes.

    Others, such as those over a Mixer's 49 tokens, stay in fp32, so that the compiled pass can cast and pad them at
    once. It did not make Mixer-B/32 faster (benchmarks/NOTES.md).
    """
    return weight.ndim != 2 or all(side % 8 == 0 for side in weight.shape)


class FusedStep(GradientStep):
    """GradientStep for any perturbation with a linear combination, fp32 parameters on one CUDA device.

    Args (besides GradientStep's):
        groups: "loop" | "batched". "batched" gives the objective parameters with a leading dimension of groups
            (grouped.py), the whole local batch, and wants the mean loss over all of it; no buffers.
        products: dtype of the leaves of matrices and convolutions: bf16 under autocast, else fp32.
        compile: torch.compile the passes.
        graph: capture in a CUDA graph; off for debugging.
    """

    def __init__(
        self,
        *arguments,
        groups: str = "loop",
        products: torch.dtype = torch.float32,
        compile: bool = True,
        graph: bool = True,
        **keywords,
    ):
        super().__init__(*arguments, **keywords)
        assert not self.stochastic and groups in ("loop", "batched")
        assert groups == "loop" or not self.buffers, "running statistics cannot be batched"
        self.batched, self.graph_wanted = groups == "batched", graph
        # Perturbations of the form a g + b v are kernels too, and the whole step is one graph.
        self.remembers = hasattr(self.perturb, "coefficients") and not getattr(self.perturb, "faithful", False)
        self.inline = self.perturb is None or self.perturb is sam or self.remembers
        dtypes = [
            products if is_kernel(n, p) and (self.batched or aligned(p)) else torch.float32
            for n, p in zip(self.names, self.params, strict=True)
        ]
        # One class of leaves a dtype: a kernel launch serves one class.
        self.classes = [[i for i, d in enumerate(dtypes) if d == dtype] for dtype in dict.fromkeys(dtypes)]
        device = self.params[0].device
        self.tables = [kernels.Table([self.params[i].numel() for i in c], device) for c in self.classes]
        self.views, self.second_views = (
            [strided_like(p, v) for p, v in zip(self.params, views, strict=True)] if views else []
            for views in (self.views, self.second_views)
        )
        self.weights = [p.detach() for p in self.params]
        self.clean = [
            w if d == torch.float32 else torch.empty_like(w, dtype=d) for w, d in zip(self.weights, dtypes, strict=True)
        ]
        self.dtypes, self.adversary = dtypes, []
        self.v = [torch.zeros_like(w) for w in self.weights] if self.remembers else []
        self.rho = torch.zeros((), device=device)
        if compile:
            logging.getLogger("torch._inductor.select_algorithm").setLevel(logging.ERROR)  # a line a batched product
            self.objective = torch.compile(self.objective, dynamic=False)
        self.slots: list[Tensor] = []
        self.work: list[dict[str, Tensor]] = []
        self.clean_result: Any = None  # (loss, g, ||g||^2 of each group) of the clean pass
        self.replays: dict[str, Callable[[], None]] = {}

    # ---- the step ----------------------------------------------------------------------------------------------------

    def __call__(self, *batch: Tensor, rho: float = 0.0, seed: int = 0) -> Tensor:
        """Leave the gradient of `batch` in .grad; return the METRICS as one tensor on the device."""
        self.count, m = self.groups_of(batch)
        if self.before is not None:
            self.before(*batch)
        self.rho.fill_(rho)
        if not self.slots:
            self._allocate(batch, m)
        if not self.batched or self.keep_clean:
            self.flat.zero_()
        self._cast()
        if self.remembers and self.perturb.v is not None:  # pyright: ignore[reportOptionalMemberAccess]
            torch._foreach_copy_(self.v, self.perturb.v)  # pyright: ignore[reportOptionalMemberAccess]
        after = {name: torch.zeros_like(b) for name, b in self.buffers.items()}
        chunks = [batch] if self.batched else list(zip(*(t.split(m) for t in batch), strict=True))
        for i, chunk in enumerate(chunks):
            for slot, tensor in zip(self.slots, chunk, strict=True):
                slot.copy_(tensor, non_blocking=True)
            self._each(torch._foreach_copy_, self.work[0], self.buffers)
            if self.inline:
                self._run("step", self._whole)
            else:
                self._run("clean", self._clean)
                self._look(rho, group_seed(seed, self.rank * self.count + i))
                self._run("robust", self._robust)
            self._each(torch._foreach_add_, after, self.work[0])
        self._keep_buffers(after, len(chunks))
        self._reduce()
        self._after_reduction()
        for p, view in zip(self.params, self.views, strict=True):
            p.grad = view
        return self.metrics

    def _allocate(self, batch: tuple[Tensor, ...], m: int) -> None:
        """Input slots, perturbed copies and working statistics: static addresses for the graph."""
        images = m * self.count if self.batched else m
        self.slots = [torch.empty_like(t[:images]) for t in batch]
        if self.batched:
            self.clean = [w.expand(self.count, *w.shape) for w in self.clean]
        if self.perturb is not None:
            lead = (self.count,) if self.batched else ()
            for w, d in zip(self.weights, self.dtypes, strict=True):
                memory = torch.empty((lead or (1,))[0] * w.numel(), dtype=d, device=w.device)
                strides = (w.numel(), *w.stride()) if lead else w.stride()
                self.adversary.append(memory.as_strided((*lead, *w.shape), strides))
        self.work = [{n: b.clone() for n, b in self.buffers.items()} for _ in range(2)]

    def _cast(self) -> None:
        """The weights in the dtype that products read."""
        for c, table in zip(self.classes, self.tables, strict=True):
            if self.dtypes[c[0]] != torch.float32:
                kernels.perturb(table, pick(self.weights, c), None, pick(self.clean, c), None)

    def _run(self, name: str, body: Callable[[], None]) -> None:
        """A part of the step: eagerly for the first calls, then captured, then replayed."""
        if not self.graph_wanted:
            body()
            return
        if name not in self.replays:
            # Warm up and capture on a side stream; undo what the warm-ups added.
            flat, work = self.flat.clone(), [{n: b.clone() for n, b in w.items()} for w in self.work]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    body()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are captured: the loader's threads go on allocating and copying.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                body()
            for table in self.tables:
                table.flush()
            self.replays[name] = graph.replay
            self.flat.copy_(flat)
            for ours, before in zip(self.work, work, strict=True):
                for key, b in before.items():
                    ours[key].copy_(b)
        self.replays[name]()

    def _whole(self) -> None:
        """One group, or all of them batched: from the slots to the flat buffer."""
        self._clean()
        if self.perturb is not None:
            _, g, gg = self.clean_result
            a, b = self.rho / (gg.sqrt() + STABILITY), None
            if self.remembers:
                both = self._sum(
                    lambda c, table: torch.stack(
                        kernels.inner(table, pick(g, c), pick(self.v, c), self.groups, shared=True)
                    )
                )
                a, b = self.perturb.coefficients(gg, both[0], both[1], self.rho)
            for c, table in zip(self.classes, self.tables, strict=True):
                v = pick(self.v, c) if self.remembers else None
                kernels.perturb(table, pick(self.weights, c), pick(g, c), pick(self.adversary, c), a, v=v, b=b)
            self._robust()
        self.clean_result = None  # hold no gradients longer than the step does

    def _clean(self) -> None:
        """The pass at w: loss, g and ||g||^2 of each group."""
        loss, g = self._pass(self.clean, self.work[0])
        gg = self._sum(lambda c, table: kernels.squares(table, pick(g, c), self.groups))
        self.clean_result = (loss, g, gg)
        if self.perturb is None:
            one, zero = torch.full_like(gg, self.weight), torch.zeros_like(gg)
            self._combine(g, None, one, zero, self.views, add=not self.batched)
            self._report([loss, loss, zero, zero + 1, gg.sqrt(), gg.sqrt()])
        elif self.keep_clean:
            one = torch.full_like(gg, self.weight)
            self._combine(g, None, one, torch.zeros_like(one), self.second_views, add=True)

    @torch.no_grad()
    def _look(self, rho: float, seed: int) -> None:
        """The adversary of each group, w + eps, by a perturbation that is no kernel: in fp32, between the graphs."""
        for i in range(self.groups):
            g, adversary = self.clean_result[1], self.adversary
            if self.batched:
                g, adversary = [x[i] for x in g], [x[i] for x in adversary]
            eps = self._perturbation([x.float() for x in g], rho, seed + i)
            torch._foreach_add_(eps, self.weights)
            torch._foreach_copy_(adversary, eps)

    def _robust(self) -> None:
        """The pass at w + eps, and the direction into the flat buffer."""
        loss, g, gg = self.clean_result
        loss_p, g_p = self._pass(self.adversary, self.work[1])
        both = self._sum(lambda c, table: torch.stack(kernels.inner(table, pick(g, c), pick(g_p, c), self.groups)))
        ggp, gpgp = both[0], both[1]
        a, b = self.combine(gg, ggp, gpgp, self.alpha)
        used = [not isinstance(x, float) or x != 0 for x in (a, b)]
        a, b = (torch.zeros_like(gg) + x * self.weight for x in (a, b))
        self._combine(g if used[0] else None, g_p if used[1] else None, a, b, self.views, add=not self.batched)
        cosine = ratio(ggp, (gg * gpgp).sqrt())
        self._report([loss, loss_p, loss_p - loss, cosine, gg.sqrt(), gpgp.sqrt()])

    @property
    def groups(self) -> int:
        """Groups that one pass holds."""
        return self.count if self.batched else 1

    @property
    def weight(self) -> float:
        """Of one group in the mean over all of them."""
        return 1 / (self.count * self.world)

    def _sum(self, part: Callable[[list[int], kernels.Table], Tensor]) -> Tensor:
        """A reduction's parts over the classes of leaves, summed."""
        return torch.stack([part(c, table) for c, table in zip(self.classes, self.tables, strict=True)]).sum(0)

    def _combine(
        self, g: Tensors | None, g_p: Tensors | None, a: Tensor, b: Tensor, out: Tensors, *, add: bool
    ) -> None:
        for c, table in zip(self.classes, self.tables, strict=True):
            kernels.combine(table, g and pick(g, c), g_p and pick(g_p, c), pick(out, c), a=a, b=b, add=add)

    def _report(self, values: list[Tensor]) -> None:
        """Means over groups into the metrics. A batched loss is the mean over all groups already."""
        means = torch.stack([v.mean() for v in values])
        if self.batched:
            self.metrics.copy_(means / self.world)
        else:
            self.metrics.add_(means, alpha=self.weight)

    def _pass(self, leaves: Tensors, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensors]:
        """Loss and gradients at `leaves` on the images in the slots, laid out in memory as the weights are."""
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        loss = self.objective(dict(zip(self.names, leaves, strict=True)) | buffers, *self.slots)
        total = loss * self.count if self.batched else loss  # the sum over groups of their mean losses
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach(), [laid_out(g, w) for g, w in zip(grads, self.weights, strict=True)]


def pick(tensors: Tensors, indices: list[int]) -> Tensors:
    """The tensors of one class."""
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
