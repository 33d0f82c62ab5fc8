"""Both loaders: the same samples, order and pixels, whatever the workers, ranks or starting point."""

import importlib.util
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sam_repro.config.checks import validate
from sam_repro.config.compose import compose_config
from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.beton import METADATA_AT, BetonFile, write_beton
from sam_repro.data.loaders.batch_order import balanced, noisy
from sam_repro.data.loaders.build import build_loader, ensure, resolve_backend
from sam_repro.data.manifest import write_manifest
from sam_repro.errors import UserError

HAS_FFCV = importlib.util.find_spec("ffcv") is not None
BACKENDS = ["torch", pytest.param("ffcv", marks=pytest.mark.skipif(not HAS_FFCV, reason="ffcv is not installed"))]
LIGHT = AugmentConfig(name="light")
COUNT, CLASSES, SIDE = 203, 7, 24


def jpeg(i: int) -> tuple[bytes, int, int, int, bool]:
    height, width = 40 + i % 9, 40 + i % 13
    small = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    large = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    if i % 10 == 0:
        large = cv2.cvtColor(large, cv2.COLOR_BGR2GRAY)
    return cv2.imencode(".jpg", large)[1].tobytes(), height, width, i % CLASSES, False


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """train.beton and val.beton of 203 images, and the same images as class folders."""
    root = tmp_path_factory.mktemp("data")
    by_class = sorted((jpeg(i) for i in range(COUNT)), key=lambda sample: sample[3])
    for split in ("train", "val"):
        write_beton(root / f"{split}.beton", by_class, capacity=COUNT)
        write_manifest(root / f"{split}.beton", [f"c{i}" for i in range(CLASSES)])
        for i, (data, _, _, label, _) in enumerate(by_class):
            (root / "folders" / split / f"c{label}").mkdir(parents=True, exist_ok=True)
            (root / "folders" / split / f"c{label}" / f"{i:04}.jpg").write_bytes(data)
    return root


def config(folder: Path, backend: str = "torch", **changes) -> DataConfig:
    keys = {"name": "x", "root": str(folder), "num_classes": CLASSES, "image_size": SIDE, "eval_resize": 28}
    return DataConfig(**(keys | {"backend": backend, "workers": 2} | changes))


def make(data: DataConfig, augment: AugmentConfig = LIGHT, *, split="train", training=True, batch=16, **options):
    options = {"seed": 5} | options
    return build_loader(
        data, augment, split=split, training=training, batch_size=batch, device=torch.device("cpu"), **options
    )


def collect(loader, epoch=0, start=0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader.epoch(epoch, start), strict=True)
    loader.close()
    return torch.cat(images), torch.cat(labels)


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_batches(root, backend):
    loader = make(config(root, backend))
    assert (loader.backend, loader.samples, len(loader)) == (backend, COUNT, COUNT // 16)
    batches = list(loader.epoch(0))
    assert len(batches) == len(loader)
    for images, labels in batches:
        assert images.shape == (16, 3, SIDE, SIDE) and images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (16,) and labels.dtype == torch.int64
    again = collect(make(config(root, backend)))
    assert equal(again, (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])))
    other = list(loader.epoch(1))
    assert not torch.equal(other[0][1], batches[0][1])
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_workers_and_start_change_nothing(root, backend):
    whole = collect(make(config(root, backend)), epoch=3)
    assert equal(collect(make(config(root, backend, workers=5)), epoch=3), whole)
    rest = collect(make(config(root, backend)), epoch=3, start=7)
    assert equal(rest, (whole[0][7 * 16 :], whole[1][7 * 16 :]))
    loader = make(config(root, backend))
    assert list(loader.epoch(0, len(loader))) == []
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_make_the_same_global_batches(root, backend):
    alone = list(make(config(root, backend), batch=16).epoch(2))
    ranks = [list(make(config(root, backend), batch=8, rank=r, world=2).epoch(2)) for r in range(2)]
    assert len(alone) == len(ranks[0]) == len(ranks[1])
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert equal(whole, (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "world"), [(16, 1), (203, 1), (500, 1), (10, 3)])
def test_evaluation_sees_every_image_once(root, backend, batch, world):
    labels = BetonFile.open(root / "val.beton").labels
    seen = []
    for rank in range(world):
        loader = make(config(root, backend), split="val", training=False, batch=batch, rank=rank, world=world)
        own = [y for _, y in loader.epoch(0)]
        assert len(own) == len(loader) and loader.samples == COUNT
        assert torch.cat(own).tolist() == labels[rank::world].tolist()
        seen += torch.cat(own).tolist()
        loader.close()
    assert sorted(seen) == sorted(labels.tolist())


