"""ResNet's first convolution in the form that a GPU's tensor cores are fast at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StemConv(nn.Conv2d):
    """ResNet's 7x7 convolution of 3 channels with stride 2, on a GPU as a 4x4 convolution of 2x2-pixel blocks.

    Tensor cores read channels in eights; with three of them most of the work is padding. The same products in another
    order: pixels (2i + r, 2j + s) become channels of block (i, j), the kernel gets a row and a column of zeros, and
    the 12 channels are filled up to 16.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, out, H / 2, W / 2)."""
        even = input.shape[2] % 2 == 0 and input.shape[3] % 2 == 0
        if not (input.is_cuda and even and self.padding == (3, 3) and self.bias is None):
            return super().forward(input)
        return blocked_stem(input, self.weight)


def blocked_stem(x: Tensor, weight: Tensor) -> Tensor:
    """F.conv2d(x, weight, stride=2, padding=3) for x (B, 3, H, W) and weight (out, 3, 7, 7), H and W even."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # before the copies below, not after
    x = F.pixel_unshuffle(F.pad(x, (4, 2, 4, 2)), 2)
    weight = F.pixel_unshuffle(F.pad(weight, (1, 0, 1, 0)), 2)
    x, weight = (F.pad(t, (0, 0, 0, 0, 0, 4)).contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return F.conv2d(x, weight)
