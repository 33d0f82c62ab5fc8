"""Attention over sequences so short that one tile holds them: ViT-B/32's 49 tokens.

A general kernel walks over blocks of keys with a running softmax, saves its normaliser, and needs q, k and v apart.
With at most 64 tokens a head fits in one tile: forward and backward read the packed output of the qkv layer as it
lies in memory, recompute the softmax, and write the packed gradient. So attention moves the fewest bytes there are,
and nothing is transposed, split or concatenated around it. Same arithmetic as other flash kernels: products in bf16,
softmax and sums in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

LONGEST = 64  # tokens that one tile holds
HEAD_DIMS = (16, 32, 64, 128)


@torch.library.custom_op("sam_repro::short_attention", mutates_args=())
def short_attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k' / sqrt(D)) v of every head.

    Args:
        qkv: (B, N, 3 heads D) bf16 on a GPU, contiguous, N <= 64: q, k, v one after the other, heads within each.

    Returns:
        (B, N, heads D) bf16.
    """
    from sam_repro.layers.kernels import forward

    return forward(qkv.contiguous(), heads)


@torch.library.custom_op("sam_repro::short_attention_backward", mutates_args=())
def short_attention_backward(dy: Tensor, qkv: Tensor, heads: int) -> Tensor:
    """The gradient of qkv, (B, N, 3 heads D), from dy, (B, N, heads D)."""
    from sam_repro.layers.kernels import backward

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


class ShortAttention(Attention):
    """timm's Attention, with the kernel above where it fits: bf16 on a GPU, few tokens, nothing between the parts."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        """(B, N, C) -> (B, N, C); `more` is what newer versions of timm know, such as is_causal."""
        fits = x.is_cuda and x.shape[1] <= LONGEST and attn_mask is None and not any(more.values())
        if not fits or not torch.is_autocast_enabled("cuda"):
            return super().forward(x, attn_mask, **more)
        qkv = self.qkv(x)
        return self.proj_drop(self.proj(short_attention(qkv, self.num_heads)))


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
