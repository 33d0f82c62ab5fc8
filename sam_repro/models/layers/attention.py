"""Attention over short sequences: at most 64 tokens (ViT-B/32's 49) in one tile, up to 256 in tiles.

A general kernel walks over blocks of keys with a running softmax, saves its normaliser, and needs q, k and v apart.
With at most 64 tokens a head fits in one tile: forward and backward read the packed output of the qkv layer as it
lies in memory, recompute the softmax, and write the packed gradient. So attention moves the fewest bytes there are,
and nothing is transposed, split or concatenated around it. Same arithmetic as other flash kernels: products in bf16,
softmax and sums in fp32. Up to 256 tokens, `layers/tiled.py` does the same in tiles, with a saved normaliser.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

ONE_TILE = 64  # tokens that one tile holds
LONGEST = 256  # tokens that the tiled kernels hold
HEAD_DIMS = (16, 32, 64, 128)
TILED_HEAD_DIM = 64  # at most: beyond, dk and dv of a head do not fit in registers


@torch.library.custom_op("sam_repro::short_attention", mutates_args=())
def short_attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k' / sqrt(D)) v of every head.

    Args:
        qkv: (B, N, 3 heads D) bf16 on a GPU, contiguous, N <= 64: q, k, v one after the other, heads within each.

    Returns:
        (B, N, heads D) bf16.
    """
    from sam_repro.models.layers.triton_kernels import forward

    return forward(qkv.contiguous(), heads)


@torch.library.custom_op("sam_repro::short_attention_backward", mutates_args=())
def short_attention_backward(dy: Tensor, qkv: Tensor, heads: int) -> Tensor:
    """The gradient of qkv, (B, N, 3 heads D), from dy, (B, N, heads D)."""
    from sam_repro.models.layers.triton_kernels import backward

    return backward(dy.contiguous(), qkv.contiguous(), heads)


@short_attention.register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    b, n, d = qkv.shape
    return qkv.new_empty(b, n, d // 3)


@short_attention_backward.register_fake
def _(dy: Tensor, qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output) -> None:
    qkv, ctx.heads = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
    (qkv,) = ctx.saved_tensors
    return short_attention_backward(dy, qkv, ctx.heads), None


short_attention.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("sam_repro::tiled_attention", mutates_args=())
def tiled_attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """softmax(q k' / sqrt(D)) v of every head, in tiles, for any number of tokens.

    Args:
        qkv: (B, N, 3 heads D) bf16 on a GPU: q, k, v one after the other, heads within each; D <= 64.

    Returns:
        (B, N, heads D) bf16; and what backward needs, log2 of the softmax's normaliser, (B, heads, N) fp32, which has
        no gradient.
    """
    from sam_repro.models.layers.triton_tiled_attention import forward

    return forward(qkv.contiguous(), heads)


@torch.library.custom_op("sam_repro::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(dy: Tensor, y: Tensor, lse: Tensor, qkv: Tensor, heads: int) -> Tensor:
    """The gradient of qkv, (B, N, 3 heads D), from dy, (B, N, heads D)."""
    from sam_repro.models.layers.triton_tiled_attention import backward

    return backward(dy.contiguous(), y.contiguous(), lse.contiguous(), qkv.contiguous(), heads)


@tiled_attention.register_fake
def _(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    b, n, d = qkv.shape
    return qkv.new_empty(b, n, d // 3), qkv.new_empty(b, heads, n, dtype=torch.float32)


@tiled_attention_backward.register_fake
def _(dy: Tensor, y: Tensor, lse: Tensor, qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save_tiled(ctx, inputs, output) -> None:
    qkv, ctx.heads = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output)


def _backward_tiled(ctx, dy: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    qkv, y, lse = ctx.saved_tensors
    return tiled_attention_backward(dy, y, lse, qkv, ctx.heads), None


tiled_attention.register_autograd(_backward_tiled, setup_context=_save_tiled)


class ShortAttention(Attention):
    """timm's Attention, with the kernels above where they fit: bf16 on a GPU, few tokens, nothing between the parts."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        """(B, N, C) -> (B, N, C); `more` is what newer versions of timm know, such as is_causal."""
        tokens = x.shape[1]
        fits = tokens <= (LONGEST if self.head_dim <= TILED_HEAD_DIM else ONE_TILE)
        fits = fits and x.is_cuda and attn_mask is None and not any(more.values())
        if not fits or not torch.is_autocast_enabled("cuda"):
            return super().forward(x, attn_mask, **more)
        qkv = self.qkv(x)
        y = short_attention(qkv, self.num_heads) if tokens <= ONE_TILE else tiled_attention(qkv, self.num_heads)[0]
        return self.proj_drop(self.proj(y))


def use_short_attention(model: nn.Module) -> None:
    """Let the attention layers of `model` use the kernel where it computes the same function."""
    for module in model.modules():
        if type(module) is Attention and is_plain(module):
            module.__class__ = ShortAttention


def is_plain(module: Attention) -> bool:
    """Whether a layer is qkv, softmax attention and projection, and nothing else."""
    between = (module.q_norm, module.k_norm, getattr(module, "norm", nn.Identity()))
    return (
        all(isinstance(part, nn.Identity) for part in between)
        and getattr(module, "gate", None) is None
        and module.attn_drop.p == 0
        and module.head_dim in HEAD_DIMS
    )
