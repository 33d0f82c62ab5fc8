"""Start from given weights: `init=<run directory or file>`, for fine-tuning."""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from sam_repro.errors import UserError
from sam_repro.records.files import sha256

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".th")
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "encoder.", "backbone.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a run's directory or a file, by name, in fp32 where floating.

    Files of torch.save may hold them in a dictionary under a name that is usual; an average over training (EMA) comes
    before the weights that it is of, as in timm.

    Raises:
        UserError: for a file of another kind, a damaged one, or one without weights.
    """
    path = Path(path).expanduser()
    path = path / "model.safetensors" if path.is_dir() else path
    if path.exists():
        check_digest(path)
    if path.suffix not in (*TORCH_FILES, ".safetensors") and path.exists():
        raise UserError(
            f"cannot read the weights {path}: they must be .safetensors, or torch's {', '.join(TORCH_FILES)}"
        )
    try:
        state = load_file(path) if path.suffix == ".safetensors" else load_pickle(path, torch.device("cpu"))
    except Exception as error:  # each library has its own for a missing or damaged file
        raise UserError(f"cannot read the weights {path}: {' '.join(str(error).split())[:200]}") from None
    while isinstance(state, dict) and (inside := next((w for w in WRAPPERS if isinstance(state.get(w), dict)), None)):
        state = state[inside]
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        keys = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"cannot read the weights {path}: it has no state dict of tensors, but {keys}")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def is_of_a_run(path: Path) -> bool:
    """Whether `path` is a run's directory, or a model.safetensors that a run has left."""
    if path.suffix != ".safetensors":
        return path.is_dir()
    try:
        with safe_open(path, "pt") as file:
            return bool({"sam_repro", "run_id"} & (file.metadata() or {}).keys())
    except Exception:  # the library's own for a damaged file, which is said where it is read
        return False


def unprefixed(weights: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The weights without what wrappers put before all names (DistributedDataParallel, torch.compile, Lightning).

    Args:
        own: the names in the model. What has not the prefix is no part of the model, such as a count of averages.
    """
    for prefix in PREFIXES:
        inner = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        inner = unprefixed(inner, own) if inner else {}
        if len(inner.keys() & set(own)) > len(weights.keys() & set(own)):
            return inner
    return weights


def check_digest(path: Path) -> None:
    """Raise UserError where the model card next to a run's weights says that they were others."""
    card = path.with_name("model_card.md")
    if path.name != "model.safetensors" or not card.is_file():
        return
    known = re.search(r"^SHA-256 of model\.safetensors: (\w+)$", card.read_text(errors="replace"), re.MULTILINE)
    if known and sha256(path) != known[1]:
        raise UserError(f"{path} is not the file that {card.name} describes: its SHA-256 differs, so it is damaged")


def load_pickle(path: Path, device: torch.device) -> Any:
    """What torch.save wrote: tensors, numbers, text, lists and dictionaries of them.

    Raises:
        ValueError: if the file holds anything else, which could run code while it is read.
    """
    try:
        with torch.serialization.safe_globals([Namespace]):  # a record of arguments, as most training scripts save
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:  # torch's message advises to load it all the same
        raise ValueError("it is damaged, or holds objects that could run code when they are loaded") from None


def load(model: nn.Module, weights: dict[str, Tensor], refusal: str) -> None:
    """Load all of them. Raises UserError, which begins with `refusal` and names the first tensor that does not fit."""
    weights = unprefixed(weights, model.state_dict().keys())
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
    own, adapted = model.state_dict(), []
    weights = unprefixed(read_weights(path), own)
    head = model.get_classifier()  # pyright: ignore[reportCallIssue]
    parts = head if isinstance(head, tuple) else (head,)  # a distilled DeiT has two
    heads = [name for name, module in model.named_modules() if any(module is part for part in parts)]
    for name in [n for prefix in heads for n in (f"{prefix}.weight", f"{prefix}.bias") if n in own]:
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
