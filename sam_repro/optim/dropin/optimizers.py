"""Drop-in torch optimizers for other people's loops: SAM, GSAM, ASAM, EigenSAM around any base optimizer.

The training half of this project does not use them: a GradientStep is faster and groups images by m. These are for a
loop that already exists. docs/OWN_LOOP.md has the recipes and the table for those who come from another port.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sam_repro.optim.combinations import COMBINATIONS, robust
from sam_repro.optim.dropin.checks import check_base, check_base_class, check_group, check_radius
from sam_repro.optim.dropin.forward_replay import Passes
from sam_repro.optim.hessian import LossHessian, exact_arithmetic, power_step
from sam_repro.optim.perturbations import (
    PERTURBATIONS,
    Perturbation,
    Tensors,
    from_real,
    inner,
    multiply,
    squared_norm,
    to_real,
    together,
)

# What torch's and other people's code attaches to an optimizer object, and a copy makes for itself.
ATTACHED = ("step", "_zero_grad_profile_name")


@dataclass
class StepState:
    """What changes between the calls of one optimizer.

    One object that is never replaced: a proxy of the optimizer (Lightning's, Fabric's) runs its methods with a `self`
    that reads the optimizer's attributes, and keeps what is assigned to itself.
    """

    alpha: float
    phase: str = "clean"  # -> perturbed -> combined -> clean; a scaler may skip the last step
    params: Tensors = field(default_factory=list)  # of this step
    saved: Tensors = field(default_factory=list)  # the weights, while they are perturbed
    g: list[Tensor | None] = field(default_factory=list)  # the clean gradient, where the combination reads it
    remembered: Tensors = field(default_factory=list)  # the parameters that the perturbation's memory is about


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

    Norms, inner products, the perturbation and its memory are in fp32 at least, whatever the parameters are, and a
    complex number is a pair of real ones. Where a group has maximize=True, the worst case is where the loss is lower.

    Args:
        params: parameters or groups, named or not; a group may have its own "rho".
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
        ValueError: unknown names, a radius that is negative or not finite, an alpha that is not finite; a base
            optimizer that cannot be one (checks.check_base); sharded parameters; calls in an order that has no meaning.
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
        check_base_class(base_optimizer)
        self.base = base_optimizer(params, **base_kwargs)
        check_base(self.base)
        # Not torch's constructor, which makes state and groups of its own: here both are the base optimizer's.
        super().__setstate__({"defaults": self.base.defaults | {"rho": rho}})
        for group in self.param_groups:
            group.setdefault("rho", rho)
            check_group(group)
        self.perturb: Perturbation = perturb() if isinstance(perturb, type) else perturb
        self.combine, self.average = COMBINATIONS[combine], average
        self.passes, self.step_state = Passes(model, self.base), StepState(alpha)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's groups, each with its "rho"."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def alpha(self) -> float:
        """The combination's weight."""
        return self.step_state.alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self.step_state.alpha = alpha

    # ---- the step ----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The base optimizer's step along d; with a closure, both passes before it.

        The closure evaluates the loss of one batch and calls backward (torch's convention: it may zero gradients, and
        accumulate over micro-batches). Its second call draws the first call's random numbers.
        """
        if closure is None or self.step_state.phase == "combined":
            return self._base_step(closure)
        if self.step_state.phase == "perturbed" or self._has_gradient():
            raise ValueError(
                "step(closure) runs the clean pass itself, but gradients are there already: remove the backward() "
                "before it, accumulate inside the closure, or use first_step() and second_step()"
            )
        before = self.passes.random_state()
        with torch.enable_grad():
            loss = closure()
        if loss is None and not self._has_gradient():  # a batch that the closure skips
            self.restore()
            return None
        with self.robust_pass(), torch.enable_grad():
            self.passes.set_random_state(before)
            closure()
        self._base_step()
        for p in self._trainable():
            p.grad = None
        return loss

    def _base_step(self, closure: Callable[[], Any] | None = None) -> None:
        """The base optimizer's step along what is in .grad.

        Lightning calls step() with a closure that does nothing but its hooks (clipping, logging).
        """
        if self.step_state.phase == "perturbed":
            self.combine_grads()
        if self.step_state.phase == "clean" and (self._has_gradient() or not self._has_gradient(zero=True)):
            # (A step along zeros needs no second pass: torch.distributed.checkpoint makes one to allocate the state.)
            raise ValueError("step() without a closure follows first_step() or robust_pass(); there was none")
        if closure is not None and closure() is not None:
            raise ValueError("step(closure) after first_step() or robust_pass(): the gradients are there; call step()")
        self.base.step()
        self.step_state.phase = "clean"

    @torch.no_grad()
    def first_step(self, zero_grad: bool = True) -> None:
        """Take .grad as the clean gradient, move the weights to w + eps in place, and clear .grad.

        `zero_grad` is davda54/sam's argument. Gradients are cleared whatever it says: the robust pass starts from zero.
        """
        step = self.step_state
        if step.phase == "perturbed":
            raise ValueError("first_step() at weights that are perturbed already; second_step() or restore() first")
        params = self._trainable()
        if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            raise ValueError("sharpness-aware steps take dense gradients; an embedding here has sparse=True")
        if not any(p.grad is not None for p in params):
            raise ValueError(
                "first_step() found no gradient; call backward() first, and build the optimizer after whatever "
                "replaces the model's parameters (fully_shard, for one)"
            )
        step.params = params
        eps = self._perturbation(params)
        step.saved = [p.detach().clone() for p in params]
        # Clones: under DDP a gradient may be a view of a bucket that the next backward pass overwrites.
        keep = self.combine is not robust
        step.g = [p.grad.clone() if keep and p.grad is not None else None for p in params]
        self.passes.enter_robust()
        step.phase = "perturbed"
        torch._foreach_add_(params, eps)
        for p in params:
            p.grad = None

    @torch.no_grad()
    def combine_grads(self) -> None:
        """Put the weights back and leave d in .grad, to clip or to unscale before step()."""
        if self.step_state.phase != "perturbed":
            raise ValueError("there is no robust gradient to combine; call first_step() and backward() first")
        params = self.step_state.params
        self.restore()
        self.step_state.phase = "combined"
        if self.combine is not robust:
            self._combine()
        self.step_state.g = []
        if self.average is not None:
            grads = [to_real(torch.zeros_like(p) if p.grad is None else p.grad) for p in params]
            flat = torch.cat([d.reshape(-1) for d in grads])
            self.average(flat)
            for p, d, part in zip(params, grads, flat.split([d.numel() for d in grads]), strict=True):
                p.grad = from_real(part.view_as(d).clone(), p)

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
        step = self.step_state
        if step.phase == "perturbed":
            torch._foreach_copy_(step.params, step.saved)
            self.passes.leave_robust()
            step.saved, step.phase = [], "clean"
        else:
            self.passes.clean.clear()

    def _trainable(self) -> Tensors:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _has_gradient(self, *, zero: bool = False) -> bool:
        """Whether any parameter has a gradient that is not all zeros, or with `zero` any at all."""
        grads = [p.grad for p in self._trainable() if p.grad is not None]
        if zero or not grads or any(g.layout != torch.strided for g in grads):
            return bool(grads)
        return bool(together([g.any() for g in grads]).any())  # one wait for a GPU

    def _perturbation(self, params: Tensors) -> Tensors:
        """eps: one norm over all groups, then each group's radius; the ascent of -f where f is maximised."""
        groups = [group for group in self.param_groups for p in group["params"] if p.requires_grad]
        radii = [group["rho"] for group in groups]
        for rho in radii:
            check_radius(rho)
        weights = [to_real(p.detach()) for p in params]
        g = [torch.zeros_like(w) if p.grad is None else to_real(p.grad) for p, w in zip(params, weights, strict=True)]
        g = [-x if group.get("maximize") else x for x, group in zip(g, groups, strict=True)]
        self._align_memory(params)
        equal = len(set(radii)) == 1
        eps = getattr(self.perturb, "eps_from_memory", self.perturb)(weights, g, radii[0] if equal else 1.0)
        # A gradient that overflowed is skipped by a GradScaler, and would stay in a running mean for ever.
        if hasattr(self.perturb, "update_memory") and bool(squared_norm(g).isfinite()):
            self.perturb.update_memory(g)  # pyright: ignore[reportFunctionMemberAccess]
        if not equal:
            for e, rho in zip(eps, radii, strict=True):
                e.mul_(rho)
        # Real numbers keep their width: their sum with the weights is rounded once.
        return [from_real(e, p) if p.is_complex() else e for e, p in zip(eps, params, strict=True)]

    def _combine(self) -> None:
        """d = a g + b g_p in .grad; a parameter that neither pass reached keeps None."""
        pairs = zip(self.step_state.params, self.step_state.g, strict=True)
        reached = [(p, g) for p, g in pairs if g is not None or p.grad is not None]
        g = [to_real(torch.zeros_like(p) if clean is None else clean) for p, clean in reached]
        g_p = [to_real(torch.zeros_like(p) if p.grad is None else p.grad) for p, _ in reached]
        a, b = self.combine(squared_norm(g), inner(g, g_p), squared_norm(g_p), self.alpha)
        direction = multiply(g_p, b)
        if isinstance(a, Tensor) or a != 0:
            torch._foreach_add_(direction, multiply(g, a))
        for (p, _), d in zip(reached, direction, strict=True):
            p.grad = from_real(d, p)

    # ---- state -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may have its own "rho".

        Raises:
            ValueError: as the constructor's, and for a parameter that is in another group.
        """
        self.base.add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("rho", self.defaults["rho"])
        try:
            check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """All attributes, for copies and pickles, without what is attached to this object from outside."""
        outside = ("_optimizer_", "_warned_")
        return {k: v for k, v in vars(self).items() if k not in ATTACHED and not k.startswith(outside)}

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups (with rho), alpha, and the perturbation's state where it has one."""
        own: dict[str, Any] = {"alpha": self.alpha}
        if hasattr(self.perturb, "state_dict"):
            own["perturb"] = self.perturb.state_dict()  # pyright: ignore[reportFunctionMemberAccess]
            places = {id(p): i for i, p in enumerate(self._all())}
            own["perturb_params"] = [places[id(p)] for p in self.step_state.remembered if id(p) in places]
        return super().state_dict() | {"sharpness_aware": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of state_dict(). Takes a plain base optimizer's state too, whose groups then keep their rho here."""
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        radii = [group["rho"] for group in self.param_groups]
        self.base.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for group, rho in zip(self.param_groups, radii, strict=True):
            group.setdefault("rho", rho)
        own = state_dict.get("sharpness_aware", {})
        self.alpha = own.get("alpha", self.alpha)
        if "perturb" in own and hasattr(self.perturb, "load_state_dict"):
            everything = self._all()
            places = own.get("perturb_params")
            self.step_state.remembered = self._trainable() if places is None else [everything[i] for i in places]
            self._move_memory(own["perturb"], self.step_state.remembered)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _all(self) -> Tensors:
        return [p for group in self.param_groups for p in group["params"]]

    def _align_memory(self, params: Tensors) -> None:
        """The perturbation's memory is about `params`: groups added later, parameters frozen, moved to a device."""
        former = self.step_state.remembered or params
        self.step_state.remembered = params
        if hasattr(self.perturb, "state_dict"):
            memory = self.perturb.state_dict()  # pyright: ignore[reportFunctionMemberAccess]
            lists = [x for x in memory.values() if isinstance(x, list) and len(x) == len(former)]
            same = len(former) == len(params) and all(a is b for a, b in zip(former, params, strict=True))
            if not same or any(t.device != p.device for x in lists for t, p in zip(x, params, strict=True)):
                self._move_memory(memory, former)

    def _move_memory(self, memory: dict[str, Any], former: Tensors) -> None:
        """Give the perturbation a memory about `former`: lists in it are one tensor per parameter, new ones zeros."""
        params = self.step_state.remembered

        def moved(tensors: Tensors) -> Tensors:
            known = {id(p): t for p, t in zip(former, tensors, strict=True)}
            news = ((p, known.get(id(p))) for p in params)
            return [to_real(torch.zeros_like(p)) if t is None else t.to(p.device) for p, t in news]

        about = {k for k, v in memory.items() if isinstance(v, list) and len(v) == len(former)}
        state = {k: moved(v) if k in about else v for k, v in memory.items()}
        self.perturb.load_state_dict(state)  # pyright: ignore[reportFunctionMemberAccess]


class SAM(SharpnessAware):
    """SAM: descend grad f(w + rho g / ||g||).

    Args:
        rho: radius, the norm of the perturbation over all weights.
        adaptive: davda54/sam's switch to ASAM.
        kwargs: SharpnessAware's other arguments, and the base optimizer's.

    Source: Foret et al. 2021, eq. 2 and 3.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, rho: float = 0.05, adaptive: bool = False, **kwargs: Any):
        super().__init__(params, base_optimizer, rho=rho, perturb="asam" if adaptive else "sam", **kwargs)


class ASAM(SharpnessAware):
    """ASAM: SAM in a ball that scales with the weights, eps = rho w^2 g / ||w g||.

    Args:
        rho: radius in that metric: about ten times SAM's.
        kwargs: SharpnessAware's other arguments, and the base optimizer's.

    Source: Kwon et al. 2021, eq. 8, with eta = 0 and all parameters scaled.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, rho: float = 0.5, **kwargs: Any):
        super().__init__(params, base_optimizer, rho=rho, **({"perturb": "asam"} | kwargs))


