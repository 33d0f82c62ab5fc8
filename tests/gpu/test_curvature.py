"""Products with the Hessian on a GPU, however they are made, against float64 on the same GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from sam_repro.config.compose import compose_config
from sam_repro.curvature import dominant
from sam_repro.models.build import build_model
from sam_repro.optim.hessian import Hessian

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICE = "cuda"


def pair_of(name: str, **options) -> tuple[Hessian, Hessian]:
    """The same function in float32, made as `options` say, and in float64."""
    torch.manual_seed(0)
    cfg = compose_config([f"model={name}", "debug=tiny"])
    model = build_model(cfg.model, num_classes=10, image_size=64).to(DEVICE).eval()
    with torch.no_grad():  # a zero head would hide most of the curvature
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    images, labels = torch.randn(8, 3, 64, 64, device=DEVICE), torch.randint(10, (8,), device=DEVICE)

    def hessian(net: torch.nn.Module, x: torch.Tensor, **options) -> Hessian:
        def objective(tensors, x, y):
            return F.cross_entropy(torch.func.functional_call(net, tensors, (x,)), y)

        return Hessian(objective, dict(net.named_parameters()), [(x, labels)], **options)

    return hessian(model, images, **options), hessian(copy.deepcopy(model).double(), images.double())


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 switched on, and off again."""
    before = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("name", ["vit_s32", "mixer_s32", "resnet50"])
def test_products_are_exact_with_tf32_switched_on_around_them(name, mode, compiled):
    ours, exact = pair_of(name, mode=mode, compiled=compiled)
    v = torch.randn(ours.size, device=DEVICE)
    slow = exact(v.double())
    for _ in range(2):  # the second goes through the kept graph
        error = float((ours(v) - slow).norm() / slow.norm())
        # A ReLU that rounding flips is a jump of the gradient; GELU has none.
        assert error < (2e-2 if name == "resnet50" else 1e-4)
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32


def test_the_dominant_eigenvalue():
    ours, exact = pair_of("vit_s32")
    assert dominant(ours, tol=1e-3).value == pytest.approx(dominant(exact, tol=1e-6).value, rel=1e-4)
