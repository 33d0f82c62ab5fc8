"""The named test sets: which answers are right, which images and logits count."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sam_repro.config.schema import DataConfig
from sam_repro.data import evalsets
from sam_repro.data.evalsets import ALEXNET_ERRORS, V2_FOLDERS, canonical, open_set, parts, summary_of_c, synsets
from sam_repro.distributed.ranks import Ranks
from sam_repro.errors import UserError
from sam_repro.training.evaluate import count_set, evaluate_sets

RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))
SIDE = 16
R_PLACES = [int(line) for line in evalsets._lines("imagenet_r_indices.txt")]


def put(folder, name, shade):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), (shade, 0, 0)).save(folder / name, "JPEG", quality=100)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A few images of each set; their red is 10 times their number."""
    for i, (place, number) in enumerate([(3, 7), (3, 2), (500, 9), (999, 4)]):
        put(tmp_path / "val" / synsets()[place], f"ILSVRC2012_val_{number:08d}.JPEG", 10 * i)
    for name in range(1000):
        put(tmp_path / V2_FOLDERS["v2"] / str(name), "a.jpeg", name // 4)
    for place in R_PLACES:  # the first class of R is the second of ImageNet
        put(tmp_path / "imagenet-r" / synsets()[place], "art_0.jpg", 0)
    for corruption in ALEXNET_ERRORS:
        for severity in range(1, 6):
            for place in (3, 500):
                put(tmp_path / "imagenet-c" / corruption / str(severity) / synsets()[place], "x.JPEG", 0)
    return tmp_path


def config(root, **changes):
    keys = {"name": "imagenet", "root": str(root), "image_size": SIDE, "eval_resize": SIDE, "workers": 1}
    return DataConfig(**(keys | {"backend": "torch"} | changes))


def always(*classes):
    """A model that ranks these classes highest, whatever it sees."""
    logits = torch.zeros(1000)
    for height, place in enumerate(reversed(classes), 1):
        logits[place] = height
    return lambda images: logits.expand(len(images), -1)


def test_val_follows_synsets_and_not_their_order(root):
    assert count_set(always(3), open_set(config(root), "val"), RANKS) == {"correct": 2, "total": 4}
    assert count_set(always(999), open_set(config(root), "val"), RANKS) == {"correct": 1, "total": 4}


def test_real_takes_any_label_and_leaves_out_images_without(root, monkeypatch):
    labels = [[] for _ in range(50_000)]
    labels[7 - 1], labels[2 - 1], labels[9 - 1] = [5, 6], [6], [8]
    monkeypatch.setattr(evalsets, "_info", lambda name: evalsets.json.dumps(labels))
    assert count_set(always(6), open_set(config(root), "real"), RANKS) == {"correct": 2, "total": 3}
    put(root / "val" / "n01440764", "mine.jpg", 0)
    with pytest.raises(UserError, match="mine.jpg is not one"):
        open_set(config(root), "real")


def test_timms_real_labels_are_those_of_the_paper():
    labels = evalsets.json.loads(evalsets._info("imagenet_real_labels.json"))
    assert len(labels) == 50_000 and sum(map(bool, labels)) == 46_837


def test_v2_folders_are_numbers(root):
    """Sorted as strings, 10 would come before 2."""
    for place in (2, 10, 999):
        opened = open_set(config(root), "v2")
        assert opened.answers[[i for i, f in enumerate(opened.source.files) if f == f"{place}/a.jpeg"]] == place
    assert count_set(always(10), open_set(config(root), "v2"), RANKS) == {"correct": 1, "total": 1000}
    with pytest.raises(UserError, match="there is no folder .*threshold0.7"):
        open_set(config(root), "v2_threshold")
    put(root / V2_FOLDERS["v2_top"] / "n01440764", "a.jpeg", 0)
    with pytest.raises(UserError, match="not ImageNet-V2"):
        open_set(config(root), "v2_top")


def test_r_lets_its_200_classes_compete(root):
    # 0 (tench) is not in R: the best of R's logits is 1.
    assert len(open_set(config(root), "r").columns) == 200
    assert count_set(always(0, 1), open_set(config(root), "r"), RANKS) == {"correct": 1, "total": 200}
    shutil.rmtree(root / "imagenet-r" / synsets()[R_PLACES[7]])
    with pytest.raises(UserError, match=f"lacks 1 of ImageNet-R's 200 classes, such as {synsets()[R_PLACES[7]]}"):
        open_set(config(root), "r")
    put(root / "imagenet-r" / "n01440764", "art_0.jpg", 0)
    with pytest.raises(UserError, match="not ImageNet-R's"):
        open_set(config(root), "r")


def test_c_counts_every_part_and_is_not_resized(root):
    assert len(parts("c")) == 75
    assert open_set(config(root, eval_resize=20), "c/fog/3").data.eval_resize == SIDE
    counts = evaluate_sets(always(3), config(root), ["c"], RANKS)["c"]
    assert (counts["correct"], counts["total"], counts["mean"]) == (75, 150, pytest.approx(50))
    assert counts["corruptions"]["fog"] == {"correct": [1] * 5, "total": [2] * 5}
    assert counts["mce"] == pytest.approx(100 * np.mean([0.5 / e for e in ALEXNET_ERRORS.values()]))


@pytest.mark.parametrize("damage", ["corruption", "severity", "class", "image"])
def test_every_part_of_c_is_looked_for_before_anything_is_counted(root, damage):
    part = root / "imagenet-c" / "pixelate" / "4"
    folder = {"corruption": part.parent, "severity": part, "class": part / synsets()[500]}.get(damage)
    if folder is None:
        (part / synsets()[500] / "x.JPEG").rename(part / synsets()[500] / "x.txt")
    else:
        shutil.rmtree(folder)

    def model(images):
        raise AssertionError("nothing may be counted")

    with pytest.raises(UserError, match="pixelate/"):
        evaluate_sets(model, config(root), ["val", "c"], RANKS)


def test_alexnets_mce_is_100():
    total = 1_000_000
    counts = {p: {"correct": round(total * (1 - ALEXNET_ERRORS[p.split("/")[1]])), "total": total} for p in parts("c")}
    assert summary_of_c(counts)["mce"] == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_a_set_without_padding(root, world):
    class Part(Ranks):
        def sum_(self, tensor):
            return tensor

    seen = []
    for rank in range(world):
        opened = open_set(config(root), "v2")
        ranks = Part(rank, world, 0, 1, torch.device("cpu"))
        with pytest.raises(AssertionError, match="of images=1000") as caught:  # one rank alone is not the set
            count_set(always(0), opened, ranks)
        seen.append(int(re.search(r"evaluated (\d+)", str(caught.value))[1]))
    assert sum(seen) == 1000 and max(seen) - min(seen) <= 1


def test_names():
    assert canonical(["v1", "real", "val"]) == ["val", "real"]
    with pytest.raises(UserError, match="no evaluation set 'reel'; did you mean 'real'"):
        canonical(["reel"])


def test_other_data_have_val_only(root):
    with pytest.raises(UserError, match="is ImageNet's; pets has 37 classes"):
        open_set(config(root, name="pets", num_classes=37), "real")
    with pytest.raises(UserError, match="has 3 classes in val, but data.num_classes=37"):
        open_set(config(root, name="pets", num_classes=37), "val")
    assert count_set(always(2), open_set(config(root, num_classes=3), "val"), RANKS) == {"correct": 1, "total": 4}
