"""Every method against golden values, the official JAX code's numbers, an independent formula, and an invariance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import official_gsam
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import gradient_of, quadratic, vector
from torch import Tensor
from torch.testing import assert_close

from sam_repro.optim import COMBINATIONS, PERTURBATIONS, EntropySGD, EveryK, GradientStep, rho_at
from sam_repro.optim.perturb import Eigen, Friendly, Random, Vasso, adaptive_official, asam, build_perturbation, fisher

H = vector(1, 10)[None]  # one "image" whose loss has this diagonal Hessian
W, G, G_P = vector(1, 1), vector(1, 10), vector(1.0099503719, 10.9950371902)
SHARDS = torch.stack([vector(1, 1), vector(4, 0.25)])


def close(actual, expected, tol=6e-11):
    assert_close(torch.as_tensor(actual, dtype=torch.float64), expected, rtol=0, atol=tol)


def fresh(name: str):
    """A perturbation with something to remember, where it can remember."""
    perturb = build_perturbation(name)
    if isinstance(perturb, Friendly | Vasso):
        perturb.update([vector(2, 3)])
    if isinstance(perturb, Eigen):
        perturb.v = [vector(0, 1)]
    if isinstance(perturb, Random):
        perturb.reseed(3)
    return perturb


# ---- golden values ---------------------------------------------------------------------------------------------------


COMBINED = {
    "min_f_h": (0.5, (0.9556666598, 10.0044333340)),
    "weighted": (0.5, (1.0149255579, 11.4925557853)),
    "wsam": (0.9, (1.0895533471, 18.9553347119)),
}


@pytest.mark.parametrize("combine", COMBINED)
def test_q1_combinations(combine):
    alpha, expected = COMBINED[combine]
    close(gradient_of(W, H, rho=0.1, perturb="sam", combine=combine, alpha=alpha), vector(*expected))


def test_q1_wsam_decoupled():
    p = W.clone().requires_grad_()
    step = GradientStep(quadratic, {"w": p}, perturb="sam", combine="wsam", alpha=0.9, decoupled=True)
    step(H, rho=0.1)
    assert torch.equal(p.grad, G)
    torch.optim.SGD([p], lr=0.01).step()
    step.correct_(0.01)
    close(p.detach(), vector(0.9891044665, 0.8104466529))


def test_q1_looksam():
    p = W.clone().requires_grad_()
    step = EveryK(quadratic, {"w": p}, perturb="sam", every=2, reuse=0.7)
    step(H, rho=0.1)
    close(p.grad, G_P)
    close(step.g_v[:2], vector(-0.0886666803, 0.0088666680))  # then what aligns it
    step(H, rho=0.1)
    close(p.grad, vector(-6.0, 10.7))
    step(H, rho=0.1)
    close(p.grad, G_P)


def test_q1_cr_sam():
    d = gradient_of(W, H, rho=0.1, perturb="sam", combine="cr", alpha=0.1, beta=0.1)
    close(d, vector(1.0119404463, 11.1940446283))


PERTURBED = {
    "friendly": (-0.0141421356, 0.0989949494),
    "vasso": (0.0117460782, 0.0993077522),
    "fisher": (0.0409602352, 0.0081109377),
    "eigen": (0.0079701739, 0.0997017388),
}


@pytest.mark.parametrize("name", PERTURBED)
def test_q1_perturbations(name):
    (eps,) = fresh(name)([W], [G], 0.1)
    close(eps, vector(*PERTURBED[name]))


def test_q1_friendly_mean_takes_the_gradient_and_not_the_difference():
    perturb = fresh("friendly")
    perturb([W], [G], 0.1)
    close(perturb.m[0], vector(1.9, 3.7))  # (1.7, 3.4) is the mistake of a well-known port


def test_q1_eigen_renormalised():
    norms = {"none": 1.0001980, "v_perp": 1.0198039, "sum": 1.0}
    for renormalise, norm in norms.items():
        perturb = Eigen(renormalise=renormalise)
        perturb.v = [vector(0, 1)]
        (eps,) = perturb([W], [G], 0.1)
        assert eps.norm().item() / 0.1 == pytest.approx(norm, abs=5e-8)
        if renormalise == "v_perp":
            close(eps, vector(-0.0099503719, 0.1014937934))


@pytest.mark.parametrize("sign", [1, -1])
def test_eigen_golden_value_of_the_release(sign):
    perturb = Eigen(alpha=0.2)
    perturb.v = [sign * vector(0, 0, 1)]
    (eps,) = perturb([vector(1, 1, 1)], [vector(1, 4, 9)], 1.0)
    close(eps, vector(0.0826479075, 0.3305916301, 0.9438311676))
    assert eps.norm().item() == pytest.approx(1.0034633902, abs=1e-10)


def test_q2_asam_and_what_is_not():
    w = vector(2, 0.5)
    g = H[0] * w
    (eps,) = asam([w], [g], 0.1)
    close(eps, vector(0.1695996608, 0.0264999470))
    assert (eps / w.abs()).norm().item() == pytest.approx(0.1, abs=1e-13)
    (other,) = adaptive_official([w], [g], 0.1)
    close(other, vector(0.0742781353, 0.0464238345))


@pytest.mark.parametrize("row", json.loads(Path(official_gsam.__file__).with_suffix(".json").read_text()))
def test_official_jax_gsam_gradient(row):
    """Numbers of the authors' own code, made by official_gsam.py."""

    def tensor(shape: tuple[int, ...], start: float) -> Tensor:
        return torch.tensor(official_gsam.wave(shape, start), dtype=torch.float64).reshape(shape)

    def objective(t, x, y):
        return F.cross_entropy(torch.tanh(x @ t["w1"] + t["b1"]) @ t["w2"] + t["b2"], y)

    params = {n: tensor(s, k).requires_grad_() for k, (n, s) in enumerate(official_gsam.SIZES.items())}
    method = dict(official_gsam.METHOD)
    alpha, rho = method.pop("alpha"), rho_at(method.pop("lr"), **method)
    combine = "ascent" if row["minimize_fp"] else "min_f_h"
    perturb = "adaptive_official" if row["adaptive_perturbation"] else "sam"
    step = GradientStep(objective, params, perturb=perturb, combine=combine, alpha=alpha)
    loss, *_ = step(tensor((5, 3), 0.5), torch.tensor([0, 1, 1, 0, 1]), rho=rho)
    assert loss.item() == pytest.approx(row["loss"], rel=1e-12)
    for name, p in params.items():
        assert_close(p.grad.reshape(-1), torch.tensor(row["gradient"][name], dtype=torch.float64), rtol=1e-6, atol=1e-9)


