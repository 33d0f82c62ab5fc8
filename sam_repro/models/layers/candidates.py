"""Faster layers that have not been measured on a GPU, each off until SAM_REPRO_TRY names it.

    SAM_REPRO_TRY="gelu tokens" python train.py ...          # benchmarks/candidates.py sets it, and measures each

A candidate whose gain is measured becomes the layer; one that gains nothing is deleted. The arithmetic is in
benchmarks/NOTES.md.

    gelu      a group's bias is added in front of GELU, and one kernel makes GELU's backward and the bias gradient
    sums      bias gradients of groups in two steps, so that more programs share the rows (grouped.py)
    tokens    a Mixer multiplies its tokens as they lie in memory, image by image, and transposes nothing
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.models.mlp_mixer import MixerBlock
from torch import Tensor, nn

TRIED = frozenset(os.environ.get("SAM_REPRO_TRY", "").split())
GELU_ROWS = 256  # that one program of the kernel walks down


def tried(name: str) -> bool:
    """Whether a candidate is tried."""
    return name in TRIED


def approximation(act: nn.Module) -> str | None:
    """GELU's argument `approximate`; None where a layer is no GELU."""
    return act.approximate if isinstance(act, nn.GELU) else None


def is_plain(mlp: nn.Module) -> bool:
    """Whether a layer is two products with GELU between them, and nothing else."""
    if not isinstance(mlp, Mlp) or approximation(mlp.act) is None or not isinstance(mlp.norm, nn.Identity):
        return False
    layers = isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.fc2, nn.Linear)
    return layers and mlp.fc1.bias is not None and mlp.fc2.bias is not None and mlp.drop1.p == mlp.drop2.p == 0


# ---- gelu ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("sam_repro::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(dy: Tensor, h: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """The gradients of gelu(h + bias).

    Args:
        dy, h: (G m, ..., N), contiguous.
        bias: (G, N).
        tanh: GELU's approximation by tanh.

    Returns:
        dh, in h's dtype; and the bias gradient of parts of each group's rows, (G, parts, N) fp32.
    """
    from sam_repro.models.layers.triton_kernels import bias_gelu_backward

    return bias_gelu_backward(dy.contiguous(), h.contiguous(), bias.contiguous(), tanh, GELU_ROWS)


@bias_gelu_backward.register_fake
def _(dy: Tensor, h: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    groups, n = bias.shape
    parts = -(-(h.numel() // (groups * n)) // GELU_ROWS)
    return torch.empty_like(h, memory_format=torch.contiguous_format), h.new_empty(
        groups, parts, n, dtype=torch.float32
    )


class BiasGelu(torch.autograd.Function):
    """gelu(h + b) with a b for each group. Forward is left to the compiler, which has nothing to recompute there."""

    @staticmethod
    def forward(ctx, h: Tensor, bias: Tensor, approximate: str) -> Tensor:
        """(G m, ..., N), (G, N) -> (G m, ..., N)."""
        ctx.save_for_backward(h, bias)
        ctx.tanh = approximate == "tanh"
        grouped = h.reshape(len(bias), -1, h.shape[-1])
        return F.gelu(grouped.float() + bias[:, None], approximate=approximate).to(h.dtype).view_as(h)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        """One pass over dy and h."""
        h, bias = ctx.saved_tensors
        dh, parts = bias_gelu_backward(dy, h, bias, ctx.tanh)
        return dh, parts.sum(1).to(bias.dtype), None


class GroupedMlp(Mlp):
    """timm's Mlp that takes weights with groups, the bias of its first product added with GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.fc1.weight.ndim == 2:
            return super().forward(x)
        h = self.fc1.without_bias(x)  # pyright: ignore: a GroupedLinear
        y: Tensor = BiasGelu.apply(h, self.fc1.bias, approximation(self.act))  # pyright: ignore
        return self.fc2(y)


# ---- tokens ----------------------------------------------------------------------------------------------------------


class TokenProduct(torch.autograd.Function):
    """W x + b along the tokens of each image, a product per image, with a W and b for each group or one for all.

    No operand is transposed in memory, and every row is C numbers long. A row of a weight is as long as there are
    tokens, which may be no multiple of 16 bytes: then its columns lie one after the other. A bias gradient is a sum
    along rows, which the compiler fuses with what makes the rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(G m, S, C), (G, T, S), (G, T) -> (G m, T, C)."""
        groups, out, tokens = weight.shape
        weight = weight[:1] if weight.stride(0) == 0 else weight
        if tokens % 8:
            weight = weight.mT.contiguous().mT
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        y = torch.bmm(image_by_image(weight, len(x)), x).view(groups, -1, out, x.shape[2])
        return (y + bias[:, None, :, None]).to(y.dtype).view(len(x), out, -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        """A product per image for either; the weight's are then summed over each group's images."""
        x, weight = ctx.saved_tensors
        ragged = weight.shape[2] % 8
        dx = torch.bmm(image_by_image(weight, len(x)).mT, dy)
        dw = of_groups(torch.bmm(x, dy.mT) if ragged else torch.bmm(dy, x.mT), ctx.groups)
        return dx, dw.mT.contiguous() if ragged else dw, of_groups(dy.sum(2, dtype=torch.float32), ctx.groups)


def of_groups(x: Tensor, groups: int) -> Tensor:
    """(G m, ...) -> (G, ...), summed over each group's images."""
    return x.view(groups, -1, *x.shape[1:]).sum(1)


def image_by_image(weight: Tensor, images: int) -> Tensor:
    """(G, T, S) -> (images, T, S): each image its group's. Not copied where all groups have the same."""
    groups, *rest = weight.shape
    if groups == 1:
        return weight.expand(images, *rest)
    if weight.stride(-1) == 1:
        return weight[:, None].expand(groups, images // groups, *rest).reshape(images, *rest)
    return image_by_image(weight.mT, images).mT


def along_tokens(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer along the tokens of (B, S, C)."""
    weight, bias = layer.weight, layer.bias
    if weight.ndim == 2:
        weight, bias = weight[None], bias[None]
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    return TokenProduct.apply(x, weight, bias)  # pyright: ignore[reportReturnType]


class UntransposedMixerBlock(MixerBlock):
    """timm's MixerBlock without its transpositions."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        mlp = self.mlp_tokens
        h = F.gelu(along_tokens(self.norm1(x), mlp.fc1), approximate=approximation(mlp.act) or "none")
        x = x + along_tokens(h, mlp.fc2)
        return x + self.mlp_channels(self.norm2(x))


def use_candidates(module: nn.Module) -> None:
    """Give one layer the candidate's class, where it is tried and computes the same function."""
    if tried("gelu") and type(module) is Mlp and is_plain(module):
        module.__class__ = GroupedMlp
    block = type(module) is MixerBlock and isinstance(module.drop_path, nn.Identity) and is_plain(module.mlp_tokens)
    if tried("tokens") and block:
        module.__class__ = UntransposedMixerBlock
