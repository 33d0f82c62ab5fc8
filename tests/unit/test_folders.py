"""Class folders as people have them: odd names, links, and what systems and programs leave among the images."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam_repro.cli.main import main
from sam_repro.data.datasets import FolderSource, find_source
from sam_repro.data.folders import Names
from sam_repro.data.manifest import read_files
from sam_repro.data.write import write_dataset
from sam_repro.errors import UserError

SYSTEM_FILES = (
    ".DS_Store",
    "._0.jpg",
    ".0.jpg",
    "Thumbs.db",
    "desktop.ini",
    ".nfs0000001.jpg",
    ".0.jpg.swp",
    "list.txt",
)
SYSTEM_FOLDERS = (
    "@eaDir",
    "__MACOSX",
    "lost+found",
    ".ipynb_checkpoints",
    ".Trash-1000",
    "$RECYCLE.BIN",
    "#recycle",
    ".git",
)


def put(path: Path | bytes, shade: int = 0) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        Image.new("RGB", (20, 20), (shade, 60, 30)).save(file, "JPEG")


@pytest.fixture
def src(tmp_path) -> Path:
    """train/ and val/ with the classes a and b, two images each."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            for i in range(2):
                put(tmp_path / "src" / split / name / f"{i}.jpg", 90 * i)
    return tmp_path / "src"


def write(src: Path, **options) -> dict:
    return write_dataset(src, src.parent / "dst", progress=False, workers=1, **options)


CLEAN = ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg"]


def test_what_systems_and_programs_leave_is_no_class_and_no_image(src):
    root = src / "train"
    for folder in (root, root / "a"):
        for name in SYSTEM_FILES:
            put(folder / name)
        for name in SYSTEM_FOLDERS:
            put(folder / name / "x.jpg")
            put(folder / name / "a" / "0.jpg")
    source = FolderSource(root)
    assert source.classes == ["a", "b"] and list(source.files) == CLEAN
    assert write(src)["train"]["samples"] == 4


def test_the_name_of_the_images_is_that_of_their_list(src):
    """Runs and checkpoints know class folders by it."""
    source = FolderSource(src / "train")
    assert source.manifest == hashlib.sha256(json.dumps(CLEAN).encode()).hexdigest()[:16]
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("target", ["a", ".", "..", "../..", "b", "/"])
def test_a_link_to_a_folder_above_or_beside_is_not_entered(src, target):
    root = src / "train"
    (root / "a" / "deep").mkdir()
    put(root / "a" / "deep" / "2.jpg")
    for place in (root / "a" / "link", root / "a" / "deep" / "link"):
        place.symlink_to(target if target == "/" else (root / target).resolve())
    assert list(FolderSource(root).files) == ["a/0.jpg", "a/1.jpg", "a/deep/2.jpg", *CLEAN[2:]]


def test_links_that_lead_to_images_are_followed_and_each_image_is_read_once(src, tmp_path):
    root = src / "train"
    (root / "b").rename(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    put(tmp_path / "more" / "5.jpg")
    for name in ("more", "again", "and_again"):
        (root / "a" / name).symlink_to(tmp_path / "more")
    (root / "a" / "7.jpg").symlink_to(tmp_path / "more" / "5.jpg")
    assert list(FolderSource(root).files) == ["a/0.jpg", "a/1.jpg", "a/7.jpg", "a/again/5.jpg", *CLEAN[2:]]


def test_trees_that_cannot_be_right_are_sentences(src, tmp_path):
    root = src / "train"

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            FolderSource(root)

    (root / "a" / "9.jpg").symlink_to(tmp_path / "nowhere.jpg")
    refused("9.jpg is a link to a file that is not there")
    (root / "a" / "9.jpg").unlink()
    (root / "c").symlink_to(tmp_path / "nowhere")
    refused("train/c is a link to a folder that is not there")
    (root / "c").unlink()
    (root / "c").symlink_to(root / "a")
    refused("the class folders a and c of .* are the same folder, by a link")
    (root / "c").unlink()
    (root / "c" / "inside").mkdir(parents=True)
    refused("the class folder .*c has no images")
    (root / "c").rename(root / "train")
    put(root / "train" / "a" / "0.jpg")
    refused("train holds a folder train/ of class folders")
    put(root / "train" / "0.jpg")  # a class may be called train, if it has images of its own
    assert FolderSource(root).classes == ["a", "b", "train"]


def test_a_folder_that_may_not_be_read_is_a_sentence(src, tmp_path):
    """Not silently without its images. In a process without root's rights, where there is another user."""
    if os.getuid() != 0:
        pytest.skip("needs root to become nobody")
    (src / "train" / "a" / "more").mkdir(mode=0o700)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom sam_repro.data.datasets import FolderSource\nos.setuid(65534)\n"
        "try:\n    print(list(FolderSource(Path(sys.argv[1])).files))\nexcept ValueError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", script, src / "train"], capture_output=True, text=True)
    assert "cannot read" in said.stdout and "Permission denied" in said.stdout, said.stdout + said.stderr


