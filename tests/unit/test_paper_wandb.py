"""`sam-repro sync` read back from the files that the wandb client writes offline, and the dashboard as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from wandb_files import history, only, stored, summary

from sam_repro.cli.main import main
from sam_repro.cli.sync import run_folders
from sam_repro.config.compose import compose_config, to_dict
from sam_repro.config.run_id import run_id
from sam_repro.paper.ledger_join import join_table
from sam_repro.paper.render.dashboard import dashboard_of
from sam_repro.paper.render.dashboard_preview import final, series
from sam_repro.paper.render.wandb_workspace import build_report, build_workspace
from sam_repro.paper.spec import load_table
from sam_repro.records.ledger import write_row
from sam_repro.records.log import metrics_of

RUNS = Path(__file__).resolve().parents[2] / "results" / "runs"

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
    assert "it has no log.jsonl" in capsys.readouterr().err


def test_a_run_or_a_folder_of_runs(folder: Path) -> None:
    assert run_folders(folder) == run_folders(folder.parent) == [folder]
    assert folder in run_folders(folder.parent.parent)  # runs/demo/<run_id>
    assert metrics_of(LOG[2]) == {"val/accuracy": 50.0}


def panels_of(tree: dict) -> dict[str, list[str]]:
    return {s["name"]: [y for p in s["panels"] for y in p["y"]] for s in tree["sections"]}


def test_without_a_key_the_dashboard_is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert main(["dashboard", "fig4", "--entity", "me"]) == 0
    tree = json.loads((folder / capsys.readouterr().out.strip()).read_text())
    panels = panels_of(tree)
    assert "val/accuracy" in panels["Accuracy and loss"] and "sharpness/lambda_abs" in panels["Curvature"]
    assert {"surrogate_gap", "cosine"} <= set(panels["The surrogate gap"]) and "| model " in tree["report"]["text"]
    assert tree["columns"][0] == "val/accuracy" and {"hours", "images_per_second", "peak_GB"} <= set(tree["columns"])


@pytest.mark.parametrize(
    "table, kind, y, x",
    [
        ("fig8", "lines", [["cosine"]], None),
        ("table1", "bars", [["val/accuracy"], ["r/accuracy"], ["c/accuracy"]], None),
        ("study_m", "points", [["val/accuracy"], ["sharpness/lambda_abs"]], "optim.m"),
        ("eigen_noise", "points", [["val/accuracy"]], "data.label_noise"),
    ],
)
def test_the_first_panels_are_the_figure_s(table: str, kind: str, y: list, x: str | None) -> None:
    loaded = load_table(table)
    tree = dashboard_of(loaded, join_table(loaded, RUNS), entity="me", project="p")
    panels = tree["sections"][0]["panels"]
    assert [p["y"] for p in panels] == y and {p["kind"] for p in panels} == {kind}
    assert {p.get("x") for p in panels} == {x}


@pytest.mark.parametrize("table", ["table5", "study_m", "study_table1", "eigen_cifar"])
def test_rows_are_groups_of_their_own_with_a_colour_of_their_own(table: str) -> None:
    """Runs that two tables share (table5, table1) carry one group's name, so that they are named one by one."""
    loaded = load_table(table)
    outcomes = join_table(loaded, RUNS)
    tree = dashboard_of(loaded, outcomes, entity="me", project="p")
    for part in ("path", "colour"):
        assert len({str(group[part]) for group in tree["groups"]}) == len(loaded.rows), tree["groups"]
    assert [g["runs"] for g in tree["groups"]] == [[r.run_id for r in o.runs] for o in outcomes]


