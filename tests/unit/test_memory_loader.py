"""The loader that keeps a data set on the device: the samples, order and pixels of the threads' loader."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.beton import write_beton
from sam_repro.data.loaders.build import build_loader
from sam_repro.data.manifest import write_manifest
from sam_repro.errors import UserError

COUNT, CLASSES, SIDE = 90, 5, 24
AUGMENTS = {
    "inception": {"crop": "inception"},
    "pad": {"crop": "pad", "pad": 3},
    "pad without flip": {"crop": "pad", "pad": 2, "flip": False},
    "none": {"crop": "none"},
}


@pytest.fixture(scope="module", params=["mixed sizes", "one size"])
def root(request, tmp_path_factory) -> Path:
    """train.beton and val.beton of noisy images."""
    folder = tmp_path_factory.mktemp("memory")
    for split in ("train", "val"):
        samples = [sample(i, mixed=request.param == "mixed sizes") for i in range(COUNT)]
        write_beton(folder / f"{split}.beton", samples, capacity=COUNT)
        write_manifest(folder / f"{split}.beton", [f"c{i}" for i in range(CLASSES)])
    return folder


def sample(i: int, *, mixed: bool) -> tuple[bytes, int, int, int, bool]:
    height, width = (30 + i % 9, 18 + 2 * (i % 13)) if mixed else (SIDE, SIDE)
    pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes(), height, width, i % CLASSES, False


def batches(root: Path, backend: str, augment: dict, *, split="train", training=True, batch=16, start=0, **more):
    data = DataConfig(name="x", root=str(root), num_classes=CLASSES, image_size=SIDE, eval_resize=28, backend=backend)
    data.train_fraction = 0.8
    loader = build_loader(
        data, AugmentConfig(name="x", **augment), split=split, training=training, batch_size=batch, seed=3,
        device=torch.device("cpu"), **more,
    )  # fmt: skip
    assert loader.backend == backend
    found = [batch for epoch in (0, 5) for batch in loader.epoch(epoch, start)]
    loader.close()
    return found, len(loader), loader.samples, loader.manifest


def same(a, b) -> None:
    assert a[1:] == b[1:] and len(a[0]) == len(b[0])
    for (x, y), (u, v) in zip(a[0], b[0], strict=True):
        assert x.dtype == torch.uint8 and x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, u) and torch.equal(y, v) and y.dtype == torch.int64


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_training_pixels_are_equal(root, augment):
    same(batches(root, "memory", augment), batches(root, "torch", augment))
    part = {"rank": 1, "world": 2, "batch": 8, "start": 2}
    same(batches(root, "memory", augment, **part), batches(root, "torch", augment, **part))


@pytest.mark.parametrize("split", ["minival", "val"])
def test_evaluation_pixels_are_equal(root, split):
    view = {"split": split, "training": False, "batch": 7}
    same(batches(root, "memory", {}, **view), batches(root, "torch", {}, **view))


def test_generated_images():
    data = DataConfig(name="synthetic", num_classes=CLASSES, image_size=16, eval_resize=16)
    options = {"split": "train", "training": True, "batch_size": 32, "seed": 0, "device": torch.device("cpu")}
    found = []
    for data.backend in ("memory", "torch"):
        loader = build_loader(data, AugmentConfig(name="x"), **options)
        found.append([x for x, _ in loader.epoch(1)])
        loader.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_cannot_be_held_is_one_sentence(root):
    with pytest.raises(UserError, match="RandAugment"):
        batches(root, "memory", {"randaugment": 10})


def test_generated_images_are_as_many_as_a_batch_needs():
    data = DataConfig(name="synthetic", num_classes=1000, image_size=16, eval_resize=16, backend="torch", workers=1)
    kinds = {"split": "train", "training": True, "batch_size": 300, "world": 2, "device": torch.device("cpu")}
    loader = build_loader(data, AugmentConfig(name="none"), rank=1, seed=0, **kinds)
    ((images, labels),) = loader.epoch(0)
    assert loader.samples == 600 and images.shape == (300, 3, 16, 16) and labels.max() < 256
    loader.close()
