"""sam-repro write from every layout: the same images and labels, whatever they came in."""

import io
import os
import pickle
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from sam_repro.cli.main import main
from sam_repro.config.schema import DataConfig
from sam_repro.data.beton import BetonFile
from sam_repro.data.datasets import BetonSource, find_source
from sam_repro.data.images.decode import decode
from sam_repro.data.manifest import read_files, read_manifest
from sam_repro.data.write import layouts
from sam_repro.data.write.dataset import write_dataset
from sam_repro.errors import UserError

SYNSETS = ["n01440764", "n01443537", "n02099601"]
REAL = Path(os.environ.get("SAM_REPRO_TEST_DATA", "/nonexistent"))


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40 + number, 50), (9 * number, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


TRAIN = {f"{s}/{s}_{i}.JPEG": jpeg(4 * k + i) for k, s in enumerate(SYNSETS) for i in range(4)}
VAL = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": (jpeg(i), [2, 0, 1, 0, 2][i]) for i in range(5)}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write(src, dst, layout, **options):
    return write_dataset(src, dst, layout=layout, progress=False, workers=2, **options)


@pytest.fixture
def unpacked(tmp_path):
    """train/<synset>/* and val/<synset>/*, written: what the other forms must equal."""
    for name, data in TRAIN.items():
        path = tmp_path / "folders" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name, (data, label) in VAL.items():
        path = tmp_path / "folders" / "val" / SYNSETS[label] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write(tmp_path / "folders", tmp_path / "reference", "imagenet")
    return tmp_path / "reference"


def pairs(root, split):
    """{file name: (bytes, label)}"""
    file = BetonFile.open(root / f"{split}.beton")
    names = [Path(name).name for name in read_files(root / f"{split}.beton")]
    return {name: (file.sample(i), int(file.labels[i])) for i, name in enumerate(names)}


def test_a_list_of_many_files_in_an_archive_is_small():
    """ImageNet has 1.28 million: with 60 bytes each that is 80 MB, and was 300."""
    tracemalloc.start()
    members = layouts.Members()
    for label in range(200):
        members.extend((f"n{label:08d}/n{label:08d}_{i}.JPEG", 10_000 * i, 100_000 + i) for i in range(500))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(members.names) == 100_000 and held < 100_000 * 80
    assert (members.names[501], members.starts[501], members.sizes[501]) == (
        "n00000001/n00000001_1.JPEG",
        10_000,
        100_001,
    )
    members.extend([])


def test_every_file_is_asked_once_whether_it_changed(tmp_path, monkeypatch):
    """On a disk of a network each question takes a while, and ImageNet has 1.28 million files."""
    names = [str(i) for i in range(5)]
    for name in names[1:]:
        (tmp_path / name).write_bytes(b"x")
    raw, asked, stat = layouts.of_files(["a"], [0] * 5, tmp_path, names), [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: (asked.append(str(path)), stat(path, **k))[1])
    assert [name for name, *_ in raw.stamp()] == names[1:]
    assert asked == [f"{tmp_path}/{name}" for name in names]


def test_the_original_tars_equal_folders(unpacked, tmp_path, capsys):
    src = tmp_path / "tars"
    src.mkdir()
    with tarfile.open(src / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in reversed(SYNSETS):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for name, data in TRAIN.items():
                    if name.startswith(synset):
                        add(inner, Path(name).name, data)
            add(outer, f"{synset}.tar", stream.getvalue())
    with tarfile.open(src / "ILSVRC2012_img_val.tar", "w") as archive:
        for name, (data, _) in reversed(VAL.items()):
            add(archive, name, data)
    (src / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(SYNSETS[k] for _, k in VAL.values()))
    manifests = write(src, tmp_path / "dst", "imagenet")
    said = capsys.readouterr().out
    for split, images in (("train", "1,281,167"), ("val", "50,000")):
        assert pairs(tmp_path / "dst", split) == pairs(unpacked, split)
        assert manifests[split]["classes"] == SYNSETS
        there = {"train": "12", "val": "5"}[split]
        assert f"{split} has {there} images in 3 classes; all of imagenet would be {images} images in 1,000 " in said
    assert (tmp_path / "dst" / "train.beton").read_bytes() == (unpacked / "train.beton").read_bytes()
    (src / "ILSVRC2012_img_train.tar").write_bytes((src / "ILSVRC2012_img_train.tar").read_bytes()[:9000])
    with pytest.raises(UserError, match="ILSVRC2012_img_train.tar"):
        write(src, tmp_path / "dst2", "imagenet")


def devkit(path, numbers):
    meta = np.array([(i + 1, name) for i, name in enumerate(numbers)], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    stream, truth = io.BytesIO(), "\n".join(str(numbers.index(SYNSETS[k]) + 1) for _, k in VAL.values())
    savemat(stream, {"synsets": meta})
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", stream.getvalue())
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())


@pytest.mark.parametrize("truth", ["kaggle", "lines", "devkit"])
def test_a_flat_validation_folder_with_its_ground_truth(unpacked, tmp_path, truth):
    src = tmp_path / "flat"
    (src / "val").mkdir(parents=True)
    for name, (data, _) in VAL.items():
        (src / "val" / name).write_bytes(data)
    with pytest.raises(UserError, match="none of LOC_val_solution.csv"):
        write(src, tmp_path / "dst", "imagenet")
    if truth == "kaggle":
        rows = [f"{Path(name).stem},{SYNSETS[label]} 1 2 3 4 " for name, (_, label) in reversed(VAL.items())]
        (src / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows))
    elif truth == "lines":
        lines = [SYNSETS[label] for _, label in VAL.values()]
        (src / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(lines) + "\n")
    else:
        devkit(src / "ILSVRC2012_devkit_t12.tar.gz", [SYNSETS[2], SYNSETS[0], SYNSETS[1]])
    write(src, tmp_path / "dst", "imagenet")
    assert pairs(tmp_path / "dst", "val") == pairs(unpacked, "val")


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28)])
def test_arrays_are_stored_without_loss(tmp_path, shape):
    rng = np.random.default_rng(0)
    content = {
        "train_images": rng.integers(0, 256, (30, *shape), dtype=np.uint8),
        "train_labels": np.arange(30) % 3,
        "test_images": rng.integers(0, 256, (9, *shape), dtype=np.uint8),
        "test_labels": np.arange(9) % 3,
        "class_names": np.array(["a", "b", "c"]),
    }
    np.savez(tmp_path / "set.npz", **content)
    code = main(["write", "arrays", "--src", str(tmp_path / "set.npz"), "--dst", str(tmp_path / "dst")])
    assert code == 0 and read_manifest(tmp_path / "dst" / "train.beton")["classes"] == ["a", "b", "c"]
    for split, prefix in (("train", "train"), ("val", "test")):
        source = find_source(tmp_path / "dst", split)
        assert isinstance(source, BetonSource) and source.labels.tolist() == content[f"{prefix}_labels"].tolist()
        for i, image in enumerate(content[f"{prefix}_images"]):
            expected = image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
            assert np.array_equal(source.read(i), expected)


