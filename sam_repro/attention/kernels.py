"""The Triton kernels of this package: one program a head of an image."""

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
