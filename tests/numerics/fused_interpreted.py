"""Run by test_chunks.py in a process of its own: the fused engine on the CPU, its kernels by Triton's interpreter.

The steps of the methods that are named as arguments (none: of all) in chunks of several groups, of one and of parts
of one, last chunks that are smaller included, against the plain engine.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.nn.functional as F
from torch import nn

from sam_repro.models.layers.grouped import accept_groups
from sam_repro.optim import GradientStep, build_perturbation
from sam_repro.optim.gpu import fused_step
from sam_repro.optim.gpu.fused_step import FusedStep

METHODS = {
    "vanilla": ("none", "robust"),
    "sam": ("sam", "robust"),
    "gsam": ("sam", "ascent"),
    "asam": ("asam", "ascent"),
    "min_f_h": ("sam", "min_f_h"),
    "friendly": ("friendly", "robust"),
    "vasso": ("vasso", "robust"),
    "eigen": ("eigen", "ascent"),
    "random": ("random", "robust"),
}
REMEMBER = ("vasso", "random")  # something from step to step, or a step's number: two steps tell
BATCH, M = 10, 2  # small: the interpreter takes milliseconds per launch


def problem(norm: bool):
    middle = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
    model = nn.Sequential(nn.Linear(6, 8), middle, nn.GELU(), nn.Linear(8, 3))
    accept_groups(model)

    def objective(tensors, x, y):
        return F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y)

    return model, objective


def compare(method: str, chunk: int, *, norm: bool = False, m: int = M) -> None:
    """A step or two by both engines, whose memories must agree too."""
    torch.manual_seed(0)
    (model, objective), (perturb, combine) = problem(norm), METHODS[method]
    found = []
    for kind, options in ((GradientStep, {}), (FusedStep, {"compile": False, "graph": False, "chunk": chunk})):
        torch.manual_seed(1)
        own = copy.deepcopy(model)
        options |= {"perturb": "none" if perturb == "none" else build_perturbation(perturb)}
        if perturb == "eigen":
            options["perturb"].v = [torch.randn(p.shape) / 8 for p in own.parameters()]
        params, buffers = dict(own.named_parameters()), dict(own.named_buffers())
        step = kind(objective, params, buffers=buffers, combine=combine, alpha=0.4, m=m, **options)
        for seed in range(2 if method in REMEMBER else 1):
            x, y = torch.randn(BATCH, 6), torch.randint(3, (BATCH,))
            metrics = step(x, y, rho=0.1, seed=seed).clone()
            gradient = torch.cat([p.grad.reshape(-1) for p in own.parameters()])
        found.append((metrics, gradient, *own.buffers()))
    (_, expected, *_), (_, ours, *_) = found
    assert (ours - expected).norm() < 1e-5 * expected.norm(), (method, chunk, norm, m)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


for fused_step.LANES in (2, 3):  # of 5 groups the last one or two go through with fewer
    compare("gsam", M)
    compare("gsam", 4)  # 2 2 1 groups
    compare("sam", M, norm=True)
    compare("vasso", M)
fused_step.LANES = 1
for name in sys.argv[1:] or METHODS:
    sizes = (0, 4, 6, 2, 1) if name == "gsam" else (4, 1)  # 4: groups 2 2 1; 1: micro-batches 1 1 of each group
    for images in sizes:
        compare(name, images)
    print(name)
if not sys.argv[1:]:
    for images in (0, 3, 10):  # the whole batch is one group
        compare("gsam", images, m=BATCH)
    compare("gsam", M, norm=True)
    compare("vanilla", M, norm=True)
