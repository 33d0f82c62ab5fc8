"""Weights with a leading dimension of groups: every group's gradient in one backward equals its own backward."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sam_repro.config.compose import compose_config
from sam_repro.config.schema import ModelConfig
from sam_repro.models.build import build_model
from sam_repro.models.layers.grouped import accept_groups
from sam_repro.models.layers.patch_linear import PatchLinear
from sam_repro.models.objective import objective_of

GROUPS, M = 3, 2


def problem(name: str):
    cfg = compose_config([f"model={name}", "debug=tiny"])
    model = build_model(cfg.model, num_classes=5, image_size=64, loss="sigmoid").double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    objective = objective_of(cfg, model, torch.device("cpu"), bf16=False)
    images = torch.randint(0, 256, (GROUPS * M, 3, 64, 64), dtype=torch.uint8)
    return model, objective, images, torch.randint(0, 5, (GROUPS * M,))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["vit_s32", "mixer_s32"])
def test_gradients_of_all_groups_at_once(name, shared):
    torch.set_default_dtype(torch.float64)
    try:
        model, objective, images, labels = problem(name)
        names, weights = zip(*((n, p.detach()) for n, p in model.named_parameters()), strict=True)
        leaves = [w.expand(GROUPS, *w.shape) for w in weights]
        if not shared:
            leaves = [leaf + 0.05 * torch.randn_like(leaf) for leaf in leaves]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        mean = objective(dict(zip(names, leaves, strict=True)), images, labels)
        at_once = torch.autograd.grad(GROUPS * mean, leaves)
        losses = []
        for g in range(GROUPS):
            own = [leaf.detach()[g].clone().requires_grad_() for leaf in leaves]
            part = slice(g * M, (g + 1) * M)
            losses.append(objective(dict(zip(names, own, strict=True)), images[part], labels[part]))
            for ours, theirs in zip(at_once, torch.autograd.grad(losses[-1], own), strict=True):
                assert_close(ours[g], theirs, rtol=1e-5, atol=1e-7)  # images are normalised in fp32
        assert_close(mean, torch.stack(losses).mean(), rtol=1e-6, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_which_models_take_groups():
    for name, loose in {"vit_s32": {"pos_embed"}, "mixer_s32": set(), "resnet50": None}.items():
        cfg = compose_config([f"model={name}", "debug=tiny"])
        model = build_model(cfg.model, num_classes=5, image_size=64)
        keys = list(model.state_dict())
        assert accept_groups(model, (PatchLinear,)) == loose
        assert accept_groups(model, (PatchLinear,)) == loose and list(model.state_dict()) == keys


def test_a_norm_over_channels_is_left_alone():
    cfg = ModelConfig(name="convnext", timm="test_convnext", family="resnet")
    model = build_model(cfg, num_classes=5, image_size=64).eval()  # with LayerNorm2d, a subclass of nn.LayerNorm
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    assert accept_groups(model, (PatchLinear,)) is None
    assert_close(model(images), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_s32", "resnet50"])
def test_what_is_compiled_is_one_graph(name):
    """A break would cost fusion and a CUDA graph's worth of launches, and nobody would see it."""
    model, objective, images, labels = problem(name)
    found = torch._dynamo.explain(objective)(dict(model.float().named_parameters()), images, labels)
    assert found.graph_count == 1 and not found.break_reasons
