"""benchmarks/report.py: tables and pictures from files as step.py and scaling.py write them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.report import ROOT, load_peers, load_speed, main, peers_table, speed_table


def result(model: str, **seconds: float) -> dict:
    entries = []
    for name, value in seconds.items():
        method, _, m = name.partition("_m")
        entry = {"kind": "step", "model": model, "method": method.replace("_", "-"), "m": int(m or 512), "batch": 512}
        entry |= {"seconds": value, "images_per_second": 512 / value, "peak_bytes": 10**10, "ceiling_share": 0.5}
        entries.append(entry | {"over_floor": value / seconds["floor"]})
    told = {"hardware": "NVIDIA X", "matmul_tflops": 700.0, "batch": 512, "rounds": 4, "steps": 6, "commit": "a" * 40}
    return told | {"versions": {"torch": "2.0", "timm": "1.0"}, "entries": entries}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    first = result("vit", floor=0.2, ours_vanilla=0.1, vanilla=0.1, gsam_m512=0.21, gsam_m64=0.25, davda54=0.22)
    (tmp_path / "a.json").write_text(json.dumps(first))
    (tmp_path / "b.json").write_text(json.dumps(result("resnet", floor=0.4, gsam_m512=0.4)))
    (tmp_path / "other.json").write_text(json.dumps({"forward": {}}))
    return tmp_path


def test_table_has_a_dash_for_what_was_not_run(folder: Path) -> None:
    lines = speed_table(load_speed(folder)).splitlines()
    assert lines[2] == "| vit | – | 5,120 | 50.0 % | 200.0 ms | 1.050 | 1.250 | 1.100 | – | +0.00 GB |"
    assert lines[3] == "| resnet | – | – | – | 400.0 ms | 1.000 | – | – | – | – |"
    assert "commit aaaaaaaa" in lines[-1] and "700 TFLOP/s for vit, 700 TFLOP/s for resnet" in lines[-1]


def test_other_hardware_is_named(folder: Path) -> None:
    (folder / "c.json").write_text(json.dumps(result("vit", floor=0.1) | {"hardware": "NVIDIA Y"}))
    assert [line.split("|")[1].strip() for line in speed_table(load_speed(folder)).splitlines()[2:5]] == [
        "vit",
        "resnet",
        "vit (NVIDIA Y)",
    ]


def test_the_command_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--folder", str(folder), "--chart", str(folder / "speed")]) == 0
    assert "| vit |" in capsys.readouterr().out
    assert "davda54 SAM  +10.0" in (folder / "speed.svg").read_text()


def test_the_official_code_stands_beside_ours(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = result("vit_b16", floor=0.2, ours_vanilla=0.1, gsam_m512=0.2, gsam_m64=0.25, davda54=0.22)
    for method, m, seconds in (
        ("jax-vanilla", 512, 0.13),
        ("jax-gsam-m512", 512, 0.3),
        ("jax-gsam-m64-scan-cudnn", 64, 0.5),
    ):
        tree["entries"].append(
            {"kind": "step", "model": "vit_b16", "method": method, "m": m, "batch": 512, "jax": "0.1"}
        )
        tree["entries"][-1] |= {"seconds": seconds, "images_per_second": 512 / seconds}
    for entry in tree["entries"]:
        entry["rounds"] = [entry["seconds"]] * 2
    (folder / "d.json").write_text(json.dumps(tree))
    assert main(["codes", "--folder", str(folder), "--chart", str(folder / "codes")]) == 0
    told = capsys.readouterr().out
    assert "| vit_b16 | vanilla | official JAX, as it is | 130.0 | 3,938 | – | 1.30 |" in told
    assert "| vit_b16 | one perturbation | davda54 SAM | 220.0 | 2,327 | 10.0 | 1.10 |" in told
    assert "| vit_b16 | m = 64 | official JAX, scan, cuDNN's attention | 500.0 | 1,024 | – | 2.00 |" in told
    assert "500 ms" in (folder / "codes.svg").read_text()


def test_nothing_measured_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--folder", str(tmp_path)]) == 2
    assert "is of speed" in capsys.readouterr().err


def test_the_documents_are_fresh_and_a_number_edited_by_hand_is_found(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["--check"]) == 0
    marks = "<!-- python benchmarks/report.py speed -->\n", "<!-- end of benchmarks/report.py -->\nLast line.\n"
    (tmp_path / "README.md").write_text("".join(marks))
    words = ["--root", str(tmp_path), "--folder", str(folder)]
    assert main(["--check", *words]) == 1 and "is stale" in capsys.readouterr().out
    assert main(["--write", *words]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text == speed_table(load_speed(folder)).join([marks[0], "\n" + marks[1]]) and main(["--check", *words]) == 0
    (tmp_path / "README.md").write_text(text.replace("5,120", "5,210"))
    assert main(["--check", *words]) == 1


def test_peers_are_compared_by_the_seeds_that_both_have() -> None:
    cpu, gpu = load_peers(ROOT / "results" / "benchmarks")
    assert "| ours-sam | davda54 | 97.31 ± 0.40 | 97.49 ± 1.83 | -0.19 (n = 3, p = 0.69) |" in peers_table([cpu])
    assert "(n = 2, p = 0.84)" in peers_table([gpu])


def test_many_gpus_stand_beside_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for gpus, step in ((1, 0.1), (2, 0.104), (4, 0.11)):
        row = {
            "kind": "scaling",
            "model": "vit",
            "method": "gsam",
            "m": 64,
            "reduce": "fp32",
            "gpus": gpus,
            "step": step,
        }
        rows.append(row | {"bytes": 329e6, "reduction": 0.002, "alone": 0.1, "images_per_second": gpus * 512 / step})
    told = {"hardware": "NVIDIA X", "batch": 512, "rounds": 3, "steps": 8, "commit": "a" * 40}
    told |= {"versions": {"torch": "2.0", "timm": "1.0"}, "entries": rows}
    (tmp_path / "x-scaling.json").write_text(json.dumps(told))
    assert main(["scaling", "--folder", str(tmp_path), "--chart", str(tmp_path / "scaling")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| vit | gsam | 64 | 1 | 100.00 | – | – | – | 5,120 | – | – |"
    # N = 4: 2 x 3/4 x 329 MB / 329 GB/s = 1.5 ms; 100 / 101.5 = 98.5 %; measured 100 / 110
    assert lines[4] == "| vit | gsam | 64 | 4 | 110.00 | 100.00 | 2.00 | 1.50 | 18,618 | 90.9 % | 98.5 % |"
    assert lines[-3].startswith("4 x NVIDIA X, 512 resident images per GPU, bf16, compiled")
    assert "predicted" in (tmp_path / "scaling.svg").read_text()
    assert main(["speed", "--folder", str(tmp_path)]) == 2  # these are no steps
    assert "is of speed" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_what_a_benchmark_imports_of_this_project_is_there(path: Path) -> None:
    """Many import only on a GPU, or in the end: a name that has moved would cost a slot."""
    pytest.importorskip("triton")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sam_repro"):
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), name
