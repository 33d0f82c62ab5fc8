"""Data sets in torchvision's layouts, downloaded by torchvision where it can: what `sam-repro write` reads.

What the transfer study uses: CIFAR (train / test), Flowers-102 (train + val, 2,040 / test, 6,149), Pets (trainval /
test, 37 breeds). Imagenette and Imagewoof are class folders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sam_repro.data.write.layouts import Splits, folders, of_arrays, of_files
from sam_repro.errors import UserError


def _open(make: Callable[..., Any], src: Path, download: bool, **which: str | bool) -> Any:
    """One torchvision data set; its complaints become one sentence."""
    try:
        return make(str(src), download=download, **which)
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())  # an URLError wraps what went wrong
        if download:
            raise UserError(f"cannot download {make.__name__} to {src}: {reason}") from None
        raise UserError(
            f"{make.__name__} is not in {src} in torchvision's layout: {reason}; --download fetches it"
        ) from None


def _cifar(name: str, src: Path, download: bool) -> Splits:
    from torchvision import datasets

    result: Splits = {}
    for split, train in (("train", True), ("val", False)):
        data = _open(getattr(datasets, name), src, download, train=train)
        result[split] = of_arrays(list(data.classes), np.array(data.targets), data.data, "train" if train else "test")
    return result


def cifar10(src: Path, download: bool = False) -> Splits:
    """CIFAR-10, stored without loss."""
    return _cifar("CIFAR10", src, download)


def cifar100(src: Path, download: bool = False) -> Splits:
    """CIFAR-100 with its 100 fine labels, stored without loss."""
    return _cifar("CIFAR100", src, download)


def flowers(src: Path, download: bool = False) -> Splits:
    """Oxford Flowers-102: train and val together for training, test for results."""
    from torchvision.datasets import Flowers102

    parts = {name: _open(Flowers102, src, download, split=name) for name in ("train", "val", "test")}
    classes = [f"{i:03}" for i in range(1, 103)]
    result: Splits = {}
    for split, names in (("train", ("train", "val")), ("val", ("test",))):
        files = [file for name in names for file in parts[name]._image_files]
        labels = [label for name in names for label in parts[name]._labels]
        result[split] = of_files(classes, labels, files[0].parent, [file.name for file in files])
    return result


def pets(src: Path, download: bool = False) -> Splits:
    """Oxford-IIIT Pets, 37 breeds: trainval for training, test for results."""
    from torchvision.datasets import OxfordIIITPet

    result: Splits = {}
    for split, name in (("train", "trainval"), ("val", "test")):
        data = _open(OxfordIIITPet, src, download, split=name)
        files = data._images
        result[split] = of_files(list(data.classes), data._labels, files[0].parent, [file.name for file in files])
    return result


def imagenette(src: Path, download: bool = False) -> Splits:
    """Imagenette: ten easy classes of ImageNet, as class folders."""
    if download:
        from torchvision.datasets import Imagenette

        for split in ("train", "val"):
            _open(Imagenette, src, not (src / "imagenette2").is_dir(), split=split)
    return folders(src / "imagenette2" if (src / "imagenette2").is_dir() else src)
