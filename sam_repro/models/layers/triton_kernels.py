"""The Triton kernels of this package: attention with one program per head of an image, max pooling, GELU's backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def _softmax(q, k, valid, scale):
    """exp2 of the scaled scores less their maximum, and their sums: (N, N) and (N,) in fp32."""
    scores = tl.dot(q, tl.trans(k)) * scale
    scores = tl.where(valid, scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def _forward(qkv, out, tokens, scale, HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    image, head = program // HEADS, program % HEADS
    n, d = tl.arange(0, N)[:, None], tl.arange(0, D)[None, :]
    rows = n < tokens
    source = qkv + image * tokens * (3 * HEADS * D) + n * (3 * HEADS * D) + head * D + d
    q = tl.load(source, rows, other=0.0)
    k = tl.load(source + HEADS * D, rows, other=0.0)
    v = tl.load(source + 2 * HEADS * D, rows, other=0.0)
    p, total = _softmax(q, k, (tl.arange(0, N) < tokens)[None, :], scale)
    y = tl.dot(p.to(v.dtype), v) / total[:, None]
    tl.store(out + image * tokens * (HEADS * D) + n * (HEADS * D) + head * D + d, y.to(v.dtype), rows)


@triton.jit
def _backward(dy, qkv, dqkv, tokens, scale, root, HEADS: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    image, head = program // HEADS, program % HEADS
    n, d = tl.arange(0, N)[:, None], tl.arange(0, D)[None, :]
    rows = n < tokens
    where = image * tokens * (3 * HEADS * D) + n * (3 * HEADS * D) + head * D + d
    q = tl.load(qkv + where, rows, other=0.0)
    k = tl.load(qkv + where + HEADS * D, rows, other=0.0)
    v = tl.load(qkv + where + 2 * HEADS * D, rows, other=0.0)
    do = tl.load(dy + image * tokens * (HEADS * D) + n * (HEADS * D) + head * D + d, rows, other=0.0)
    p, total = _softmax(q, k, (tl.arange(0, N) < tokens)[None, :], scale)
    p = p / total[:, None]
    dv = tl.dot(tl.trans(p.to(v.dtype)), do)
    dp = tl.dot(do, tl.trans(v))
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * root).to(v.dtype)
    dq = tl.dot(ds, k)
    dk = tl.dot(tl.trans(ds), q)
    tl.store(dqkv + where, dq.to(v.dtype), rows)
    tl.store(dqkv + where + HEADS * D, dk.to(v.dtype), rows)
    tl.store(dqkv + where + 2 * HEADS * D, dv.to(v.dtype), rows)


def _shape(qkv: Tensor, heads: int) -> tuple[int, int, int, int]:
    images, tokens, width = qkv.shape
    d = width // (3 * heads)
    return images, tokens, d, max(16, triton.next_power_of_2(tokens))


def forward(qkv: Tensor, heads: int) -> Tensor:
    """(B, N, 3 heads D) -> (B, N, heads D); everything contiguous."""
    images, tokens, d, n = _shape(qkv, heads)
    out = qkv.new_empty(images, tokens, heads * d)
    _forward[(images * heads,)](qkv, out, tokens, d**-0.5 * LOG2E, HEADS=heads, D=d, N=n, num_warps=4)
    return out


def backward(dy: Tensor, qkv: Tensor, heads: int) -> Tensor:
    """The gradient of qkv."""
    images, tokens, d, n = _shape(qkv, heads)
    dqkv = torch.empty_like(qkv)
    root = d**-0.5
    _backward[(images * heads,)](dy, qkv, dqkv, tokens, root * LOG2E, root, HEADS=heads, D=d, N=n, num_warps=4)
    return dqkv


@triton.jit
def _pool_forward(x, y, index, height, width, out_height, out_width, C: tl.constexpr, W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    image, i = row // out_height, row % out_height
    j, c = tl.program_id(1) * W + tl.arange(0, W)[:, None], tl.arange(0, C)[None, :]
    best = tl.full([W, C], float("-inf"), tl.float32)
    where = tl.zeros([W, C], tl.int8)
    for k in tl.static_range(9):
        h, w = 2 * i + k // 3 - 1, 2 * j + k % 3 - 1
        inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        value = tl.load(x + ((image * height + h) * width + w) * C + c, inside, other=float("-inf")).to(tl.float32)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        where = tl.where(better, k, where).to(tl.int8)
    target = (row * out_width + j) * C + c
    tl.store(y + target, best.to(y.dtype.element_ty), j < out_width)
    tl.store(index + target, where, j < out_width)


@triton.jit
def _pool_backward(dy, index, dx, height, width, out_height, out_width, C: tl.constexpr, W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    image, h = row // height, row % height
    w, c = tl.program_id(1) * W + tl.arange(0, W)[:, None], tl.arange(0, C)[None, :]
    total = tl.zeros([W, C], tl.float32)
    for k in tl.static_range(4):  # an even coordinate lies in one window, an odd one in two
        i, j = (h + k // 2) // 2, (w + k % 2) // 2
        inside = (h % 2 >= k // 2) & (w % 2 >= k % 2) & (i < out_height) & (j < out_width)
        place = ((image * out_height + i) * out_width + j) * C + c
        chosen = tl.load(index + place, inside, other=-1).to(tl.int32)
        value = tl.load(dy + place, inside, other=0.0).to(tl.float32)
        total += tl.where(chosen == (h - 2 * i + 1) * 3 + (w - 2 * j + 1), value, 0.0)
    tl.store(dx + (row * width + w) * C + c, total.to(dx.dtype.element_ty), w < width)


def pool_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) channels-last -> the maxima and which of the nine pixels of a window they were."""
    b, c, h, w = x.shape
    size = (b, c, (h + 1) // 2, (w + 1) // 2)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    index = torch.empty_like(y, dtype=torch.int8)
    grid = (b * size[2], triton.cdiv(size[3], 16))
    _pool_forward[grid](x, y, index, h, w, *size[2:], C=c, W=16)
    return y, index


def pool_backward(dy: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    """The gradient of x from that of y."""
    b, c = dy.shape[:2]
    dx = torch.empty(b, c, height, width, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    grid = (b * height, triton.cdiv(width, 32))
    _pool_backward[grid](dy, index, dx, height, width, *dy.shape[2:], C=c, W=32)
    return dx


@triton.jit
def _bias_gelu_backward(
    dy, h, bias, dh, parts, rows, N,
    TANH: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    part, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * W + tl.arange(0, W)
    inside = column < N
    b = tl.load(bias + group * N + column, inside, other=0.0).to(tl.float32)
    total = tl.zeros([W], tl.float32)
    for first in range(0, ROWS, R):
        row = part * ROWS + first + tl.arange(0, R)
        mask = (row < rows)[:, None] & inside[None, :]
        where = (group * rows + row)[:, None] * N + column[None, :]
        x = tl.load(h + where, mask, other=0.0).to(tl.float32) + b[None, :]
        d = tl.load(dy + where, mask, other=0.0).to(tl.float32)
        if TANH:
            k: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
            t = 1 - 2 / (1 + tl.exp(2 * k * (x + 0.044715 * x * x * x)))
            slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 0.134145 * x * x)
        else:
            slope = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        d *= slope
        tl.store(dh + where, d.to(dh.dtype.element_ty), mask)
        total += tl.sum(d, 0)
    tl.store(parts + (group * tl.num_programs(0) + part) * N + column, total, inside)


def bias_gelu_backward(dy: Tensor, h: Tensor, bias: Tensor, tanh: bool, rows: int) -> tuple[Tensor, Tensor]:
    """From dy of gelu(h + bias): dh, and the bias gradient of every `rows` rows of a group, (G, parts, N) fp32."""
    groups, n = bias.shape
    of_group = h.numel() // (groups * n)
    dh, count = torch.empty_like(h), triton.cdiv(of_group, rows)
    parts = h.new_empty(groups, count, n, dtype=torch.float32)
    grid = (count, triton.cdiv(n, 128), groups)
    _bias_gelu_backward[grid](dy, h, bias, dh, parts, of_group, n, TANH=tanh, ROWS=rows, R=32, W=128)
    return dh, parts
