"""train.py in a process of its own: every model and method, resuming, stopping, and everything that can be wrong."""

from __future__ import annotations

import json
import os
import shlex
import signal

import pytest
import torch
import wandb_files
from commands import TINY, only, row_of, train
from faulty import Attempt, attempt
from safetensors.torch import load_file

from sam_repro.config.compose import choices, compose_config
from sam_repro.errors import UserError
from sam_repro.records import ledger
from sam_repro.records.log import read_log
from sam_repro.training.data import batches
from sam_repro.training.main import main
from sam_repro.training.run_log import RunLog
from sam_repro.training.signals import STOPS_AND_CTRL_C, Interrupted

# Those of Table 1.
OTHERS = ("wrn28_10", "efficientnet_lite0", "vit_digits", "resnet18_cifar", "resnet50_cifar")  # not of Table 1
MODELS = [n for n in choices("model") if n not in OTHERS]


PAIRS = [(m, o) for m in MODELS for o in ("vanilla", "sam", "gsam")]
PAIRS += [(m, o) for m in ("vit_s32", "resnet50", "mixer_s32") for o in choices("optim") if (m, o) not in PAIRS]


@pytest.mark.parametrize(("model", "optim"), PAIRS)
def test_every_model_runs_with_every_method(model, optim, tmp_path):
    """In this process, for speed; the other tests of this file start the real command."""
    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    small = ["train.device=cpu", "train.threads=1", "recipe.steps=2", "recipe.batch_size=16"]
    row = main(compose_config([f"model={model}", f"optim={optim}", "debug=tiny", *small, *folders]))
    assert row["status"] == "done" and row["step"] == 2
    assert row["evals"]["val"]["total"] > 0
    assert ledger.read_ledger(tmp_path / "ledger")[0]["run_id"] == row["run_id"]


def test_twelve_models():
    assert len(MODELS) == 12


def test_a_run_leaves_everything_behind_and_the_second_time_says_so(tmp_path):
    output = train(tmp_path, *TINY)
    assert "done: val" in output
    row, run_dir = row_of(tmp_path), only(tmp_path, "runs/tiny/vit*")
    assert row["m"] == 8 and row["world"] == 1 and len(row["commit"]) in (7, 40) and row["hours"] > 0
    assert row["versions"]["torch"] and row["hardware"].startswith("CPU") and row["manifest"]
    training = [r for r in read_log(run_dir / "log.jsonl") if "eval" not in r]
    assert [r["step"] for r in training] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "loss_robust", "surrogate_gap", "cosine", "grad_norm", "lr", "rho", "hours"} <= training[0].keys()
    assert training[2]["surrogate_gap"] == pytest.approx(training[2]["loss_robust"] - training[2]["loss"], abs=1e-5)
    weights = load_file(run_dir / "model.safetensors")
    assert "blocks.0.attn.qkv.weight" in weights  # timm's own names
    card = (run_dir / "model_card.md").read_text()
    assert row["run_id"] in card and f"| val | {row['evals']['val']['correct']} / 64 |" in card
    before = (run_dir / "log.jsonl").read_text()
    assert "is done" in train(tmp_path, *TINY)
    assert (run_dir / "log.jsonl").read_text() == before


def test_a_run_that_fails_closes_its_log_for_the_next_one_of_the_process(tmp_path, monkeypatch):
    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    logs: list[RunLog] = []
    monkeypatch.setattr("sam_repro.training.run.RunLog", lambda *a, **k: logs.append(RunLog(*a, **k)) or logs[-1])
    monkeypatch.setattr("sam_repro.training.checkpoint.save", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(compose_config([*TINY, *folders, "recipe.steps=2", "log.wandb=disabled"]))
    (log,) = logs
    assert log.file is not None and log.file.closed and log.bar.disable


@pytest.mark.parametrize("number", STOPS_AND_CTRL_C)
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number):
    longer = ("recipe.steps=400", "train.log_every=5", "train.eval_every_epochs=0", "train.save_every_steps=0")
    process = Attempt(tmp_path, *longer)
    process.reach("[10/400]")
    process.send(number)
    assert process.end() == 128 + number, process.output
    assert "the same command goes on from there" in process.output and "Traceback" not in process.output
    assert ("Ctrl-C again ends at once" in process.output) == (number == signal.SIGINT)
    saved = json.loads(only(tmp_path, "runs/tiny/vit*/step-*.json").read_text())["step"]
    process = Attempt(tmp_path, *longer)
    process.reach(f"resumed at step {saved}")
    process.process.kill()


