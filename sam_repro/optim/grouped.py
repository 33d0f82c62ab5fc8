"""Layers that take weights with a leading dimension of G groups: all groups of a step in one forward and backward.

A batch of G m images carries its groups one after the other. A layer whose weight is (G, out, in) instead of (out, in)
multiplies each group with its own matrix, as one batched product. Nothing else of a network knows of groups:
attention, activations and residual sums work image by image. The gradient of the *sum* over groups of their mean losses
with respect to the (G, ...) weights is then every group's own gradient.

In the clean pass the weights are shared: (G, out, in) with stride 0 over the groups. Then the forward product and the
gradient of the input stay one large product, and only the weights' gradients are taken a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, also for weight (G, out, in) and bias (G, out), where x is (G m, ..., in).

    x is cast to the weight's dtype if that is bf16, as autocast would.
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    groups, out, _ = weight.shape
    if weight.dtype == torch.bfloat16:
        x = x.to(torch.bfloat16)
        bias = None if bias is None else bias.to(torch.bfloat16)
    if groups > 1 and weight.stride(0) == 0:
        return SharedLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    flat = x.reshape(groups, -1, x.shape[-1])
    if bias is None:
        y = torch.bmm(flat, weight.transpose(1, 2))
    else:
        y = torch.baddbmm(bias[:, None], flat, weight.transpose(1, 2))
    return y.reshape(*x.shape[:-1], out)


class SharedLinear(torch.autograd.Function):
    """x W^T + b with one W for all groups, and the gradient of W and b a group."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(G m, ..., in), (G, out, in) of stride 0, (G, out) -> (G m, ..., out)."""
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight[0], None if bias is None else bias[0])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # pyright: ignore
        """One product for dx; a batched product for dW."""
        x, weight = ctx.saved_tensors
        groups = weight.shape[0]
        rows = dy.reshape(groups, -1, dy.shape[-1])
        dw = torch.bmm(rows.transpose(1, 2), x.reshape(groups, -1, x.shape[-1]))
        return dy @ weight[0], dw, rows.sum(1) if ctx.has_bias else None


class GroupedLinear(nn.Linear):
    """nn.Linear that takes weights with groups."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)


class GroupedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension that takes scales and biases with groups."""

    def forward(self, input: Tensor) -> Tensor:
        """(G m, ..., D) -> the same shape."""
        if self.weight.ndim == 1:
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        x = F.layer_norm(input, self.normalized_shape, eps=self.eps)
        return x * per_image(self.weight, x) + per_image(self.bias, x)


def per_image(parameter: Tensor, x: Tensor) -> Tensor:
    """(G, D) as (G m, 1, ..., D), to broadcast with x of shape (G m, ..., D)."""
    groups, d = parameter.shape
    images = len(x) // groups
    spread = parameter[:, None].expand(groups, images, d).reshape(len(x), d)
    return spread.view(len(x), *([1] * (x.ndim - 2)), d)


def accept_groups(model: nn.Module, handled: tuple[type[nn.Module], ...] = ()) -> set[str] | None:
    """Let the layers of `model` take weights with groups.

    Args:
        handled: further modules that do already.

    Returns:
        the names of loose parameters, direct children such as position embeddings, that `spread_loose` must hand over
        image by image; None if the model has parameters in layers that cannot take groups.
    """
    loose = set()
    for prefix, module in model.named_modules():
        if type(module) is nn.Linear:
            module.__class__ = GroupedLinear
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine and len(module.normalized_shape) == 1:
            module.__class__ = GroupedLayerNorm
        elif not isinstance(module, (GroupedLinear, *handled)):
            own = [name for name, _ in module.named_parameters(recurse=False)]
            if own and prefix:
                return None
            loose |= set(own)
    return loose


def spread_loose(tensors: dict[str, Tensor], loose: dict[str, int], images: int) -> dict[str, Tensor]:
    """Tensors with loose parameters of shape (G, 1, ...) as (images, ...), each image its group's.

    Args:
        loose: name -> number of dimensions without groups.
    """
    spread = {}
    for name, ndim in loose.items():
        p = tensors.get(name)
        if p is not None and p.ndim > ndim:
            groups, one, *rest = p.shape
            assert one == 1, f"{name} cannot be given image by image"
            spread[name] = p.expand(groups, images // groups, *rest).reshape(images, *rest)
    return tensors | spread
