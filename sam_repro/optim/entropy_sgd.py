"""Entropy-SGD: descend the local entropy of the loss. The one method here that is not a two-pass step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sam_repro.optim.combinations import ratio
from sam_repro.optim.perturbations import inner, squared_norm
from sam_repro.optim.two_pass import GradientStep, metrics_of


class EntropySGD(GradientStep):
    """From y = mu = w, walk L Langevin steps; then the gradient of the step is w - mu, for any base optimizer.

        y  <- y - eta (nesterov(grad f_B(y)) + gamma_t (y - w) + noise / sqrt(eta / 2) N(0, I))
        mu <- average mu + (1 - average) y
        gamma_t = gamma (1 + scoping)^t,  t = steps so far

    Chaudhari et al. 2017, Algorithm 1, as released (ucla-vision/entropy-sgd): the momentum buffer of the walk starts at
    zero in every step, the outer gradient is not multiplied by gamma. Weight decay is the base optimizer's only.

    Where we choose. (1) The images of inner step i: the batch is cut in `parts`, and the walk goes through them in
    turn. parts = 1 walks on the whole batch, at the cost of L passes; parts = L with L times the batch size is the
    release, which draws new images for every inner step. (2) eta gamma_t is held at 1, which pulls y all the way back:
    beyond it the walk overshoots, and the scopes that the GSAM paper searched (up to 0.9) would get there within twenty
    steps. The released PyTorch port never counts t, so it never did (D-26). (3) Running statistics of BatchNorm are
    those of the walk.

    Metrics: "loss" is at w, "loss_robust" at the walk's last y; "grad_norm" is of grad f(w), "grad_norm_robust" of
    w - mu, "cosine" between grad f(w), the mean over all groups, and w - mu. rho is not used.

    Args:
        arguments, keywords: GradientStep's objective, params, buffers, m, chunk, all_reduce, rank, world, stochastic.
        steps: L.
        parts: see above; must divide the local batch, and m a part.
        lr: eta.
        momentum: of the walk, Nesterov's.
        noise: standard deviation of the Langevin noise.
        average: of mu.
        gamma, scoping: strength of the pull to w, and its growth per step.

    Raises:
        ValueError: for L < 1, or (when called) if `parts` does not divide the batch.
    """

    def __init__(
        self,
        *arguments: Any,
        steps: int = 20,
        parts: int = 1,
        lr: float = 0.1,
        momentum: float = 0.9,
        noise: float = 1e-4,
        average: float = 0.75,
        gamma: float = 0.03,
        scoping: float = 1e-3,
        **keywords: Any,
    ):
        if steps < 1 or parts < 1:
            raise ValueError(f"a walk of inner_steps={steps} on inner_parts={parts}: both must be at least 1")
        super().__init__(*arguments, **keywords)
        self.steps, self.parts, self.lr, self.momentum, self.noise = steps, parts, lr, momentum, noise
        self.average, self.gamma, self.scoping, self.calls = average, gamma, scoping, 0
        self.y = [p.detach().clone() for p in self.params]
        names = dict(zip(self.names, self.y, strict=True))
        self.walker = GradientStep(self.objective, names, **keywords)

    @torch.no_grad()
    def __call__(self, *batch: Tensor, rho: float = 0.0, seed: int = 0) -> Tensor:
        """Leave w - mu in .grad; return the METRICS as one tensor on the device."""
        size = len(batch[0])
        if size % self.parts:
            raise ValueError(f"{self.parts} parts do not divide the local batch of {size}")
        # every parts-th image: with any number of ranks the same images make up a part
        chunks = [[t[i :: self.parts].contiguous() for t in batch] for i in range(self.parts)]
        generator = torch.Generator(self.flat.device).manual_seed(seed)  # the same walk on every rank
        w = [p.detach() for p in self.params]
        torch._foreach_copy_(self.y, w)
        mu, velocity = [p.clone() for p in w], [torch.zeros_like(p) for p in w]
        pull, first = self.strength(), None
        for i in range(self.steps):
            with torch.enable_grad():
                metrics = self.walker(*chunks[i % self.parts], seed=seed * self.steps + i).clone()
            if first is None:
                first, g = metrics, [v.clone() for v in self.walker.views]
            torch._foreach_mul_(velocity, self.momentum)
            torch._foreach_add_(velocity, self.walker.views)
            move = torch._foreach_add(self.walker.views, velocity, alpha=self.momentum)
            torch._foreach_add_(move, torch._foreach_sub(self.y, w), alpha=pull)
            if self.noise:
                eta = [torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device) for p in w]
                torch._foreach_add_(move, eta, alpha=self.noise / math.sqrt(self.lr / 2))
            torch._foreach_add_(self.y, move, alpha=-self.lr)
            torch._foreach_lerp_(mu, self.y, 1 - self.average)
        torch._foreach_copy_(self.views, torch._foreach_sub(w, mu))
        self.calls += 1
        assert first is not None
        norm = self.gradient.norm()
        cosine = ratio(inner(g, self.views), squared_norm(g).sqrt() * norm)
        self.metrics.copy_(metrics_of(first[0], metrics[0], first[4].square(), norm.square(), cosine))
        return self._publish()

    def strength(self) -> float:
        """gamma_t, at most 1 / eta."""
        if self.gamma == 0:
            return 0.0
        return math.exp(min(math.log(self.gamma) + self.calls * math.log1p(self.scoping), -math.log(self.lr)))

    def state_dict(self) -> dict[str, Any]:
        """The count of steps, which scoping follows."""
        return super().state_dict() | {"entropy_sgd": {"calls": self.calls}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict()."""
        super().load_state_dict(state)
        self.calls = state["entropy_sgd"]["calls"]
