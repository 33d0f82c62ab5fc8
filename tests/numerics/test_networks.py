"""The engine on networks: BatchNorm, dropout, and the plain loop that it must equal."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sam_repro.optim import GradientStep


def network(dropout: float = 0.0) -> nn.Module:
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def objective_of(model: nn.Module):
    return lambda tensors, x, y: F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y)


def batch(n: int = 16):
    return torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))


def engine(model: nn.Module, **method) -> GradientStep:
    return GradientStep(
        objective_of(model), dict(model.named_parameters()), buffers=dict(model.named_buffers()), **method
    )


def plain_gsam(model: nn.Module, x, y, *, rho: float, alpha: float) -> list[torch.Tensor]:
    """GSAM of one group, written the obvious way on a copy of the model."""
    model = copy.deepcopy(model)
    params = list(model.parameters())
    g = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    norm = torch.sqrt(sum((t**2).sum() for t in g))
    with torch.no_grad():
        for p, t in zip(params, g, strict=True):
            p += rho * t / (norm + 1e-12)
    g_p = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    c = sum((a * b).sum() for a, b in zip(g, g_p, strict=True)) / sum((b**2).sum() for b in g_p)
    return [b - alpha * (a - c * b) for a, b in zip(g, g_p, strict=True)]


@pytest.mark.parametrize("m", [4, 8, 16])
def test_gsam_equals_the_plain_loop(m):
    model, (x, y) = network(), batch()
    slow = [plain_gsam(model, a, b, rho=0.3, alpha=0.4) for a, b in zip(x.split(m), y.split(m), strict=True)]
    engine(model, perturb="sam", combine="ascent", alpha=0.4, m=m)(x, y, rho=0.3)
    for p, *gs in zip(model.parameters(), *slow, strict=True):
        assert_close(p.grad, torch.stack(gs).mean(0), rtol=1e-12, atol=1e-14)


def test_q9_running_statistics_see_the_clean_pass_once():
    model, (x, y) = network(), batch()
    expected = copy.deepcopy(model)
    expected(x)
    engine(model, perturb="sam", m=16)(x, y, rho=0.5)
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_q9_running_statistics_of_groups_are_the_mean_over_devices():
    model, (x, y) = network(), batch()
    devices = []
    for part in x.split(4):
        device = copy.deepcopy(model)
        device(part)
        devices.append(device)
    engine(model, perturb="sam", m=4)(x, y, rho=0.5)
    assert_close(model[1].running_var, torch.stack([d[1].running_var for d in devices]).mean(0), rtol=1e-12, atol=0)
    assert model[1].num_batches_tracked == 1


def test_q9_an_exception_in_the_robust_pass_leaves_everything_as_it_was():
    model, (x, y) = network(), batch()
    before, calls = copy.deepcopy(model.state_dict()), []
    inner = objective_of(model)

    def failing(tensors, x, y):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return inner(tensors, x, y)

    step = engine(model, perturb="sam")
    step.objective = failing
    with pytest.raises(RuntimeError):
        step(x, y, rho=0.5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_q10_both_passes_share_the_dropout_mask():
    model, (x, y) = network(dropout=0.5), batch()
    step = engine(model, perturb="sam", m=8, stochastic=True)
    loss, loss_robust, *_ = step(x, y, rho=0.0, seed=3).tolist()
    assert loss == loss_robust
    first = [p.grad.clone() for p in model.parameters()]
    step(x, y, rho=0.0, seed=3)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), first, strict=True))
    step(x, y, rho=0.0, seed=4)
    assert not all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), first, strict=True))
    assert engine(model, perturb="sam", m=8)(x, y, rho=0.0)[0] != loss_robust  # unseeded masks differ


def test_groups_must_divide_the_batch():
    model, (x, y) = network(), batch(10)
    with pytest.raises(ValueError, match="m=4 images do not divide the local batch of 10"):
        engine(model, perturb="sam", m=4)(x, y, rho=0.1)
