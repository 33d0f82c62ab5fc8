"""Layers that take weights with a leading dimension of G groups: all groups of a step in one forward and backward.

A batch of G m images carries its groups one after the other. A layer whose weight is (G, out, in) instead of (out, in)
multiplies each group with its own matrix, as one batched product. Nothing else of a network knows of groups:
attention, activations and residual sums work image by image. The gradient of the *sum* over groups of their mean losses
with respect to the (G, ...) weights is then every group's own gradient.

In the clean pass the weights are shared: (G, out, in) with stride 0 over the groups. Then the forward product and the
gradient of the input stay one large product, and only the weights' gradients are taken a group.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from sam_repro.models.layers.candidates import tried, use_candidates

# GroupProduct is pure, and its body part of the key of a cache. By default code with such a function is not cached.
if hasattr(functorch_config, "autograd_cache_allow_custom_autograd_functions"):  # not in torch 2.6
    functorch_config.autograd_cache_allow_custom_autograd_functions = True


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, also for weight (G, out, in) and bias (G, out), where x is (G m, ..., in).

    x is cast to the weight's dtype if that is bf16, as autocast would.
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    if weight.dtype == torch.bfloat16:
        x = x.to(torch.bfloat16)
        bias = None if bias is None else bias.to(torch.bfloat16)
    return GroupProduct.apply(x, weight, bias)  # pyright: ignore[reportReturnType]


class GroupProduct(torch.autograd.Function):
    """x W' + b with a W and b for each group, or one for all (stride 0 over groups); every group's own gradient.

    Written out because autograd's rule for a batched product leaves the weights' gradient transposed in memory, which
    costs a copy of all of it, and knows nothing of shared weights.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(G m, ..., in), (G, out, in), (G, out) -> (G m, ..., out)."""
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        if shared(weight):
            return F.linear(x, weight[0], None if bias is None else bias[0])
        y = torch.bmm(rows(x, weight), weight.transpose(1, 2))
        if bias is not None:
            y = y + bias[:, None]
        return y.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # pyright: ignore
        """One product for dx where the weights are shared; a batched product for dW."""
        x, weight = ctx.saved_tensors
        grouped = rows(dy, weight)
        dw = torch.bmm(grouped.transpose(1, 2), rows(x, weight))
        dx = dy @ weight[0] if shared(weight) else torch.bmm(grouped, weight).reshape(x.shape)
        return dx, dw, column_sums(grouped) if ctx.has_bias else None


def column_sums(grouped: Tensor) -> Tensor:
    """(G, rows, D) -> (G, D)."""
    part = math.gcd(grouped.shape[1], 128)
    if tried("sums") and part >= 16:  # in two steps: the compiler gives each column's rows to one program else
        return grouped.unflatten(1, (-1, part)).sum(2, dtype=torch.float32).sum(1)
    return grouped.sum(1)


def shared(weight: Tensor) -> bool:
    """Whether all groups read the same memory."""
    return weight.shape[0] > 1 and weight.stride(0) == 0


def rows(x: Tensor, weight: Tensor) -> Tensor:
    """(G m, ..., D) as (G, rows of a group, D)."""
    return x.reshape(weight.shape[0], -1, x.shape[-1])


class GroupedLinear(nn.Linear):
    """nn.Linear that takes weights with groups."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)

    def without_bias(self, input: Tensor) -> Tensor:
        """The product alone."""
        return linear(input, self.weight, None)


class GroupedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension that takes scales and biases with groups."""

    def forward(self, input: Tensor) -> Tensor:
        """(G m, ..., D) -> the same shape."""
        if self.weight.ndim == 1:
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        x = rows(F.layer_norm(input, self.normalized_shape, eps=self.eps), self.weight)
        return (x * self.weight[:, None] + self.bias[:, None]).view_as(input)


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
        use_candidates(module)
        if type(module) is nn.Linear:
            module.__class__ = GroupedLinear
        elif is_layer_norm(module):
            module.__class__ = GroupedLayerNorm
        elif not isinstance(module, (GroupedLinear, *handled)):
            own = [name for name, _ in module.named_parameters(recurse=False)]
            if own and prefix:
                return None
            loose |= set(own)
    return loose


def is_layer_norm(module: nn.Module) -> bool:
    """torch's LayerNorm over the last dimension, or timm's of the same name; not timm's LayerNorm2d, over channels."""
    if not isinstance(module, nn.LayerNorm) or type(module).__name__ not in ("LayerNorm", "GroupedLayerNorm"):
        return False
    return module.elementwise_affine and len(module.normalized_shape) == 1


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
    return {**tensors, **spread}  # torch 2.6 cannot compile | of dictionaries
