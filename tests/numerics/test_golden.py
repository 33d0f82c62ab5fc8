"""Golden values of SAM and GSAM, computed by hand or by independent formulae; float64."""

from __future__ import annotations

import math

import pytest
import torch
from problems import gradient_of, quadratic, vector
from torch.testing import assert_close

from sam_repro.optim import GradientStep, decay_groups, lr_at, rho_at
from sam_repro.optim.perturbations import PERTURBATIONS, inner, squared_norm

H = vector(1, 10)[None]  # one "image" whose loss has this diagonal Hessian
W = vector(1, 1)
SHARDS = torch.stack([vector(1, 1), vector(4, 0.25)])


def close(actual, expected, tol=5e-11):
    assert_close(torch.as_tensor(actual, dtype=torch.float64), expected, rtol=0, atol=tol)


def test_q1_quadratic():
    g = gradient_of(W, H)
    close(g, vector(1, 10))
    (eps,) = PERTURBATIONS["sam"]([W], [g], 0.1)
    close(eps, vector(0.0099503719, 0.0995037190))
    g_p = gradient_of(W, H, rho=0.1, perturb="sam")
    close(g_p, vector(1.0099503719, 10.9950371902))
    g_gsam = gradient_of(W, H, rho=0.1, perturb="sam", combine="ascent", alpha=0.5)
    close(g_gsam, vector(0.9695666636, 10.9987466403))
    close(W - 0.01 * g_p, vector(0.9899004963, 0.8900496281))
    close(W - 0.01 * g_gsam, vector(0.9903043334, 0.8900125336))


def test_q1_reported_metrics():
    p = W.clone().requires_grad_()
    loss, loss_p, h, cosine, norm, norm_p = GradientStep(quadratic, {"w": p}, perturb="sam")(H, rho=0.1).tolist()
    assert (loss, round(loss_p, 10), round(h, 10)) == (5.5, 6.5545420176, 1.0545420176)
    g, g_p = vector(1, 10), vector(1.0099503719, 10.9950371902)
    assert cosine == pytest.approx(float(g @ g_p / g.norm() / g_p.norm()), abs=1e-10)
    assert (norm, norm_p) == (pytest.approx(10.0498756211), pytest.approx(float(g_p.norm())))
    # h is rho |g| + rho^2 g'Hg / 2|g|^2 exactly on a quadratic; 2h/rho^2 = 210.9 is no eigenvalue here.
    assert h == pytest.approx(0.1 * g.norm().item() + 0.005 * float(g @ (H[0] * g) / (g @ g)), abs=1e-10)


def test_q1_perturbation_ignores_weight_decay():
    """L2 inside the loss would turn eps to (.1003893814, .9949482258): decay belongs to the base optimizer."""
    (eps,) = PERTURBATIONS["sam"]([W], [gradient_of(W, H)], 1.0)
    close(eps, vector(0.0995037190, 0.9950371902))

    def with_l2(tensors, hessians):
        return quadratic(tensors, hessians) + 0.005 * (tensors["w"] ** 2).sum()

    (eps,) = PERTURBATIONS["sam"]([W], [gradient_of(W, H, objective=with_l2)], 1.0)
    close(eps, vector(0.1003893814, 0.9949482258))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_q3_each_group_perturbs_and_decomposes_alone(order):
    batch = SHARDS[order]
    method = {"rho": 0.1, "perturb": "sam"}
    close(gradient_of(W, batch, m=1, **method), vector(2.7349658548, 0.6611350676))
    close(gradient_of(W, batch, m=2, **method), vector(2.7425356250, 0.6401584766))
    method |= {"combine": "ascent", "alpha": 0.5}
    close(gradient_of(W, batch, m=1, **method), vector(2.7352689199, 0.6558351252))
    close(gradient_of(W, batch, m=2, **method), vector(2.7471236915, 0.6205025067))
    close(gradient_of(W, batch, m=1, clip=1.0, **method), vector(0.9724380586, 0.2331613653))


def test_q3_two_ranks_equal_two_groups():
    """Two engines of one group each, summed as an all-reduce would, give the one engine of two groups."""
    flats = []
    for rank in range(2):
        p = W.clone().requires_grad_()
        step = GradientStep(
            quadratic, {"w": p}, perturb="sam", combine="ascent", alpha=0.5, m=1, rank=rank, world=2,
            all_reduce=lambda flat: flats.append(flat),
        )  # fmt: skip
        step(SHARDS[rank : rank + 1], rho=0.1)
    close((flats[0] + flats[1])[:2], vector(2.7352689199, 0.6558351252))


def test_q4_rho_schedule():
    ends = {"lr_max": 3e-3, "lr_min": 3e-5}
    assert rho_at(3e-3, rho_max=0.6, rho_min=0.1, **ends) == pytest.approx(0.6)
    assert rho_at(3e-5, rho_max=0.6, rho_min=0.1, **ends) == pytest.approx(0.1)
    assert rho_at(0.0, rho_max=0.6, rho_min=0.1, **ends) == pytest.approx(0.0949494949)
    assert rho_at(0.0, rho_max=0.6, rho_min=0.2, **ends) == pytest.approx(0.1959595960)
    assert rho_at(0.0, rho_max=0.6, rho_min=0.0, **ends) == 0.0
    assert rho_at(0.0, rho_max=0.6, rho_min=0.0, faithful=True, **ends) == pytest.approx(-0.0060606, abs=1e-7)
    assert rho_at(1.0, lr_max=1.0, lr_min=1.0, rho_max=0.5, rho_min=0.1) == 0.5


