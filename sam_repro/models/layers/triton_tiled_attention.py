"""Attention for 65 to 256 tokens on the packed output of the qkv layer, as Triton kernels: ViT-B/16's 196 tokens.

A program takes a tile of rows of one head and walks over all columns: forward and dq have queries as rows, dk and dv
have keys, so every sum ends in the registers of one program and nothing is added atomically. The forward pass keeps the
log-sum-exp of each query's scores (flash attention 2: Dao 2023), from which backward recomputes the softmax, with

    p = exp2(s - lse)    delta = sum(dy * y)    ds = p (dp - delta)    dp = dy v'

Scores and their log-sum-exp are in units of log 2, since the hardware's exponential is exp2. Each kernel is written so
that p and ds are left factors of their products, which tensor cores read from registers: dk and dv work on transposed
scores. That costs two products more than one kernel for all three gradients, but no trip through shared memory.

Rows past the last token are computed from zeros and not stored. Hopper's products have 64 rows; 196 tokens fill three
tiles and four rows of a fourth, so a last tile of at most `TAIL` rows uses the older, smaller products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_repro.models.layers.triton_kernels import LOG2E

TAIL = tl.constexpr(16)

# rows and columns of a tile, warps, stages of the loads' pipeline
FORWARD = (64, 32, 4, 3)
QUERIES = (64, 64, 4, 2)
KEYS = (64, 32, 4, 2)


@triton.jit
def _keys_and_values(qkv, token, tokens, d, WIDTH: tl.constexpr):
    """k and v of some tokens of a head, zeros past the last one."""
    at, inside = token[:, None] * (3 * WIDTH) + WIDTH + d, token[:, None] < tokens
    return tl.load(qkv + at, inside, other=0.0), tl.load(qkv + at + WIDTH, inside, other=0.0)


@triton.jit
def _forward_rows(
    qkv, y, lse, first, tokens, scale,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * D
    row, d = first + tl.arange(0, M), tl.arange(0, D)[None, :]
    q = tl.load(qkv + (row[:, None] * (3 * WIDTH) + d), row[:, None] < tokens, other=0.0)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, D], tl.float32)
    for start in range(0, tokens, N):
        column = start + tl.arange(0, N)
        k, v = _keys_and_values(qkv, column, tokens, d, WIDTH)
        s = tl.where((column < tokens)[None, :], tl.dot(q, tl.trans(k)), float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None])
        top = higher
    out = (out / total[:, None]).to(q.dtype)
    tl.store(y + (row[:, None] * WIDTH + d), out, row[:, None] < tokens)
    tl.store(lse + row, top + tl.log2(total), row < tokens)


@triton.jit
def _query_rows(
    dy, y, lse, delta, qkv, dqkv, first, tokens, scale, root,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * D
    row, d = first + tl.arange(0, M), tl.arange(0, D)[None, :]
    inside = row[:, None] < tokens
    wide, narrow = row[:, None] * (3 * WIDTH) + d, row[:, None] * WIDTH + d
    q = tl.load(qkv + wide, inside, other=0.0)
    dout = tl.load(dy + narrow, inside, other=0.0)
    out = tl.load(y + narrow, inside, other=0.0)
    norm = tl.load(lse + row, row < tokens, other=0.0)
    mean = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + row, mean, row < tokens)
    dq = tl.zeros([M, D], tl.float32)
    for start in range(0, tokens, N):
        column = start + tl.arange(0, N)
        k, v = _keys_and_values(qkv, column, tokens, d, WIDTH)
        s = tl.dot(q, tl.trans(k)) * scale - norm[:, None]
        p = tl.exp2(tl.where((column < tokens)[None, :], s, float("-inf")))  # else exp2(-lse), perhaps infinite
        dp = tl.dot(dout, tl.trans(v))
        dq = tl.dot((p * (dp - mean[:, None])).to(q.dtype), k, dq)
    tl.store(dqkv + wide, (dq * root).to(q.dtype), inside)


@triton.jit
def _key_rows(
    dy, lse, delta, qkv, dqkv, first, tokens, scale, root,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * D
    row, d = first + tl.arange(0, M), tl.arange(0, D)[None, :]
    k, v = _keys_and_values(qkv, row, tokens, d, WIDTH)
    dk = tl.zeros([M, D], tl.float32)
    dv = tl.zeros([M, D], tl.float32)
    for start in range(0, tokens, N):
        column = start + tl.arange(0, N)
        q = tl.load(qkv + (column[:, None] * (3 * WIDTH) + d), column[:, None] < tokens, other=0.0)
        dout = tl.load(dy + (column[:, None] * WIDTH + d), column[:, None] < tokens, other=0.0)
        norm = tl.load(lse + column, column < tokens, other=0.0)
        mean = tl.load(delta + column, column < tokens, other=0.0)
        # A query past the last token has p = 1, but its dout, delta and q are zero, and so is what it adds.
        p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - norm[None, :])
        dv = tl.dot(p.to(k.dtype), dout, dv)
        dp = tl.dot(v, tl.trans(dout))
        dk = tl.dot((p * (dp - mean[None, :])).to(k.dtype), q, dk)
    at, inside = row[:, None] * (3 * WIDTH) + WIDTH + d, row[:, None] < tokens
    tl.store(dqkv + at, (dk * root).to(k.dtype), inside)
    tl.store(dqkv + at + WIDTH, dv.to(k.dtype), inside)


@triton.jit
def _forward(qkv, y, lse, tokens, scale, HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    tiles = tl.cdiv(tokens, M)
    program, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * M
    at = program // HEADS * tokens * (HEADS * D)  # of the image; a head starts D after the one before it
    head = program % HEADS * D
    qkv, y, lse = qkv + 3 * at + head, y + at + head, lse + program * tokens
    if tokens - first > TAIL:
        _forward_rows(qkv, y, lse, first, tokens, scale, HEADS, D, M, N)
    else:
        _forward_rows(qkv, y, lse, first, tokens, scale, HEADS, D, TAIL, N)


@triton.jit
def _queries(
    dy, y, lse, delta, qkv, dqkv, tokens, scale, root,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, M)
    program, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * M
    at = program // HEADS * tokens * (HEADS * D)
    head = program % HEADS * D
    dy, y, lse, delta = dy + at + head, y + at + head, lse + program * tokens, delta + program * tokens
    qkv, dqkv = qkv + 3 * at + head, dqkv + 3 * at + head
    if tokens - first > TAIL:
        _query_rows(dy, y, lse, delta, qkv, dqkv, first, tokens, scale, root, HEADS, D, M, N)
    else:
        _query_rows(dy, y, lse, delta, qkv, dqkv, first, tokens, scale, root, HEADS, D, TAIL, N)


@triton.jit
def _keys(
    dy, lse, delta, qkv, dqkv, tokens, scale, root,
    HEADS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, M)
    program, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * M
    at = program // HEADS * tokens * (HEADS * D)
    head = program % HEADS * D
    dy, lse, delta = dy + at + head, lse + program * tokens, delta + program * tokens
    qkv, dqkv = qkv + 3 * at + head, dqkv + 3 * at + head
    if tokens - first > TAIL:
        _key_rows(dy, lse, delta, qkv, dqkv, first, tokens, scale, root, HEADS, D, M, N)
    else:
        _key_rows(dy, lse, delta, qkv, dqkv, first, tokens, scale, root, HEADS, D, TAIL, N)


def forward(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(B, N, 3 heads D) -> (B, N, heads D), and the log2-sum-exp2 of the scores (B, heads, N) in fp32."""
    images, tokens, width = qkv.shape
    d = width // (3 * heads)
    y = qkv.new_empty(images, tokens, heads * d)
    lse = qkv.new_empty(images, heads, tokens, dtype=torch.float32)
    _launch(_forward, FORWARD, qkv, heads, qkv, y, lse, tokens, d**-0.5 * LOG2E)
    return y, lse


def backward(dy: Tensor, y: Tensor, lse: Tensor, qkv: Tensor, heads: int) -> Tensor:
    """The gradient of qkv."""
    tokens = qkv.shape[1]
    root = (qkv.shape[2] // (3 * heads)) ** -0.5
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    _launch(_queries, QUERIES, qkv, heads, dy, y, lse, delta, qkv, dqkv, tokens, root * LOG2E, root)  # writes delta
    _launch(_keys, KEYS, qkv, heads, dy, lse, delta, qkv, dqkv, tokens, root * LOG2E, root)
    return dqkv


def _launch(kernel, tile: tuple[int, int, int, int], qkv: Tensor, heads: int, *arguments) -> None:
    m, n, warps, stages = tile
    images, tokens, width = qkv.shape
    grid = (triton.cdiv(tokens, m) * images * heads,)
    kernel[grid](*arguments, HEADS=heads, D=width // (3 * heads), M=m, N=n, num_warps=warps, num_stages=stages)
