"""Pixels of the loader that keeps a data set on the GPU, against those of the processor's."""

from __future__ import annotations

import pytest
import torch

from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.loaders.build import build_loader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("crop", ["inception", "pad", "none"])
def test_pixels_are_equal_to_the_last_bit(crop):
    data = DataConfig(name="synthetic", num_classes=10, image_size=48, eval_resize=48)
    found = {}
    for backend, device in (("auto", "cuda"), ("torch", "cpu")):
        data.backend = backend
        loader = build_loader(
            data, AugmentConfig(name="x", crop=crop), split="train", training=True, batch_size=64, seed=1,
            device=torch.device(device),
        )  # fmt: skip
        found[loader.backend] = [(x.cpu(), y.cpu()) for epoch in range(3) for x, y in loader.epoch(epoch)]
        loader.close()
    for (x, y), (u, v) in zip(found["memory"], found["torch"], strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
