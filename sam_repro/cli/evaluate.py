"""Evaluate weights on named test sets: exact counts, accuracy and its 95 % interval.

  sam-repro evaluate runs/vit_b32-gsam-s0-0123abcd --sets val,real,v2,r,c --eval-root /data/testsets
  sam-repro evaluate weights.safetensors --model tf_efficientnet_lite0 --root /data/imagenet --sets v1,real

A run has its own configuration. For other weights (.safetensors, or torch's .pt, .pth, .bin, .ckpt, .tar), size, mean,
std, interpolation and crop are what timm says about the model. Options override this. If timm and configs/model have
the same name, timm's model is meant, unless a run made the weights. Under torchrun or srun the ranks share the images.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sam_repro.config.checks import check_images, check_limits
from sam_repro.config.compose import compose_config, nearest, read_config
from sam_repro.config.files import choices
from sam_repro.config.schema import Config, DataConfig, ModelConfig
from sam_repro.data.evalsets import SETS, canonical
from sam_repro.errors import UserError

if TYPE_CHECKING:  # torch and timm take seconds: `--help` and what is mistyped do without
    from torch import nn

OVERRIDES = (
    "backend",
    "image_size",
    "eval_resize",
    "interpolation",
    "crop_mode",
    "mean",
    "std",
    "workers",
    "num_classes",
)


def add_arguments(parser: ArgumentParser) -> None:
    """The options of `sam-repro evaluate`."""
    parser.add_argument("weights", type=Path, help="a run's directory, its step-*.pt, or a file of weights")
    parser.add_argument("--model", help="its name in configs/model or in timm, for weights without a run's directory")
    parser.add_argument("--sets", default="val", help=f"comma-separated: v1, {', '.join(SETS)} (default: val)")
    parser.add_argument("--root", help="folder with val.beton or val/<class>/*; default: that of the run")
    parser.add_argument("--eval-root", help="folder of the published V2, R and C; default: --root")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time on each rank")
    parser.add_argument("--backend", choices=("auto", "ffcv", "torch"), help="default: that of the run, else torch")
    parser.add_argument("--image-size", type=int, help="side of the model's input in pixels")
    parser.add_argument("--eval-resize", type=int, help="side in pixels before the centre crop")
    parser.add_argument("--interpolation", choices=("area", "bilinear", "bicubic"), help="of that resize")
    parser.add_argument("--crop-mode", choices=("center", "squash", "border"), help="which sides become --eval-resize")
    parser.add_argument("--mean", type=float, nargs=3, help="of pixels in [0, 1]")
    parser.add_argument("--std", type=float, nargs=3, help="standard deviation of normalised pixels, RGB")
    parser.add_argument("--test-size", action="store_true", help="timm's size and crop for tests, where it has others")
    parser.add_argument("--num-classes", type=int, help="outputs of the model")
    parser.add_argument("--workers", type=int, help="decoding threads; default: this machine's cores, at most 16")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")


def run(args: Namespace) -> int:
    """Evaluate and print; returns the exit code. Raises UserError for bad input."""
    names = canonical(args.sets.split(","))
    from sam_repro.distributed.ranks import init_ranks
    from sam_repro.models.objective import forward_of
    from sam_repro.training.evaluate import evaluate_sets

    cfg, model = load(args)
    ranks = init_ranks(args.device)
    try:
        if ranks.main:
            print(shown(cfg), file=sys.stderr)
        model.to(ranks.device).eval()
        forward = forward_of(cfg, model, ranks.device, bf16=args.bf16)
        counts = evaluate_sets(lambda x: forward({}, x), cfg.data, names, ranks, progress=ranks.main)
    finally:
        ranks.close()
    if ranks.main:
        for name, count in counts.items():
            print(describe(name, count))
        if args.json:
            try:
                args.json.write_text(json.dumps(counts, indent=1) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {args.json}: {error}") from None
    return 0


def load(args: Namespace) -> tuple[Config, nn.Module]:
    """The configuration and the model with its weights."""
    if not args.weights.exists():
        raise UserError(f"there is no {args.weights}")
    if args.weights.is_dir() and not (args.weights / "model.safetensors").exists():
        raise UserError(f"{args.weights} has no model.safetensors: its run has not ended; name a checkpoint, step-*.pt")
    from sam_repro.models.build import build_model, check_image_size
    from sam_repro.models.pretrained import load as load_into
    from sam_repro.models.pretrained import read_weights

    folder = args.weights if args.weights.is_dir() else args.weights.parent
    if args.model is None and not (folder / "config.yaml").exists():
        raise UserError(f"{folder} has no config.yaml of a run; --model says which model these weights are of")
    if args.model is None or is_ours(args.model, args.weights):
        cfg = compose_config([f"model={args.model}"]) if args.model else read_config(folder / "config.yaml")
        customise(cfg.data, args)
        model = build_model(cfg.model, num_classes=cfg.data.num_classes, image_size=cfg.data.image_size)
    else:
        model = timm_model(args)
        data = data_of(model, args.image_size, test_size=args.test_size)
        cfg = Config(model=ModelConfig(args.model, args.model, "other"), data=data)
        customise(cfg.data, args)
        check_image_size(model, args.model, cfg.data.image_size)
    load_into(model, read_weights(args.weights), f"{args.weights} does not fit {cfg.model.name}")
    return cfg, model


def is_ours(name: str, weights: Path) -> bool:
    """Whether --model names a model of configs/model: timm does not have it, or a run here made the weights."""
    import timm

    from sam_repro.models.pretrained import is_of_a_run

    return name in choices("model") and (not timm.is_model(name) or is_of_a_run(weights))


def timm_model(args: Namespace) -> nn.Module:
    """timm's network --model, for the number of classes and the size of images that were given."""
    import timm

    from sam_repro.models.build import takes_size

    if not timm.is_model(args.model):
        names = [*choices("model"), *timm.list_models()]
        raise UserError(f"there is no model '{args.model}' here or in timm{nearest(args.model, names)}")
    given: dict[str, int | None] = {"num_classes": args.num_classes}
    if takes_size(args.model):
        given["img_size"] = args.image_size
    try:
        return timm.create_model(args.model, **{key: value for key, value in given.items() if value is not None})
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"timm's {args.model} refused {given}: {error}") from None


