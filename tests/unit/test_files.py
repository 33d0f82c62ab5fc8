"""The one atomic writer and the one digest."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import stat

import pytest

from sam_repro.records.files import remove_temporaries, sha256, write_atomic

CONTENTS = {"text": ("ρ\n", "ρ\n".encode()), "bytes": (b"\0\1", b"\0\1"), "function": (lambda f: f.write(b"ab"), b"ab")}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_is_written_is_there(kind, tmp_path):
    content, expected = CONTENTS[kind]
    (tmp_path / "a").write_text("older and longer than what follows")
    assert write_atomic(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == expected and sha256(tmp_path / "a") == sha256(expected)
    assert sha256(expected) == hashlib.sha256(expected).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_mode_is_that_of_an_ordinary_file(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path):
    def half(file):
        file.write(b"half")
        raise RuntimeError("the disk is full")

    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError, match="full"):
        write_atomic(tmp_path / "a", half)
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_must_not_be_replaced_stays(tmp_path):
    assert write_atomic(tmp_path / "a", "first", replace=False)
    assert not write_atomic(tmp_path / "a", "second", replace=False)
    assert (tmp_path / "a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def write_often(path, letter):
    for _ in range(50):
        write_atomic(path, letter * 10_000)


def test_two_writers_never_mix(tmp_path):
    path = tmp_path / "a"
    writers = [multiprocessing.get_context("spawn").Process(target=write_often, args=(path, x)) for x in "xy"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert path.read_text() in ("x" * 10_000, "y" * 10_000)
    assert [writer.exitcode for writer in writers] == [0, 0]


def test_debris_of_one_file_is_removed_and_no_others(tmp_path):
    for name in ("a.json", "a.json.01234567.tmp", "ba.json.01234567.tmp", "b.json"):
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path, "a.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json", "ba.json.01234567.tmp"]
