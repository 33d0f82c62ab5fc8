"""Synchronised SAM: one perturbation for the whole global batch, for comparison with one per group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_repro.optim.combinations import ratio
from sam_repro.optim.memory import cut
from sam_repro.optim.perturbations import Tensors, group_seed, inner, squared_norm
from sam_repro.optim.two_pass import GradientStep, metrics_of


class SyncedStep(GradientStep):
    """GradientStep whose perturbation and combination see the mean gradient of all groups of all ranks.

        g = mean grad f_i(w),  eps = perturb(w, g, rho),  g_p = mean grad f_i(w + eps),  d = combine(g, g_p)

    The groups of `m` images only bound memory and give BatchNorm its batches. Two reductions per step: g must be known
    everywhere before anybody can look at w + eps. What PyTorch ports under DDP do when they synchronise both passes
    (D-01).
    """

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        assert self.perturb is not None and not self.three_passes and not self.decoupled

    def _wants_clean(self) -> bool:
        return False  # the mean of g is at hand

    def __call__(self, *batch: Tensor, rho: float = 0.0, seed: int = 0) -> Tensor:
        """Leave the gradient of `batch` in .grad; return the METRICS as one tensor on the device."""
        if self.pre_step is not None:
            self.pre_step(*batch)
        loss, g = self._mean(self.params, batch, seed, keep=True)
        eps = self._perturbation(g, rho, group_seed(seed, 0))
        torch._foreach_add_(eps, self.params)
        loss_p, g_p = self._mean(eps, batch, seed, keep=False)
        del eps
        gg, ggp, gpgp = squared_norm(g), inner(g, g_p), squared_norm(g_p)
        if hasattr(self.perturb, "update_memory"):
            self.perturb.update_memory(g)  # pyright: ignore[reportFunctionMemberAccess, reportOptionalMemberAccess]
        self.flat.zero_()
        self._add_direction([g, g_p], list(self.combine(gg, ggp, gpgp, self.alpha)), 1.0)
        self.metrics.copy_(metrics_of(loss, loss_p, gg, gpgp, ratio(ggp, (gg * gpgp).sqrt())))
        return self._publish()

    def _mean(self, params: Tensors, batch: tuple[Tensor, ...], seed: int, *, keep: bool) -> tuple[Tensor, Tensors]:
        """Mean loss and gradient at `params` over all groups of all ranks; `keep` what BatchNorm saw."""
        totals, groups = self._with_memory(batch, lambda: self._local_mean(params, batch, seed))
        if keep:
            self._keep_buffers(totals, groups)
        self._reduce()
        return self.metrics[0].clone(), [view.clone() for view in self.views]

    def _local_mean(self, params: Tensors, batch: tuple[Tensor, ...], seed: int) -> tuple[dict[str, Tensor], int]:
        """This rank's part of `_mean` into the flat buffer; its running statistics, summed over so many groups."""
        groups, m = self.groups_of(batch)
        weight = 1 / (groups * self.world)
        self.flat.zero_()
        totals = {name: torch.zeros_like(b) for name, b in self.buffers.items()}
        for i, group in enumerate(cut(batch, m)):
            buffers = {name: b.clone() for name, b in self.buffers.items()}
            loss, g = self._grad(params, buffers, group, group_seed(seed, self.rank * groups + i))
            torch._foreach_add_(self.views, g, alpha=weight)
            self.metrics[0] += weight * loss
            self._each(torch._foreach_add_, totals, buffers)
        return totals, groups
