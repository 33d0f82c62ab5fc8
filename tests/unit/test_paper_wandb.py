"""`sam-repro sync` read back from the files that the wandb client writes offline, and the dashboard as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from wandb_files import history, only, stored

from sam_repro.cli.main import main
from sam_repro.cli.sync import run_folders
from sam_repro.config.compose import compose_config, to_dict
from sam_repro.config.run_id import run_id
from sam_repro.paper.ledger_join import join_table
from sam_repro.paper.render.wandb_workspace import build_report, build_workspace, dashboard_of
from sam_repro.paper.spec import load_table
from sam_repro.records.log import metrics_of

LOG = [
    {"step": 11, "loss": 2.0, "surrogate_gap": 0.1, "cosine": 0.9},
    {"step": 22, "loss": None, "surrogate_gap": 0.2, "cosine": 0.8},
    {"step": 22, "eval": "val", "correct": 180, "total": 360},
    {"step": 22, "sharpness": {"lambda_max": 7.5, "estimate": 3.0, "alignment": 0.2, "decay": [[11, 0.9, 0.95]]}},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cfg = compose_config(["experiment=demo", "optim=gsam"])
    folder = tmp_path / run_id(cfg)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in LOG))
    return folder


def test_an_offline_run_holds_the_whole_log(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(folder.parent)]) == 0
    records = stored(folder)
    (run,) = only(records, "run")
    assert (run["run_id"], run["run_group"], run["project"]) == (folder.name, "demo", "sam-repro")
    rows = {h["_step"]: h for h in history(records)}
    assert rows[11]["loss"] == 2.0 and rows[11]["cosine"] == 0.9
    assert rows[22]["surrogate_gap"] == 0.2 and rows[22]["val/accuracy"] == 50.0 and "loss" not in rows[22]
    assert rows[22]["sharpness/lambda_max"] == 7.5 and rows[22]["sharpness/alignment"] == 0.2
    assert "wandb sync" in capsys.readouterr().err


def test_a_folder_without_runs_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(tmp_path)]) == 2
    assert "there is no log.jsonl" in capsys.readouterr().err


def test_a_run_or_a_folder_of_runs(folder: Path) -> None:
    assert run_folders(folder) == run_folders(folder.parent) == [folder]
    assert folder in run_folders(folder.parent.parent)  # runs/demo/<run_id>
    assert metrics_of(LOG[2]) == {"val/accuracy": 50.0}


def test_without_a_key_the_dashboard_is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert main(["dashboard", "fig4", "--entity", "me"]) == 0
    tree = json.loads((folder / capsys.readouterr().out.strip()).read_text())
    panels = {s["name"]: [y for p in s["panels"] for y in p["y"]] for s in tree["sections"]}
    assert panels["Accuracy"] == ["val/accuracy"] and "sharpness/lambda_max" in panels["Curvature"]
    assert {"surrogate_gap", "cosine"} <= set(panels["The surrogate gap"]) and tree["run_group"] == "fig4"
    assert panels["Speed"][0] == "images_per_second" and "| model " in tree["report"]["text"]


def test_workspace_and_report_are_built_from_the_file(folder: Path) -> None:
    """Objects of the real client, not saved, which takes a key; their content is read back."""
    pytest.importorskip("wandb_workspaces")
    table = load_table("fig4")
    tree = json.loads(json.dumps(dashboard_of(table, join_table(table), entity="me", project="p")))
    workspace, report = build_workspace(tree), build_report(tree)
    assert workspace.entity == report.entity == "me" and workspace.project == report.project == "p"
    assert [s.name for s in workspace.sections] == [s["name"] for s in tree["sections"]]
    assert workspace.sections[0].panels[0].y == ["val/accuracy"]
    grids = [block for block in report.blocks if hasattr(block, "panels")]
    assert [[p.y for p in grid.panels] for grid in grids] == [[p["y"] for p in s["panels"]] for s in tree["sections"]]
    (runs,) = grids[0].runsets
    assert "fig4" in runs.filters and runs.groupby == ["config.model.name", "config.optim.name"]
    assert any(getattr(block, "text", None) == tree["report"]["text"] for block in report.blocks)


def test_pushing_without_a_team_or_a_file_is_one_sentence(tmp_path: Path, capsys) -> None:
    assert main(["dashboard", "--push", str(tmp_path / "no.json")]) == 2
    (tmp_path / "other.json").write_text("{}")
    assert main(["dashboard", "--push", str(tmp_path / "other.json")]) == 2
    assert main(["dashboard"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
