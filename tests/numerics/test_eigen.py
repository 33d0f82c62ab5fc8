"""Eigen-SAM's eigenvector is one: power iteration on any images, ranks and models."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import DATA, network, quadratic, vector
from torch import Tensor, nn
from torch.testing import assert_close

from sam_repro.optim import GradientStep, PowerIteration
from sam_repro.optim.perturbations import Eigen


def power(hessians: Tensor, **options) -> tuple[Eigen, PowerIteration]:
    eigen = Eigen()
    w = torch.ones(hessians.shape[1], dtype=torch.float64)
    return eigen, PowerIteration(eigen, quadratic, {"w": w}, **({"every": 1} | options))


def test_power_iteration_finds_the_eigenvalue_of_largest_magnitude():
    eigen, estimate = power(vector(3, -5, 1)[None], iterations=60)
    estimate.renew(vector(3, -5, 1)[None])
    assert_close(eigen.v[0].abs(), vector(0, 1, 0), rtol=0, atol=1e-9)
    assert estimate.eigenvalue == pytest.approx(-5, abs=1e-9)


def test_five_iterations_of_the_release_from_noise():
    eigen, estimate = power(vector(1, 4, 9)[None], iterations=5)
    estimate.renew(vector(1, 4, 9)[None])
    assert eigen.v[0].norm().item() == pytest.approx(1, abs=1e-12)
    assert eigen.v[0][2].abs() > 0.99 and eigen.v[0][0].abs() < 1e-3


def test_estimates_come_every_k_global_steps_and_start_warm():
    h = vector(1, 2)[None]
    eigen, estimate = power(h, every=3, iterations=2)
    made = []
    for _ in range(8):
        estimate(h)
        made.append(estimate.products)
    assert made == [0, 0, 0, 2, 2, 2, 4, 4]
    one, other = power(h, every=1, iterations=4)
    other.renew(h)
    assert_close(eigen.v[0], one.v[0], rtol=1e-13, atol=1e-15)  # twice 2 from the same start are once 4
    assert estimate.report(2.0)["products"] == 4 and estimate.report(2.0)["product_share"] > 0


def test_the_release_counts_inside_the_epoch():
    h = vector(1, 2)[None]
    _, estimate = power(h, every=4, iterations=1, per_epoch=5)
    made = []
    for _ in range(10):
        estimate(h)
        made.append(estimate.products)
    assert made == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    _, never = power(h, every=6, iterations=1, per_epoch=5)
    for _ in range(30):
        never(h)
    assert never.products == 0


@pytest.mark.parametrize(("images", "expected"), [("batch", (1, 0)), ("group", (0, 1)), ("fixed", (1, 0))])
def test_images_of_the_estimate(images, expected):
    batch = torch.stack([vector(1, 2), vector(9, 1)])
    eigen, estimate = power(batch, iterations=80, images=images, m=1)
    estimate.fix(batch[1:])
    estimate.renew(*([batch] if images != "fixed" else [batch[:1]]))
    assert_close(eigen.v[0].abs(), vector(*expected), rtol=0, atol=1e-6)


def test_flat_losses_keep_the_former_vector():
    eigen = Eigen()
    estimate = PowerIteration(eigen, lambda t, x: (t["w"] * x).sum(), {"w": vector(1, 2).requires_grad_()})
    estimate.renew(vector(1, 1))
    assert eigen.v[0].norm().item() == pytest.approx(1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1).mean(1))


def test_compiled_estimates_are_the_same_and_compile_once(monkeypatch):
    """Weights and images change between estimates, what was compiled stays."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = network(dropout=0.0).eval()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def objective(tensors, x, y):
        return F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y)

    made = []
    for options in ({}, {"compiled": True}):
        eigen = Eigen()
        estimate = PowerIteration(eigen, objective, params, buffers=buffers, every=1, iterations=3, **options)
        for t in range(3):
            estimate.renew(*(tensor.roll(t, 0)[:8] for tensor in DATA))
        made.append((estimate.eigenvalue, eigen.v))
    assert len(compiled) == 1 and made[0][0] == pytest.approx(made[1][0], rel=1e-10)
    for ours, theirs in zip(made[0][1], made[1][1], strict=True):
        assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_bf16_passes_and_compiled_passes(compiled):
    """Products in float32 with the unfused kernel, whatever the passes are; both leave the settings as they were."""
    model = Attention()
    params = dict(model.named_parameters())
    x, y = torch.randn(4, 5, 8), torch.randint(3, (4,))

    def exact(tensors, x, y):
        assert not torch.is_autocast_enabled("cpu")
        logits = torch.func.functional_call(model, tensors, (x,))
        assert logits.dtype == torch.float32
        return F.cross_entropy(logits, y)

    def objective(tensors, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(torch.func.functional_call(model, tensors, (x,)).float(), y)

    eigen = Eigen()
    before = PowerIteration(eigen, exact, params, every=1, iterations=3)
    precision = torch.get_float32_matmul_precision()
    objective = torch.compile(objective, dynamic=False, backend="aot_eager") if compiled else objective
    step = GradientStep(objective, params, perturb=eigen, pre_step=before, combine="ascent", alpha=0.2)
    with torch.autocast("cpu", torch.bfloat16):  # a caller's autocast does not reach the products
        for _ in range(3):
            metrics = step(x, y, rho=0.1)
    assert torch.isfinite(metrics).all() and before.products == 6
    assert all(v.dtype == torch.float32 for v in eigen.v) and torch.get_float32_matmul_precision() == precision


def test_half_precision_parameters_get_products_in_float32():
    eigen = Eigen()
    p = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    h = torch.tensor([[1.0, 10.0]])
    step = GradientStep(
        quadratic, {"w": p}, perturb=eigen, pre_step=PowerIteration(eigen, quadratic, {"w": p}, every=1)
    )
    for _ in range(2):
        step(h.bfloat16(), rho=0.1)
    assert eigen.v[0].dtype == torch.float32 and p.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every": 0}, "power iteration with k=0 and p=5: both must be at least 1"),
        ({"iterations": 0}, "k=1 and p=0"),
        ({"images": "all"}, "unknown images 'all'"),
    ],
)
def test_bad_estimates_are_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        power(vector(1, 2)[None], **options)


def test_a_fixed_set_must_be_given():
    _, estimate = power(vector(1, 2)[None], images="fixed")
    with pytest.raises(ValueError, match="no images were given"):
        estimate.renew(vector(1, 2)[None])
