"""The loader that decodes on a GPU: its geometry and its bookkeeping, on the CPU with torchvision's CPU decoder."""

from __future__ import annotations

import io
import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from gpu_crops import assert_crops_of_the_cpu_path, every_geometry
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.beton import write_beton
from sam_repro.data.datasets import BetonSource, synthetic
from sam_repro.data.images.crop import training_geometry
from sam_repro.data.images.gpu_decode import components, find_decoder
from sam_repro.data.loaders.batch_order import Plan
from sam_repro.data.loaders.build import build_loader, resolve_decode
from sam_repro.data.loaders.gpu_loader import GPULoader
from sam_repro.data.manifest import write_manifest
from sam_repro.errors import UserError

CPU = torch.device("cpu")
DATA = DataConfig(name="x", num_classes=7, image_size=48, eval_resize=56)
LIGHT = AugmentConfig(name="light")
COUNT = 60


def picture(i: int, height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@every_geometry
def test_the_crops_are_those_of_the_cpu_path_to_the_bit(mode, filter):
    assert_crops_of_the_cpu_path(mode, filter, CPU, repeats=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A .beton of JPEGs, four of which a GPU would refuse, and of two images stored as pixels."""
    path = tmp_path_factory.mktemp("gpu") / "train.beton"
    samples = []
    for i in range(COUNT):
        height, width = 60 + 7 * (i % 5), 90 - 8 * (i % 4)
        raw = i in (17, 44)
        image = picture(i, height, width)
        data = image.tobytes() if raw else cv2.imencode(".jpg", image)[1].tobytes()
        samples.append((data, height, width, i % 7, raw))
    write_beton(path, samples, capacity=COUNT)
    write_manifest(path, [f"c{i}" for i in range(7)])
    return path


REFUSED = (3, 8, 21, 50)


def picky(source):
    """torchvision's CPU decoder with the manners of nvJPEG: one image that it cannot read fails the call."""
    bad = {bytes(source.file.sample(i)) for i in REFUSED}

    def decode(jpegs, device):
        assert device == CPU
        decode.calls.append(len(jpegs))
        if any(bytes(j) in bad for j in jpegs):
            raise RuntimeError("unsupported")
        return [decode_jpeg(torch.frombuffer(j, dtype=torch.uint8), ImageReadMode.RGB) for j in jpegs]

    decode.calls = []
    return decode


pytestmark = pytest.mark.filterwarnings("ignore:the processor decodes")


def loaders(path, *, batch=16, workers=2):
    plan = Plan(np.arange(COUNT), batch, 5, True)
    geometry, source = training_geometry(DATA, LIGHT), BetonSource(path)
    ours = GPULoader(source, plan, geometry, workers=workers, device=CPU, decode=picky(source))
    data = replace(DATA, root=str(path.parent), backend="torch")
    plain = build_loader(data, LIGHT, split="train", training=True, batch_size=batch, seed=5, device=CPU)
    return ours, plain


def test_the_same_batches_as_the_torch_loader(path):
    ours, plain = loaders(path)
    for epoch, start in [(0, 0), (1, 0), (1, 2)]:
        batches = list(ours.epoch(epoch, start))
        assert len(batches) == len(ours) - start == 3 - start
        for (x, y), (want, labels) in zip(batches, plain.epoch(epoch, start), strict=True):
            assert torch.equal(y, labels) and x.stride() == want.stride() and x.dtype == torch.uint8
            assert torch.equal(x, want)  # both decoders are libjpeg-turbo
    ours.close(), plain.close()


def test_images_that_the_gpu_refuses_are_asked_for_once(path):
    ours, plain = loaders(path)
    with pytest.warns(UserWarning, match="the processor decodes what the GPU's decoder refuses"):
        for epoch in (0, 1, 2, 3):
            list(ours.epoch(epoch))
    assert set(np.flatnonzero(ours.refused)) == {*REFUSED, 17, 44}  # and what is stored as pixels
    ours.decode.calls.clear()
    list(ours.epoch(4))
    assert len(ours.decode.calls) == 3 and min(ours.decode.calls) > 8
    ours.close(), plain.close()


def test_leaving_early_leaves_nothing_running(path):
    ours, plain = loaders(path, batch=4)
    list(ours.epoch(0))
    before = threading.active_count()
    for epoch in range(5):
        for step, _ in enumerate(ours.epoch(epoch)):
            if step == 2:
                break
    assert threading.active_count() == before
    x, y = next(iter(ours.epoch(6)))
    want, labels = next(iter(plain.epoch(6)))
    assert torch.equal(x, want) and torch.equal(y, labels)
    ours.close(), plain.close()


def test_a_damaged_image_is_one_sentence(path, tmp_path):
    content = bytearray(path.read_bytes())
    source = BetonSource(path)
    at = int(source.file.pointers[30]) + 200
    content[at : at + 50] = bytes(50)
    (tmp_path / "train.beton").write_bytes(content)
    write_manifest(tmp_path / "train.beton", [f"c{i}" for i in range(7)])
    ours, _ = loaders(tmp_path / "train.beton")
    with pytest.raises(UserError, match="sample 30 of .*train.beton is damaged"):
        list(ours.epoch(0)), list(ours.epoch(1))
    ours.close()


def test_components_of_a_frame_header():
    for mode, number in (("L", 1), ("RGB", 3), ("CMYK", 4)):
        for options in ({}, {"progressive": True}, {"exif": bytes(700), "comment": b"\xff\xc0 no frame"}):
            file = io.BytesIO()
            Image.fromarray(picture(1, 40, 50)).convert(mode).save(file, "jpeg", **options)
            assert components(file.getvalue()) == components(memoryview(file.getvalue())) == number
    assert components(b"") == components(b"\xff\xd8") == components(bytes(100)) == 0


def test_where_to_decode_is_chosen_with_a_reason(path):
    source, geometry, cuda = BetonSource(path), training_geometry(DATA, LIGHT), torch.device("cuda")
    for where in ("auto", "cpu"):
        decided = resolve_decode(replace(DATA, decode=where), LIGHT, source, geometry, cuda)
        assert decided == ("", "decoded on the processor")
    assert find_decoder(CPU) == ("", "it needs an NVIDIA GPU")
    forced = replace(DATA, decode="gpu")
    pad = training_geometry(DATA, replace(LIGHT, crop="pad"))
    for arguments, words in [
        ((forced, LIGHT, source, geometry, CPU), "decode=gpu is impossible: this run is on the CPU"),
        ((forced, replace(LIGHT, randaugment=10), source, geometry, cuda), "RandAugment"),
        ((forced, LIGHT, source, pad, cuda), "pad"),
        ((forced, LIGHT, synthetic(DATA, "train"), geometry, cuda), "no JPEGs"),
        ((replace(DATA, decode="tpu"), LIGHT, source, geometry, CPU), "choices: auto, cpu, gpu"),
    ]:
        with pytest.raises(UserError, match=words):
            resolve_decode(*arguments)
