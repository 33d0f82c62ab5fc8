"""Curvature against dense eigendecompositions, golden values and other people's tools."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hessians import MODES, batches_of, data, dense_hessian, diagonal, network, objective_of
from problems import quadratic, vector
from torch import nn
from torch.testing import assert_close

from sam_repro.curvature import Hessian, alignment, dominant, lanczos, power_iteration, sharpness, spectral_density
from sam_repro.curvature.measures import seen_in_bf16

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- eigenvalues ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 4])
def test_lanczos_equals_dense_eigenvalues(n, mode):
    model, (x, y) = network(), data()
    hessian = Hessian(objective_of(model), dict(model.named_parameters()), batches_of(x, y, 5), mode=mode)
    slow = torch.linalg.eigvalsh(dense_hessian(model, x, y))
    expected = {
        "top": slow.flip(0)[:n],
        "bottom": slow[:n],
        "magnitude": slow[slow.abs().argsort(descending=True)[:n]],
    }
    for which, values in expected.items():
        pairs = lanczos(hessian, n, which=which, tol=1e-8, max_steps=hessian.size)
        assert_close(pairs.values, values, rtol=1e-6, atol=1e-12)
        for value, vector_, residual in zip(pairs.values, pairs.vectors, pairs.residuals, strict=True):
            true = (hessian(vector_) - value * vector_).norm() / value.abs()
            assert abs(float(vector_.norm()) - 1) < 1e-10
            assert abs(float(true - residual)) < 1e-9  # the reported residual is the true one


@pytest.mark.parametrize("values", [(3, -5, 1), (3.0, 5.0, 1.0), (-1, -2, -7)])
def test_q12_sign_of_the_dominant_eigenvalue(values):
    hessian = diagonal(*values)
    largest = max(values, key=abs)
    assert dominant(hessian, tol=1e-10).value == pytest.approx(largest, abs=1e-12)
    assert power_iteration(hessian, steps=300).value == pytest.approx(largest, abs=1e-12)
    assert lanczos(hessian, which="top", tol=1e-10).value == pytest.approx(max(values), abs=1e-12)
    assert lanczos(hessian, which="bottom", tol=1e-10).value == pytest.approx(min(values), abs=1e-12)


def test_q12_power_iteration():
    pair = power_iteration(diagonal(1, 10), steps=5, start=vector(1, 1) / math.sqrt(2))
    assert pair.value == pytest.approx(9.9999999991, abs=5e-11)
    assert pair.products == 6 and len(pair.history) == 6
    residuals = [r for _, r in pair.history]
    assert residuals == sorted(residuals, reverse=True)
    assert power_iteration(diagonal(1, 10), steps=100, tol=1e-3).products < 10


def test_repeated_eigenvalues_and_an_exhausted_space():
    pairs = lanczos(diagonal(2, 2, 2, -1), 4, tol=1e-12)
    assert_close(pairs.values, vector(2, 2, 2, -1), rtol=1e-12, atol=0)
    assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert dominant(diagonal(7.0)).products == 1


def test_a_start_without_the_dominant_direction_is_reported_by_no_residual_but_a_random_one_has_it():
    hessian = diagonal(1, 10)
    assert dominant(hessian, start=vector(1, 0)).value == 1  # an exact eigenpair, only not the dominant one
    assert dominant(hessian).value == pytest.approx(10)


def test_no_ghosts_in_single_precision():
    """Without reorthogonalisation an isolated top eigenvalue reappears in T many times."""
    values = torch.linspace(0, 1, 300, dtype=torch.float32)
    values[-1] = 100
    hessian = Hessian(quadratic, {"w": torch.ones(300)}, [(values[None],)])
    pairs = lanczos(hessian, 3, tol=1e-12, max_steps=80)
    assert pairs.values[0] == pytest.approx(100, rel=1e-5) and pairs.values[1] < 1.001
    assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(3), rtol=0, atol=1e-5)


def test_a_warm_start_costs_less():
    model, (x, y) = network(), data()
    hessian = Hessian(objective_of(model), dict(model.named_parameters()), [(x, y)])
    cold = dominant(hessian, tol=1e-6)
    assert dominant(hessian, tol=1e-5, start=cold.vectors[0]).products == 1 < cold.products


def test_what_bf16_sees_of_a_perturbation():
    """At w = 1 bf16 has a spacing of 2^-7 above and 2^-8 below: eps of half a spacing or less goes to its even end."""
    one = [torch.ones(1)]
    assert seen_in_bf16(one, [torch.tensor([2**-7])]) == (1.0, 1.0)
    assert seen_in_bf16(one, [torch.tensor([2**-9])]) == (0.0, 0.0)
    ratio, cosine = seen_in_bf16(one, [torch.tensor([0.75 * 2**-7])])
    assert (ratio, cosine) == (pytest.approx(4 / 3), 1.0)
    assert seen_in_bf16(one, [torch.zeros(1)]) == (0.0, 0.0)
    w, eps = 0.02 * torch.randn(100_000), 1.06e-5 * torch.randn(100_000)  # ViT-B's weights and SAM's eps at rho = 0.1
    ratio, cosine = seen_in_bf16([w], [eps])
    assert ratio == pytest.approx(2.6, abs=0.2) and cosine == pytest.approx(0.38, abs=0.03)


def test_spectral_density():
    model, (x, y) = network(), data()
    hessian = Hessian(objective_of(model), dict(model.named_parameters()), [(x, y)])
    slow = torch.linalg.eigvalsh(dense_hessian(model, x, y))
    density = spectral_density(hessian, probes=200, steps=8)
    assert density.products == 1600
    assert float(density.weights.sum()) == pytest.approx(1, abs=1e-10)
    for power in (1, 2, 3):  # q'H^k q of a random unit q has this variance around tr H^k / size
        moments = slow**power
        error = math.sqrt(2 * float(moments.var(correction=0)) / (hessian.size + 2) / 200)
        assert abs(float((density.weights * density.nodes**power).sum() - moments.mean())) < 4 * error
    grid = torch.linspace(-5, 5, 4001, dtype=torch.float64)
    assert float(torch.trapezoid(density.smoothed(grid, 0.05), grid)) == pytest.approx(1, abs=1e-3)


def test_quadrature_is_exact_for_one_probe_on_a_polynomial():
    hessian = diagonal(1, 2, 3, 4, 5, 6)
    density = spectral_density(hessian, probes=1, steps=3)
    q = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q /= q.norm()
    for power in range(6):  # degree 2 * 3 - 1
        exact = float((q**2 * torch.arange(1.0, 7, dtype=torch.float64) ** power).sum())
        assert float((density.weights * density.nodes**power).sum()) == pytest.approx(exact, rel=1e-10)


# ---- attention, and other tools ------------------------------------------------------------------------------------


def small_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=5,
        class_token=False, global_pool="avg", fc_norm=False,
    ).eval()  # fmt: skip


def vit_problem(n: int = 10):
    torch.manual_seed(1)
    model = small_vit()
    x, y = torch.randn(n, 3, 16, 16), torch.randint(5, (n,))
    return model, objective_of(model), x, y


def test_products_do_not_depend_on_fused_attention():
    """Before torch 2.15 it has no second derivative; the product switches to the unfused one, and back."""
    model, objective, x, y = vit_problem()
    params = dict(model.named_parameters())
    backward, forward = (Hessian(objective, params, [(x, y)], mode=mode) for mode in MODES)
    v = torch.randn(backward.size)
    assert_close(backward(v), forward(v), rtol=1e-3, atol=1e-4)


def test_lanczos_agrees_with_curvlinops_and_arpack_on_a_vit():
    curvlinops = pytest.importorskip("curvlinops")
    from scipy.sparse.linalg import eigsh

    model, objective, x, y = vit_problem()
    params = dict(model.named_parameters())
    batches = batches_of(x, y, 4)  # 4, 4, 2
    ours = lanczos(Hessian(objective, params, batches), 2, tol=1e-4)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = curvlinops.HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), batches, check_deterministic=False
        )
        values, _ = eigsh(theirs.to_scipy(), k=2, which="LM", tol=1e-4)
    values = values[np.abs(values).argsort()[::-1]].copy()
    assert_close(ours.values, torch.tensor(values, dtype=torch.float64), rtol=1e-4, atol=0)
    assert float(ours.residuals.max()) <= 1e-4


# ---- the papers' measures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("w", "estimate"),
    [((0, 1e-1), 30), ((0, 1e-2), 12), ((0, 1e-3), 10.2), ((0, 1e-4), 10.02), ((1e-4, 1e-4), 9.93)],
)
def test_q11_the_surrogate_gap_is_an_eigenvalue_only_near_a_minimum(w, estimate):
    """Lemma 3.3: along the top eigenvector 2h/rho^2 tends to sigma_max = 10 as the gradient vanishes."""
    measured = sharpness(diagonal(1, 10, w=vector(*w)), 0.1)
    assert measured["estimate"] == pytest.approx(estimate, abs=0.01)
    g = vector(1, 10) * vector(*w)
    assert measured["first_order"] == pytest.approx(2 * float(g.norm()) / 0.1)
    curvature = float((vector(1, 10) * g**2).sum() / g.norm() ** 2)
    assert measured["curvature"] == pytest.approx(curvature, abs=1e-7)


def test_q1_estimate_far_from_a_minimum():
    measured = sharpness(diagonal(1, 10), 0.1)
    assert measured["surrogate_gap"] == pytest.approx(1.0545420176, abs=1e-10)
    assert measured["estimate"] == pytest.approx(210.9084035, abs=1e-6)


def test_alignment():
    v = vector(0, 1)
    assert alignment(vector(3, -4), v) == pytest.approx(0.8)
    assert alignment([vector(3), vector(4)], 2 * v) == pytest.approx(0.8)
    assert alignment({"a": vector(3, 0)}, v) == 0
    assert alignment(vector(0, 0), v) == 0


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Hessian(quadratic, {"w": torch.ones(1)}, [], mode="central"), "unknown mode 'central'"),
        (lambda: Hessian(quadratic, {"w": torch.ones(1)}, iter([])), "read only once"),
        (lambda: Hessian(quadratic, {"w": torch.ones(1, dtype=torch.bfloat16)}, []), "not torch.bfloat16"),
        (lambda: Hessian(quadratic, {"w": torch.ones(1)}, [])(torch.ones(1)), "no images"),
        (lambda: lanczos(diagonal(1, 2), 3), "cannot find 3 eigenvalues of 2"),
        (lambda: lanczos(diagonal(1, 2), 0), "cannot find 0"),
        (lambda: lanczos(diagonal(1, 2), which="best"), "unknown end of the spectrum 'best'"),
        (lambda: dominant(diagonal(1, math.nan)), "not finite"),
        (lambda: power_iteration(diagonal(1, 2), steps=0), "at least 1 step"),
        (lambda: spectral_density(diagonal(1, 2), probes=0), "at least 1 probe"),
        (lambda: sharpness(diagonal(1, 2), 0.0), "greater than 0"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
