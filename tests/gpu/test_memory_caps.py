"""A GPU that is made as small as others are: passes are chosen for it, and halved where the choice was too large."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sam_repro.config.compose import compose_config
from sam_repro.distributed.ranks import Ranks
from sam_repro.models.build import build_model
from sam_repro.training.memory import peak_bytes
from sam_repro.training.method import gradient_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

BATCH, M, SIZE = 256, 64, 384
MODELS = ["vit_b32", "vit_b16", "vit_s32", "vit_s16", "mixer_b32", "mixer_b16", "mixer_s32", "mixer_s16", "mixer_s8"]
MODELS += ["resnet50", "resnet101", "resnet152"]


@pytest.fixture(autouse=True)
def _whole_card() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def step_of(optim: str, *overrides: str, name: str = "vit_s32"):
    keys = [f"model={name}", f"optim={optim}", "debug=tiny", "model.tiny=false", f"optim.m={M}"]
    keys += [f"data.image_size={SIZE}"]
    cfg = compose_config([*keys, "train.compile=false", "train.device=cuda", f"data.eval_resize={SIZE}", *overrides])
    torch.manual_seed(0)
    model = build_model(cfg.model, num_classes=10, image_size=SIZE, loss=cfg.recipe.loss).cuda().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model, gradient_step(cfg, model, Ranks(0, 1, 0, 1, torch.device("cuda", 0)), local_batch=BATCH, bf16=True)


def gradient(step, model, calls: int = 2) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(3)
    for _ in range(calls):
        x = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, device="cuda", generator=generator)
        step(x, torch.arange(BATCH, device="cuda") % 10, rho=0.05)
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def leave(room: float) -> None:
    """Let torch take no more than so many bytes beside what is in use."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)


@pytest.mark.parametrize("optim", ["vanilla", "gsam", "asam", "looksam", "entropy_sgd"])
def test_a_pass_without_memory_is_halved(optim, capsys):
    """Out of memory in the first passes, in a capture, or later: the same gradient, in smaller passes."""
    options = ("optim.inner_steps=2",) if optim == "entropy_sgd" else ()
    needs = step_of(optim, *options)[1].plan.needs
    model, step = step_of(optim, f"train.chunk={BATCH}", *options)
    expected, largest = gradient(step, model).clone(), step.chunk
    del step
    model, step = step_of(optim, f"train.chunk={BATCH}", *options)
    leave(needs.at(int(0.15 * largest)) + 2e8 - torch.cuda.memory_allocated())
    found = gradient(step, model)
    halved = getattr(step, "walker", step).chunk
    assert halved < largest and f"takes {halved} images at once" in capsys.readouterr().err
    assert ((found - expected).norm() / expected.norm()).item() < 2e-2  # bf16


@pytest.mark.parametrize("optim", ["vanilla", "gsam", "asam", "eigen_sam"])
def test_the_choice_keeps_to_its_memory(optim, capsys):
    chosen = []
    for room in (16e9, 4e9, 2e9):
        leave(room)
        model, step = step_of(optim)
        gradient(step, model)
        assert peak_bytes(torch.device("cuda", 0)) > 0 and torch.cuda.memory_reserved() <= step.plan.budget
        chosen.append(step.chunk)
        del model, step
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert chosen == sorted(chosen, reverse=True) and chosen[-1] < chosen[0]
    assert "no memory" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("cap", [16, 24, 40, 80])
@pytest.mark.parametrize("optim", ["vanilla", "sam", "gsam"])
@pytest.mark.parametrize("name", MODELS)
def test_the_recipe_s_batch_runs_on_any_card(name, optim, cap, tmp_path):
    from sam_repro.training.main import main

    if cap * 1e9 > torch.cuda.get_device_properties(0).total_memory:
        pytest.skip(f"the card has less than {cap} GB")
    keys = [f"model={name}", f"optim={optim}", "debug=profile", "recipe.steps=2", f"train.memory={cap}GB"]
    row = main(compose_config([*keys, f"log.runs_dir={tmp_path}", f"log.ledger_dir={tmp_path}/ledger"]))
    assert row["status"] == "done" and row["step"] == 2 and row["peak_bytes"] <= cap * 1e9