@pytest.mark.parametrize("backend", ["torch", "ffcv"])
def test_raw_pixels_reach_the_model_unchanged(tmp_path, backend):
    torch = pytest.importorskip("torch")
    if backend == "ffcv":
        pytest.importorskip("ffcv", reason="ffcv is not installed")
    from sam_repro.config.schema import AugmentConfig
    from sam_repro.data.loaders.build import build_loader

    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(20) % 4
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    write(tmp_path / "x.npz", tmp_path, "arrays")
    data = DataConfig(name="x", root=str(tmp_path), num_classes=4, image_size=32, eval_resize=32, backend=backend)
    options = {"split": "val", "training": False, "batch_size": 8, "seed": 0, "device": torch.device("cpu")}
    loader = build_loader(data, AugmentConfig(name="x"), **options)
    got = torch.cat([x for x, _ in loader.epoch(0)])
    loader.close()
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), images)


def test_encoded_arrays_with_a_common_header(tmp_path):
    files = [jpeg(i) for i in range(6)]
    start = os.path.commonprefix(files)
    rest = [f[len(start) :] for f in files]
    ends = np.cumsum([0] + [len(r) for r in rest])
    content = {"header": np.frombuffer(start, np.uint8), "train_data": np.frombuffer(b"".join(rest), np.uint8)}
    np.savez(tmp_path / "x.npz", train_offsets=ends, train_labels=np.arange(6) % 2, **content)
    write(tmp_path / "x.npz", tmp_path, "arrays")
    file = BetonFile.open(tmp_path / "train.beton")
    assert all(np.array_equal(decode(file.sample(i), "it"), decode(files[i], "it")) for i in range(6))


