"""W&B: whether it is online, and what the real client then holds of a run, however that ends."""

from __future__ import annotations

import json
import sys
import time

import pytest
from PIL import Image
from wandb_files import history, only, stored, summary

from sam_repro.config.compose import compose_config
from sam_repro.records.log import metrics_of
from sam_repro.training import wandb_writer
from sam_repro.training.run import how_to_repeat
from sam_repro.training.run_log import RunLog
from sam_repro.training.wandb_writer import has_key, start_tracking

OWN = "https://wandb.corp.example:8443"


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in (
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_CONFIG_DIR",
        "WANDB_MODE",
        "NETRC",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def netrc(folder, machine, name=".netrc"):
    (folder / name).write_text(f"machine {machine}\n  login user\n  password {40 * '0'}\n")


@pytest.mark.parametrize("name", [".netrc", "_netrc"])
@pytest.mark.parametrize("settings", ["environment", "wandb login"])
def test_the_key_counts_for_its_own_server_only(home, monkeypatch, name, settings):
    netrc(home, "api.wandb.ai", name)
    assert has_key()
    if settings == "environment":
        monkeypatch.setenv("WANDB_BASE_URL", OWN)
    else:
        (home / ".config/wandb").mkdir(parents=True)
        (home / ".config/wandb/settings").write_text(f"[default]\nbase_url = {OWN}\n")
    assert not has_key()
    netrc(home, "wandb.corp.example:8443", name)
    assert has_key()


def test_a_key_in_the_environment(home, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    assert has_key()


@pytest.mark.parametrize("content", [b"", b"machine", b"\xff\xfe", b"machine github.com login a password b"])
def test_a_netrc_without_a_key(home, content):
    (home / ".netrc").write_bytes(content)
    assert not has_key()


@pytest.mark.parametrize("asked", ["auto", "online"])
def test_without_a_key_nobody_is_asked_for_one(home, monkeypatch, asked):
    """Offline, and a sentence: the client itself would wait for an answer on a terminal."""
    monkeypatch.setattr(wandb_writer, "Tracker", lambda *_, mode, **__: mode)
    cfg = compose_config(["model=vit_s32", "optim=sam", f"log.wandb={asked}"])
    spoken: list[str] = []
    assert start_tracking(home, cfg, spoken.append) == "offline"
    assert "no key for api.wandb.ai" in spoken[0] and "wandb login" in spoken[0]
    netrc(home, "api.wandb.ai")
    assert start_tracking(home, cfg, spoken.append) == "online" and len(spoken) == 1
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (start_tracking(home, cfg, spoken.append) is None) == (asked == "auto")


# ---- the real client, offline; its files read back with its own reader ---------------------------------------------

ROW = {
    "run_id": "vit_digits-gsam-s2-0123abcd",
    "status": "done",
    "evals": {"val": {"correct": 180, "total": 360}, "r": {"correct": 1, "total": 4}},
    "sharpness": {"lambda_max": 7.5, "estimate": 3.0, "decay": [[1, 0.5, 0.5]]},
    "config": {"recipe": {"batch_size": 64}},
    "m": 64,
    "hours": 0.25,
    "peak_bytes": 2.5e9,
    "curves": {"train": {"step_seconds": [9.0, 0.5, 0.5]}},
}
RECORDS = [{"step": s, "loss": 2.0 / s, "surrogate_gap": 0.1 * s, "images_per_second": 1.0} for s in (1, 2, 3)]
RECORDS += [{"step": 3, "eval": "val", "correct": 90, "total": 360}, {"step": 3, "sharpness": {"lambda_max": 7.5}}]


def run_of(home, *overrides, records=RECORDS, code=0, row=None):
    """A run's folder after `records`, and what was said."""
    folder, spoken = home / "vit_digits-gsam-s2-0123abcd", []
    folder.mkdir(exist_ok=True)
    cfg = compose_config(["experiment=demo", "optim=gsam", "seed=2", *overrides])
    words = ["experiment=demo", "optim=gsam", "seed=2"]
    (folder / "config.yaml").write_text(how_to_repeat(words, home / "row.json") + "seed: 2 # not a note\n")
    with open(folder / "log.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    tracker = wandb_writer.Tracker(folder, cfg, mode="offline", say=spoken.append)
    for record in records:
        tracker.log(record["step"], metrics_of(record))
    tracker.close(code, row)
    assert not tracker.thread.is_alive()
    return folder, spoken


def test_a_finished_run_can_be_found_sorted_and_repeated(home):
    folder, spoken = run_of(home, row=ROW)
    records = stored(folder)
    (run,) = only(records, "run")
    assert run["run_id"] == folder.name and run["run_group"] == "demo" and run["job_type"] == "train"
    name = "vit_digits gsam, seed 2: digits, noise 0.4, rho 0.2, alpha 0.1, m 64, lr 0.004, 449 steps"
    assert run["display_name"] == name and run["tags"] == ["demo", "digits", "gsam", "vit_digits"]
    assert "`sam-repro train experiment=demo optim=gsam seed=2` repeats this run." in run["notes"]
    assert "row.json" in run["notes"] and "not a note" not in run["notes"]
    found = summary(records)
    sortable = {"val/accuracy": 50.0, "r/accuracy": 25.0, "sharpness/lambda_max": 7.5, "surrogate_gap": 0.3}
    sortable |= {"hours": 0.25, "images_per_second": 128.0, "peak_GB": 2.5, "status": "done", "loss": 2 / 3}
    assert {key: found[key] for key in sortable} == pytest.approx(sortable)
    assert [h["loss"] for h in history(records)] == [2.0, 1.0, 2 / 3] and history(records)[-1]["val/accuracy"] == 25.0
    assert only(records, "exit") == [{}] or only(records, "exit")[0].get("exit_code", 0) == 0
    picture = next(folder.glob("wandb/offline-run-*/files/media/images/pictures/curves_*.png"))
    assert picture.stat().st_size > 5_000 and found["pictures/curves._type"] == "image-file"
    assert spoken == [f"W&B has nothing of this run yet: `wandb sync {folder}/wandb/offline-run-*` sends it"]


def test_a_run_that_was_stopped_and_went_on_is_one_run(home):
    """Two starts of the same id; the steps go up, and only the end has the summary."""
    folder, _ = run_of(home, records=RECORDS[:2], code=138)
    first = stored(folder)
    assert only(first, "preempting") and only(first, "exit")[0]["exit_code"] == 138
    assert "peak_GB" not in summary(first) and not list(folder.rglob("*.png"))
    time.sleep(1.1)  # the client names a start by the second
    run_of(home, records=RECORDS[2:], row=ROW)
    both = stored(folder)
    assert {run["run_id"] for run in only(both, "run")} == {folder.name} and all(r["resume"] for r in only(both, "run"))
    assert [h["_step"] for h in history(both)] == [1, 2, 3] and summary(both)["peak_GB"] == 2.5


def test_a_crash_is_marked(home):
    folder, _ = run_of(home, code=1)
    assert only(stored(folder), "exit")[0]["exit_code"] == 1 and not only(stored(folder), "preempting")


def test_pictures_that_were_drawn_of_the_run_go_along(home):
    (home / "vit_digits-gsam-s2-0123abcd/sharpness").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(home / "vit_digits-gsam-s2-0123abcd/sharpness/slice.png")
    folder, _ = run_of(home, row=ROW)
    assert summary(stored(folder))["pictures/slice.width"] == 9


def test_long_words_do_not_turn_it_off(home):
    folder, spoken = run_of(home, f"log.group=table1/{'x' * 90}", f"data.root=/{'d' * 5000}", "recipe.epochs=1e-7")
    (run,) = only(stored(folder), "run")
    assert (
        {"table1", 64 * "x"} <= set(run["tags"]) and len(run["display_name"]) <= 128 and "W&B is off" not in spoken[0]
    )
    assert len(run["config"]["update"]["data"]["root"]) == 5001


def test_without_the_package_the_run_goes_on(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    _, spoken = run_of(home, row=ROW)
    (sentence,) = spoken
    assert "W&B is off: wandb is not installed" in sentence and f"sam-repro sync {home}" in sentence


def test_only_the_first_rank_writes(home):
    """The other ranks' log has no folder, and so no tracker."""
    log = RunLog(None, compose_config(["model=vit_s32", "optim=sam", "log.wandb=offline"]), run_id="a")
    log.start(0, 9)
    log.record({"step": 1, "eval": "val", "correct": 1, "total": 2})
    log.close()
    assert not hasattr(log, "tracker") and not list(home.rglob("*wandb*"))
