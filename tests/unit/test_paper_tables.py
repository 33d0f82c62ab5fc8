"""From ledger rows to intervals, verdicts and rendered tables."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import ErrorbarContainer
from paper_rows import fake_row, write_rows

from sam_repro.cli.main import main
from sam_repro.config.compose import compose_config
from sam_repro.config.run_id import run_id as run_name
from sam_repro.optim import METRICS
from sam_repro.paper.ledger_join import JoinedTable, join_table, runs_of
from sam_repro.paper.outcomes import value_of, winners
from sam_repro.paper.render.figures import draw, method_key
from sam_repro.paper.render.report import assemble
from sam_repro.paper.render.style import METHODS, Mark, marks_of, spread
from sam_repro.paper.render.tables import render
from sam_repro.paper.spec import Column, load_table, parse_table, table_names
from sam_repro.paper.statistics import compare, interval, magnitudes, verdict, wilson
from sam_repro.records.ledger import row_path, write_row
from sam_repro.training.results import curves

BASE = {"title": "T", "source": "S", "base": ["experiment=demo"], "columns": {"val": {"title": "V"}}}


def table_with(printed: object) -> object:
    row = {"id": "m/gsam", "model": "M", "method": "GSAM", "overrides": ["optim=gsam"], "printed": {"val": printed}}
    return parse_table("t", BASE | {"rows": [row]})


def test_the_interval_is_students() -> None:
    ours = interval([76.1, 76.5, 76.2, 76.9])  # s = 0.359398, t(0.975, 3) = 3.182446, by hand
    assert ours.mean == pytest.approx(76.425) and ours.half == pytest.approx(3.182446 * 0.359398 / 2, rel=1e-5)
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)  # Newcombe 1998's formula, by hand


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    assert interval([1.0]).half is None
    assert verdict(interval([76.8]), 76.8) == "one seed"


@pytest.mark.parametrize(
    ("printed", "word"),
    [(50.04, "within"), (50.06, "below"), (49.94, "above"), (None, "measured"), ("not in our sources",) * 2],
)
def test_verdict_allows_for_the_rounding_of_the_printed_number(printed: object, word: str) -> None:
    assert verdict(interval([50.0, 50.0]), printed) == word


def test_the_paired_test_is_students() -> None:
    sam, gsam = {0: 75.8, 1: 75.6, 2: 75.9, 7: 1.0}, {0: 76.8, 1: 76.4, 2: 76.8}
    ours, t = compare(sam, gsam), 0.9 / (0.1 / math.sqrt(3))  # two degrees of freedom have a closed form
    assert (
        ours.p == pytest.approx(1 - t / math.sqrt(2 + t**2)) and ours.n == 3 and ours.difference == pytest.approx(0.9)
    )
    assert ours.words == "significant"


def test_equal_methods_are_not_significant() -> None:
    assert compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).words == "not significant"
    up, down = {0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.001}
    assert compare(up, down).words == "significant" and compare(down, up).words == "significant, the other way round"
    assert compare({0: 1.0}, {0: 2.0}).words == "not testable with one seed"
    assert compare({0: 0.1, 1: 0.3, 2: 0.7}, {0: 0.2, 1: 0.4, 2: 0.8}).p == 0.25  # equal but for rounding
    assert compare({0: 1.0}, {1: 2.0}) is None


@pytest.mark.parametrize(("printed", "word"), [(5.0, "within"), (9.04, "within"), (9.2, "below"), (2.0, "above")])
def test_sizes_are_judged_by_their_range(printed: float, word: str) -> None:
    assert verdict(magnitudes([3.0, 5.0, 9.0]), printed) == word


def test_a_row_goes_from_pending_to_a_verdict(tmp_path: Path) -> None:
    table = table_with(90.0)
    runs = runs_of(table, table.rows[0])
    assert join_table(table, tmp_path)[0].cells[0].verdict == "pending"
    write_rows(tmp_path, runs[:1], [324])
    assert join_table(table, tmp_path)[0].cells[0].verdict == "one seed"
    write_rows(tmp_path, runs[1:], [325, 323])
    (o,) = join_table(table, tmp_path)
    assert o.cells[0].verdict == "within" and o.cells[0].difference == pytest.approx(0, abs=1e-9)
    assert o.state == "done" and o.step_ms == pytest.approx(50) and 0.1 < o.metric("surrogate_gap") < 0.2


@pytest.mark.parametrize("printed", [90.0, "not in our sources"])
def test_a_diverged_seed_is_the_verdict(printed: float | str, tmp_path: Path) -> None:
    table = table_with(printed)
    runs = runs_of(table, table.rows[0])
    write_rows(tmp_path, runs[:2], [324, 325])
    write_rows(tmp_path, runs[2:], [0], status="diverged")
    assert join_table(table, tmp_path)[0].cells[0].verdict == "diverged"


def test_the_toy_of_fig_3_needs_no_run() -> None:
    sgd, sam, gsam = (o.cells[0].ours.mean for o in join_table(load_table("fig3")))
    assert gsam < 1 < min(sgd, sam)


def test_sharpness_of_rows_fills_fig_4_and_a_row_without_it_waits(tmp_path: Path) -> None:
    table = load_table("fig4")
    measured, without = (runs_of(table, row)[0] for row in table.rows[:2])
    sharpness = {"lambda_max": 12.5, "estimate": 3.25, "residual": 1e-4, "images": 512, "rho": 0.05, "alignment": 0.2}
    sharpness["surrogate_gap"] = 0.004
    write_row(tmp_path, fake_row(measured, 180) | {"sharpness": sharpness})
    write_row(tmp_path, fake_row(without, 180) | {"sharpness": {"problem": "no memory"}})
    first, second, *_ = join_table(table, tmp_path)
    ours = {c.column.name: c.ours.mean for c in first.cells if c.ours}
    assert ours == {"val": 50.0, "estimate": 3.25, "lambda_max": 12.5}
    assert [c.ours is None for c in second.cells] == [False, True, True]
    page = assemble([JoinedTable(table, join_table(table, tmp_path))])
    assert "λ_max 12.5 (residual 0.0001), 2h/ρ² 3.25 at ρ 0.05" in page


def test_a_held_lock_reads_running(tmp_path: Path) -> None:
    table = parse_table(
        "t",
        BASE
        | {"base": ["experiment=demo", f"log.runs_dir={tmp_path}"]}
        | {"rows": [{"id": "m/gsam", "model": "M", "method": "GSAM", "overrides": ["optim=gsam"]}]},
    )
    lock = tmp_path / runs_of(table, table.rows[0])[1].run_id / "lock"
    lock.parent.mkdir()
    lock.write_text("{}")
    assert join_table(table, tmp_path)[0].cells[0].verdict == "running"


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    table = load_table("demo")
    counts = {"vanilla": [330, 333, 331], "sam": [338, 340, 337], "gsam": [345, 343, 347]}
    for row in table.rows:
        write_rows(tmp_path, runs_of(table, row), counts[row.id.split("/")[1]])
    return tmp_path


def test_markdown_of_the_demo(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "demo", "--ledger", str(ledger)]) == 0
    text = capsys.readouterr().out
    assert "| ViT digits | SAM             | 93.98 ± 1.05 (3) |" in text
    assert "SAM against Vanilla (AdamW): +1.94 points (paired by seed, n=3, p=0.0067): significant" in text
    assert "GSAM against SAM: +1.85 points (paired by seed, n=3, p=0.081): not significant" in text
    assert "commit 01234567" in text and "CPU test" in text and "seeds 0, 1, 2" in text


def test_a_bar_in_a_title_is_no_column() -> None:
    table = parse_table(
        "t", BASE | {"columns": {"val": {"title": "|cos|"}}, "rows": [{"id": "m/g", "model": "M", "method": "G"}]}
    )
    head, rule = [line for line in render(table, join_table(table), "md").splitlines() if line.startswith("|")][:2]
    assert r"\|cos\|" in head and head.replace(r"\|", "").count("|") == rule.count("|")


def test_csv_is_one_line_a_number(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["table", "demo", "--ledger", str(ledger), "--format", "csv"])
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["n"] for line in lines if line["column"] == "val"] == ["3"] * 3
    assert len(lines) == 3 * len(load_table("demo").columns)
    assert float(lines[0]["mean"]) == pytest.approx(100 * 994 / 1080)


MEASURED = {"images": 512, "residual": 1e-4, "rho": 0.05, "surrogate_gap": 0.004, "estimate": 3.2, "alignment": 0.2}


def test_a_size_without_sign_says_so_and_has_a_range(tmp_path: Path) -> None:
    columns = {"val": {"title": "|s|", "value": "sharpness.lambda_max", "unit": "", "magnitude": True}}
    row = {"id": "v/sam", "model": "V", "method": "SAM", "overrides": ["optim=sam"]}
    tree = {"title": "t", "source": "ours", "base": ["experiment=demo"], "columns": columns, "seeds": 3, "rows": [row]}
    table = parse_table("t", tree)
    runs = runs_of(table, table.rows[0])
    write_rows(tmp_path, runs, [300, 301, 302])
    for run, size in zip(runs, [-10, 100, -1000], strict=True):
        path = row_path(tmp_path, run.run_id)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sharpness": MEASURED | {"lambda_max": size}}))
    found = join_table(table, tmp_path)
    assert "|s|: without its sign (2 of 3 are negative); geometric mean and range over seeds" in render(
        table, found, "md"
    )
    (line,) = csv.DictReader(io.StringIO(render(table, found, "csv")))
    assert (float(line["mean"]), line["half"], line["low"], line["high"]) == (pytest.approx(100), "", "10.0", "1000.0")


def test_tex_escapes_and_html_is_whole(ledger: Path, tmp_path: Path) -> None:
    for kind in ("tex", "html"):
        main(["table", "demo", "--ledger", str(ledger), "--format", kind, "--output", str(tmp_path / f"t.{kind}")])
    assert r"accuracy, \%" in (tmp_path / "t.tex").read_text()
    assert (tmp_path / "t.html").read_text().endswith("</html>\n")


def test_missing_runs_are_planned(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(ledger.glob("*-gsam-s1-*.json")).unlink()
    assert main(["plan", "demo", "--missing", "--ledger", str(ledger)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split("\t")[1] == "experiment=demo optim=gsam seed=1"


def test_words_are_laid_over_every_line_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "data.eval_sets=[v1,real]", "data.root=/data/${data.name}"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 9
    for run_id, words in lines:
        config = compose_config(shlex.split(words))
        assert config.data.eval_sets == ["v1", "real"] and config.data.root == "/data/digits"
        assert run_name(config) == run_id
    assert main(["plan", "data.root=/data"]) == 2


def test_figures_are_written_and_the_same_each_time(tmp_path: Path) -> None:
    table = load_table("study_digits")
    for row in table.rows:
        write_rows(tmp_path, runs_of(table, row), [330, 333, 331])
    for folder in ("a", "b"):
        assert main(["figures", "study_digits", "--ledger", str(tmp_path), "--output", str(tmp_path / folder)]) == 0
    first, second = ((tmp_path / f / "study_digits.svg").read_text() for f in ("a", "b"))
    assert first == second and "Surrogate gap h" in first and "GSAM" in first
    assert (tmp_path / "a" / "study_digits.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["table1", "table6", "fig3", "fig4", "fig8"])
def test_every_kind_of_figure_is_drawn_before_any_run(name: str, tmp_path: Path) -> None:
    assert main(["figures", name, "--ledger", str(tmp_path), "--output", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000


def test_a_row_without_abscissa_is_a_level_and_methods_keep_their_colours(tmp_path: Path) -> None:
    table = load_table("fig7")
    for row in table.rows:
        write_rows(tmp_path, runs_of(table, row), [250 + 10 * row.id.startswith("vit_b32/gsam")])
    found = join_table(table, tmp_path)
    marks = marks_of({o.row.series: method_key(o) for o in found})
    colours = {name: mark.colour for name, mark in marks.items()}
    assert marks["SAM by ρ"] == METHODS["sam"] and marks["GSAM by ρ"] == METHODS["gsam"]
    assert len(set(colours.values())) == 5
    (ax,) = draw(table, found).axes
    levels = [line for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    assert {line.get_color() for line in levels} == {colours["Vanilla"], colours["SAM"]}


def test_labels_at_the_ends_of_lines_do_not_overlap() -> None:
    moved = spread([1.0, 1.01, 0.99, 5.0], 0.5)
    assert sorted(moved)[:3] == pytest.approx([0.5, 1.0, 1.5]) and moved[3] == 5.0
    assert moved[2] < moved[0] < moved[1]


def test_a_sweep_is_decided_on_minival_and_not_on_the_test_set(tmp_path: Path) -> None:
    grid = {"optim.alpha": [0.1, 0.2, 0.3]}
    row = {"id": "m/gsam", "model": "M", "method": "GSAM", "overrides": ["optim=gsam"], "grid": grid}
    table = parse_table("t", BASE | {"select": "minival", "seeds": 1, "rows": [row]})
    for row, minival, val in zip(table.rows[:2], (300, 310), (350, 320), strict=True):
        fake = fake_row(runs_of(table, row)[0], val)
        fake["evals"]["minival"] = {"correct": minival, "total": 360}
        write_row(tmp_path, fake)
    text = render(table, join_table(table, tmp_path), "md")
    assert "M, GSAM: alpha=0.2 is best on minival (86.11 %, of 2 measured points of 3)" in text
    diverged = fake_row(runs_of(table, table.rows[2])[0], 0) | {"status": "diverged"}
    write_row(tmp_path, diverged)
    assert "of 2 measured points of 3)" in render(table, join_table(table, tmp_path), "md")


def test_a_point_of_a_sweep_with_a_diverged_seed_does_not_win(tmp_path: Path) -> None:
    row = {
        "id": "m/sam",
        "model": "M",
        "method": "SAM",
        "overrides": ["optim=sam"],
        "grid": {"model.sam_rho": [0.1, 1]},
    }
    table = parse_table("t", BASE | {"select": "minival", "seeds": 2, "rows": [row]})
    for row, minival in zip(table.rows, (300, 350), strict=True):
        for run in runs_of(table, row):
            fake = fake_row(run, 300)
            fake["evals"]["minival"] = {"correct": minival, "total": 360}
            write_row(tmp_path, fake | ({"status": "diverged"} if (minival, run.config.seed) == (350, 1) else {}))
    (winner,) = winners(table, join_table(table, tmp_path))
    assert winner.outcome.row.point == {"model.sam_rho": 0.1} and winner.measured == 1


def test_a_column_can_drop_the_sign():
    row = {"evals": {}, "sharpness": {"lambda_max": -3.5}}
    signed = Column("l", "λ", value="sharpness.lambda_max")
    assert value_of(row, signed) == -3.5 and value_of(row, replace(signed, magnitude=True)) == 3.5
    assert value_of({"evals": {}}, replace(signed, magnitude=True)) is None
    ends = {"curves": {"train": {"surrogate_gap": [0.5, -0.25]}}}
    assert value_of(ends, replace(signed, value="last.surrogate_gap", magnitude=True)) == 0.25


@pytest.mark.parametrize("n", [1, 199, 200, 202, 350, 401])
def test_the_end_of_a_curve_survives_thinning(n: int, tmp_path: Path):
    records = [dict.fromkeys((*METRICS, "lr", "rho", "step_seconds"), 0.0) | {"step": i + 1} for i in range(n)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    steps = curves(tmp_path / "log.jsonl")["train"]["step"]
    assert steps[-1] == n and len(steps) <= 200


LEDGER = Path(__file__).resolve().parents[2] / "results" / "runs"


COMMITTED = sorted({p.stem for p in (LEDGER.parent / "figures").glob("*.svg")} & {*table_names()})


@pytest.mark.parametrize("name", COMMITTED)
def test_no_two_methods_of_a_panel_look_the_same_in_grey(name: str) -> None:
    table = load_table(name)
    for ax in draw(table, join_table(table, LEDGER)).axes:
        drawn = {c.get_label(): c.lines[0] for c in ax.containers if isinstance(c, ErrorbarContainer)}
        drawn |= {line.get_label(): line for line in ax.lines if not str(line.get_label()).startswith("_")}
        marks = {str(n): Mark(to_hex(x.get_color()), x.get_marker(), x.get_linestyle()) for n, x in drawn.items()}  # type: ignore
        assert marks or ax.texts, "neither a method nor words on why there is none"
        alike = [pair for pair in combinations(marks, 2) if look_alike(*(marks[method] for method in pair))]
        assert not alike, f"{ax.get_title(loc='left')}: {alike}"


def test_the_marks_of_methods_differ_in_grey() -> None:
    marks = list(dict.fromkeys(METHODS.values()))
    assert not [pair for pair in combinations(marks, 2) if look_alike(*pair)]
    assert look_alike(Mark("#5b6570", "o"), Mark("#0072B2", "o")) and not look_alike(METHODS["sam"], METHODS["gsam"])


def look_alike(one: Mark, other: Mark) -> bool:
    """Whether neither the shape, nor the dash, nor the lightness L* of CIELAB tells two marks apart."""
    near = abs(lightness(one.colour) - lightness(other.colour)) < 12
    return one.colour == other.colour or (near and one[1:] == other[1:])


def lightness(colour: str) -> float:
    """L* of CIELAB, 0 to 100, of an sRGB colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def test_a_footnote_is_true_of_every_panel() -> None:
    texts = {name: footnote(name) for name in ("demo", "study_cifar", "study_search")}
    assert "mean and 95 % interval, on logarithmic axes geometric mean and range" in texts["demo"]
    assert "95 % interval" in texts["study_cifar"] and "geometric" not in texts["study_cifar"]
    assert texts["study_search"].startswith("one seed")


def footnote(name: str) -> str:
    figure = draw(load_table(name), join_table(load_table(name), LEDGER))
    return next(text.get_text() for text in figure.texts if "commit" in text.get_text())
