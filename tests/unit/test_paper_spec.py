"""The YAML format of tables, and the runs a table asks for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sam_repro.cli.main import main
from sam_repro.config.compose import compose_config
from sam_repro.config.run_id import run_id
from sam_repro.errors import UserError
from sam_repro.paper.ledger_join import runs_of, unique_runs
from sam_repro.paper.spec import load_table, parse_table


def tree(**row: object) -> dict:
    rows = [{"id": "m/a", "model": "M", "method": "A", **row}]
    return {"title": "T", "source": "S", "base": ["experiment=demo"], "columns": {"val": {"title": "V"}}, "rows": rows}


def test_no_module_of_the_paper_half_imports_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, sam_repro.paper as p\n"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(p.__path__, 'sam_repro.paper.')]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_demo_wants_three_methods_times_three_seeds() -> None:
    runs = unique_runs([load_table("demo")])
    assert len(runs) == 9
    first = list(runs.values())[0]
    assert first.overrides == ("experiment=demo", "optim=vanilla", "seed=0")
    assert first.run_id.startswith("vit_digits-vanilla-s0-")


def test_seeds_interleave_so_that_an_interrupted_plan_is_even() -> None:
    assert [r.config.seed for r in unique_runs([load_table("demo")]).values()] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_run_that_two_tables_share_is_planned_once() -> None:
    table = load_table("demo")
    assert len(unique_runs([table, table])) == 9


def test_a_run_id_is_that_of_the_composed_config_with_its_seed() -> None:
    table = load_table("demo")
    for run in runs_of(table, table.rows[2]):
        assert run_id(compose_config(list(run.overrides))) == run.run_id


def test_a_grid_expands_to_all_combinations() -> None:
    grid = {"model.sam_rho": [0.1, 0.2], "recipe.lr": [1, 2]}
    row = {"overrides": ["optim=sam"], "grid": grid, "x": "model.sam_rho"}
    table = parse_table("t", tree(**row))
    assert [r.id for r in table.rows][:2] == ["m/a/sam_rho=0.1,lr=1", "m/a/sam_rho=0.1,lr=2"]
    assert [r.x for r in table.rows] == [0.1, 0.1, 0.2, 0.2]
    for row in table.rows:
        run = runs_of(table, row)[2]
        assert run.config == compose_config(list(run.overrides)) and run.run_id == run_id(run.config)
        assert (run.config.model.sam_rho, run.config.recipe.lr) == tuple(row.point.values())


def test_a_grid_takes_switches_lists_nothing_and_files() -> None:
    grid = {"optim.weights_only": [True], "recipe.betas": [[0.8, 0.9]]}
    grid |= {"optim.eigen_alpha": [None], "augment": ["medium"]}
    (row,) = parse_table("t", tree(overrides=["model=vit_s32", "optim=sam"], grid=grid)).rows
    cfg = runs_of(load_table("demo"), row)[0].config
    assert cfg.optim.weights_only and cfg.recipe.betas == [0.8, 0.9] and cfg.optim.eigen_alpha is None
    assert cfg.augment.name == "medium"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"overides": []}, "did you mean 'overrides'"),
        ({"printed": {"vall": 1.0}}, "did you mean 'val'"),
        ({"printed": {"val": "about 3"}}, "must be a number or 'not in our sources'"),
        ({"printed": {"val": True}}, "must be a number"),
        ({"grid": {"recipe.lr": [1]}}, "a grid needs overrides"),
        ({"overrides": "optim=sam"}, "overrides must be"),
        ({"overrides": [1]}, "overrides must be"),
        ({"overrides": [], "grid": {"recipe.lr": 3}}, "grid must be"),
        ({"overrides": [], "grid": {"recipe.lr": [3]}, "series": "{rho}"}, "may name recipe_lr in braces"),
        ({"printed": None}, "printed must be"),
        ({"seeds": -1}, "seeds=-1 must be at least 1"),
        ({"seeds": "three"}, "seeds must be"),
    ],
)
def test_a_bad_row_is_one_sentence(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_table("t", tree(**change))


def test_a_missing_key_is_named() -> None:
    bad = tree()
    del bad["rows"][0]["method"]
    with pytest.raises(UserError, match="table t, row m/a: .*method"):
        parse_table("t", bad)


def test_an_id_is_used_once() -> None:
    bad = tree()
    bad["rows"] *= 2
    with pytest.raises(UserError, match="used 2 times"):
        parse_table("t", bad)


def test_an_unknown_table_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "dmo"]) == 2
    assert "did you mean 'demo'" in capsys.readouterr().err


def test_an_override_that_does_not_exist_is_one_sentence() -> None:
    table = parse_table("t", tree(overrides=["optim=gsamm"]))
    with pytest.raises(UserError, match="did you mean 'gsam'"):
        runs_of(table, table.rows[0])


@pytest.mark.parametrize("text", ["", "[]", "title: [", "title: T\nrows: 3"])
def test_a_file_that_is_no_table_is_one_sentence(tmp_path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "t.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: t") and capsys.readouterr().err.count("\n") <= 1


def test_counts_on_the_command_line_start_at_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "demo", "--seeds", "0"])
    assert "not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--price", "-3"], ["--price", "cheap"], ["--tflops", "0"], ["--tflops", "nan"]])
def test_prices_and_speeds_are_greater_than_zero(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["estimate", "table5", *words])
    assert f"'{words[1]}' is not a number greater than 0" in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what the import of a missing package does
    (tmp_path / "log.jsonl").write_text("")
    assert main(["sync", str(tmp_path)]) == 2
    assert "`sam-repro sync` needs wandb, which is not installed" in capsys.readouterr().err


def test_a_ledger_folder_that_does_not_exist_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "demo", "--ledger", "/nowhere"]) == 2
    assert "there is no folder /nowhere" in capsys.readouterr().err


def test_a_folder_that_cannot_be_and_ctrl_c_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    from sam_repro.cli import write

    (tmp_path / "file").write_text("")
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.jpg").write_bytes(b"no image")
    words = ["write", "imagefolder", "--src", str(tmp_path), "--dst"]
    assert main([*words, str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err == f"error: [Errno 20] Not a directory: '{tmp_path / 'file' / 'x'}'\n"

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "write_dataset", interrupted)
    assert main([*words, str(tmp_path / "dst")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