def data_of(model: nn.Module, image_size: int | None, *, test_size: bool) -> DataConfig:
    """The data settings of timm for the model's published weights, with timm's margin if `image_size` is another.

    `test_size` takes the size and the margin that timm has for tests, where they are others than for training.
    """
    from timm.data import resolve_model_data_config

    wants = resolve_model_data_config(model, use_test_size=test_size)
    channels, height, size = wants["input_size"]
    if (channels, height) != (3, size):
        raise UserError(
            f"this model takes {channels} x {height} x {size} numbers; `evaluate` has square RGB images only"
        )
    if not model.num_classes:
        raise UserError("timm has no classifier for this model: --num-classes says how many outputs yours has")
    return DataConfig(
        name="imagenet",
        num_classes=model.num_classes,  # pyright: ignore[reportArgumentType]
        image_size=image_size or size,
        eval_resize=math.floor((image_size or size) / wants["crop_pct"]),
        interpolation=wants["interpolation"],
        crop_mode=wants["crop_mode"] or "center",
        mean=list(wants["mean"]),
        std=list(wants["std"]),
        backend="torch",
    )


def customise(data: DataConfig, args: Namespace) -> None:
    """Lay the options that were given over `data`. Raises UserError if they do not fit together."""
    for key in OVERRIDES:
        if getattr(args, key) is not None:
            setattr(data, key, getattr(args, key))
    data.root, data.eval_root = args.root or data.root, args.eval_root or data.eval_root
    data.eval_batch_size = args.batch_size
    check_limits(data, "data.")
    check_images(data)


def shown(cfg: Config) -> str:
    """How the images are shown to the model, to compare with training."""
    d = cfg.data
    view = f"{d.image_size} px of {d.eval_resize} ({d.crop_mode}, {d.interpolation})"
    return f"{cfg.model.name} sees {view}, mean {d.mean}, std {d.std}"


def describe(name: str, count: dict) -> str:
    """One line: accuracy, counts, Wilson's interval; for c the mean over its parts and mCE."""
    correct, total = count["correct"], count["total"]
    p, z = correct / total, 1.959964
    centre, spread = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    low, high = (100 * (centre + sign * spread) / (1 + z * z / total) for sign in (-1, 1))
    line = f"{name:<13}{100 * p:6.2f} %  {correct:,} of {total:,}  (95 %: {low:.2f} to {high:.2f})"
    if "mce" in count:
        line += f"  mean over 75 parts {count['mean']:.2f} %, mCE {count['mce']:.2f}"
    return line
