"""Class folders to .beton: what is stored, what is refused, what a second run does."""

import io
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from sam_repro.data.beton import BetonFile
from sam_repro.data.images.decode import decode
from sam_repro.data.manifest import check_manifest, manifest_hash
from sam_repro.data.write import dataset as write
from sam_repro.data.write.dataset import encode, write_dataset
from sam_repro.errors import UserError


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))


def as_bytes(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "src"
    for split, count in [("train", 5), ("val", 2)]:
        for label, name in enumerate(["ant", "bee", "cat"]):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.JPEG").write_bytes(as_bytes(picture(40, 50, 10 * label + i)))
    return root


def run(src, dst, **options):
    return write_dataset(src, dst, progress=False, workers=2, **options)


def test_small_jpegs_keep_their_bytes(folders, tmp_path):
    manifests = run(folders, tmp_path / "dst", num_classes=3, segment=0)
    file = BetonFile.open(tmp_path / "dst" / "train.beton")
    files = sorted((folders / "train").rglob("*.JPEG"))
    assert [file.sample(i) for i in range(15)] == [f.read_bytes() for f in files]
    assert file.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert manifests["train"] == check_manifest(file, full=True)
    assert manifests["train"]["classes"] == ["ant", "bee", "cat"]
    assert manifests["val"]["counts"] == [2, 2, 2] and manifests["val"]["reencoded"] == 0


def test_the_same_command_recodes_an_old_file(folders, tmp_path, capsys):
    dst = tmp_path / "dst"
    kept = run(folders, dst, segment=0)["train"]
    before = BetonFile.open(dst / "train.beton")
    assert "recoded" not in kept and "segment" not in kept["rule"]
    manifest = run(folders, dst, segment=16)["train"]
    assert manifest["recoded"] == {"images": 15, "coefficients": "kept"} and manifest["rule"]["segment"] == 16
    assert manifest["reencoded"] == 0
    after = BetonFile.open(dst / "train.beton")
    for i in range(15):
        assert np.array_equal(decode(after.sample(i), "it"), decode(before.sample(i), "it"))
        assert after.sizes[i] < before.sizes[i]
    assert run(folders, dst, segment=16)["train"] == manifest and capsys.readouterr().out.count("is up to date") == 2


def test_without_a_compiler_jpegs_keep_their_bytes(folders, tmp_path, monkeypatch, capsys):
    kept = run(folders, tmp_path / "dst", segment=0)
    monkeypatch.setattr(write.jpeg, "load", lambda: "there is no C compiler")
    assert run(folders, tmp_path / "dst") == kept
    assert "there is no C compiler" in capsys.readouterr().out


@pytest.mark.parametrize(("width", "recoded"), [(48, False), (64, False), (65, True), (96, True)])
def test_an_image_of_one_segment_a_row_keeps_its_bytes(width, recoded):
    data = as_bytes(picture(90, width))
    stored = encode(data, max_side=500, quality=90, segment=64)
    assert stored.recoded == recoded == (stored.data != data)


def test_what_does_not_recode_is_stored_as_it_is(monkeypatch):
    data = as_bytes(picture(90, 90))
    for worse in (None, as_bytes(picture(90, 90, 1))):  # libjpeg refuses; other pixels
        monkeypatch.setattr(write.jpeg, "recode", lambda data, segment, worse=worse: worse)
        assert encode(data, max_side=500, quality=90, segment=64)[:4] == (data, 90, 90, False)
    monkeypatch.undo()
    png = encode(as_bytes(picture(90, 90), "PNG"), max_side=500, quality=90, segment=64)
    assert png.reencoded and png.recoded
    assert np.array_equal(
        decode(png.data, "it"), decode(encode(as_bytes(picture(90, 90), "PNG"), max_side=500, quality=90).data, "it")
    )


@pytest.mark.parametrize(
    ("data", "kept", "shape"),
    [
        (as_bytes(picture(40, 50)), True, (40, 50)),
        (as_bytes(picture(40, 50), progressive=True), True, (40, 50)),
        (as_bytes(picture(40, 50).convert("L")), True, (40, 50)),
        (as_bytes(picture(40, 50), subsampling=0, quality=100), True, (40, 50)),
        (as_bytes(picture(40, 50).convert("CMYK")), False, (40, 50)),
        (as_bytes(picture(40, 50), "PNG"), False, (40, 50)),
        (as_bytes(picture(40, 50).convert("P"), "PNG"), False, (40, 50)),
        (as_bytes(picture(40, 50).convert("RGBA"), "PNG"), False, (40, 50)),
        (as_bytes(picture(40, 50), "BMP"), False, (40, 50)),
        (as_bytes(picture(600, 900)), False, (333, 500)),
    ],
)
def test_what_is_stored(data, kept, shape):
    result = encode(data, max_side=500, quality=90)
    assert (result.data == data) is kept is (not result.reencoded)
    assert (result.height, result.width) == shape
    stored = Image.open(io.BytesIO(result.data))
    assert stored.size == shape[::-1] and stored.mode in ("RGB", "L")
    original = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize(stored.size, Image.Resampling.BOX))
    assert (
        np.abs(np.asarray(stored.convert("RGB")).astype(int) - original).mean() < 15
    )  # a dithered palette is the worst


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = as_bytes(picture(40, 50), exif=exif)
    assert encode(data, max_side=500, quality=90)[:3] == (data, 40, 50)