class GSAM(SharpnessAware):
    """GSAM: SAM's gradient less alpha times the part of g that is orthogonal to it.

        d = g_p - alpha (g - (<g, g_p> / ||g_p||^2) g_p)

    Args:
        rho: radius, the norm of the perturbation over all weights.
        alpha: weight of the ascent; 0 is SAM.
        kwargs: SharpnessAware's other arguments, and the base optimizer's.

    Source: GSAM paper, Algorithm 1, steps 3 and 4.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, rho: float = 0.05, alpha: float = 0.4, **kwargs: Any):
        super().__init__(params, base_optimizer, rho=rho, alpha=alpha, **({"combine": "ascent"} | kwargs))


class EigenSAM(SharpnessAware):
    """Eigen-SAM: SAM's direction turned towards the Hessian's top eigenvector v, which your loop renews.

        eps = rho (g^ + 0.2 sign(<g, v>) v_perp),  g^ = g / ||g||,  v_perp = v - <v, g^> g^

    Call `update_eigenvector(loss)` every k steps; before the first call it is SAM. For another weight than 0.2 pass
    perturb=Eigen(alpha=0.1). `opt.perturb.v` is v, one tensor per parameter.

    Source: Luo et al. 2024, Algorithms 1 and 2.
    """

    def __init__(self, params: Any, base_optimizer: Any, *, rho: float = 0.05, **kwargs: Any):
        super().__init__(params, base_optimizer, rho=rho, **({"perturb": "eigen"} | kwargs))

    def update_eigenvector(
        self, loss: Callable[[], Tensor], *, steps: int = 5, average: Callable[[Tensor], object] | None = None
    ) -> None:
        """v <- `steps` power iterations on the Hessian of loss(), from the former v. Eigen-SAM paper, Algorithm 1.

        The products are exact (optim.hessian.exact_arithmetic); the buffers and random numbers of `model` are put back.

        Args:
            loss: evaluates the loss, a 0-d tensor, without backward().
            steps: products, each about the cost of two gradients.
            average: averages a flat tensor over the ranks in place, as `mean_over_ranks` does, so that v is that of
                the mean loss and equal on all of them. Then call the model without DDP around it.

        Raises:
            ValueError: for steps < 1.
        """
        if steps < 1:
            raise ValueError(f"power iteration takes at least 1 step, not {steps}")
        params = self._trainable()
        self._align_memory(params)
        with self.passes.aside(), exact_arithmetic(params[0].device):
            hessian = LossHessian(loss(), params, average=average)
            former = getattr(self.perturb, "v", None)
            v = hessian.start() if former is None else hessian.flatten(former)
            for _ in range(steps):
                v, _ = power_step(hessian, v)
        self.perturb.v = hessian.unflatten(v)  # pyright: ignore[reportFunctionMemberAccess]


def mean_over_ranks(flat: Tensor) -> None:
    """Average a flat tensor over torch.distributed's ranks in place: an `average` for loops without DDP's reduction."""
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
