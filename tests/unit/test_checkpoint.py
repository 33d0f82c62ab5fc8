"""Checkpoints: damage, other configurations, full disks, and what is kept."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sam_repro.errors import UserError
from sam_repro.training import checkpoint

CPU = torch.device("cpu")


def save(folder, step, *, score=None, value=None):
    state = {"step": step, "model": {"w": torch.full((1000,), float(step if value is None else value))}}
    return checkpoint.save(folder, state, step=step, config_hash="abc", score=score)


def load(folder, config_hash="abc"):
    return checkpoint.load_newest(folder, config_hash=config_hash, device=CPU)


def test_nothing_there(tmp_path):
    assert load(tmp_path) == (None, [])


def test_newest_two_and_the_best_are_kept(tmp_path):
    for step, score in [(1, 0.2), (2, 0.9), (3, None), (4, 0.5), (5, None)]:
        save(tmp_path, step, score=score)
    assert [r["step"] for r in checkpoint.records(tmp_path)] == [2, 4, 5]
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [f"step-0000000{n}.pt" for n in (2, 4, 5)]
    state, damaged = load(tmp_path)
    assert state is not None and state["step"] == 5 and not damaged


def test_what_is_saved_after_going_back_behind_damaged_ones_stays(tmp_path):
    save(tmp_path, 10, score=0.5)
    for step in (20, 30):
        save(tmp_path, step).write_bytes(b"")
    assert load(tmp_path)[0]["step"] == 10
    save(tmp_path, 12)
    state, damaged = load(tmp_path)
    assert state is not None and state["step"] == 12 and not damaged


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    whole = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        path.write_bytes(whole[:900] + bytes([whole[900] ^ 1]) + whole[901:])
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncate" else b"")
    state, damaged = load(tmp_path)
    assert state is not None and state["step"] == 1
    assert len(damaged) == 1 and "step-00000002.pt is damaged" in damaged[0]


@pytest.mark.parametrize("what", [".pt", ".json"])
def test_fifty_lengths_and_fifty_flipped_bits(tmp_path, what):
    """Whatever happened to the newest checkpoint's data or record, it is named, and the one before is used."""
    save(tmp_path, 1)
    path = save(tmp_path, 2).with_suffix(what)
    whole, draw = path.read_bytes(), random.Random(0)
    for length in draw.sample(range(len(whole)), 50):
        path.write_bytes(whole[:length])
        expect_the_one_before(tmp_path)
    for at in draw.sample(range(len(whole)), 50):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        expect_the_one_before(tmp_path)
    path.write_bytes(whole)
    state, damaged = load(tmp_path)
    assert state is not None and state["step"] == 2 and not damaged


def expect_the_one_before(folder):
    state, damaged = load(folder)
    assert state is not None and state["step"] == 1
    assert len(damaged) == 1 and damaged[0].startswith("step-00000002.pt is damaged (")


def test_a_record_that_is_json_but_no_record(tmp_path):
    save(tmp_path, 1)
    for text in ("[]", "null", "3", '{"seal": "x"}', "[" * 100_000):
        save(tmp_path, 2).with_suffix(".json").write_text(text)
        expect_the_one_before(tmp_path)


def test_no_good_checkpoint_is_an_error(tmp_path):
    save(tmp_path, 1).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        load(tmp_path)


def test_another_configuration_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match="another configuration"):
        load(tmp_path, "xyz")


def test_an_unfinished_save_is_ignored_and_swept(tmp_path):
    (tmp_path / "step-00000009.pt").write_bytes(b"half")
    (tmp_path / "step-00000008.tmp").write_bytes(b"half")
    assert load(tmp_path) == (None, [])
    save(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010.json", "step-00000010.pt"]


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"No space left on device.*intact"):
        save(tmp_path, 2)
    monkeypatch.undo()
    state, _ = load(tmp_path)
    assert state is not None and state["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "step-00000001.pt"
    torch.save({"model": Evil()}, path)
    record = {"step": 1, "config_hash": "abc", "sha256": checkpoint.digest(path)}
    checkpoint.write_json(path.with_suffix(".json"), record)
    with pytest.raises(UserError, match="can be read"):
        load(tmp_path)


def test_an_export_that_the_disk_refuses_is_one_sentence(tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="could not save .*No space left on device; the checkpoint is intact"):
        checkpoint.export(torch.nn.Linear(2, 2), tmp_path / "model.safetensors", {})
    assert not list(tmp_path.iterdir())
