"""Rows that training cannot have written: every reader refuses them in one sentence, and none ends in a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from paper_rows import fake_row

from sam_repro.cli.main import main
from sam_repro.errors import UserError
from sam_repro.paper.claims import judged
from sam_repro.paper.estimate import estimated_and_actual
from sam_repro.paper.ledger_join import JoinedTable, join_table, runs_of
from sam_repro.paper.outcomes import Outcome
from sam_repro.paper.render.overview import overview
from sam_repro.paper.render.report import assemble
from sam_repro.paper.render.tables import FORMATS, render
from sam_repro.paper.spec import Column, Table, load_table
from sam_repro.records.ledger import read_row, row_path, write_row
from sam_repro.records.row_schema import seal_of
from sam_repro.runner.status import state_of

MEASURED = {"lambda_max": 7.5, "residual": 1e-4, "rho": 0.05, "surrogate_gap": 0.1, "estimate": 3.0, "images": 512}
MEASURED |= {"first_order": 2.0, "alignment": 0.2, "decay": [[11, 0.9, 0.95]]}
WRONG = (None, True, -1, 1.5, 10**30, "<b>", [None], {"x": "y"})
HOSTILE = """<img src=x onerror="alert(1)">'"><script>alert(2)</script></style>"""


@pytest.fixture(scope="module")
def table() -> Table:
    """The demo's first row, with a column of each kind."""
    columns = (Column("val", "val"), Column("top", "λ_max", "sharpness.lambda_max", magnitude=True))
    columns += (Column("gap", "h", "last.surrogate_gap"), Column("batch", "batch", "config.recipe.batch_size"))
    demo = load_table("demo")
    return replace(demo, columns=columns, rows=(replace(demo.rows[2], seeds=1, printed={}),))


@pytest.fixture(scope="module")
def row(table: Table) -> dict[str, Any]:
    row = fake_row(runs_of(table, table.rows[0])[0], 330) | {"sharing": 1, "sharpness": MEASURED}
    row["curves"]["sharpness"] = [{"step": 11, **MEASURED}]
    row["curves"]["train"] = {k: v[:4] for k, v in row["curves"]["train"].items()}
    row["curves"]["eval"] = row["curves"]["eval"][-2:]
    return row


def read_everywhere(table: Table, folder: Path) -> None:
    """Whatever the paper half makes of a row."""
    outcomes = join_table(table, folder)
    joined = JoinedTable(table, outcomes)
    for form in FORMATS:
        render(table, outcomes, form)
    assemble([joined])
    overview([joined], [], set())
    estimated_and_actual(table, outcomes)
    judged(table, outcomes)
    for o in outcomes:
        state_of(o.runs[0], o.ledger[0])


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a row, of lists the first item's."""
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else list(enumerate(node))[:1] if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(row: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    """A copy with another value at a path, or without it where the value is ABSENT."""
    copied = node = copy.deepcopy(row)
    for key in path[:-1]:
        node = node[key]
    if value is ABSENT:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return copied


ABSENT = object()


def test_a_stranger_s_text_stays_text(table: Table, row: dict, tmp_path: Path) -> None:
    """Hostile text in every field of a row and of a table: the pages have no tag and no attribute more than without."""
    row_path(tmp_path, row["run_id"]).write_text(json.dumps(row))
    (outcome,) = join_table(table, tmp_path)

    def markup(table: Table, outcome: Outcome, problem: str = "") -> set[tuple[str, str]]:
        report = assemble([JoinedTable(table, [outcome], problem)])
        return markup_of(report) | markup_of(render(table, [outcome], "html"))

    expected, shown = markup(table, outcome) | LINK, 0
    for place in places(row):
        with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):  # a number's: read_row refuses it
            assert markup(table, replace(outcome, ledger=(row, changed(row, place, HOSTILE)))) <= expected, place
            shown += 1
    assert shown > 50
    for name in ("id", "model", "method", "origin", "warnings"):
        hostile = replace(table.rows[0], **{name: (HOSTILE,) if name == "warnings" else HOSTILE})
        assert markup(replace(table, rows=(hostile,)), replace(outcome, row=hostile)) <= expected, name
    for name in ("name", "title", "source", "warnings", "notes"):
        hostile = replace(table, **{name: (HOSTILE,) if name in ("warnings", "notes") else HOSTILE})
        assert markup(hostile, outcome, problem=HOSTILE) <= expected, name


LINK = {("a", "class"), ("a", "href")}  # of a deviation


def markup_of(page: str) -> set[tuple[str, str]]:
    """The (tag, attribute) pairs of a page."""
    found: set[tuple[str, str]] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            found.update((tag, name) for name, _ in attrs or [("", "")])

    Reader().feed(page)
    return found


def test_a_wrong_type_anywhere_is_refused_or_does_no_harm(table: Table, row: dict, tmp_path: Path) -> None:
    path = row_path(tmp_path, row["run_id"])
    path.write_text(json.dumps(row))
    read_everywhere(table, tmp_path)
    refused = 0
    for place in places({k: v for k, v in row.items() if k != "config"} | {"config": {"data": row["config"]["data"]}}):
        for value in (ABSENT, *WRONG):
            path.write_text(json.dumps(changed(row, place, value)))
            try:
                read_everywhere(table, tmp_path)
            except UserError as error:
                assert "is not a ledger row" in str(error) and "\n" not in str(error)
                refused += 1
            except Exception as error:
                raise AssertionError(f"{place} = {value!r}: {error!r}") from error
    assert refused > 150


@pytest.mark.parametrize("place", ["run_id", "status", "seed", "config", "commit", "dirty", "hardware", "evals"])
def test_what_is_missing_is_named(row: dict, tmp_path: Path, place: str) -> None:
    path = tmp_path / "row.json"
    path.write_text(json.dumps({k: v for k, v in row.items() if k != place}))
    with pytest.raises(UserError, match=f"{place}.* is missing"):
        read_row(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "a row must be a mapping"),
        ("{", "Expecting property name"),
        ('{"seed": ' + "9" * 5000 + "}", "a number has 5000 digits"),
        ('{"hours": NaN}', "NaN is not a number"),
        ('{"hours": -Infinity}', "-Infinity is not a number"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"x": ' + "[" * 50 + "]" * 50 + "}", "nested too deeply"),
        ('{"x": "\\ud800"', "Expecting"),
    ],
)
def test_json_that_no_row_is(tmp_path: Path, text: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "row.json"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_row(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not a ledger row"):
        read_row(path)


def test_check_sees_a_changed_digit_and_a_row_without_its_seal(row: dict, tmp_path: Path, capsys) -> None:
    ledger = tmp_path / "results" / "runs"
    path = write_row(ledger, row)
    assert read_row(path)["seal"] == seal_of(row) == seal_of(read_row(path))
    for changed_text in (path.read_text().replace('"hours": 0.01', '"hours": 0.02'), json.dumps(row)):
        assert changed_text != path.read_text()
        path.write_text(changed_text)
        with contextlib.suppress(UserError):
            main(["check", "--root", str(tmp_path)])
        assert f"{path}: the row is not what its seal says" in capsys.readouterr().out
