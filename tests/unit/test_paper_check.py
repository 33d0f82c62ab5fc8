"""`sam-repro check` and `sam-repro status`: what is stale, edited by hand or impossible, and how far runs have come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paper_rows import fake_row, write_rows

from sam_repro.cli.main import main
from sam_repro.paper import ledger_join
from sam_repro.paper.check import rows_problems
from sam_repro.paper.ledger_join import runs_of
from sam_repro.paper.spec import load_table
from sam_repro.records.row_schema import seal_of


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with rows of Table 6's GSAM and a README that quotes the table; the report is of that table only."""
    monkeypatch.setattr(ledger_join, "table_names", lambda: ["table6"])
    table = load_table("table6")
    write_rows(tmp_path / "results" / "runs", runs_of(table, table.rows[-1]), [38_400, 38_350, 38_420], total=50_000)
    block = f"<!-- sam-repro table table6 --ledger {tmp_path}/results/runs -->\n<!-- sam-repro end -->\n"
    (tmp_path / "README.md").write_text(f"# Title\n{block}Last line.\n")
    return tmp_path


def test_write_then_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--root", str(root)]) == 1
    assert capsys.readouterr().out.count("is stale") == 3
    assert main(["check", "--root", str(root), "--write"]) == 0
    readme = (root / "README.md").read_text()
    assert "76.78 ± 0.18 (3) | 76.8" in readme and readme.endswith("<!-- sam-repro end -->\nLast line.\n")
    assert main(["check", "--root", str(root)]) == 0
    assert "every number is the ledger's" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "results/README.md", "results/index.html"])
def test_a_number_edited_by_hand_is_found(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--root", str(root), "--write"])
    path = root / name
    old = "| 1 |" if name == "results/README.md" else "76.78"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, old.replace("7", "9").replace("1", "4"), 1))
    assert main(["check", "--root", str(root)]) == 1
    assert f"{name} is stale or was edited by hand" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evals": {"val": {"correct": 361, "total": 360}}}, "361 of 360 images correct"),
        ({"evals": {"val": {"correct": 359, "total": 360}}}, "but its curve ends at"),
        ({"evals": {}}, "done, but without an evaluation"),
        ({"seed": 7}, "does not fit"),
    ],
)
def test_an_impossible_row_is_found(tmp_path: Path, change: dict, words: str) -> None:
    table = load_table("demo")
    row = fake_row(runs_of(table, table.rows[0])[0], 330)
    path = tmp_path / f"{row['run_id']}.json"
    path.write_text(json.dumps(row | {"seal": seal_of(row)}))
    assert list(rows_problems(tmp_path)) == []
    path.write_text(json.dumps(row | change))
    assert any(words in problem for problem in rows_problems(tmp_path))
    path.write_text("{")
    assert "is not a ledger row" in next(rows_problems(tmp_path))
