"""Curvature of a loss at given weights: Hessian products, eigenvalues, the surrogate gap, slices."""

from sam_repro.curvature.lanczos import Eigenpairs, dominant, lanczos, power_iteration, spectral_density
from sam_repro.curvature.measures import alignment, sharpness
from sam_repro.optim.hessian import Hessian

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
