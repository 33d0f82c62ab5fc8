"""log.jsonl: whatever stands in it, a run resumes and its row is written; and it is read as a stream."""

from __future__ import annotations

import json
import random
import tracemalloc

import pytest

from sam_repro.config.compose import compose_config
from sam_repro.curvature.from_log import decay_by_age, measurements
from sam_repro.optim import METRICS
from sam_repro.records.log import BLOCK, LONGEST, read_log, stream_backwards
from sam_repro.training.results import CURVES, curves
from sam_repro.training.run_log import RunLog

TRAINING = dict.fromkeys((*METRICS, "lr", "rho", "step_seconds", "eta"), 0.5)
LINES = [{"step": step, **TRAINING} for step in range(1, 5)]
LINES += [
    {"step": 4, "eval": "val", "correct": 3, "total": 4},
    {"step": 4, "sharpness": {"lambda_max": 2.0, "decay": []}},
]
VALUES = ["NaN", "1e999", "-Infinity", '"text"', "true", "[]", "{}", "null", "9" * 5000, "[" * 100_000, "-1", "1.5"]


def write(path, lines):
    path.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize("value", VALUES, ids=lambda text: text[:9])
def test_no_value_in_a_line_stops_a_row(value, tmp_path):
    """Every value of every kind of line in turn."""
    path = tmp_path / "log.jsonl"
    for i, record in enumerate(LINES):
        for key in record:
            lines = [json.dumps(r) for r in LINES]
            lines[i] = (
                "{" + ", ".join(f'"{k}": {value if k == key else json.dumps(v)}' for k, v in record.items()) + "}"
            )
            write(path, lines)
            row = curves(path)
            json.dumps(row, allow_nan=False)
            assert row["train"].keys() == set(CURVES) and all(
                len(c) == len(row["train"]["step"]) for c in row["train"].values()
            )
            assert len(row["train"]["step"]) >= 3


def test_no_damage_of_a_line_stops_a_row(tmp_path):
    path, draw = tmp_path / "log.jsonl", random.Random(0)
    whole = "".join(json.dumps(r) + "\n" for r in LINES).encode()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 20))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        json.dumps(curves(path), allow_nan=False)


def test_a_missing_key_is_a_gap_in_its_curve(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [json.dumps(r).replace('"loss"', '"lo3s"') if r["step"] == 2 else json.dumps(r) for r in LINES])
    assert curves(path)["train"]["loss"] == [0.5, None, 0.5, 0.5]


def test_a_resumed_log_drops_what_is_beyond_the_checkpoint_and_what_is_damaged(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [*map(json.dumps, LINES[:3]), '{"step": 3, "lo', json.dumps(LINES[3])])
    log = RunLog(tmp_path, compose_config(["model=vit_s32", "optim=sam", "log.wandb=disabled"]), run_id="a")
    log.start(step=3, total=4)
    log.record({"step": 4, "eval": "val", "correct": 1, "total": 2})
    log.close()
    assert [(r["step"], "eval" in r) for r in read_log(path)] == [(1, False), (2, False), (3, False), (4, True)]
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl"}


def test_a_long_log_takes_little_memory(tmp_path):
    """100,000 lines, and one without an end."""
    path = tmp_path / "log.jsonl"
    with open(path, "w") as file:
        for step in range(1, 100_001):
            file.write(json.dumps({"step": step, **TRAINING}) + "\n")
        file.write("[" * 30_000_000)
    tracemalloc.start()
    found = curves(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["train"]["step"][-1] == 100_000 and len(found["train"]["step"]) <= 200
    assert peak < 16e6


def test_backwards_are_the_same_records(tmp_path):
    """Lines of all lengths around the blocks that are read at once, some cut."""
    path, draw = tmp_path / "log.jsonl", random.Random(0)
    lines = [json.dumps({"step": i, "loss": i / 3, "note": "x" * draw.choice([1, 500, BLOCK])}) for i in range(200)]
    for i in range(0, 200, 17):
        lines[i] = lines[i][:-3]
    write(path, lines)
    for end in ("", '{"step": 7}', '{"step": 7', "\n\n"):
        path.write_text(path.read_text() + end)
        assert list(stream_backwards(path)) == read_log(path)[::-1]
    assert list(stream_backwards(tmp_path / "none")) == []


def test_the_end_of_a_long_log_is_found_at_once(tmp_path):
    """30 MB, and a line without an end."""
    path = tmp_path / "log.jsonl"
    line = json.dumps({"step": 1, **TRAINING}) + "\n"
    path.write_text(line * (30_000_000 // len(line)) + '{"step": 2, "loss": 0.25}\n')
    with open(path, "a") as file:
        file.write("[" * 30_000_000)
    tracemalloc.start()
    assert next(stream_backwards(path)) == {"step": 2, "loss": 0.25}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * LONGEST


@pytest.mark.parametrize("value", VALUES, ids=lambda text: text[:9])
def test_a_damaged_measurement_is_left_out_of_the_pictures(value, tmp_path):
    whole = {"alignment": 0.2, "decay": [[11, 0.9, 0.95]]}
    lines = [json.dumps({"step": step, "sharpness": whole}) for step in (1, 2)]
    for key in whole:
        damaged = json.dumps({"step": 3, "sharpness": whole | {key: "here"}}).replace('"here"', value)
        inside = json.dumps({"step": 4, "sharpness": whole | {"decay": [[11, "here", 0.95]]}}).replace('"here"', value)
        write(tmp_path / "log.jsonl", [*lines, damaged, inside])
        found = measurements(tmp_path, *whole)
        assert [record["step"] for record in found][:2] == [1, 2]
        assert all(isinstance(record["alignment"], (int, float)) for record in found)
        assert decay_by_age([record for record in found if record["step"] < 3])[11]["cosine"] == [0.9, 0.9]
