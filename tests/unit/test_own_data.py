"""Images of one's own in class folders: what must not change between their parts, and between two starts of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_repro.config.compose import compose_config
from sam_repro.errors import UserError
from sam_repro.training.main import main


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("birds", "cats", "dogs"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path / "data"


def train(root: Path, *overrides: str):
    words = ["model=vit_digits", "optim=sam", "debug=tiny", "data=imagenette", "data.name=mine", "data.num_classes=3"]
    words += ["data.image_size=32", "data.eval_resize=32", "recipe.batch_size=8", "recipe.steps=3"]
    folders = [f"data.root={root}", f"log.runs_dir={root.parent}/runs", "train.device=cpu"]
    return main(compose_config([*words, *folders, *overrides]))


def test_classes_of_the_parts_have_the_same_names(root: Path):
    (root / "val" / "cats").rename(root / "val" / "zebras")
    with pytest.raises(UserError, match="other classes in val than in train: cats, zebras in one only"):
        train(root)


def test_a_run_goes_on_with_the_images_it_began_with(root: Path, capsys: pytest.CaptureFixture[str]):
    row = train(root)
    assert train(root.parent / "data" / ".." / "data")["finished"] == row["finished"]
    assert f"{row['run_id']}.json, with the images of data.root={root}" in capsys.readouterr().err
    (root.parent / "runs" / "ledger" / f"{row['run_id']}.json").unlink()  # as if it had been stopped at its last step
    (root / "train" / "cats" / "0.jpg").rename(root / "train" / "dogs" / "8.jpg")
    with pytest.raises(UserError, match="was begun with other training images"):
        train(root)