def test_workspace_and_report_are_built_from_the_file(folder: Path) -> None:
    """Objects of the real client, not saved, which takes a key; their content is read back."""
    pytest.importorskip("wandb_workspaces")
    table = load_table("study_m")  # its title has a sign that W&B refuses in a name
    tree = json.loads(json.dumps(dashboard_of(table, join_table(table, RUNS), entity="me", project="p")))
    workspace, report = build_workspace(tree), build_report(tree)
    assert workspace.entity == report.entity == "me" and workspace.project == report.project == "p"
    assert [s.name for s in workspace.sections] == [s["name"] for s in tree["sections"]]
    scatter = workspace.sections[0].panels[0]
    assert (scatter.x.name, scatter.y.name, scatter.log_x) == ("optim.m", "val/accuracy", True)
    spec = workspace._to_model().model_dump(by_alias=True, exclude_none=True)["spec"]["section"]
    (runs,) = spec["runSets"]
    ids = [run for group in tree["groups"] for run in group["runs"]]
    assert runs["filters"]["filters"][0] | {"disabled": 0} == {
        "key": {"section": "run", "name": "name"}, "op": "IN", "value": ids, "disabled": 0,
    }  # fmt: skip
    assert [k["name"] for k in runs["grouping"]] == ["model.value.name", "optim.value.name", "optim.value.m"]
    assert runs["sort"]["keys"][0] == {"key": {"section": "summary", "name": "val/accuracy"}, "ascending": False}
    assert "summary:peak_GB" in runs["runFeed"]["columnOrder"] and spec["settings"]["maxRuns"] == 100
    assert {spec["customRunColors"][run] for run in ids} == {group["colour"] for group in tree["groups"]}
    grids = [block for block in report.blocks if hasattr(block, "panels")]
    assert [len(grid.panels) for grid in grids] == [len(s["panels"]) for s in tree["sections"]]
    (shown,) = grids[0].runsets
    assert ids[0] in shown.filters and shown.groupby[:2] == ["config.model.name", "config.optim.name"]
    assert any(getattr(block, "text", None) == tree["report"]["text"] for block in report.blocks)


def test_every_panel_has_data_and_the_preview_shows_the_same(tmp_path: Path, monkeypatch) -> None:
    """A stored run sent by `sync`, read back from the client's file: no panel of the dashboard stays empty."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    table = load_table("demo")
    outcomes = join_table(table, RUNS)
    tree = dashboard_of(table, outcomes, entity="me", project="p")
    row = outcomes[-1].ledger[0] | {"peak_bytes": 2e9}
    folder = tmp_path / row["run_id"]
    folder.mkdir()
    curves = row["curves"]["train"]
    records = [dict(zip(curves, values, strict=True)) for values in zip(*curves.values(), strict=True)]
    records += row["curves"]["eval"] + [{"step": s["step"], "sharpness": s} for s in row["curves"]["sharpness"]]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    row["config"]["log"]["ledger_dir"] = str(tmp_path / "ledger")
    (folder / "config.yaml").write_text(yaml.safe_dump(row["config"]))
    write_row(tmp_path / "ledger", row)
    assert main(["sync", str(folder)]) == 0
    sent = stored(folder)
    found, logged = summary(sent), {h["_step"]: h for h in history(sent)}
    for metric in {*tree["columns"], *(y for ys in panels_of(tree).values() for y in ys)}:
        assert final(row, metric) == pytest.approx(found[metric]), metric
    assert series(row, "loss") == {step: h["loss"] for step, h in logged.items() if "loss" in h}
    assert series(row, "val/accuracy") == {s: h["val/accuracy"] for s, h in logged.items() if "val/accuracy" in h}


def test_the_preview_has_every_run_and_panel(tmp_path: Path, capsys) -> None:
    path = tmp_path / "demo.svg"
    assert main(["dashboard", "demo", "--ledger", str(RUNS), "--preview", str(path)]) == 0
    text = path.read_text()
    assert all(f"vit_digits {m}, seed {s}:" in text for m in ("vanilla", "sam", "gsam") for s in range(3))
    assert all(f">{name}<" in text for name in ("The figure", "Accuracy and loss", "Curvature", "Processor hours"))
    assert main(["dashboard", "table1", "--ledger", str(RUNS), "--preview", str(path)]) == 2
    assert main(["dashboard", "fig3"]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_pushing_without_a_team_or_a_file_is_one_sentence(tmp_path: Path, capsys) -> None:
    assert main(["dashboard", "--push", str(tmp_path / "no.json")]) == 2
    (tmp_path / "other.json").write_text("{}")
    assert main(["dashboard", "--push", str(tmp_path / "other.json")]) == 2
    assert main(["dashboard"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
