"""A training run that a table or a plan asks for: its overrides, composed and named."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from sam_repro.config.compose import compose_config
from sam_repro.config.run_id import config_hash, run_id
from sam_repro.config.schema import Config


@dataclass(frozen=True)
class Run:
    """One training run that a row wants."""

    run_id: str
    overrides: tuple[str, ...]  # what stands after `python train.py`
    config: Config = field(repr=False, compare=False)
    after: Run | None = None  # the run whose weights this one starts from


def make_run(overrides: tuple[str, ...], seed: int | None = None, after: Run | None = None) -> Run:
    """The run of these overrides; `seed` is added to them.

    Raises:
        UserError: overrides that do not compose.
    """
    config, digest = composed(overrides)
    if seed is not None:
        config, overrides = replace(config, seed=seed), (*overrides, f"seed={seed}")
    return Run(run_id(config, digest), overrides, config, after)


@cache
def composed(overrides: tuple[str, ...]) -> tuple[Config, str]:
    """The configuration and its hash, which is the same for all seeds."""
    config = compose_config(list(overrides))
    return config, config_hash(config)


def words_of(point: dict[str, Any]) -> tuple[str, ...]:
    """A point of a grid as overrides."""
    return tuple(f"{key}={'null' if value is None else value}" for key, value in point.items())
