"""`write` killed at any moment: the same command goes on, and writes the file that an undisturbed one writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from sam_repro.data.manifest import read_files, read_manifest
from sam_repro.data.write import partial as module
from sam_repro.data.write import write_dataset
from sam_repro.errors import UserError

COUNT = 60
# Kills itself with SIGKILL at a moment that a test names; every image is saved at once.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from sam_repro.data.write import dataset, partial
src, dst, moment, number, *options = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
partial.SAVE_SECONDS = 0.0
if moment == "image":
    add = partial.PartialBeton.add
    def counted(self, image, sample, how):
        if image == int(number): die()
        add(self, image, sample, how)
    partial.PartialBeton.add = counted
elif moment == "journal":  # the samples are on the disk, half of an entry is
    save = partial.PartialBeton.save
    def torn(self):
        save(self)
        if self.count == int(number):
            os.truncate(self.journal, os.path.getsize(self.journal) - 20)
            die()
    partial.PartialBeton.save = torn
elif moment == "finish":
    partial.PartialBeton.finish = die
elif moment == "rename":
    partial.os.replace = die
elif moment == "manifest":
    dataset.write_manifest = die
dataset.write_dataset(src, dst, progress=False, workers=1, skip_bad="skip" in options)
"""


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    """60 images of 3 classes, every seventh to be re-encoded."""
    root = tmp_path_factory.mktemp("src")
    for i in range(COUNT):
        path = root / "train" / f"c{i % 3}" / f"{i:02}{'.png' if i % 7 == 0 else '.jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(small, (60 + i, 50), interpolation=cv2.INTER_CUBIC))
    return root


def killed(src: Path, dst: Path, moment: str, number: int = 0, *options: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(src), str(dst), moment, str(number), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def write(src: Path, dst: Path, **options) -> dict:
    return write_dataset(src, dst, progress=False, workers=1, **options)["train"]


def same(one: Path, other: Path) -> bool:
    assert (
        sorted(os.listdir(one))
        == sorted(os.listdir(other))
        == ["train.beton", "train.files.txt", "train.manifest.json"]
    )
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in os.listdir(one))


@pytest.mark.parametrize(
    ("moment", "number"),
    [("image", 1), ("image", 37), ("image", 59), ("journal", 40), ("finish", 0), ("rename", 0), ("manifest", 0)],
)
def test_the_same_command_goes_on(src, tmp_path, moment, number, capsys):
    killed(src, tmp_path / "dst", moment, number)
    write(src, tmp_path / "undisturbed")
    capsys.readouterr()
    write(src, tmp_path / "dst")
    done = {"image": number, "journal": number - 1}.get(moment, COUNT)
    assert f"going on after {done} of 60 images" in capsys.readouterr().out
    assert same(tmp_path / "dst", tmp_path / "undisturbed")


def test_killed_again_and_again(src, tmp_path):
    for number in (10, 11, 30, 58):
        killed(src, tmp_path / "dst", "image", number)
    write(src, tmp_path / "dst"), write(src, tmp_path / "undisturbed")
    assert same(tmp_path / "dst", tmp_path / "undisturbed")


@pytest.mark.parametrize("change", ["settings", "images", "data", "data gone", "journal"])
def test_what_does_not_fit_is_begun_afresh(src, tmp_path, change, capsys):
    killed(src, tmp_path / "dst", "image", 37)
    data, journal = tmp_path / "dst" / ".train.beton.partial", tmp_path / "dst" / ".train.beton.journal"
    options = {"max_side": 55} if change == "settings" else {}
    if change == "images":
        os.utime(src / "train" / "c0" / "00.png", (1, 1))
    elif change == "data":
        content = bytearray(data.read_bytes())
        content[-9] ^= 1
        data.write_bytes(content)
    elif change == "data gone":
        data.unlink()
    elif change == "journal":
        journal.write_bytes(journal.read_bytes()[:30])
    write(src, tmp_path / "dst", **options)
    assert "going on" not in capsys.readouterr().out
    write(src, tmp_path / "undisturbed", **options)
    assert same(tmp_path / "dst", tmp_path / "undisturbed")


def test_a_file_that_is_there_stays_until_the_next_is_complete(src, tmp_path):
    write(src, tmp_path / "dst")
    before = (tmp_path / "dst" / "train.beton").read_bytes()
    os.utime(src / "train" / "c0" / "03.jpg", (2, 2))
    killed(src, tmp_path / "dst", "image", 50)
    (tmp_path / "dst" / ".train.beton.partial").unlink()  # the journal alone must not lead to the old file
    os.utime(src / "train" / "c0" / "03.jpg", (3, 3))
    assert (tmp_path / "dst" / "train.beton").read_bytes() == before
    write(src, tmp_path / "dst")
    assert (tmp_path / "dst" / "train.beton").read_bytes() == before


def test_a_bad_image_is_met_again_and_left_out_when_asked(src, tmp_path, monkeypatch, capsys):
    root = tmp_path / "src"
    for path in sorted((src / "train").rglob("*.*")):
        (root / path.relative_to(src)).parent.mkdir(parents=True, exist_ok=True)
        (root / path.relative_to(src)).write_bytes(path.read_bytes())
    for name in ("c1/25.jpg", "c2/59.jpg"):
        (root / "train" / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="c1/25.jpg"):
        write(root, tmp_path / "dst")
    assert os.listdir(tmp_path / "dst") == []  # nothing was worth keeping
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    with pytest.raises(UserError, match="c1/25.jpg"):
        write(root, tmp_path / "dst")
    monkeypatch.undo()
    capsys.readouterr()
    killed(root, tmp_path / "dst", "image", 50, "skip")
    with pytest.raises(UserError, match="c1/25.jpg"):  # what left an image out is no use without leave
        write(root, tmp_path / "dst")
    killed(root, tmp_path / "dst", "image", 50, "skip")
    manifest = write(root, tmp_path / "dst", skip_bad=True)
    assert manifest["skipped"] == ["c1/25.jpg", "c2/59.jpg"] and manifest["samples"] == 58
    assert len(read_files(tmp_path / "dst" / "train.beton")) == 58
    write(root, tmp_path / "undisturbed", skip_bad=True)
    assert same(tmp_path / "dst", tmp_path / "undisturbed")


def test_two_commands_do_not_write_one_file(src, tmp_path):
    (tmp_path / "dst").mkdir()
    first = module.PartialBeton(tmp_path / "dst" / "train.beton", "k" * 64, 60, gaps=False)
    with first, pytest.raises(UserError, match="another process is writing .*train.beton"):
        write(src, tmp_path / "dst")
    assert write(src, tmp_path / "dst")["samples"] == COUNT


def test_a_disk_that_fills_up(src, tmp_path):
    """By a limit on the size of files: the sentence says that the same command goes on, and it does."""
    script = SCRIPT.replace("import os,", "import resource, os,").replace(
        "partial.SAVE_SECONDS = 0.0",
        "partial.SAVE_SECONDS = 0.0\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import errno\nerrno.EDQUOT = errno.EFBIG\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, ((8 << 20) + 60_000,) * 2)",
    )
    command = [sys.executable, "-c", script, str(src), str(tmp_path / "dst"), "none", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "the disk is full" in done.stderr and "once there is room, the same command goes on" in done.stderr
    write(src, tmp_path / "dst"), write(src, tmp_path / "undisturbed")
    assert same(tmp_path / "dst", tmp_path / "undisturbed")
    assert read_manifest(tmp_path / "dst" / "train.beton")["samples"] == COUNT
