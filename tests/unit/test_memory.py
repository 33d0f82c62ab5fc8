"""How many images a pass takes: amounts as typed, choices, limits of control groups, a plan for a real model."""

from __future__ import annotations

import gc
import json
import weakref

import psutil
import pytest
import torch

from sam_repro.config.checks import validate
from sam_repro.config.compose import compose_config
from sam_repro.config.memory import MARGIN, Needs, choices, memory_bytes
from sam_repro.config.run_id import config_hash
from sam_repro.distributed.ranks import Ranks
from sam_repro.errors import MEMORY_WORDS, OutOfMemory, UserError, out_of_memory
from sam_repro.models.build import build_model
from sam_repro.optim.memory import WORDS, no_memory
from sam_repro.training.memory import (
    cgroup_limits,
    kept_by_autograd,
    measure,
    memory_file,
    memory_sentence,
    recall,
    remember,
    whole_groups,
)
from sam_repro.training.method import gradient_step

CPU = torch.device("cpu")


@pytest.mark.parametrize(("text", "found"), [("24GB", 24e9), ("1.5 gb", 1.5e9), ("0.5", 4e9), ("1", 8e9), (".25", 2e9)])
def test_amounts_of_memory(text, found):
    assert memory_bytes(text, "train.memory", total=8e9) == found


@pytest.mark.parametrize("text", ["", "24", "0", "0GB", "-1GB", "24MB", "half", "1e3GB", "0.5.5", "nanGB"])
def test_what_is_no_amount(text):
    with pytest.raises(UserError, match=r"train.memory=.*24GB, or a share"):
        memory_bytes(text, "train.memory", total=8e9)
    with pytest.raises(UserError):
        validate(compose_config(["model=vit_s32", "debug=tiny", f"train.memory='{text}'"]))


def test_a_share_needs_a_whole():
    with pytest.raises(UserError, match="give GB, such as 24GB$"):
        memory_bytes("0.5", "--memory")


def test_machine_keys_do_not_rename_a_run():
    plain = compose_config(["model=vit_s32", "debug=tiny"])
    capped = compose_config(["model=vit_s32", "debug=tiny", "train.memory=0.5", "train.chunk=7"])
    assert config_hash(plain) == config_hash(capped)
    with pytest.raises(UserError, match="train.chunk=-1 must be"):
        validate(compose_config(["model=vit_s32", "debug=tiny", "train.chunk=-1"]))


@pytest.mark.parametrize(
    ("batch", "m", "at_once", "divisible", "expected"),
    [
        (4096, 64, True, True, [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]),
        (4096, 64, False, True, [64, 32, 16, 8, 4, 2, 1]),
        (4096, 64, False, False, [64]),
        (640, 64, True, False, [320, 256, 128, 64]),  # not 512, 384 or 192: a smaller last pass for nothing
        (704, 64, True, False, [512, 448, 384, 320, 256, 192, 128, 64]),  # 11 groups
        (4096, 4096, False, True, [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]),
        (4096, 4096, False, False, [4096]),  # BatchNorm's group stays whole
        (521, 521, False, True, [261, 131, 66, 33, 17, 9, 5, 3, 2, 1]),
        (1, 1, True, True, [1]),
    ],
)
def test_choices(batch, m, at_once, divisible, expected):
    assert list(choices(batch, m, at_once=at_once, divisible=divisible)) == expected


def test_needs_grow_with_the_images():
    needs = Needs(fixed=1e9, per_image=1e7, per_group=5e8, sums=7e8, m=64)
    assert needs.at(64) == pytest.approx(2.14e9) and needs.at(128) == pytest.approx(3.28e9)
    assert needs.at(32) == pytest.approx(2.52e9)  # with the sums, and one copy all the same
    assert needs.largest_group(2.14e9) == 64 and needs.largest_group(0) == 0