# ---- independent formulae, in a space where all parameters are one vector --------------------------------------------


def slow_eps(name: str, w: Tensor, g: Tensor, rho: float, memory: Tensor) -> Tensor:
    """The formulae of the papers, one line each."""
    if name == "asam":
        return rho * w.abs() ** 2 * g / (w.abs() * g).norm()
    if name == "adaptive_official":
        return rho * w.abs() * g / g.norm()
    if name == "fisher":
        return rho * g / (1 + g**2) / (g**2 / (1 + g**2)).sum().sqrt()
    if name == "eigen":
        unit = g / g.norm()
        perp = memory - (memory @ unit) * unit
        return rho * (unit + 0.2 * math.copysign(1, g @ memory) * perp)
    d = {"sam": g, "friendly": g - memory, "vasso": 0.1 * memory + 0.9 * g}[name]
    return rho * d / d.norm()


def slow_direction(combine: str, g: Tensor, g_p: Tensor, g_m: Tensor, alpha: float, beta: float) -> Tensor:
    if combine == "ascent":
        return g_p - alpha * (g - (g @ g_p) / (g_p @ g_p) * g_p)
    if combine == "min_f_h":
        return g + alpha * (g_p - (g @ g_p) / (g @ g) * g)
    if combine == "weighted":
        return g_p + alpha * (g_p - g)
    if combine == "wsam":
        return g + alpha / (1 - alpha) * (g_p - g)
    if combine == "cr":
        return g_p + alpha * (g_p + g_m - 2 * g) + beta * (g_p - g_m)
    return g_p


