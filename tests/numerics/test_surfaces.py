"""The toys and the slices: what they claim, against slow obvious values; the command on a real run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import ENV
from safetensors.torch import load_file
from torch.testing import assert_close

from sam_repro.cli.main import main
from sam_repro.config.compose import compose_config
from sam_repro.curvature.slices import filter_normalised, line, plane
from sam_repro.optim import GradientStep
from sam_repro.optim.hessian import Hessian
from sam_repro.paper.toys import sde
from sam_repro.paper.toys import surface as toy
from sam_repro.training.main import main as train


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


def torch_surface(w: torch.Tensor) -> torch.Tensor:
    """The toy's surface written again, for the engine."""
    wells = [torch.exp(-(w - w.new_tensor(c)).square().sum() / (2 * toy.WIDTH**2)) for c in toy.SHARP]
    return toy.BOWL * (w - w.new_tensor(toy.FLAT)).square().sum() - toy.DEPTH * sum(wells)


def test_toy_shows_what_the_caption_of_fig_3_says_and_how_robustly():
    assert {name: path.end for name, path in toy.trajectories().items()} == {
        "vanilla": "first well",
        "sam": "second well",
        "gsam": "flat minimum",
    }
    starts = np.linspace(-0.6, 0.6, 25)
    flat = {m: sum(toy.descend(m, start=(-0.8, y)).end == "flat minimum" for y in starts) for m in toy.METHODS}
    assert flat == {"vanilla": 0, "sam": 0, "gsam": 25}
    tops = {name: path.top for name, path in toy.trajectories().items()}
    assert min(tops["vanilla"], tops["sam"]) > 8 and tops["gsam"] < 0.3


@pytest.mark.parametrize(
    ("name", "method"),
    [("vanilla", {}), ("sam", {"perturb": "sam"}), ("gsam", {"perturb": "sam", "combine": "ascent", "alpha": 1.4})],
)
def test_the_toy_is_the_engine(name, method):
    """The closed forms of the toy against GradientStep on the same surface, while chaos has not yet set in."""
    w = torch.tensor(toy.START, dtype=torch.float64, requires_grad=True)
    step = GradientStep(lambda tensors, _: torch_surface(tensors["w"]), {"w": w}, **method)
    expected = toy.descend(name).points
    for t in range(25):
        assert_close(w.detach().numpy(), expected[t], rtol=1e-9, atol=1e-9)
        step(torch.zeros(1), rho=0.3 * (1 - t / 300))
        with torch.no_grad():
            w -= 0.3 * (1 - t / 300) * w.grad
    h = torch.autograd.functional.hessian(torch_surface, w.detach())
    assert toy.top_eigenvalue(w.detach().numpy()) == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-12)


def network_loss(w, x, y):
    """The sde's problem written again, for autograd: one sample's loss."""
    return 0.5 * ((w[:2] * torch.tanh(w[2:] * x)).sum() - y) ** 2


def test_the_series_of_a_gradient_is_what_autograd_finds():
    x, y = sde.regression(3)
    w, u = np.array([0.9, -0.4, 0.7, 1.1]), np.array([0.3, -0.2, 0.5, 0.1])
    series = sde.gradient_series(w, np.tile(u, (3, 1)), x, y)
    for i in range(3):
        f = lambda v, i=i: network_loss(v, x[i], y[i])  # noqa: E731
        g, tw, tu = torch.func.grad(f), torch.tensor(w), torch.tensor(u)
        along = lambda t, g=g, tw=tw, tu=tu: g(tw + t * tu)  # noqa: E731
        zero = torch.zeros((), dtype=torch.float64)
        first = torch.func.jacfwd(along)
        for ours, theirs in zip(series, (along(zero), first(zero), torch.func.jacfwd(first)(zero) / 2), strict=True):
            assert_close(torch.tensor(ours[i]), theirs, rtol=1e-10, atol=1e-12)
    mean = lambda v: torch.stack([network_loss(v, *pair) for pair in zip(x, y, strict=True)]).mean()  # noqa: E731
    loss, top = sde.loss_and_curvature(w, x, y)
    assert loss == pytest.approx(float(mean(torch.tensor(w))))
    assert top == pytest.approx(float(torch.linalg.eigvalsh(torch.func.hessian(mean)(torch.tensor(w)))[-1]))


def test_taylor_terms_against_sam():
    """The truncation of order K leaves O(rho^K): halving rho divides the rest by 2^K."""
    x, y = np.array([0.7]), np.array([-0.4])
    w = np.array(sde.START)
    for order in (1, 2, 3):
        rest = [
            np.linalg.norm(sde.all_gradients(w, x, y, rho, 0) - sde.all_gradients(w, x, y, rho, order))
            for rho in (0.02, 0.01)
        ]
        assert rest[0] / rest[1] == pytest.approx(2**order, rel=0.1)


