"""The one typed schema of a run, how it is composed, and the name it gets.

Hydra composes `configs/` into these dataclasses; nothing else of Hydra is used. Every field is documented here,
once; the YAML files only cite where a number comes from. This module imports no torch, so that the paper half of
the project (plans, tables, figures) can compose and name runs on a laptop.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_repro.config_log import LogConfig, SharpnessConfig
from sam_repro.config_optim import OptimConfig
from sam_repro.errors import UserError


@dataclass
class ModelConfig:
    """A timm model and its row of the GSAM paper's Table 4."""

    name: str = MISSING  # the field's short name: vit_b32, mixer_s8, resnet50
    timm: str = MISSING  # timm.create_model's name
    family: str = MISSING  # vit | mixer | resnet: how weights are initialised
    params: int = 0  # number of parameters with 1,000 classes; 0 when no source states one
    kwargs: dict[str, Any] = field(default_factory=dict)  # timm.create_model's keyword arguments
    tiny_kwargs: dict[str, Any] = field(default_factory=dict)  # laid over kwargs when model.tiny is set
    tiny: bool = False  # a toy of the same family, for debug=tiny
    sam_rho: float = 0.05  # rho of plain SAM (Chen et al. 2022; D-12)
    rho_max: float = 0.05  # Table 4
    rho_min: float = 0.05  # Table 4
    alpha: float = 0.1  # Table 4


@dataclass
class RecipeConfig:
    """Schedule, base optimizer and loss: what vanilla, SAM and GSAM have in common."""

    name: str = MISSING  # of its YAML file, and of its rows in tables
    epochs: float = 300  # passes over the training split
    steps: int | None = None  # overrides epochs
    batch_size: int = 4096  # global: all ranks together
    base: str = "adamw"  # adamw | sgd | adam | adabelief | a class of torch.optim, such as NAdam
    lr: float = 3e-3  # the peak, reached at the end of the warm-up
    lr_min_ratio: float = 0.01  # the last learning rate over the peak
    warmup_steps: int = 10_000  # linear from 0
    schedule: str = "linear"  # linear | cosine | constant, after the warm-up
    weight_decay: float = 0.3  # AdamW, AdaBelief: decoupled, times lr; SGD, Adam: coupled L2
    decay: str = "kernels"  # kernels (no bias, norm, position embedding) | all
    momentum: float = 0.9  # SGD
    nesterov: bool = False  # SGD
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # AdamW, Adam, AdaBelief
    eps: float = 1e-8  # AdamW, Adam; AdaBelief: its authors' ImageNet value (1e-16 is their library's; D-28)
    clip: float = 1.0  # global norm of the averaged gradient, before the base optimizer; 0 is off
    loss: str = "sigmoid"  # sigmoid: sum over classes of binary cross-entropies | softmax
    label_smoothing: float = 0.0  # softmax only


@dataclass
class AugmentConfig:
    """What happens to a training image between the file and the model."""

    name: str = MISSING  # of its YAML file, and of its rows in tables
    crop: str = "inception"  # inception | pad (zeros around, random crop) | none (as in evaluation)
    pad: int = 4  # pad: pixels of zeros on each side
    scale: list[float] = field(default_factory=lambda: [0.05, 1.0])  # inception: range of the crop's area
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])  # inception: range of width / height
    flip: bool = True  # left-right with probability 1/2
    randaugment: int = 0  # magnitude of RandAugment's two operations, as in TensorFlow's code (10, 15); 0 is off
    cutout: int = 0  # side in pixels of a square of the mean colour, centred anywhere in each image; 0 is off
    mixup: float = 0.0  # p of the Beta(p, p) that mixes each group's images with their neighbours; 0 is off


