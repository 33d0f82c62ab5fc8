"""The Triton kernel of data/gpu_crop.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 256  # output pixels a program


@triton.jit
def _crop(table, first, weights, out, size, TAPS: tl.constexpr, PIXELS: tl.constexpr):
    """One block of output pixels of one image: rows first, then columns, in fp32 as data/crop.py adds them."""
    image = tl.program_id(1)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < size * size
    y, x = pixel // size, pixel % size
    entry = table + image * 6  # pointer, height, width, strides of channel, row and column
    source = tl.load(entry).to(tl.pointer_type(tl.uint8))
    height, width = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    channel_stride, row_stride = tl.load(entry + 3).to(tl.int32), tl.load(entry + 4).to(tl.int32)
    column_stride = tl.load(entry + 5).to(tl.int32)
    row, column = image * 2 * size + y, image * 2 * size + size + x
    first_row = tl.load(first + row, mask=inside, other=0)
    first_column = tl.load(first + column, mask=inside, other=0)
    for channel in tl.static_range(3):
        total = tl.full((PIXELS,), 0.5, tl.float32)
        for j in range(TAPS):
            at_column = tl.minimum(first_column + j, width - 1) * column_stride + channel * channel_stride
            line = tl.zeros((PIXELS,), tl.float32)
            for i in range(TAPS):
                at = tl.minimum(first_row + i, height - 1) * row_stride + at_column
                value = tl.load(source + at, mask=inside, other=0).to(tl.float32)
                line += tl.load(weights + row * TAPS + i, mask=inside, other=0.0) * value
            total += tl.load(weights + column * TAPS + j, mask=inside, other=0.0) * line
        total = tl.minimum(tl.maximum(total, 0.0), 255.0)
        tl.store(out + (image * size * size + pixel) * 3 + channel, total.to(tl.uint8), mask=inside)


def launch(images: list[Tensor], first: Tensor, weights: Tensor, out: Tensor) -> None:
    """See gpu_crop.crop_batch."""
    entries = [(t.data_ptr(), *t.shape[1:], *t.stride()) for t in images]
    table = torch.tensor(entries, dtype=torch.int64, pin_memory=True).to(out.device, non_blocking=True)
    size = out.shape[1]
    grid = (triton.cdiv(size * size, PIXELS), len(images))
    # Without fused multiply-add: every product is rounded, as on the processor.
    _crop[grid](table, first, weights, out, size, weights.shape[-1], PIXELS, enable_fp_fusion=False)
