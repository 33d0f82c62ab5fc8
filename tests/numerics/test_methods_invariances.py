"""What no method may change: reductions to each other, invariances, and properties on odd shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DETERMINISTIC, G_P, SHARDS, G, H, W, close, fresh, gradient_of, quadratic, vector
from torch.testing import assert_close

from sam_repro.optim import COMBINATIONS, PERTURBATIONS, EntropySGD, GradientStep, LookSAMStep
from sam_repro.optim.perturbations import Eigen, Friendly, Vasso, asam, build_perturbation, fisher

# ---- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", [*COMBINATIONS, "cr"])
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_rho_zero_is_the_base_optimizer(name, combine):
    g = gradient_of(W, SHARDS, m=1)
    d = gradient_of(W, SHARDS, m=1, perturb=fresh(name), combine=combine, alpha=0.4, beta=0.3)
    assert_close(d, g, rtol=1e-14, atol=0)


@pytest.mark.parametrize("combine", ["ascent", "weighted", "cr"])
def test_alpha_zero_is_sam(combine):
    method = {"rho": 0.1, "perturb": "sam", "m": 1}
    assert torch.equal(gradient_of(W, SHARDS, combine=combine, **method), gradient_of(W, SHARDS, **method))


def test_other_reductions_to_sam_and_to_the_base():
    sam = gradient_of(W, SHARDS, m=1, rho=0.1, perturb="sam")
    close(gradient_of(W, SHARDS, m=1, rho=0.1, perturb="sam", combine="wsam", alpha=0.5), sam, 1e-14)
    g = gradient_of(W, SHARDS, m=1)
    for combine in ("wsam", "min_f_h"):
        close(gradient_of(W, SHARDS, m=1, rho=0.1, perturb="sam", combine=combine, alpha=0.0), g, 1e-14)
    for perturb in (Friendly(sigma=0.0), Vasso(theta=1.0), Eigen(alpha=0.0)):
        perturb.m, perturb.v = [vector(2, 3)], [vector(0, 1)]
        close(gradient_of(W, SHARDS, m=1, rho=0.1, perturb=perturb), sam, 1e-14)
    (flat,) = fisher([W], [G], 0.1, eta=0.0)
    close(flat, 0.1 * G / G.norm(), 1e-13)
    (units,) = asam([W], [G], 0.1, eta=7.0, scaled=[False])
    close(units, 0.1 * G / G.norm(), 1e-13)


@pytest.mark.parametrize("renormalise", ["none", "v_perp", "sum"])
def test_eigen_is_the_same_for_v_and_minus_v(renormalise):
    eps = []
    for sign in (1, -1):
        perturb = Eigen(renormalise=renormalise)
        perturb.v = [sign * vector(0.6, 0.8)]
        eps += perturb([W], [G], 0.1)
    assert torch.equal(*eps)


RHO = torch.tensor(0.4, dtype=torch.float64)


@pytest.mark.parametrize("renormalise", ["none", "v_perp", "sum"])
def test_eigen_by_its_coefficients(renormalise):
    perturb = build_perturbation("eigen", alpha=0.3, renormalise=renormalise)
    g, v = (torch.randn(50, dtype=torch.float64) for _ in range(2))
    perturb.v = [v / v.norm()]
    for sign in (1, -1):
        (expected,) = perturb([g], [sign * g], 0.4)
        a, b = perturb.coefficients(g @ g, sign * g @ perturb.v[0], perturb.v[0] @ perturb.v[0], RHO)
        assert_close(a * sign * g + b * perturb.v[0], expected, rtol=1e-9, atol=1e-12)
    a, b = perturb.coefficients(g @ g, 0 * g[0], 0 * g[0], RHO)  # no vector yet
    assert_close(a * g, 0.4 * g / g.norm(), rtol=1e-6, atol=0)
    assert b == 0


def test_eigen_without_a_vector_is_sam_or_what_the_release_does():
    (ours,), (theirs,) = Eigen()([W], [G], 0.1), Eigen(faithful=True)([W], [G], 0.1)
    close(ours, 0.1 * G / G.norm(), 1e-13)
    close(theirs, 0.1 * G, 1e-15)


def test_asam_does_not_see_a_rescaling():
    """a relu(b x) is the same function for (c a, b / c): ASAM's sharpness is too, SAM's is not."""
    x = torch.tensor([0.7], dtype=torch.float64)

    def f(t, x):
        return ((t["w"][1] * torch.relu(t["w"][0] * x) - 1) ** 2).mean()

    gaps = {}
    for name in ("asam", "sam", "adaptive_official"):
        for w in (vector(1, 0.5), vector(4, 0.125)):
            p = w.clone().requires_grad_()
            metrics = GradientStep(f, {"w": p}, perturb=name)(x, rho=0.1)
            gaps.setdefault(name, []).append(metrics[2].item())
    assert gaps["asam"][0] == pytest.approx(gaps["asam"][1], rel=1e-12)
    assert gaps["sam"][0] != pytest.approx(gaps["sam"][1], rel=1e-2)
    assert gaps["adaptive_official"][0] != pytest.approx(gaps["adaptive_official"][1], rel=1e-2)


@pytest.mark.parametrize("combine", [*COMBINATIONS, "cr"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_order_of_groups_does_not_matter(name, combine):
    found, memory = [], []
    for batch in (SHARDS, SHARDS.flip(0)):
        perturb = fresh(name)
        method = {"perturb": perturb, "combine": combine, "alpha": 0.4, "beta": 0.1}
        found.append(gradient_of(W, batch, m=1, rho=0.1, **method))
        memory.append(getattr(perturb, "m", [W])[0])
    assert_close(*found, rtol=1e-13, atol=0)
    assert_close(*memory, rtol=1e-13, atol=0)


def test_random_directions_belong_to_groups_and_not_to_calls():
    rows = [gradient_of(W, H, rho=0.1, perturb="random") for _ in range(2)]
    assert torch.equal(*rows)  # the same seed and group
    eps = build_perturbation("random")([W, W], [G, G], 0.1)
    assert torch.cat(eps).norm().item() == pytest.approx(0.1)


def test_every_k_without_reuse_is_the_base_optimizer_in_between():
    p = W.clone().requires_grad_()
    step = LookSAMStep(quadratic, {"w": p}, perturb="sam", every=3, reuse=0.0)
    seen = []
    for _ in range(4):
        step(H, rho=0.1)
        seen.append(p.grad.clone())
    assert torch.equal(seen[1], G) and torch.equal(seen[2], G)
    close(seen[0], G_P), close(seen[3], G_P)


# ---- properties ------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from(list(PERTURBATIONS)), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_shapes_dtypes_and_zero_gradients(shapes, name, dtype, zero):
    """eps has the parameters' shapes and dtype, new memory, and is finite; nothing is written."""
    params = [torch.randn(s, dtype=dtype) for s in shapes]
    grads = [torch.zeros_like(p) if zero else torch.randn_like(p) for p in params]
    before = [t.clone() for t in params + grads]
    perturb = build_perturbation(name)
    for _ in range(2):
        eps = perturb(params, grads, 0.1)
        assert [e.shape for e in eps] == [p.shape for p in params] and all(e.dtype == dtype for e in eps)
        assert all(torch.isfinite(e).all() for e in eps)
        assert {e.data_ptr() for e in eps}.isdisjoint(t.data_ptr() for t in params + grads)
        if name == "eigen":
            perturb.v = [torch.randn_like(p) for p in params]
    assert all(torch.equal(a, b) for a, b in zip(before, params + grads, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(PERTURBATIONS)), st.sampled_from([*COMBINATIONS, "cr"]), st.integers(1, 5), st.booleans())
