"""Batches of images: `build_loader` gives the same samples, order and crops with FFCV, without, and from memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.beton import fits_page_cache
from sam_repro.data.datasets import BetonSource, Source, ensure, open_source, root_of
from sam_repro.data.evalsets import EvalSet
from sam_repro.data.images import jpeg
from sam_repro.data.images.crop import Geometry, evaluation_geometry, training_geometry
from sam_repro.data.loaders.batch_order import BatchPlan, balanced, holdout, noisy
from sam_repro.data.loaders.memory_loader import MemoryLoader, memory_obstacle
from sam_repro.data.loaders.threads import worker_count
from sam_repro.data.loaders.torch_loader import TorchLoader
from sam_repro.errors import UserError, plural

__all__ = ["Loader", "build_loader", "build_set_loader", "ensure", "resolve_backend"]


class Loader(Protocol):
    """Batches of one split on one rank."""

    backend: str  # ffcv | torch | memory
    reason: str  # why this backend, in one sentence
    samples: int  # of this split, all ranks together
    manifest: str  # 16 hexadecimal digits that name the data

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start, start + 1, ... of one epoch: (images uint8 [B, 3, H, W], labels int64 [B]) on the device.

        Images have channels-last strides. Every batch is a fresh tensor and may be kept. Leaving early is fine: close
        the iterator, or let it go, and its threads are idle again. An unreadable sample raises UserError.
        """
        ...

    def close(self) -> None:
        """End the threads and close the file."""
        ...


def resolve_backend(data: DataConfig) -> tuple[str, str]:
    """(backend, the reason in one sentence) for this data on this machine.

    Raises UserError when data.backend=ffcv is impossible.
    """
    if data.backend in ("torch", "memory"):
        return data.backend, f"data.backend={data.backend} was asked for"
    ensure(data)
    if data.name == "synthetic":
        obstacle = "synthetic images are made in memory"
    elif not (root_of(data) / "train.beton").exists():
        obstacle = f"{root_of(data)} has class folders and no train.beton, which `sam-repro write` makes"
    elif importlib.util.find_spec("ffcv") is None:
        obstacle = "ffcv is not installed"
    else:
        beton = root_of(data) / "train.beton"
        cached = (
            "it fits the page cache" if fits_page_cache(beton) else "it exceeds 70 % of the free memory: read directly"
        )
        return "ffcv", f"ffcv is installed and {beton} exists; {cached}"
    if data.backend == "ffcv":
        raise UserError(f"data.backend=ffcv cannot be used: {obstacle}")
    return "torch", obstacle


def build_loader(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    split: str,
    training: bool,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device,
    sample: int = 0,
) -> Loader:
    """The loader of one split on one rank.

    Args:
        data, augment: checked by config.checks.
        split: train (without the held-out part), minival (the held-out part of the training file), or val.
        training: shuffled, augmented and complete batches only; else in order, centre-cropped, every image once.
        batch_size: of this rank.
        seed: of the order, the augmentation and the sample; nothing else depends on it.
        rank, world: this process among all of them.
        device: where the batches go.
        sample: evaluate on this many images only, the classes in turn, their labels as training has them; 0: all.

    Raises:
        UserError: missing or damaged data, other classes than configured, more batch than data, a backend that is
            impossible here.
    """
    backend, reason = resolve_backend(data)
    geometry = training_geometry(data, augment) if training else evaluation_geometry(data)
    magnitude = augment.randaugment if training else 0
    source = open_source(data, "val" if split == "val" else "train", batch_size * world if training else 0)
    with _closed_on_error(source):
        members = _members(source.labels, data, split)
        if sample:
            members = members[balanced(source.labels[members], sample, seed)]
        plan = BatchPlan(members, batch_size, seed, training, rank, world)
        if training and len(plan) == 0:
            raise UserError(
                f"{split} has {plural(len(members), 'image')}, fewer than one batch of {batch_size * world}: "
                f"set recipe.batch_size to {len(members)} at most"
            )
        if (training or sample) and data.label_noise:  # after the split, which goes by the true labels
            source.labels = noisy(source.labels, data.label_noise, data.num_classes)
        threads: dict[str, Any] = {"workers": worker_count(data.workers, world), "device": device}
        if backend == "memory" or (data.backend == "auto" and device.type == "cuda"):
            obstacle = memory_obstacle(source, plan, geometry, device, magnitude=magnitude)
            if not obstacle:
                reason = reason if backend == "memory" else "it fits on the device"
                return MemoryLoader(source, plan, geometry, reason=reason, **threads)
            if backend == "memory":
                raise UserError(f"data.backend=memory cannot be used: {obstacle}")
        if training and jpeg.load():
            reason += f"; whole images instead of crops, since {jpeg.load()}"
        threads |= {"magnitude": magnitude, "reason": reason}
        return _streaming_loader(source, plan, geometry, ffcv=backend == "ffcv", **threads)


def build_set_loader(
    eval_set: EvalSet, *, batch_size: int, rank: int = 0, world: int = 1, device: torch.device
) -> Loader:
    """The loader of an evaluation set: every member once, (images, sample numbers); see data/evalsets.py."""
    data = eval_set.data
    plan = BatchPlan(eval_set.members, batch_size, 0, False, rank, world)
    ffcv = data.backend != "torch" and importlib.util.find_spec("ffcv") is not None
    threads = {"workers": worker_count(data.workers, world), "device": device}
    return _streaming_loader(eval_set.source, plan, evaluation_geometry(data), ffcv=ffcv, **threads)


def _streaming_loader(
    source: Source, plan: BatchPlan, geometry: Geometry, *, ffcv: bool, **options: Any
) -> TorchLoader:
    if ffcv and isinstance(source, BetonSource):
        from sam_repro.data.loaders.ffcv_loader import FFCVLoader  # importing ffcv takes seconds: only when it is used

        return FFCVLoader(source, plan, geometry, **options)
    return TorchLoader(source, plan, geometry, **options)


@contextmanager
def _closed_on_error(source: Source) -> Iterator[None]:
    """Close the source when the block raises; else the loader closes it."""
    try:
        yield
    except BaseException:
        source.close()
        raise


def _members(labels: np.ndarray, data: DataConfig, split: str) -> np.ndarray:
    """int64: the sample numbers of a split within its source, sorted."""
    if split == "val":
        return np.arange(len(labels))
    train, minival = holdout(labels, data.train_fraction)
    if split == "train":
        return train
    assert split == "minival", split
    if len(minival) == 0:
        raise UserError(
            f"data.train_fraction={data.train_fraction} holds none of {plural(len(labels), 'image')} out: "
            "1 trains on all of them, 0.9 keeps a tenth back to choose on"
        )
    return minival
