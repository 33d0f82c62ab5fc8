"""Curvature of a loss at given weights: Hessian products, eigenvalues, the surrogate gap, slices, toys."""

from sam_repro.optim.hvp import Hessian
from sam_repro.sharpness.lanczos import Eigenpairs, dominant, lanczos, power_iteration, spectral_density
from sam_repro.sharpness.measures import alignment, sharpness

__all__ = [
    "Eigenpairs",
    "Hessian",
    "alignment",
    "dominant",
    "lanczos",
    "power_iteration",
    "sharpness",
    "spectral_density",
]
