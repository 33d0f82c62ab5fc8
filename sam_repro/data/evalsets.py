"""The test sets of ImageNet by name, each with its own rule of what counts.

    val            the data set's own evaluation split; "v1" is another name for it
    real           ImageNet's validation images with the labels of Beyer et al. (2020): a prediction counts when it is
                   among an image's labels, and images without a label are left out
    v2             ImageNet-V2 (Recht et al. 2019), matched frequency; v2_threshold and v2_top are the other two
    r              ImageNet-R (Hendrycks et al. 2021): the best of the 200 logits that it has classes for
    c              ImageNet-C (Hendrycks & Dietterich 2019): 15 corruptions at 5 severities, from the published JPEGs

V2, R and C are read as they were published, unpacked in data.eval_root. Labels follow folder names, never their
order: synsets by ImageNet's list, V2's folders by their number.
"""

from __future__ import annotations

import json
import pkgutil
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sam_repro.config.compose import nearest
from sam_repro.config.schema import DataConfig
from sam_repro.data.datasets import FolderSource, Source, ensure, find_source, root_of
from sam_repro.data.folders import classes_in, has_image
from sam_repro.errors import UserError, plural

V2_FOLDERS = {
    "v2": "imagenetv2-matched-frequency-format-val",
    "v2_threshold": "imagenetv2-threshold0.7-format-val",
    "v2_top": "imagenetv2-top-images-format-val",
}
SETS = ("val", "real", *V2_FOLDERS, "r", "c")
SEVERITIES = (1, 2, 3, 4, 5)
# AlexNet's top-1 error on each corruption, mean over severities (hendrycks/robustness): the unit of mCE.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set, opened. Its loader delivers sample numbers where others deliver labels."""

    name: str
    source: Source
    members: np.ndarray  # int64: the samples that count
    answers: np.ndarray  # int64 [samples of the source, k]: the right classes of each, -1 where there are fewer than k
    columns: np.ndarray | None  # the logits that compete; None: all
    data: DataConfig  # as configured, with the resize rule of this set


def canonical(names: list[str]) -> list[str]:
    """The names without synonyms and repetitions. Raises UserError for one that does not exist."""
    names = list(dict.fromkeys("val" if name == "v1" else name for name in names))
    for name in names:
        if name not in SETS:
            raise UserError(
                f"there is no evaluation set '{name}'{nearest(name, [*SETS, 'v1'])} (sets: v1, {', '.join(SETS)})"
            )
    return names


def parts(name: str) -> list[str]:
    """What a set consists of: `c/<corruption>/<severity>` for c, else the set itself."""
    if name != "c":
        return [name]
    return [f"c/{corruption}/{severity}" for corruption in ALEXNET_ERRORS for severity in SEVERITIES]


def require(data: DataConfig, names: list[str]) -> list[str]:
    """Look for every part of every set, so that what is missing is known before anything takes time.

    Of c's 75 parts the first is opened; of the others only the class folders are looked into, each for one image.

    Returns:
        the names.

    Raises:
        UserError: a part is missing, lacks a class, or is not what its name says.
    """
    for name in names:
        first, *others = parts(name)
        opened = open_set(data, first)
        opened.source.close()
        for part in others:
            root = _root_of_c(data, part)
            if not root.is_dir():
                raise UserError(f"there is no folder {root}, one of the {len(others) + 1} parts of ImageNet-C")
            classes = classes_in(root)
            if differ := sorted(set(classes) ^ set(opened.source.classes)):
                raise UserError(f"{root} has other class folders than {first}: {differ[0]} is in one only")
            if empty := next((c for c in classes if not has_image(root / c)), None):
                raise UserError(f"the class folder {root / empty} has no images")
    return names


