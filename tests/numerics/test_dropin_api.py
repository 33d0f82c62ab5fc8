"""Every public name of torch.optim.Optimizer, for every drop-in method around every base optimizer of torch."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sam_repro.optim import ASAM, GSAM, SAM, EigenSAM, SharpnessAware

REFUSED = {"LBFGS", "SparseAdam", "Adadelta"}  # with a sentence: test_dropin_input.py
CLASSES = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
BASES = [c for c in CLASSES if c is not torch.optim.Optimizer and c.__name__ not in REFUSED]
METHODS = {
    "sam": partial(SAM, rho=0.1),
    "asam": partial(ASAM, rho=0.3),
    "gsam": partial(GSAM, rho=0.1, alpha=0.3),
    "eigen": partial(EigenSAM, rho=0.1),
    "friendly": partial(SharpnessAware, rho=0.1, perturb="friendly", combine="min_f_h", alpha=0.2),
    "vasso": partial(SharpnessAware, rho=0.1, perturb="vasso", combine="weighted", alpha=0.2),
    "fisher": partial(SharpnessAware, rho=0.1, perturb="fisher", combine="wsam", alpha=0.3),
}
GENERATOR = torch.Generator().manual_seed(11)
X, Y = torch.randn(10, 5, generator=GENERATOR), torch.randint(3, (10,), generator=GENERATOR)


class Net(nn.Module):
    """Matrices only, which every base optimizer takes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.last = nn.Linear(5, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))

    def loss(self):
        return F.cross_entropy(self(X), Y)


def build(method, base, net=None):
    net = net or Net()
    return net, METHODS[method](net.parameters(), base, lr=0.02)


def clean(net, opt):
    opt.zero_grad()
    net.loss().backward()
    opt.first_step()


def robust(net, opt):
    net.loss().backward()
    opt.combine_grads()


def train(net, opt, steps=2):
    for _ in range(steps):
        if isinstance(opt, EigenSAM):
            opt.update_eigenvector(net.loss, steps=2)
        clean(net, opt)
        robust(net, opt)
        opt.step()


def equal(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(p.isfinite().all() for p in a.parameters())


# ---- one function per public name ------------------------------------------------------------------------------------


def check_step(method, base):
    """The base optimizer steps along what is in .grad, as it would alone."""
    net, opt = build(method, base)
    plain = copy.deepcopy(net)
    alone = base(plain.parameters(), lr=0.02)
    for _ in range(3):
        clean(net, opt)
        robust(net, opt)
        for p, q in zip(plain.parameters(), net.parameters(), strict=True):
            p.grad = q.grad.clone()
        opt.step()
        alone.step()
    equal(net, plain)


def check_zero_grad(method, base):
    ends = []
    for to_none in (True, False):
        net, opt = build(method, base)

        def closure(net=net, opt=opt, to_none=to_none):
            opt.zero_grad(set_to_none=to_none)
            loss = net.loss()
            loss.backward()
            return loss

        for _ in range(2):
            opt.step(closure)
            net.loss().backward()  # of something else
            opt.zero_grad(set_to_none=to_none)
        ends.append(net)
    equal(*ends)


def check_state_dict(method, base):
    net, opt = build(method, base)
    train(net, opt)
    file = io.BytesIO()
    torch.save([net.state_dict(), opt.state_dict()], file)
    again, opt_again = build(method, base)
    train(again, opt_again, steps=1)  # its own state is to go
    for thing, state in zip((again, opt_again), torch.load(io.BytesIO(file.getvalue())), strict=True):
        thing.load_state_dict(state)
    train(net, opt)
    train(again, opt_again)
    equal(net, again)


def check_add_param_group(method, base):
    """In the middle of training, and then through a checkpoint; a radius of its own counts."""
    net, opt = build(method, base, net=(frozen := Net()))
    opt = METHODS[method](net.last.parameters(), base, lr=0.02)
    train(net, opt)
    try:
        alone = base(net.last.parameters(), lr=0.02)
        alone.add_param_group({"params": list(frozen.first.parameters())})
        net.loss().backward()
        alone.step()
    except KeyError:
        return  # torch's own Adagrad cannot
    opt.add_param_group({"params": list(net.first.parameters()), "rho": 0.2})
    assert [g["rho"] for g in opt.param_groups] == [METHODS[method].keywords["rho"], 0.2]
    before = net.first.weight.detach().clone()
    train(net, opt)
    assert not torch.equal(before, net.first.weight)
    twin = copy.deepcopy(net)
    other = METHODS[method](twin.last.parameters(), base, lr=0.02)
    other.add_param_group({"params": list(twin.first.parameters())})
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(net, opt)
    train(twin, other)
    equal(net, twin)


def check_step_hooks(method, base):
    net, opt = build(method, base)
    seen = []
    handles = [
        opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o))),
        opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o))),
    ]
    train(net, opt, steps=1)
    assert seen == [("before", opt), ("after", opt)]
    for handle in handles:
        handle.remove()
    train(net, opt, steps=1)
    assert len(seen) == 2


