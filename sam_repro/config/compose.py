"""Composing a configuration from `configs/` and overrides; one sentence for what does not fit.

Hydra composes the files into the dataclasses of `schema`; nothing else of Hydra is used. It is imported where it is
needed, since that takes half a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from sam_repro.config.files import choices, compose_files, config_dir, folders
from sam_repro.config.schema import Config
from sam_repro.errors import UserError


@cache
def register_schema() -> None:
    """Give Hydra the dataclasses, so that a typo or a wrong type is an error."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def compose_config(overrides: list[str]) -> Config:
    """Compose the configuration of `python train.py <overrides>` without running anything.

    Raises UserError with the nearest valid name when an override does not fit.
    """
    refuse_words(overrides)
    return compose_files(overrides) or compose_with_hydra(overrides)


def compose_with_hydra(overrides: list[str]) -> Config:
    """The same by Hydra, whatever its grammar allows."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            return typed(compose(config_name="config", overrides=overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(explain(error, overrides)) from None


def typed(cfg: Any) -> Config:
    """The resolved omegaconf tree as the dataclass."""
    from omegaconf import OmegaConf

    OmegaConf.resolve(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing == ["recipe.name"]:
        file = f"'defaults: [{{override /recipe@_global_.recipe: vit}}, _self_]' in configs/model/{cfg.model.name}.yaml"
        raise UserError(f"no recipe is named: add recipe={', '.join(choices('recipe'))}, or {file}")
    if missing:
        raise UserError(f"no value for {', '.join(missing)}")
    result = OmegaConf.to_object(cfg)
    assert isinstance(result, Config)
    for prefix, node in ("", result), *((f"{k}.", v) for k, v in vars(result).items() if dataclasses.is_dataclass(v)):
        for key in vars(node).keys() - {f.name for f in dataclasses.fields(node)}:  # +optim.rho=0.1
            raise UserError(no_such_key(prefix + key))
    return result


def read_config(path: Path) -> Config:
    """The resolved configuration that a run left in its directory."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return typed(OmegaConf.merge(OmegaConf.structured(Config), yaml.safe_load(path.read_text())))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not this version's configuration: {str(error).splitlines()[0]}") from None


