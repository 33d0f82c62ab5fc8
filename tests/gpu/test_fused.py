"""The GPU engine against the plain one, on fresh random inputs: every family, strategy and precision."""

from __future__ import annotations

import copy

import pytest
import torch

from sam_repro.config.compose import compose_config
from sam_repro.distributed.ranks import Ranks
from sam_repro.models.build import build_model
from sam_repro.training.method import gradient_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

BATCH, M = 32, 8
SIZE = 96  # 9 tokens: an odd number, so that parts of the flat buffer would not be aligned by themselves
METHODS = ["vanilla", "gsam"]
OTHERS = ["sam", "asam_ascent", "friendly", "vasso", "random", "eigen_sam", "min_f_h"]  # the same passes, not compiled
FAMILIES = [("vit_s32", M), ("vit_s32", BATCH), ("mixer_s32", M), ("mixer_s32", BATCH), ("resnet50", M)]
RAGGED, PARTS = 3 * M, 5  # images per pass: 3 groups and 1; of each group 5 and 3

CASES = [(*family, method, False) for family in (FAMILIES[1], FAMILIES[4]) for method in OTHERS]
CASES += [("vit_s32", chunk, method, False) for chunk in (RAGGED, PARTS) for method in METHODS + OTHERS]
CASES += [("mixer_s32", chunk, "gsam", False) for chunk in (RAGGED, PARTS, 2 * M)]
CASES += [(*family, method, True) for family in FAMILIES for method in METHODS]
CASES += [("vit_s32", chunk, "gsam", True) for chunk in (RAGGED, PARTS)]


def setup(model_name: str, optim: str, chunk: int, compiled: bool = True):
    overrides = [f"model={model_name}", f"optim={optim}", "debug=tiny", f"optim.m={M}", f"train.chunk={chunk}"]
    cfg = compose_config([*overrides, "train.device=cuda", f"train.compile={compiled}"])
    model = build_model(cfg.model, num_classes=10, image_size=SIZE, loss=cfg.recipe.loss).cuda()
    if cfg.model.family == "resnet":
        model = smooth(model).to(memory_format=torch.channels_last)
    with torch.no_grad():  # a zero head would hide most of the gradient
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return cfg, model.train()


def smooth(model):
    """`model` without kinks, where rounding flips a ReLU's zero or a pooling's maximum and equal passes part by 2 %."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.SiLU())
            elif isinstance(child, torch.nn.MaxPool2d):
                setattr(module, name, torch.nn.AvgPool2d(3, 2, 1))
    return model


def batch():
    return (
        torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, device="cuda"),
        torch.randint(0, 10, (BATCH,), device="cuda"),
    )


def engine(cfg, model, device: str, *, bf16: bool):
    """On "cuda" the fused engine; "plain" is the reference engine on the same GPU."""
    where = torch.device("cuda", 0)
    ranks = Ranks(0, 1, 0, 1, where)
    step = gradient_step(cfg, model, ranks, local_batch=BATCH, bf16=bf16)
    step.pre_step = None  # an eigenvector of our own: its estimate is tested elsewhere
    if hasattr(step.perturb, "v"):
        generator = torch.Generator("cuda").manual_seed(5)
        v = [torch.randn(p.shape, generator=generator, device="cuda") for p in step.params]
        length = torch.stack(torch._foreach_norm(v)).norm()
        step.perturb.v = [x / length for x in v]
    if device == "plain":
        from sam_repro.optim import GradientStep

        return GradientStep(
            step.objective, dict(zip(step.names, step.params, strict=True)), buffers=step.buffers,
            perturb=copy.deepcopy(step.perturb) or "none", combine=cfg.optim.combine, alpha=cfg.optim.alpha, m=step.m,
        )  # fmt: skip
    return step


def run(step, data, state, model):
    model.load_state_dict(state)
    metrics = step(*data, rho=0.05).clone()
    return metrics, torch.cat([p.grad.reshape(-1).double() for p in model.parameters()]), model.state_dict()


@pytest.mark.parametrize(("name", "chunk", "optim", "compiled"), CASES)
def test_fp32_equals_the_plain_loop(name, chunk, optim, compiled, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cfg, model = setup(name, optim, chunk, compiled)
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


@pytest.mark.parametrize(("name", "chunk"), FAMILIES)
def test_bf16_is_as_close_to_fp32_as_plain_autocast_is(name, chunk):
    cfg, model = setup(name, "gsam", chunk)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    exact = engine(cfg, model, "plain", bf16=False)
    fused, plain = (engine(cfg, model, d, bf16=True) for d in ("cuda", "plain"))
    data = batch()
    _, truth, _ = run(exact, data, state, model)
    _, ours, _ = run(fused, data, state, model)
    _, theirs, _ = run(plain, data, state, model)
    error, allowed = ((x - truth).norm() / truth.norm() for x in (ours, theirs))
    assert error < 1.5 * allowed + 1e-3, (error.item(), allowed.item())


@pytest.mark.parametrize("chunk", [BATCH, RAGGED, PARTS])
@pytest.mark.parametrize("optim", ["gsam", "asam", "fisher_sam", "eigen_sam"])
def test_a_step_keeps_nothing(optim, chunk):
    """A perturbation computed from the weights must not hang its graph on the adversary: ASAM's did, 120 GB of it."""
    cfg, model = setup("vit_s32", optim, chunk, False)
    step, allocated = engine(cfg, model, "cuda", bf16=True), []
    for _ in range(6):
        step(*batch(), rho=0.05)
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[2] == allocated[-1]


