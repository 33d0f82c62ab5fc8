"""Models of the paper's Table 1 through timm, initialised as the reference initialises them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import timm
from timm.layers.weight_init import lecun_normal_
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from sam_repro.config.compose import nearest
from sam_repro.config.schema import ModelConfig
from sam_repro.errors import UserError
from sam_repro.models.cifar import CIFAR_MODELS
from sam_repro.models.layers.attention import use_short_attention
from sam_repro.models.layers.max_pool import use_stem_pool
from sam_repro.models.layers.patch_linear import PatchLinear
from sam_repro.models.layers.stem_conv import StemConv

# Sigmoid cross-entropy starts with every class improbable: sigmoid(-10) (official configuration, init_head_bias).
SIGMOID_HEAD_BIAS = -10.0

# timm's MLP-Mixers. Its own constructors take no other size (and S/8 has none), so the class is built directly.
MIXERS = {
    "mixer_s32_224": {"patch_size": 32, "num_blocks": 8, "embed_dim": 512},
    "mixer_s16_224": {"patch_size": 16, "num_blocks": 8, "embed_dim": 512},
    "mixer_s8_224": {"patch_size": 8, "num_blocks": 8, "embed_dim": 512},
    "mixer_b32_224": {"patch_size": 32, "num_blocks": 12, "embed_dim": 768},
    "mixer_b16_224": {"patch_size": 16, "num_blocks": 12, "embed_dim": 768},
}


def build_model(cfg: ModelConfig, *, num_classes: int, image_size: int, loss: str = "softmax") -> nn.Module:
    """The model of `cfg` with a zero head, its bias -10 where the loss is "sigmoid".

    Args:
        num_classes: outputs of the head.
        image_size: side of the input in pixels; what is left over beside whole patches is not seen, as in timm.
        loss: "sigmoid" | "softmax".

    Raises:
        UserError: for a name that timm does not have, or arguments that it does not take.
    """
    kwargs = creation_kwargs(cfg, num_classes=num_classes, image_size=image_size)
    try:
        model = create(cfg.timm, **kwargs)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"model {cfg.name}: timm's {cfg.timm} refused {kwargs}: {error}") from error
    initialise(model, cfg.family)
    for module in model.modules():
        if type(module) is not nn.Conv2d or module.groups > 1 or module.dilation != (1, 1):
            continue  # a class of its own has a forward of its own, as one that standardises its weights
        if module.kernel_size == module.stride != (1, 1) and module.padding == (0, 0):
            module.__class__ = PatchLinear
        elif module.weight.shape[1:] == (3, 7, 7) and module.stride == (2, 2):
            module.__class__ = StemConv
    use_short_attention(model)
    use_stem_pool(model)
    head = model.get_classifier()
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, SIGMOID_HEAD_BIAS if loss == "sigmoid" else 0.0)
    return model


def creation_kwargs(cfg: ModelConfig, *, num_classes: int, image_size: int) -> dict[str, Any]:
    """The keyword arguments of `create` for the network of `cfg`."""
    kwargs = dict(cfg.kwargs) | (cfg.tiny_kwargs if cfg.tiny else {}) | {"num_classes": num_classes}
    return kwargs if cfg.family == "resnet" else kwargs | {"img_size": image_size}


def create(name: str, **kwargs: Any) -> nn.Module:
    """timm.create_model, the Mixers of every size, and CIFAR's networks."""
    if kwargs.get("act_layer") == "gelu_tanh":  # flax's GELU is the tanh approximation; Mixers take no name
        kwargs = kwargs | {"act_layer": partial(nn.GELU, approximate="tanh")}
    if name in CIFAR_MODELS:
        return CIFAR_MODELS[name](**kwargs)
    if name in MIXERS:
        return MlpMixer(**(MIXERS[name] | kwargs))
    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    return timm.create_model(name, **kwargs)


def initialise(model: nn.Module, family: str) -> None:
    """Redo the parts of timm's initialisation that differ from the reference's (docs/DEVIATIONS.md, D-06).

    ViT (big_vision): q, k, v are three Xavier matrices, not one fused one; position embeddings have standard
    deviation 1/sqrt(D). Mixer (flax's default): Dense and patch kernels are LeCun normal, biases zero. ResNet:
    timm's He-normal and zero last scale are already the reference's.
    """
    if family == "vit":
        for name, module in model.named_modules():
            if name.endswith("attn.qkv"):
                for part in module.weight.chunk(3):
                    nn.init.xavier_uniform_(part)
        nn.init.normal_(model.pos_embed, std=1 / math.sqrt(model.embed_dim))
    if family == "mixer":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                lecun_normal_(module.weight)
                nn.init.zeros_(module.bias)