@pytest.mark.skipif(not HAS_FFCV, reason="ffcv is not installed")
@pytest.mark.parametrize("training", [True, False])
def test_backends_agree(root, training):
    ours, theirs = (collect(make(config(root, b), training=training)) for b in ("torch", "ffcv"))
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_whole_images_gives_the_same(root, backend, monkeypatch):
    for data in (config(root, backend), config(root / "folders")):
        expected = collect(make(data))
        with monkeypatch.context() as patch:
            patch.setattr("sam_repro.data.images.jpeg.load", lambda: "there is no C compiler")
            assert equal(collect(make(data)), expected)


@pytest.mark.skipif(not HAS_FFCV, reason="ffcv is not installed")
def test_direct_reading_gives_the_same(root, monkeypatch):
    cached = collect(make(config(root, "ffcv")))
    monkeypatch.setattr("sam_repro.data.loaders.ffcv_loader.fits_page_cache", lambda path: False)
    assert equal(collect(make(config(root, "ffcv"))), cached)


def test_class_folders_give_the_same_as_their_beton(root):
    assert equal(collect(make(config(root / "folders"))), collect(make(config(root))))


def test_minival_is_held_out_of_train(root):
    data = config(root, train_fraction=0.8)
    train, minival = (make(data, split=s, training=False) for s in ("train", "minival"))
    assert train.samples + minival.samples == COUNT
    counts = torch.bincount(collect(minival)[1], minlength=CLASSES)
    assert counts.tolist() == [6] * CLASSES
    both = torch.cat([collect(train)[1], collect(make(data, split="minival", training=False, seed=9))[1]])
    assert torch.bincount(both).tolist() == np.bincount(np.arange(COUNT) % CLASSES).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_loaders_at_once_and_leaving_early(root, backend):
    train, val = make(config(root, backend)), make(config(root, backend), split="val", training=False)
    expected = collect(make(config(root, backend)), epoch=8)
    list(train.epoch(0)), list(val.epoch(0))
    before = threading.active_count()
    for epoch in range(8):
        for step, _ in enumerate(train.epoch(epoch)):
            if step == 2:
                assert sum(len(y) for _, y in val.epoch(0)) == COUNT
                break
    assert threading.active_count() == before
    interleaved = list(zip(train.epoch(8), val.epoch(0), strict=False))
    assert torch.equal(interleaved[3][0][0], expected[0][48:64])
    torch_threads = torch.get_num_threads()
    train.close(), val.close()
    assert threading.active_count() < before
    assert torch.get_num_threads() == torch_threads


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_image_is_an_error_soon(root, tmp_path, backend):
    samples = [jpeg(i) for i in range(40)]
    samples[33] = (samples[33][0][:2] + b"\x00" * 500, *samples[33][1:])
    write_beton(tmp_path / "train.beton", samples, capacity=40)
    write_manifest(tmp_path / "train.beton", [f"c{i}" for i in range(CLASSES)])
    loader = make(config(tmp_path, backend), training=False, batch=4)
    began = time.monotonic()
    with pytest.raises(UserError, match="sample 33 of .*train.beton"):
        list(loader.epoch(0))
    assert time.monotonic() - began < 5
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_pixels_never_end_the_process(root, tmp_path, backend):
    """Noise and zeros in the data: each epoch ends with UserError. In a process of its own."""
    script = """
import sys, numpy as np, torch
from pathlib import Path
from sam_repro.data.loaders.build import build_loader
from sam_repro.data.manifest import write_manifest
from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.errors import UserError
source, target, backend = sys.argv[1:]
pristine, rng, path = Path(source, "train.beton").read_bytes(), np.random.default_rng(0), Path(target, "train.beton")
outcomes = []
for trial in range(24):
    content = bytearray(pristine)
    for at in rng.integers(8 << 20, (8 << 20) + 200_000, 1 + trial % 12):
        content[at : at + 300] = rng.bytes(300) if trial % 2 else bytes(300)
    path.write_bytes(content)
    try:
        write_manifest(path, [f"c{i}" for i in range(7)])
        data = DataConfig(name="x", root=target, num_classes=7, image_size=24, eval_resize=28, backend=backend)
        loader = build_loader(data, AugmentConfig(name="l"), split="train", training=True, batch_size=50, seed=0,
                              device=torch.device("cpu"))
        outcomes.append(sum(len(y) for _, y in loader.epoch(0)))
        loader.close()
    except UserError as error:
        outcomes.append("refused")
print(outcomes)
"""
    command = [sys.executable, "-c", script, str(root), str(tmp_path), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused" in done.stdout and "200" not in done.stdout  # no damage passes the checksums


def test_digits_are_made_once_and_learnable(tmp_path):
    data = DataConfig(name="digits", root=str(tmp_path / "d"), num_classes=10, image_size=32, eval_resize=32)
    ensure(data)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()}
    assert set(stamps) == {"train.beton", "val.beton", "train.manifest.json", "val.manifest.json"}
    ensure(data)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()} == stamps
    data.backend = "torch"
    (x, y), (vx, vy) = (collect(make(data, split=s, training=False)) for s in ("train", "val"))
    assert len(y) + len(vy) == 1797 and abs(len(vy) - 0.2 * 1797) < 6
    means = torch.stack([x[y == c].float().mean(0) for c in range(10)])
    guess = torch.cdist(vx.float().flatten(1), means.flatten(1)).argmin(1)
    assert (guess == vy).float().mean() > 0.85


