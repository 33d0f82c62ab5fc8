"""The two-pass engine: one method's gradient of one batch, in p.grad, for any number of ranks.

Most sharpness-aware methods have no state of their own: the perturbation lives for half a step. So the engine is a
function of the weights that leaves a gradient behind, and a plain torch optimizer owns its state. The few methods that
remember something (a running mean, an eigenvector) say so in state_dict(). The weights themselves are never written:
the robust pass reads a perturbed copy, so that the weights after a step are bitwise those before it, whatever happens
in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sam_repro.optim.combinations import COMBINATIONS, THREE_PASSES, Coefficient, ratio
from sam_repro.optim.memory import cut, halving
from sam_repro.optim.perturbations import Perturbation, Tensors, build_perturbation, group_seed, inner, squared_norm

# Mean loss of some images: objective(params | buffers, *batch) -> 0-d tensor.
Objective = Callable[..., Tensor]

ALIGN = 4  # elements: every part of the flat buffer starts at 16 bytes or more, what a vectorised load wants
# What a step reports, in this order; means over all groups of all ranks.
METRICS = ("loss", "loss_robust", "surrogate_gap", "cosine", "grad_norm", "grad_norm_robust")
T = TypeVar("T")


def metrics_of(loss: Tensor, loss_p: Tensor, gg: Tensor, gpgp: Tensor, cosine: Tensor) -> Tensor:
    """METRICS from f, f_p, ||g||^2, ||g_p||^2 and cos(g, g_p): (6,) from 0-d tensors."""
    return torch.stack([loss, loss_p, loss_p - loss, cosine, gg.sqrt(), gpgp.sqrt()])


class GradientStep:
    """Compute one method's gradient of a batch and leave it in the parameters' .grad.

    The batch of this rank is cut into consecutive groups of `m` images. For each group, from the same weights w:

        g = grad f(w),  eps = perturb(w, g, rho),  g_p = grad f(w + eps),  d = combine(g, g_p)

    and the result is the mean of d over all groups of all ranks, reduced once. m = 64 is the reference's batch per
    device, where each device perturbs and decomposes on its own (GSAM's official train.py; D-01). The result
    depends on the batch and on m, but not on the number of ranks or passes.

    No pass takes more than `chunk` images. Where that is less than a group, the group's gradient is accumulated over
    micro-batches: g over all of them, then one perturbation, then g_p. If a step runs out of memory, it halves
    `chunk`, says so in a sentence and starts again; later steps keep the smaller `chunk`.

    Running statistics of BatchNorm see the clean pass only, and are the mean over groups of what each group alone
    would have left: the reference's average over devices. When `stochastic`, both passes draw the same dropout
    masks, from a generator seeded by the caller's `seed` and the group's global number; below a group also by the
    micro-batch's number in it, so that dropout (and nothing else) depends on `chunk` there.

    What a perturbation remembers is fixed during a step and updated after the reduction with the mean of g over all
    groups, so that it too is the same for any number of ranks.

    Args:
        objective: (params | buffers, *batch) -> mean loss of the images, a 0-d tensor. May update buffers in place.
        params: the trainable parameters by name, all of one dtype and device. Their .grad becomes a view of one
            flat buffer, which the reduction and the clipping work on.
        buffers: tensors that the objective reads and may update, such as running statistics.
        perturb: a name in PERTURBATIONS, a perturbation, or "none" for the clean gradient alone.
        combine: a name in COMBINATIONS or THREE_PASSES.
        alpha: the combination's weight.
        beta: CR-SAM's second weight.
        decoupled: leave g in .grad, and d - g to `apply_decoupled_`, which subtracts it from the weights without the
            base optimizer: WSAM's default form.
        pre_step: called with the batch before every step; renews Eigen-SAM's eigenvector. Its state is the step's.
        m: images per group; 0 takes the whole local batch.
        chunk: images per pass at most; 0 sets no limit. With running statistics at least m.
        all_reduce: sums a flat tensor over the ranks in place; None for one rank.
        reduce_dtype: what the gradient is rounded to for the reduction; None is its own dtype.
        rank, world: this process among them.
        stochastic: whether the objective draws random numbers.

    Raises:
        ValueError: for an unknown name; when called, if m does not divide the batch, or with running statistics if
            `chunk` is less than m.
    """

    def __init__(
        self,
        objective: Objective,
        params: Mapping[str, Tensor],
        *,
        buffers: Mapping[str, Tensor] | None = None,
        perturb: str | Perturbation = "none",
        combine: str = "robust",
        alpha: float = 0.0,
        beta: float = 0.0,
        decoupled: bool = False,
        pre_step: Callable[..., None] | None = None,
        m: int = 0,
        chunk: int = 0,
        all_reduce: Callable[[Tensor], None] | None = None,
        reduce_dtype: torch.dtype | None = None,
        rank: int = 0,
        world: int = 1,
        stochastic: bool = False,
    ):
        if isinstance(perturb, str):
            perturb = build_perturbation(perturb) if perturb != "none" else None  # pyright: ignore[reportAssignmentType]
        if combine not in COMBINATIONS | THREE_PASSES:
            raise ValueError(f"unknown combination '{combine}': {', '.join(COMBINATIONS | THREE_PASSES)}")
        self.objective = objective
        self.names = list(params)
        self.params = [params[name] for name in self.names]
        self.buffers = dict(buffers or {})
        self.perturb: Perturbation | None = perturb  # pyright: ignore[reportAttributeAccessIssue]
        self.combine: Any = (COMBINATIONS | THREE_PASSES)[combine]
        self.three_passes = combine in THREE_PASSES
        self.alpha, self.beta, self.decoupled, self.pre_step, self.m = alpha, beta, decoupled, pre_step, m
        self.chunk = chunk
        self.all_reduce, self.reduce_dtype = all_reduce, reduce_dtype
        self.rank, self.world, self.stochastic = rank, world, stochastic
        self.plan: Any = None  # of its passes and their memory, for whoever made one
        self.robust = self.perturb is not None  # whether the next step has a robust pass

        # One buffer for gradient and metrics, so that one reduction carries both; a second gradient between them where
        # the method needs the mean of g and the mean of d (or, decoupled, the mean of d - g and that of g).
        sizes = [-(-p.numel() // ALIGN) * ALIGN for p in self.params]
        self.keep_clean = not decoupled and self._wants_clean()
        second = sum(sizes) if decoupled or self.keep_clean else 0
        self.flat = self.params[0].new_zeros(sum(sizes) + second + len(METRICS))
        self.gradient, self.second, self.metrics = self.flat.split([sum(sizes), second, len(METRICS)])
        self.views, self.second_views = (
            [v[: p.numel()].view_as(p) for v, p in zip(flat.split(sizes), self.params, strict=True)]
            if len(flat)
            else []
            for flat in (self.gradient, self.second)
        )

    def __call__(self, *batch: Tensor, rho: float = 0.0, seed: int = 0) -> Tensor:
        """Leave the gradient of `batch` in .grad; return the METRICS as one tensor on the device."""
        if self.pre_step is not None:
            self.pre_step(*batch)
        self._keep_buffers(*self._with_memory(batch, lambda: self._local(batch, rho, seed)))
        self._reduce()
        self._after_reduction()
        return self._publish()

    def _local(self, batch: tuple[Tensor, ...], rho: float, seed: int) -> tuple[dict[str, Tensor], int]:
        """This rank's part of the step into the flat buffer; its running statistics, summed over so many groups."""
        groups, m = self.groups_of(batch)
        self.flat.zero_()
        totals = {name: torch.zeros_like(b) for name, b in self.buffers.items()}
        for i, group in enumerate(cut(batch, m)):
            buffers = {name: b.clone() for name, b in self.buffers.items()}
            self._add_group(group, buffers, rho, group_seed(seed, self.rank * groups + i), 1 / (groups * self.world))
            self._each(torch._foreach_add_, totals, buffers)
        return totals, groups

    def images_per_pass(self, groups: int, m: int) -> int:
        """Images in a pass of a batch of so many groups of m images: those of a group, or fewer."""
        if self.buffers and 0 < self.chunk < m:
            raise ValueError(f"running statistics want all m={m} images of a group in one pass, not {self.chunk}")
        return min(self.chunk or m, m)

    def _with_memory(self, batch: tuple[Tensor, ...], work: Callable[[], T]) -> T:
        """Work of this rank alone, with a smaller `chunk` where memory lacks."""
        groups, m = self.groups_of(batch)
        images = self.images_per_pass(groups, m)

        def attempt(now: int) -> T:
            if now < images:
                self._forget()
                self.chunk = now
            return work()

        return halving(attempt, images, least=m if self.buffers else 1, doing="a pass")[0]

    def _forget(self) -> None:
        """Before a smaller chunk: drop what is kept for the passes of the former one."""

    def _publish(self) -> Tensor:
        """The gradient in .grad; the METRICS."""
        for p, view in zip(self.params, self.views, strict=True):
            p.grad = view
        return self.metrics

    def groups_of(self, batch: tuple[Tensor, ...]) -> tuple[int, int]:
        """(groups in a batch, images in each). Raises ValueError where m does not divide it."""
        size = len(batch[0])
        m = self.m or size
        if size % m:
            raise ValueError(f"groups of m={m} images do not divide the local batch of {size}")
        return size // m, m

    def clip_(self, max_norm: float) -> Tensor:
        """Scale the gradient to a global norm of at most `max_norm`; return the norm before. No epsilon (optax)."""
        norm = self.gradient.norm()
        self.gradient.mul_(torch.clamp(max_norm / norm, max=1.0).nan_to_num(1.0))
        return norm

    @torch.no_grad()
    def apply_decoupled_(self, lr: float) -> None:
        """After the base optimizer's step: w <- w - lr (d - g) where the method is decoupled, nothing elsewhere."""
        if self.decoupled:
            torch._foreach_add_(self.params, self.second_views, alpha=-lr)

    def report(self, seconds: float) -> dict[str, float]:
        """What `pre_step` says about its costs, as a share of `seconds`; nothing for most methods."""
        return self.pre_step.report(seconds) if hasattr(self.pre_step, "report") else {}  # pyright: ignore

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps; empty for most."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict()."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        parts = {"perturb": self.perturb, "before": self.pre_step}  # as checkpoints call them
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def _keep_buffers(self, totals: dict[str, Tensor], groups: int) -> None:
        """The running statistics become the mean of what each group alone would have left."""
        if groups > 1:
            for total in totals.values():
                total.div_(groups) if total.is_floating_point() else total.floor_divide_(groups)
        self._each(torch._foreach_copy_, self.buffers, totals)

    def _each(self, operation: Callable, out: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        """out (operation) other for all running statistics: a launch or two a dtype instead of one a tensor."""
        for dtype in dict.fromkeys(b.dtype for b in self.buffers.values()):
            names = [name for name, b in self.buffers.items() if b.dtype == dtype]
            operation([out[name] for name in names], [other[name] for name in names])

    def _reduce(self) -> None:
        """Sum gradient and metrics over the ranks: one reduction, or a rounded one and a small one for the metrics."""
        if self.all_reduce is None:
            return
        if self.reduce_dtype in (None, self.flat.dtype):
            self.all_reduce(self.flat)
            return
        for part in (self.gradient, self.second):
            if len(part):
                rounded = part.to(self.reduce_dtype)
                self.all_reduce(rounded)
                part.copy_(rounded)
        self.all_reduce(self.metrics)

    def _wants_clean(self) -> bool:
        """Whether the mean of g is wanted after a step with a robust pass."""
        return hasattr(self.perturb, "update_memory")

    def _after_reduction(self) -> None:
        """The perturbation's memory, from the mean of g."""
        if hasattr(self.perturb, "update_memory"):
            clean = self.second_views if self.keep_clean and self.robust else self.views
            self.perturb.update_memory(clean)  # pyright: ignore[reportFunctionMemberAccess, reportOptionalMemberAccess]

    def _add_group(self, batch: tuple, buffers: dict[str, Tensor], rho: float, seed: int, weight: float) -> None:
        """Add weight * (direction, metrics) of one group to the flat buffer; `buffers` are updated in place."""
        loss, g = self._grad(self.params, buffers, batch, seed)
        gg = squared_norm(g)
        if self.keep_clean and self.robust:
            torch._foreach_add_(self.second_views, g, alpha=weight)
        if not self.robust:
            torch._foreach_add_(self.views, g, alpha=weight)
            self.metrics.add_(metrics_of(loss, loss, gg, gg, torch.ones_like(gg)), alpha=weight)
            return

        perturbed = self._perturbation(g, rho, seed)
        mirror = torch._foreach_sub(self.params, perturbed) if self.three_passes else None
        torch._foreach_add_(perturbed, self.params)
        loss_p, g_p = self._throwaway_grad(perturbed, buffers, batch, seed)
        del perturbed
        ggp, gpgp = inner(g, g_p), squared_norm(g_p)
        if mirror is None:
            gradients, coefficients = [g, g_p], self.combine(gg, ggp, gpgp, self.alpha)
        else:
            _, g_m = self._throwaway_grad(list(mirror), buffers, batch, seed)
            gradients, coefficients = [g, g_p, g_m], self.combine(self.alpha, self.beta)
        self._add_direction(gradients, list(coefficients), weight)
        self.metrics.add_(metrics_of(loss, loss_p, gg, gpgp, ratio(ggp, (gg * gpgp).sqrt())), alpha=weight)

    def _perturbation(self, g: Tensors, rho: float, seed: int) -> Tensors:
        """eps of one group: new tensors."""
        perturb: Any = self.perturb
        if hasattr(perturb, "reseed"):
            perturb.reseed(seed)
        return getattr(perturb, "eps_from_memory", perturb)(self.params, g, rho)

    def _add_direction(self, gradients: list[Tensors], coefficients: list[Coefficient], weight: float) -> None:
        """Add weight * sum of coefficient * gradient; destroys the gradients."""
        views = self.views
        if self.decoupled:
            torch._foreach_add_(self.views, gradients[0], alpha=weight)
            coefficients[0] = coefficients[0] - 1
            views = self.second_views
        for coefficient, gradient in zip(coefficients, gradients, strict=True):
            if isinstance(coefficient, Tensor):
                torch._foreach_mul_(gradient, coefficient)
                coefficient = 1.0
            if coefficient:
                torch._foreach_add_(views, gradient, alpha=coefficient * weight)

    def _throwaway_grad(
        self, params: Tensors, buffers: dict[str, Tensor], batch: tuple, seed: int
    ) -> tuple[Tensor, Tensors]:
        """Loss and gradient at other weights; the buffers stay as the clean pass left them."""
        return self._grad(params, {name: b.clone() for name, b in buffers.items()}, batch, seed)

    def _grad(self, params: Tensors, buffers: dict[str, Tensor], batch: tuple, seed: int) -> tuple[Tensor, Tensors]:
        """Mean loss and gradient at `params` of one group, accumulated over micro-batches if it exceeds a chunk."""
        size = len(batch[0])
        parts = cut(batch, min(self.chunk or size, size))
        if len(parts) == 1:
            return self._pass(params, buffers, batch, seed)
        mean, total = self.flat.new_zeros(()), [torch.zeros_like(p) for p in self.params]
        for i, part in enumerate(parts):
            loss, g = self._pass(params, buffers, part, group_seed(seed, i))
            share = len(part[0]) / size
            mean += share * loss
            torch._foreach_add_(total, g, alpha=share)
        return mean, total

    def _pass(self, params: Tensors, buffers: dict[str, Tensor], batch: tuple, seed: int) -> tuple[Tensor, Tensors]:
        """Mean loss and gradient at `params`; zeros for parameters that the loss does not reach."""
        if self.stochastic:
            torch.manual_seed(seed)
        leaves = [p.detach().requires_grad_() for p in params]
        loss = self.objective(dict(zip(self.names, leaves, strict=True)) | buffers, *batch)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach().to(self.flat.dtype), list(grads)
