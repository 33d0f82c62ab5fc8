"""The crops of `gpu_crop` beside those of the CPU path, on any device: the CPU here, a GPU in tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sam_repro.data.images.crop import AREA, BICUBIC, BILINEAR, CENTRE, INCEPTION, PLAIN, Geometry, render
from sam_repro.data.images.gpu_crop import crop_batch, taps_of

SIDES = [(30, 41), (170, 90), (64, 64), (45, 300), (400, 410), (99, 40)]


def every_geometry(test):
    """Run a test(mode, filter) with each of them."""
    test = pytest.mark.parametrize("filter", [PLAIN, AREA, BILINEAR, BICUBIC])(test)
    return pytest.mark.parametrize("mode", [INCEPTION, CENTRE])(test)


def assert_crops_of_the_cpu_path(mode: int, filter: int, device: torch.device, *, repeats: int) -> None:
    """To the bit, on images of many sides."""
    geometry = Geometry(mode, 40, 44, 0.05, 1.0, 0.75, 4 / 3, 0, True, filter)
    sides = SIDES * repeats
    images = [np.random.default_rng(i).integers(0, 256, (*s, 3), dtype=np.uint8) for i, s in enumerate(sides)]
    indices = 5 + 3 * np.arange(len(sides))
    expected = np.empty((len(sides), 40, 40, 3), np.uint8)
    for image, index, out in zip(images, indices, expected, strict=True):
        render(image, out, geometry, 7, 2, index)
    out = torch.empty(expected.shape, dtype=torch.uint8, device=device)
    planar = [torch.from_numpy(image).to(device).permute(2, 0, 1) for image in images]
    planar[::2] = [image.contiguous() for image in planar[::2]]  # as nvJPEG returns them; the others as Pillow does
    crop_batch(planar, taps_of(sides, indices, geometry, seed=7, epoch=2).to(device), out)
    assert np.array_equal(out.cpu().numpy(), expected)
