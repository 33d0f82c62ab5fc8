"""Decoding and cropping on the GPU against the CPU path, on images made here."""

from __future__ import annotations

import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from gpu_crops import assert_crops_of_the_cpu_path, every_geometry
from PIL import Image

from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.beton import write_beton
from sam_repro.data.datasets import BetonSource
from sam_repro.data.images.crop import training_geometry
from sam_repro.data.images.gpu_decode import DECODERS, find_decoder
from sam_repro.data.loaders.build import build_loader, resolve_decode
from sam_repro.data.manifest import write_manifest
from sam_repro.errors import UserError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CUDA = torch.device("cuda", 0)
COUNT, SIDE = 640, 96


def picture(i: int) -> np.ndarray:
    height, width = 200 + 11 * (i % 17), 180 + 13 * (i % 23)
    small = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(i: int) -> bytes:
    """Mostly baseline 4:2:0; also progressive, grey, 4:4:4, and CMYK, which no GPU decodes."""
    file, image = io.BytesIO(), Image.fromarray(picture(i))
    if i % 40 == 7:
        image.save(file, "jpeg", quality=90, progressive=True)
    elif i % 40 == 13:
        image.convert("L").save(file, "jpeg", quality=90)
    elif i % 40 == 21:
        image.save(file, "jpeg", quality=95, subsampling=0)
    elif i % 160 == 33:
        image.convert("CMYK").save(file, "jpeg", quality=90)
    else:
        image.save(file, "jpeg", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    samples = ((jpeg(i), *picture(i).shape[:2], i % 10, False) for i in range(COUNT))
    write_beton(root / "train.beton", samples, capacity=COUNT)
    write_manifest(root / "train.beton", [f"c{i}" for i in range(10)])
    return root


def make(root, decode, augment=None, **changes):
    keys = {"name": "x", "root": str(root), "num_classes": 10, "image_size": SIDE, "eval_resize": SIDE}
    data = DataConfig(**(keys | {"backend": "torch", "decode": decode, "workers": 4} | changes))
    augment = augment or AugmentConfig(name="light")
    return build_loader(data, augment, split="train", training=True, batch_size=160, seed=5, device=CUDA)


@every_geometry
def test_the_kernel_is_the_cpu_path_to_the_bit(mode, filter):
    assert_crops_of_the_cpu_path(mode, filter, CUDA, repeats=5)


@pytest.mark.parametrize("name", list(DECODERS))
def test_decoders_differ_from_libjpeg_in_how_they_enlarge_colour(name):
    """nvJPEG repeats the halved colour planes, libjpeg interpolates them: 3 of 255 on pictures as colourful."""
    data = [bytearray(jpeg(i)) for i in range(32) if i % 40 not in (13, 33)]
    try:
        DECODERS[name](data[:1], CUDA)
    except Exception as error:
        pytest.skip(f"{name} does not work here: {error}")  # that one of them does is tested below
    decoded = DECODERS[name](data, CUDA)
    assert len(decoded) == len(data)
    for got, stored in zip(decoded, data, strict=True):
        want = torch.from_numpy(np.array(Image.open(io.BytesIO(stored)))).permute(2, 0, 1)
        difference = (got.cpu().int() - want.int()).abs().float()
        assert got.shape == want.shape and difference.mean() < 5 and difference.max() < 64


@pytest.mark.parametrize("antialias", [False, True])
def test_the_loaders_agree(root, antialias):
    gpu, cpu = make(root, "gpu", antialias=antialias), make(root, "cpu", antialias=antialias)
    assert gpu.backend == "gpu" and find_decoder(CUDA)[0] in gpu.reason
    for epoch in (0, 1):
        kept = list(gpu.epoch(epoch))
        assert len(kept) == len(gpu) == 4
        for (x, y), (want, labels) in zip(kept, cpu.epoch(epoch), strict=True):
            assert torch.equal(y, labels) and x.stride() == want.stride() and x.device == CUDA
            per_image = (x.int() - want.int()).abs().float().mean((1, 2, 3))
            assert per_image.mean() < 1.5 and per_image.max() < 4
    assert gpu.refused.sum() == 4  # the CMYK images came from the processor
    again = list(gpu.epoch(1, 2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, kept[2:], strict=True))
    gpu.close(), cpu.close()


def test_batches_are_right_while_the_gpu_is_busy(root):
    """The step's stream is far behind the host; nothing may be overwritten before it is read.

    Not to the bit: while other processes use the GPU, nvJPEG has been seen to decode a batch a little differently.
    Another image's pixels would differ by tens.
    """
    gpu = make(root, "gpu")
    want = [x.clone() for e in range(2) for x, _ in gpu.epoch(e)]
    load, differences = torch.randn(4096, 4096, device=CUDA), []
    for epoch in range(2):
        for x, _ in gpu.epoch(epoch):
            for _ in range(30):
                load = torch.tanh(load @ load)
            differences.append((x.int() - want[len(differences)].int()).abs().float().mean((1, 2, 3)))
            del x
    shuffled = (want[0].int() - want[0].flip(0).int()).abs().float().mean((1, 2, 3))
    assert torch.stack(differences).max() < 4 < 10 < shuffled.min()
    gpu.close()


def test_the_gpu_s_decoder_is_taken_where_asked_for(root):
    data = DataConfig(name="x", root=str(root), num_classes=10, decode="gpu")
    light, source = AugmentConfig(name="light"), BetonSource(root / "train.beton")
    geometry = training_geometry(data, light)
    assert resolve_decode(data, light, source, geometry, CUDA)[0] == find_decoder(CUDA)[0] != ""
    with pytest.raises(UserError, match="RandAugment"):
        resolve_decode(data, replace(light, randaugment=10), source, geometry, CUDA)
