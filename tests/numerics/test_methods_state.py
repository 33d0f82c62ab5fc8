"""What methods remember: resuming is bitwise, ranks agree; the base optimizers."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from problems import DATA, Peers, network, quadratic, vector
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from sam_repro.optim import (
    COMBINATIONS,
    PERTURBATIONS,
    EntropySGD,
    GradientStep,
    LookSAMStep,
    PowerIteration,
    SharpnessAware,
    SyncedStep,
    build_base,
    build_perturbation,
)

METHODS = ["friendly", "vasso", "eigen", "random", "looksam", "friendly_looksam", "wsam", "cr", "entropy_sgd"]
METHODS += ["global_sam", "global_friendly"]


def build(method: str, model: nn.Module, **ranks) -> GradientStep:
    """A stateful engine on the network, of groups of 4."""

    def objective(tensors, x, y):
        return F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y)

    def in_eval_mode(tensors, x, y):
        model.eval()
        try:
            return objective(tensors, x, y)
        finally:
            model.train()

    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    peers = {k: v for k, v in ranks.items() if k != "stochastic"}
    options = {"buffers": buffers, "m": 4, "stochastic": True} | ranks
    if method == "entropy_sgd":
        return EntropySGD(objective, params, steps=3, parts=2, noise=0.1, **options | {"m": 2})
    if method in ("wsam", "cr"):
        return GradientStep(
            objective, params, perturb="sam", combine=method, alpha=0.3, decoupled=method == "wsam", **options
        )
    if method == "eigen":
        options["perturb"] = perturb = build_perturbation("eigen")
        options["pre_step"] = PowerIteration(perturb, in_eval_mode, params, buffers=buffers, every=2, m=4, **peers)
    if method.endswith("looksam"):
        perturb = "friendly" if "friendly" in method else "sam"
        return LookSAMStep(
            objective, params, perturb=perturb, combine="ascent", alpha=0.3, every=3, reuse=0.7, **options
        )
    if method.startswith("global_"):
        return SyncedStep(objective, params, perturb=method[7:], combine="ascent", alpha=0.3, **options)
    return GradientStep(objective, params, **({"perturb": method} | options))


def train(method: str, model: nn.Module, *, steps: int, interrupt: int | None = None, **ranks) -> list[Tensor]:
    """The weights after `steps`; at `interrupt` everything is rebuilt from a file's bytes."""
    step, base = build(method, model, **ranks), torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    x, y = DATA
    size = len(x) // ranks.get("world", 1)
    share = slice(ranks.get("rank", 0) * size, (ranks.get("rank", 0) + 1) * size)
    for t in range(steps):
        if t == interrupt:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "base": base.state_dict(), "method": step.state_dict()}, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            model = network()
            model.load_state_dict(state["model"])
            step, base = build(method, model, **ranks), torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
            base.load_state_dict(state["base"])
            step.load_state_dict(state["method"])
        step(x.roll(t, 0)[share], y.roll(t, 0)[share], rho=0.1, seed=t)
        base.step()
        step.apply_decoupled_(0.01)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_q14_resuming_is_bitwise(method):
    undisturbed = train(method, network(), steps=7)
    for interrupt in (1, 4, 5):
        for ours, theirs in zip(undisturbed, train(method, network(), steps=7, interrupt=interrupt), strict=True):
            assert torch.equal(ours, theirs)


