"""Sharpness-aware gradients as functions of the weights. Imports torch and its own files only."""

from sam_repro.optim.base_optimizer import build_base, decay_groups
from sam_repro.optim.combinations import COMBINATIONS, THREE_PASSES
from sam_repro.optim.dropin.optimizers import ASAM, GSAM, SAM, EigenSAM, SharpnessAware, mean_over_ranks
from sam_repro.optim.eigen_sam import PowerIteration
from sam_repro.optim.entropy_sgd import EntropySGD
from sam_repro.optim.looksam import LookSAMStep
from sam_repro.optim.perturbations import PERTURBATIONS, Eigen, build_perturbation
from sam_repro.optim.schedules import lr_at, rho_at
from sam_repro.optim.synced_perturbation import SyncedStep
from sam_repro.optim.two_pass import METRICS, GradientStep

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
    "GradientStep",
    "LookSAMStep",
    "PowerIteration",
    "SharpnessAware",
    "SyncedStep",
    "build_base",
    "build_perturbation",
    "decay_groups",
    "lr_at",
    "mean_over_ranks",
    "rho_at",
]