def test_no_memory_is_one_sentence_with_a_code_of_its_own(tmp_path):
    code, output = attempt(tmp_path, fault="hungry 6")
    assert code == 4 and "Traceback" not in output and "train.chunk=N" in output, output
    assert "train.chunk=N" in only(tmp_path, "runs/tiny/vit*/error.txt").read_text()
    code, output = attempt(tmp_path)
    assert code == 0 and "resumed at step 4" in output, output


def test_what_is_refused_before_it_trains_leaves_no_failed_run(tmp_path):
    code, output = attempt(tmp_path, "data=imagenette", f"data.root={tmp_path}/typo")
    assert code == 2 and "typo" in output
    assert not list(tmp_path.glob("runs/tiny/*_*")), list(tmp_path.glob("runs/tiny/*/*"))


def test_a_run_that_is_done_wants_its_device_all_the_same(tmp_path):
    words = ("recipe.steps=2", "recipe.warmup_steps=1")
    assert attempt(tmp_path, *words)[0] == 0
    code, output = attempt(tmp_path, *words)
    assert code == 0 and "is done" in output
    code, output = attempt(tmp_path, *words, "train.device=cuda", CUDA_VISIBLE_DEVICES="")
    assert code == 2 and "no GPU" in output and "is done" not in output


def test_a_terminal_that_is_closed_does_not_end_what_nohup_started(tmp_path):
    process = Attempt(tmp_path, fault="nohup 1")
    process.reach("[12/120]")
    process.send(signal.SIGHUP)
    assert process.end() == 0, process.output


def test_a_signal_while_the_final_sharpness_is_measured_is_heard(tmp_path):
    """And the run, which W&B saw in two parts, is one there too: first preempted, then finished."""
    words = ("recipe.steps=6", "train.eval_every_epochs=0", "sharpness.images=32", "sharpness.batch=4")
    words += ("log.wandb=offline",)
    process = Attempt(tmp_path, *words)
    process.reach("measuring the sharpness")
    process.send(signal.SIGUSR2)
    assert process.end() == 128 + signal.SIGUSR2, process.output
    assert "stopped at step 6 of 6" in process.output and not list(tmp_path.glob("ledger/*"))
    process = Attempt(tmp_path, *words)
    assert process.end() == 0, process.output
    row, records = row_of(tmp_path), wandb_files.stored(only(tmp_path, "runs/tiny/vit*"))
    assert row["sharpness"]["images"] == 32
    starts = wandb_files.only(records, "run")
    assert {start["run_id"] for start in starts} == {row["run_id"]} and len(starts) == 2
    assert all(f"`sam-repro train {shlex.join(row['overrides'])}` repeats" in start["notes"] for start in starts)
    assert [end.get("exit_code", 0) for end in wandb_files.only(records, "exit")] == [128 + signal.SIGUSR2, 0]
    assert len(wandb_files.only(records, "preempting")) == 1
    assert [h["_step"] for h in wandb_files.history(records)] == [3, 6, 6]  # the last is the sharpness
    found = wandb_files.summary(records)
    assert ledger.summary_of(row).items() <= found.items() and found["pictures/curves._type"] == "image-file"


def test_the_first_speed_after_a_resumption_is_that_of_all_but_the_first_steps(tmp_path, monkeypatch):
    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    cfg = compose_config([*TINY, "recipe.steps=20", "train.log_every=20", *folders])

    def interrupted(*arguments):
        for i, batch in enumerate(batches(*arguments)):
            if i == 18:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("sam_repro.training.fit.batches", interrupted)
        patch.setenv("SAM_REPRO_SHARING", "4")
        main(cfg)
    state = torch.load(only(tmp_path, "runs/vit*/step-00000019.pt"))
    row = main(cfg)
    timed = 18 * row["curves"]["train"]["step_seconds"][0]  # of 20 steps two were the first of a process
    assert state["starts"] == 1 and timed >= state["interval"] - state["starting"] > 0
    # Its first 19 steps had a quarter of the processor, its last one all of it; none of its speeds is a lone run's.
    assert state["hours"] == pytest.approx(state["seconds"] / 4 / 3600) and row["hours"] > state["hours"]
    assert row["sharing"] == 4


@pytest.mark.parametrize("optim", ["sam", "looksam", "entropy_sgd"])
def test_a_last_step_without_a_finite_gradient_is_no_result(tmp_path, optim):
    """The clean loss is that of the weights before the step; those after it are not numbers any more."""
    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    far = ["model.sam_rho=1e38", *(["optim.inner_lr=1e30"] if optim == "entropy_sgd" else [])]
    row = main(compose_config([*TINY, f"optim={optim}", "recipe.steps=1", "recipe.warmup_steps=0", *far, *folders]))
    assert row["status"] == "diverged" and row["curves"]["train"]["loss"][0] > 0
    assert not list((tmp_path / "runs").glob("*/step-*")) and not list((tmp_path / "runs").glob("*/*.safetensors"))


