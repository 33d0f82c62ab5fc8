"""The drop-in optimizers: golden values, the engine they must equal, ranks, properties, bad input."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import FORMS, batch, closure_form, net, problem, two_calls
from problems import gradient_of, quadratic, vector
from torch import nn
from torch.testing import assert_close

from sam_repro.optim.dropin.optimizers import GSAM, SAM, EigenSAM, SharpnessAware, mean_over_ranks
from sam_repro.optim.perturbations import sam

H = vector(1, 10)[None]


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_q1_golden(form):
    for opt_class, kwargs, expected in (
        (SAM, {}, vector(0.9899004963, 0.8900496281)),
        (GSAM, {"alpha": 0.5}, vector(0.9903043334, 0.8900125336)),
    ):
        w = nn.Parameter(vector(1, 1))
        opt = opt_class([w], torch.optim.SGD, lr=0.01, rho=0.1, **kwargs)
        form(opt, lambda w=w: quadratic({"w": w}, H))
        assert_close(w.detach(), expected, rtol=0, atol=5e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", [{"combine": "robust"}, {"combine": "ascent", "alpha": 0.7}])
def test_equals_the_engine(form, method):
    w0, hessians = torch.randn(7, dtype=torch.float64), torch.rand(4, 7, dtype=torch.float64)
    w = nn.Parameter(w0.clone())
    opt = SharpnessAware([w], torch.optim.SGD, lr=1.0, rho=0.2, **method)
    form(opt, lambda: quadratic({"w": w}, hessians))
    expected = w0 - gradient_of(w0, hessians, rho=0.2, perturb="sam", **method)
    assert_close(w.detach(), expected, rtol=1e-14, atol=1e-15)


def test_the_closure_returns_the_clean_loss():
    w = nn.Parameter(vector(1, 1))
    assert closure_form(SAM([w], torch.optim.SGD, lr=0.01, rho=0.1), lambda: quadratic({"w": w}, H)).item() == 5.5


@pytest.mark.parametrize("form", FORMS)
def test_q5_rho_zero_is_the_base_optimizer_bitwise(form):
    model, opt, loss = problem(lambda m: SAM(m.parameters(), torch.optim.AdamW, lr=0.01, rho=0.0))
    plain = copy.deepcopy(model)
    x, y = batch()
    base = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for _ in range(3):
        form(opt, lambda: F.cross_entropy(model(x), y))
        base.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        base.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_q5_alpha_zero_is_sam_bitwise():
    a, gsam, loss_a = problem(lambda m: GSAM(m.parameters(), torch.optim.SGD, lr=0.1, rho=0.1, alpha=0.0))
    b = copy.deepcopy(a)
    b_opt = SAM(b.parameters(), torch.optim.SGD, lr=0.1, rho=0.1)
    x, y = batch()
    two_calls(gsam, lambda: F.cross_entropy(a(x), y))
    two_calls(b_opt, lambda: F.cross_entropy(b(x), y))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q6_weights_are_restored_bitwise_in_place(dtype):
    w = nn.Parameter(torch.randn(1000, dtype=dtype))
    before, where = w.detach().clone(), w.data_ptr()
    opt = GSAM([w], torch.optim.SGD, lr=0.0, rho=0.5)
    for _ in range(3):
        two_calls(opt, lambda: (w.float() ** 4).sum())
    assert torch.equal(w, before) and w.data_ptr() == where


def test_groups_have_their_own_radius():
    """One norm over both groups; each moves by its own rho."""
    a, b = nn.Parameter(vector(1.0)), nn.Parameter(vector(1.0))
    opt = SAM([{"params": [a], "rho": 0.1}, {"params": [b]}], torch.optim.SGD, lr=0.01, rho=0.3)
    assert [g["rho"] for g in opt.param_groups] == [0.1, 0.3]
    (3 * a + 4 * b).sum().backward()
    opt.first_step()
    assert_close(a.detach(), vector(1 + 0.1 * 3 / 5))
    assert_close(b.detach(), vector(1 + 0.3 * 4 / 5))
    opt.restore()
    opt.restore()
    assert a.item() == b.item() == 1


def test_a_group_added_later():
    a, b = nn.Parameter(vector(1.0)), nn.Parameter(vector(2.0))
    opt = SAM([a], torch.optim.SGD, lr=0.1, rho=0.2)
    opt.add_param_group({"params": [b], "lr": 0.5})
    assert opt.param_groups is opt.base.param_groups and opt.param_groups[1]["rho"] == 0.2
    two_calls(opt, lambda: (a + b).sum())
    assert (a.item(), b.item()) == (pytest.approx(0.9), pytest.approx(1.5))


def test_frozen_and_unreached_parameters():
    model = net()
    model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = GSAM([*model.parameters(), unused], torch.optim.AdamW, lr=0.1, rho=0.1, weight_decay=0.5)
    frozen = model[0].weight.clone()
    x, y = batch()
    two_calls(opt, lambda: F.cross_entropy(model(x), y))
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(unused, torch.ones(2)) and unused.grad is None  # no gradient: no decay either, as in torch


def test_a_parameter_that_only_one_pass_reaches():
    a, b = nn.Parameter(vector(1.0)), nn.Parameter(vector(1.0))
    opt = GSAM([a, b], torch.optim.SGD, lr=0.1, rho=0.1, alpha=0.5)
    (a + b).sum().backward()
    opt.first_step()
    a.sum().backward()
    opt.combine_grads()
    # g = (1, 1), g_p = (1, 0): g_perp = (0, 1)
    assert_close(torch.cat([a.grad, b.grad]), vector(1, -0.5))


def test_zero_gradient():
    w = nn.Parameter(vector(0, 0))
    opt = GSAM([w], torch.optim.SGD, lr=0.1, rho=0.1)
    two_calls(opt, lambda: quadratic({"w": w}, H))
    assert torch.equal(w, vector(0, 0))


# ---- Eigen-SAM's vector --------------------------------------------------------------------------------------------


class Eigen:
    """A stand-in with the attribute that update_eigenvector sets."""

    v = None
    __call__ = staticmethod(sam)


def test_update_eigenvector():
    w = nn.Parameter(vector(1, 1))
    opt = EigenSAM([w], torch.optim.SGD, lr=0.1, perturb=Eigen())
    for _ in range(4):
        opt.update_eigenvector(lambda: quadratic({"w": w}, H), steps=5)
    assert_close(opt.perturb.v[0].abs(), vector(0, 1), rtol=0, atol=1e-12)
    assert w.grad is None
    with pytest.raises(ValueError, match="at least 1 step"):
        opt.update_eigenvector(lambda: quadratic({"w": w}, H), steps=0)


def test_an_estimate_leaves_no_trace_in_the_model():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    opt = EigenSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, model=model)
    x, y = batch()
    masks = []
    model[2].register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))
    before = [b.clone() for b in model.buffers()]
    opt.update_eigenvector(lambda: F.cross_entropy(model(x), y), steps=2)
    assert all(torch.equal(b, old) for b, old in zip(model.buffers(), before, strict=True))
    two_calls(opt, lambda: F.cross_entropy(model(x), y))
    assert torch.equal(masks[1], masks[2])


def test_a_skipped_batch_is_forgotten():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).double()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1, model=model)
    x, y = batch()
    masks = []
    model[0].register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))
    model(x)
    opt.restore()
    two_calls(opt, lambda: F.cross_entropy(model(x), y))
    assert torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("name", ["eigen", "friendly", "vasso"])
def test_a_state_goes_where_the_parameters_are(name):
    w = nn.Parameter(vector(1, 1))
    opt = SharpnessAware([w], torch.optim.SGD, lr=0.1, rho=0.1, perturb=name)
    if name == "eigen":
        opt.perturb.v = [vector(1, 0)]
    two_calls(opt, lambda: quadratic({"w": w}, H))
    elsewhere = SharpnessAware([nn.Parameter(w.detach().to("meta"))], torch.optim.SGD, lr=0.1, rho=0.1, perturb=name)
    elsewhere.load_state_dict(opt.state_dict())
    assert [t.device.type for ts in elsewhere.perturb.state_dict().values() for t in ts] == ["meta"]


# ---- ranks ---------------------------------------------------------------------------------------------------------

SHARDS = [vector(1, 1)[None], vector(4, 0.25)[None]]  # Q3: the order of operations shows


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(vector(1, 1))

    def forward(self, hessians):
        return quadratic({"w": self.w}, hessians)


def rank_main(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}

    def run(name, method, *, clean_local, robust_local, average=None):
        model = nn.parallel.DistributedDataParallel(Quadratic())
        opt = SharpnessAware(model.parameters(), torch.optim.SGD, lr=1.0, rho=0.1, average=average, **method)
        for local, step in ((clean_local, opt.first_step), (robust_local, opt.second_step)):
            if local:
                with model.no_sync():  # the forward pass too: DDP decides there
                    model(SHARDS[rank]).backward()
            else:
                model(SHARDS[rank]).backward()
            if step == opt.first_step and clean_local:
                results["local gradient"] = model.module.w.grad.tolist()
            step()
        results[name] = (vector(1, 1) - model.module.w.detach()).tolist()

    gsam = {"combine": "ascent", "alpha": 0.5}
    run("sam synced", {}, clean_local=False, robust_local=False)
    run("sam per rank", {}, clean_local=True, robust_local=False)
    run("gsam synced", gsam, clean_local=False, robust_local=False)
    run("gsam per rank", gsam, clean_local=True, robust_local=True, average=mean_over_ranks)
    gc.collect()  # a DDP model that outlives the group can abort its process
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


def test_q3_q15_ddp_with_and_without_perturbation_per_rank():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = mp.spawn(rank_main, (port, queue), nprocs=2, join=False)
    results = dict(queue.get() for _ in range(2))
    while not processes.join():
        pass
    expected = {
        "sam synced": (2.7425356250, 0.6401584766),
        "sam per rank": (2.7349658548, 0.6611350676),
        "gsam synced": (2.7471236915, 0.6205025067),
        "gsam per rank": (2.7352689199, 0.6558351252),
    }
    for rank in range(2):
        assert results[rank].pop("local gradient") == SHARDS[rank][0].tolist()  # Q15
        for name, values in expected.items():
            assert results[rank][name] == pytest.approx(values, abs=1e-9), name


# ---- properties ------------------------------------------------------------------------------------------------------

GROUPS = st.lists(
    st.tuples(st.floats(0, 1), st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=3)),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(GROUPS, st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_groups_with_their_own_radius_unreached_parameters_and_single_numbers(groups, dtype, zero):
    """eps_i = rho_group g_i / ||g||, one norm over all; without a gradient nothing moves; weights come back bitwise."""
    torch.manual_seed(0)
    made = [(rho, [(nn.Parameter(torch.randn((2,) * n, dtype=dtype)), r) for n, r in ps]) for rho, ps in groups]
    reached = [p for _, ps in made for p, r in ps if r]
    opt = SAM([{"params": [p for p, _ in ps], "rho": rho} for rho, ps in made], torch.optim.SGD, lr=0.1)
    if not reached:
        with pytest.raises(ValueError, match="found no gradient"):
            opt.first_step()
        return
    before = {p: p.detach().clone() for _, ps in made for p, _ in ps}
    for p in reached:
        p.grad = torch.zeros_like(p) if zero else torch.randn_like(p)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in reached))
    grads = {p: p.grad.clone() for p in reached}
    opt.first_step()
    for rho, ps in made:
        for p, r in ps:
            eps = rho * grads[p] / norm if r and norm else torch.zeros_like(p)
            assert_close(p.detach() - before[p], eps, rtol=1e-4, atol=1e-6)
    for p in reached:
        p.grad = torch.ones_like(p)
    opt.combine_grads()
    assert all(torch.equal(p, w) for p, w in before.items())
    opt.step()
    for p, w in before.items():
        assert torch.equal(p, w - 0.1) if p in grads else torch.equal(p, w)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"rho": -0.1}, "rho=-0.1 must be"),
        ({"rho": math.nan}, "rho=nan must be"),
        ({"alpha": math.inf}, "alpha=inf must be"),
        ({"perturb": "sideways"}, "unknown perturbation 'sideways'"),
        ({"combine": "sideways"}, "unknown combination 'sideways'"),
    ],
)
def test_bad_arguments(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        SharpnessAware([nn.Parameter(vector(1.0))], torch.optim.SGD, lr=0.1, **kwargs)


def test_calls_out_of_order():
    w = nn.Parameter(vector(1, 1))
    opt = SAM([w], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="call backward"):
        opt.first_step()
    with pytest.raises(ValueError, match="no robust gradient"):
        opt.second_step()
    with pytest.raises(ValueError, match="follows first_step"):
        opt.step()
    quadratic({"w": w}, H).backward()
    with pytest.raises(ValueError, match="runs the clean pass itself"):  # davda54's closure form, or accumulation
        opt.step(lambda: quadratic({"w": w}, H))
    opt.first_step()
    with pytest.raises(ValueError, match="perturbed already"):
        opt.first_step()
    opt.restore()
    assert torch.equal(w, vector(1, 1))
    with pytest.raises(ValueError, match="sparse"):
        embedding = nn.Embedding(4, 2, sparse=True)
        sparse = SAM(embedding.parameters(), torch.optim.SGD, lr=0.1)
        embedding(torch.tensor([1])).sum().backward()
        sparse.first_step()