def test_synthetic_needs_no_files_and_names_its_content():
    data = DataConfig(name="synthetic", num_classes=5, image_size=16, eval_resize=16)
    train, val = make(data), make(data, split="val", training=False)
    assert (train.samples, val.samples, train.backend) == (256, 64, "torch")
    assert train.manifest != val.manifest and len(train.manifest) == 16
    x, y = collect(train)
    assert x.float().std() > 20 and set(y.tolist()) == set(range(5))
    collect(val)


def test_backend_is_chosen_with_a_reason(root, monkeypatch):
    if HAS_FFCV:
        backend, reason = resolve_backend(config(root, "auto"))
        assert backend == "ffcv" and "train.beton" in reason
    assert resolve_backend(config(root, "torch"))[0] == "torch"
    backend, reason = resolve_backend(config(root / "folders", "auto"))
    assert backend == "torch" and "sam-repro write" in reason
    with pytest.raises(UserError, match="sam-repro write"):
        resolve_backend(config(root / "folders", "ffcv"))
    with pytest.raises(UserError, match="in memory"):
        resolve_backend(DataConfig(name="synthetic", backend="ffcv"))
    monkeypatch.setattr("sam_repro.data.loaders.build.importlib.util.find_spec", lambda name: None)
    assert resolve_backend(config(root, "auto")) == ("torch", "ffcv is not installed")
    with pytest.raises(UserError, match="not installed"):
        resolve_backend(config(root, "ffcv"))


