"""Passes over all parameters at once, as Triton kernels: cast, squared norm, perturb, inner products, combine.

A sharpness-aware step moves whole copies of the weights between its two passes; each kernel here reads and writes
every copy once. Tensors of one dtype are addressed through a table of pointers, so one launch serves all of them.
Gradients may carry a leading dimension of G groups, each with its own scalars.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


ROWS = 256  # pointer lists kept; a captured step needs about ten per shape of its chunks


class PointerTable:
    """Which block of which tensor each program of a launch works on, and the tensors' addresses.

    Args:
        sizes: elements of each tensor (of one group).
        device: of the tensors.
    """

    def __init__(self, sizes: list[int], device: torch.device):
        self.aligned = all(size % 8 == 0 for size in sizes)
        blocks = [(t, start) for t, size in enumerate(sizes) for start in range(0, size, BLOCK)]
        self.tensor = torch.tensor([t for t, _ in blocks], dtype=torch.int32, device=device)
        self.start = torch.tensor([s for _, s in blocks], dtype=torch.int64, device=device)
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self.blocks = len(blocks)
        self.rows = torch.zeros(ROWS, len(sizes), dtype=torch.int64, device=device)
        self.known: dict[tuple[int, ...], int] = {}
        self.pending: list[tuple[int, ...]] = []
        self.captured = False  # whether a graph reads the rows

    def of(self, tensors: list[Tensor]) -> Tensor:
        """The addresses of `tensors` on the device; kept, since addresses repeat from step to step.

        A host-to-device copy cannot be captured in a CUDA graph. During capture the row is only reserved; `flush`
        fills it before the first replay.
        """
        key = tuple(t.data_ptr() for t in tensors)
        if key not in self.known:
            assert not self.aligned or all(p % 16 == 0 for p in key), "gradients must start at 16-byte addresses"
            if len(self.known) == ROWS:
                assert not self.captured, "more pointer lists than rows, and a graph reads them"
                self.known.clear()
            self.known[key] = len(self.known)
            self.pending.append(key)
        if self.rows.is_cuda and torch.cuda.is_current_stream_capturing():
            self.captured = True
        else:
            self.flush()
        return self.rows[self.known[key]]

    def forget(self) -> None:
        """Keep no address: the graphs that read them are gone."""
        self.known.clear()
        self.pending.clear()
        self.captured = False

    def flush(self) -> None:
        """Copy the addresses noted since the last time to the device."""
        for key in self.pending:
            self.rows[self.known[key]].copy_(torch.tensor(key, dtype=torch.int64))
        self.pending.clear()


@triton.jit
def _locate(tensor, start, sizes, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """(tensor number, offsets of this program's elements, mask, elements of the tensor)."""
    program = tl.program_id(0)
    t = tl.load(tensor + program)
    size = tl.load(sizes + t)
    first = tl.load(start + program)
    if ALIGNED:
        size = tl.multiple_of(size, 8)
        first = tl.multiple_of(first, 8)
    offsets = first + tl.arange(0, BLOCK)
    return t, offsets, offsets < size, size


@triton.jit
def _address(table, t, like: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer number `t` of a table, to elements of dtype `like`."""
    pointer = tl.load(table + t).to(tl.pointer_type(like))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _squares(g, tensor, start, sizes, out, groups, G_T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    t, offsets, mask, size = _locate(tensor, start, sizes, BLOCK, ALIGNED)
    group = tl.program_id(1).to(tl.int64)
    x = tl.load(_address(g, t, G_T, ALIGNED) + group * size + offsets, mask, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0) * groups + group, tl.sum(x * x))


@triton.jit
def _perturb(
    w, g, v, perturbed, tensor, start, sizes, a, b,
    GROUPS: tl.constexpr, G_T: tl.constexpr, A_T: tl.constexpr, ADD: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    t, offsets, mask, size = _locate(tensor, start, sizes, BLOCK, ALIGNED)
    x = tl.load(_address(w, t, tl.float32, ALIGNED) + offsets, mask)  # once for all groups
    if V:
        direction = tl.load(_address(v, t, tl.float32, ALIGNED) + offsets, mask)
    for group in range(GROUPS):
        y = x
        if ADD:
            gradient = tl.load(_address(g, t, G_T, ALIGNED) + group * size + offsets, mask).to(tl.float32)
            y += tl.load(a + group) * gradient
        if V:
            y += tl.load(b + group) * direction
        tl.store(_address(perturbed, t, A_T, ALIGNED) + group * size + offsets, y.to(A_T), mask)


@triton.jit
def _inner(
    g, g_p, tensor, start, sizes, cross, square, groups,
    G_T: tl.constexpr, P_T: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    t, offsets, mask, size = _locate(tensor, start, sizes, BLOCK, ALIGNED)
    group = tl.program_id(1).to(tl.int64)
    x = tl.load(_address(g, t, G_T, ALIGNED) + group * size + offsets, mask, other=0.0).to(tl.float32)
    other = offsets if SHARED else group * size + offsets
    y = tl.load(_address(g_p, t, P_T, ALIGNED) + other, mask, other=0.0).to(tl.float32)
    where = tl.program_id(0) * groups + group
    tl.store(cross + where, tl.sum(x * y))
    tl.store(square + where, tl.sum(y * y))


@triton.jit
def _combine(
    g, g_p, out, tensor, start, sizes, a, b,
    GROUPS: tl.constexpr, USE_G: tl.constexpr, USE_P: tl.constexpr, ADD: tl.constexpr,
    G_T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    t, offsets, mask, size = _locate(tensor, start, sizes, BLOCK, ALIGNED)
    target = _address(out, t, tl.float32, ALIGNED) + offsets
    total = tl.load(target, mask) if ADD else tl.zeros([BLOCK], tl.float32)
    for group in tl.static_range(GROUPS):
        if USE_G:
            x = tl.load(_address(g, t, G_T, ALIGNED) + group * size + offsets, mask).to(tl.float32)
            total += tl.load(a + group) * x
        if USE_P:
            y = tl.load(_address(g_p, t, G_T, ALIGNED) + group * size + offsets, mask).to(tl.float32)
            total += tl.load(b + group) * y
    tl.store(target, total, mask)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def squares(table: PointerTable, g: list[Tensor], groups: int) -> Tensor:
    """||g||^2 of each group: (groups,). Reads g once; the order of summation is fixed."""
    out = table.sizes.new_empty(table.blocks, groups, dtype=torch.float32)
    _squares[(table.blocks, groups)](
        table.of(g), table.tensor, table.start, table.sizes, out, groups,
        G_T=TYPES[g[0].dtype], BLOCK=BLOCK, ALIGNED=table.aligned,
    )  # fmt: skip
    return out.sum(0)


def perturb(
    table: PointerTable,
    w: list[Tensor],
    g: list[Tensor] | None,
    perturbed: list[Tensor],
    a: Tensor | None,
    *,
    v: list[Tensor] | None = None,
    b: Tensor | None = None,
) -> None:
    """perturbed = w + a_group g + b_group v, rounded once to the perturbed's dtype; without g, w is cast."""
    source = perturbed if g is None else g
    _perturb[(table.blocks,)](
        table.of(w), table.of(source), table.of(w if v is None else v), table.of(perturbed),
        table.tensor, table.start, table.sizes, table.start if a is None else a, table.start if b is None else b,
        GROUPS=1 if a is None else len(a), G_T=TYPES[source[0].dtype], A_T=TYPES[perturbed[0].dtype],
        ADD=g is not None, V=v is not None, BLOCK=BLOCK, ALIGNED=table.aligned,
    )  # fmt: skip


def inner(
    table: PointerTable, g: list[Tensor], g_p: list[Tensor], groups: int, *, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """(<g, g_p>, ||g_p||^2) of each group; with `shared`, g_p has no groups. Reads both once."""
    out = table.sizes.new_empty(2, table.blocks, groups, dtype=torch.float32)
    _inner[(table.blocks, groups)](
        table.of(g), table.of(g_p), table.tensor, table.start, table.sizes, out[0], out[1], groups,
        G_T=TYPES[g[0].dtype], P_T=TYPES[g_p[0].dtype], SHARED=shared, BLOCK=BLOCK, ALIGNED=table.aligned,
    )  # fmt: skip
    cross, square = out.sum(1)
    return cross, square


def combine(
    table: PointerTable,
    g: list[Tensor] | None,
    g_p: list[Tensor] | None,
    out: list[Tensor],
    *,
    a: Tensor,
    b: Tensor,
    add: bool,
) -> None:
    """out (+)= sum over groups of a_group g + b_group g_p; a gradient that is None is not read."""
    some = g_p if g is None else g
    assert some is not None
    _combine[(table.blocks,)](
        table.of(some if g is None else g), table.of(some if g_p is None else g_p), table.of(out),
        table.tensor, table.start, table.sizes, a, b,
        GROUPS=len(a), USE_G=g is not None, USE_P=g_p is not None, ADD=add,
        G_T=TYPES[some[0].dtype], BLOCK=BLOCK, ALIGNED=table.aligned,
    )  # fmt: skip
