"""ResNet's max pooling, 3x3 with stride 2, on channels-last GPU tensors: forward with one byte of index, and backward.

The backward pass gathers: a pixel lies in at most four windows and takes the gradient of those that chose it. One read
of the gradient and of the index, one write; compilers make three times the traffic of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.library.custom_op("sam_repro::max_pool", mutates_args=())
def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Max over 3x3 windows, stride 2, padding 1, for x (B, C, H, W) channels-last on a GPU.

    Returns:
        (B, C, ceil(H / 2), ceil(W / 2)) and which of the nine it was, int8; the first of equals, as in torch.
    """
    from sam_repro.models.layers.triton_kernels import pool_forward

    return pool_forward(x.contiguous(memory_format=torch.channels_last))


@torch.library.custom_op("sam_repro::max_pool_backward", mutates_args=())
def max_pool_backward(dy: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    """The gradient of x, (B, C, height, width) channels-last."""
    from sam_repro.models.layers.triton_kernels import pool_backward

    return pool_backward(dy.contiguous(memory_format=torch.channels_last), index, height, width)


@max_pool.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    b, c, h, w = x.shape
    y = torch.empty(b, c, (h + 1) // 2, (w + 1) // 2, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.int8)


@max_pool_backward.register_fake
def _(dy: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    b, c = dy.shape[:2]
    return torch.empty(b, c, height, width, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)


def _save(ctx, inputs, output) -> None:
    ctx.size = inputs[0].shape[2:]
    ctx.save_for_backward(output[1])


def _backward(ctx, dy: Tensor, _: Tensor) -> Tensor:
    (index,) = ctx.saved_tensors
    return max_pool_backward(dy, index, *ctx.size)


max_pool.register_autograd(_backward, setup_context=_save)


class StemPool(nn.MaxPool2d):
    """nn.MaxPool2d(3, 2, 1) with the kernels above where they apply: bf16 on a GPU, channels last."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""
        apply = input.is_cuda and input.dtype == torch.bfloat16 and input.shape[1] in (16, 32, 64, 128)
        if apply and input.is_contiguous(memory_format=torch.channels_last):
            return max_pool(input)[0]
        return super().forward(input)  # pyright: ignore[reportReturnType]


def use_stem_pool(model: nn.Module) -> None:
    """Let the 3x3 max poolings of `model` use the kernels."""
    for module in model.modules():
        if type(module) is nn.MaxPool2d and not module.ceil_mode and module.dilation == 1:
            pair = [(v, v) if isinstance(v, int) else tuple(v) for v in (module.kernel_size, module.stride)]
            if pair == [(3, 3), (2, 2)] and module.padding in (1, (1, 1)):
                module.__class__ = StemPool