def test_higher_order_sdes_follow_sam_closer():
    found = sde.simulate(steps=60, replicas=400, record=20, rho=0.3)
    assert found.error("sde2") < found.error("sde1") and found.error("sde3") < found.error("sde1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny SAM run that measures its sharpness every second step: (row, its directory)."""
    folder = tmp_path_factory.mktemp("trained")
    folders = [f"log.runs_dir={folder}/runs", f"log.ledger_dir={folder}/ledger"]
    measured = ["sharpness.images=24", "sharpness.every=2", "sharpness.batch=16", "optim.k=2"]
    row = train(compose_config(["model=vit_s32", "optim=sam", "debug=tiny", *measured, *folders]))
    return row, folder / "runs" / row["run_id"]


SMALL = ["--images", "24", "--batch-size", "16", "--device", "cpu", "--max-steps", "30"]


def test_commands_on_a_run(trained, capsys):
    row, run = trained
    for what, more in {"eigen": [], "gap": ["--rho", "0.05"], "slice": ["--points", "3"], "spectrum": []}.items():
        assert main(["sharpness", what, str(run), *SMALL, *more]) == 0
    assert main(["sharpness", "convergence", str(run), *SMALL, "--p", "8", "--starts", "2"]) == 0
    numbers = {p.stem: json.loads(p.read_text()) for p in (run / "sharpness").glob("*.json")}
    assert numbers["eigen"]["images"] == 24
    assert numbers["eigen"]["sigma_max"] == pytest.approx(numbers["gap"]["sigma_max"], rel=1e-4)
    assert row["sharpness"]["lambda_max"] == pytest.approx(numbers["eigen"]["sigma_max"], rel=1e-4)
    first = numbers["gap"]["rows"][0]
    assert first["estimate"] == pytest.approx(first["first_order"] + first["curvature"])
    for start in numbers["convergence"]["starts"]:
        assert len(start["cosine"]) == 9 and start["cosine"][-1] > start["cosine"][0]
        value = abs(numbers["convergence"]["eigenvalues"][0])
        assert max(map(abs, start["quotient"])) <= value * (1 + 1e-4)
    for what in ("decay", "alignment"):
        assert main(["sharpness", what, str(run)]) == 0
    assert {p.suffix for p in (run / "sharpness").iterdir()} == {".json", ".svg", ".png"}
    series = json.loads((run / "sharpness" / "alignment.json").read_text())
    assert series["step"] == [2, 4, 6] and all(0 <= x <= 1 for x in series["alignment"])
    ages = json.loads((run / "sharpness" / "decay.json").read_text())["ages"]
    assert [len(ages[a]["step"]) for a in ("2", "4")] == [2, 1]
    assert main(["sharpness", "eigen", str(next(run.glob("step-*.pt"))), *SMALL]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["toy", "{run}"], "takes no run directory"),
        (["eigen"], "needs a run directory: sam-repro sharpness eigen runs/<run_id>"),
        (["eigen", "/nowhere"], "there is no /nowhere"),
        (["eigen", "{run}", "--images", "0"], "--images=0 must be at least 1"),
        (["gap", "{run}", "--rho", "-0.1"], "--rho=-0.1 must be a finite number greater than 0"),
        (["eigen", "{run}", "--n", "90", "--max-steps", "5"], "cannot find 90 eigenvalues"),
    ],
)
def test_bad_input_of_the_command(trained, capsys, arguments, sentence):
    assert main(["sharpness", *(a.format(run=trained[1]) for a in arguments)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_run_without_measurements_says_how_to_get_them(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("")
    assert main(["sharpness", "decay", str(tmp_path)]) == 2
    assert "train with sharpness.every=100" in capsys.readouterr().err


def test_measuring_does_not_change_training(trained, tmp_path):
    row, run = trained
    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    other = train(compose_config(["model=vit_s32", "optim=sam", "debug=tiny", "optim.k=2", *folders]))
    assert other["run_id"] == row["run_id"] and other["sharpness"] == {}
    for key in ("loss", "surrogate_gap", "cosine"):
        assert other["curves"]["train"][key] == row["curves"]["train"][key]
    ours, theirs = (load_file(r / "model.safetensors") for r in (run, tmp_path / "runs" / row["run_id"]))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_a_row_says_of_sharpness(trained):
    row, _ = trained
    s = row["sharpness"]
    assert s["images"] == 24 and s["residual"] <= 1e-3 and s["rho"] == pytest.approx(row["curves"]["train"]["rho"][-1])
    assert s["estimate"] == pytest.approx(2 * s["surrogate_gap"] / s["rho"] ** 2)
    assert s["bf16_norm"] > 0 and -1 <= s["bf16_cosine"] <= 1
    assert 0 <= s["alignment"] <= 1 and 0 <= s["power_cosine"] <= 1 and 0 <= s["decay_cosine"] <= 1
    assert [m["step"] for m in row["curves"]["sharpness"]] == [2, 4, 6]


def test_a_measurement_that_is_impossible_costs_no_run(tmp_path):
    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    lost = ["recipe.steps=2", "sharpness.images=16", "sharpness.batch=16", "model.sam_rho=1e30", "optim.m=0"]
    row = train(compose_config(["model=vit_s32", "optim=vanilla", "debug=tiny", *lost, *folders]))
    assert row["status"] == "done" and "was not measured" in row["sharpness"]["problem"]


def test_two_ranks_measure_what_one_does(trained, tmp_path):
    """Seven images: unequal shares, ragged batches."""
    _, run = trained
    command = ["-m", "sam_repro.cli", "sharpness", "eigen", str(run), "--images", "7", "--batch-size", "2"]
    command += ["--device", "cpu", "--tol", "1e-4"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    peers = [
        subprocess.Popen(
            [sys.executable, *command, "--output", str(tmp_path / "two")],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert main(["sharpness", *command[3:], "--output", str(tmp_path / "one")]) == 0
    outputs = [peer.communicate(timeout=120)[0] for peer in peers]
    assert (
        [peer.returncode for peer in peers] == [0, 0] and "eigen.json" in outputs[0] and "eigen.json" not in outputs[1]
    )
    one, two = (json.loads((tmp_path / n / "eigen.json").read_text()) for n in ("one", "two"))
    assert (one["images"], one["ranks"], two["images"], two["ranks"]) == (7, 1, 7, 2)
    assert two["sigma_max"] == pytest.approx(one["sigma_max"], rel=1e-5)
