"""`read_by` in the schema against the truth: a key is declared read where another value gives another result."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from sam_repro.config.checks import holds, read_by, refuse_unread, validate
from sam_repro.config.compose import compose_config
from sam_repro.config.files import choices
from sam_repro.config.schema import Config, OptimConfig, RecipeConfig
from sam_repro.data.images.crop import render, training_geometry
from sam_repro.distributed.ranks import Ranks
from sam_repro.errors import UserError
from sam_repro.models.objective import loss_of
from sam_repro.optim import PowerIteration, build_base
from sam_repro.optim.base_optimizer import UNFIT
from sam_repro.paper.ledger_join import unique_runs
from sam_repro.paper.spec import load_table, table_names
from sam_repro.training.job import lr_schedule_of, rho_of
from sam_repro.training.method import gradient_step

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, BATCH = 7, 8
ELSEWHERE = {"name": "in tables", "groups": "on a GPU, where it changes no result", "eigen_tf32": "on a GPU"}


class Net(nn.Module):
    """Small, with what methods tell apart: parameters called weight and others, batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x.flatten(1)))))


def trained(cfg: Config) -> torch.Tensor:
    """The weights after a few steps of the configured method."""
    torch.manual_seed(0)
    model = Net()
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    step = gradient_step(cfg, model, ranks, local_batch=BATCH, bf16=False, steps_per_epoch=3)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lr_at = lr_schedule_of(cfg, STEPS)
    batches = [(torch.randint(255, (BATCH, 3, 2, 2), dtype=torch.uint8), torch.randint(3, (BATCH,))) for _ in range(3)]
    if isinstance(step.pre_step, PowerIteration) and cfg.optim.eigen_images == "fixed":
        step.pre_step.fix(*batches[0])
    for i in range(STEPS):
        base.param_groups[0]["lr"] = lr_at(i)
        step(*batches[i % 3], rho=rho_of(cfg, lr_at(i)), seed=i)
        base.step()
        step.apply_decoupled_(lr_at(i))
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@cache
def method(name: str) -> tuple[Config, torch.Tensor]:
    """A method in small, and what it comes to."""
    words = ["model=vit_s32", "data.image_size=2", "data.num_classes=3", "recipe.loss=softmax", "recipe.lr=0.1"]
    cfg = compose_config([*words, "recipe.warmup_steps=2", f"optim={name}"])
    o = cfg.optim
    o.rho_max = o.rho_max or 0.1  # so that a perturbation would do something to vanilla
    o.m, o.rho_min, o.k, o.p, o.inner_steps, o.every = 4, 0.0, 2, 2, 3, min(o.every, 3)
    validate(cfg)
    return cfg, trained(cfg)


