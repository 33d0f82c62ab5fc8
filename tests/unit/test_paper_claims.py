"""Claims of studies: the words, the paired test, the exact test of a trend, and the format."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from paper_rows import write_rows

from sam_repro.errors import UserError
from sam_repro.paper import claims
from sam_repro.paper.claims import inversions, rank_correlation, sampling, surviving
from sam_repro.paper.ledger_join import join_table, runs_of
from sam_repro.paper.render.tables import render
from sam_repro.paper.spec import parse_table
from sam_repro.records.ledger import row_path


def judged(table, found):
    return [judgement.line for judgement in claims.judged(table, found)]


BASE = {"title": "t", "source": "ours", "base": ["experiment=demo"], "columns": {"val": {}}, "seeds": 3}


def two_methods(claim: dict) -> dict:
    rows = [
        {"id": f"v/{m}", "model": "V", "method": m.upper(), "overrides": [f"optim={m}"]} for m in ("vanilla", "sam")
    ]
    columns = {"val": {"title": "test", "digits": 1}}
    return BASE | {"columns": columns, "rows": rows, "claims": [{"text": "SAM wins", "column": "val"} | claim]}


@pytest.mark.parametrize(
    ("sam", "claim", "word"),
    [
        ([320, 321, 323], {}, "**confirmed**"),
        ([270, 271, 271], {}, "**contradicted**"),
        ([270, 271, 271], {"lower": True}, "**confirmed**"),
        ([290, 291, 291], {}, "**contradicted on these test images**"),
        ([310, 311, 312], {}, "**open, leans to it**"),  # equal differences: only signs
        ([330, 301, 302], {}, "**open, leans to it**"),
        ([270, 299, 298], {}, "**open, leans against it**"),
        ([320], {}, "**open**"),
        ([310, 291, 303], {}, "**open**"),
        ([], {}, "**not run**"),
    ],
)
def test_contrast(tmp_path: Path, sam: list[int], claim: dict, word: str) -> None:
    table = parse_table("t", two_methods({"better": "v/sam", "than": "v/vanilla"} | claim))
    write_rows(tmp_path, runs_of(table, table.rows[0]), [300, 301, 302])
    write_rows(tmp_path, runs_of(table, table.rows[1])[: len(sam)], sam)
    (said,) = judged(table, join_table(table, tmp_path))
    assert said.startswith(f"{word}: SAM wins.")
    if len(sam) == 3 and sam[0] == 320:
        assert "SAM − VANILLA: +5.65 ± 0.40 points (n = 3, p = 0.00027)" in said


def test_sampling_error_is_that_of_two_binomials(tmp_path: Path) -> None:
    table = parse_table("t", two_methods({"better": "v/sam", "than": "v/vanilla"}))
    write_rows(tmp_path, runs_of(table, table.rows[0]), [300, 301, 302])
    write_rows(tmp_path, runs_of(table, table.rows[1]), [290, 291, 291])
    found = join_table(table, tmp_path)
    (said,) = judged(table, found)
    rng = np.random.default_rng(0)
    drawn = [rng.binomial(360, p, 100_000) / 3.6 for p in (903 / 1080, 872 / 1080)]
    images, half = sampling(found[1], found[0], table.columns[0])
    assert images == 360 and half == pytest.approx(1.96 * np.std(drawn[0] - drawn[1]), rel=0.01)
    assert said.endswith(
        f"Another 360 test images could move this by up to ± {half:.2f} points "
        "(95 %, if the methods err independently)."
    )


def test_seeds_and_images_err_together(tmp_path: Path) -> None:
    """5.6 points are more than the seeds' 3.8 and the images' 4.9, but not more than both."""
    table = parse_table("t", two_methods({"better": "v/sam", "than": "v/vanilla"}))
    write_rows(tmp_path, runs_of(table, table.rows[0]), [300, 301, 302])
    write_rows(tmp_path, runs_of(table, table.rows[1]), [320, 315, 328])
    (said,) = judged(table, join_table(table, tmp_path))
    assert said.startswith("**confirmed on these test images**")


def test_other_hardware_is_told(tmp_path: Path) -> None:
    table = parse_table("t", two_methods({"better": "v/sam", "than": "v/vanilla"}))
    write_rows(tmp_path, runs_of(table, table.rows[0]), [300, 301, 302])
    write_rows(tmp_path, runs_of(table, table.rows[1])[:2], [320, 322])
    (said,) = judged(table, join_table(table, tmp_path))
    assert "hardware" not in said
    path = row_path(tmp_path, runs_of(table, table.rows[1])[0].run_id)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hardware": "NVIDIA X"}))
    (said,) = judged(table, join_table(table, tmp_path))
    assert said.endswith("The runs used different hardware: CPU test, NVIDIA X.")


def test_holm() -> None:
    """Of 0.01 to 0.04 only the first is below its 0.05 / 4; the second is not below 0.05 / 3, so the rest fall."""
    for ps, kept in (([0.04, 0.01, 0.03, 0.02], 1), ([0.01, 0.012, 0.2], 2), ([0.06], 0), ([0.001], 1), ([], 0)):
        assert surviving(ps) == kept


def test_a_contrast_says_which_seeds_it_lacks(tmp_path: Path) -> None:
    table = parse_table("t", two_methods({"better": "v/sam", "than": "v/vanilla"}))
    write_rows(tmp_path, runs_of(table, table.rows[0]), [300, 301, 302])
    write_rows(tmp_path, runs_of(table, table.rows[1])[:2], [320, 322])
    write_rows(tmp_path, runs_of(table, table.rows[1])[2:], [36], status="diverged")
    (said,) = judged(table, join_table(table, tmp_path))
    assert "(n = 2," in said and said.endswith("Runs that diverged, left out: 1.")


def test_magnitudes_are_compared_by_their_ratio(tmp_path: Path) -> None:
    claim = {"better": "v/sam", "than": "v/vanilla", "lower": True}
    columns = {"val": {"title": "|s|", "value": "step", "unit": "", "magnitude": True}}
    table = parse_table("t", two_methods(claim) | {"columns": columns})
    for row, sizes in zip(table.rows, ([1000, 100_000, 10], [100, 1000, 2]), strict=True):
        write_rows(tmp_path, runs_of(table, row), [300, 301, 302])
        for run, size in zip(runs_of(table, row), sizes, strict=True):
            path = row_path(tmp_path, run.run_id)
            path.write_text(json.dumps(json.loads(path.read_text()) | {"step": size}))
    found = join_table(table, tmp_path)
    (said,) = judged(table, found)
    # geometric mean of 1/10, 1/100, 1/5; the t-interval of its logarithm
    assert "SAM over VANILLA: a factor of 0.058, 95 % from 0.0012 to 2.9 (n = 3, p = 0.088)." in said
    assert said.startswith("**open, leans to it**")
    assert "1,000 [10–100,000] (3)" in render(table, found, "md")


def test_a_size_of_zero_is_no_crash(tmp_path: Path) -> None:
    claim = {"better": "v/sam", "than": "v/vanilla", "lower": True}
    columns = {"val": {"title": "|s|", "value": "step", "unit": "", "magnitude": True}}
    table = parse_table("t", two_methods(claim) | {"columns": columns, "seeds": 2})
    for row, sizes in zip(table.rows, ([100, 10], [0, 10]), strict=True):
        write_rows(tmp_path, runs_of(table, row), [300, 301])
        for run, size in zip(runs_of(table, row), sizes, strict=True):
            path = row_path(tmp_path, run.run_id)
            path.write_text(json.dumps(json.loads(path.read_text()) | {"step": size}))
    (said,) = judged(table, join_table(table, tmp_path))
    assert "95 % from 0 to inf (n = 2, p = 0.5)" in said


def test_trend_within_groups(tmp_path: Path) -> None:
    grid = {"model.sam_rho": [0.1, 0.2], "model.alpha": [0.1, 0.2, 0.4]}
    row = {"id": "v/gsam", "model": "V", "method": "GSAM", "overrides": ["optim=gsam_constant"], "grid": grid}
    claims = [{"text": "falls", "column": "val", "falls_with": key} for key in grid]
    columns = {"val": {"title": "test"}}
    table = parse_table("t", BASE | {"seeds": 1, "columns": columns, "rows": [row], "claims": claims})
    for r, count in zip(table.rows, [300, 200, 100, 310, 210, 220], strict=True):
        write_rows(tmp_path, runs_of(table, r), [count])
    rho, alpha = judged(table, join_table(table, tmp_path))
    assert "in 0 of 3 pairs" in rho and rho.startswith("**open, leans against it**")
    falls = [sum(a > b for a, b in itertools.combinations(o, 2)) for o in itertools.permutations(range(3))]
    chance = sum(a + b >= 5 for a in falls for b in falls) / 36
    assert f"in 5 of 6 pairs of points that differ in nothing else (p = {2 * chance:.2g})" in alpha


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([360] * 5, "**open**: falls. test falls in 0 of 10 pairs"),
        ([360, 360, 360, 360, 300], "**open**: falls. test falls in 4 of 10 pairs"),
        ([300, 310, 320, 330, 340], "**contradicted**: falls. test falls in 0 of 10 pairs"),
    ],
)
def test_equal_values_are_no_trend(tmp_path: Path, counts: list[int], said: str) -> None:
    grid = {"model.alpha": [0.1, 0.2, 0.3, 0.4, 0.5]}
    row = {"id": "v/gsam", "model": "V", "method": "GSAM", "overrides": ["optim=gsam_constant"], "grid": grid}
    claims = [{"text": "falls", "column": "val", "falls_with": "model.alpha"}]
    columns = {"val": {"title": "test"}}
    table = parse_table("t", BASE | {"seeds": 1, "columns": columns, "rows": [row], "claims": claims})
    for r, count in zip(table.rows, counts, strict=True):
        write_rows(tmp_path, runs_of(table, r), [count])
    (line,) = judged(table, join_table(table, tmp_path))
    assert line.startswith(said)


def test_ranks_of_few_points_are_tested_exactly() -> None:
    """A perfect order of 3 has probability 1/6, whatever Student's t says; of many points both agree."""
    assert rank_correlation([1, 2, 3], [2, 4, 9]) == (pytest.approx(1), pytest.approx(2 / 6))
    assert rank_correlation(range(8), range(8))[1] == pytest.approx(2 / 40320)  # Student's t would say 0
    assert rank_correlation([1, 2, 3, 4], [9, 7, 5, 4]) == (pytest.approx(-1), pytest.approx(2 / 24))
    assert rank_correlation([1, 1, 2], [1, 2, 2])[1] == pytest.approx(1)  # a tie each: any order is as far from none
    assert rank_correlation(range(8), [0, 1, 2, 3, 5, 4, 7, 6])[1] == pytest.approx(0.00026, rel=0.05)