def quartic(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """A loss that is not quadratic, in two parameters of different shapes."""
    w = torch.cat([tensors["a"].reshape(-1), tensors["b"]])
    return ((x @ w).tanh() + (x**2 @ w**2) + 0.1 * (x @ w) ** 4).mean()


def pieces(w: Tensor) -> dict[str, Tensor]:
    return {"a": w[:4].reshape(2, 2).clone().requires_grad_(), "b": w[4:].clone().requires_grad_()}


def slow_gradient(w: Tensor, x: Tensor) -> Tensor:
    w = w.clone().requires_grad_()
    (g,) = torch.autograd.grad(((x @ w).tanh() + (x**2 @ w**2) + 0.1 * (x @ w) ** 4).mean(), w)
    return g


DETERMINISTIC = [name for name in PERTURBATIONS if name != "random"]


@pytest.mark.parametrize("combine", [*COMBINATIONS, "cr"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_perturbation_with_every_combination(name, combine):
    w, x, memory = torch.randn(7).double(), torch.randn(6, 7).double(), torch.randn(7).double()
    memory = memory / memory.norm()
    alpha, beta, rho, perturb = 0.3, 0.2, 0.05, build_perturbation(name)
    pair = [memory[:4].reshape(2, 2), memory[4:]]
    if hasattr(perturb, "update"):
        perturb.update(pair)
    if name == "eigen":
        perturb.v = pair
    params = pieces(w)
    GradientStep(quartic, params, perturb=perturb, combine=combine, alpha=alpha, beta=beta, m=3)(x, rho=rho)
    expected = []
    for group in x.split(3):
        g = slow_gradient(w, group)
        eps = slow_eps(name, w, g, rho, memory)
        g_p, g_m = slow_gradient(w + eps, group), slow_gradient(w - eps, group)
        expected.append(slow_direction(combine, g, g_p, g_m, alpha, beta))
    found = torch.cat([p.grad.reshape(-1) for p in params.values()])
    assert_close(found, torch.stack(expected).mean(0), rtol=1e-9, atol=1e-11)
    if name in ("friendly", "vasso"):  # the memory takes the mean gradient, once a step
        weight, g = (0.1 if name == "friendly" else 0.9), slow_gradient(w, x)
        m = torch.cat([t.reshape(-1) for t in perturb.m])
        assert_close(m, (1 - weight) * memory + weight * g, rtol=1e-12, atol=1e-14)


def test_entropy_sgd_against_the_plain_walk():
    w, x = torch.randn(7).double(), torch.randn(6, 7).double()
    params = pieces(w)
    step = EntropySGD(quartic, params, m=1, steps=5, parts=3, lr=0.05, noise=0.01, gamma=0.5, scoping=0.1)
    for t in range(2):
        metrics = step(x, seed=9)
        generator = torch.Generator().manual_seed(9)
        y, mu, velocity = w.clone(), w.clone(), torch.zeros(7).double()
        for i in range(5):
            g = slow_gradient(y, x.split(2)[i % 3])
            velocity = 0.9 * velocity + g
            parts = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params.values()]
            noise = 0.01 / math.sqrt(0.5 * 0.05) * torch.cat([n.reshape(-1) for n in parts])
            y = y - 0.05 * (g + 0.9 * velocity + 0.5 * 1.1**t * (y - w) + noise)
            mu = 0.75 * mu + 0.25 * y
        found = torch.cat([p.grad.reshape(-1) for p in params.values()])
        assert_close(found, w - mu, rtol=1e-10, atol=1e-13)
        assert_close(metrics[3], F.cosine_similarity(slow_gradient(w, x.split(2)[0]), w - mu, dim=0))


def test_entropy_sgd_scoping_counts_and_stops_at_one_over_eta():
    step = EntropySGD(quadratic, {"w": W.clone().requires_grad_()}, steps=1, lr=0.1, gamma=0.03, scoping=0.9)
    seen = []
    for _ in range(12):
        seen.append(step.strength())
        step(H)
    assert seen[:3] == pytest.approx([0.03, 0.03 * 1.9, 0.03 * 1.9**2])
    assert seen[-1] == pytest.approx(10)
    step.calls = 100_000
    assert step.strength() == pytest.approx(10) and torch.isfinite(step(H)).all()


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
    step = EveryK(quadratic, {"w": p}, perturb="sam", every=3, reuse=0.0)
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
        step.correct_(0.1)
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
        (lambda: EveryK(quadratic, {"w": W}, perturb="sam", every=0), "every 0 steps; at least 1"),
        (lambda: EveryK(quadratic, {"w": W}, perturb="sam", decoupled=True), "decoupled method cannot be reused"),
        (lambda: EntropySGD(quadratic, {"w": W}, steps=0), "both at least 1"),
        (lambda: EntropySGD(quadratic, {"w": W}, parts=3)(torch.ones(4, 2)), "3 parts do not divide"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
