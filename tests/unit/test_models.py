"""The twelve models: parameter counts, initialisation, and the reference's architecture."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from sam_repro.config.compose import choices, compose_config
from sam_repro.distributed.ranks import Ranks
from sam_repro.errors import UserError
from sam_repro.models.build import build_model
from sam_repro.models.layers.attention import ShortAttention, short_attention, tiled_attention
from sam_repro.models.layers.patch_linear import PatchLinear
from sam_repro.models.layers.stem_conv import StemConv, blocked_stem
from sam_repro.training.method import gradient_step


def build(name: str, **kwargs):
    cfg = compose_config([f"model={name}"])
    with torch.device("meta"):
        return cfg, build_model(cfg.model, num_classes=1000, image_size=224, loss=cfg.recipe.loss)


@pytest.mark.parametrize("name", choices("model"))
def test_parameter_counts(name):
    """Every model that states a count has it; the twelve of Table 1 do."""
    cfg, model = build(name)
    if name.endswith(("_digits", "_cifar")) or name == "wrn28_10":
        assert cfg.model.params == 0  # tests/unit/test_transfer.py counts those of CIFAR
    else:
        assert sum(p.numel() for p in model.parameters()) == cfg.model.params > 0


def test_vit_is_the_reference_one():
    cfg = compose_config(["model=vit_s32"])
    model = build_model(cfg.model, num_classes=1000, image_size=224, loss="sigmoid")
    assert model.cls_token is None and model.global_pool == "avg"
    assert isinstance(model.norm, nn.LayerNorm) and isinstance(model.fc_norm, nn.Identity) and model.norm.eps == 1e-6
    assert model.blocks[0].mlp.act.approximate == "tanh"
    qkv = model.blocks[0].attn.qkv.weight
    for part in qkv.chunk(3):  # a Xavier matrix each: std 1/sqrt(D), not that of one fused 3D x D matrix
        assert part.std().item() == pytest.approx(1 / math.sqrt(384), rel=0.02)
    assert model.pos_embed.std().item() == pytest.approx(1 / math.sqrt(384), rel=0.03)
    assert (model.head.weight == 0).all() and (model.head.bias == -10).all()
    logits = model.eval()(torch.randn(2, 3, 224, 224))
    assert torch.equal(logits, torch.full((2, 1000), -10.0))


def test_mixer_starts_lecun_normal():
    cfg = compose_config(["model=mixer_s32"])
    model = build_model(cfg.model, num_classes=10, image_size=224, loss="sigmoid")
    weight = model.blocks[0].mlp_channels.fc1.weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(512), rel=0.02)
    assert weight.abs().max() < 2.3 / math.sqrt(512)  # truncated at two deviations of the untruncated normal
    assert model.blocks[0].mlp_channels.act.approximate == "tanh"


def test_resnet_is_v1_5_and_starts_as_identity_blocks():
    cfg = compose_config(["model=resnet50"])
    model = build_model(cfg.model, num_classes=10, image_size=224, loss="softmax")
    assert model.layer2[0].conv2.stride == (2, 2) and model.layer2[0].conv1.stride == (1, 1)
    assert (model.layer1[0].bn3.weight == 0).all() and (model.fc.bias == 0).all()


@pytest.mark.parametrize("kwargs", [{"padding": 0}, {"bias": False}])
def test_patch_embedding_is_the_convolution(kwargs):
    convolution = nn.Conv2d(3, 16, 8, stride=8, **kwargs).double()
    linear = copy.deepcopy(convolution)
    linear.__class__ = PatchLinear
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    assert_close(linear(x), convolution(x))
    assert linear.state_dict().keys() == convolution.state_dict().keys()
    ragged = torch.randn(1, 3, 33, 46, dtype=torch.float64)
    assert_close(linear(ragged), convolution(ragged))


@pytest.mark.parametrize("name", ["resnetv2_50x1_bit", "convnext_atto"])
def test_other_models_of_timm_compute_what_they_compute_there(name):
    """Convolutions that standardise their weights, patches of a map of odd size."""
    cfg = compose_config(["model=resnet50", f"model.timm={name}"]).model
    ours = build_model(cfg, num_classes=10, image_size=72).eval()
    theirs = timm.create_model(name, num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 72, 72)
    with torch.no_grad():
        assert_close(ours.forward_features(x), theirs.forward_features(x), rtol=1e-4, atol=1e-4)


def test_patch_embedding_is_used_where_patches_are_disjoint():
    _, vit = build("vit_s32")
    _, mixer = build("mixer_s16")
    _, resnet = build("resnet50")
    assert isinstance(vit.patch_embed.proj, PatchLinear) and isinstance(mixer.stem.proj, PatchLinear)
    assert not any(isinstance(m, PatchLinear) for m in resnet.modules())


def test_unknown_model_and_arguments():
    cfg = compose_config(["model=vit_s32"]).model
    cfg.timm = "vit_smal_patch32_224"
    with pytest.raises(UserError, match="did you mean 'vit_small_patch32_224'"):
        build_model(cfg, num_classes=10, image_size=224)
    cfg.timm, cfg.kwargs = "vit_small_patch32_224", {"depht": 3}
    with pytest.raises(UserError, match="refused"):
        build_model(cfg, num_classes=10, image_size=224)


def test_steps_of_imagenet():
    """Q16: 300 and 90 epochs of 1,281,167 images in batches of 4,096."""
    assert [int(epochs * 1_281_167 / 4096) for epochs in (300, 90)] == [93_835, 28_150]


def test_the_blocked_stem_is_the_same_convolution():
    x, weight = torch.randn(2, 3, 10, 14, dtype=torch.float64), torch.randn(5, 3, 7, 7, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(x, weight, stride=2, padding=3)
    torch.testing.assert_close(blocked_stem(x, weight), expected, rtol=1e-12, atol=1e-12)
    model = build_model(compose_config(["model=resnet50"]).model, num_classes=10, image_size=224)
    assert isinstance(model.conv1, StemConv)


def test_short_attention_replaces_timm_s_and_keeps_its_weights():
    model = build_model(compose_config(["model=vit_b32", "debug=tiny"]).model, num_classes=10, image_size=64)
    assert all(type(block.attn) is ShortAttention for block in model.blocks)
    qkv = torch.randn(2, 49, 3 * 4 * 16)
    with torch.device("meta"):
        assert short_attention(qkv.to("meta"), 4).shape == (2, 49, 64)
        y, lse = tiled_attention(qkv.to("meta"), 4)
        assert y.shape == (2, 49, 64) and lse.shape == (2, 4, 49) and lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("vit_s32", "drop_rate"),
        ("vit_s32", "drop_path_rate"),
        ("vit_s32", "patch_drop_rate"),
        ("mixer_s32", "drop_path_rate"),
        ("resnet50", "drop_rate"),
        ("efficientnet_lite0", "drop_rate"),
    ],
)
def test_both_passes_share_whatever_timm_drops(name, rate):
    """At rho = 0 the passes are one function only where they draw the same masks, and the masks are the seed's."""
    cfg = compose_config(["debug=tiny", f"model={name}", "optim=sam", "optim.m=4", f"+model.kwargs.{rate}=0.5"])
    model = build_model(cfg.model, num_classes=10, image_size=64).train()
    nn.init.normal_(model.get_classifier().weight)
    step = gradient_step(cfg, model, Ranks(0, 1, 0, 1, torch.device("cpu")), local_batch=8, bf16=False)
    batch = torch.randint(255, (8, 3, 64, 64), dtype=torch.uint8), torch.randint(10, (8,))
    loss, loss_robust, *_ = step(*batch, rho=0.0, seed=3).tolist()
    assert loss == loss_robust
    assert step(*batch, rho=0.0, seed=3)[0] == loss != step(*batch, rho=0.0, seed=4)[0]
