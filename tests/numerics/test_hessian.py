"""Products with the Hessian against dense Hessians and finite differences, in one process and over ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hessians import MODES, batches_of, data, dense_hessian, network, objective_of
from problems import vector
from torch.testing import assert_close

from sam_repro.curvature import Hessian, dominant

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep", [None, True, False])
@pytest.mark.parametrize(("size", "images"), [(23, 23), (5, 13), (1, 3)])
def test_q13_product_equals_dense_hessian_with_a_ragged_last_batch(mode, keep, size, images):
    model, (x, y) = network(), (t[:images] for t in data())
    hessian = Hessian(objective_of(model), dict(model.named_parameters()), batches_of(x, y, size), mode=mode, keep=keep)
    slow = dense_hessian(model, x, y)
    for _ in range(2):  # the second product uses kept graphs
        v = torch.randn(hessian.size, dtype=torch.float64)
        assert_close(hessian(v), slow @ v, rtol=1e-11, atol=1e-13)
    assert_close(hessian.dense(), slow, rtol=1e-11, atol=1e-13)
    assert hessian.products == 2 + hessian.size


@pytest.mark.parametrize(("dtype", "tol", "step"), [(torch.float64, 1e-7, 1e-5), (torch.float32, 3e-3, 1e-2)])
def test_q13_product_equals_finite_differences(dtype, tol, step):
    model, (x, y) = network().to(dtype), data()
    hessian = Hessian(objective_of(model), dict(model.named_parameters()), [(x.to(dtype), y)])
    v = torch.randn(hessian.size, dtype=dtype)
    v /= v.norm()
    before = [p.detach().clone() for p in model.parameters()]
    gradients = []
    for sign in (1, -1):
        moved = [p + sign * step * d for p, d in zip(before, hessian.unflatten(v), strict=True)]
        shifted = Hessian(hessian.objective, dict(zip(hessian.params, moved, strict=True)), hessian.batches)
        gradients.append(shifted.gradient()[1])
    difference = (gradients[0] - gradients[1]) / (2 * step)
    assert (hessian(v) - difference).norm() / difference.norm() < tol
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without code generation: what is checked is that the traced function is the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("mode", MODES)
def test_compiled_products_equal_dense_hessian_at_two_points(mode, traced):
    model, (x, y) = network(), data(16)
    params, batches = dict(model.named_parameters()), batches_of(x, y, 8)
    hessian = Hessian(objective_of(model), params, batches, mode=mode, compiled=True, keep=True)
    for _ in range(2):
        v = torch.randn(hessian.size, dtype=torch.float64)
        for _ in range(2):  # the second goes through the kept graph
            assert_close(hessian(v), dense_hessian(model, x, y) @ v, rtol=1e-11, atol=1e-13)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        hessian.renew(params, batches)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiler_that_fails_costs_a_warning(mode, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no code for this machine")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    model, (x, y) = network(), data(16)
    hessian = Hessian(objective_of(model), dict(model.named_parameters()), [(x, y)], mode=mode, compiled=True)
    v = torch.randn(hessian.size, dtype=torch.float64)
    with pytest.warns(UserWarning, match="uncompiled.*no code for this machine"):
        product = hessian(v)
    assert_close(product, dense_hessian(model, x, y) @ v, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_q13_ranks_sum_to_the_single_process(mode):
    """Rank 0 has 16 images, rank 1 has 7, in batches of 5: one all-reduce of sums and counts."""
    model, (x, y) = network(), data()
    params, objective = dict(model.named_parameters()), objective_of(model)
    shards = [batches_of(x[:16], y[:16], 5), batches_of(x[16:], y[16:], 5)]
    whole = Hessian(objective, params, [(x, y)])
    v = torch.randn(whole.size, dtype=torch.float64)

    def reduced(call):
        """What `call` gives when an all-reduce adds the other rank's part."""
        parts = []
        call(Hessian(objective, params, shards[1], mode=mode, all_reduce=lambda t: parts.append(t.clone())))
        return call(Hessian(objective, params, shards[0], mode=mode, all_reduce=lambda t: t.add_(parts[-1])))

    assert_close(reduced(lambda h: h(v)), whole(v), rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(reduced(lambda h: h.gradient()), whole.gradient(), strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert_close(reduced(lambda h: h.loss()), whole.loss(), rtol=1e-12, atol=1e-14)


def test_a_rank_without_images_adds_nothing():
    model, (x, y) = network(), data()
    params, objective = dict(model.named_parameters()), objective_of(model)
    whole = Hessian(objective, params, [(x, y)])
    v = torch.randn(whole.size, dtype=torch.float64)
    sums = torch.cat([whole(v) * 23, vector(23)])
    empty = Hessian(objective, params, [], all_reduce=lambda t: t.add_(sums))
    assert_close(empty(v), whole(v))


def test_gradient_and_loss():
    model, (x, y) = network(), data()
    hessian = Hessian(objective_of(model), dict(model.named_parameters()), batches_of(x, y, 5))
    loss = F.cross_entropy(model(x), y)
    g = torch.autograd.grad(loss, list(model.parameters()))
    f, gradient = hessian.gradient()
    assert_close(f, loss.detach())
    assert_close(gradient, torch.cat([t.reshape(-1) for t in g]))
    assert_close(hessian.loss(), loss.detach())
    assert_close(hessian.flatten(list(g)), gradient)
    assert_close(hessian.flatten(dict(zip(hessian.params, g, strict=True))), gradient)


@pytest.mark.parametrize("mode", MODES)
def test_unused_and_linear_parameters_have_zero_curvature(mode):
    def objective(tensors, x):
        return (tensors["linear"] * x).sum(1).mean() + 0 * (tensors["w"] ** 2).sum()

    params = {"w": torch.ones(2), "linear": torch.ones(3), "unused": torch.ones(1)}
    hessian = Hessian(objective, params, [(torch.ones(4, 3),)], mode=mode)
    assert torch.equal(hessian(torch.ones(6)), torch.zeros(6))
    pair = dominant(hessian)
    assert pair.value == 0 and float(pair.residuals[0]) == 0
    constant = Hessian(lambda t, x: (t["linear"] * x).sum(1).mean(), params, [(torch.ones(4, 3),)], mode=mode)
    assert torch.equal(constant(torch.ones(6)), torch.zeros(6))
