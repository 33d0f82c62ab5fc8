"""Models of the paper's Table 1 through timm, initialised as the reference initialises them; any other as timm does."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import timm
import torch
from timm.layers.weight_init import lecun_normal_
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

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
    """The model of `cfg` with a zero head, its bias -10 where the loss is "sigmoid"; of family "other", as timm has it.

    Args:
        num_classes: outputs of the head.
        image_size: side of the input in pixels.
        loss: "sigmoid" | "softmax".

    Raises:
        UserError: for a name that timm does not have, arguments that it does not take, another network than the
            family's, or a size at which the network would not see all pixels.
    """
    kwargs = creation_kwargs(cfg, num_classes=num_classes, image_size=image_size)
    try:
        model = create(cfg.timm, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        other = "; model.family=other gives img_size only to those that have it" if "img_size" in str(error) else ""
        raise UserError(f"model {cfg.name}: timm's {cfg.timm} refused {kwargs}: {error}{other}") from error
    check_family(cfg, model)
    initialise(model, cfg.family)
    use_own_layers(model)
    if cfg.family != "other":
        head = model.get_classifier()
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, SIGMOID_HEAD_BIAS if loss == "sigmoid" else 0.0)
    check_image_size(model, cfg.name, image_size)
    return model


def use_own_layers(model: nn.Module) -> None:
    """Let timm's layers compute the same function faster."""
    for module in model.modules():
        if type(module) is not nn.Conv2d or module.groups > 1 or module.dilation != (1, 1):
            continue  # a class of its own has a forward of its own, as one that standardises its weights
        if module.kernel_size == module.stride != (1, 1) and module.padding == (0, 0):
            module.__class__ = PatchLinear
        elif module.weight.shape[1:] == (3, 7, 7) and module.stride == (2, 2):
            module.__class__ = StemConv
    use_short_attention(model)
    use_stem_pool(model)


def check_family(cfg: ModelConfig, model: nn.Module) -> None:
    """Refuse a network whose weights cannot start as the family's do."""
    kind = {"vit": VisionTransformer, "mixer": MlpMixer}.get(cfg.family, nn.Module)
    fits = isinstance(model, kind) and (cfg.family != "vit" or getattr(model, "pos_embed", None) is not None)
    head: Any = model.get_classifier() if hasattr(model, "get_classifier") else None  # pyright: ignore
    if cfg.family != "other" and not (fits and isinstance(head, nn.Linear | nn.Conv2d) and head.bias is not None):
        what = {"vit": "a VisionTransformer with position embeddings", "mixer": "an MlpMixer"}.get(
            cfg.family, "a network"
        )
        raise UserError(
            f"model.family={cfg.family} is for {what} and one linear head, and {cfg.timm} is a {type(model).__name__}: "
            "model.family=other takes any classifier of timm as timm initialises it"
        )


def check_image_size(model: nn.Module, name: str, size: int) -> None:
    """Refuse images if the network would not see all their pixels, or if its feature map would be empty.

    Runs the network on shapes alone; one that cannot run so is not checked.
    """

    def whole_patches(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        patch, side = module.stride[0], inputs[0].shape[-1]  # pyright: ignore[reportIndexIssue]
        if side % patch:
            fitting = f"{size // patch * patch} or " * (size >= patch) + str((size // patch + 1) * patch)
            raise UserError(
                f"data.image_size={size} is no multiple of {name}'s patches of {patch} pixels: {fitting} is"
            )

    def not_nothing(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not output.numel():
            raise UserError(f"data.image_size={size} is too small for {name}: its {type(module).__name__} gets nothing")

    tensors = (*model.parameters(), *model.buffers())
    shadow = copy.deepcopy(model, {id(t): copy_to_meta(t) for t in tensors}).eval()
    for module in shadow.modules():
        module.register_forward_hook(not_nothing)
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and module.kernel_size == module.stride != (1, 1):
            module.register_forward_pre_hook(whole_patches)
    try:
        with torch.no_grad():
            shadow(torch.empty(2, 3, size, size, device="meta"))
    except UserError:
        raise
    except Exception as error:  # whatever a layer has for shapes that it does not take
        if not isinstance(error, NotImplementedError) and "meta" not in str(error):
            raise UserError(f"{name} does not take images of {size} pixels: {str(error).splitlines()[0]}") from None


def copy_to_meta(tensor: Tensor) -> Tensor:
    """A parameter or buffer of the same shape without data."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def creation_kwargs(cfg: ModelConfig, *, num_classes: int, image_size: int) -> dict[str, Any]:
    """The keyword arguments of `create` for the network of `cfg`."""
    kwargs = dict(cfg.kwargs) | (cfg.tiny_kwargs if cfg.tiny else {}) | {"num_classes": num_classes}
    sized = cfg.family in ("vit", "mixer") or (cfg.family == "other" and takes_size(cfg.timm))
    return {"img_size": image_size} | kwargs if sized else kwargs


def takes_size(name: str) -> bool:
    """Whether timm builds this network for one size of images, which is then its argument `img_size`."""
    return getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "fixed_input_size", False)


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
