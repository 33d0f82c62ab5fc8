"""The part of the schema that says which gradient method a run uses, and what of it cannot be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omegaconf import MISSING

from sam_repro.errors import UserError


@dataclass
class OptimConfig:
    """The gradient method: a perturbation (where to look), a combination (what to descend), a cadence (when).

    Any perturbation goes with any combination and any cadence. Fields that a method does not read change nothing.
    """

    name: str = MISSING  # of its YAML file, and of its rows in tables
    kind: str = "two_pass"  # two_pass: perturb and combine | entropy_sgd: the Langevin walk below
    perturb: str = "none"  # none | sam | asam | adaptive_official | fisher | friendly | vasso | eigen | random
    combine: str = "robust"  # robust (SAM) | ascent (GSAM) | min_f_h | weighted | wsam | cr (three passes)
    rho_max: float = 0.0  # radius of the perturbation at the peak learning rate
    rho_min: float = 0.0  # radius at the smallest learning rate
    alpha: float = 0.0  # ascent, min_f_h: alpha; weighted: lambda; wsam, cr: gamma
    beta: float = 0.0  # cr: weight of g_p - g_m
    decoupled: bool = False  # the base optimizer takes g; w -= lr (d - g) follows (WSAM's default; not clipped)
    every: int = 1  # the method's step every so many steps, clean gradients in between (LookSAM's k)
    reuse: float = 0.0  # every > 1: weight of the part that clean steps reuse (LookSAM's alpha)
    rho_schedule: str = "lr"  # lr: tied to the learning rate (Algorithm 1) | constant: rho_max throughout
    faithful_rho: bool = False  # let rho go negative in the warm-up, as the reference does (D-05)
    m: int = 64  # images that share one perturbation: the reference's batch per device (D-01)
    scope: str = "group"  # group: every m images perturb on their own | global: all images of all ranks share one eps
    groups: str = "auto"  # on a GPU: groups one after the other (loop) or all at once (batched) | auto
    eta: float = 0.0  # asam: added to |w|; fisher: weight of the squared gradient in the Fisher matrix
    weights_only: bool = False  # asam: scale by |w| only parameters called weight, as Kwon et al.; else all
    sigma: float = 1.0  # friendly: how much of the running mean is taken from g
    lam: float = 0.9  # friendly: weight of the past in the running mean
    theta: float = 0.9  # vasso: weight of the new gradient in the running mean
    k: int = 100  # eigen: steps between estimates of the eigenvector
    p: int = 5  # eigen: power iterations an estimate
    eigen_alpha: float | None = None  # eigen: weight of the eigenvector; null: alpha, which ascent may want for itself
    eigen_images: str = "group"  # eigen: estimate on m images of the step | batch (all) | fixed (the first batch)
    eigen_tf32: bool = False  # eigen: let a GPU's products use TF32, several times faster
    eigen_mode: str = "eval"  # eigen: estimate in eval mode, as the release | train
    renormalise: str = "none"  # eigen: none (as the release) | v_perp, to length 1 | sum, to length rho
    faithful_release: bool = False  # eigen: count k inside the epoch; perturb by rho g before the first estimate (D-29)
    inner_steps: int = 20  # entropy_sgd: L, steps of the walk
    inner_parts: int = 1  # entropy_sgd: parts of the batch that the walk takes in turn; 1: all of it every time
    inner_lr: float = 0.1  # entropy_sgd: eta of the walk
    inner_momentum: float = 0.9  # entropy_sgd: Nesterov's, in the walk
    inner_noise: float = 1e-4  # entropy_sgd: standard deviation of the Langevin noise
    inner_average: float = 0.75  # entropy_sgd: of mu, the mean of the walk
    gamma: float = 0.03  # entropy_sgd: pull back to w
    scoping: float = 1e-3  # entropy_sgd: growth of gamma a step


# Words that a field may be, and ranges that types cannot express.
WORDS = {
    "kind": ("two_pass", "entropy_sgd"),
    "perturb": ("none", "sam", "asam", "adaptive_official", "fisher", "friendly", "vasso", "eigen", "random"),
    "combine": ("robust", "ascent", "min_f_h", "weighted", "wsam", "cr"),
    "scope": ("group", "global"),
    "groups": ("auto", "loop", "batched"),
    "rho_schedule": ("lr", "constant"),
    "eigen_images": ("group", "batch", "fixed"),
    "eigen_mode": ("eval", "train"),
    "renormalise": ("none", "v_perp", "sum"),
}
FINITE = ("alpha", "beta", "reuse", "sigma")
NOT_NEGATIVE = ("rho_max", "rho_min", "m", "eta", "inner_noise", "gamma", "scoping")
UNIT = ("lam", "theta", "inner_average", "inner_momentum")
AT_LEAST_ONE = ("every", "k", "p", "inner_steps", "inner_parts")


def check_method(o: OptimConfig) -> None:
    """Ranges of the numbers, and methods that contradict themselves. One sentence that names the key."""
    for key in FINITE:
        if not math.isfinite(getattr(o, key)):
            raise UserError(f"optim.{key}={getattr(o, key)} must be a finite number")
    if o.eigen_alpha is not None and not math.isfinite(o.eigen_alpha):
        raise UserError(f"optim.eigen_alpha={o.eigen_alpha} must be a finite number, or null for optim.alpha")
    for key in NOT_NEGATIVE:
        if not 0 <= getattr(o, key) < math.inf:
            raise UserError(f"optim.{key}={getattr(o, key)} must be a finite number, 0 or greater")
    for key in UNIT:
        if not 0 <= getattr(o, key) <= 1:
            raise UserError(f"optim.{key}={getattr(o, key)} must lie in [0, 1]")
    for key in AT_LEAST_ONE:
        if getattr(o, key) < 1:
            raise UserError(f"optim.{key}={getattr(o, key)} must be at least 1")
    if not 0 < o.inner_lr < math.inf:
        raise UserError(f"optim.inner_lr={o.inner_lr} must be greater than 0")
    if o.perturb != "none" and o.m == 0:
        raise UserError("optim.m=0 is not a group size; give the number of images that share one perturbation")
    if o.rho_min > o.rho_max:
        raise UserError(f"optim.rho_min={o.rho_min} is greater than optim.rho_max={o.rho_max}")
    if o.combine == "wsam" and not 0 <= o.alpha < 1:
        raise UserError(f"optim.alpha={o.alpha} is gamma in optim.combine=wsam, which must lie in [0, 1)")
    if o.decoupled and o.every > 1:
        raise UserError(f"optim.decoupled=true leaves nothing to reuse between steps: it wants every=1, not {o.every}")
    if o.scope == "global" and (o.every > 1 or o.decoupled or o.combine == "cr" or o.kind == "entropy_sgd"):
        raise UserError("optim.scope=global is for two passes in every step: not entropy_sgd, every, decoupled or cr")
    if o.kind == "entropy_sgd" and o.perturb != "none":
        raise UserError(f"optim.kind=entropy_sgd does not perturb: it wants optim.perturb=none, not {o.perturb}")
