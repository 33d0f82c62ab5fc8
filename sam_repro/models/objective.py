"""From a configuration and a model to the function that the optimizer differentiates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_repro.config.schema import Config
from sam_repro.models.layers.grouped import accept_groups, spread_loose
from sam_repro.models.layers.patch_linear import PatchLinear


def forward_of(
    cfg: Config, model: nn.Module, device: torch.device, *, bf16: bool
) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """(params | buffers, uint8 images (B, 3, H, W)) -> fp32 logits (B, classes); {} means the model's own.

    Parameters may have a leading dimension of groups (optim/grouped.py) where the model's layers accept them.
    """
    mean = 255 * torch.tensor(cfg.data.mean, device=device).view(1, 3, 1, 1)
    scale = 1 / (255 * torch.tensor(cfg.data.std, device=device).view(1, 3, 1, 1))
    layout = torch.channels_last if cfg.model.family == "resnet" else torch.contiguous_format
    own = dict(model.named_parameters())
    # Weights that two layers share have two places to put tensors; a layer that has two names (CoaT) has one, and torch
    # would not put its own weights back.
    tied = len({(id(p), id(layer)) for layer in model.modules() for p in layer.parameters(recurse=False)}) > len(own)
    loose = {name: own[name].ndim for name in accept_groups(model, (PatchLinear,)) or ()}

    def forward(tensors: dict[str, Tensor], images: Tensor) -> Tensor:
        x = ((images.float() - mean) * scale).contiguous(memory_format=layout)
        tensors = spread_loose(tensors, loose, len(images))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return torch.func.functional_call(model, tensors, (x,), tie_weights=tied).float()

    return forward


def loss_of(cfg: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits (B, classes), labels (B,)) -> mean loss. Sigmoid: sum over classes of binary cross-entropies.

    With mixup the labels are targets (B, classes).
    """
    if cfg.recipe.loss == "softmax":
        return lambda z, y: F.cross_entropy(z, y, label_smoothing=cfg.recipe.label_smoothing)

    def sigmoid(z: Tensor, y: Tensor) -> Tensor:
        chosen = (z * y).sum(1) if y.ndim == 2 else z.gather(1, y[:, None]).squeeze(1)
        return (F.softplus(z).sum(1) - chosen).mean()

    return sigmoid


def objective_of(cfg: Config, model: nn.Module, device: torch.device, *, bf16: bool) -> Callable[..., Tensor]:
    """(params | buffers, images, labels) -> mean loss, not compiled. Products with its Hessian want bf16=False."""
    forward, loss = forward_of(cfg, model, device, bf16=bf16), loss_of(cfg)

    def objective(tensors: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return loss(forward(tensors, images), labels)

    return objective


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode inside the block."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
