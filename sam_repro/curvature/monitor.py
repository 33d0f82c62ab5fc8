"""The sharpness of a run, measured while it trains and at its end, for its log and its ledger row."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_repro.config.schema import Config
from sam_repro.curvature.lanczos import dominant, power_iteration
from sam_repro.curvature.measures import alignment, seen_in_bf16, sharpness
from sam_repro.curvature.probe_images import loss_hessian, probe_batches
from sam_repro.distributed.ranks import Ranks, average_buffers
from sam_repro.errors import UserError, plural
from sam_repro.models.objective import in_mode
from sam_repro.optim import GradientStep
from sam_repro.optim.base_optimizer import is_kernel
from sam_repro.optim.hessian import Batch, Hessian
from sam_repro.optim.memory import fitting, no_memory
from sam_repro.optim.perturbations import sam

TOL = 1e-3  # relative residual of the eigenvalue, whose error is then about 1e-6
MAX_PRODUCTS = 60  # per eigenvalue; as many vectors are kept meanwhile
MIN_RADIUS = 0.01  # of model.sam_rho: below it the gap is rounding
FOLLOWED = 5  # former eigenvectors whose quality is followed


class Monitor:
    """Measure the training loss's curvature at the weights as they are, without touching them or any random state.

    A measurement is a dictionary of plain numbers:

        lambda_max, residual, products   the Hessian's eigenvalue of largest magnitude (sign kept), by Lanczos
        rho, surrogate_gap, estimate, first_order   h at radius rho over all images; 2h/rho^2 and its part 2|g|/rho
        alignment                        mean over groups of m images of |cos(eps, v)|, eps the method's own
        bf16_norm, bf16_cosine           likewise of ||d|| / ||eps|| and cos(d, eps), d = bf16(w + eps) - bf16(w) over
                                         matrices and convolutions: what a pass in bf16 sees of eps
        decay                            of each former eigenvector: [age in steps, |cos| with today's, v'Hv / lambda]
        power_cosine                     at the end: |cos| of v with p power iterations from a random start
        decay_cosine                     at the end: mean |cos| of v with that of k steps before (optim.k)
        images, seconds

    Where the method has no radius (vanilla), rho is that of plain SAM for this model. Former eigenvectors are not part
    of checkpoints: after a resumption decay starts anew. Images: sharpness.probe_batches.
    """

    def __init__(self, cfg: Config, model: nn.Module, step: GradientStep, ranks: Ranks):
        self.cfg, self.model, self.step, self.ranks = cfg, model, step, ranks
        self.batches: list[Batch] | None = None
        self.past: list[tuple[int, Tensor]] = []
        self.after_k: list[float] = []

    def due(self, done: int) -> bool:
        """Whether to measure after update number `done`; with Eigen-SAM again when the next estimate comes, k later."""
        every, o = self.cfg.sharpness.every, self.cfg.optim
        return every > 0 and (done % every == 0 or (o.perturb == "eigen" and done > every and done % every == o.k))

    def __call__(
        self, done: int, rho: float, *, final: bool = False, after: Callable[[int], object] | None = None
    ) -> dict[str, Any]:
        """One measurement; where there is none, {"problem": a sentence}.

        `after` is called after each product with the Hessian, with their number so far, on all ranks.

        Raises:
            UserError: where one of several ranks has no memory or unreadable data.
        """
        start = time.perf_counter()
        average_buffers(self.model, self.ranks)
        try:
            with in_mode(self.model, training=False):
                measured = self._measure(done, rho, final=final, after=after)
        except (RuntimeError, UserError) as error:
            if not isinstance(error, UserError) and not no_memory(error):
                raise
            memory = f"no memory for {plural(self.cfg.sharpness.batch, 'image')} per pass (sharpness.batch) "
            memory += f"next to up to {MAX_PRODUCTS} vectors as large as the weights"
            why = str(error) if isinstance(error, UserError) else memory
            if self.ranks.world > 1:  # the others wait for this rank in the middle of a product
                raise UserError(f"sharpness cannot be measured: {why}; sharpness.images=0 leaves it out") from None
            return {"problem": f"sharpness was not measured: {why}"}
        except ValueError as error:  # of numbers that all ranks have
            return {"problem": f"sharpness was not measured: {error}"}
        numbers = [x for value in measured.values() for x in np.ravel(value).tolist()]
        if not all(map(math.isfinite, numbers)):
            return {"problem": "sharpness was not measured: the loss overflows around these weights"}
        return measured | {"seconds": time.perf_counter() - start}

    def _measure(self, done: int, rho: float, *, final: bool, after: Callable[[int], object] | None) -> dict[str, Any]:
        wanted = self.cfg.sharpness
        if self.batches is None:
            self.batches = probe_batches(self.cfg, self.ranks, images=wanted.images, batch=wanted.batch)
            if self.ranks.device.type == "cuda":
                self.batches = fitting(self.batches, self._try, doing="a product with the Hessian")
        hessian = loss_hessian(self.cfg, self.model, self.batches, self.ranks)
        if after is not None:
            counted = weakref.proxy(hessian)  # not a cycle, which would keep its memory
            hessian.after = lambda: after(counted.products)
        pair = dominant(hessian, tol=TOL, max_steps=min(MAX_PRODUCTS, hessian.size))
        v = pair.vectors[0]
        measured = {"lambda_max": pair.value, "residual": float(pair.residuals[0]), "products": pair.products}
        # a radius that has decayed to nothing would measure the rounding of the loss
        rho = rho if rho > MIN_RADIUS * self.cfg.model.sam_rho else self.cfg.model.sam_rho
        gap = sharpness(hessian, rho)
        measured |= {key: gap[key] for key in ("rho", "surrogate_gap", "estimate", "first_order")}
        measured |= self._of_perturbations(hessian, v, rho) | {"images": self._count()}
        measured["decay"] = [
            self._quality(hessian, age, old, v, measured["lambda_max"]) for age, old in self._ages(done)
        ]
        self.after_k += [cosine for age, cosine, _ in measured["decay"] if age == self.cfg.optim.k]
        if wanted.every:
            self.past = [*self.past[1 - FOLLOWED :], (done, v)]
        if final:
            estimate = power_iteration(hessian, steps=self.cfg.optim.p, seed=1)
            measured["power_cosine"] = alignment(estimate.vectors[0], v)
            if self.after_k:
                measured["decay_cosine"] = sum(self.after_k) / len(self.after_k)
        return measured

    def _try(self, batch: Batch) -> None:
        """One product with one batch, of this rank alone."""
        hessian = loss_hessian(self.cfg, self.model, [batch], Ranks(0, 1, 0, 1, self.ranks.device))
        hessian(torch.ones(hessian.size, device=self.ranks.device))

    def _ages(self, done: int) -> list[tuple[int, Tensor]]:
        return [(done - made, old) for made, old in reversed(self.past) if made < done]

    def _quality(self, hessian: Hessian, age: int, old: Tensor, v: Tensor, value: float) -> list[float]:
        """What is left of an old eigenvector: age, |cos| with the one of today, its Rayleigh quotient over lambda."""
        return [age, alignment(old, v), float(torch.dot(old, hessian(old))) / value if value else 0.0]

    def _of_perturbations(self, hessian: Hessian, v: Tensor, rho: float) -> dict[str, float]:
        """Means over groups of m images, by their sizes, of what eps is like: SAM's where the method has none."""
        assert self.batches is not None
        perturb: Any = self.step.perturb or sam
        total = torch.zeros(4, dtype=torch.float64)
        kernels = [i for i, (name, p) in enumerate(hessian.params.items()) if is_kernel(name, p)]
        images = [torch.cat(parts) for parts in zip(*self.batches, strict=True)]
        for i, group in enumerate(zip(*(t.split(self.cfg.optim.m or len(t)) for t in images), strict=True)):
            passes = zip(*(t.split(len(self.batches[0][0])) for t in group), strict=True)
            _, g = Hessian(hessian.objective, hessian.params, list(passes)).gradient()
            if hasattr(perturb, "reseed"):
                perturb.reseed(i)
            weights = list(hessian.params.values())
            eps = getattr(perturb, "eps_from_memory", perturb)(weights, hessian.unflatten(g), rho)
            seen = seen_in_bf16([weights[i] for i in kernels], [eps[i] for i in kernels])
            total += len(group[0]) * torch.tensor([alignment(eps, v), *seen, 1.0], dtype=torch.float64)
        *sums, images = self.ranks.sum_(total.to(self.ranks.device)).tolist()
        return {key: x / images for key, x in zip(("alignment", "bf16_norm", "bf16_cosine"), sums, strict=True)}

    def _count(self) -> int:
        """Images on all ranks."""
        own = torch.tensor(float(sum(len(images) for images, *_ in self.batches or [])), device=self.ranks.device)
        return int(self.ranks.sum_(own).item())