def test_lr_schedule():
    total = 93_835
    recipe = {"peak": 3e-3, "warmup": 10_000, "kind": "linear", "min_ratio": 0.01}
    assert lr_at(0, total, **recipe) == 0
    assert lr_at(5_000, total, **recipe) == pytest.approx(1.5e-3)
    assert lr_at(10_000, total, **recipe) == pytest.approx(3e-3)
    assert lr_at(total, total, **recipe) == pytest.approx(3e-5)
    assert lr_at((total + 10_000) // 2, total, **recipe) == pytest.approx((3e-3 + 3e-5) / 2, rel=1e-4)
    assert lr_at(5, 10, peak=1.0, kind="cosine") == pytest.approx(0.5)
    assert lr_at(7, 10, peak=1.0, kind="constant") == 1.0


@pytest.mark.parametrize("combine", ["robust", "ascent"])
def test_q5_rho_zero_is_the_base_optimizer(combine):
    g = gradient_of(W, SHARDS, m=1)
    assert_close(gradient_of(W, SHARDS, m=1, perturb="sam", combine=combine, alpha=0.5), g, rtol=1e-15, atol=0)


def test_q5_alpha_zero_is_sam():
    gsam = gradient_of(W, SHARDS, m=1, rho=0.1, perturb="sam", combine="ascent", alpha=0.0)
    assert torch.equal(gsam, gradient_of(W, SHARDS, m=1, rho=0.1, perturb="sam"))


def test_q5_alpha_is_irrelevant_in_one_dimension():
    w, h = vector(2.0), vector(3.0)[None]
    sam = gradient_of(w, h, rho=0.1, perturb="sam")
    close(gradient_of(w, h, rho=0.1, perturb="sam", combine="ascent", alpha=7.0), sam, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q6_weights_are_untouched_bitwise(dtype):
    w = torch.randn(1000, dtype=dtype)
    p = w.clone().requires_grad_()
    where = p.data_ptr()
    step = GradientStep(quadratic, {"w": p}, perturb="sam", combine="ascent", alpha=0.5, m=2)
    step(torch.rand(4, 1000, dtype=dtype), rho=0.5)
    assert torch.equal(p, w) and p.data_ptr() == where


def test_q6_zero_gradient_and_unused_parameters():
    p, unused = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64)
    unused.requires_grad_()
    step = GradientStep(quadratic, {"w": p, "unused": unused}, perturb="sam", combine="ascent", alpha=0.5)
    metrics = step(H, rho=0.1)
    assert torch.equal(p.grad, torch.zeros(2)) and torch.equal(unused.grad, torch.zeros(3))
    assert torch.isfinite(metrics).all()
    step.clip_(1.0)
    assert torch.equal(p.grad, torch.zeros(2))


def test_q7_identities():
    w, batch, alpha = torch.randn(20, dtype=torch.float64), torch.rand(5, 20, dtype=torch.float64), 0.7
    g = [gradient_of(w, batch)]
    g_p = [gradient_of(w, batch, rho=0.3, perturb="sam")]
    d = [gradient_of(w, batch, rho=0.3, perturb="sam", combine="ascent", alpha=alpha)]
    g_perp = [g[0] - inner(g, g_p) / squared_norm(g_p) * g_p[0]]
    assert abs(inner(g_perp, g_p)) < 1e-13
    close(inner(d, g_p), squared_norm(g_p), 1e-13)
    close(inner(d, g_perp), -alpha * squared_norm(g_perp), 1e-13)


def test_q8_decoupled_decay():
    w = torch.nn.Parameter(vector(2.0, -3.0)[None])
    w.grad = torch.zeros_like(w)
    torch.optim.AdamW([{"params": [w], "weight_decay": 0.3}], lr=3e-3).step()
    assert_close(w.detach(), vector(2.0, -3.0)[None] * (1 - 9e-4))


def test_q8_only_kernels_decay():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    named = list(model.named_parameters()) + [("pos_embed", torch.nn.Parameter(torch.zeros(1, 4, 8)))]
    decayed, plain = decay_groups(named, 0.3)
    assert [p.ndim for p in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.3
    assert len(plain["params"]) == 5 and plain["weight_decay"] == 0.0
    assert len(decay_groups(named, 0.3, decay="all")[0]["params"]) == len(named)


def test_q17_initial_sigmoid_loss():
    logits, labels = torch.full((3, 1000), -10.0, dtype=torch.float64), torch.tensor([0, 5, 999])
    from sam_repro.config.schema import Config
    from sam_repro.models.objective import loss_of

    cfg = Config()
    expected = 999 * math.log1p(math.exp(-10)) + math.log1p(math.exp(10))
    assert loss_of(cfg)(logits, labels).item() == pytest.approx(expected) == pytest.approx(10.0454, abs=1e-4)
    onehot = torch.nn.functional.one_hot(labels, 1000).double()
    z = torch.randn(3, 1000, dtype=torch.float64)
    slow = torch.nn.functional.binary_cross_entropy_with_logits(z, onehot, reduction="none").sum(1).mean()
    assert_close(loss_of(cfg)(z, labels), slow)
    cfg.recipe.loss = "softmax"
    assert loss_of(cfg)(logits, labels).item() == pytest.approx(math.log(1000)) == pytest.approx(6.9078, abs=1e-4)
