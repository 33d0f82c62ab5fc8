"""Composing a configuration from `configs/` and overrides; one sentence for what does not fit.

Hydra composes the files into the dataclasses of `schema`; nothing else of Hydra is used.
"""

from __future__ import annotations

import dataclasses
import difflib
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_repro.config.schema import Config
from sam_repro.errors import UserError


@cache
def register_schema() -> None:
    """Give Hydra the dataclasses, so that a typo or a wrong type is an error."""
    ConfigStore.instance().store(name="schema", node=Config)


def config_dir() -> Path:
    """The folder of YAML files: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "configs", package / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError(f"the configuration files are missing: neither configs/ nor sam_repro/configs in {package.parent}")


def compose_config(overrides: list[str]) -> Config:
    """Compose the configuration of `python train.py <overrides>` without running anything.

    Raises UserError with the nearest valid name when an override does not fit.
    """
    register_schema()
    refuse_base_files(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            return typed(compose(config_name="config", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, overrides)) from None


def typed(cfg: Any) -> Config:
    """The resolved omegaconf tree as the dataclass."""
    OmegaConf.resolve(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
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
    try:
        return typed(OmegaConf.merge(OmegaConf.structured(Config), yaml.safe_load(path.read_text())))
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not this version's configuration: {str(error).splitlines()[0]}") from None


def to_dict(cfg: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, for JSON, YAML and W&B."""
    return dataclasses.asdict(cfg)


def fields_of(node: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass, a group before its own."""
    keys = []
    for name, kind in get_type_hints(node).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += fields_of(kind, f"{prefix}{name}.")
    return keys


def choices(group: str) -> list[str]:
    """The names that `group=` takes, from the files of configs/<group>/."""
    return sorted(p.stem for p in (config_dir() / group).glob("*.yaml") if not p.stem.startswith("_"))


def all_choices() -> str:
    """A line a group, for `--help`: Hydra's own list has the base files too."""
    return "".join(f"{group}: {', '.join(choices(group))}\n" for group in groups())


def refuse_base_files(overrides: list[str]) -> None:
    """Files such as model/_vit.yaml are no choice by themselves, and of a list Hydra makes a blend."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if value.startswith("[") and key in groups():
            raise UserError(f"{key}={value}: a run has one; -m {key}={value.strip('[]')} makes several runs")
        base = [name for name in value.split(",") if name.startswith("_")]
        if base and key in groups():
            raise UserError(no_such_choice(key, base[0]))


def groups() -> list[str]:
    """The folders of configs/: what `group=name` may choose from."""
    return sorted(p.name for p in config_dir().iterdir() if p.is_dir())


def nearest(word: str, words: list[str]) -> str:
    """'; did you mean X?' or the empty string."""
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def no_such_key(key: str) -> str:
    """A sentence with the nearest key that exists, and those of the same group."""
    known, (group, _, last) = [*fields_of(Config), *groups()], key.partition(".")
    names = [name.partition(".")[2] for name in known if name.startswith(f"{group}.")]
    exact = [f"'{name}'" for name in known if name.endswith(f".{key}")]  # lr: recipe.lr
    if fuller := exact or [f"'{name}'" for name in known if name.startswith(key)]:  # optim.rho: optim.rho_max, ...
        meant = f"; did you mean {' or '.join(fuller)}?"
    elif close := difflib.get_close_matches(last, names, n=1, cutoff=0.5):  # without what all of a group begin with
        meant = f"; did you mean '{group}.{close[0]}'?"
    else:
        meant = "" if names else nearest(key, known)
    return f"there is no key '{key}'{meant}" + (f" (keys of {group}: {', '.join(names)})" if names else "")


def no_such_choice(group: str, name: str) -> str:
    """A sentence with the nearest name that exists, and all of them."""
    names = choices(group)
    return f"{group}={name} does not exist{nearest(name, names)} (choices: {', '.join(names)})"


def explain(error: Exception, overrides: list[str]) -> str:
    """One sentence for a Hydra or OmegaConf error: which override, and the nearest name that exists."""
    known = fields_of(Config)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in groups():
            for name in value.split(","):
                if name not in choices(key):
                    return no_such_choice(key, name)
            if override[0] in "+~":
                return f"{key} is there already: write {key}={value}"
        elif not key.startswith("hydra") and key not in known:
            if key.rpartition(".")[0] in ("model.kwargs", "model.tiny_kwargs"):
                if override[:1] == "+":
                    continue
                return f"{key} is an argument of timm's that the model does not set yet: write +{key}={value}"
            return no_such_key(key)
    reason = error.__cause__ or error  # Hydra wraps what OmegaConf says of a value
    sentence = " ".join(str(reason).split("\n")[0].split())
    if sentence.startswith("Ambiguous value for argument"):  # seed=0,1: Hydra proposes to quote it, too
        return f"{sentence.split(chr(39))[1]} are several runs: add -m"
    sentence = f"{reason.full_key}: {sentence}" if getattr(reason, "full_key", "") else sentence
    return f"{sentence} (in {', '.join(overrides)})" if overrides else sentence
