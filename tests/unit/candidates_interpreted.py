"""Run by test_candidates.py in a process of its own: layers that are being tried, on the CPU, by Triton's interpreter.

Each against the layer that it would replace: output and every group's gradients, weights per group and shared.
"""

from __future__ import annotations

import torch
from timm.layers.mlp import Mlp
from timm.models.mlp_mixer import MixerBlock
from torch import nn

from sam_repro.models.layers import candidates, grouped


def answers(layer: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> list:
    """Output, the gradient of the input, and those of the weights."""
    leaves = [t.detach().requires_grad_() for t in (x, *tensors.values())]
    y = torch.func.functional_call(layer, dict(zip(tensors, leaves[1:], strict=True)), (leaves[0],))
    return [y, *torch.autograd.grad(y, leaves, dy)]


def compare(name: str, make, groups: int, images: int, *rest: int) -> None:
    """A layer with and without a candidate on fresh random numbers, G groups of so many images."""
    x = torch.randn(groups * images, *rest)
    dy = torch.randn_like(x)
    own = {n: torch.randn_like(p) for n, p in make().named_parameters()}
    for lead in ((groups,), ()):
        for stride in ("own", "shared")[: 2 if lead else 1]:
            tensors = {
                n: torch.randn(*lead, *p.shape) if stride == "own" else p.expand(*lead, *p.shape)
                for n, p in own.items()
            }
            found = []
            for tried in (frozenset(), frozenset([name])):
                candidates.TRIED = tried
                layer = make()
                grouped.accept_groups(layer)
                changed = [type(m).__name__ for m in layer.modules() if type(m).__module__ == candidates.__name__]
                assert bool(changed) == (bool(tried) and name != "sums"), (name, changed)
                found.append(answers(layer, tensors, x, dy))
            for a, b in zip(*found, strict=True):
                assert b.shape == a.shape and b.stride() == a.stride(), (name, a.stride(), b.stride())
                assert (b - a).norm() <= 1e-5 * a.norm(), (name, stride, (b - a).norm() / a.norm())


def gelu() -> None:
    for act in (nn.GELU, lambda: nn.GELU(approximate="tanh")):
        for sizes in ((3, 2, 7, 10), (2, 3, 100, 24), (1, 1, 1, 200)):  # the last but one: more rows than a program has
            compare("gelu", lambda act=act, d=sizes[-1]: Mlp(d, 2 * d + 5, act_layer=act), *sizes)
    h, bias = torch.tensor([[-200.0, 200.0, 0.0, 1e4]]), torch.zeros(1, 4)
    dh, _ = candidates.bias_gelu_backward(torch.ones_like(h), h, bias, True)
    assert torch.equal(dh, torch.tensor([[0.0, 1.0, 0.5, 1.0]]))  # no overflow far from zero


def sums() -> None:
    compare("sums", lambda: Mlp(6, 11), 3, 4, 49, 6)  # parts of 4 rows are too small, of 64 are not
    compare("sums", lambda: Mlp(6, 11), 2, 64, 49, 6)
    compare("sums", lambda: Mlp(6, 11), 3, 2, 7, 6)


def tokens() -> None:
    for size, dim in ((7, 16), (8, 16), (49, 20)):
        make = lambda size=size, dim=dim: MixerBlock(dim, size, mlp_ratio=(0.5, 2.0))  # noqa: E731
        compare("tokens", make, 3, 2, size, dim)


for check in (gelu, sums, tokens):
    torch.manual_seed(0)
    check()
    print(check.__name__)