def test_bad_arrays_are_sentences(tmp_path):
    path = tmp_path / "x.npz"
    for content, words in [
        ({"x": np.zeros(3)}, "no train_labels"),
        ({"train_labels": np.zeros(3, int)}, "neither train_images nor"),
        ({"train_labels": np.zeros(3, int), "train_images": np.zeros((3, 9, 9))}, "must be uint8"),
        ({"train_labels": np.zeros(2, int), "train_images": np.zeros((3, 9, 9), np.uint8)}, "for each of its 3 images"),
        ({"train_labels": np.zeros(0, int), "train_images": np.zeros((0, 9, 9), np.uint8)}, "for each of its 0 images"),
        ({"train_labels": np.zeros((3, 1), int), "train_images": np.zeros((3, 9, 9), np.uint8)}, "not int64 .3, 1."),
        ({"train_labels": np.zeros(3, int), "train_images": np.zeros((3, 9, 9, 4), np.uint8)}, "must be uint8"),
        ({"train_labels": np.zeros(3, int), "train_images": np.array([b"a", b"bc", b"d"], object)}, "Python objects"),
        (
            {"train_labels": np.arange(3), "train_images": np.zeros((3, 9, 9), np.uint8), "class_names": ["a", "b"]},
            "2 class_names, but label 2",
        ),
    ]:
        np.savez(path, **content)
        with pytest.raises(UserError, match=words):
            write(path, tmp_path / "dst", "arrays")
    path.write_bytes(b"PK\x03\x04 not really")
    assert main(["write", "arrays", "--src", str(path), "--dst", str(tmp_path / "dst")]) == 2
    assert main(["write", "pets", "--src", str(tmp_path), "--dst", str(tmp_path / "dst")]) == 2


def test_torchvisions_cifar(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    rng = np.random.default_rng(0)
    for name in [n for n, _ in CIFAR10.train_list + CIFAR10.test_list]:
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [1, 0, 9, 3]}
        (base / name).write_bytes(pickle.dumps(batch))
    (base / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    manifests = write(tmp_path, tmp_path / "dst", "cifar10")
    assert (manifests["train"]["samples"], manifests["val"]["samples"]) == (20, 4)
    source = find_source(tmp_path / "dst", "val")
    assert np.array_equal(source.read(2), CIFAR10(tmp_path, train=False).data[2]) and source.labels[2] == 9


def test_what_cannot_be_downloaded_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody listens there
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    for name, made in (("cifar10", "CIFAR10"), ("imagenette", "Imagenette")):
        with pytest.raises(UserError, match=f"^cannot download {made} to {tmp_path}: .*refused"):
            write_dataset(tmp_path, tmp_path / "dst", layout=name, download=True)
    with pytest.raises(UserError, match="--download is for cifar10, .*; imagewoof is read from --src"):
        write_dataset(tmp_path / "none", tmp_path / "dst", layout="imagewoof", download=True)
    assert not (tmp_path / "dst").exists() and not (tmp_path / "none").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pyarrow = pytest.importorskip("pyarrow")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": jpeg(i), "path": None} for i in range(6)], "label": [0, 1, 0, 1, 1, 0]}
    columns = pyarrow.table(rows, schema=features.arrow_schema)
    table = datasets.Dataset(columns, datasets.DatasetInfo(features=features), fingerprint="given")
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(tmp_path / "hf"))
    manifests = write(tmp_path / "hf", tmp_path / "dst", "hf")
    file = BetonFile.open(tmp_path / "dst" / "val.beton")
    assert file.labels.tolist() == rows["label"]
    assert [file.sample(i) for i in range(6)] == [jpeg(i) for i in range(6)]
    assert manifests["train"]["classes"] == ["a", "b"]


@pytest.mark.skipif(not REAL.is_dir(), reason="SAM_REPRO_TEST_DATA does not lead to real images")
def test_real_flowers_in_torchvisions_layout(tmp_path):
    """All 2,040 training images; of the 6,149 test images those that are there, the others named as left out."""
    zipfile.ZipFile(REAL / "flowers102_public.zip").extractall(tmp_path / "flowers-102")
    manifests = write(tmp_path, tmp_path / "dst", "flowers", skip_bad=True, num_classes=102)
    assert manifests["train"]["samples"] == 2040 and manifests["train"]["counts"] == [20] * 102
    assert manifests["val"]["samples"] == 510 and len(manifests["val"]["skipped"]) == 6149 - 510
