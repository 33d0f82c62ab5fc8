"""Sharpness-aware gradients as functions of the weights. Imports torch and its own files only."""

from sam_repro.optim.base import build_base, decay_groups
from sam_repro.optim.combine import COMBINATIONS
from sam_repro.optim.perturb import PERTURBATIONS
from sam_repro.optim.schedule import lr_at, rho_at
from sam_repro.optim.step import METRICS, GradientStep

__all__ = [
    "COMBINATIONS",
    "METRICS",
    "PERTURBATIONS",
    "GradientStep",
    "build_base",
    "decay_groups",
    "lr_at",
    "rho_at",
]