def test_control_groups_of_either_version(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n4:memory:/slurm/job_7\n2:cpu:/elsewhere\n")
    files = {
        "job/memory.max": "8000",
        "job/memory.current": "3000",
        "job/memory.stat": "anon 1000\ninactive_file 500\n",
        "job/step/memory.max": "max",
        "job/step/memory.current": "3000",
        "memory/slurm/job_7/memory.limit_in_bytes": "6000",
        "memory/slurm/job_7/memory.usage_in_bytes": "1000",
        "memory/slurm/job_7/memory.stat": "cache 3\n",
        "memory/memory.limit_in_bytes": str(2**63 - 4096),  # no limit
        "memory/memory.usage_in_bytes": "1000",
        "memory/memory.stat": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_limits(tmp_path, own) == [(8000, 2500), (6000, 1000)]
    assert cgroup_limits(tmp_path, tmp_path / "none") == []


def step_of(name: str, *overrides: str):
    cfg = compose_config([f"model={name}", "optim=gsam", "debug=tiny", "recipe.batch_size=32", *overrides])
    model = build_model(cfg.model, num_classes=10, image_size=cfg.data.image_size, loss=cfg.recipe.loss)
    return cfg, gradient_step(cfg, model, Ranks(0, 1, 0, 1, CPU), local_batch=32, bf16=False)


def test_a_plan_follows_the_memory():
    size = ("data.image_size=512", "data.eval_resize=512")
    needs = step_of("vit_s32", *size)[1].plan.needs
    assert needs.per_image > 5e6
    chosen = []
    for images in (8, 4, 1):
        own = psutil.Process().memory_info().rss
        cap = (own + 1.3 * needs.at(images) / MARGIN) / 1e9
        chosen.append(step_of("vit_s32", *size, f"train.memory={cap:.6f}GB")[1].chunk)
    assert chosen == sorted(chosen, reverse=True) and chosen[0] >= 4 > chosen[-1]
    _, step = step_of("vit_s32", "train.chunk=3")
    metrics = step(torch.zeros(32, 3, 64, 64, dtype=torch.uint8), torch.arange(32) % 10, rho=0.1)
    assert metrics.isfinite().all()
    assert "passes of 3 images (a part of a group of 8)" in memory_sentence(step, CPU)


def test_a_measurement_leaves_no_trace():
    cfg, step = step_of("resnet50")
    state = torch.get_rng_state()
    before = [b.clone() for b in step.buffers.values()]
    transient, per_image = measure(
        cfg, step.objective, dict(zip(step.names, step.params, strict=True)), step.buffers, CPU
    )
    assert torch.equal(state, torch.get_rng_state()) and transient >= 0 and per_image > 1e5
    assert all(map(torch.equal, before, step.buffers.values()))


def test_a_measurement_frees_what_it_kept():
    weight, kept = torch.ones(4, requires_grad=True), []

    def forward() -> torch.Tensor:
        y = weight.exp()  # whose node keeps its own result
        kept.append(weakref.ref(y))
        return y.sum()

    gc.disable()  # only the last reference frees
    try:
        assert kept_by_autograd(forward, {"weight": weight}) == 16
    finally:
        gc.enable()
    assert kept[0]() is None


def test_batchnorm_sees_its_group():
    with pytest.raises(UserError, match="train.chunk=4 is less than optim.m=8, whose images BatchNorm sees"):
        step_of("resnet50", "train.chunk=4")
    _, step = step_of("resnet50", "train.memory=0.000001GB")  # nothing fits: it is tried all the same
    assert step.chunk == 8
    with (
        pytest.raises(OutOfMemory, match="optim.m=8 images in one pass, which BatchNorm sees .* is about 1"),
        whole_groups(step),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes"), whole_groups(step):
        raise RuntimeError("shapes")


@pytest.mark.parametrize(("override", "chunk"), [("train.chunk=3", 3), ("optim.groups=loop", 8), ("train.chunk=0", 8)])
def test_keys_that_decide(override, chunk):
    assert step_of("vit_s32", override)[1].chunk == chunk


def test_several_groups_at_once_want_a_gpu():
    with pytest.raises(UserError, match="optim.groups=batched: vit_s32 with gsam cannot"):
        step_of("vit_s32", "optim.groups=batched")


def test_what_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert recall("a") == {}
    remember("a", {"per_image": 1.0, "transient": 2.0, "peaks": {"8": 3.0}})
    remember("b", {"per_image": 4.0})
    assert recall("a")["peaks"] == {"8": 3.0} and recall("b") == {"per_image": 4.0} and recall("c") == {}
    for damaged in ("{", "[]", '{"a": 1}', json.dumps({"a": {"per_image": "x"}}), json.dumps({"a": {"peaks": []}})):
        memory_file().write_text(damaged)
        assert recall("a") == {}
    remember("a", {"per_image": 1.0})
    assert recall("a") == {"per_image": 1.0}


def test_what_halves_a_pass_is_also_told_in_one_sentence():
    """Two lists, since optim/ imports nothing and errors.py no torch: what one knows the other must know."""
    assert set(WORDS) <= set(MEMORY_WORDS)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), *map(RuntimeError, WORDS)):
        assert no_memory(error) and out_of_memory(error) is not None


def test_on_a_cpu_the_expected_memory_is_of_the_whole_process():
    """The peak is: it has torch and the weights in it. So the plan counts them too, and what a run may use."""
    _, step = step_of("vit_s32")
    own = psutil.Process().memory_info().rss
    assert 0.5 * own < step.plan.before <= step.plan.expected < 2 * own
    assert f"expected about {step.plan.expected / 1e9:.1f}, of " in memory_sentence(step, CPU)
