"""Evaluate weights on named test sets, exactly: counts, accuracy and its 95 % interval.

  sam-repro evaluate runs/vit_b32-gsam-s0-0123abcd --sets val,real,v2,r,c --eval-root /data/testsets
  sam-repro evaluate weights.safetensors --model tf_efficientnet_lite0 --root /data/imagenet --sets v1,real

A run brings its own configuration. Other weights are taken to be trained as timm says of the model (size, mean, std,
interpolation, crop) unless options say otherwise. Under torchrun or srun the ranks share the images.
"""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sam_repro.config.compose import choices, compose_config, nearest
from sam_repro.config.schema import Config, DataConfig, ModelConfig
from sam_repro.data.evalsets import SETS, canonical
from sam_repro.errors import UserError

if TYPE_CHECKING:  # torch and timm take seconds: `--help` and what is mistyped do without
    from torch import nn
from sam_repro.config.compose import read_config

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
    parser.add_argument("weights", type=Path, help="a run's directory, its step-*.pt, or a .safetensors file")
    parser.add_argument("--model", help="timm's name of the model, for weights that are not of a run")
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
    parser.add_argument("--std", type=float, nargs=3, help="likewise")
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
    import timm

    from sam_repro.models.build import build_model
    from sam_repro.models.pretrained import load as load_into
    from sam_repro.models.pretrained import read_weights

    folder = args.weights if args.weights.is_dir() else args.weights.parent
    if args.model is None and (folder / "config.yaml").exists():
        cfg = read_config(folder / "config.yaml")
        customise(cfg.data, args)
        model = build_model(cfg.model, num_classes=cfg.data.num_classes, image_size=cfg.data.image_size)
    elif args.model is not None:
        if args.model in choices("model"):
            its = compose_config([f"model={args.model}"]).model.timm
            raise UserError(f"--model takes timm's names: {args.model} is {its} there")
        if not timm.is_model(args.model):
            raise UserError(f"timm has no model '{args.model}'{nearest(args.model, timm.list_models())}")
        model = timm.create_model(args.model, **({"num_classes": args.num_classes} if args.num_classes else {}))
        cfg = Config(model=ModelConfig(args.model, args.model, "timm"), data=data_of(model))
        customise(cfg.data, args)
    else:
        raise UserError(f"{folder} has no config.yaml of a run; --model says which timm model these weights are of")
    load_into(model, read_weights(args.weights), f"{args.weights} does not fit {cfg.model.name}")
    return cfg, model


def data_of(model: nn.Module) -> DataConfig:
    """What timm says that the model's published weights want to see."""
    from timm.data import resolve_model_data_config

    wants = resolve_model_data_config(model)
    height, size = wants["input_size"][1:]
    if height != size:
        raise UserError(f"this model sees images of {height} x {size} pixels; only squares are evaluated")
    return DataConfig(
        name="imagenet",
        num_classes=model.num_classes,  # pyright: ignore[reportArgumentType]
        image_size=size,
        eval_resize=math.floor(size / wants["crop_pct"]),
        interpolation=wants["interpolation"] if wants["interpolation"] == "bilinear" else "bicubic",
        crop_mode=wants["crop_mode"] or "center",
        mean=list(wants["mean"]),
        std=list(wants["std"]),
        backend="torch",
    )


def customise(data: DataConfig, args: Namespace) -> None:
    """Lay the options that were given over `data`."""
    for key in OVERRIDES:
        if getattr(args, key) is not None:
            setattr(data, key, getattr(args, key))
    data.root, data.eval_root = args.root or data.root, args.eval_root or data.eval_root
    data.eval_batch_size = args.batch_size


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
