"""A training run that a table asks for, and how its overrides are composed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any

from sam_repro.config.compose import choices, compose_config
from sam_repro.config.schema import Config


@dataclass(frozen=True)
class Run:
    """One training run that a row wants."""

    run_id: str
    overrides: tuple[str, ...]  # what stands after `python train.py`
    config: Config = field(repr=False, compare=False)
    after: Run | None = None  # the run whose weights this one starts from


def compose_point(overrides: tuple[str, ...], point: dict[str, Any]) -> Config:
    """The configuration of `overrides` with these dotted keys set.

    Composing takes tenths of a second and a sweep has hundreds of points, so one composition, with a marker in the
    place of every value, shows which leaves of the configuration follow which key; the values are then filled in.
    Only numbers and words have markers; switches, lists and choices of files are composed one by one.
    """
    marked = [key for key, value in point.items() if type(value) in (int, float, str) and not choices(key)]
    markers = {key: marker_like(point[key], i) for i, key in enumerate(marked)}
    template = compose_once((*overrides, *words_of(point | markers)))
    return fill(template, {marker: point[key] for key, marker in markers.items()})


def words_of(point: dict[str, Any]) -> tuple[str, ...]:
    """Overrides, as they are typed."""
    return tuple(f"{key}={'null' if value is None else value}" for key, value in point.items())


def marker_like(value: Any, i: int) -> Any:
    """A value of the same type that stands nowhere else."""
    return f"marker-{i}" if isinstance(value, str) else type(value)(98765432 + i)


def fill(node: Any, values: dict[Any, Any]) -> Any:
    """A configuration with every marker replaced by its value, as the type that the field has."""
    if is_dataclass(node) and not isinstance(node, type):
        return replace(node, **{f.name: fill(getattr(node, f.name), values) for f in fields(node)})
    if isinstance(node, (list, dict, bool)) or node not in values:
        return node
    kind: Any = type(node)
    return kind(values[node])


@cache
def compose_once(overrides: tuple[str, ...]) -> Config:
    """compose_config, remembered."""
    return compose_config(list(overrides))
