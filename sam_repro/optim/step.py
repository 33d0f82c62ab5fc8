"""The two-pass engine: one method's gradient of one batch, in p.grad, for any number of ranks.

Sharpness-aware methods have no state of their own: the perturbation lives for half a step. So the engine is a
function of the weights that leaves a gradient behind, and a plain torch optimizer owns all the state. The weights
themselves are never written: the robust pass reads a perturbed copy, so that the weights after a step are
bitwise those before it, whatever happens in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sam_repro.optim.combine import COMBINATIONS, ratio
from sam_repro.optim.perturb import PERTURBATIONS, Tensors, inner, squared_norm

# Mean loss of some images: objective(params | buffers, *batch) -> 0-d tensor.
Objective = Callable[..., Tensor]

# What a step reports, in this order; means over all groups of all ranks.
METRICS = ("loss", "loss_robust", "surrogate_gap", "cosine", "grad_norm", "grad_norm_robust")


class GradientStep:
    """Compute one method's gradient of a batch and leave it in the parameters' .grad.

    The batch of this rank is cut in consecutive groups of `m` images. For each group, from the same weights w:

        g = grad f(w),  eps = perturb(w, g, rho),  g_p = grad f(w + eps),  d = combine(g, g_p)

    and the result is the mean of d over all groups of all ranks, reduced once. m = 64 is the reference's batch per
    device, where each device perturbs and decomposes on its own (GSAM's official train.py; D-01). The result
    depends on the batch and on m, not on how many ranks or passes they were spread over.

    Running statistics of BatchNorm see the clean pass only, and are the mean over groups of what each group alone
    would have left: the reference's average over devices. When `stochastic`, both passes draw the same dropout
    masks, from a generator seeded by the caller's `seed` and the group's global number.

    Args:
        objective: (params | buffers, *batch) -> mean loss of the images, a 0-d tensor. May update buffers in place.
        params: the trainable parameters by name, all of one dtype and device. Their .grad becomes a view of one
            flat buffer, which the reduction and the clipping work on.
        buffers: tensors that the objective reads and may update, such as running statistics.
        perturb: a name in PERTURBATIONS, or "none" for the clean gradient alone.
        combine: a name in COMBINATIONS.
        alpha: the combination's weight.
        m: images a group; 0 takes the whole local batch.
        all_reduce: sums a flat tensor over the ranks in place; None for one rank.
        rank, world: this process among them.
        stochastic: whether the objective draws random numbers.

    Raises:
        ValueError: for an unknown name, or (when called) if m does not divide the batch.
    """

    def __init__(
        self,
        objective: Objective,
        params: Mapping[str, Tensor],
        *,
        buffers: Mapping[str, Tensor] | None = None,
        perturb: str = "none",
        combine: str = "robust",
        alpha: float = 0.0,
        m: int = 0,
        all_reduce: Callable[[Tensor], None] | None = None,
        rank: int = 0,
        world: int = 1,
        stochastic: bool = False,
    ):
        if perturb != "none" and perturb not in PERTURBATIONS:
            raise ValueError(f"unknown perturbation '{perturb}': none, {', '.join(PERTURBATIONS)}")
        if combine not in COMBINATIONS:
            raise ValueError(f"unknown combination '{combine}': {', '.join(COMBINATIONS)}")
        self.objective = objective
        self.names = list(params)
        self.params = [params[name] for name in self.names]
        self.buffers = dict(buffers or {})
        self.perturb = None if perturb == "none" else PERTURBATIONS[perturb]
        self.combine, self.alpha, self.m = COMBINATIONS[combine], alpha, m
        self.all_reduce, self.rank, self.world, self.stochastic = all_reduce, rank, world, stochastic

        # One buffer for gradient and metrics, so that one reduction carries both.
        sizes = [p.numel() for p in self.params]
        self.flat = self.params[0].new_zeros(sum(sizes) + len(METRICS))
        self.gradient, self.metrics = self.flat.split([sum(sizes), len(METRICS)])
        self.views = [v.view_as(p) for v, p in zip(self.gradient.split(sizes), self.params, strict=True)]

    def __call__(self, *batch: Tensor, rho: float = 0.0, seed: int = 0) -> Tensor:
        """Leave the gradient of `batch` in .grad; return the METRICS as one tensor on the device."""
        size = len(batch[0])
        m = self.m or size
        if size % m:
            raise ValueError(f"groups of m={m} images do not divide the local batch of {size}")
        groups = size // m
        self.flat.zero_()
        after = [torch.zeros_like(b) for b in self.buffers.values()]
        for i, group in enumerate(zip(*(tensor.split(m) for tensor in batch), strict=True)):
            buffers = {name: b.clone() for name, b in self.buffers.items()}
            self._add_group(group, buffers, rho, seed * 1_000_003 + self.rank * groups + i, 1 / (groups * self.world))
            for total, b in zip(after, buffers.values(), strict=True):
                total.add_(b)
        for b, total in zip(self.buffers.values(), after, strict=True):
            b.copy_(total / groups if b.is_floating_point() else total // groups)
        if self.all_reduce is not None:
            self.all_reduce(self.flat)
        for p, view in zip(self.params, self.views, strict=True):
            p.grad = view
        return self.metrics

    def clip_(self, max_norm: float) -> Tensor:
        """Scale the gradient to a global norm of at most `max_norm`; return the norm before. No epsilon (optax)."""
        norm = self.gradient.norm()
        self.gradient.mul_(torch.clamp(max_norm / norm, max=1.0).nan_to_num(1.0))
        return norm

    def _add_group(self, batch: tuple, buffers: dict[str, Tensor], rho: float, seed: int, weight: float) -> None:
        """Add weight * (direction, metrics) of one group to the flat buffer; `buffers` are updated in place."""
        loss, g = self._grad(self.params, buffers, batch, seed)
        gg = squared_norm(g)
        if self.perturb is None:
            torch._foreach_add_(self.views, g, alpha=weight)
            zero = torch.zeros_like(loss)
            self.metrics.add_(torch.stack([loss, loss, zero, zero + 1, gg.sqrt(), gg.sqrt()]), alpha=weight)
            return

        adversary = self.perturb(self.params, g, rho)
        torch._foreach_add_(adversary, self.params)
        throwaway = {name: b.clone() for name, b in buffers.items()}
        loss_p, g_p = self._grad(adversary, throwaway, batch, seed)
        del adversary
        ggp, gpgp = inner(g, g_p), squared_norm(g_p)
        for coefficient, gradient in zip(self.combine(gg, ggp, gpgp, self.alpha), (g, g_p), strict=True):
            if isinstance(coefficient, Tensor):
                torch._foreach_mul_(gradient, coefficient)
                coefficient = 1.0
            if coefficient:
                torch._foreach_add_(self.views, gradient, alpha=coefficient * weight)
        cosine = ratio(ggp, (gg * gpgp).sqrt())
        report = [loss, loss_p, loss_p - loss, cosine, gg.sqrt(), gpgp.sqrt()]
        self.metrics.add_(torch.stack(report), alpha=weight)

    def _grad(self, params: Tensors, buffers: dict[str, Tensor], batch: tuple, seed: int) -> tuple[Tensor, Tensors]:
        """Loss and gradient at `params`; zeros for parameters that the loss does not reach."""
        if self.stochastic:
            torch.manual_seed(seed)
        leaves = [p.detach().requires_grad_() for p in params]
        loss = self.objective(dict(zip(self.names, leaves, strict=True)) | buffers, *batch)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return loss.detach().to(self.flat.dtype), list(grads)
