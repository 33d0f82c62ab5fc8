"""When to look: a sharpness-aware step every k steps, and what to do in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_repro.optim.combinations import ratio
from sam_repro.optim.two_pass import GradientStep


class LookSAMStep(GradientStep):
    """LookSAM: the method's own step every k steps. The steps between reuse a part of its direction.

        steps 0, k, 2k, ...:  descend d;  g_v = d - (<d, g> / ||g||^2) g
        other steps:          descend g + reuse (||g|| / ||g_v||) g_v

    g and d are means over all groups of all ranks, g_v one vector over all parameters. With reuse = 0 the other steps
    are the base optimizer's. Any perturbation and combination can be used; LookSAM is sam x robust. A clean step costs
    one pass. Liu et al. 2022, eq. 7 and Algorithm 1.

    Args:
        arguments, keywords: GradientStep's.
        every: k.
        reuse: LookSAM's alpha.

    Raises:
        ValueError: for k < 1, or a decoupled method, which has no d in the base optimizer to reuse.
    """

    def __init__(self, *arguments: Any, every: int = 5, reuse: float = 0.7, **keywords: Any):
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        if keywords.get("decoupled"):
            raise ValueError("a decoupled method cannot be reused between its steps")
        super().__init__(*arguments, **keywords)
        self.every, self.reuse, self.calls = every, reuse, 0
        self.g_v: Tensor | None = None

    def __call__(self, *batch: Tensor, rho: float = 0.0, seed: int = 0) -> Tensor:
        """As GradientStep's; the metrics of a clean step have no surrogate gap."""
        self.robust = self.perturb is not None and self.calls % self.every == 0
        metrics = super().__call__(*batch, rho=rho, seed=seed)
        self.calls += 1
        return metrics

    def _wants_clean(self) -> bool:
        return True

    def _after_reduction(self) -> None:
        super()._after_reduction()
        if self.robust:
            g, d = self.second, self.gradient
            self.g_v = d - ratio(torch.dot(d, g), torch.dot(g, g)) * g
        elif self.g_v is not None and self.reuse:
            self.gradient.add_(self.g_v * (self.reuse * ratio(self.gradient.norm(), self.g_v.norm())))

    def state_dict(self) -> dict[str, Any]:
        """The count of steps and g_v, besides the perturbation's."""
        own = {"calls": self.calls} | ({} if self.g_v is None else {"g_v": self.g_v})
        return super().state_dict() | {"cadence": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict()."""
        super().load_state_dict(state)
        self.calls, self.g_v = state["cadence"]["calls"], state["cadence"].get("g_v")
