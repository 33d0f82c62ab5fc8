"""Sharpness-aware gradients as functions of the weights. Imports torch and its own files only."""

from sam_repro.optim.base import build_base, decay_groups
from sam_repro.optim.cadence import EveryK
from sam_repro.optim.combine import COMBINATIONS, THREE_PASSES
from sam_repro.optim.eigen import PowerIteration
from sam_repro.optim.entropy_sgd import EntropySGD
from sam_repro.optim.perturb import PERTURBATIONS, Eigen, build_perturbation
from sam_repro.optim.schedule import lr_at, rho_at
from sam_repro.optim.step import METRICS, GradientStep
from sam_repro.optim.synchronised import GlobalStep
from sam_repro.optim.wrapper import ASAM, GSAM, SAM, EigenSAM, SharpnessAware

__all__ = [
    "ASAM",
    "COMBINATIONS",
    "GSAM",
    "METRICS",
    "PERTURBATIONS",
    "SAM",
    "THREE_PASSES",
    "Eigen",
    "EigenSAM",
    "EntropySGD",
    "EveryK",
    "GlobalStep",
    "GradientStep",
    "PowerIteration",
    "SharpnessAware",
    "build_base",
    "build_perturbation",
    "decay_groups",
    "lr_at",
    "rho_at",
]
