"""Run by test_kernels.py in a process of its own: the Triton kernels on the CPU, by Triton's interpreter."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

from sam_repro.models.layers import triton_kernels as layers
from sam_repro.models.layers import triton_tiled_attention as layers_tiled
from sam_repro.models.layers.attention import tiled_attention
from sam_repro.optim.gpu import triton_kernels as passes


def plain_attention(images: int, tokens: int, heads: int, d: int):
    """Random packed qkv and dy, and softmax attention's output, log2 of its normaliser and gradient, in float64."""
    qkv = torch.randn(images, tokens, 3 * heads * d, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.reshape(images, tokens, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
    s = q @ k.mT / d**0.5
    y = (torch.softmax(s, -1) @ v).transpose(1, 2).reshape(images, tokens, heads * d)
    dy = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, qkv, dy)
    lse = torch.logsumexp(s, -1) / math.log(2)
    return (x.detach().float() for x in (qkv, dy, y, lse, gradient))


def attention() -> None:
    qkv, dy, y, _, gradient = plain_attention(2, 49, 3, 16)
    torch.testing.assert_close(layers.forward(qkv, 3), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layers.backward(dy, qkv, 3), gradient, rtol=1e-4, atol=1e-5)


def tiled() -> None:
    for tokens, heads, d in ((65, 2, 16), (100, 2, 32), (196, 1, 64), (197, 2, 16), (256, 1, 64)):
        qkv, dy, y, lse, gradient = plain_attention(1, tokens, heads, d)
        ours, normaliser = layers_tiled.forward(qkv, heads)
        torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(normaliser, lse, rtol=1e-4, atol=1e-5)
        found = layers_tiled.backward(dy, ours, normaliser, qkv, heads)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
    leaf = qkv.requires_grad_()  # the same through the operators
    assert torch.equal(torch.autograd.grad(tiled_attention(leaf, heads)[0], leaf, dy)[0], found)
    # Scores far below zero: a padded key, whose score is 0, would outweigh them all. Equal scores: y is the mean of v.
    c = heads * d
    qkv = torch.cat([torch.full((2, 197, c), 40.0), torch.full((2, 197, c), -40.0), torch.randn(2, 197, c)], -1)
    ours, normaliser = layers_tiled.forward(qkv, heads)
    torch.testing.assert_close(ours, qkv[..., 2 * c :].mean(1, keepdim=True).expand_as(ours), rtol=1e-4, atol=1e-5)
    assert layers_tiled.backward(torch.ones_like(ours), ours, normaliser, qkv, heads).isfinite().all()


def pooling() -> None:
    for size in ((6, 10), (7, 9)):
        x = torch.randn(2, 16, *size).relu().contiguous(memory_format=torch.channels_last).requires_grad_()
        y = F.max_pool2d(x, 3, 2, 1)
        dy = torch.randn_like(y)
        (gradient,) = torch.autograd.grad(y, x, dy)
        ours, index = layers.pool_forward(x.detach())
        assert torch.equal(ours, y)
        assert torch.equal(layers.pool_backward(dy, index, *size), gradient)


def step() -> None:
    """One step's passes: three groups, tensors of odd sizes, an eigenvector beside the gradient."""
    shapes, groups = [(5, 7), (4096 * 2 + 3,), (1,)], 3
    table = passes.PointerTable([math.prod(shape) for shape in shapes], torch.device("cpu"))
    w, v = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    g, g_p, perturbed = ([torch.randn(groups, *shape) for shape in shapes] for _ in range(3))
    flat_g, flat_p = (torch.cat([x.reshape(groups, -1) for x in xs], 1) for xs in (g, g_p))
    flat_w, flat_v = (torch.cat([x.reshape(-1) for x in xs]) for xs in (w, v))
    a, b = torch.randn(2, groups)
    near = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-3)
    near(passes.squares(table, g, groups), flat_g.square().sum(1))
    cross, square = passes.inner(table, g, g_p, groups)
    near(cross, (flat_g * flat_p).sum(1))
    near(square, flat_p.square().sum(1))
    cross, square = passes.inner(table, g, v, groups, shared=True)
    near(cross, flat_g @ flat_v)
    near(square, (flat_v @ flat_v).expand(groups))
    passes.perturb(table, w, g, perturbed, a, v=v, b=b)
    near(torch.cat([x.reshape(groups, -1) for x in perturbed], 1), flat_w + a[:, None] * flat_g + b[:, None] * flat_v)
    out = [x.clone() for x in w]
    passes.combine(table, g, g_p, out, a=a, b=b, add=True)
    near(torch.cat([x.reshape(-1) for x in out]), flat_w + a @ flat_g + b @ flat_p)


for check in (attention, tiled, pooling, step):
    torch.manual_seed(0)
    check()
    print(check.__name__)
