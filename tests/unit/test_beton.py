"""Our .beton reader and writer: against FFCV's, and against damage."""

import errno
import gc
import json
import os

import cv2
import numpy as np
import pytest

from sam_repro.data.beton import ALLOCATION, METADATA_AT, PAGE, SAMPLE, BetonFile, write_beton
from sam_repro.data.manifest import check_manifest, manifest_hash, manifest_path, read_manifest, write_manifest
from sam_repro.errors import UserError

SIZES = [(48, 64), (64, 48), (33, 57), (8, 8)]


def jpeg(height: int, width: int, seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))[1].tobytes()


def samples(count: int):
    return [(jpeg(*SIZES[i % 4], i), *SIZES[i % 4], i % 3, False) for i in range(count)]


@pytest.fixture
def beton(tmp_path):
    path = tmp_path / "train.beton"
    assert write_beton(path, samples(40), capacity=45) == 40
    return path


def test_round_trip(beton):
    file = BetonFile.open(beton)
    for i, (data, height, width, label, _) in enumerate(samples(40)):
        assert file.sample(i) == data
        assert (file.heights[i], file.widths[i], file.labels[i]) == (height, width, label)
    assert len(file) == 40
    assert [p.name for p in beton.parent.iterdir()] == ["train.beton"]


def test_no_sample_crosses_a_page(tmp_path):
    large = b"\xff\xd8" + bytes(3_000_000)
    path = tmp_path / "big.beton"
    write_beton(path, [(large, 9, 9, 0, False)] * 5, capacity=5)
    file = BetonFile.open(path)
    assert file.pointers.tolist() == [PAGE + (i // 2) * PAGE + (i % 2) * (len(large) + 4) for i in range(5)]
    assert all(file.sample(i) == large for i in range(5))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_the_same(beton, os_cache):
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor

    file = BetonFile.open(beton)
    reader = Reader(str(beton))
    assert reader.field_names == ["image", "label"]
    assert np.array_equal(reader.alloc_table["ptr"].astype(np.int64), file.pointers)
    assert np.array_equal(reader.metadata["f0"]["height"].astype(np.int64), file.heights)
    pipelines = {"image": [CenterCropRGBImageDecoder((8, 8), 1.0), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    loader = Loader(str(beton), batch_size=7, num_workers=1, os_cache=os_cache, pipelines=pipelines, drop_last=False)
    images, labels = zip(*[(x.clone(), y.clone()) for x, y in loader], strict=True)
    assert np.concatenate(labels).ravel().tolist() == file.labels.tolist()
    del loader
    gc.collect()  # numba's finaliser of a collected FFCV loader raises KeyError: here, not in somebody's import
    image = cv2.imdecode(np.frombuffer(file.sample(3), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(np.concatenate(images)[3].astype(int) - image).max() <= 12  # FFCV decodes with a fast transform


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_the_same_raw_pixels(tmp_path, os_cache):
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor

    path, pixels = tmp_path / "raw.beton", np.random.default_rng(0).integers(0, 256, (21, 9, 9, 3), dtype=np.uint8)
    write_beton(path, [(x.tobytes(), 9, 9, i % 3, True) for i, x in enumerate(pixels)], capacity=21)
    pipelines = {"image": [CenterCropRGBImageDecoder((9, 9), 1.0), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    loader = Loader(str(path), batch_size=7, num_workers=1, os_cache=os_cache, pipelines=pipelines)
    images, labels = zip(*[(x.clone(), y.clone()) for x, y in loader], strict=True)
    assert np.array_equal(np.concatenate(images), pixels)
    assert np.concatenate(labels).ravel().tolist() == [i % 3 for i in range(21)]
    del loader
    gc.collect()


def test_raw_pixels_whose_size_in_the_table_has_the_checksum(tmp_path):
    """As in files written before FFCV could read ours."""
    path, pixels = tmp_path / "raw.beton", np.random.default_rng(0).integers(0, 256, (3, 12, 9, 3), dtype=np.uint8)
    write_beton(path, [(x.tobytes(), 12, 9, i, True) for i, x in enumerate(pixels)], capacity=3)
    content = bytearray(path.read_bytes())
    table = np.frombuffer(content, ALLOCATION, 3, len(content) - 3 * ALLOCATION.itemsize)
    assert table["size"].tolist() == [12 * 9 * 3] * 3
    for more, right in ((4, True), (3, False), (-1, False)):
        table["size"] = 12 * 9 * 3 + more
        path.write_bytes(content)
        if right:
            assert all(BetonFile.open(path).sample(i) == x.tobytes() for i, x in enumerate(pixels))
        else:
            assert "raw pixels do not fit their size" in refused(path)


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        BetonFile.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_truncation_is_refused(beton):
    content = beton.read_bytes()
    lengths = [0, 1, 23, 24, 100, METADATA_AT - 1, METADATA_AT, PAGE, PAGE + 100, len(content) - 1, len(content) - 24]
    for length in lengths + np.random.default_rng(0).integers(0, len(content), 50).tolist():
        beton.write_bytes(content[:length])
        assert "truncated" in refused(beton) or length < METADATA_AT
    beton.write_bytes(content + bytes(24))
    assert "damaged" in refused(beton)


def test_other_files_are_refused(tmp_path, beton):
    assert "cannot open" in refused(tmp_path / "missing.beton")
    assert "cannot open" in refused(tmp_path / "missing" / "x.beton")
    (tmp_path / "random").write_bytes(np.random.default_rng(0).bytes(100_000))
    assert "not a .beton" in refused(tmp_path / "random")
    content = bytearray(beton.read_bytes())
    content[24] = 4  # another field type
    beton.write_bytes(content)
    assert "other fields" in refused(beton)


def test_damage_is_refused_or_harmless(beton):
    """Zeros, ones or noise anywhere: an error, or a file of which every sample can be asked for."""
    pristine = beton.read_bytes()
    rng = np.random.default_rng(1)
    table = len(pristine) - 40 * ALLOCATION.itemsize
    regions = [(0, METADATA_AT + 40 * SAMPLE.itemsize), (table, len(pristine)), (PAGE, PAGE + 40_000)]
    refusals = 0
    for trial in range(150):
        content = bytearray(pristine)
        begin, end = regions[trial % 3]
        size = int(rng.integers(1, 200))
        at = int(rng.integers(begin, end - size))
        content[at : at + size] = [bytes(size), b"\xff" * size, rng.bytes(size)][trial // 3 % 3]
        beton.write_bytes(content)
        try:
            file = BetonFile.open(beton)
        except UserError:
            refusals += 1
            continue
        for i, (data, *_) in enumerate(samples(40)):  # the right bytes, or a sentence
            try:
                assert file.sample(i) == data
            except UserError as error:
                assert "checksum" in str(error)
        file.close()
    assert refusals > 60


def test_false_pixels_and_tiny_images_are_refused(beton):
    content = bytearray(beton.read_bytes())
    content[METADATA_AT] = 1
    beton.write_bytes(content)
    assert "raw pixels" in refused(beton)
    for sample in [
        (jpeg(9, 9, 0), 9, 4, 0, False),
        (jpeg(9, 9, 0), 70_000, 9, 0, False),
        (bytes(PAGE - 3), 9, 9, 0, False),
    ]:
        with pytest.raises(UserError, match="sample 0"):
            write_beton(beton, [sample], capacity=1)
    with pytest.raises(UserError, match="no sample"):
        write_beton(beton, [], capacity=0)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(beton, monkeypatch):
    before = beton.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_beton(beton, samples(3), capacity=3)
    assert beton.read_bytes() == before
    assert [p.name for p in beton.parent.iterdir()] == ["train.beton"]


def test_manifest(beton):
    content = write_manifest(beton, ["a", "b", "c"], rule={"max_side": 500})
    assert content["samples"] == 40 and content["counts"] == [14, 13, 13]
    first = manifest_hash(beton)
    assert len(first) == 16
    file = BetonFile.open(beton)
    assert check_manifest(file, full=True) == content
    pixels = bytearray(beton.read_bytes())
    pixels[PAGE + 300] ^= 1
    beton.write_bytes(pixels)
    check_manifest(BetonFile.open(beton))  # cheap: does not read the pixels
    with pytest.raises(UserError, match="is not the file"):
        check_manifest(BetonFile.open(beton), full=True)
    write_beton(beton, samples(39), capacity=39)
    with pytest.raises(UserError, match="is not the file"):
        check_manifest(BetonFile.open(beton))
    write_manifest(beton, ["a", "b", "c"])
    assert manifest_hash(beton) != first
    for text, words in [("{", "not valid JSON"), ("[]", "not a manifest")]:
        manifest_path(beton).write_text(text)
        with pytest.raises(UserError, match=words):
            manifest_hash(beton)
    manifest_path(beton).unlink()
    with pytest.raises(UserError, match="has no manifest"):
        manifest_hash(beton)


def test_no_field_of_a_manifest_changes_unseen(beton):
    write_manifest(beton, ["a", "b", "c"], rule={"max_side": 500}, source="x", skipped=["y.jpg"])
    path = manifest_path(beton)
    content, name = json.loads(path.read_text()), manifest_hash(beton)
    for key, value in content.items():
        changed = {**value, "odd": 1} if isinstance(value, dict) else value * 2
        path.write_text(json.dumps(content | {key: changed}))
        with pytest.raises(UserError, match="its seal is broken"):
            read_manifest(beton)
    del content["seal"]  # manifests of before have none, and the same name
    path.write_text(json.dumps(content))
    assert manifest_hash(beton) == name and read_manifest(beton) == content
