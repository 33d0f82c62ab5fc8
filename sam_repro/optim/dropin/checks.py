"""What the drop-in optimizers refuse, in one sentence each, before a run that would be silently wrong."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

# Attributes by which parameters that hold only a shard of themselves are known.
SHARDS = {
    "device_mesh": "DTensor: fully_shard or tensor parallelism",
    "_is_flat_param": "FSDP",
    "_fsdp_flattened": "FSDP",
    "ds_id": "DeepSpeed ZeRO",
}


def check_radius(rho: float) -> None:
    """A radius is finite and not negative; a ValueError says so."""
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho={rho} must be a finite number, 0 or greater")


def check_base_class(base_optimizer: Any) -> None:
    """A base optimizer is given as its class; a ValueError says so."""
    name = type(base_optimizer).__name__
    if isinstance(base_optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"the base optimizer is an object ({name}), but its class is wanted, with its arguments as keywords: "
            f"SAM(params, torch.optim.{name}, lr=0.1)"
        )
    if not callable(base_optimizer):
        raise ValueError(f"the base optimizer is to be a class such as torch.optim.SGD, not {base_optimizer!r}")


def check_base(base: Any) -> None:
    """What cannot be a base optimizer.

    Raises:
        ValueError: for what is no optimizer, is itself sharpness-aware, evaluates closures itself (LBFGS), takes
            sparse gradients only, or has a "rho" of its own in its groups (Adadelta).
    """
    name = type(base).__name__
    if not isinstance(base, torch.optim.Optimizer):
        raise ValueError(f"the base optimizer is to be a torch.optim.Optimizer, not {name}")
    if hasattr(base, "first_step"):
        raise ValueError(f"the base optimizer {name} is sharpness-aware itself; give it a plain one")
    arguments = inspect.signature(base.step).parameters.values()
    if any(a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments):
        raise ValueError(f"{name} evaluates a closure many times in a step, so it cannot take a gradient that is given")
    if isinstance(base, torch.optim.SparseAdam):
        raise ValueError("SparseAdam takes sparse gradients only, and a sharpness-aware step makes dense ones")
    if "rho" in base.defaults:
        raise ValueError(f"{name} has a rho of its own, and a group cannot hold two; choose another base optimizer")


def check_group(group: dict[str, Any]) -> None:
    """What cannot be in a parameter group.

    Raises:
        ValueError: for a radius that is negative or not finite, sharded parameters, differentiable=True.
    """
    check_radius(group["rho"])
    if group.get("differentiable"):
        raise ValueError("differentiable=True: a sharpness-aware step writes the weights, and cannot be differentiated")
    for p in group["params"]:
        kinds = [kind for attribute, kind in SHARDS.items() if getattr(p, attribute, None) not in (None, False)]
        if kinds:
            raise ValueError(
                f"these parameters are sharded ({kinds[0]}), and a norm over this rank's shards is not the norm over "
                "all parameters; use DistributedDataParallel"
            )
