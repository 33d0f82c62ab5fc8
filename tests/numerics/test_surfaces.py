"""The toys and the slices: what they claim, against slow obvious values; the command on a real run."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

from sam_repro.cli import main
from sam_repro.config import compose_config
from sam_repro.optim.hvp import Hessian
from sam_repro.sharpness.sde import network_loss, simulate, taylor
from sam_repro.sharpness.surfaces import filter_normalised, line, plane
from sam_repro.sharpness.toy import trajectories


def quadratic() -> Hessian:
    h = torch.tensor([[1.0, 4.0]], dtype=torch.float64)
    w = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    return Hessian(lambda t, b: 0.5 * (b * t["w"] ** 2).sum(1).mean(), {"w": w}, [(h,)])


def test_slices_of_a_quadratic():
    hessian, d, e = quadratic(), torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    assert_close(line(hessian, [d], [-1, 0, 2]), [2.0, 2.5, 6.5])
    assert_close(plane(hessian, [d], [e], [0.0, 1.0]), [[2.5, 4.0], [8.5, 10.0]])
    assert_close(hessian.params["w"], torch.ones(1, 2).double())


def test_filter_normalised_directions_have_the_length_of_their_filters():
    params = {"w": torch.randn(5, 3, 2), "b": torch.randn(5)}
    w, b = filter_normalised(params)
    assert_close(w.flatten(1).norm(dim=1), params["w"].flatten(1).norm(dim=1))
    assert not b.any()


def test_toy_ends_flatter_with_sam_and_flattest_with_gsam():
    tops = {name: path.top for name, path in trajectories().items()}
    assert tops["sgd"] > 12 and 1 < tops["sam"] < 0.8 * tops["sgd"] and abs(tops["gsam"]) < 0.2 * tops["sam"]


def test_taylor_terms_against_sam():
    """The truncation of order K leaves O(rho^K): halving rho divides the rest by 2^K."""
    w = torch.tensor([1.0, -0.5, 0.8, 1.5], dtype=torch.float64)
    f = lambda v: network_loss(v, torch.tensor(0.7).double(), torch.tensor(-0.4).double())  # noqa: E731
    for order in (1, 2, 3):
        rest = [(taylor(f, w, rho, 0) - taylor(f, w, rho, order)).norm() for rho in (0.02, 0.01)]
        assert rest[0] / rest[1] == pytest.approx(2**order, rel=0.1)


def test_higher_order_sdes_follow_sam_closer():
    found = simulate(steps=60, replicas=400, record=20, rho=0.3)
    assert found.error("sde2") < found.error("sde1") and found.error("sde3") < found.error("sde1")


def test_the_command_on_a_run(tmp_path, capsys):
    from sam_repro.train import main as train

    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    row = train(compose_config(["model=vit_s32", "optim=sam", "debug=tiny", "recipe.steps=2", *folders]))
    run = str(tmp_path / "runs" / row["run_id"])
    small = ["--images", "24", "--batch-size", "16", "--device", "cpu", "--max-steps", "12"]
    assert main(["sharpness", "eigen", run, *small]) == 0
    assert main(["sharpness", "gap", run, *small, "--rho", "0.05"]) == 0
    numbers = json.loads((tmp_path / "runs" / row["run_id"] / "sharpness" / "eigen.json").read_text())
    gap = json.loads((tmp_path / "runs" / row["run_id"] / "sharpness" / "gap.json").read_text())
    assert numbers["images"] == 24 and numbers["sigma_max"] == pytest.approx(gap["sigma_max"], rel=1e-2)
    assert gap["rows"][0]["estimate"] == pytest.approx(gap["rows"][0]["first_order"] + gap["rows"][0]["curvature"])
    assert main(["sharpness", "slice", run, *small, "--points", "3"]) == 0
    assert main(["sharpness", "spectrum", run, *small]) == 0
    assert {p.suffix for p in (tmp_path / "runs" / row["run_id"] / "sharpness").iterdir()} == {".json", ".svg", ".png"}
    assert main(["sharpness", "toy", run]) == 2
    assert "takes no run directory" in capsys.readouterr().err
