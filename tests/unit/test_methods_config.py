"""The methods as configuration: names, defaults of their papers, what is refused, and resuming the main job."""

from __future__ import annotations

import dataclasses
import inspect
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sam_repro.config.checks import validate
from sam_repro.config.compose import choices, compose_config
from sam_repro.config.schema import OptimConfig
from sam_repro.errors import UserError
from sam_repro.optim import COMBINATIONS, PERTURBATIONS, THREE_PASSES
from sam_repro.optim.eigen_sam import PowerIteration
from sam_repro.optim.entropy_sgd import EntropySGD
from sam_repro.optim.perturbations import RENORMALISE
from sam_repro.records.log import read_log
from sam_repro.training.job import lr_schedule_of, rho_of
from sam_repro.training.main import main
from sam_repro.training.method import is_fused

# perturb, combine, rho_max, rho_min (None: the model's), and what else defines the method
METHODS = {
    "vanilla": ("none", "robust", 0, 0, {}),
    "sam": ("sam", "robust", 0.15, 0.15, {}),
    "gsam": ("sam", "ascent", 0.6, 0.1, {"alpha": 0.6, "rho_schedule": "lr"}),
    "gsam_constant": ("sam", "ascent", 0.15, 0.15, {"alpha": 0.6, "rho_schedule": "constant"}),
    "asam": ("asam", "robust", 1.0, 1.0, {"eta": 0.01, "weights_only": True}),
    "asam_ascent": ("asam", "ascent", 1.0, 1.0, {"alpha": 0.6, "eta": 0.01}),
    "fisher_sam": ("fisher", "robust", 0.1, 0.1, {"eta": 1.0}),
    "friendly": ("friendly", "robust", 0.2, 0.2, {"sigma": 1.0, "lam": 0.9}),
    "vasso": ("vasso", "robust", 0.1, 0.1, {"theta": 0.9}),
    "eigen_sam": ("eigen", "robust", 0.15, 0.15, {"alpha": 0.2, "k": 100, "p": 5, "renormalise": "none"}),
    "eigen_ascent": ("eigen", "ascent", 0.6, 0.1, {"alpha": 0.6, "eigen_alpha": 0.2}),
    "random": ("random", "robust", 0.15, 0.15, {}),
    "min_f_h": ("sam", "min_f_h", 0.6, 0.1, {"alpha": 0.6}),
    "weighted": ("sam", "weighted", 0.6, 0.1, {"alpha": 0.6}),
    "wsam": ("sam", "wsam", 0.05, 0.05, {"alpha": 0.9, "decoupled": True}),
    "cr_sam": ("sam", "cr", 0.1, 0.1, {"alpha": 0.1, "beta": 0.01}),
    "looksam": ("sam", "robust", 0.15, 0.15, {"every": 5, "reuse": 0.7}),
    "entropy_sgd": ("none", "robust", 0, 0, {"kind": "entropy_sgd", "inner_steps": 20, "gamma": 0.03}),
}


def test_every_file_is_listed_here():
    assert sorted(METHODS) == choices("optim")


@pytest.mark.parametrize("name", METHODS)
def test_methods_and_their_defaults(name):
    o = compose_config(["model=vit_b32", f"optim={name}"]).optim
    perturb, combine, rho_max, rho_min, more = METHODS[name]
    assert o.name == name
    assert (o.perturb, o.combine, o.rho_max, o.rho_min) == (perturb, combine, rho_max, rho_min)
    assert {key: getattr(o, key) for key in more} == more
    if rho_max == rho_min and perturb != "none":
        assert o.rho_schedule == "constant"


def test_words_are_the_engine_s():
    words = {f.name: f.metadata["within"] for f in dataclasses.fields(OptimConfig)}
    assert words["perturb"] == ("none", *PERTURBATIONS)
    assert words["combine"] == (*COMBINATIONS, *THREE_PASSES)
    assert words["renormalise"] == RENORMALISE


def test_defaults_are_the_engine_s():
    o = compose_config(["optim=entropy_sgd"]).optim
    walk = inspect.signature(EntropySGD.__init__).parameters
    names = {"steps": o.inner_steps, "parts": o.inner_parts, "lr": o.inner_lr, "momentum": o.inner_momentum}
    names |= {"noise": o.inner_noise, "average": o.inner_average, "gamma": o.gamma, "scoping": o.scoping}
    assert {key: walk[key].default for key in names} == names
    estimate = inspect.signature(PowerIteration.__init__).parameters
    assert (estimate["every"].default, estimate["iterations"].default) == (o.k, o.p)


def test_the_fused_engine_takes_what_it_knows_and_nothing_else():
    fused = {name for name in METHODS if name != "entropy_sgd" and is_fused(compose_config([f"optim={name}"]).optim)}
    assert METHODS and fused == set(METHODS) - {"entropy_sgd", "cr_sam", "looksam", "wsam"}
    assert not is_fused(compose_config(["optim=gsam", "optim.scope=global"]).optim)


