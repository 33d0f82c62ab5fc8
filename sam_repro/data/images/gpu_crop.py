"""The crops of data/crop.py on a GPU: the same boxes, the same weights, the same arithmetic.

The processor draws the boxes and computes the resampling weights with the very functions that the CPU path uses
(microseconds an image); the GPU only adds up weighted pixels, for a batch of images of any sizes in one launch. So the
geometry is equal by construction, and of equal pixels the results are equal to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sam_repro.data.images.crop import AREA, BICUBIC, INCEPTION, PLAIN, Geometry, axes, crop_box


class Taps(NamedTuple):
    """Resampling of a batch of B images to S x S, padded to T taps an output pixel. Axis 0 is rows, axis 1 columns."""

    first: Tensor  # int32 [B, 2, S]: the first input pixel
    weights: Tensor  # fp32 [B, 2, S, T]: of the pixels first, first + 1, ...; zero beyond the filter

    def to(self, device: torch.device) -> Taps:
        """On `device`; from page-locked memory without waiting."""
        return Taps(*(t.to(device, non_blocking=True) for t in self))


@njit(cache=True, nogil=True)
def _fill(heights, widths, indices, geometry, seed, epoch, first, weights):
    for k in range(len(indices)):
        top, left, h, w, flip = crop_box(seed, epoch, indices[k], heights[k], widths[k], geometry)
        both = axes(h, w, geometry)
        for axis in range(2):
            start, taps, share = both[axis]
            for j in range(geometry.size):
                to = geometry.size - 1 - j if axis == 1 and flip else j
                first[k, axis, to] = start[j] + (left if axis == 1 else top)
                for t in range(taps[j]):
                    weights[k, axis, to, t] = share[j, t]


def taps_of(
    sides: list[tuple[int, int]], indices: np.ndarray, geometry: Geometry, *, seed: int, epoch: int, pin: bool = False
) -> Taps:
    """How the samples `indices`, of `sides` (height, width), are cut, resampled and flipped.

    Not for PAD, which is made for small images in memory. `pin`: in page-locked memory.
    """
    heights, widths = np.array(sides, np.int64).T
    shape = len(indices), 2, geometry.size
    first = torch.empty(shape, dtype=torch.int32, pin_memory=pin)
    weights = torch.zeros((*shape, _most_taps(heights, widths, geometry)), dtype=torch.float32, pin_memory=pin)
    _fill(heights, widths, indices, geometry, seed, epoch, first.numpy(), weights.numpy())
    return Taps(first, weights)


def _most_taps(heights: np.ndarray, widths: np.ndarray, geometry: Geometry) -> int:
    """An upper bound of the taps of one axis, a power of two: each value compiles a kernel."""
    if geometry.filter == PLAIN:
        return 2
    if geometry.mode == INCEPTION:
        scale = np.maximum(heights, widths).max() / geometry.size
    else:
        scale = np.minimum(heights, widths).max() / geometry.resize * 1.01  # rounding of the resized sides
    radius = {AREA: 0.5, BICUBIC: 2.0}.get(geometry.filter, 1.0)
    bound = int(np.ceil(2 * radius * max(scale, 1.0))) + 2
    return 1 << (bound - 1).bit_length()


def crop_plain(images: list[Tensor], taps: Taps, out: Tensor) -> None:
    """`crop_batch` in plain torch, image by image, on any device: what the kernel is compared with."""
    for k, image in enumerate(images):
        wide = image.permute(1, 2, 0)
        reach = torch.arange(taps.weights.shape[-1], device=out.device)
        rows, columns = (
            (taps.first[k, axis, :, None] + reach).clamp(max=wide.shape[axis] - 1).long() for axis in range(2)
        )
        lines = torch.zeros(len(rows), *wide.shape[1:], device=out.device)
        for t in reach:
            lines += taps.weights[k, 0, :, t, None, None] * wide[rows[:, t]].float()
        total = torch.full(out.shape[1:], 0.5, device=out.device)
        for t in reach:
            total += taps.weights[k, 1, None, :, t, None] * lines[:, columns[:, t]]
        out[k] = total.clamp(0, 255).to(torch.uint8)


def crop_batch(images: list[Tensor], taps: Taps, out: Tensor) -> None:
    """Cut, resample and flip a batch.

    Args:
        images: uint8 (3, H, W) of any sizes and strides, on the device of `out`; they must live until the work is done.
        taps: of this batch, on the same device.
        out: uint8 [B, S, S, 3], contiguous, overwritten.
    """
    if out.device.type != "cuda":
        crop_plain(images, taps, out)
        return
    from sam_repro.data.images.triton_crop import launch  # imports Triton, which only a GPU's torch has

    launch(images, taps.first, taps.weights, out)
