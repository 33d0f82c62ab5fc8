"""What a configuration may not be although its types fit: one sentence for what a user typed."""

from __future__ import annotations

import math
from typing import Any

from sam_repro.config.compose import nearest
from sam_repro.config.memory import memory_bytes
from sam_repro.config.schema import WORDS, Config, check_method
from sam_repro.errors import UserError


def validate(cfg: Config) -> None:
    """Check ranges and words that types cannot express.

    Raises UserError with one sentence that names the key and what it may be.
    """
    words = {
        "recipe.schedule": ("linear", "cosine", "constant"),
        "recipe.decay": ("kernels", "all"),
        "recipe.loss": ("sigmoid", "softmax"),
        "augment.crop": ("inception", "pad", "none"),
        "data.backend": ("auto", "ffcv", "torch", "memory"),
        "data.decode": ("auto", "cpu"),
        "data.interpolation": ("area", "bilinear", "bicubic"),
        "data.crop_mode": ("center", "squash", "border"),
        "train.device": ("auto", "cpu", "cuda"),
        "train.dtype": ("auto", "bf16", "fp32"),
        "train.reduce": ("fp32", "bf16"),
        "log.wandb": ("auto", "online", "offline", "disabled"),
        "log.progress": ("auto", "bar", "lines"),
        **{f"optim.{key}": allowed for key, allowed in WORDS.items()},
    }
    positive = ("recipe.batch_size", "recipe.lr", "recipe.epochs", "data.num_classes", "data.image_size")
    positive += ("data.eval_resize", "data.eval_batch_size", "train.log_every", "sharpness.batch")
    positive += ("train.timeout_minutes", "data.finetune_steps")
    not_negative = ("recipe.warmup_steps", "recipe.weight_decay", "recipe.clip")
    not_negative += ("augment.cutout", "augment.mixup", "augment.randaugment", "data.finetune_warmup")
    not_negative += ("data.workers", "train.save_every_steps", "train.eval_every_epochs", "seed")
    not_negative += ("sharpness.images", "sharpness.every", "train.threads", "train.save_every_minutes")
    not_negative += ("recipe.eps", "augment.pad")
    lengths = {"recipe.betas": 2, "augment.scale": 2, "augment.ratio": 2, "data.mean": 3, "data.std": 3}
    for key, allowed in words.items():
        value = lookup(cfg, key)
        if value not in allowed:
            raise UserError(f"{key}={value} is not one of {', '.join(allowed)}{nearest(str(value), list(allowed))}")
    for key in positive:
        if not 0 < lookup(cfg, key) < math.inf:
            raise UserError(f"{key}={lookup(cfg, key)} must be greater than 0")
    for key in not_negative:
        if not 0 <= lookup(cfg, key) < math.inf:
            raise UserError(f"{key}={lookup(cfg, key)} must be a finite number, 0 or greater")
    for key, length in lengths.items():
        if len(lookup(cfg, key)) != length:
            raise UserError(f"{key}={lookup(cfg, key)} must be {length} numbers")
    if cfg.seed >= 2**63:
        raise UserError(f"seed={cfg.seed} must be below 2^63")
    check_method(cfg.optim)
    if (cfg.train.chunk or 0) < 0:
        raise UserError(f"train.chunk={cfg.train.chunk} must be at least 1, or null for as many as there is memory for")
    if cfg.train.memory is not None:
        memory_bytes(cfg.train.memory, "train.memory", total=1.0)
    if not all(0 < value < math.inf for value in cfg.data.std):
        raise UserError(f"data.std={cfg.data.std} must be greater than 0")
    if not all(map(math.isfinite, cfg.data.mean)):
        raise UserError(f"data.mean={cfg.data.mean} must be finite numbers")
    if not 0 < cfg.augment.scale[0] <= cfg.augment.scale[1] <= 1:
        raise UserError(f"augment.scale={cfg.augment.scale} must be two parts of the area in (0, 1], the smaller first")
    if not 0 < cfg.augment.ratio[0] <= cfg.augment.ratio[1] < math.inf:
        raise UserError(f"augment.ratio={cfg.augment.ratio} must be two numbers greater than 0, the smaller first")
    if not 0 <= cfg.recipe.momentum < 1:
        raise UserError(f"recipe.momentum={cfg.recipe.momentum} must lie in [0, 1)")
    if not all(0 <= beta < 1 for beta in cfg.recipe.betas):
        raise UserError(f"recipe.betas={cfg.recipe.betas} must lie in [0, 1)")
    if cfg.recipe.nesterov and not cfg.recipe.momentum:
        raise UserError("recipe.nesterov=true must have a recipe.momentum greater than 0")
    if not 0 <= cfg.recipe.label_smoothing <= 1:
        raise UserError(f"recipe.label_smoothing={cfg.recipe.label_smoothing} must lie in [0, 1]")
    if not 0 < cfg.recipe.lr_min_ratio <= 1:
        raise UserError(f"recipe.lr_min_ratio={cfg.recipe.lr_min_ratio} must lie in (0, 1]")
    if not 0 <= cfg.data.label_noise < 1 or (cfg.data.label_noise and cfg.data.num_classes < 2):
        raise UserError(f"data.label_noise={cfg.data.label_noise} must lie in [0, 1), with two classes or more")
    if not 0 < cfg.data.train_fraction <= 1:
        raise UserError(f"data.train_fraction={cfg.data.train_fraction} must lie in (0, 1]")
    if cfg.recipe.steps is not None and cfg.recipe.steps < 1:
        raise UserError(f"recipe.steps={cfg.recipe.steps} must be at least 1, or null to go by epochs")
    if cfg.recipe.steps is not None:
        check_warmup(cfg, cfg.recipe.steps)
    if cfg.data.eval_resize < cfg.data.image_size:
        raise UserError(
            f"data.eval_resize={cfg.data.eval_resize} is smaller than data.image_size={cfg.data.image_size}"
        )


def check_warmup(cfg: Config, steps: int) -> None:
    """Refuse a warm-up longer than the run, where only the data say how long that is."""
    if cfg.recipe.warmup_steps > steps:
        raise UserError(f"recipe.warmup_steps={cfg.recipe.warmup_steps} must not exceed the {steps} steps of the run")


def lookup(cfg: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = cfg
    for part in key.split("."):
        value = getattr(value, part)
    return value
