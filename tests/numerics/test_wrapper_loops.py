"""The drop-in optimizers in a real loop: saving, accumulation, clipping, scaling, running statistics, dropout."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from loops import FORMS, batch, closure_form, net, problem, two_calls
from problems import quadratic, vector
from torch import nn
from torch.testing import assert_close

from sam_repro.optim.dropin.optimizers import GSAM, SAM, SharpnessAware
from sam_repro.optim.perturbations import sam

H = vector(1, 10)[None]


# ---- state ---------------------------------------------------------------------------------------------------------


class Memory:
    """A perturbation with state: SAM's along a running mean of gradients."""

    def __init__(self):
        self.mean = None

    def __call__(self, params, grads, rho):
        old = grads if self.mean is None else self.mean
        self.mean = [0.5 * m + 0.5 * g for m, g in zip(old, grads, strict=True)]
        return sam(params, self.mean, rho)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


@pytest.mark.parametrize("perturb", ["sam", Memory])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_q14_state_round_trip_is_bitwise(base, perturb, tmp_path):
    kwargs = {"lr": 0.01, "rho": 0.1, "alpha": 0.3} | ({"momentum": 0.9} if base is torch.optim.SGD else {})
    x, y = batch()

    def build(model):
        return GSAM(model.parameters(), base, perturb=perturb, **kwargs)

    def train(model, opt, scheduler, steps):
        for _ in range(steps):
            two_calls(opt, lambda: F.cross_entropy(model(x), y))
            scheduler.step()

    def decay(opt):
        return torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.9)

    model = net()
    opt = build(model)
    scheduler = decay(opt)
    train(model, opt, scheduler, 3)
    torch.save([model.state_dict(), opt.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
    train(model, opt, scheduler, 3)

    again = net()
    opt_again = build(again)
    scheduler_again = decay(opt_again)
    opt_again.param_groups[0]["rho"], opt_again.alpha = 9.0, 9.0
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for thing, state in zip((again, opt_again, scheduler_again), loaded, strict=True):
        thing.load_state_dict(state)
    assert len(opt_again.state) == 4 and opt_again.state is opt_again.base.state
    train(again, opt_again, scheduler_again, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert opt_again.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**6)


def test_a_plain_optimizers_state_loads():
    model = net()
    x, y = batch()
    base = torch.optim.AdamW(model.parameters(), lr=0.02)
    F.cross_entropy(model(x), y).backward()
    base.step()
    opt = SAM(model.parameters(), torch.optim.AdamW, lr=0.5, rho=0.3)
    opt.load_state_dict(base.state_dict())
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["rho"], len(opt.state)) == (0.02, 0.3, 4)


@pytest.mark.parametrize("form", FORMS)
def test_schedulers_drive_the_base_optimizer(form, recwarn):
    model, opt, loss = problem(lambda m: SAM(m.parameters(), torch.optim.SGD, lr=1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t)
    for _ in range(2):
        form(opt, loss)
        scheduler.step()
    assert opt.base.param_groups[0]["lr"] == 0.25
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


# ---- accumulation, clipping, scaling -------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [SAM, GSAM])
def test_accumulation_equals_the_large_batch(build):
    x, y = batch()
    whole, parts = net(), net()
    parts.load_state_dict(whole.state_dict())
    large, small = (build(m.parameters(), torch.optim.SGD, lr=0.1, rho=0.2) for m in (whole, parts))
    two_calls(large, lambda: F.cross_entropy(whole(x), y))

    def accumulate():
        for a, b in zip(x.split(4), y.split(4), strict=True):
            (F.cross_entropy(parts(a), b) / 3).backward()

    accumulate()
    with small.robust_pass():
        accumulate()
    small.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_clipping_the_direction():
    w = nn.Parameter(vector(1, 1))
    opt = GSAM([w], torch.optim.SGD, lr=1.0, rho=0.1, alpha=0.5)
    quadratic({"w": w}, H).backward()
    opt.first_step()
    quadratic({"w": w}, H).backward()
    opt.combine_grads()
    norm = nn.utils.clip_grad_norm_([w], 1.0)
    assert float(norm) == pytest.approx(math.hypot(0.9695666636, 10.9987466403))
    opt.step()
    assert float((w.detach() - vector(1, 1)).norm()) == pytest.approx(1.0, abs=1e-6)


FRIENDLY = functools.partial(SharpnessAware, perturb="friendly")  # whose memory must not take an overflow


def scaled_step(scaler, opt, loss, poison_clean=1.0, poison_robust=1.0):
    opt.zero_grad()
    scaler.scale(loss() * poison_clean).backward()
    scaler.unscale_(opt.base)
    with opt.robust_pass():
        scaler.scale(loss() * poison_robust).backward()
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()


def test_gradscaler_changes_nothing_without_overflow():
    model, opt, loss = problem(lambda m: GSAM(m.parameters(), torch.optim.AdamW, lr=0.01, rho=0.1))
    x, y = batch()
    other = copy.deepcopy(model)
    plain = GSAM(other.parameters(), torch.optim.AdamW, lr=0.01, rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for _ in range(4):
        scaled_step(scaler, opt, lambda: F.cross_entropy(model(x), y))
        two_calls(plain, lambda: F.cross_entropy(other(x), y))
    assert scaler.get_scale() == 2.0**12
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("where", ["poison_clean", "poison_robust"])
@pytest.mark.parametrize("build", [SAM, GSAM, FRIENDLY])
def test_gradscaler_skips_a_step_with_an_overflow_in_either_pass(where, build):
    model, opt, loss = problem(lambda m: build(m.parameters(), torch.optim.AdamW, lr=0.01, rho=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled_step(scaler, opt, loss)
    before = copy.deepcopy(model.state_dict())
    scaled_step(scaler, opt, loss, **{where: float("inf")})
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert scaler.get_scale() == 2.0**9
    scaled_step(scaler, opt, loss)  # and training goes on
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.isfinite(p).all() for p in model.parameters())


# ---- what a model carries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_q9_running_statistics_see_the_clean_pass_only(form, momentum):
    model = net(norm=True)
    model[1].momentum = momentum
    expected = copy.deepcopy(model)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.5, model=model)
    for _ in range(2):
        x, y = batch()
        expected(x)
        form(opt, lambda x=x, y=y: F.cross_entropy(model(x), y))
        for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
            assert torch.equal(ours, theirs)
    assert model[1].momentum == momentum and model[1].num_batches_tracked == 2


@pytest.mark.parametrize("form", FORMS)
def test_q10_both_passes_draw_the_same_masks(form):
    """With shared masks and rho = 0 the second gradient is the first; the generator goes on as in one pass."""
    model = net(dropout=0.5)
    plain = copy.deepcopy(model)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, model=model)
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    x, y = batch()
    torch.manual_seed(5)
    for _ in range(3):
        form(opt, lambda: F.cross_entropy(model(x), y))
    after = torch.rand(1)
    torch.manual_seed(5)
    for _ in range(3):
        base.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        base.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert torch.equal(after, torch.rand(1))


def late_zero_grad(opt, loss):
    """Gradients are cleared between forward and backward: as common as the other order."""
    value = loss()
    opt.zero_grad()
    value.backward()
    opt.first_step()
    loss().backward()
    opt.second_step()


@pytest.mark.parametrize(("form", "with_model"), [(late_zero_grad, True), (closure_form, False)])
def test_q10_masks_where_gradients_are_cleared_late_and_in_closures_without_a_model(form, with_model):
    model = net(dropout=0.5)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, model=model if with_model else None)
    x, y = batch()
    losses = []
    for _ in range(2):
        form(opt, lambda: losses.append(F.cross_entropy(model(x), y)) or losses[-1])
    assert losses[0] == losses[1] != losses[2] == losses[3]


def test_q10_masks_of_accumulated_passes_are_replayed_in_order_and_evaluation_does_not_count():
    model = net(dropout=0.5)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, model=model)
    x, y = batch()

    def accumulate():
        losses = []
        for a, b in zip(x.split(4), y.split(4), strict=True):
            losses.append(F.cross_entropy(model(a), b))
            losses[-1].backward()
            torch.rand(3)  # as a loader would
        with torch.no_grad():
            model.eval()(x)
            model.train()
        return torch.stack(losses)

    clean = accumulate()
    with opt.robust_pass():
        assert torch.equal(accumulate(), clean)
    opt.step()


def test_an_exception_in_the_robust_pass_leaves_everything_as_it_was():
    model = net(norm=True)
    opt = GSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, model=model)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"), opt.robust_pass():
        model(x)
        raise RuntimeError("out of memory")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    two_calls(opt, lambda: F.cross_entropy(model(x), y))  # and the next step works
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
