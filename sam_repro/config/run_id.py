"""The names of a run: one with a hash of everything that may change its result, and one that a person reads."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from sam_repro.config.compose import to_dict
from sam_repro.config.schema import Config
from sam_repro.errors import plural

# Keys that say where and how fast, not what: two runs that differ only here are the same run.
UNHASHED_KEYS = (
    "log",
    "sharpness",
    "optim.groups",
    "data.root",
    "data.backend",
    "data.workers",
    "data.eval_batch_size",
    "data.eval_sets",
    "data.eval_root",
    "train.device",
    "train.compile",
    "train.threads",
    "train.chunk",
    "train.memory",
    "train.log_every",
    "train.save_every_minutes",
    "train.save_every_steps",
    "train.timeout_minutes",
)


def config_hash(cfg: Config) -> str:
    """Eight hexadecimal digits of the configuration without its machine-only keys and its seed.

    Only what differs from the schema's defaults counts, so that a new field does not rename the runs of before. A
    default that changes results must therefore never be changed in place.
    """
    tree = to_dict(cfg)
    for key in UNHASHED_KEYS:
        node, parts = tree, key.split(".")
        for part in parts[:-1]:
            node = node[part]
        del node[parts[-1]]
    del tree["seed"]
    start = Path(cfg.init) if cfg.init else None
    if start and start.parent == Path(cfg.log.runs_dir):  # a run's folder: where runs lie is the machine's business
        tree["init"] = f"runs/{start.name}"
    changed = different(tree, defaults())
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]


@cache
def defaults() -> dict[str, Any]:
    """The schema's own configuration."""
    return to_dict(Config())


def different(tree: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """The part of a tree that differs from another."""
    changed = {}
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            value = different(value, default[key])
            if value:
                changed[key] = value
        elif key not in default or value != default[key]:
            changed[key] = value
    return changed


def run_id(cfg: Config, digest: str | None = None) -> str:
    """<model>-<optim>-s<seed>-<hash>: equal on every rank, every requeue and every machine.

    Args:
        digest: config_hash(cfg), where it is known: it is that of all seeds.
    """
    return f"{cfg.model.name}-{cfg.optim.name}-s{cfg.seed}-{digest or config_hash(cfg)}"


def readable_name(config: dict[str, Any]) -> str:
    """'vit_digits gsam, seed 2: digits, noise 0.4, rho 0.2, alpha 0.1, m 64, lr 0.003, 449 steps': tells runs apart.

    The first words are what a narrow column shows; settings that are zero do nothing and are left out.
    """
    optim, recipe, data = config["optim"], config["recipe"], config["data"]
    settings = {"noise": data["label_noise"], "rho": optim["rho_max"], "alpha": optim["alpha"]}
    settings |= {"m": optim["m"] if optim["rho_max"] else 0, "lr": recipe["lr"]}
    words = [f"{name} {value:g}" for name, value in settings.items() if value]
    length = plural(recipe["steps"], "step") if recipe["steps"] else plural(recipe["epochs"], "epoch", "g")
    who = f"{config['model']['name']} {optim['name']}, seed {config['seed']}"
    return f"{who}: {', '.join([data['name'], *words, length])}"[:128]
