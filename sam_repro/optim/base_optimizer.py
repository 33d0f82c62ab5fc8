"""Base optimizers and which parameters they decay. Plain torch.optim objects own all the state."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_kernel(name: str, parameter: Tensor) -> bool:
    """Whether the reference decays this parameter: matrices and convolutions, not biases, norms or embeddings."""
    return parameter.ndim >= 2 and name.endswith("weight") and "embed." not in name.replace("patch_embed.", "")


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, *, decay: str = "kernels"
) -> list[dict]:
    """Two parameter groups, decayed and not; without an empty one.

    Args:
        named_parameters: (name, parameter) as a module gives them.
        weight_decay: of the decayed group; the other's is 0.
        decay: "kernels" decays matrices and convolutions (is_kernel: the reference), "all" everything.

    Returns:
        groups for a torch optimizer.
    """
    decayed, plain = [], []
    for name, parameter in named_parameters:
        (decayed if decay == "all" or is_kernel(name, parameter) else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_base(
    name: str,
    groups: list[dict],
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """The base optimizer, fused on a GPU where torch can.

    "sgd" and "adam" have coupled L2 decay, "adamw" and "adabelief" decay decoupled and times lr. AdaBelief is timm's,
    without rectification, as its authors ran ImageNet; they name eps 1e-8 there, and 1e-16 as their library's default
    (D-28). Any other name is a class of torch.optim, such as "NAdam".

    Args:
        name: of the optimizer.
        groups: parameter groups, each with its weight_decay.
        lr, momentum, nesterov, betas, eps: torch's arguments; each class gets those that it has.

    Returns:
        the optimizer.

    Raises:
        ValueError: for an unknown name, or a class whose step wants a closure or sparse gradients.
    """
    options: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps}
    if name == "adabelief":
        from timm.optim.adabelief import AdaBelief  # the one base optimizer that torch lacks

        return AdaBelief(groups, lr=lr, betas=betas, eps=eps, decoupled_decay=True, rectify=False)
    classes = {n: c for n, c in vars(torch.optim).items() if isinstance(c, type) and n not in UNFIT}
    cls = classes.get({"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}.get(name, name))
    if cls is None:
        known = f"sgd, adam, adamw, adabelief, or a class of torch.optim ({', '.join(sorted(classes))})"
        raise ValueError(f"unknown base optimizer '{name}': {known}")
    taken = inspect.signature(cls).parameters
    if isinstance(getattr(taken.get("eps"), "default", None), tuple):  # Adafactor's two are of another kind
        del options["eps"]
    if name in ("sgd", "adam", "adamw") and all(p.is_cuda for group in groups for p in group["params"]):
        options["fused"] = True
    return cls(groups, **{key: value for key, value in options.items() if key in taken})


# Classes of torch.optim that cannot be a base: abstract, closure-driven, sparse.
UNFIT = ("Optimizer", "LBFGS", "SparseAdam")
