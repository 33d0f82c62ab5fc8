"""A loader or a test set that cannot be opened leaves no file open, whatever stops it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch

from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.beton import write_beton
from sam_repro.data.evalsets import open_set
from sam_repro.data.loaders.build import build_loader
from sam_repro.data.manifest import manifest_path, write_manifest
from sam_repro.errors import UserError

PIXELS = np.zeros((24, 24, 3), np.uint8)
JPEG = cv2.imencode(".jpg", PIXELS)[1].tobytes()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        write_beton(tmp_path / f"{split}.beton", [(JPEG, 24, 24, i % 2, False) for i in range(8)], capacity=8)
        write_manifest(tmp_path / f"{split}.beton", ["a", "b"])
    return tmp_path


def build(root: Path, *, split: str = "train", batch: int = 4, randaugment: int = 0, **changes):
    keys = {"name": "x", "root": str(root), "num_classes": 2, "image_size": 24, "eval_resize": 24, "backend": "torch"}
    return build_loader(
        DataConfig(**keys | changes), AugmentConfig(name="light", randaugment=randaugment),
        split=split, training=True, batch_size=batch, seed=0, device=torch.device("cpu"),
    )  # fmt: skip


def open_betons(root: Path) -> list[str]:
    return [file.path for file in psutil.Process().open_files() if file.path.startswith(str(root))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 3}, "data.num_classes=3"),
        ({"split": "minival"}, "holds none of"),
        ({"batch": 9}, "fewer than one batch"),
        ({"backend": "memory", "randaugment": 10}, "backend=memory cannot be used"),
    ],
)
def test_a_loader_that_cannot_be_built_closes_its_file(root, options, words):
    loader = build(root)
    assert open_betons(root) == [str(root / "train.beton")]
    loader.close()
    with pytest.raises(UserError, match=words):
        build(root, **options)
    assert not open_betons(root)


def test_images_in_memory_need_no_file(root):
    """Nor do those that cannot be decoded."""
    build(root, backend="memory").close()
    assert not open_betons(root)
    content = bytearray((root / "train.beton").read_bytes())
    at = content.rindex(JPEG)
    content[at + 200 : at + 210] = bytes(10)
    (root / "train.beton").write_bytes(content)
    write_manifest(root / "train.beton", ["a", "b"])
    with pytest.raises(UserError, match="damaged"):
        build(root, backend="memory")
    assert not open_betons(root)


@pytest.mark.parametrize("change", [{"tool": "other"}, {"classes": ["a"]}])
def test_a_manifest_that_does_not_fit_closes_the_file(root, change):
    path = manifest_path(root / "train.beton")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError):
        build(root)
    assert not open_betons(root)


@pytest.mark.parametrize(("part", "classes"), [("val", 3), ("real", 1000)])
def test_a_test_set_that_is_not_what_its_name_says_closes_the_file(root, part, classes):
    with pytest.raises(UserError):
        open_set(DataConfig(name="x", root=str(root), num_classes=classes), part)
    assert not open_betons(root)
