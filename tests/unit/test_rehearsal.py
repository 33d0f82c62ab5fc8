"""Data of ImageNet's shape for the dress rehearsal: the counts, the layouts, and what `write` makes of each."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.rehearsal_data import class_counts, make_beton, make_flat, make_folders, make_tars, photographs
from sam_repro.data.datasets import BetonSource
from sam_repro.data.write import write_dataset

COUNTS = class_counts(2000)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[tuple[bytes, int, int]]:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(7):
        small = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.jpg"), cv2.resize(small, (60, 40)))
    return photographs(folder, 1500, 48)


def test_the_counts_are_those_that_are_published():
    counts = class_counts()
    assert counts.sum() == 1_281_167 and counts.min() == 732 and counts.max() == 1300
    assert len(counts) == 1000 and (counts == 1300).sum() == 895
    assert COUNTS.sum() == 2000 and COUNTS.min() > 0


def test_photographs_have_the_side_and_the_bytes(photos):
    assert len(photos) == 7 and all(max(height, width) == 48 for _, height, width in photos)
    assert np.mean([len(data) for data, _, _ in photos]) >= 1500


def test_every_layout_gives_the_same_images(photos, tmp_path: Path):
    make_folders(tmp_path / "folders", photos, COUNTS, 1000)
    make_tars(tmp_path / "tars", photos, COUNTS, 1000)
    make_flat(tmp_path / "flat", photos, 1000)
    written = {}
    for name in ("folders", "tars", "flat"):
        written[name] = write_dataset(tmp_path / name, tmp_path / f"from_{name}", layout="imagenet", progress=False)
    assert written["folders"]["train"]["sha256"] == written["tars"]["train"]["sha256"]
    assert written["folders"]["train"]["counts"] == COUNTS.tolist()
    assert written["tars"]["val"]["sha256"] == written["flat"]["val"]["sha256"]
    assert written["folders"]["val"]["counts"] == written["flat"]["val"]["counts"] == [1] * 1000


@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_a_file_whose_later_samples_point_at_stored_ones_is_read_like_any_other(seconds, photos, tmp_path: Path):
    made = make_beton(tmp_path / "train.beton", photos, COUNTS, seconds=seconds, reserve=0)
    source = BetonSource(tmp_path / "train.beton")
    assert made["samples"] == len(source.labels) == 2000 and (made["stored"] == 2000) == (seconds > 0)
    assert np.bincount(source.labels).tolist() == COUNTS.tolist()
    assert source.read(1999).shape in {(height, width, 3) for _, height, width in photos}
    source.close()