def to_dict(cfg: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, for JSON, YAML and W&B."""
    return dataclasses.asdict(cfg)


def fields_of(node: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass, a node before its own."""
    keys = []
    for name, kind in get_type_hints(node).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += fields_of(kind, f"{prefix}{name}.")
    return keys


def refuse_words(words: list[str], *more: Path) -> None:
    """Refuse what Hydra would take, or end in a traceback for.

    Files such as model/_vit.yaml are no choice by themselves, and a list of files would be a blend of them.

    Args:
        words: overrides as they are typed.
        more: folders like configs/ that the user has besides.
    """
    known = folders(*more)
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if not key:
            raise UserError(f"{word}: options are written key=value")
        if key not in known or word.startswith("~"):
            continue
        if value.startswith("["):
            raise UserError(f"{key}={value}: a run has one; -m {key}={value.strip('[]')} makes several runs")
        if value.isdigit() or (value in ("", "null") and key not in ("experiment", "debug")):
            raise UserError(no_such_choice(key, value, choices(key, *more)))
        for name in value.split(","):
            if name.startswith("_"):
                raise UserError(no_such_choice(key, name, choices(key, *more)))


def nearest(word: str, words: Sequence[str]) -> str:
    """'; did you mean X?' or the empty string."""
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def no_such_key(key: str, *more: Path) -> str:
    """A sentence with the nearest key that exists, and those of the same node."""
    known, (node, _, last) = [*fields_of(Config), *folders(*more)], key.partition(".")
    names = [name.partition(".")[2] for name in known if name.startswith(f"{node}.")]
    exact = [f"'{name}'" for name in known if name.endswith(f".{key}")]  # lr: recipe.lr
    if fuller := exact or [f"'{name}'" for name in known if name.startswith(key)]:  # optim.rho: optim.rho_max, ...
        meant = f"; did you mean {' or '.join(fuller)}?"
    elif close := difflib.get_close_matches(last, names, n=1, cutoff=0.5):  # without what all of a node begin with
        meant = f"; did you mean '{node}.{close[0]}'?"
    else:
        meant = "" if names else nearest(key, known)
    return f"there is no key '{key}'{meant}" + (f" (keys of {node}: {', '.join(names)})" if names else "")


def no_such_choice(folder: str, name: str, names: Sequence[str]) -> str:
    """A sentence with the nearest name that exists, and all of them."""
    return f"{folder}={name} does not exist{nearest(name, names)} (choices: {', '.join(names)})"


def explain(error: Exception, words: list[str], *more: Path) -> str:
    """One sentence for an error of Hydra, OmegaConf or YAML: what it concerns, and the nearest that exists.

    The error alone says what is wrong; `words`, the overrides that were typed, only show how it was written.

    Args:
        error: as it was caught; Hydra's have OmegaConf's as their cause.
        words: overrides as they are typed.
        more: folders like configs/ that the user has besides.
    """
    from hydra.errors import MissingConfigException, OverrideParseException

    text = str(error)
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    if isinstance(error, MissingConfigException) and error.options:
        folder, _, name = (error.missing_cfg_file or "").rpartition("/")
        return no_such_choice(folder, name, [option for option in error.options if not option.startswith("_")])
    if match := re.search(r"^(?:Ambiguous value for argument|Sweep parameters) '(.*?)'( requires|$)", text, re.M):
        return several(match[1])
    if match := re.search(r"^Either remove \+ prefix: '(.*)'$|^Multiple values for .* '?override (.*)'$", text, re.M):
        word = match[1] or match[2].replace(": ", "=")
        return f"{word.partition('=')[0]} is there already: write {word}"
    merged = text.partition("Error merging override ")[2]
    about = f"{text}\n{error.__cause__ or ''}"
    file = f"{match[1]}.yaml: " if (match := re.match(r"In '(.*?)': \w+ raised while composing", text)) else ""
    key = match[1] if (match := re.search(r"full_key: (\S+)", about)) else ""
    if re.search(r"^Key '.*' (not in '|is not in struct)", about, re.M) and not key.startswith("hydra."):
        typed_word = next((w for w in words if w.partition("=")[0] == key), f"{key}=...")
        if key.startswith(("model.kwargs.", "model.tiny_kwargs.")):
            return f"{file}{key} is an argument of timm's that the model does not set yet: write +{typed_word}"
        return file + no_such_key(key, *more)
    if error.__cause__ or file:  # what OmegaConf says about a value; the types follow it
        text = str(error.__cause__ or text.partition("\n")[2]).split("\n")[0]
    sentence = " ".join(text.split("\n\nConfig search path")[0].split())
    missing = re.search(r"'(.*)' not found", sentence)  # of an interpolation, which does not say where it stands
    word = next((w for w in words if missing and missing[1] in w or w == merged), "")
    return file + (f"{key}: " if key else "") + sentence + (f" (in {word})" if word else "")


def unreadable(word: str) -> str:
    """A sentence for a word that Hydra cannot read, and how to write it."""
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word}: options are written key=value"
    if get_origin(hint_of(key)) in (list, dict):
        return f"cannot read {word}: a list is written {key}=[a,b], a mapping {key}={{a:1,b:2}}, both in quotes"
    return f"cannot read {word}: a value with other signs than letters, digits and ._-/: is quoted, {quoted(word)}"


def several(word: str) -> str:
    """A sentence for values with commas between them: several runs, a list, or one word."""
    key, _, value = word.partition("=")
    hint = hint_of(key)
    if get_origin(hint) is list:
        return f"{key} is a list: write {key}=[{value}]"
    either = f", or write {quoted(word)} for one value" if str in (hint, *get_args(hint)) else ""
    return f"{word} are several runs: add -m{either}"


def quoted(word: str) -> str:
    """key=value as it is typed for a value that is one string, whatever stands in it."""
    key, _, value = word.partition("=")
    value = value.strip("'\"").replace("'", r"\'")
    return shlex.quote(f"{key}='{value}'") if re.search(r'["$`!]', value) else f"\"{key}='{value}'\""


def hint_of(key: str) -> Any:
    """The type of a dotted key's field; None for what is no field."""
    node, _, last = key.rpartition(".")
    kind = get_type_hints(Config).get(node) if node else Config
    return get_type_hints(kind).get(last) if dataclasses.is_dataclass(kind) else None
