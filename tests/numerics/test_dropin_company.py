"""The drop-in optimizers beside copies of the model, other optimizers, averages of weights."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from loops import FORMS, batch, net, two_calls
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing import assert_close

from sam_repro.optim import GSAM, SAM, EigenSAM, SharpnessAware
from sam_repro.optim.dropin.forward_replay import ForwardHook

X, Y = batch()


def masks_of(model):
    """The dropout masks of every forward pass from now on."""
    seen = []
    dropout = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    dropout.register_forward_hook(lambda module, args, out: seen.append(out.detach() == 0))
    return seen


def loss_of(model):
    return F.cross_entropy(model(X), Y)


def live_hooks(model):
    hooks = model._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, ForwardHook) and hook.owner() is not None]


# ---- hooks and their owners ------------------------------------------------------------------------------------------


def test_a_hook_goes_with_its_optimizer():
    model = net(dropout=0.5)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    two_calls(opt, lambda: loss_of(model))
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None and not model._forward_pre_hooks


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda m: AveragedModel(m).module])
def test_a_copy_of_a_model_is_watched_by_nobody(copies):
    model = net(dropout=0.5)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    twin = copies(model)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        loss_of(twin).backward()
        plain.step()
    assert not opt.passes.clean and not live_hooks(twin)


def test_a_plain_optimizer_that_trains_first_leaves_nothing_behind():
    """A warm-up without SAM: its forward passes are neither kept nor replayed."""
    model = net(dropout=0.5)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1, model=model)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        plain.zero_grad()
        loss_of(model).backward()
        plain.step()
    assert len(opt.passes.clean) <= 1
    plain.zero_grad()
    masks = masks_of(model)
    two_calls(opt, lambda: loss_of(model))
    assert torch.equal(*masks)


def test_optimizers_that_take_turns_replay_their_own_masks():
    model = net(dropout=0.5)
    opts = [SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1, model=model) for _ in range(2)]
    masks = masks_of(model)
    for turn in range(6):
        two_calls(opts[turn % 2], lambda: loss_of(model))
    assert all(torch.equal(a, b) for a, b in zip(masks[::2], masks[1::2], strict=True))
    assert not torch.equal(masks[0], masks[2])


class Agent(nn.Module):
    """A model that holds its optimizer, as code for reinforcement learning does."""

    def __init__(self):
        super().__init__()
        self.net = net(dropout=0.5)
        self.opt = GSAM(self.parameters(), torch.optim.Adam, lr=0.1, rho=0.1, model=self)

    def forward(self, x):
        return self.net(x)


def test_a_model_that_holds_its_optimizer_is_copied_with_it():
    agent = Agent()
    two_calls(agent.opt, lambda: loss_of(agent))
    twin = copy.deepcopy(agent)
    assert twin.opt.passes.model is twin and twin.opt.param_groups[0]["params"][0] is twin.net[0].weight
    for _ in range(2):
        ends = []
        for each in (agent, twin):
            torch.manual_seed(5)
            two_calls(each.opt, lambda each=each: loss_of(each))
            ends.append(torch.cat([p.detach().reshape(-1) for p in each.parameters()]))
    assert torch.equal(*ends)
    masks = masks_of(twin)
    two_calls(twin.opt, lambda: loss_of(twin))
    assert torch.equal(*masks)


def test_a_whole_model_is_saved_and_loaded_with_its_hook(tmp_path):
    model = net(dropout=0.5)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1, model=model)
    torch.save([model, opt], tmp_path / "all.pt")
    again, opt_again = torch.load(tmp_path / "all.pt", weights_only=False)
    assert opt_again.passes.model is again and len(live_hooks(again)) == 1
    masks = masks_of(again)
    two_calls(opt_again, lambda: loss_of(again))
    assert torch.equal(*masks)


# ---- averages of weights ---------------------------------------------------------------------------------------------


def test_averaged_weights_are_those_of_the_unperturbed_model():
    model = net(norm=True)
    opt = GSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, alpha=0.2, model=model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    schedule = SWALR(opt, swa_lr=0.02, anneal_epochs=2)
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        two_calls(opt, lambda: loss_of(model))
        average.update_parameters(model)
        schedule.step()
        for e, p in zip(expected, model.parameters(), strict=True):
            e.copy_(p.detach() if step == 0 else e + 0.1 * (p.detach() - e))
    assert opt.base.param_groups[0]["lr"] == pytest.approx(0.02)
    for e, p in zip(expected, average.module.parameters(), strict=True):
        assert_close(p.detach(), e)
    update_bn([X], average)
    assert not opt.passes.clean


# ---- weights that are made from others, shared, or frozen ------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_weights_are_perturbed_in_what_they_are_made_from(wrap, form):
    torch.manual_seed(1)
    model = nn.Sequential(wrap(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.4, model=model)
    before, seen = copy.deepcopy(model.state_dict()), []
    model.register_forward_hook(
        lambda module, args, out: seen.append(
            (module[0].weight.detach().clone(), dict((n, p.detach().clone()) for n, p in module.named_parameters()))
        )
    )
    form(opt, lambda: loss_of(model))
    (w, _), (w_p, moved) = seen
    length = sum(float((moved[n] - before[n]).square().sum()) for n in moved) ** 0.5
    assert length == pytest.approx(0.4) and not torch.equal(w, w_p)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_tied_weights_move_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    model[1].weight = model[0].weight
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.25)
    before = model[0].weight.detach().clone()
    model(torch.ones(1, 4, dtype=torch.float64)).square().sum().backward()
    opt.first_step()
    assert float((model[0].weight.detach() - before).norm()) == pytest.approx(0.25)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("perturb", ["sam", "friendly", "vasso", "eigen"])
def test_parameters_are_frozen_and_thawed_in_the_middle(perturb):
    model = net()
    opt = SharpnessAware(model.parameters(), torch.optim.AdamW, lr=0.1, rho=0.2, perturb=perturb)
    for frozen in (False, True, False, True):
        for p in model[0].parameters():
            p.requires_grad_(not frozen)
            p.grad = None
        if perturb == "eigen":
            EigenSAM.update_eigenvector(opt, lambda: loss_of(model), steps=2)
        first, last = (model[i].weight.detach().clone() for i in (0, 3))
        two_calls(opt, lambda: loss_of(model))
        assert torch.equal(first, model[0].weight) == frozen and not torch.equal(last, model[3].weight)
        again = SharpnessAware(model.parameters(), torch.optim.AdamW, lr=0.1, perturb=perturb)
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
        two_calls(again, lambda: loss_of(model))
    assert all(p.isfinite().all() for p in model.parameters())


# ---- other people's ways to save, skip and step ----------------------------------------------------------------------


def test_distributed_checkpoints_allocate_the_state_before_the_first_step():
    """They make a step along zero gradients, which moves nothing and needs no second pass."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = net()
    opt = GSAM(model.parameters(), torch.optim.AdamW, lr=0.1, rho=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    empty = get_optimizer_state_dict(model, opt)
    assert len(empty["state"]) == 4 and all(map(torch.equal, before, model.parameters()))
    two_calls(opt, lambda: loss_of(model))
    saved = get_optimizer_state_dict(model, opt)
    twin = copy.deepcopy(model)
    other = GSAM(twin.parameters(), torch.optim.AdamW, lr=0.7, rho=0.9)
    set_optimizer_state_dict(twin, other, copy.deepcopy(saved))
    assert (other.param_groups[0]["lr"], other.param_groups[0]["rho"]) == (0.1, 0.1)
    two_calls(opt, lambda: loss_of(model))
    two_calls(other, lambda: loss_of(twin))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_closure_that_skips_its_batch():
    model = net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    assert opt.step(lambda: None) is None
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="call backward"):
        opt.step(lambda: loss_of(model))  # and forgets backward()


def test_a_closure_after_both_passes_is_for_hooks_only():
    model = net()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    called = []
    loss_of(model).backward()
    with opt.robust_pass():
        loss_of(model).backward()
    opt.step(lambda: called.append(1))
    assert called == [1] and opt.step_state.phase == "clean"
    opt.zero_grad()
    loss_of(model).backward()
    with opt.robust_pass():
        loss_of(model).backward()
    with pytest.raises(ValueError, match="the gradients are there"):
        opt.step(lambda: loss_of(model))


def test_products_with_the_hessian_need_no_exactness_from_the_caller():
    """The eigenvector of a quadratic in bf16: its products are in fp32, whatever the loop has set."""
    w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.bfloat16))
    opt = EigenSAM([w], torch.optim.SGD, lr=0.1)
    h = torch.tensor([1.0, 3.0])
    opt.update_eigenvector(lambda: (h * w.float() ** 2).sum(), steps=20)
    (v,) = opt.perturb.v
    assert v.dtype == torch.float32
    assert_close(v.abs(), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-6)
