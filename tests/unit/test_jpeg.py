"""Decoding only the crop: the pixels of a whole decode, to the bit, or a plain refusal."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.datasets import decode
from sam_repro.data.images.crop import crop_box, evaluation_geometry, render, training_geometry
from sam_repro.data.images.jpeg import load, recode, render_jpeg

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


SAMPLINGS = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
SAMPLINGS += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440]
SAMPLINGS += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444, None]  # the last: grey


def picture(i: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(i)
    image = cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8)


def jpeg(i: int, kind: str) -> bytes:
    rng = np.random.default_rng(i)
    image = Image.fromarray(picture(i, int(rng.integers(9, 210)), int(rng.integers(9, 210))))
    file = io.BytesIO()
    (image.convert("L") if kind == "grey" else image).save(file, "jpeg", **KINDS[kind])
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


@given(
    st.integers(0, 1 << 30), st.integers(1, 300), st.integers(1, 300), st.sampled_from(SAMPLINGS), st.integers(1, 100),
    st.booleans(), st.sampled_from([1, 16, 32, 64, 100, 1000]), st.sampled_from(sorted(GEOMETRIES)),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_a_recoded_file_has_the_same_pixels_in_every_crop(
    seed, height, width, sampling, quality, progressive, segment, view
):
    image = picture(seed, height, width)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling] if sampling else []
    data = cv2.imencode(".jpg", image if sampling else image[..., 0], options)[1].tobytes()
    recoded = recode(data, segment)
    assert recoded is not None and np.array_equal(decode(recoded, "recoded"), decode(data, "source"))
    for index in range(5):
        expected = np.empty((32, 32, 3), np.uint8)
        render(decode(data, "source"), expected, GEOMETRIES[view], 3, 1, index)
        assert np.array_equal(rendered(recoded, GEOMETRIES[view], index, scratch=3 * height * width), expected)


def entropy_coded(data: bytes) -> int:
    """The byte at which it begins."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def test_only_the_segments_of_the_crop_are_decoded():
    geometry = GEOMETRIES["inception"]
    data = cv2.imencode(".jpg", picture(0, 375, 500))[1].tobytes()
    recoded = recode(data, 64)
    assert recoded is not None and len(recoded) < len(data)
    damaged = bytearray(recoded)
    at = entropy_coded(recoded)
    damaged[at + 5 : at + 20] = bytes(15)  # the first of 8 segments a row: other pixels, or none
    touched = 0
    for index in range(40):
        top, left = crop_box(3, 1, index, 375, 500, geometry)[:2]
        away = top > 16 + 2 or left > 64 + 2
        same = rendered(bytes(damaged), geometry, index, scratch=3 * 375 * 500)
        expected = rendered(data, geometry, index, scratch=3 * 375 * 500)
        assert not away or np.array_equal(same, expected)
        touched += not away
    assert 0 < touched < 20
    assert rendered(bytes(damaged), GEOMETRIES["centre"], 0) is None  # its length is wrong


def test_ffcvs_own_decoder_reads_it():
    imdecode = pytest.importorskip("ffcv.libffcv", reason="ffcv is not installed").imdecode
    for kind in sorted(KINDS.keys() - {"progressive", "grey"}):
        data = jpeg(7, kind)
        height, width = decode(data, "source").shape[:2]
        decoded = []
        for file in (data, recode(data, 32)):
            decoded.append(np.zeros((height, width, 3), np.uint8))
            assert file and imdecode(np.frombuffer(file, np.uint8), decoded[-1], height, width, height, width) == 0
        assert np.array_equal(*decoded) and decoded[0].any()


def test_damaged_segments_are_refused_or_decoded_within_bounds():
    data = recode(jpeg(5, "4:2:0"), 32)
    assert data is not None
    rng, geometry = np.random.default_rng(0), GEOMETRIES["inception"]
    centre = GEOMETRIES["centre"]
    for length in (2, 100, entropy_coded(data), len(data) // 2, len(data) - 60):
        assert rendered(data[:length], centre, 0) is None and recode(data[:length], 64) is None
    for i in range(600):
        bad = bytearray(data)
        for at in rng.integers(0, len(bad), 3):
            bad[at] = rng.integers(0, 256)
        rendered(bytes(bad), geometry, i)
        recode(bytes(bad), 64)
    assert recode(b"GIF89a", 64) is None and recode(b"", 64) is None


def test_a_sequence_that_restart_markers_do_not_fit_is_decoded_as_it_is():
    data = recode(jpeg(5, "4:2:0"), 32)
    assert data is not None
    first = data.index(b"\xff\xd0", entropy_coded(data))
    doubled = data[:first] + b"\xff" + data[first:]  # a fill byte, which the format allows
    assert np.array_equal(decode(doubled, "doubled"), decode(data, "recoded"))
    assert rendered(doubled, GEOMETRIES["centre"], 0) is None  # Pillow's turn


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
