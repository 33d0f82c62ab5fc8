"""A convolution over disjoint patches as one matrix product."""

from __future__ import annotations

from torch import Tensor, nn

from sam_repro.models.layers.grouped import linear


class PatchLinear(nn.Conv2d):
    """A convolution over disjoint patches as one matrix product: the same parameters, keys and values, fewer bytes.

    A convolution of this shape is slow forward and backward, and torch.vmap would turn it into a grouped one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H // p, W // p)."""
        b, c, height, width = x.shape
        p, q = self.kernel_size
        if height % p or width % q:
            x, height, width = x[:, :, : height // p * p, : width // q * q], height // p * p, width // q * q
        patches = x.reshape(b, c, height // p, p, width // q, q).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        y = linear(patches, self.weight.flatten(-3), self.bias)
        return y.transpose(1, 2).unflatten(2, (height // p, width // q))
