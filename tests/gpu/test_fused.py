"""The GPU engine against the plain one, on fresh random inputs: every family, strategy and precision."""

from __future__ import annotations

import pytest
import torch

from sam_repro.config import compose_config
from sam_repro.distributed import Ranks
from sam_repro.models import build_model
from sam_repro.objective import gradient_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

BATCH, M = 32, 8
METHODS = ["vanilla", "sam", "gsam"]
FAMILIES = [("vit_s32", "loop"), ("vit_s32", "batched"), ("mixer_s32", "loop"), ("mixer_s32", "batched")]
FAMILIES += [("resnet50", "loop")]


def setup(model_name: str, optim: str, groups: str):
    overrides = [f"model={model_name}", f"optim={optim}", "debug=tiny", f"optim.m={M}", f"optim.groups={groups}"]
    cfg = compose_config([*overrides, "train.device=cuda"])
    model = build_model(cfg.model, num_classes=10, image_size=64, loss=cfg.recipe.loss).cuda()
    if cfg.model.family == "resnet":
        model = model.to(memory_format=torch.channels_last)
    with torch.no_grad():  # a zero head would hide most of the gradient
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return cfg, model.train()


def batch():
    return (
        torch.randint(0, 256, (BATCH, 3, 64, 64), dtype=torch.uint8, device="cuda"),
        torch.randint(0, 10, (BATCH,), device="cuda"),
    )


def engine(cfg, model, device: str, *, bf16: bool):
    """On "cuda" the fused engine; "plain" is the reference engine on the same GPU."""
    where = torch.device("cuda")
    ranks = Ranks(0, 1, 0, 1, where)
    step = gradient_step(cfg, model, ranks, local_batch=BATCH, bf16=bf16)
    if device == "plain":
        from sam_repro.optim import GradientStep

        return GradientStep(
            step.objective, dict(zip(step.names, step.params, strict=True)), buffers=step.buffers,
            perturb=cfg.optim.perturb, combine=cfg.optim.combine, alpha=cfg.optim.alpha, m=step.m,
        )  # fmt: skip
    return step


def run(step, data, state, model):
    model.load_state_dict(state)
    metrics = step(*data, rho=0.05).clone()
    return metrics, torch.cat([p.grad.reshape(-1).double() for p in model.parameters()]), model.state_dict()


@pytest.mark.parametrize("optim", METHODS)
@pytest.mark.parametrize(("name", "groups"), FAMILIES)
def test_fp32_equals_the_plain_loop(name, groups, optim):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cfg, model = setup(name, optim, groups)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fused, plain = (engine(cfg, model, d, bf16=False) for d in ("cuda", "plain"))
    for _ in range(3):  # the first call captures, the others replay, on other data
        data = batch()
        metrics, gradient, after = run(fused, data, state, model)
        after = {k: v.clone() for k, v in after.items()}
        expected_metrics, expected, expected_after = run(plain, data, state, model)
        assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5
        torch.testing.assert_close(metrics, expected_metrics, rtol=1e-4, atol=1e-5)
        for key, value in expected_after.items():
            torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "groups"), FAMILIES)
def test_bf16_is_as_close_to_fp32_as_plain_autocast_is(name, groups):
    cfg, model = setup(name, "gsam", groups)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    exact = engine(cfg, model, "plain", bf16=False)
    fused, plain = (engine(cfg, model, d, bf16=True) for d in ("cuda", "plain"))
    data = batch()
    _, truth, _ = run(exact, data, state, model)
    _, ours, _ = run(fused, data, state, model)
    _, theirs, _ = run(plain, data, state, model)
    error, allowed = ((x - truth).norm() / truth.norm() for x in (ours, theirs))
    assert error < 1.5 * allowed + 1e-3, (error.item(), allowed.item())


def test_training_learns_and_resumes(tmp_path):
    """train.py's own path on a GPU: two runs that differ in being interrupted agree."""
    from sam_repro.train import main

    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    overrides = ["model=vit_s32", "optim=gsam", "debug=tiny", "recipe.steps=60", *folders]
    row = main(compose_config(overrides))
    assert row["status"] == "done" and row["dtype"] == "bf16" and "NVIDIA" in row["hardware"]
    losses = row["curves"]["train"]["loss"]
    assert losses[-1] < losses[0]
