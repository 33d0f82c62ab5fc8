"""Batches of images: `build_loader` gives the same samples, order and crops with FFCV, without, and from memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.beton import fits_page_cache
from sam_repro.data.datasets import ArraySource, BetonSource, Source, ensure, open_source, root_of
from sam_repro.data.evalsets import EvalSet
from sam_repro.data.images import jpeg as native
from sam_repro.data.images.crop import PAD, Geometry, evaluation_geometry, training_geometry
from sam_repro.data.loaders.batch_order import Plan, balanced, holdout, noisy
from sam_repro.data.loaders.memory_loader import MemoryLoader, obstacle
from sam_repro.data.loaders.threads import worker_count
from sam_repro.data.loaders.torch_loader import TorchLoader
from sam_repro.errors import UserError

__all__ = ["Loader", "build_loader", "build_set_loader", "ensure", "resolve_backend"]


class Loader(Protocol):
    """Batches of one split on one rank."""

    backend: str  # ffcv | torch | memory | gpu
    reason: str  # why this backend, in one sentence
    samples: int  # of this split, all ranks together
    manifest: str  # 16 hexadecimal digits that name the data

    def __len__(self) -> int:
        """Batches an epoch on this rank."""
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

    Raises UserError when data.backend forces what cannot be.
    """
    if data.backend not in ("auto", "ffcv", "torch", "memory"):
        raise UserError(f"data.backend={data.backend} does not exist (choices: auto, ffcv, torch, memory)")
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
        raise UserError(f"data.backend=ffcv is impossible: {obstacle}")
    return "torch", obstacle


def resolve_decode(
    data: DataConfig, augment: AugmentConfig, source: Source, geometry: Geometry, device: torch.device
) -> tuple[str, str]:
    """(name of the decoder on the GPU, or '' for the processor; the reason) for training images.

    Evaluation always decodes on the processor, so that published counts do not depend on a GPU's decoder. "auto" does
    the same in training until somebody has measured the GPU's decoder to be faster (benchmarks/loader.py).

    Raises UserError when data.decode forces what cannot be.
    """
    if data.decode not in ("auto", "cpu", "gpu"):
        raise UserError(f"data.decode={data.decode} does not exist (choices: auto, cpu, gpu)")
    if data.decode != "gpu":
        return "", "decoded on the processor"
    decoder = ""
    if data.backend == "memory":
        obstacle = f"data.backend={data.backend} was asked for"
    elif device.type != "cuda":
        obstacle = "this run is on the CPU"
    elif augment.randaugment:
        obstacle = "RandAugment runs on the processor"
    elif geometry.mode == PAD:
        obstacle = "augment.crop=pad is for small images, which the processor keeps up with"
    elif isinstance(source, ArraySource) or (isinstance(source, BetonSource) and source.file.raw.all()):
        obstacle = "the images are no JPEGs"
    else:
        from sam_repro.data.images.gpu_decode import find_decoder

        decoder, obstacle = find_decoder(device)
    if not decoder:
        raise UserError(f"data.decode=gpu is impossible: {obstacle}")
    return decoder, f"decoded on the GPU by {decoder}"


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
        split: train (without the held-out part), minival (the held-out part of the training file), or val.
        training: shuffled, augmented and complete batches only; else in order, centre-cropped, every image once.
        batch_size: of this rank.
        seed: of the order, the augmentation and the sample; nothing else depends on it.
        sample: evaluate on this many images only, the classes in turn, their labels as training has them; 0: all.

    Raises:
        UserError: missing or damaged data, other classes than configured, more batch than data.
    """
    if split not in ("train", "minival", "val"):
        raise UserError(f"there is no split {split} (choices: train, minival, val)")
    backend, reason = resolve_backend(data)
    geometry = training_geometry(data, augment) if training else evaluation_geometry(data)
    with ExitStack() as unless_built:
        source = open_source(data, "val" if split == "val" else "train", batch_size * world if training else 0)
        unless_built.callback(source.close)
        members = _members(source.labels, data, split)
        if sample:
            members = members[balanced(source.labels[members], sample, seed)]
        plan = Plan(members, batch_size, seed, training, rank, world)
        if (training or sample) and data.label_noise:  # after the split, which goes by the true labels
            source.labels = noisy(source.labels, data.label_noise, data.num_classes)
        if training and len(plan) == 0:
            raise UserError(f"{split} has {len(plan.indices)} images, fewer than one batch of {batch_size * world}")
        magnitude = augment.randaugment if training else 0
        threads = worker_count(data.workers, world)
        loader: Loader
        decoder, where = resolve_decode(data, augment, source, geometry, device) if training else ("", "")
        if backend == "memory" or (data.backend == "auto" and data.decode != "gpu" and device.type == "cuda"):
            why_not = obstacle(source, plan, geometry, device, magnitude=magnitude)
            if not why_not:
                loader = MemoryLoader(source, plan, geometry, workers=threads, device=device)
                loader.reason = reason if backend == "memory" else "it fits on the device"
                unless_built.pop_all()  # the loader has closed it
                return loader
            if backend == "memory":
                raise UserError(f"data.backend=memory is impossible: {why_not}")
        if training:
            reason = where if decoder else f"{reason}; {where}"
            if not decoder and native.load():
                reason += f"; whole images instead of crops, since {native.load()}"
        more = {"workers": threads, "device": device, "magnitude": magnitude}
        loader = _loader(source, plan, geometry, ffcv=backend == "ffcv", decoder=decoder, **more)
        loader.reason = reason
        unless_built.pop_all()  # the loader closes it
        return loader


def build_set_loader(
    eval_set: EvalSet, *, batch_size: int, rank: int = 0, world: int = 1, device: torch.device
) -> Loader:
    """The loader of an evaluation set: every member once, (images, sample numbers); see data/evalsets.py."""
    data = eval_set.data
    plan = Plan(eval_set.members, batch_size, 0, False, rank, world)
    ffcv = data.backend != "torch" and importlib.util.find_spec("ffcv") is not None
    geometry = evaluation_geometry(data)
    return _loader(eval_set.source, plan, geometry, ffcv=ffcv, workers=worker_count(data.workers, world), device=device)


def _loader(
    source: Source,
    plan: Plan,
    geometry: Geometry,
    *,
    ffcv: bool,
    workers: int,
    device: torch.device,
    magnitude: int = 0,
    decoder: str = "",
) -> Loader:
    if decoder:
        from sam_repro.data.images.gpu_decode import DECODERS
        from sam_repro.data.loaders.gpu_loader import GPULoader

        return GPULoader(source, plan, geometry, workers=workers, device=device, decode=DECODERS[decoder])
    if ffcv and isinstance(source, BetonSource):
        from sam_repro.data.loaders.ffcv_loader import FFCVLoader  # importing ffcv takes seconds: only when it is used

        return FFCVLoader(source, plan, geometry, workers=workers, device=device, magnitude=magnitude)
    return TorchLoader(source, plan, geometry, workers=workers, device=device, magnitude=magnitude)


def _members(labels: np.ndarray, data: DataConfig, split: str) -> np.ndarray:
    """The sample numbers of a split within its source."""
    if split == "val":
        return np.arange(len(labels))
    if not 0 < data.train_fraction <= 1:
        raise UserError(f"data.train_fraction={data.train_fraction} is not in (0, 1]")
    train, minival = holdout(labels, data.train_fraction)
    if split == "train":
        return train
    if len(minival) == 0:
        raise UserError(
            f"data.train_fraction={data.train_fraction} holds none of {len(labels)} images out: 1 trains on all of "
            "them, 0.9 keeps a tenth back to choose on"
        )
    return minival
