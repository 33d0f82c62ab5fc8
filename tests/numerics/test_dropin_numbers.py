"""The drop-in optimizers on numbers that are not fp32, real, whole or minimised: right, or refused in one sentence."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from sam_repro.optim import ASAM, GSAM, PERTURBATIONS, SAM, EigenSAM, SharpnessAware
from sam_repro.optim.combinations import COMBINATIONS
from sam_repro.optim.perturbations import inner, squared_norm

NARROW = [torch.float16, torch.bfloat16]
DETERMINISTIC = [name for name in PERTURBATIONS if name != "random"]


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("perturb", PERTURBATIONS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3, 2e4])
def test_the_perturbation_is_that_of_wide_numbers(perturb, dtype, size):
    """Whatever the size of the gradient: weights at zero, so that adding eps rounds it to its own precision."""
    weights = [torch.zeros(40), torch.zeros(5, 8)]
    grads = [(size * numbers(*w.shape, seed=i) / 9).to(dtype) for i, w in enumerate(weights)]
    moved = []
    for kind in (dtype, torch.float64):
        params = [nn.Parameter(w.to(kind)) for w in weights]
        opt = SharpnessAware(params, torch.optim.SGD, lr=0.1, rho=0.05, perturb=perturb)
        if perturb == "eigen":
            opt.perturb.v = [torch.full_like(w, 80**-0.5) for w in weights]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(kind)
        torch.manual_seed(0)
        opt.first_step()
        moved.append(torch.cat([p.detach().double().reshape(-1) for p in params]))
    if perturb == "random":
        assert float(moved[0].norm()) == pytest.approx(0.05, rel=0.01)
    else:
        assert_close(moved[0], moved[1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_the_direction_is_that_of_wide_numbers(combine, dtype, size):
    g, g_p = ((size * numbers(64, seed=s)).to(dtype) for s in (1, 2))
    directions = []
    for kind in (dtype, torch.float64):
        w = nn.Parameter(torch.zeros(64, dtype=kind))
        opt = SharpnessAware([w], torch.optim.SGD, lr=0.1, combine=combine, alpha=0.4)
        w.grad = g.to(kind)
        opt.first_step()
        w.grad = g_p.to(kind)
        opt.combine_grads()
        assert w.grad.dtype == kind
        directions.append(w.grad.double())
    assert_close(directions[0], directions[1], rtol=2e-2, atol=1e-2 * size)


@pytest.mark.parametrize("perturb", ["friendly", "vasso"])
def test_a_running_mean_of_half_precision_gradients_is_kept_in_fp32(perturb):
    """In bf16 a mean of weight 0.1 stops short of the gradient that it is fed forever."""
    w = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    opt = SharpnessAware([w], torch.optim.SGD, lr=0.0, perturb=perturb)
    for value in [1.0] + [2.0] * 60:
        w.grad = torch.full_like(w, value)
        opt.first_step()
        opt.restore()
    (m,) = opt.perturb.m
    assert m.dtype == torch.float32
    assert_close(m, torch.full((8,), 2.0), rtol=5e-3, atol=0)


def test_layers_of_several_dtypes_share_one_norm():
    params = [nn.Parameter(torch.zeros(1, dtype=d)) for d in (torch.float16, torch.float32, torch.float64)]
    opt = GSAM(params, torch.optim.SGD, lr=1.0, rho=1.0, alpha=0.5)
    for p, g in zip(params, (2.0, 3.0, 6.0), strict=True):
        p.grad = torch.full_like(p, g)
    opt.first_step()
    assert_close(
        torch.cat([p.detach().double() for p in params]), torch.tensor([2, 3, 6]).double() / 7, rtol=1e-3, atol=0
    )
    for p in params:
        p.grad = torch.ones_like(p)
    opt.second_step()
    assert [p.dtype for p in params] == [torch.float16, torch.float32, torch.float64]


def test_inner_products_of_narrow_and_complex_numbers():
    big = torch.full((4096,), 200.0, dtype=torch.float16)
    assert float(squared_norm([big])) == float(inner([big], [big])) == 4096 * 200.0**2
    a, b = numbers(5, dtype=torch.complex128), numbers(5, seed=1, dtype=torch.complex128)
    assert_close(inner([a], [b]), (a.conj() * b).real.sum())
    assert_close(squared_norm([a.conj()]), a.abs().square().sum())


# ---- complex numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", DETERMINISTIC)
def test_a_complex_parameter_is_a_pair_of_real_ones(perturb):
    target, start = numbers(6, 2, seed=3), numbers(6, 2, seed=4)
    ends = []
    for as_complex in (True, False):
        w = nn.Parameter(torch.view_as_complex(start.clone()) if as_complex else start.clone())
        opt = SharpnessAware(
            [w], torch.optim.SGD, lr=0.05, momentum=0.9, rho=0.1, perturb=perturb, combine="ascent", alpha=0.3
        )

        def loss(w=w, as_complex=as_complex):
            pair = torch.view_as_real(w) if as_complex else w
            return ((pair - target) ** 4).sum() + pair.prod(1).square().sum()

        for _ in range(3):
            if perturb == "eigen":
                EigenSAM.update_eigenvector(opt, loss, steps=3)
            loss().backward()
            opt.first_step()
            loss().backward()
            opt.second_step(zero_grad=True)
        ends.append(torch.view_as_real(w.detach()) if as_complex else w.detach())
    assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)


# ---- what is maximised -----------------------------------------------------------------------------------------------

MAXIMISERS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.NAdam]


@pytest.mark.parametrize("base", MAXIMISERS)
@pytest.mark.parametrize("perturb", DETERMINISTIC)
def test_maximising_f_is_minimising_its_negative(perturb, base):
    start, h, ends = numbers(7), numbers(7, seed=1).abs(), []
    for sign in (1, -1):
        w = nn.Parameter(start.clone())
        opt = SharpnessAware(
            [w], functools.partial(base, weight_decay=0), lr=0.03, rho=0.2, perturb=perturb, combine="ascent",
            alpha=0.3, maximize=sign < 0,
        )  # fmt: skip
        for _ in range(4):
            for half in (opt.first_step, opt.second_step):
                opt.zero_grad()
                (sign * (h * w**4).sum()).backward()
                half()
        ends.append(w.detach())
    assert torch.equal(*ends)


def test_a_saddle_point_problem_has_a_worst_case_on_either_side():
    """One group is minimised and one maximised: each looks where it is worse for itself."""
    x, y = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    opt = SAM([{"params": [x]}, {"params": [y], "maximize": True}], torch.optim.SGD, lr=0.1, rho=0.5)
    (3 * x + 4 * y).sum().backward()
    opt.first_step()
    assert (x.item(), y.item()) == (pytest.approx(1 + 0.5 * 0.6), pytest.approx(1 - 0.5 * 0.8))


# ---- refused ---------------------------------------------------------------------------------------------------------


def parameter():
    return nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("base", "kwargs", "sentence"),
    [
        (torch.optim.LBFGS, {}, "LBFGS evaluates a closure many times"),
        (torch.optim.SparseAdam, {}, "SparseAdam takes sparse gradients"),
        (torch.optim.Adadelta, {}, "Adadelta has a rho of its own"),
        (SAM, {"base_optimizer": torch.optim.SGD}, "SAM is sharpness-aware itself"),
        (lambda params: "no optimizer", {}, "not str"),
        ("SGD", {}, "a class such as torch.optim.SGD, not 'SGD'"),
        (torch.optim.SGD([parameter()], lr=0.1), {}, r"its class is wanted.*SAM\(params, torch.optim.SGD, lr=0.1\)"),
        (torch.optim.SGD, {"lr": 0.1, "differentiable": True}, "differentiable=True"),
    ],
)
def test_what_cannot_be_a_base_optimizer(base, kwargs, sentence):
    if base is SAM:
        base, kwargs = functools.partial(SAM, **kwargs), {}
    with pytest.raises(ValueError, match=sentence) as error:
        ASAM([parameter()], base, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("attribute", ["ds_id", "_fsdp_flattened", "_is_flat_param"])
def test_sharded_parameters_are_refused_now_and_later(attribute):
    shard = parameter()
    setattr(shard, attribute, True)
    with pytest.raises(ValueError, match="sharded"):
        SAM([shard], torch.optim.SGD, lr=0.1)
    opt = SAM([parameter()], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="sharded"):
        opt.add_param_group({"params": [shard]})
    assert len(opt.param_groups) == 1


def test_fully_sharded_modules_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = nn.Linear(3, 2)
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"sharded \(DTensor"):
            GSAM(net.parameters(), torch.optim.AdamW)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_base_options_that_change_speed_change_nothing_else(options):
    ends = []
    for kwargs in ({}, options):
        w = nn.Parameter(numbers(20).float())
        opt = GSAM([w], torch.optim.AdamW, lr=0.1, rho=0.1, alpha=0.2, **kwargs)
        for _ in range(3):
            for half in (opt.first_step, opt.second_step):
                opt.zero_grad()
                (w**4).sum().backward()
                half()
        ends.append(w.detach())
    assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


def test_a_sparse_gradient_is_refused_in_every_form():
    embedding = nn.Embedding(4, 2, sparse=True)

    def closure():
        loss = embedding(torch.tensor([1])).sum()
        loss.backward()
        return loss

    opt = SAM(embedding.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="dense gradients"):
        opt.step(closure)
    with pytest.raises(ValueError, match="dense gradients"):
        opt.first_step()
