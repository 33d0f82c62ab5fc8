"""Start from given weights: `init=<run directory or .safetensors file>`, for fine-tuning."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from sam_repro.errors import UserError
from sam_repro.records.files import sha256


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """timm-named weights of a run's directory, a checkpoint or a .safetensors file, in fp32 where floating."""
    path = Path(path).expanduser()
    path = path / "model.safetensors" if path.is_dir() else path
    if path.exists():
        check_digest(path)
    try:
        state = load_pickle(path, torch.device("cpu"))["model"] if path.suffix == ".pt" else load_file(path)
    except Exception as error:  # each library has its own for a missing or damaged file
        raise UserError(f"cannot read the weights {path}: {' '.join(str(error).split())[:200]}") from None
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def check_digest(path: Path) -> None:
    """Raise UserError where the model card beside a run's weights says that they were others."""
    card = path.with_name("model_card.md")
    if path.name != "model.safetensors" or not card.is_file():
        return
    known = re.search(r"^SHA-256 of model\.safetensors: (\w+)$", card.read_text(errors="replace"), re.MULTILINE)
    if known and sha256(path) != known[1]:
        raise UserError(f"{path} is not the file that {card.name} describes: its SHA-256 is another, so it is damaged")


def load_pickle(path: Path, device: torch.device) -> Any:
    """What torch.save wrote: tensors, numbers, text, lists and dictionaries of them.

    Raises:
        ValueError: if the file holds anything else, which could run code while it is read.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:  # torch's message advises to load it all the same
        raise ValueError("it is damaged, or holds objects that could run code when they are loaded") from None


def load(model: nn.Module, weights: dict[str, Tensor], refusal: str) -> None:
    """Load all of them. Raises UserError, which begins with `refusal` and names the first tensor that does not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError:  # torch lists them all
        own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        theirs = {name: list(tensor.shape) for name, tensor in weights.items()}
        odd = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
        raise UserError(
            f"{refusal}: {len(odd)} of its tensors differ, the first is {odd[0]}, "
            f"{theirs.get(odd[0], 'missing')} in the file and {own.get(odd[0], 'unknown')} to the model"
        ) from None


def start_from(model: nn.Module, path: str | Path) -> str:
    """Load the weights at `path` into `model`; say in one sentence what was adapted.

    The head stays as it is where the number of classes differs. Position embeddings are interpolated (bicubic) where
    the resolution differs.

    Raises:
        UserError: if the file cannot be read or is of another network.
    """
    weights, adapted = read_weights(path), []
    own = model.state_dict()
    head = model.get_classifier()  # pyright: ignore[reportCallIssue]
    heads = [name for name, module in model.named_modules() if module is head]
    for name in [f"{prefix}.{kind}" for prefix in heads for kind in ("weight", "bias")]:
        if name not in weights or weights[name].shape != own[name].shape:
            weights[name] = own[name]
            adapted += [] if name.endswith("bias") else ["a new head"]
    if "pos_embed" in weights and "pos_embed" in own and weights["pos_embed"].shape != own["pos_embed"].shape:
        theirs, ours = weights["pos_embed"].shape, own["pos_embed"].shape
        side, old = ((shape[1] - int(model.num_prefix_tokens)) ** 0.5 for shape in (ours, theirs))
        if ours[-1] == theirs[-1] and side % 1 == old % 1 == 0:
            weights["pos_embed"] = resample_abs_pos_embed(
                weights["pos_embed"], [int(side)] * 2, num_prefix_tokens=model.num_prefix_tokens
            )
            adapted.append(f"position embeddings from {int(old)}x{int(old)} to {int(side)}x{int(side)}")
    load(model, weights, f"init={path} is of another network")
    return f"started from {path}" + (f" with {' and '.join(adapted)}" if adapted else "")