@pytest.mark.parametrize(
    "bad", [b"", b"not an image", as_bytes(picture(90, 90))[:-300], as_bytes(picture(4, 90)), as_bytes(picture(1, 999))]
)
def test_an_unusable_image_is_named_or_skipped(folders, tmp_path, bad):
    culprit = folders / "train" / "bee" / "3.JPEG"
    culprit.write_bytes(bad)
    with pytest.raises(UserError, match="bee/3.JPEG.*--skip-bad") as caught:
        run(folders, tmp_path / "dst")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "dst").iterdir()) == []
    manifest = run(folders, tmp_path / "dst", skip_bad=True)["train"]
    assert manifest["skipped"] == ["bee/3.JPEG"] and manifest["counts"] == [5, 4, 5]


def test_second_run_does_nothing_and_a_changed_one_writes(folders, tmp_path, capsys):
    dst = tmp_path / "dst"
    first = run(folders, dst)
    inode, name = (dst / "train.beton").stat().st_ino, manifest_hash(dst / "train.beton")
    capsys.readouterr()
    assert run(folders, dst) == first
    assert capsys.readouterr().out.count("is up to date") == 2
    assert (dst / "train.beton").stat().st_ino == inode
    os.utime(folders / "train" / "ant" / "0.JPEG", (1, 1))
    run(folders, dst)
    assert (dst / "train.beton").stat().st_ino != inode
    assert manifest_hash(dst / "train.beton") == name  # the same content has the same name
    (dst / "train.beton").write_bytes(b"damaged")
    assert run(folders, dst)["train"]["samples"] == 15
    assert BetonFile.open(dst / "train.beton").sample(0)
    assert run(folders, dst, max_side=20)["train"]["reencoded"] == 15


def test_bad_folders_are_sentences(folders, tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for src, options, words in [
        (tmp_path / "nowhere", {}, "there is no folder"),
        (tmp_path / "empty", {}, "has no class folders"),
        (tmp_path, {}, "neither a folder train/"),
        (folders, {"num_classes": 4}, "has 3 class folders, expected 4"),
    ]:
        with pytest.raises(UserError, match=words):
            run(src, tmp_path / "dst", **options)
    (folders / "val" / "dog").mkdir()
    with pytest.raises(UserError, match="dog has no images"):
        run(folders, tmp_path / "dst")
    (folders / "val" / "dog" / "0.png").write_bytes(as_bytes(picture(9, 9), "PNG"))
    with pytest.raises(UserError, match="val has other class folders than train, for example dog"):
        run(folders, tmp_path / "dst")


def test_a_split_alone_is_not_written_beside_one_with_other_classes(folders, tmp_path):
    run(folders, tmp_path / "dst")
    before = (tmp_path / "dst" / "train.beton").read_bytes()
    (folders / "val").rename(tmp_path / "val")
    (folders / "train" / "cat").rename(folders / "train" / "dog")
    with pytest.raises(UserError, match="val.beton has other classes than .*, for example cat"):
        run(folders, tmp_path / "dst")
    assert (tmp_path / "dst" / "train.beton").read_bytes() == before
    (folders / "train" / "dog").rename(folders / "train" / "cat")
    run(folders, tmp_path / "dst")


def test_too_small_a_disk_is_noticed_before_writing(folders, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GB free"):
        run(folders, tmp_path / "dst")
    assert list((tmp_path / "dst").iterdir()) == []