def others(field: dataclasses.Field, value):
    """Other values that the field may have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value, value + 1]
    if isinstance(value, float) or value is None:
        return [0.3, 0.0] if value != 0.3 else [0.6]
    return [word for word in field.metadata["within"] if word != value]


def variant(cfg: Config, key: str, value) -> Config | None:
    """The configuration with another value of optim.<key>; None where that is refused, and so changes nothing."""
    other = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, **{key: value}))
    try:
        validate(other)
    except UserError:
        return None
    return other


@pytest.mark.parametrize("name", choices("optim"))
def test_a_method_reads_what_is_declared(name):
    cfg, before = method(name)
    for field in dataclasses.fields(OptimConfig):
        key = f"optim.{field.name}"
        if field.name in ELSEWHERE or (field.name == "rho_min" and cfg.optim.rho_schedule == "constant"):
            continue  # a constant radius sets both its ends
        declared = read_by(key) == () or any(holds(cfg, condition) for condition in read_by(key))
        known = list(filter(None, (variant(cfg, field.name, v) for v in others(field, getattr(cfg.optim, field.name)))))
        changes = any(not torch.equal(trained(other), before) for other in known)
        assert not known or changes == declared, f"{key} with optim={name}: declared {declared}, changes {changes}"


BASES = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name not in UNFIT]


@pytest.mark.parametrize("base", ["sgd", "adam", "adamw", "adabelief", *BASES])
def test_a_base_optimizer_reads_what_is_declared(base):
    def weights(**options) -> torch.Tensor:
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(4, 3))
        optimizer = build_base(base, [{"params": [w], "weight_decay": 0.0}], lr=0.1, **options)
        for _ in range(8):
            w.grad = torch.sin(w.detach())
            optimizer.step()
        return w.detach()

    cfg = compose_config([])
    cfg.recipe.base = base
    for key, other in {"momentum": 0.5, "nesterov": True, "betas": (0.5, 0.6), "eps": 0.3}.items():
        declared = any(holds(cfg, condition) for condition in read_by(f"recipe.{key}"))
        assert declared == (not torch.equal(weights(), weights(**{key: other}))), (base, key)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("method", ["gsam", "sam", "vanilla"])
def test_a_schedule_reads_the_last_learning_rate(schedule, method):
    def both(ratio: float) -> list[tuple[float, float]]:
        cfg.recipe.lr_min_ratio = ratio
        lr = lr_schedule_of(cfg, 9)
        return [(lr(i), rho_of(cfg, lr(i))) for i in range(9)]

    cfg = compose_config([f"recipe.schedule={schedule}", f"optim={method}", "recipe.warmup_steps=3"])
    declared = any(holds(cfg, condition) for condition in read_by("recipe.lr_min_ratio"))
    assert declared == (both(0.1) != both(0.5))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_a_loss_reads_label_smoothing(loss):
    cfg, z, y = compose_config([f"recipe.loss={loss}"]), torch.tensor([[1.0, 2.0]]), torch.tensor([0])
    before = loss_of(cfg)(z, y)
    cfg.recipe.label_smoothing = 0.5
    declared = any(holds(cfg, condition) for condition in read_by("recipe.label_smoothing"))
    assert declared == (not torch.equal(before, loss_of(cfg)(z, y)))


@pytest.mark.parametrize("crop", ["inception", "pad", "none"])
def test_a_crop_reads_what_is_declared(crop):
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)

    def views(cfg: Config) -> np.ndarray:
        out = np.empty((8, 16, 16, 3), np.uint8)
        for i in range(8):
            render(image, out[i], training_geometry(cfg.data, cfg.augment), 0, 0, i)
        return out

    words = [f"augment.crop={crop}", "data.image_size=16", "data.eval_resize=20"]
    before = compose_config(words)
    for word in ("augment.pad=1", "augment.scale=[0.5,0.6]", "augment.ratio=[1,2]", "data.antialias=true"):
        declared = any(holds(before, condition) for condition in read_by(word.partition("=")[0]))
        assert declared == bool((views(before) != views(compose_config([*words, word]))).any()), word


UNREAD = {
    "optim=sam optim.alpha=0.5": "^optim.alpha=0.5 changes nothing with optim=sam: .* read by .*, gsam, ",
    "optim=vanilla optim.rho_max=0.1": "with optim=vanilla: optim.rho_max is read by optim=asam, .*, sam, vasso",
    "optim=gsam optim.k=7": "optim.k is read by optim=eigen_ascent, eigen_sam$",
    "optim=sam optim.reuse=0.5": "read by optim=looksam, or with optim.every at least 2$",
    "recipe.base=adamw recipe.momentum=0.5": "with recipe.base=adamw: .* with recipe.base=sgd, SGD,",
    "recipe=cifar recipe.betas=[0,0]": "nothing with recipe.base=sgd",
    "augment=none augment.scale=[0.1,1]": "with augment.crop=none: .* with augment.crop=inception$",
    "recipe.label_smoothing=0.1": "with recipe.loss=sigmoid: .* with recipe.loss=softmax$",
    "optim=sam recipe.schedule=constant recipe.lr_min_ratio=0.1": "nothing with recipe.schedule=constant: ",
    "debug=tiny recipe.epochs=2": "with recipe.steps=6: recipe.epochs is read with recipe.steps=null$",
    "recipe=finetune recipe.decay=all": "with recipe.weight_decay=0.0: .* with recipe.weight_decay greater than 0$",
    "debug=tiny sharpness.every=3": "with sharpness.images=0: .* sharpness.images at least 1$",
    "data.finetune_steps=9": "is read where a file refers to it, as recipe=finetune",
}


@pytest.mark.parametrize("words", UNREAD)
def test_what_is_typed_and_not_read_is_refused(words):
    cfg = compose_config(words.split())
    validate(cfg)
    with pytest.raises(UserError, match=re.compile(UNREAD[words])):
        refuse_unread(cfg, words.split(), "")


def test_what_is_read_is_not_refused():
    for words in (
        "optim=eigen_sam optim.alpha=0.5",
        "optim=sam optim.rho_max=0.1 optim.rho_min=0.1",
        "optim=looksam optim.reuse=0.1 ++optim.every=3",
        "recipe=cifar recipe.momentum=0.5 recipe.nesterov=true",
        "recipe.base=NAdam recipe.eps=0.1",
        "recipe=finetune data.finetune_steps=9 +model.kwargs.drop_rate=0.1 seed=3 hydra.verbose=true",
    ):
        refuse_unread(compose_config(words.split()), words.split(), "steps: ${data.finetune_steps}")


def test_tables_ask_for_nothing_that_is_not_read():
    """So a line of a plan can be typed, and array.sbatch types it."""
    for run in unique_runs(load_table(name) for name in table_names()).values():
        refuse_unread(run.config, run.overrides, "")


def test_every_condition_names_keys_and_values_that_exist():
    cfg = Config()
    for node in (cfg, *(getattr(cfg, f.name) for f in dataclasses.fields(cfg))):
        for field in dataclasses.fields(node) if dataclasses.is_dataclass(node) else ():
            for condition in field.metadata.get("read_by", ()):
                assert isinstance(condition, str) or holds(cfg, condition) in (True, False)
    assert {f.name for f in dataclasses.fields(RecipeConfig) if f.metadata.get("read_by")} >= {
        "momentum",
        "betas",
        "eps",
    }
