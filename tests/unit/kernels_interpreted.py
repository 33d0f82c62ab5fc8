"""Run by test_kernels.py in a process of its own: the Triton kernels on the CPU, by Triton's interpreter."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sam_repro.layers import kernels as layers
from sam_repro.optim import kernels as passes


def attention() -> None:
    images, tokens, heads, d = 2, 49, 3, 16
    qkv = torch.randn(images, tokens, 3 * heads * d, requires_grad=True)
    q, k, v = qkv.reshape(images, tokens, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
    y = (torch.softmax(q @ k.mT / d**0.5, -1) @ v).transpose(1, 2).reshape(images, tokens, heads * d)
    dy = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, qkv, dy)
    torch.testing.assert_close(layers.forward(qkv.detach(), heads), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layers.backward(dy, qkv.detach(), heads), gradient, rtol=1e-4, atol=1e-5)


def pooling() -> None:
    for size in ((6, 10), (7, 9)):
        x = torch.randn(2, 16, *size).relu().contiguous(memory_format=torch.channels_last).requires_grad_()
        y = F.max_pool2d(x, 3, 2, 1)
        dy = torch.randn_like(y)
        (gradient,) = torch.autograd.grad(y, x, dy)
        ours, index = layers.pool_forward(x.detach())
        assert torch.equal(ours, y)
        assert torch.equal(layers.pool_backward(dy, index, *size), gradient)


def sums() -> None:
    x = torch.randn(3, 300, 70)
    torch.testing.assert_close(passes.column_sums(x), x.sum(1), rtol=1e-4, atol=1e-4)


for check in (attention, pooling, sums):
    torch.manual_seed(0)
    check()
    print(check.__name__)
