"""The drop-in optimizers where parameters are on a GPU, on several devices, or moved after construction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sam_repro.optim import EigenSAM, SharpnessAware
from sam_repro.optim.perturbations import PERTURBATIONS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICES = [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:1")]


class Split(nn.Module):
    """Two layers on two devices."""

    def __init__(self, first, last):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 6).double(), nn.Linear(6, 3).double()
        self.first.to(first)
        self.last.to(last)

    def loss(self, x):
        hidden = torch.tanh(self.first(x.to(self.first.weight.device)))
        return self.last(hidden.to(self.last.weight.device)).square().sum()


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("perturb", [name for name in PERTURBATIONS if name != "random"])
def test_layers_on_several_devices_share_one_norm(perturb, devices):
    if torch.cuda.device_count() < 2 and "cuda:1" in devices:
        pytest.skip("needs two GPUs")
    x = torch.ones(4, 5, dtype=torch.float64)
    ends = []
    for places in (devices, ("cpu", "cpu")):
        net = Split(*places)
        opt = SharpnessAware(
            net.parameters(),
            torch.optim.SGD,
            lr=0.01,
            momentum=0.9,
            rho=0.1,
            perturb=perturb,
            combine="ascent",
            alpha=0.3,
        )
        for _ in range(3):
            if perturb == "eigen":
                EigenSAM.update_eigenvector(opt, lambda net=net: net.loss(x), steps=3)
            net.loss(x).backward()
            opt.first_step()
            net.loss(x).backward()
            opt.second_step(zero_grad=True)
        ends.append(torch.cat([p.detach().cpu().reshape(-1) for p in net.parameters()]))
    assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("perturb", ["friendly", "vasso", "eigen"])
def test_what_a_method_remembers_follows_its_parameters(perturb):
    net, x = nn.Linear(5, 3), torch.ones(4, 5)
    opt = SharpnessAware(net.parameters(), torch.optim.SGD, lr=0.01, rho=0.1, perturb=perturb)

    def step():
        device = net.weight.device
        if perturb == "eigen":
            EigenSAM.update_eigenvector(opt, lambda: net(x.to(device)).pow(4).sum(), steps=2)
        net(x.to(device)).pow(4).sum().backward()
        opt.first_step()
        net(x.to(device)).pow(4).sum().backward()
        opt.second_step(zero_grad=True)

    for device in ("cpu", "cuda", "cpu"):
        net.to(device)
        step()
    again = copy.deepcopy(net).cuda()
    other = SharpnessAware(again.parameters(), torch.optim.SGD, lr=0.01, perturb=perturb)
    other.load_state_dict(opt.state_dict())
    memory = other.perturb.state_dict()
    assert all(t.is_cuda for tensors in memory.values() for t in tensors)


def test_masks_are_drawn_again_on_a_gpu_that_is_not_the_current_one():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    net = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).to(device)
    opt = SharpnessAware(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.1, model=net)
    masks = []
    net[1].register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))
    x = torch.ones(8, 64, device=device)
    for _ in range(2):
        net(x).sum().backward()
        opt.first_step()
        net(x).sum().backward()
        opt.second_step(zero_grad=True)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {"foreach": False}])
def test_base_options_of_a_gpu(options):
    ends = []
    for kwargs in ({}, options):
        torch.manual_seed(0)
        net = nn.Linear(5, 3).cuda()
        opt = SharpnessAware(
            net.parameters(), torch.optim.AdamW, lr=0.01, rho=0.1, combine="ascent", alpha=0.3, **kwargs
        )
        for _ in range(3):
            for half in (opt.first_step, opt.second_step):
                opt.zero_grad()
                net(torch.ones(4, 5, device="cuda")).pow(4).sum().backward()
                half()
        ends.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