# Threads share the default generator, where dropout would race.
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_one(method):
    models = [network(dropout=0.0) for _ in range(2)]

    def work(rank: int, all_reduce) -> list[Tensor]:
        ranks = {"all_reduce": all_reduce, "rank": rank, "world": 2, "stochastic": False}
        return train(method, models[rank], steps=5, **ranks)

    # The switch that products with the Hessian turn is the process's: two threads would leave it as either found it.
    with sdpa_kernel(SDPBackend.MATH):
        found = Peers(2).run(work)
    alone = train(method, network(dropout=0.0), steps=5, stochastic=False)
    for one, other, both in zip(found[0], found[1], alone, strict=True):
        assert torch.equal(one, other)
        assert_close(one, both, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("combine", sorted(COMBINATIONS))
@pytest.mark.parametrize("name", ["sam", "asam", "friendly", "eigen"])
def test_one_perturbation_for_all_groups_is_one_group_of_the_whole_batch(name, combine):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    found = []
    for kind, m in ((SyncedStep, 4), (GradientStep, 0)):

        def objective(tensors, x, y):
            return F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y)

        perturb = build_perturbation(name)
        if name == "eigen":
            torch.manual_seed(3)
            perturb.v = [torch.randn_like(p) for p in model.parameters()]
        step = kind(objective, dict(model.named_parameters()), perturb=perturb, combine=combine, alpha=0.3, m=m)
        for seed in range(2):  # the second step remembers the first
            metrics = step(*DATA, rho=0.2, seed=seed)
        found.append([metrics.clone(), *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_rounded_for_the_reduction():
    model, seen = network(dropout=0.0), []

    def all_reduce(flat: Tensor) -> None:
        seen.append((flat.dtype, len(flat)))

    exact, rounded = (
        build("cr", model, all_reduce=all_reduce, reduce_dtype=dtype, stochastic=False)
        for dtype in (None, torch.bfloat16)
    )
    metrics = exact(*DATA, rho=0.1).clone()
    gradient, size = exact.gradient.clone(), len(exact.gradient)
    assert_close(rounded(*DATA, rho=0.1), metrics, rtol=0, atol=0)
    assert torch.equal(rounded.gradient, gradient.bfloat16().double()) and not torch.equal(rounded.gradient, gradient)
    assert seen == [(torch.float64, size + 6), (torch.bfloat16, size), (torch.float64, 6)]


# ---- base optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adabelief", "NAdam", "RMSprop", "Adagrad", "RAdam"])
def test_base_optimizers_by_name(name):
    p = nn.Parameter(torch.ones(2, 2))
    base = build_base(name, [{"params": [p], "weight_decay": 0.1}], lr=0.1)
    p.grad = torch.ones(2, 2)
    base.step()
    assert base.param_groups[0]["lr"] == 0.1 and (p < 1).all()
    build_base(name, [{"params": [p], "weight_decay": 0.1}], lr=0.1).load_state_dict(base.state_dict())


def test_adabelief_is_the_authors_formula():
    """w <- w - lr wd w - lr m^ / (sqrt(s^) + eps), s a running mean of (g - m)^2 + eps; eps named."""
    for eps in (1e-8, 1e-16):
        p, w = nn.Parameter(vector(2, -3)), vector(2, -3)
        base = build_base("adabelief", [{"params": [p], "weight_decay": 0.3}], lr=0.01, eps=eps)
        m, s = torch.zeros(2).double(), torch.zeros(2).double()
        for t in range(1, 4):
            g = vector(0.5 * t, -0.1)
            p.grad = g.clone()
            base.step()
            m = 0.9 * m + 0.1 * g
            s = 0.999 * s + 0.001 * (g - m) ** 2 + eps
            w = w * (1 - 0.01 * 0.3)
            w = w - 0.01 * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + eps)
            assert_close(p.detach(), w, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["adamww", "LBFGS", "SparseAdam", "Optimizer"])
def test_unfit_base_optimizers_are_one_sentence(name):
    with pytest.raises(ValueError, match=f"unknown base optimizer '{name}': sgd, adam, adamw, adabelief, or a class"):
        build_base(name, [{"params": [nn.Parameter(torch.ones(1))]}], lr=0.1)


# ---- the drop-in optimizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", list(COMBINATIONS))
@pytest.mark.parametrize("perturb", [name for name in PERTURBATIONS if name != "random"])
def test_the_drop_in_optimizer_takes_every_name(perturb, combine):
    """Two steps of the drop-in optimizer and of the engine, one group: the same weights, the same memory."""
    h = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    ours, theirs = (vector(1, 1).requires_grad_() for _ in range(2))
    step = GradientStep(quadratic, {"w": ours}, perturb=perturb, combine=combine, alpha=0.3)
    base = torch.optim.SGD([ours], lr=0.01)
    drop_in = SharpnessAware([theirs], torch.optim.SGD, lr=0.01, rho=0.1, perturb=perturb, combine=combine, alpha=0.3)
    for engine in (step, drop_in):
        if perturb == "eigen":
            engine.perturb.v = [vector(0.6, 0.8)]
    for _ in range(2):
        step(h, rho=0.1)
        base.step()
        quadratic({"w": theirs}, h).backward()
        with drop_in.robust_pass():
            quadratic({"w": theirs}, h).backward()
        drop_in.step()
        drop_in.zero_grad()
    assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=0)
    assert (
        drop_in.state_dict()["sharpness_aware"].get("perturb", {}).keys()
        == getattr(step.perturb, "state_dict", dict)().keys()
    )