def test_the_torch_backend_does_not_import_ffcv(root):
    script = (
        "import sys, torch\nfrom sam_repro.data.loaders.build import build_loader\n"
        "from sam_repro.config.schema import *\n"
        "d = DataConfig(name='synthetic', num_classes=5, image_size=16, eval_resize=16)\n"
        "build_loader(d, AugmentConfig(name='x'), split='train', training=True, batch_size=8, seed=0,"
        " device=torch.device('cpu'))\nassert 'ffcv' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_bad_input_is_one_sentence(root, tmp_path):
    (tmp_path / "no_val" / "train" / "a").mkdir(parents=True)
    (tmp_path / "nothing").mkdir()
    for data, options, words in [
        (config(root, root=None), {}, "data.root is not set"),
        (config(root, root="/nowhere"), {}, "is not a folder"),
        (config(tmp_path / "nothing"), {}, "neither train.beton nor a folder train/"),
        (config(tmp_path / "no_val"), {}, "has no images"),
        (config(root, num_classes=9), {}, "has 7 classes in train, but data.num_classes=9"),
        (config(root / "folders", num_classes=3), {}, "has 7 classes in train, but data.num_classes=3"),
        (config(root), {"split": "minival"}, "holds none of 203"),
        (config(root), {"batch": 500}, "fewer than one batch of 500: set recipe.batch_size to"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            make(data, **options)
        assert "\n" not in str(caught.value)


def test_decoding_on_the_gpu_is_retired():
    for choice in ("auto", "cpu"):
        validate(compose_config(["model=vit_s32", "optim=sam", f"data.decode={choice}"]))
    with pytest.raises(UserError, match="data.decode=gpu is"):
        validate(compose_config(["model=vit_s32", "optim=sam", "data.decode=gpu"]))


def test_a_manifest_with_too_few_classes_is_refused(root, tmp_path):
    write_beton(tmp_path / "train.beton", [jpeg(i) for i in range(20)], capacity=20)
    write_manifest(tmp_path / "train.beton", ["a", "b"])
    with pytest.raises(UserError, match="label 6.*2 classes"):
        make(config(tmp_path, num_classes=2))
    content = bytearray((tmp_path / "train.beton").read_bytes())
    content[METADATA_AT + 16] ^= 1  # a label
    (tmp_path / "train.beton").write_bytes(content)
    with pytest.raises(UserError, match="is not the file"):
        make(config(tmp_path, num_classes=2))


def test_symmetric_label_noise_is_exact_and_uniform():
    labels = np.arange(60_000) % 10
    noisy_labels = noisy(labels, 0.2, 10)
    wrong = noisy_labels != labels
    assert wrong.sum() == 12_000 and noisy_labels.min() == 0 and noisy_labels.max() == 9
    shifts = np.bincount((noisy_labels - labels)[wrong] % 10, minlength=10)
    assert shifts[0] == 0 and abs(shifts[1:] - 12_000 / 9).max() < 5 * np.sqrt(12_000 / 9)
    assert (noisy(labels, 0.2, 10) == noisy_labels).all()


def test_a_sample_takes_the_classes_in_turn_whatever_their_order_and_sizes():
    labels = np.repeat([0, 1, 2, 3], [100, 100, 3, 50])  # sorted by class, one of them rare
    chosen = balanced(labels, 43, seed=1)
    assert len(set(chosen.tolist())) == 43
    counts = np.bincount(labels[chosen])
    assert counts[2] == 3 and counts[[0, 1, 3]].sum() == 40 and np.ptp(counts[[0, 1, 3]]) <= 1
    assert np.ptp(np.bincount(labels[chosen[:8]])) == 0  # every stretch of it is balanced, not only the whole
    assert (balanced(labels, 43, seed=1) == chosen).all() and set(balanced(labels, 43, seed=2)) != set(chosen)
    assert sorted(balanced(labels, 999, seed=1)) == list(range(len(labels)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_share_a_sample_of_the_training_split(root, backend):
    data = config(root, backend)
    whole = collect(make(data, training=False, batch=9, sample=32))
    assert len(whole[1]) == 32 and np.ptp(np.bincount(whole[1].numpy(), minlength=CLASSES)) <= 1
    parts = [collect(make(data, training=False, batch=9, sample=32, rank=r, world=2)) for r in range(2)]
    assert all(torch.equal(whole[i][r::2], parts[r][i]) for r in range(2) for i in range(2))