@dataclass
class DataConfig:
    """A data set on disk and the shape in which the model sees it."""

    name: str = MISSING  # of its YAML file, and of its rows in tables
    root: str | None = None  # folder with train.beton and val.beton, or with train/ and val/ class folders
    num_classes: int = 1000  # outputs of the head
    image_size: int = 224  # side of the square given to the model
    eval_resize: int = 256  # evaluation: short side before the centre crop; equal to image_size means no margin
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])  # of pixels in [0, 1]; .5, .5: range [-1, 1]
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])  # likewise
    label_noise: float = 0.0  # training: the fraction of labels replaced by another class, uniformly
    train_fraction: float = 1.0  # class-stratified, seeded; the rest is the held-out minival
    backend: str = "auto"  # ffcv | torch | memory (decoded once, kept on the device) | auto
    decode: str = "auto"  # training images: cpu | gpu (its JPEG engines: other roundings) | auto: cpu
    workers: int = 0  # decoding threads of this rank; 0: all cores of the machine over its ranks, at most 16
    antialias: bool = False  # training crop: area-average instead of plain bilinear
    eval_batch_size: int = 256  # of this rank
    interpolation: str = "area"  # evaluation resize: area | bilinear, bicubic (Pillow's, for weights of others)
    eval_sets: list[str] = field(default_factory=lambda: ["val"])  # counted after training: data/evalsets.py
    eval_root: str | None = None  # folder of the published test sets V2, R and C; none: data.root
    finetune_steps: int = 500  # of recipe=finetune, GSAM paper B.2
    finetune_warmup: int = 100  # likewise


@dataclass
class TrainConfig:
    """How the run is executed: precision, compilation, intervals."""

    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # bf16 (autocast) | fp32 | auto: bf16 where the GPU has it, else fp32
    compile: bool | None = None  # torch.compile the forward and backward passes; null: on a GPU
    reduce: str = "fp32"  # gradients between ranks: fp32 | bf16, half the bytes, rounded once a step
    deterministic: bool = False  # torch's deterministic algorithms; bitwise only on the CPU
    threads: int = 0  # CPU threads of torch; 0 leaves torch's choice
    log_every: int = 50  # steps between log lines; the only moments the host waits for the device
    eval_every_epochs: float = 10  # 0: only at the end
    save_every_minutes: float = 20  # besides after every evaluation
    save_every_steps: int = 0  # 0: by minutes only
    timeout_minutes: float = 10  # several processes: one without progress for this long ends, and the others with it


@dataclass
class Config:
    """Everything one run needs. `python train.py --cfg job --resolve` prints it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sharpness: SharpnessConfig = field(default_factory=SharpnessConfig)
    log: LogConfig = field(default_factory=LogConfig)
    init: str | None = None  # weights to start from: a run's directory or a .safetensors file under timm's names
    seed: int = 0


# Keys that say where and how fast, not what: two runs that differ only here are the same run.
MACHINE_KEYS = (
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
    "train.log_every",
    "train.save_every_minutes",
    "train.save_every_steps",
    "train.timeout_minutes",
)


@cache
def register_schema() -> None:
    """Give Hydra the dataclasses, so that a typo or a wrong type is an error."""
    ConfigStore.instance().store(name="schema", node=Config)


def config_dir() -> Path:
    """The folder of YAML files: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent
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


def to_dict(cfg: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, for JSON, YAML and W&B."""
    return dataclasses.asdict(cfg)


def config_hash(cfg: Config) -> str:
    """Eight hexadecimal digits of the configuration without its machine-only keys and its seed.

    Only what differs from the schema's defaults counts, so that a new field does not rename the runs of before. A
    default that changes results must therefore never be changed in place.
    """
    tree = to_dict(cfg)
    for key in MACHINE_KEYS:
        node, parts = tree, key.split(".")
        for part in parts[:-1]:
            node = node[part]
        del node[parts[-1]]
    del tree["seed"]
    start = Path(cfg.init) if cfg.init else None
    if start and start.parent == Path(cfg.log.runs_dir):  # a run's folder: where runs lie is the machine's business
        tree["init"] = f"runs/{start.name}"
    told = different(tree, to_dict(Config()))
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def different(tree: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """The part of a tree that differs from another."""
    told = {}
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            value = different(value, default[key])
            if value:
                told[key] = value
        elif key not in default or value != default[key]:
            told[key] = value
    return told


def run_id(cfg: Config) -> str:
    """<model>-<optim>-s<seed>-<hash>: equal on every rank, every requeue and every machine."""
    return f"{cfg.model.name}-{cfg.optim.name}-s{cfg.seed}-{config_hash(cfg)}"


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