def check_state_hooks(method, base):
    net, opt = build(method, base)
    train(net, opt, steps=1)
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("saves"))
    opt.register_state_dict_post_hook(lambda o, state: seen.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda o, state: seen.append("loads"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["saves", "saved", "loads", "loaded"]
    opt.register_load_state_dict_pre_hook(lambda o, state: state | {"sharpness_aware": {"alpha": 5.0}})
    opt.load_state_dict(opt.state_dict())
    assert opt.alpha == 5.0


def check_copies(method, base):
    """deepcopy and pickle before and within a step. (A copy of a parameter has no .grad, so not with one at hand.)"""
    for clone in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        net, opt = build(method, base)
        torch.optim.lr_scheduler.ConstantLR(opt)  # which replaces opt.step
        train(net, opt)
        for before, after in ((lambda net, opt: None, clean), (clean, robust)):
            before(net, opt)
            twin, other = clone((net, opt))
            after(net, opt)
            after(twin, other)
            equal(net, twin)
            if after is clean:
                for o in (opt, other):
                    o.restore()
        opt.step()
        other.step()
        train(net, opt)
        twin, other = clone((twin, other))
        train(twin, other)
        equal(net, twin)
        assert other.state is other.base.state and other.param_groups is other.base.param_groups


def check_attributes(method, base):
    net, opt = build(method, base)
    assert opt.defaults["lr"] == 0.02 and opt.defaults["rho"] == opt.param_groups[0]["rho"]
    assert type(opt).__name__ in repr(opt) and "rho" in repr(opt)
    train(net, opt)
    assert opt.state is opt.base.state
    opt.state = defaultdict(dict)  # forget the moments
    assert not opt.base.state
    opt.param_groups = [dict(g, lr=0.0, weight_decay=0.0) for g in opt.param_groups]
    assert opt.base.param_groups[0]["lr"] == 0.0


CHECKS = {
    "step": check_step,
    "zero_grad": check_zero_grad,
    "state_dict": check_state_dict,
    "load_state_dict": check_state_dict,
    "add_param_group": check_add_param_group,
    "register_step_pre_hook": check_step_hooks,
    "register_step_post_hook": check_step_hooks,
    "register_state_dict_pre_hook": check_state_hooks,
    "register_state_dict_post_hook": check_state_hooks,
    "register_load_state_dict_pre_hook": check_state_hooks,
    "register_load_state_dict_post_hook": check_state_hooks,
    "__getstate__": check_copies,
    "__setstate__": check_copies,
    "__repr__": check_attributes,
}
ELSEWHERE = {"OptimizerPreHook", "OptimizerPostHook", "profile_hook_step"}  # types, and a decorator of classes


def test_no_public_name_of_torch_is_left_out():
    public = {name for name in vars(torch.optim.Optimizer) if not name.startswith("_")}
    assert public - ELSEWHERE <= CHECKS.keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("check", dict.fromkeys(CHECKS.values()), ids=lambda check: check.__name__)
def test_public_name(check, method):
    """All methods around two bases, and all bases inside one method."""
    for base in BASES if method == "gsam" else (torch.optim.SGD, torch.optim.AdamW):
        check(method, base)