BAD = {
    "optim.perturb=asm": "optim.perturb=asm is not one of none, sam, asam, .*; did you mean 'asam'",
    "optim.combine=assent": "did you mean 'ascent'",
    "optim.k=0": "optim.k=0 must be at least 1",
    "optim.p=0": "optim.p=0 must be at least 1",
    "optim.every=0": "optim.every=0 must be at least 1",
    "optim.inner_steps=0": "optim.inner_steps=0 must be at least 1",
    "optim.alpha=nan": "optim.alpha=nan must be a finite number",
    "optim.eigen_alpha=inf": "optim.eigen_alpha=inf must be a finite number",
    "optim.beta=nan": "optim.beta=nan must be a finite number",
    "optim.rho_max=-1": "optim.rho_max=-1.0 must be a finite number, 0 or greater",
    "optim.rho_min=1": "optim.rho_min=1.0 is greater than optim.rho_max=0.6",
    "optim.eta=-0.1": "optim.eta=-0.1 must be a finite number, 0 or greater",
    "optim.theta=2": r"optim.theta=2.0 must lie in \[0, 1\]",
    "optim.lam=-1": r"optim.lam=-1.0 must lie in \[0, 1\]",
    "optim.inner_lr=0": "optim.inner_lr=0.0 must be greater than 0",
    "optim.renormalise=half": "optim.renormalise=half is not one of none, v_perp, sum",
    "optim.eigen_mode=test": "optim.eigen_mode=test is not one of eval, train",
    "optim.scope=all": "optim.scope=all is not one of group, global",
    "optim.m=0": "optim.m=0 is not a group size",
    "optim.kind=entropy_sgd": "optim.kind=entropy_sgd does not perturb",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_numbers_and_words_are_one_sentence(override):
    with pytest.raises(UserError, match=BAD[override]):
        validate(compose_config(["model=vit_b32", "optim=gsam", override]))


def test_contradictions_are_one_sentence():
    for overrides, sentence in (
        (["optim=wsam", "optim.alpha=1"], "gamma in optim.combine=wsam"),
        (["optim=wsam", "optim.every=2"], "keeps nothing between steps"),
    ):
        with pytest.raises(UserError, match=sentence):
            validate(compose_config(overrides))


def job(folder, *overrides: str):
    folders = [f"log.runs_dir={folder}/runs", f"log.ledger_dir={folder}/ledger"]
    small = ["debug=tiny", "train.device=cpu", "train.threads=1", "train.deterministic=true", "recipe.batch_size=16"]
    return main(compose_config([*small, *folders, *overrides]))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (["recipe.base=adamww"], "recipe.base: unknown base optimizer 'adamww'"),
        (["recipe.base=LBFGS"], "unknown base optimizer 'LBFGS'"),
        (
            ["augment.mixup=0.2", "optim=vanilla", "optim.m=5"],
            "optim.m=5 images, which does not divide the batch of 16",
        ),
        (["augment.mixup=0.2", "optim=vanilla", "optim.m=1"], "optim.m=1 images, which mixes nothing"),
        (["optim=entropy_sgd", "optim.inner_parts=3"], "optim.inner_parts=3 does not divide the batch of 16"),
        (
            ["optim=entropy_sgd", "model=resnet50", "optim.m=8", "optim.inner_parts=4"],
            "optim.m=8 does not divide the 4",
        ),
    ],
)
def test_what_only_the_job_can_know_is_one_sentence_too(override, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        job(tmp_path, "model=vit_s32", *override)


@pytest.mark.parametrize("base", ["adam", "adabelief", "NAdam", "Adafactor"])
def test_base_optimizers_train(base, tmp_path):
    assert job(tmp_path, "model=vit_s32", "optim=gsam", f"recipe.base={base}", "recipe.steps=2")["status"] == "done"


RESUMED = {
    "friendly": [],
    "vasso": [],
    "looksam": [],
    "entropy_sgd": ["optim.inner_steps=3"],
    "eigen_sam": ["optim.k=2", "optim.p=2"],
    "eigen_ascent": ["optim.k=2", "optim.p=2", "optim.eigen_images=fixed", "optim.eigen_mode=train"],
}


@pytest.mark.parametrize("model", ["vit_s32", "resnet50"])
@pytest.mark.parametrize("optim", RESUMED)
def test_the_main_job_resumes_bitwise(optim, model, tmp_path):
    """The checkpoint of step 3, carried to another folder, goes on to the same weights."""
    arguments = [f"model={model}", f"optim={optim}", "train.save_every_steps=3", *RESUMED[optim]]
    row = job(tmp_path / "whole", *arguments)
    run = tmp_path / "whole/runs" / row["run_id"]
    other = tmp_path / "resumed/runs" / row["run_id"]
    other.mkdir(parents=True)
    for name in ("step-00000003.pt", "step-00000003.json"):
        shutil.copy(run / name, other / name)
    assert job(tmp_path / "resumed", *arguments)["run_id"] == row["run_id"]
    ours, theirs = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    if optim.startswith("eigen"):
        last = [r for r in read_log(run / "log.jsonl") if "products" in r][-1]
        assert last["products"] == 4 and last["product_seconds"] > 0 and 0 < last["product_share"] < 1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_radius_reaches_both_its_ends_with_the_learning_rate(schedule):
    words = ["model=vit_s32", "optim=gsam", f"recipe.schedule={schedule}", "recipe.warmup_steps=0"]
    cfg = compose_config([*words, "optim.rho_max=0.2", "optim.rho_min=0.05"])
    lr = lr_schedule_of(cfg, 100)
    assert rho_of(cfg, lr(0)) == pytest.approx(0.2) and rho_of(cfg, lr(100)) == pytest.approx(0.05)
