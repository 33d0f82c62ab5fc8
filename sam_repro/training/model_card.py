"""The model card: how to load the weights, how good they are, and how to make them again."""

from __future__ import annotations

import shlex
from typing import Any

import timm

from sam_repro.config.schema import ModelConfig
from sam_repro.errors import plural
from sam_repro.models.build import MIXERS, creation_kwargs
from sam_repro.records.ledger import Row


def model_card(row: Row) -> str:
    """The Markdown text for the row of a run that is done."""
    config, data = row["config"], row["config"]["data"]
    scores = [
        f"| {name} | {c['correct']:,} / {c['total']:,} | {100 * c['correct'] / c['total']:.2f} % |"
        for name, c in row["evals"].items()
    ]
    lines = [
        f"# {row['run_id']}",
        "",
        f"{config['model']['name']} trained on {data['name']} with {config['optim']['name']}, seed {row['seed']}, "
        f"{plural(row['step'], 'step', ',')} of {plural(config['recipe']['batch_size'], 'image')}, "
        f"groups of m = {row['m']}.",
        "",
        "| split | correct | top-1 |",
        "|---|---|---|",
        *scores,
        "",
        *sharpness_paragraph(row),
        f"Commit {row['commit'][:12]}{' with uncommitted changes' if row['dirty'] else ''}, {row['world']} x "
        f"{row['hardware']}, {row['dtype']}, {row['hours']:.3f} processor hours, torch {row['versions'].get('torch')}, "
        f"timm {row['versions'].get('timm')}, data {row['manifest']}, finished {row['finished']}.",
        "",
        "The weights are in `model.safetensors`, under timm's own names. To load them:",
        "",
        *[f"    {line}" for line in loading_lines(config["model"], data["num_classes"], data["image_size"])],
        "",
        f"SHA-256 of model.safetensors: {row['weights_sha256']}",
        "",
        f"The model takes RGB images of {data['image_size']} px, normalised with mean {data['mean']} and std "
        f"{data['std']}. To train it again:",
        "",
        f"    sam-repro train {shlex.join(row['overrides'])}",
        "",
        "Known departures from the papers: docs/DEVIATIONS.md of sam-repro.",
    ]
    return "\n".join(lines) + "\n"


def loading_lines(model: dict[str, Any], num_classes: int, image_size: int) -> list[str]:
    """Python code that makes the network and loads the weights; it needs sam_repro only if timm cannot do it.

    Args:
        model: cfg.model as a dictionary.
    """
    kwargs = creation_kwargs(ModelConfig(**model), num_classes=num_classes, image_size=image_size)
    kwargs.pop("weight_init", None)
    name = model["timm"]
    ours = name in MIXERS or not timm.is_model(name)  # timm's Mixers take no other size
    make = "create" if ours else "timm.create_model"
    arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    return [
        "from safetensors.torch import load_file",
        "from sam_repro.models.build import create" if ours else "import timm",
        "",
        f"model = {make}({name!r}, {arguments})",
        'model.load_state_dict(load_file("model.safetensors"))',
    ]


def sharpness_paragraph(row: Row) -> list[str]:
    """A paragraph about the final curvature, or nothing."""
    s = row.get("sharpness", {})
    if "lambda_max" not in s:
        return []
    return [
        f"The top eigenvalue of the Hessian is {s['lambda_max']:.4g} (relative residual {s['residual']:.0e}). The "
        f"surrogate gap h is {s['surrogate_gap']:.4g} at rho {s['rho']:.3g}. Both are of the training loss, on "
        f"{plural(s['images'], 'image')}.",
        "",
    ]
