"""Drop-in torch optimizers for other people's loops: SAM, GSAM, ASAM, EigenSAM around any base optimizer.

The training half of this project does not use them: a GradientStep is faster and groups images by m. These are for a
loop that already exists. docs/library.md has the recipes and the table for those who come from another port.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_repro.optim.combinations import COMBINATIONS, robust
from sam_repro.optim.dropin.forward_replay import Passes
from sam_repro.optim.perturbations import PERTURBATIONS, Perturbation, Tensors, inner, squared_norm


class SharpnessAware(torch.optim.Optimizer):
    """Any perturbation and combination around any torch optimizer.

        g = grad f(w),  eps = perturb(w, g, rho),  g_p = grad f(w + eps),  d = combine(g, g_p),  base step along d

    Three forms of the same step, the last two after a backward pass at w:

        opt.step(closure)           calls the closure twice; returns the clean loss
        opt.first_step()            w + eps, gradients cleared; then a backward pass; then
        opt.second_step()           w bitwise as before, d in .grad, base step
        with opt.robust_pass():     the same two, also when the block raises; clip or unscale d, then
        opt.step()

    The base optimizer owns all state: `state` and `param_groups` are its own, so that its moments are in state_dict()
    and a scheduler on this object drives it. Between the passes the weights are written in place and put back from
    a copy (memory: one copy; a second one, of g, unless `combine` is "robust").

    Args:
        params: parameters or groups; a group may have its own "rho".
        base_optimizer: a torch optimizer class; `base_kwargs` (lr, momentum, ...) go to it.
        rho: radius of the perturbation, of one norm over all groups. Perturbations are proportional to it.
        perturb: a name in PERTURBATIONS, or a callable (params, grads, rho) -> eps; one with state_dict() is saved.
        combine: a name in COMBINATIONS.
        alpha: the combination's weight.
        model: the module that the loop calls. Its buffers (running statistics) then keep what the clean pass left,
            and the robust pass draws the clean pass's dropout masks, forward call by forward call.
        average: averages a flat tensor over the ranks in place, as `mean_over_ranks` does: for loops whose two passes
            both stay on their rank, so that each rank perturbs and combines alone.

    Raises:
        ValueError: unknown names, a radius that is negative or not finite, an alpha that is not finite; calls in an
            order that has no meaning.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        *,
        rho: float = 0.05,
        perturb: str | Perturbation = "sam",
        combine: str = "robust",
        alpha: float = 0.0,
        model: nn.Module | None = None,
        average: Callable[[Tensor], object] | None = None,
        **base_kwargs: Any,
    ):
        if isinstance(perturb, str):
            if perturb not in PERTURBATIONS:
                raise ValueError(f"unknown perturbation '{perturb}': {', '.join(PERTURBATIONS)}")
            perturb = PERTURBATIONS[perturb]
        if combine not in COMBINATIONS:
            raise ValueError(f"unknown combination '{combine}': {', '.join(COMBINATIONS)}")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha} must be a finite number")
        self.base = base_optimizer(params, **base_kwargs)
        super().__init__(self.base.param_groups, self.base.defaults | {"rho": rho})
        self._share()
        for group in self.param_groups:
            check_radius(group["rho"])
        self.perturb: Perturbation = perturb() if isinstance(perturb, type) else perturb
        self.combine, self.alpha, self.average = COMBINATIONS[combine], alpha, average
        self.passes = Passes(model)
        self.phase = "clean"  # -> perturbed -> combined -> clean; a scaler may skip the last step
        self.params: Tensors = []
        self.saved: Tensors = []
        self.g: list[Tensor | None] = []

    # ---- the step ----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The base optimizer's step along d; with a closure, both passes before it.

        The closure evaluates the loss of one batch and calls backward (torch's convention: it may zero gradients, and
        accumulate over micro-batches). Its second call draws the first call's random numbers.
        """
        if closure is None:
            if self.phase == "perturbed":
                self.combine_grads()
            if self.phase != "combined":
                raise ValueError("step() without a closure follows first_step() or robust_pass(); there was none")
            self.base.step()
            self.phase = "clean"
            return None
        if self.phase == "perturbed" or any(p.grad is not None for p in self._trainable()):
            raise ValueError(
                "step(closure) runs the clean pass itself, but gradients are there already: remove the backward() "
                "before it, accumulate inside the closure, or use first_step() and second_step()"
            )
        before = self.passes.random_state()
        with torch.enable_grad():
            loss = closure()
        with self.robust_pass(), torch.enable_grad():
            self.passes.set_random_state(before)
            closure()
        self.base.step()
        self.phase = "clean"
        for p in self._trainable():
            p.grad = None
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = True) -> None:
        """Take .grad as the clean gradient, move the weights to w + eps in place, and clear .grad.

        `zero_grad` is davda54/sam's argument. Gradients are cleared whatever it says: the robust pass starts from zero.
        """
        if self.phase == "perturbed":
            raise ValueError("first_step() at weights that are perturbed already; second_step() or restore() first")
        self.params = self._trainable()
        if any(p.grad is not None and p.grad.is_sparse for p in self.params):
            raise ValueError("sharpness-aware steps take dense gradients; an embedding here has sparse=True")
        if not any(p.grad is not None for p in self.params):
            raise ValueError("first_step() found no gradient; call backward() first")
        g = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        eps = self._perturbation(g)
        self.saved = [p.detach().clone() for p in self.params]
        # Clones: under DDP a gradient may be a view of a bucket that the next backward pass overwrites.
        keep = self.combine is not robust
        self.g = [p.grad.clone() if keep and p.grad is not None else None for p in self.params]
        self.passes.enter_robust()
        self.phase = "perturbed"
        torch._foreach_add_(self.params, eps)
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def combine_grads(self) -> None:
        """Put the weights back and leave d in .grad, to clip or to unscale before step()."""
        if self.phase != "perturbed":
            raise ValueError("there is no robust gradient to combine; call first_step() and backward() first")
        self.restore()
        self.phase = "combined"
        if self.combine is not robust:
            self._combine()
        self.g = []
        if self.average is not None:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
            flat = torch.cat([d.reshape(-1) for d in grads])
            self.average(flat)
            for p, part in zip(self.params, flat.split([d.numel() for d in grads]), strict=True):
                p.grad = part.view_as(p).clone()

    def second_step(self, zero_grad: bool = False) -> None:
        """combine_grads(), step(), and zero_grad() if asked: davda54/sam's name."""
        self.combine_grads()
        self.step()
        if zero_grad:
            self.zero_grad()

    @contextmanager
    def robust_pass(self) -> Iterator[None]:
        """first_step(), the block at w + eps, combine_grads(). If the block raises, the weights are put back."""
        self.first_step()
        try:
            yield
        except BaseException:
            self.restore()
            self.zero_grad()
            raise
        self.combine_grads()

    @torch.no_grad()
    def restore(self) -> None:
        """Weights and buffers bitwise as before first_step(); where nothing is perturbed, forget the clean pass.

        For a batch that is skipped after its clean pass: its random numbers are not for the next one's robust pass.
        """
        if self.phase == "perturbed":
            torch._foreach_copy_(self.params, self.saved)
            self.passes.leave_robust()
            self.saved, self.phase = [], "clean"
        else:
            self.passes.clean.clear()

    def _trainable(self) -> Tensors:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _beside(self, tensors: Tensors) -> Tensors:
        return [t.to(p.device) for t, p in zip(tensors, self._trainable(), strict=True)]

    def _perturbation(self, g: Tensors) -> Tensors:
        """eps: one norm over all groups, then each group's radius."""
        groups = [group["rho"] for group in self.param_groups for p in group["params"] if p.requires_grad]
        for rho in groups:
            check_radius(rho)
        weights = [p.detach() for p in self.params]
        if len(set(groups)) == 1:
            return self.perturb(weights, g, groups[0])
        eps = self.perturb(weights, g, 1.0)
        for e, rho in zip(eps, groups, strict=True):
            e.mul_(rho)
        return eps

    def _combine(self) -> None:
        """d = a g + b g_p in .grad; a parameter that neither pass reached keeps None."""
        reached = [(p, g) for p, g in zip(self.params, self.g, strict=True) if g is not None or p.grad is not None]
        g = [torch.zeros_like(p) if clean is None else clean for p, clean in reached]
        g_p = [torch.zeros_like(p) if p.grad is None else p.grad for p, _ in reached]
        a, b = self.combine(squared_norm(g), inner(g, g_p), squared_norm(g_p), self.alpha)
        direction = torch._foreach_mul(g_p, b)
        if isinstance(a, Tensor) or a != 0:
            torch._foreach_add_(direction, torch._foreach_mul(g, a))
        for (p, _), d in zip(reached, direction, strict=True):
            p.grad = d

    # ---- state -------------------------------------------------------------------------------------------------

    def _share(self) -> None:
        """This object's state and groups are the base optimizer's."""
        self.state, self.param_groups = self.base.state, self.base.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may have its own "rho"."""
        if self.param_groups and self.param_groups is self.base.param_groups:
            param_group.setdefault("rho", self.defaults["rho"])
            check_radius(param_group["rho"])
            self.base.add_param_group(param_group)
        else:  # called by torch's constructor, with the base optimizer's own groups
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups (with rho), alpha, and the perturbation's state where it has one."""
        own = {"alpha": self.alpha}
        if hasattr(self.perturb, "state_dict"):
            own["perturb"] = self.perturb.state_dict()  # pyright: ignore[reportFunctionMemberAccess]
        return super().state_dict() | {"sharpness_aware": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of state_dict(). Takes a plain base optimizer's state too, whose groups then keep their rho here."""
        radii = [group["rho"] for group in self.param_groups]
        self.base.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._share()
        for group, rho in zip(self.param_groups, radii, strict=True):
            group.setdefault("rho", rho)
        own = state_dict.get("sharpness_aware", {})
        self.alpha = own.get("alpha", self.alpha)
        if "perturb" in own:  # one tensor a parameter, which goes where the parameter is, as torch does with the rest
            memory = {k: self._beside(v) if isinstance(v, list) else v for k, v in own["perturb"].items()}
            self.perturb.load_state_dict(memory)  # pyright: ignore[reportFunctionMemberAccess]


class SAM(SharpnessAware):
    """SAM: descend grad f(w + rho g / ||g||). Foret et al. 2021. `adaptive` is davda54/sam's switch to ASAM."""

    def __init__(self, params: Any, base_optimizer: Any, *, rho: float = 0.05, adaptive: bool = False, **kwargs: Any):
        super().__init__(params, base_optimizer, rho=rho, perturb="asam" if adaptive else "sam", **kwargs)


class ASAM(SharpnessAware):
    """ASAM: SAM in a ball that scales with the weights. Kwon et al. 2021."""

    def __init__(self, params: Any, base_optimizer: Any, *, rho: float = 0.5, **kwargs: Any):
        super().__init__(params, base_optimizer, rho=rho, **({"perturb": "asam"} | kwargs))


class GSAM(SharpnessAware):
    """GSAM: SAM's gradient, ascending the part of g orthogonal to it. GSAM paper, Algorithm 1."""

    def __init__(self, params: Any, base_optimizer: Any, *, rho: float = 0.05, alpha: float = 0.4, **kwargs: Any):
        super().__init__(params, base_optimizer, rho=rho, alpha=alpha, **({"combine": "ascent"} | kwargs))


class EigenSAM(SharpnessAware):
    """Eigen-SAM: SAM's direction turned towards the top eigenvector of the Hessian, which the loop renews.

    Call `update_eigenvector(loss)` every k steps. The perturbation has the attribute `v`: one tensor a parameter.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, rho: float = 0.05, **kwargs: Any):
        super().__init__(params, base_optimizer, rho=rho, **({"perturb": "eigen"} | kwargs))

    def update_eigenvector(self, loss: Callable[[], Tensor], *, steps: int = 5) -> None:
        """v <- `steps` power iterations on the Hessian of loss(), from the former v. Eigen-SAM paper, Algorithm 1.

        `loss` evaluates the loss without backward(). It runs with unfused attention, which can be differentiated twice;
        the buffers and random numbers of `model` are put back.
        """
        if steps < 1:
            raise ValueError(f"power iteration takes at least 1 step, not {steps}")
        params = self._trainable()
        v = getattr(self.perturb, "v", None) or [torch.randn_like(p) for p in params]
        with self.passes.aside(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            g = torch.autograd.grad(loss(), params, create_graph=True, allow_unused=True, materialize_grads=True)
            curved = [i for i, gi in enumerate(g) if gi.requires_grad]
            for _ in range(steps):
                norm = squared_norm(list(v)).sqrt().clamp(min=torch.finfo(v[0].dtype).tiny)
                v = torch.autograd.grad(
                    [g[i] for i in curved], params, [v[i] / norm for i in curved],
                    retain_graph=True, allow_unused=True, materialize_grads=True,
                )  # fmt: skip
        norm = squared_norm(list(v)).sqrt().clamp(min=torch.finfo(v[0].dtype).tiny)
        self.perturb.v = [x / norm for x in v]  # pyright: ignore[reportFunctionMemberAccess]


def mean_over_ranks(flat: Tensor) -> None:
    """Average a tensor over torch.distributed's ranks in place: an `average` for loops without DDP's reduction."""
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())


def check_radius(rho: float) -> None:
    """A radius is finite and not negative."""
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho={rho} must be a finite number, 0 or greater")