def open_set(data: DataConfig, part: str) -> EvalSet:
    """Open one part of a set (see `parts`). Raises UserError when its images are missing or not what the name says."""
    if part != "val" and data.num_classes != IMAGENET_CLASSES:
        raise UserError(f"evaluation set {part} is ImageNet's; {data.name} has {plural(data.num_classes, 'class')}")
    if part in ("val", "real"):
        ensure(data)
        source = find_source(root_of(data), "val")
        try:
            if part == "real":
                answers = _real_answers(source)
            elif data.num_classes == IMAGENET_CLASSES and set(source.classes) <= set(synsets()):
                answers = _by_synset(source)
            elif len(source.classes) == data.num_classes:
                answers = source.labels[:, None].copy()
            else:
                raise UserError(
                    f"{root_of(data)} has {plural(len(source.classes), 'class')} in val, "
                    f"but data.num_classes={data.num_classes}"
                )
        except BaseException:
            source.close()
            raise
        return _opened(part, source, answers, data)
    root = _eval_root(data)
    if part in V2_FOLDERS:
        source = FolderSource(root / V2_FOLDERS[part])
        if sorted(source.classes) != sorted(str(i) for i in range(IMAGENET_CLASSES)):
            raise UserError(f"{source.root} is not ImageNet-V2: its folders are not 0 to {IMAGENET_CLASSES - 1}")
        return _opened(part, source, np.array([int(name) for name in source.classes])[source.labels][:, None], data)
    if part == "r":
        source = FolderSource(root / "imagenet-r")
        columns = np.array([int(line) for line in _lines("imagenet_r_indices.txt")])
        answers = _by_synset(source)
        if not np.isin(answers, columns).all():
            raise UserError(f"{source.root} has class folders that are not ImageNet-R's")
        if lacking := sorted(set(columns) - set(answers.ravel())):
            lacks = f"{len(lacking)} of ImageNet-R's {plural(len(columns), 'class')}, such as {synsets()[lacking[0]]}"
            raise UserError(f"{source.root} lacks {lacks}: was it unpacked completely?")
        return _opened(part, source, answers, data, columns)
    source = FolderSource(_root_of_c(data, part))
    # The published files are 224 px crops: whoever resizes them again measures something else.
    return _opened(part, source, _by_synset(source), replace(data, eval_resize=data.image_size))


def summary_of_c(counts: dict[str, dict[str, int]]) -> dict:
    """The counts of c's parts as one entry.

    Returns correct and total over all parts; mean, the mean of the 75 top-1 accuracies in %; mce, the error over
    AlexNet's, mean over corruptions in %; corruptions, {name: {"correct": [5 severities], "total": [5]}}.
    """
    detail = {
        corruption: {key: [counts[f"c/{corruption}/{s}"][key] for s in SEVERITIES] for key in ("correct", "total")}
        for corruption in ALEXNET_ERRORS
    }
    accuracy = {name: np.divide(d["correct"], d["total"]) for name, d in detail.items()}
    relative = [(1 - accuracy[name]).mean() / error for name, error in ALEXNET_ERRORS.items()]
    return {
        "correct": sum(sum(d["correct"]) for d in detail.values()),
        "total": sum(sum(d["total"]) for d in detail.values()),
        "mean": 100 * float(np.mean(list(accuracy.values()))),
        "mce": 100 * float(np.mean(relative)),
        "corruptions": detail,
    }


def synsets() -> list[str]:
    """ImageNet-1k's classes in the order of the logits."""
    return _lines("imagenet_synsets.txt")


def _opened(
    name: str, source: Source, answers: np.ndarray, data: DataConfig, columns: np.ndarray | None = None
) -> EvalSet:
    source.labels = np.arange(len(answers))
    return EvalSet(name, source, np.flatnonzero((answers >= 0).any(1)), answers, columns, data)


def _eval_root(data: DataConfig) -> Path:
    return Path(data.eval_root).expanduser() if data.eval_root else root_of(data)


def _root_of_c(data: DataConfig, part: str) -> Path:
    """eval_root/imagenet-c/<corruption>/<severity> of a part c/<corruption>/<severity>."""
    return _eval_root(data) / "imagenet-c" / part.removeprefix("c/")


def _by_synset(source: Source) -> np.ndarray:
    """[samples, 1]: the place of each sample's folder name in ImageNet's list."""
    place = {synset: i for i, synset in enumerate(synsets())}
    odd = [name for name in source.classes if name not in place]
    if odd:
        raise UserError(f"the class folder {odd[0]} is not one of ImageNet's synsets")
    return np.array([place[name] for name in source.classes])[source.labels][:, None]


def _real_answers(source: Source) -> np.ndarray:
    """[samples, k]: the labels of Beyer et al. by validation id, which only the file names tell."""
    labels = json.loads(_info("imagenet_real_labels.json"))
    answers = np.full((len(source.labels), max(map(len, labels))), -1)
    for row, name in zip(answers, source.files, strict=True):
        found = re.search(r"ILSVRC2012_val_(\d{8})", name)
        if found is None or not 1 <= int(found[1]) <= len(labels):
            raise UserError(f"evaluation set real needs ImageNet's own file names, and {name} is not one")
        own = labels[int(found[1]) - 1]
        row[: len(own)] = own
    return answers


def _info(name: str) -> str:
    """A file that timm carries: lists of synsets, indices and labels."""
    content = pkgutil.get_data("timm.data", f"_info/{name}")
    assert content is not None
    return content.decode()


def _lines(name: str) -> list[str]:
    return _info(name).split()