@pytest.mark.parametrize(
    ("counts", "gaps", "said"),
    [
        (
            [100, 110, 120, 130, 140],
            [0.1, 0.3, 0.2, 0.5, 0.9],
            "**open, leans to it**: alike. h and test: rank correlation 0.90 over 5 points (p = 0.083)",
        ),
        (
            [100] * 5,
            [0.1, 0.3, 0.2, 0.5, 0.9],
            "**open**: alike. test is the same at all 5 points: there is nothing to rank.",
        ),
        (
            [100, 110, 120, 130, 140],
            [0.1] * 5,
            "**open**: alike. h is the same at all 5 points: there is nothing to rank.",
        ),
    ],
)
def test_two_columns_that_order_rows_alike(tmp_path: Path, counts: list[int], gaps: list[float], said: str) -> None:
    grid = {"model.alpha": [0.1, 0.2, 0.3, 0.4, 0.5]}
    row = {"id": "v/gsam", "model": "V", "method": "GSAM", "overrides": ["optim=gsam_constant"], "grid": grid}
    columns = {"val": {"title": "test"}, "gap": {"title": "h", "value": "last.surrogate_gap"}}
    claim = {"text": "alike", "column": "gap", "follows": "val"}
    table = parse_table("t", BASE | {"seeds": 1, "columns": columns, "rows": [row], "claims": [claim]})
    for i, r in enumerate(table.rows):
        write_rows(tmp_path, runs_of(table, r), [counts[i]], gap=gaps[i])
    (line,) = judged(table, join_table(table, tmp_path))
    assert line.startswith(said) and "nan" not in line


def test_mahonian_numbers() -> None:
    for n in range(1, 6):
        counted = inversions(n)
        for k in range(n * (n - 1) // 2 + 1):
            orders = itertools.permutations(range(n))
            assert counted[k] == sum(k == sum(a > b for a, b in itertools.combinations(o, 2)) for o in orders)


def test_a_claim_about_nothing_is_refused() -> None:
    for wrong in ({"better": "v/sam", "than": "v/gsam"}, {"falls_with": "optim.rho_max"}, {"column": "test"}):
        with pytest.raises(UserError, match="it must name a column"):
            parse_table(
                "t", two_methods({"better": "v/sam", "than": "v/vanilla"} | wrong if "column" in wrong else wrong)
            )
