"""A batch in chunks: equal to the batch at once, for every method, any number of ranks, and where memory lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from problems import Peers
from torch import nn
from torch.testing import assert_close

from sam_repro.optim import PERTURBATIONS, EntropySGD, GradientStep, LookSAMStep, SyncedStep, build_perturbation
from sam_repro.optim.memory import fitting, halving, no_memory

ROOT = Path(__file__).resolve().parents[2]
BATCH, M, STEPS = 16, 4, 3
METHODS = [*PERTURBATIONS, "vanilla", "gsam", "wsam", "cr", "looksam", "synced", "entropy_sgd"]


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


def build(method: str, model: nn.Module, objective=None, **options) -> GradientStep:
    def plain(tensors, x, y):
        return F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y)

    objective, params = objective or plain, dict(model.named_parameters())
    if method == "entropy_sgd":
        return EntropySGD(objective, params, steps=3, parts=2, noise=0.1, **{"m": 2} | options)
    options = {"m": M, "alpha": 0.3} | options
    if method in PERTURBATIONS:
        perturb = build_perturbation(method)
        if method == "eigen":
            generator = torch.Generator().manual_seed(2)
            perturb.v = [torch.randn(p.shape, generator=generator).double() / 8 for p in model.parameters()]
        return GradientStep(objective, params, perturb=perturb, **options)
    if method == "vanilla":
        return GradientStep(objective, params, **options)
    options |= {"combine": {"wsam": "wsam", "cr": "cr"}.get(method, "ascent"), "perturb": "sam"}
    if method == "looksam":
        return LookSAMStep(objective, params, every=2, **options)
    if method == "synced":
        return SyncedStep(objective, params, **options)
    return GradientStep(objective, params, beta=0.2, decoupled=method == "wsam", **options)


def train(method: str, model: nn.Module | None = None, rank: int = 0, world: int = 1, **options) -> list[torch.Tensor]:
    """Weights and metrics after a few steps."""
    model = model or network()
    step, base = build(method, model, rank=rank, world=world, **options), torch.optim.SGD(model.parameters(), lr=0.1)
    generator, size = torch.Generator().manual_seed(1), BATCH // world
    for seed in range(STEPS):
        x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (BATCH,), generator=generator)
        share = slice(rank * size, (rank + 1) * size)
        metrics = step(x[share], y[share], rho=0.1, seed=seed).clone()
        base.step()
        step.apply_decoupled_(0.1)
    return [metrics, *(p.detach() for p in model.parameters())]


def equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [8, 3, 2, 1])
@pytest.mark.parametrize("method", METHODS)
def test_chunks_are_the_batch(method, chunk):
    equal(train(method, chunk=chunk), train(method))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_ranks_in_chunks_is_the_batch(method, world):
    models = [network() for _ in range(world)]  # not in threads, which share torch's generator

    def work(rank: int, all_reduce) -> list[torch.Tensor]:
        return train(method, models[rank], rank, world, chunk=3, all_reduce=all_reduce)

    for ours in Peers(world).run(work):
        equal(ours, train(method))


def test_the_whole_batch_as_one_group():
    equal(train("gsam", m=0, chunk=5), train("gsam", m=0))


def test_dropout_masks_are_of_the_micro_batch_and_shared_by_both_passes():
    model = network(dropout=0.5)
    step = build("sam", model, chunk=3, stochastic=True)
    x, y = torch.randn(BATCH, 6, dtype=torch.float64), torch.randint(3, (BATCH,))
    loss, loss_robust, *_ = step(x, y, rho=0.0, seed=3).tolist()
    assert loss == loss_robust
    found = [train("gsam", network(dropout=0.5), stochastic=True, chunk=chunk) for chunk in (3, 3, M, BATCH)]
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[2][1], found[3][1])
    assert not torch.equal(found[0][1], found[2][1])


def test_running_statistics_want_their_group():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    step = build("sam", model, buffers=dict(model.named_buffers()), chunk=3)
    with pytest.raises(ValueError, match="all m=4 images of a group in one pass, not 3"):
        step(torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,)))


def scarce(model: nn.Module, most: int, sizes: list[int]):
    """An objective with memory for so many images, that notes how many it got."""

    def objective(tensors, x, y):
        sizes.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return F.cross_entropy(torch.func.functional_call(model, tensors, (x,)), y)

    return objective


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_memory_goes_on_with_smaller_chunks(method, capsys):
    found, sizes = [], []
    for most in (1, BATCH):
        model = network()
        step = build(method, model, scarce(model, most, sizes))
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
            metrics = step(x, torch.arange(BATCH) % 3, rho=0.1, seed=seed)
        found.append([metrics.clone(), *(p.grad.clone() for p in model.parameters())])
    equal(*found)
    assert "takes 1 image at once: there is no memory for 2" in capsys.readouterr().err


def test_memory_for_no_image_is_an_error():
    model = network()
    with pytest.raises(torch.OutOfMemoryError):
        build("sam", model, scarce(model, 0, []))(torch.randn(BATCH, 6).double(), torch.zeros(BATCH).long(), rho=0.1)


def test_what_lacks_memory():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ):
        assert no_memory(error)
    assert not no_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        halving(lambda n: (_ for _ in ()).throw(RuntimeError("shapes")), 8)


def test_batches_are_cut_until_the_first_fits():
    batches = [(torch.arange(10), torch.arange(10)), (torch.arange(3), torch.arange(3))]

    def attempt(batch):
        if len(batch[0]) > 3:
            raise torch.OutOfMemoryError("out of memory")

    assert [len(x) for x, _ in fitting(batches, attempt)] == [2, 2, 2, 2, 2, 2, 1]
    assert fitting(batches, lambda batch: None) is batches and fitting([], attempt) == []


@pytest.mark.parametrize("methods", ["gsam", pytest.param("", marks=pytest.mark.slow)])
def test_the_fused_engine_by_the_interpreter(methods):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fused_interpreted.py"), *methods.split()],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == (len(methods.split()) or 9)