def test_steps_survive_flat_places_unused_parameters_and_single_numbers(name, combine, n, decoupled):
    """At w = 0 the gradient is zero; an unused parameter gets zeros; a parameter of one element is one."""
    params = {"w": torch.zeros(n, dtype=torch.float64), "unused": torch.ones((), dtype=torch.float64)}
    params = {k: p.requires_grad_() for k, p in params.items()}
    step = GradientStep(quadratic, params, perturb=name, combine=combine, alpha=0.4, beta=0.1, decoupled=decoupled)
    for seed in range(2):
        metrics = step(torch.rand(3, n, dtype=torch.float64), rho=0.1, seed=seed)
        step.clip_(1.0)
        step.apply_decoupled_(0.1)
        assert torch.isfinite(metrics).all() and all(torch.isfinite(p.grad).all() for p in params.values())
    assert params["unused"].grad.item() == 0 and all(torch.isfinite(p).all() for p in params.values())


@pytest.mark.parametrize("sizes", [(49, 3, 8), (1, 1, 1), (16, 4)])
@pytest.mark.parametrize("name", ["sam", "friendly"])  # friendly keeps the clean gradient too
def test_every_part_of_the_gradient_starts_where_a_vector_load_may(name, sizes):
    params = {str(i): torch.zeros(n) for i, n in enumerate(sizes)}
    step = GradientStep(quadratic, params, perturb=name)
    parts = [*step.views, *step.second_views]
    assert len(parts) == len(sizes) * (2 if name == "friendly" else 1)
    assert all(part.storage_offset() % 4 == 0 for part in parts)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 2.0), st.floats(-1, 1), st.integers(2, 6))
def test_ascent_never_turns_against_the_robust_gradient(rho, alpha, n):
    w, batch = torch.randn(n, dtype=torch.float64), torch.rand(4, n, dtype=torch.float64) + 0.1
    g_p = gradient_of(w, batch, rho=rho, perturb="sam")
    d = gradient_of(w, batch, rho=rho, perturb="sam", combine="ascent", alpha=alpha)
    assert (d @ g_p).item() == pytest.approx((g_p @ g_p).item(), rel=1e-10)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: gradient_of(W, H, perturb="sideways"), "unknown perturbation 'sideways'"),
        (lambda: gradient_of(W, H, combine="sideways"), "unknown combination 'sideways'.*cr"),
        (lambda: Eigen(renormalise="half"), "unknown renormalisation 'half'"),
        (lambda: LookSAMStep(quadratic, {"w": W}, perturb="sam", every=0), "every=0 must be at least 1"),
        (lambda: LookSAMStep(quadratic, {"w": W}, perturb="sam", decoupled=True), "decoupled method cannot be reused"),
        (lambda: EntropySGD(quadratic, {"w": W}, steps=0), "both must be at least 1"),
        (lambda: EntropySGD(quadratic, {"w": W}, parts=3)(torch.ones(4, 2)), "3 parts do not divide"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