def test_training_learns_and_resumes(tmp_path):
    """train.py's own path on a GPU: two runs that differ in being interrupted agree."""
    from sam_repro.training.main import main

    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    overrides = ["model=vit_s32", "optim=gsam", "debug=tiny", "recipe.steps=60", *folders]
    row = main(compose_config(overrides))
    assert row["status"] == "done" and row["dtype"] == "bf16" and "NVIDIA" in row["hardware"]
    losses = row["curves"]["train"]["loss"]
    assert losses[-1] < losses[0]


def both_attentions(images, tokens, heads, d, ours):
    """Output and gradient of `ours`, a function of packed qkv in bf16, each beside softmax attention in float64."""
    qkv = torch.randn(images, tokens, 3 * heads * d, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(images, tokens, heads * d, device="cuda").bfloat16()
    q, k, v = qkv.double().reshape(images, tokens, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
    y = (torch.softmax(q @ k.mT / d**0.5, -1) @ v).transpose(1, 2).reshape(images, tokens, heads * d)
    (expected,) = torch.autograd.grad(y, qkv, dy.double())
    out = ours(qkv)
    (gradient,) = torch.autograd.grad(out, qkv, dy)
    return (out, y), (gradient, expected)


def near(x, truth) -> bool:
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item() < 5e-3


@pytest.mark.parametrize("tokens", [1, 16, 49, 64])
@pytest.mark.parametrize("d", [16, 64])
def test_short_attention_equals_plain_attention(tokens, d):
    from sam_repro.models.layers.attention import short_attention

    for ours, truth in both_attentions(5, tokens, 3, d, lambda qkv: short_attention(qkv, 3)):
        assert near(ours, truth)


@pytest.mark.parametrize("tokens", [65, 100, 128, 196, 197, 256])
@pytest.mark.parametrize("d", [16, 64])
@pytest.mark.parametrize("compiled", [False, True])
def test_tiled_attention_equals_plain_attention(tokens, d, compiled):
    from sam_repro.models.layers.attention import tiled_attention

    def attention(qkv):
        return tiled_attention(qkv, 3)[0]

    if compiled and tokens != 196:
        pytest.skip("one count of tokens is enough to compile")
    pairs = both_attentions(5, tokens, 3, d, torch.compile(attention) if compiled else attention)
    for part in range(3):  # of the gradient: dq, dk and dv apart, since one could hide another
        c = slice(part * 3 * d, (part + 1) * 3 * d)
        assert near(pairs[1][0][..., c], pairs[1][1][..., c])
    assert near(*pairs[0])


def test_the_layer_takes_the_tiled_kernel():
    from timm.layers.attention import Attention

    from sam_repro.models.layers import attention

    layer = Attention(192, num_heads=3, qkv_bias=True).cuda()
    x = torch.randn(2, 196, 192, device="cuda")
    found = []
    for kind in (Attention, attention.ShortAttention):
        layer.__class__ = kind
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(leaf)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), [leaf, *layer.parameters()])))
    for theirs, ours in zip(*found, strict=True):
        assert ((theirs.double() - ours.double()).norm() / theirs.double().norm()).item() < 2e-2


@pytest.mark.parametrize("size", [(112, 112), (7, 9)])
def test_stem_pool_is_torch_s(size):
    from sam_repro.models.layers.max_pool import StemPool

    x = torch.randn(3, 64, *size, device="cuda").relu().bfloat16().contiguous(memory_format=torch.channels_last)
    found = []
    for layer in (StemPool(3, 2, 1), torch.nn.MaxPool2d(3, 2, 1)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf)
        (gradient,) = torch.autograd.grad(
            y, leaf, torch.ones_like(y) * torch.arange(64, device="cuda").view(1, 64, 1, 1)
        )
        found.append((y, gradient))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=1e-2)  # torch adds in bf16
