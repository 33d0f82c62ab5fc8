"""Costs from FLOPs and measured speeds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from paper_rows import write_rows

from sam_repro.cli.main import main
from sam_repro.config.compose import compose_config
from sam_repro.errors import UserError
from sam_repro.paper import measured_speeds as rates
from sam_repro.paper.estimate import cost_of, slower, steps_of
from sam_repro.paper.ledger_join import runs_of, unique_runs
from sam_repro.paper.measured_speeds import Rate, is_named, load_rates, loader_rate, passes_of, step_rate
from sam_repro.paper.spec import load_table, parse_table
from sam_repro.runner import calibrate
from sam_repro.runner.calibrate import mean_step


def write(folder: Path, *entries: dict, **head: str) -> Path:
    tree = {"hardware": "NVIDIA H100 80GB HBM3", "gpu": "h100", "entries": list(entries)} | head
    (folder / f"{head.get('gpu', 'h100')}.json").write_text(json.dumps(tree))
    return folder


STEP = {"kind": "step", "model": "vit_b32", "method": "sam", "m": 64, "images_per_second": 5000.0}


def test_table_1_is_799_eflop_a_seed() -> None:
    """The sum was counted independently: 160 vanilla and 799 in all."""
    runs = unique_runs([load_table("table1")], seeds=1).values()
    eflop = {r.run_id: cost_of(r, []).eflop for r in runs}
    assert sum(eflop.values()) == pytest.approx(799, rel=0.005)
    assert sum(e for name, e in eflop.items() if "-vanilla-" in name) == pytest.approx(160, rel=0.005)


def test_steps_are_those_of_training() -> None:
    assert steps_of(compose_config(["model=vit_b32"])) == 300 * 1_268_355 // 4096
    assert steps_of(compose_config(["experiment=demo", "recipe.steps=7"])) == 7


def test_a_measured_speed_is_taken_as_it_is(tmp_path: Path) -> None:
    entries = load_rates("h100", write(tmp_path, STEP))
    cfg = compose_config(["model=vit_b32", "optim=sam"])
    assert step_rate(cfg, entries) == Rate(5000.0, "measured (h100.json)")
    assert load_rates("H100", tmp_path) and load_rates("nvidia", tmp_path) and not load_rates("h200", tmp_path)


def test_another_method_is_scaled_by_passes_and_says_so(tmp_path: Path) -> None:
    entries = load_rates("h100", write(tmp_path, STEP))
    gsam, vanilla = (step_rate(compose_config(["model=vit_b32", f"optim={m}"]), entries) for m in ("gsam", "vanilla"))
    assert gsam.images_per_second == 5000 and "scaled by passes from sam" in gsam.how
    assert vanilla.images_per_second == 10_000


def test_another_model_or_m_is_never_guessed_from(tmp_path: Path) -> None:
    entries = load_rates("h100", write(tmp_path, STEP))
    assert step_rate(compose_config(["model=vit_s32", "optim=sam"]), entries) is None
    assert step_rate(compose_config(["model=vit_b32", "optim=sam", "optim.m=512"]), entries) is None


def test_the_slower_of_step_and_loader_decides(tmp_path: Path) -> None:
    entries = load_rates(
        "h100", write(tmp_path, STEP, {"kind": "loader", "data": "imagenet", "images_per_second": 900})
    )
    cfg = compose_config(["model=vit_b32", "optim=sam"])
    rate = slower(step_rate(cfg, entries), loader_rate(cfg, entries))
    assert rate.images_per_second == 900 and rate.how.startswith("loader-bound")
    assert slower(None, loader_rate(cfg, entries)) is None


def test_hours_are_images_over_speed(tmp_path: Path) -> None:
    entries = load_rates("h100", write(tmp_path, STEP))
    table = load_table("table1")
    (run,) = runs_of(table, next(r for r in table.rows if r.id == "vit_b32/sam"), seeds=1)
    assert cost_of(run, entries).hours == pytest.approx(92_897 * 4096 / 5000 / 3600, rel=1e-4)


def test_a_malformed_entry_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks m"):
        load_rates("h100", write(tmp_path, {"kind": "step", "model": "x", "method": "sam", "images_per_second": 1}))


def test_without_a_speed_the_hours_stay_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(rates, "benchmarks_dir", lambda: tmp_path)
    assert main(["estimate", "demo", "--gpu", "h100"]) == 0
    said = capsys.readouterr()
    assert "not measured" in said.out and "no measured speed of h100" in said.err


def test_actual_hours_stand_beside_the_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = load_table("demo")
    write_rows(tmp_path, runs_of(table, table.rows[0]), [330, 331, 332])
    main(["estimate", "demo", "--ledger", str(tmp_path), "--missing"])
    lines = capsys.readouterr().out.splitlines()
    assert "0.03 (3)" in next(line for line in lines if "vit_digits/vanilla" in line)
    assert next(line for line in lines if "all, shared" in line).split()[4] == "6"


def test_the_arithmetic_of_a_row_gives_its_eflop(capsys: pytest.CaptureFixture[str]) -> None:
    main(["estimate", "table5", "--tflops", "100"])
    lines = capsys.readouterr().out.splitlines()
    row = dict(zip(lines[1].split(), next(line for line in lines if "vit_b32/gsam" in line).split(), strict=False))
    product = float(row["images"]) * float(row["GFLOP"]) * 3 * float(row["passes"]) / 1e9
    assert product == pytest.approx(float(row["EFLOP"]), rel=0.02)


def test_products_of_eigen_sam_are_counted() -> None:
    run = ["recipe=cifar", "model=resnet18_cifar", "data=cifar100", "optim=eigen_sam"]  # batch 256, m = 64
    assert passes_of(compose_config(run)) == pytest.approx(2 + 2 * 5 / 100 / 4)
    assert passes_of(compose_config([*run, "optim.k=10", "optim.eigen_images=batch"])) == pytest.approx(3)
    assert passes_of(compose_config([*run, "optim.k=10", "optim.eigen_images=fixed"])) == pytest.approx(3)


def test_passes() -> None:
    assert [passes_of(compose_config([f"optim={m}"])) for m in ("vanilla", "sam", "gsam")] == [1, 2, 2]


def test_a_period_is_weighed_as_it_is_trained() -> None:
    """k = 100: one step of a hundred renews the eigenvector. Measured with a cycle of 3, from step 4 on."""
    seconds = [9.0, 9.0, 9.0, 9.0, 1.0, 1.2, 5.0, 1.1, 1.0, 5.4, 1.2, 1.1, 5.2]
    assert mean_step(seconds, 1) == pytest.approx(1.2)
    assert mean_step(seconds, 100) == pytest.approx(1.1 + 4.1 / 100)
    assert mean_step(seconds, 5) == pytest.approx(1.1 + 4.1 / 5)


def test_another_period_is_not_the_same_step(tmp_path: Path) -> None:
    entry = STEP | {"method": "eigen_sam", "period": 100}
    entries = load_rates("h100", write(tmp_path, entry))
    run = ["model=vit_b32", "optim=eigen_sam", "optim.m=64"]
    assert step_rate(compose_config(run), entries) == Rate(5000.0, "measured (h100.json)")
    assert step_rate(compose_config([*run, "optim.k=10"]), entries) is None
    entries = load_rates("h100", write(tmp_path, entry, STEP | {"period": 1}))
    scaled = step_rate(compose_config([*run, "optim.k=10"]), entries)
    assert scaled and scaled.how.startswith("scaled by passes from sam") and scaled.images_per_second < 5000
    entries = load_rates("h100", write(tmp_path, STEP | {"method": "eigen_sam"}))  # of before periods were timed
    assert step_rate(compose_config(run), entries) is None


def test_hardware_goes_by_any_part_of_its_name() -> None:
    assert all(is_named("NVIDIA A100-SXM4-80GB", name) for name in ("a100", "A100", "nvidia a100-sxm4-80gb"))
    assert not is_named("NVIDIA H100 80GB HBM3", "h200")


def test_missing_runs_cost_what_the_row_s_finished_ones_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = load_table("demo")
    runs = runs_of(table, table.rows[0], ledger=tmp_path)
    write_rows(tmp_path, runs[:2], [300, 301])  # 0.01 h each, on hardware called "CPU test"
    words = ["estimate", "demo", "--ledger", str(tmp_path), "--gpus", "1"]
    said = {}
    for more in (["--gpu", "test"], ["--gpu", "test", "--missing"], ["--gpu", "h100", "--missing"]):
        main([*words, *more])
        said[" ".join(more)] = next(x for x in capsys.readouterr().out.splitlines() if "vit_digits/vanilla" in x)
    assert "0.01 " in said["--gpu test --missing"] and "its own (2 finished)" in said["--gpu test --missing"]
    assert "its own" not in said["--gpu test"] + said["--gpu h100 --missing"]


def test_calibration_measures_every_kind_of_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (calibrate, rates):
        monkeypatch.setattr(module, "benchmarks_dir", lambda: tmp_path)
    base = {"title": "t", "source": "ours", "base": ["experiment=demo"], "columns": {"val": {"title": "t"}}, "seeds": 1}
    rows = [{"id": f"v/{m}", "model": "V", "method": m, "overrides": [f"optim={m}"]} for m in ("vanilla", "eigen_sam")]
    table = parse_table("t", base | {"rows": rows})
    calibrate.store(tmp_path / "calibration-here.json", {"kind": "loader", "data": "old"}, {"hardware": "another"})
    path = calibrate.calibrate([table], "here")
    entries = json.loads(path.read_text())["entries"]
    assert "old" not in [e.get("data") for e in entries]
    steps = [e for e in entries if e["kind"] == "step"]
    assert [(e["method"], e["period"]) for e in steps] == [("vanilla", 1), ("eigen_sam", 100)]
    costs = [cost_of(runs_of(table, row)[0], load_rates("here")) for row in table.rows]
    assert costs[1].hours > 1.2 * costs[0].hours > 0  # two passes instead of one


def test_a_calibration_keeps_what_it_does_not_measure_again(tmp_path: Path) -> None:
    path, machine = tmp_path / "calibration-here.json", {"hardware": "GPU", "gpu": "here"}
    step = {"kind": "step", "model": "v", "method": "sam", "m": 4, "images_per_second": 1.0}
    for entry in (step, step | {"m": 8}, step | {"images_per_second": 2.0}):
        calibrate.store(path, entry, machine)
    assert [(e["m"], e["images_per_second"]) for e in load_rates("here", tmp_path)] == [(8, 1.0), (4, 2.0)]
    calibrate.store(path, step, machine | {"hardware": "other GPU"})
    assert [e["m"] for e in load_rates("here", tmp_path)] == [4]


def test_hardware_that_nobody_measured_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "demo", "--gpu", "h1o0"]) == 0
    said = capsys.readouterr()
    assert "no measured speed of h1o0 (measured: " in said.err and "GPU-hours of h1o0" not in said.out


def test_memory_of_every_row_of_table1(capsys: pytest.CaptureFixture[str]) -> None:
    """Images per pass grow with the card, BatchNorm's group stays whole, and a share of an unknown card is refused."""
    chosen = {}
    for card in ("1GB", "24GB", "80GB"):
        main(["estimate", "table1", "--gpus", "1", "--gpu", "h200", "--memory", card])
        lines = [
            line.split() for line in capsys.readouterr().out.splitlines() if re.search(r"^  (vit|mixer|resnet)", line)
        ]
        assert len(lines) == 36
        chosen[card] = {line[0]: line[11] for line in lines}
        assert all(re.fullmatch(r"\d+\.\d–\d+\.\d", line[10]) for line in lines)
    assert chosen["24GB"]["vit_b16/gsam"] == "128" and chosen["80GB"]["vit_b16/gsam"] == "512"
    assert chosen["24GB"]["resnet152/sam"] == "64" and chosen["1GB"]["resnet152/sam"] == "no"
    assert main(["estimate", "table1", "--memory", "0.5"]) == 2
    assert "give GB, such as 24GB" in capsys.readouterr().err


def test_memory_of_a_model_that_nobody_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(["estimate", "demo", "--memory", "24GB"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "vit_digits/vanilla" in line)
    assert line.split()[10:12] == ["–", "–"]
