"""Decoding only the crop: the pixels of a whole decode, to the bit, or a plain refusal."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.datasets import decode
from sam_repro.data.images.crop import evaluation_geometry, render, training_geometry
from sam_repro.data.images.jpeg import load, render_jpeg

OBSTACLE = load()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "available")

DATA = DataConfig(name="x", image_size=32, eval_resize=40)
LIGHT = AugmentConfig(name="light")
GEOMETRIES = {
    "inception": training_geometry(DATA, LIGHT),
    "antialias": training_geometry(DataConfig(name="x", image_size=32, eval_resize=40, antialias=True), LIGHT),
    "pad": training_geometry(DATA, AugmentConfig(name="cifar", crop="pad")),
    "centre": evaluation_geometry(DATA),
}
KINDS = {
    "4:2:0": {"quality": 90},
    "4:2:2": {"quality": 92, "subsampling": 1},
    "4:4:4": {"quality": 95, "subsampling": 0},
    "progressive": {"quality": 85, "progressive": True},
    "restart": {"quality": 80, "restart_marker_blocks": 3},
    "optimized": {"quality": 30, "optimize": True},
    "grey": {"quality": 90},
}


def jpeg(i: int, kind: str) -> bytes:
    rng = np.random.default_rng(i)
    height, width = int(rng.integers(9, 210)), int(rng.integers(9, 210))
    image = cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert("L") if kind == "grey" else picture).save(file, "jpeg", **KINDS[kind])
    return file.getvalue()


def rendered(data: bytes, geometry, index: int, *, sides=(0, 0), scratch=1 << 17):
    stored, out = np.frombuffer(data, np.uint8), np.zeros((32, 32, 3), np.uint8)
    where = stored.ctypes.data, len(stored), *sides, np.empty(scratch, np.uint8)
    return out if render_jpeg(*where, out, geometry, 3, 1, index) else None


@pytest.mark.parametrize("view", GEOMETRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_pixels_of_a_whole_decode(kind, view):
    for i in range(40):
        data, expected = jpeg(i, kind), np.empty((32, 32, 3), np.uint8)
        image = decode(data, "test")
        render(image, expected, GEOMETRIES[view], 3, 1, i)
        for more in ({}, {"sides": image.shape[:2]}, {"scratch": 10}):
            assert np.array_equal(rendered(data, GEOMETRIES[view], i, **more), expected)


def test_what_it_refuses():
    geometry, good = GEOMETRIES["centre"], jpeg(5, "4:2:0")
    file = io.BytesIO()
    Image.open(io.BytesIO(good)).convert("CMYK").save(file, "jpeg")
    height, width = decode(good, "test").shape[:2]
    assert rendered(good, geometry, 0) is not None
    for bad in (file.getvalue(), good[: len(good) // 2], good[:2], b"GIF89a" + good, bytes(500)):
        assert rendered(bad, geometry, 0) is None
    assert rendered(good, geometry, 0, sides=(height, width + 1)) is None
    rng = np.random.default_rng(0)
    for _ in range(300):  # damage anywhere: refused, or decoded within bounds
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 5):
            bad[at] = rng.integers(0, 256)
        rendered(bytes(bad), geometry, 0, sides=(height, width))


def test_without_a_compiler_the_reason_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value, words in [
        ("PATH", "", "there is no C compiler"),
        ("CC", "false", "does not compile"),
        ("CC", "/nowhere/cc", "No such file"),
        ("NOTHING", "", ""),
    ]:
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            reason = load.__wrapped__()
        assert words in reason and "\n" not in reason and bool(reason) == bool(words)
    assert len(list((tmp_path / "sam_repro").iterdir())) == 1  # the library, and no leftovers