ODD = [
    b"gr\xfcn.jpg",
    b"\xff\xfe.jpg",
    "é \u2028\x85\r\x0b\x0c\x1c.jpg".encode(),
    b"a\tb'\"\\n$(x).jpg",
    b" .jpg",
    b"-.JPG",
]


def test_names_of_any_bytes_are_written_and_found_again(src, capsys):
    root = os.fsencode(src / "train" / "a")
    for name in ODD:
        put(root + b"/" + name)
    (src / "train" / "b").rename(os.fsdecode(os.fsencode(src / "train") + b"/\xe9t\xe9"))
    (src / "val" / "b").rename(os.fsdecode(os.fsencode(src / "val") + b"/\xe9t\xe9"))
    arguments = ["write", "imagefolder", "--src", str(src), "--dst", str(src.parent / "dst")]
    assert main(arguments) == 0
    names, source = read_files(src.parent / "dst" / "train.beton"), FolderSource(src / "train")
    assert names == list(source.files) and len(names) == 10
    assert {os.fsencode(name) for name in names if name.startswith("a/")} >= {b"a/" + name for name in ODD}
    opened = find_source(src.parent / "dst", "train")
    assert opened.classes == source.classes == ["a", os.fsdecode(b"\xe9t\xe9")]
    assert main(arguments) == 0 and capsys.readouterr().out.count("is up to date") == 2


def test_a_line_break_in_a_name_is_refused_before_anything_is_written(src):
    put(src / "val" / "b" / "x\ny.jpg")
    with pytest.raises(UserError, match=r"val: the name 'b/x\\ny.jpg' has a line break in it; rename the file"):
        write(src)
    assert not (src.parent / "dst").exists()


def test_odd_names_can_be_printed(src):
    """Standard output may be strict about what it takes."""
    (src / "train" / "a" / "0.jpg").write_bytes(b"no image")
    os.rename(src / "train" / "a" / "0.jpg", os.fsencode(src / "train" / "a") + b"/\xfc.jpg")
    put(os.fsencode(src / "train") + b"/beside\xfc.jpg")
    command = [sys.executable, "-m", "sam_repro.cli", "write", "imagefolder", "--src", src, "--dst", src.parent / "dst"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "1 image next to the class folders left out, such as beside" in done.stdout
    assert "cannot use a/" in done.stderr


def test_classes_that_differ_only_in_spelling_are_pointed_out(src, capsys):
    for split in ("train", "val"):
        put(src / split / "A" / "0.jpg")
        put(src / split / "e\u0301t" / "0.jpg")
        put(src / split / "\u00e9t" / "0.jpg")
    write(src)
    said = capsys.readouterr().out
    assert "train: the classes A and a differ only in spelling" in said and said.count("differ only in spelling") == 4
    (src / "val" / "\u00e9t").rename(src / "val" / "\u00c9T")
    with pytest.raises(UserError, match="for example .*, which differ only in case or accents"):
        write(src)


def test_a_flat_validation_folder_is_not_mistaken(tmp_path):
    val = tmp_path / "src" / "val"
    for number in (1, 2):
        put(val / f"ILSVRC2012_val_{number:08}.JPEG")
    lines = [f"ILSVRC2012_val_{number:08},n0144076{number} 1 2 3 4" for number in (1, 2)]
    (tmp_path / "src" / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]))
    for name in SYSTEM_FOLDERS:
        put(val / name / "x.jpg")
    for name in ("._ILSVRC2012_val_00000001.JPEG", ".DS_Store"):
        put(val / name)
    assert write(tmp_path / "src", layout="imagenet")["val"]["counts"] == [1, 1]
    put(val / "ILSVRC2012_val_00000002 (1).JPEG")
    with pytest.raises(UserError, match="have the same number: one of them is a copy"):
        write(tmp_path / "src", layout="imagenet")
    put(val / "n01440761" / "ILSVRC2012_val_00000003.JPEG")  # a script that sorts them was stopped
    with pytest.raises(UserError, match="has class folders and 3 images next to them"):
        write(tmp_path / "src", layout="imagenet")


def test_packed_names_are_a_sequence():
    words = ["", "a", os.fsdecode(b"\xff"), "é\u2028", "x" * 1000]
    names = Names(words[:2])
    names.extend(words[2:])
    assert list(names) == words and names[-1] == words[-1] and names[1:4] == words[1:4] and len(names) == 5
    assert names[np.int64(2)] == words[2]
    with pytest.raises(IndexError):
        names[5]
