"""Checkpoints: damage, other configurations, full disks, and what is kept."""

from __future__ import annotations

import random

import pytest
import torch

from sam_repro.errors import UserError
from sam_repro.records.files import sha256
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
    kind = "not there" if damage == "remove" else "damaged"
    assert len(damaged) == 1 and f"step-00000002.pt is {kind}" in damaged[0]
    assert damaged[0].endswith("; going back to step-00000001.pt")


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


@pytest.mark.parametrize("damage", ["data", "digest", "digest gone"])
def test_no_good_checkpoint_is_an_error_that_says_what_to_do(tmp_path, damage):
    path = save(tmp_path, 1)
    if damage == "data":
        path.write_bytes(b"not a checkpoint")
    elif damage == "digest":
        path.with_suffix(".json").write_text("{}")
    else:
        path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read: step-00000001.pt .*remove .*/step-\* to"):
        load(tmp_path)


def test_a_checkpoint_that_lost_its_digest_is_said_to_have(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).with_suffix(".json").unlink()
    state, damaged = load(tmp_path)
    assert state is not None and state["step"] == 1
    (sentence,) = damaged
    assert "step-00000002.json, which holds its digest, is gone" in sentence and "going back to step-0" in sentence


def test_another_configuration_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match="another configuration"):
        load(tmp_path, "xyz")


def test_an_unfinished_save_is_no_error_and_is_swept(tmp_path):
    save(tmp_path, 9).unlink()
    (tmp_path / "step-00000008.tmp").write_bytes(b"half")  # of an older version
    (tmp_path / "step-00000008.pt.01234567.tmp").write_bytes(b"half")
    assert load(tmp_path) == (None, ["step-00000009.pt is not there: its save was not finished"])
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
    record = {"step": 1, "config_hash": "abc", "sha256": sha256(path)}
    checkpoint.write_json(path.with_suffix(".json"), record)
    with pytest.raises(UserError, match="objects that could run code") as refused:
        load(tmp_path)
    assert "weights_only" not in str(refused.value)


def test_an_export_that_the_disk_refuses_is_one_sentence(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"could not save .*No space left on device; the checkpoint is intact"):
        checkpoint.export(torch.nn.Linear(2, 2), tmp_path / "model.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_equal_weights_are_equal_files_which_everybody_may_read(tmp_path):
    model = torch.nn.Linear(2, 2)
    description = {"run_id": "a", "timm": "b", "more": "c"}
    digests = {checkpoint.export(model, tmp_path / f"{i}.safetensors", description) for i in range(20)}
    assert digests == {sha256(path) for path in tmp_path.iterdir()} and len(digests) == 1
    (tmp_path / "plain").write_text("")
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}
