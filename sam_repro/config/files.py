"""The files of `configs/`: which there are, and what a choice of them composes to.

`python train.py` composes with Hydra, which takes 0.14 s each time. Tables want a thousand configurations, so
`compose_files` does the same for plain words in a hundredth of that. What it does not know it leaves to Hydra.
"""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from sam_repro.config.schema import MISSING, Config
from sam_repro.errors import UserError

# Values, as Hydra's grammar reads them. It has many more.
INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)")
FLOAT = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
WORD = re.compile(r"(?!(true|false|null|inf|nan)$)[a-z_/][\w/.-]*", re.IGNORECASE)
CONSTANTS = {"true": True, "false": False, "null": None}
INTERPOLATION = re.compile(r"\$\{(\w+)\.(\w+)\}")
ARGUMENT = re.compile(r"\+model\.(kwargs|tiny_kwargs)\.(\w+)")  # of timm's, which the model does not set yet
ADDED = ("+kwargs", "+tiny_kwargs")
OVERRIDE = re.compile(r"override /(\w+)(@.*)?")


class OnlyHydraKnows(Exception):
    """Raised for what is wrong, and for what only Hydra's grammar can read."""


def config_dir() -> Path:
    """The folder of YAML files: next to the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "configs", package / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError(f"the configuration files are missing: neither configs/ nor sam_repro/configs in {package.parent}")


def folders(*more: Path) -> list[str]:
    """What `folder=name` may choose from: the folders of configs/, and of `more` like it."""
    return sorted({path.name for root in (config_dir(), *more) for path in root.glob("*") if path.is_dir()})


def choices(folder: str, *more: Path) -> list[str]:
    """The names that `folder=` takes: the files of configs/<folder>/, and of <more>/<folder>/."""
    names = {path.stem for root in (config_dir(), *more) for path in (root / folder).glob("*.yaml")}
    return sorted(name for name in names if not name.startswith("_"))


def compose_files(words: list[str]) -> Config | None:
    """The configuration that Hydra would compose of these overrides; None where only Hydra can say."""
    try:
        files, values = split_words(words)
        tree = asdict(Config())
        for part in chosen_trees(files):
            merge(tree, part)
        for (node, key), value in values.items():
            into = tree["model"].get(node[1:]) if node in ADDED else tree.get(node) if node else tree
            if not isinstance(into, dict) or (key in into) == (node in ADDED) or isinstance(into.get(key), dict):
                raise OnlyHydraKnows
            into[key] = value
        return build(Config, resolve(tree, tree))
    except OnlyHydraKnows:
        return None


def split_words(words: list[str]) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    """({folder: name of its file}, {(node, key): value}) of overrides.

    The root's own keys are of node ''; those of the nodes in ADDED are new ones.
    """
    files, values, known = {}, {}, folders()
    for word in words:
        key, _, value = word.partition("=")
        if added := ARGUMENT.fullmatch(key):
            if (place := (f"+{added[1]}", added[2])) in values:
                raise OnlyHydraKnows
            values[place] = parse(value)
        elif not re.fullmatch(r"\w+(\.\w+)?", key):
            raise OnlyHydraKnows
        elif key in known:
            files[key] = parse(value)
        else:
            node, _, last = key.rpartition(".")
            values[node, last] = parse(value)
    return files, values


def parse(value: str) -> Any:
    """A number, a word, true, false, null, or a list of them."""
    if value[:1] == "[" and value[-1:] == "]":
        return [parse(part.strip()) for part in value[1:-1].split(",")]
    if value.lower() in CONSTANTS:
        return CONSTANTS[value.lower()]
    for pattern, kind in ((INTEGER, int), (FLOAT, float), (WORD, str), (INTERPOLATION, str)):
        if pattern.fullmatch(value):
            return kind(value)
    raise OnlyHydraKnows


def chosen_trees(files: dict[str, Any]) -> list[dict[str, Any]]:
    """What the chosen files say, in the order in which it is merged.

    As in Hydra: the last folder is read first, so that a file may choose for the folders above it; the command line
    has chosen before all.
    """
    defaults = {k: v for entry in read(config_dir() / "config.yaml")["defaults"] for k, v in pairs(entry)}
    order = [folder for folder in defaults if not folder.startswith("override ")]
    chosen, trees = dict(files), []
    for folder in reversed(order):
        name = chosen.setdefault(folder, defaults[folder])
        if name is not None:
            trees = [*trees_of(folder, name, chosen, order[: order.index(folder)]), *trees]
    return trees


def trees_of(folder: str, name: Any, chosen: dict[str, Any], above: list[str]) -> list[dict[str, Any]]:
    """What a file says after the files that its defaults list names; its choices for folders `above` go to `chosen`."""
    path = config_dir() / folder / f"{name}.yaml"
    tree = dict(read(path))
    bases = tree.pop("defaults", [])
    for key, choice in (pair for entry in bases for pair in pairs(entry)):
        override = OVERRIDE.fullmatch(key)
        if override is None or override[1] not in above:
            raise OnlyHydraKnows
        chosen.setdefault(override[1], choice)
    names = [base for base in bases if isinstance(base, str)]
    trees = []
    for base in reversed(names if "_self_" in names else [*names, "_self_"]):
        if base == "_self_":
            trees = [tree if is_global(path) else {folder: tree}, *trees]
        else:
            trees = [*trees_of(folder, base, chosen, above), *trees]
    return trees


def pairs(entry: Any) -> list[tuple[str, Any]]:
    """The folder and the file of an entry of a defaults list, such as `optim: gsam`; nothing of `_self_`."""
    return list(entry.items()) if isinstance(entry, dict) else []


@cache
def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        tree = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        raise OnlyHydraKnows from None
    if not isinstance(tree, dict):
        raise OnlyHydraKnows
    return tree


@cache
def is_global(path: Path) -> bool:
    """Whether a file sets keys from the root, not those of its folder."""
    return path.read_text().startswith("# @package _global_\n")


def merge(tree: dict[str, Any], part: dict[str, Any]) -> None:
    """Lay `part` over `tree`."""
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = copy.deepcopy(value)


def resolve(value: Any, tree: dict[str, Any]) -> Any:
    """`value` with ${node.key} replaced by what stands there in `tree`."""
    if isinstance(value, dict):
        return {key: resolve(v, tree) for key, v in value.items()}
    if not isinstance(value, str) or "$" not in value:
        return value
    try:
        if whole := INTERPOLATION.fullmatch(value):
            return resolve(tree[whole[1]][whole[2]], tree)
        filled = INTERPOLATION.sub(lambda name: str(resolve(tree[name[1]][name[2]], tree)), value)
    except KeyError:
        raise OnlyHydraKnows from None
    if "$" in filled:
        raise OnlyHydraKnows
    return filled


def build(kind: Any, tree: dict[str, Any]) -> Any:
    """A dataclass from a tree whose values have its fields' types; an int may stand for a float."""
    hints = hints_of(kind)
    if tree.keys() - hints.keys():
        raise OnlyHydraKnows
    return kind(**{key: convert(value, hints[key]) for key, value in tree.items()})


hints_of = cache(get_type_hints)


def convert(value: Any, hint: Any) -> Any:
    """A value as the type that a field has."""
    kinds = get_args(hint)
    if type(None) in kinds:
        return None if value is None else convert(value, kinds[0])
    if is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value)
    if isinstance(value, list) and len(kinds) == 1:
        return [convert(v, kinds[0]) for v in value]
    if isinstance(value, dict) and len(kinds) == 2:
        return {key: plain(v) for key, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint and value != MISSING:
        return value
    raise OnlyHydraKnows


def plain(value: Any) -> Any:
    """A value of a free mapping, if YAML and Hydra read it alike: not 1e-3, which is a word to YAML, nor a date."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    if type(value) in (bool, int, float) or value is None or isinstance(value, str) and not FLOAT.fullmatch(value):
        return value
    raise OnlyHydraKnows
