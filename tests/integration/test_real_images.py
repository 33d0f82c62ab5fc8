"""Real images, labels and weights, where a person has them: the folder in SAM_REPRO_TEST_DATA."""

from __future__ import annotations

import os
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sam_repro.cli import evaluate as evaluate_command
from sam_repro.data.evalsets import open_set
from sam_repro.data.loaders.build import build_set_loader
from sam_repro.distributed.ranks import Ranks
from sam_repro.models.objective import forward_of
from sam_repro.training.evaluate import evaluate_sets

DATA = Path(os.environ.get("SAM_REPRO_TEST_DATA", "/nonexistent"))
WEIGHTS = DATA / "weights" / "tf_efficientnet_lite0_fp16.safetensors"
VAL, C_STYLE = DATA / "imagenet_val650_public_227.zip", DATA / "imagenet_c_style_public.zip"
CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not WEIGHTS.exists(), reason="SAM_REPRO_TEST_DATA does not lead to real images and weights"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    zipfile.ZipFile(VAL).extractall(root / "val")
    zipfile.ZipFile(C_STYLE).extractall(root / "imagenet-c")
    return root


@pytest.fixture(scope="module")
def lite0(root):
    """(configuration, model) as `sam-repro evaluate` loads them."""
    parser = ArgumentParser()
    evaluate_command.add_arguments(parser)
    arguments = [str(WEIGHTS), "--model", "tf_efficientnet_lite0", "--root", str(root), "--batch-size", "25"]
    cfg, model = evaluate_command.load(parser.parse_args(arguments))
    return cfg, model.eval()


@torch.no_grad()
def plain_predictions(model, files: list[Path]) -> np.ndarray:
    """Pillow, torchvision, timm and nothing of ours: what timm's documentation tells to do."""
    from timm.data import create_transform, resolve_model_data_config

    view = create_transform(**resolve_model_data_config(model), is_training=False)
    predicted = []
    for start in range(0, len(files), 25):
        batch = torch.stack([view(Image.open(file).convert("RGB")) for file in files[start : start + 25]])
        predicted.append(model(batch).argmax(1))
    return torch.cat(predicted).numpy()


@torch.no_grad()
def our_predictions(cfg, model, opened) -> np.ndarray:
    """By sample number; -1 for those that do not count."""
    forward = forward_of(cfg, model, CPU, bf16=False)
    predicted = np.full(len(opened.answers), -1)
    for images, numbers in build_set_loader(opened, batch_size=25, device=CPU).epoch(0):
        predicted[numbers] = forward({}, images).argmax(1).numpy()
    return predicted


def test_the_same_predictions_as_pillow_and_torchvision(lite0):
    cfg, model = lite0
    opened = open_set(cfg.data, "val")
    files = [opened.source.root / name for name in opened.source.files]
    plain, ours = plain_predictions(model, files), our_predictions(cfg, model, opened)
    assert np.array_equal(plain, ours)
    right = (plain[:, None] == opened.answers).any(1).mean()
    assert right == pytest.approx(0.833, abs=0.03)  # of the 1,300 images that these are half of
    real = open_set(cfg.data, "real")
    assert len(real.members) == 624
    ours_real = (ours[:, None] == real.answers)[real.members].any(1).mean()
    assert ours_real == pytest.approx(0.887, abs=0.03)


def test_corrupted_images(lite0):
    """Severities 1 to 5, as the plain evaluation that the figures are from."""
    cfg, model = lite0
    ranks, forward = Ranks(0, 1, 0, 1, CPU), forward_of(cfg, model, CPU, bf16=False)
    counts = evaluate_sets(lambda x: forward({}, x), cfg.data, ["c"], ranks)["c"]
    corruptions = counts["corruptions"].values()
    for severity, expected in enumerate([60.7, 52.7, 38.0, 22.7, 17.3]):
        correct, total = (sum(c[key][severity] for c in corruptions) for key in ("correct", "total"))
        assert total == 150 and 100 * correct / total == pytest.approx(expected, abs=0.7)  # one image
