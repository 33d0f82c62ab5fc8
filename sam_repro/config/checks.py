"""Values that fit their types but not each other. Each is refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from sam_repro.config.compose import compose_config, nearest
from sam_repro.config.files import choices
from sam_repro.config.limits import REFERENCE, Condition, Range
from sam_repro.config.memory import memory_bytes
from sam_repro.config.schema import Config, DataConfig, OptimConfig
from sam_repro.errors import UserError, plural


def validate(cfg: Config) -> None:
    """Check the limits of all fields, and the relations between fields.

    Raises UserError with one sentence that names the key and what it may be.
    """
    check_limits(cfg)
    check_method(cfg.optim)
    check_images(cfg.data)
    if cfg.train.memory is not None:
        memory_bytes(cfg.train.memory, "train.memory", total=1.0)
    if cfg.recipe.nesterov and not cfg.recipe.momentum:
        raise UserError("recipe.nesterov=true needs a momentum: set recipe.momentum=0.9")
    if cfg.data.label_noise and cfg.data.num_classes < 2:
        raise UserError(f"data.label_noise={cfg.data.label_noise} needs two classes or more: data.num_classes")
    if cfg.recipe.steps is not None:
        check_warmup(cfg, cfg.recipe.steps)


def check_limits(node: Any, prefix: str = "") -> None:
    """Check every field of a dataclass against the limits that stand next to it. `prefix` is "data." for its data."""
    for f in fields(node):
        key, value, within = prefix + f.name, getattr(node, f.name), f.metadata.get("within")
        if is_dataclass(value):
            check_limits(value, f"{key}.")
        if within is None or value is None:
            continue
        if isinstance(within, tuple):
            if value not in within:
                raise UserError(f"{key}={value} is not one of {', '.join(within)}{nearest(str(value), within)}")
        elif isinstance(within, re.Pattern):
            if not within.fullmatch(value):
                raise UserError(
                    f"{key}={value} must be a plain name: letters, digits, '_', and after them '.', '+', '-'"
                )
        elif isinstance(value, list):
            ascending = f.metadata["ascending"]
            fits = len(value) == f.metadata["length"] and all(v in within for v in value)
            if not fits or (ascending and value != sorted(value)):
                order = ", the smaller first" if ascending else ""
                raise UserError(f"{key}={value} must be {f.metadata['length']} numbers, each {within}{order}")
        elif value not in within:
            null = ", or null" if "None" in str(f.type) else ""
            raise UserError(f"{key}={value} must {'lie' if str(within).startswith('in ') else 'be'} {within}{null}")


def check_method(o: OptimConfig) -> None:
    """Refuse methods that contradict themselves."""
    if o.perturb != "none" and o.m == 0:
        raise UserError("optim.m=0 is not a group size; give the number of images that share one perturbation")
    if o.rho_schedule == "lr" and o.rho_min > o.rho_max:
        raise UserError(f"optim.rho_min={o.rho_min} is greater than optim.rho_max={o.rho_max}")
    if o.combine == "wsam" and not 0 <= o.alpha < 1:
        raise UserError(f"optim.alpha={o.alpha} is gamma in optim.combine=wsam, which must lie in [0, 1)")
    if o.decoupled and o.every > 1:
        raise UserError(f"optim.decoupled=true needs optim.every=1, not {o.every}: it keeps nothing between steps")
    if o.scope == "global" and (o.every > 1 or o.decoupled or o.combine == "cr" or o.kind == "entropy_sgd"):
        raise UserError(
            "optim.scope=global needs two passes in every step: not optim.kind=entropy_sgd, optim.every, "
            "optim.decoupled or optim.combine=cr"
        )
    if o.kind == "entropy_sgd" and o.perturb != "none":
        raise UserError(f"optim.kind=entropy_sgd does not perturb: set optim.perturb=none, not {o.perturb}")


def check_images(data: DataConfig) -> None:
    """Refuse an image size that has too few pixels."""
    if data.eval_resize < data.image_size:
        raise UserError(
            f"data.eval_resize={data.eval_resize} is smaller than data.image_size={data.image_size}; without a margin "
            f"around the centre crop it is data.eval_resize={data.image_size}"
        )


def check_warmup(cfg: Config, steps: int) -> None:
    """Refuse a warm-up that is longer than the run, once the data set has given the run's length."""
    if cfg.recipe.warmup_steps > steps:
        raise UserError(
            f"recipe.warmup_steps={cfg.recipe.warmup_steps} must not exceed the {plural(steps, 'step')} of the run; "
            f"for a short trial add recipe.warmup_steps={steps // 10}"
        )


def refuse_unread(cfg: Config, words: Iterable[str], unresolved: str) -> None:
    """Refuse overrides of keys that nothing reads under the settings of `cfg`. They would change the run's name only.

    For the words of one command line only. Tables lay an override over every method, whether it reads it or not.

    Args:
        words: overrides as they are typed.
        unresolved: the configuration as text in which references such as ${data.finetune_steps} still stand.
    """
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        conditions = read_by(key)
        if REFERENCE in conditions and f"${{{key}}}" not in unresolved:
            raise UserError(f"{word} changes nothing here: {key} is read where a file refers to it, as recipe=finetune")
        if REFERENCE not in conditions and conditions and not any(holds(cfg, c) for c in conditions):
            lacking = {k: lookup(cfg, k) for k, allowed in conditions[0].items() if lookup(cfg, k) not in allowed}
            now = f"optim={cfg.optim.name}" if key.startswith("optim.") else words_of(lacking)
            raise UserError(f"{word} changes nothing with {now}: {key} is read {readers(key, conditions)}")


def read_by(key: str) -> tuple[Any, ...]:
    """The settings under which a dotted key is read, any of several; () is always."""
    node, _, last = key.rpartition(".")
    holder = getattr(Config(), node, None) if node else Config()
    known = {f.name: f.metadata.get("read_by", ()) for f in fields(holder)} if is_dataclass(holder) else {}
    return known.get(last, ())


def holds(cfg: Config, condition: Condition) -> bool:
    """Whether every key of `condition` has a value that it allows."""
    return all(lookup(cfg, key) in allowed for key, allowed in condition.items())


def readers(key: str, conditions: tuple[Condition, ...]) -> str:
    """'by optim=gsam, min_f_h', 'with recipe.base=sgd': what reads a key."""
    if not key.startswith("optim."):
        return " or ".join(f"with {words_of(condition)}" for condition in conditions)
    names = [n for n in choices("optim") if any(holds(compose_config([f"optim={n}"]), c) for c in conditions)]
    more = [f", or with {k} {v}" for c in conditions for k, v in c.items() if isinstance(v, Range)]
    return f"by optim={', '.join(names)}{''.join(more)}"


def words_of(settings: Mapping[str, Any]) -> str:
    """'recipe.base=sgd, SGD and recipe.steps=null' of settings and what they are or may be."""
    null = {None: "null"}
    either = {k: v if isinstance(v, tuple) else (v,) for k, v in settings.items()}
    words = (f"{k}={', '.join(str(null.get(v, v)) for v in vs)}" for k, vs in either.items())
    return " and ".join(word.replace("=at least", " at least").replace("=greater", " greater") for word in words)


def lookup(cfg: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = cfg
    for part in key.split("."):
        value = getattr(value, part)
    return value