def test_a_diverging_run_is_recorded_and_keeps_its_last_good_checkpoint(tmp_path):
    wild = [*TINY, "recipe.lr=1e30", "recipe.clip=0", "recipe.steps=40", "train.save_every_steps=1"]
    wild += ["recipe.base=sgd", "optim=vanilla"]
    output = train(tmp_path, *wild, code=3)
    assert "not finite" in output and "Traceback" not in output
    row = row_of(tmp_path)
    assert row["status"] == "diverged"
    state = torch.load(sorted(tmp_path.glob("runs/tiny/vit*/step-*.pt"))[-1], weights_only=True)
    assert all(torch.isfinite(t).all() for t in state["model"].values())


BAD = {
    "optim=gsamm": "optim=gsamm does not exist; did you mean 'gsam'?",
    "model=vit_b33": "did you mean 'vit_b32'?",
    "optim.rho_mx=1": "there is no key 'optim.rho_mx'; did you mean 'optim.rho_max'?",
    "recipe.lr=fast": "fast",
    "optim.rho_max=-1": "optim.rho_max=-1.0 must be a finite number, 0 or greater",
    "optim.alpha=nan": "optim.alpha=nan must be a finite number",
    "recipe.lr=0": "recipe.lr=0.0 must be greater than 0",
    "optim.m=5": "optim.m=5 does not divide the batch of 32 images per process",
    "train.device=tpu": "train.device=tpu is not one of auto, cpu, cuda",
    "recipe.schedule=lineer": "did you mean 'linear'?",
    "model.timm=vit_small_patch32_225": "did you mean 'vit_small_patch32_224'?",
    "+model.kwargs.depht=3": "refused",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input_is_one_sentence(argument, tmp_path):
    code, output = attempt(tmp_path, argument)
    assert code == 2 and BAD[argument] in output and "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert not list(tmp_path.glob("runs/tiny/ledger/*")), error


def test_missing_data_root(tmp_path):
    arguments = ["model=vit_s32", "optim=gsam", "train.device=cpu"]
    assert "error: " in train(tmp_path, *arguments, code=2)
    with pytest.raises(UserError, match="nowhere"):
        main(compose_config([*arguments, f"data.root={tmp_path}/nowhere", f"log.runs_dir={tmp_path}"]))


def test_a_ledger_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    code, output = attempt(tmp_path, f"log.ledger_dir={tmp_path}/file/ledger")
    assert code == 2 and "error: cannot write in log.ledger_dir=" in output
    assert "[1/" not in output and "Traceback" not in output


def test_batch_must_divide_over_the_processes(tmp_path):
    env = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    from sam_repro.training.data import split_batch

    cfg = compose_config([*TINY])
    with pytest.raises(ValueError, match="recipe.batch_size=32 does not divide over 3 processes"):
        split_batch(cfg, int(env["WORLD_SIZE"]))
    cfg.optim.m = 64
    with pytest.raises(
        ValueError, match="32 images per process; set recipe.batch_size to a multiple of 64, or lower optim.m"
    ):
        split_batch(cfg, 1)


def test_a_second_process_is_refused(tmp_path):
    longer = ("recipe.steps=4000", "train.save_every_steps=0", "train.log_every=1")
    first = Attempt(tmp_path, *longer)
    first.reach("[2/4000]")
    code, output = attempt(tmp_path / "elsewhere", *longer, f"log.runs_dir={tmp_path}/runs/tiny")
    first.process.kill()
    assert code == 2 and "another process is at work" in output
    assert not only(tmp_path, "runs/tiny/vit*").joinpath("model.safetensors").exists()


def test_sweep_runs_one_after_the_other_and_hydra_makes_no_directories(tmp_path):
    train(tmp_path, "-m", *TINY, "recipe.steps=2", "seed=0,1")
    assert len(list(tmp_path.glob("runs/tiny/ledger/*.json"))) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}
    assert not list(tmp_path.rglob(".hydra"))


def test_the_resolved_configuration_can_be_printed(tmp_path):
    output = train(tmp_path, "model=vit_b32", "optim=gsam", "--cfg", "job", "--resolve")
    assert "rho_max: 0.6" in output and "warmup_steps: 10000" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["optim=random", "optim=entropy_sgd", "optim=sam +model.kwargs.drop_rate=0.1"])
@pytest.mark.parametrize("seed", [20260102, 2**63 - 1])  # a date, and the largest that is taken
def test_large_seeds(tmp_path, method, seed):
    folders = [f"log.runs_dir={tmp_path}/runs", f"log.ledger_dir={tmp_path}/ledger"]
    row = main(compose_config([*TINY, *method.split(), f"seed={seed}", "recipe.steps=2", *folders]))
    assert row["status"] == "done" and row["seed"] == seed
