"""slurm/array.sbatch on a real SLURM: two nodes on this machine, real jobs, real signals. `make test-slurm`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cluster import Cluster, missing
from safetensors.torch import load_file

from sam_repro.records import ledger
from sam_repro.records.log import read_log

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"SLURM is not installed: {', '.join(missing())}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons run as root"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).resolve().parents[2]
TABLE = """
title: a table for a test cluster
source: not of a paper
base:
  - debug=tiny
  - model=vit_s32
  - train.device=cpu
  - train.threads=1
  - train.deterministic=true
  - train.log_every=5
  - train.save_every_steps=10
  - log.wandb=offline
  - log.runs_dir={runs}
  - log.ledger_dir={ledger}
  - recipe.steps={steps}
seeds: {seeds}
columns:
  val: {{ title: val }}
rows:
  - {{ id: vit/gsam, model: ViT, method: GSAM, overrides: [optim=gsam] }}
  - {{ id: vit/sam, model: ViT, method: SAM, overrides: [optim=sam] }}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Study:
    """A table of tiny runs in a folder of its own, planned and submitted as slurm/README.md says."""

    def __init__(self, cluster: Cluster, folder: Path, *, steps: int = 100, seeds: int = 1):
        folder.mkdir()
        self.cluster, self.folder = cluster, folder
        # The batch script and the program as they are, in a folder that may be littered.
        (folder / "train.py").symlink_to(ROOT / "train.py")
        (folder / "slurm" / "logs").mkdir(parents=True)
        shutil.copy(ROOT / "slurm" / "array.sbatch", folder / "slurm")
        self.table = folder / "table.yaml"
        self.table.write_text(TABLE.format(runs=folder / "runs", ledger=folder / "ledger", steps=steps, seeds=seeds))
        self.plan()

    def plan(self, *options: str) -> list[str]:
        """`sam-repro plan table > slurm/plan.tsv`; the run ids."""
        plan = self.command("plan", *options)
        (self.folder / "slurm" / "plan.tsv").write_text(plan)
        return [line.split("\t")[0] for line in plan.splitlines()]

    def command(self, name: str, *options: str) -> str:
        """`sam-repro <name> table`."""
        code = "import sys; from sam_repro.cli.main import main; sys.exit(main(sys.argv[1:]))"
        words = [sys.executable, "-c", code, name, str(self.table), *options]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(words, env=env, cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def submit(self, array: str, *options: str, gpus: int = 1) -> str:
        """`sbatch --array=... slurm/array.sbatch` with what this cluster needs; the job's number."""
        size = [f"--array={array}", f"--gpus-per-node={gpus}", "--cpus-per-gpu=1", *options]
        env = {"DATA_ROOT": "", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        said = self.cluster.call("sbatch", *size, "slurm/array.sbatch", cwd=self.folder, **env)
        return said.split()[-1]

    def finish(self, job: str, seconds: float = 300) -> None:
        """Wait until no task of the job waits or runs."""
        left = ("squeue", "--noheader", f"--jobs={job}", "--states=PENDING,RUNNING,COMPLETING,CONFIGURING")
        self.cluster.wait(
            lambda: not self.cluster.call(*left), f"job {job} did not end: {self.logs()}", seconds=seconds
        )

    def logs(self) -> str:
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("slurm/logs/*.out")))

    def reach(self, text: str) -> None:
        """Wait until a log says so."""
        self.cluster.wait(lambda: text in self.logs(), f"no log says {text}", seconds=120)

    def run_dir(self, name: str = "vit_s32-gsam-s0-*") -> Path:
        (found,) = self.folder.glob(f"runs/{name}")
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.run_dir() / "model.safetensors")

    def rows(self) -> list[dict]:
        return ledger.read_ledger(self.folder / "ledger")

    def check_log(self, steps: int) -> None:
        """Each step once, one W&B run, one row."""
        logged = [r["step"] for r in read_log(self.run_dir() / "log.jsonl") if "eval" not in r]
        assert logged == list(range(5, steps + 1, 5))
        tracked = {p.name.split("-", 3)[3] for p in self.run_dir().glob("wandb/offline-run-*")}
        assert tracked == {self.run_dir().name}
        assert [row["run_id"] for row in self.rows()] == [self.run_dir().name]


@pytest.fixture(scope="module")
def quiet(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """One run that nothing disturbs."""
    study = Study(cluster, tmp_path_factory.mktemp("quiet") / "study")
    study.finish(study.submit("1"))
    assert len(study.rows()) == 1, study.logs()
    return study


def equal(a: Study, b: Study) -> bool:
    one, other = a.weights(), b.weights()
    return all(torch.equal(one[k], other[k]) for k in one)


def test_an_array_of_four_runs(cluster, tmp_path):
    """And a line of the plan that somebody wrote to have a command executed: it is a value and nothing else."""
    study = Study(cluster, tmp_path / "study", steps=10, seeds=2)
    with open(study.folder / "slurm" / "plan.tsv", "a") as plan:
        plan.write("evil\tdebug=tiny seed=$(touch${IFS}planted) `touch planted` ;touch planted\n")
    study.finish(study.submit("1-5"))
    assert not (study.folder / "planted").exists() and "touch" in study.logs()
    assert [row["status"] for row in study.rows()] == ["done"] * 4, study.logs()
    assert len(list(study.folder.glob("slurm/logs/*.out"))) == 5
    assert study.command("plan", "--missing") == ""
    assert "4" in study.command("status")


def test_two_nodes_give_the_weights_of_one(cluster, quiet, tmp_path):
    """The same two ranks on one node and on two, bitwise. Other numbers of ranks: tests/integration/test_ranks.py."""
    one, two = Study(cluster, tmp_path / "one"), Study(cluster, tmp_path / "two")
    one.finish(one.submit("1", gpus=2))
    two.finish(two.submit("1", "--nodes=2"))
    assert [s.rows()[0]["world"] for s in (quiet, one, two)] == [1, 2, 2], one.logs() + two.logs()
    assert "on sam-node[1-2]:" in two.logs()
    assert equal(one, two)


@pytest.mark.parametrize("how", ["requeue", "usr2"])
def test_requeued_in_the_middle_it_ends_with_the_same_weights(cluster, quiet, tmp_path, how):
    study = Study(cluster, tmp_path / "study")
    job = study.submit("1")
    study.reach("[20/100]")
    cluster.call(*{"requeue": ("scontrol", "requeue", f"{job}_1"), "usr2": ("scancel", "-s", "USR2", f"{job}_1")}[how])
    study.reach("start 1, on")
    study.finish(job)
    assert "resumed at step" in study.logs() and "start 0, on" in study.logs()  # the log was appended to
    assert equal(quiet, study)
    study.check_log(100)


def test_a_run_longer_than_the_time_limit_requeues_itself(cluster, tmp_path):
    """SLURM's own warning, sent by its clock: --time=1 is a minute, the warning comes within its first half."""
    study = Study(cluster, tmp_path / "study", steps=100_000)
    job = study.submit("1", "--time=1", "--signal=USR2@40", "--nodes=2")
    study.reach("start 1, on")
    study.reach("resumed at step")
    cluster.call("scancel", job)
    study.finish(job)
    assert study.logs().count("and saved; the same command goes on from there") >= 1
    assert not study.rows()


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(cluster, tmp_path):
    """kill -9 of the rank on the second node: the first ends, the job requeues itself and ends as if nothing was."""
    undisturbed, study = Study(cluster, tmp_path / "quiet"), Study(cluster, tmp_path / "study")
    undisturbed.finish(undisturbed.submit("1", "--nodes=2"))
    job = study.submit("1", "--nodes=2")
    study.reach("[20/100]")
    os.kill(rank_process(study, 1), signal.SIGKILL)
    study.finish(job)
    assert "start 1, on sam-node[1-2]" in study.logs() and "error: " in study.logs(), study.logs()
    (deaths,) = study.folder.glob("slurm/logs/*.deaths")
    assert len(deaths.read_text().splitlines()) == 1
    assert equal(undisturbed, study)
    study.check_log(100)


def rank_process(study: Study, rank: int) -> int:
    """The process of a rank of a study's running job."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, env = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().split(b"\0")
            here = Path(os.readlink(folder / "cwd")) == study.folder
        except OSError:
            continue
        if here and b"train.py" in command and b"srun" not in command and f"SLURM_PROCID={rank}".encode() in env:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def test_a_cancelled_array_is_finished_by_what_is_missing(cluster, tmp_path):
    """Two runs at a time; the second pair is cancelled at work; the ledger has whole rows only, the plan the rest."""
    study = Study(cluster, tmp_path / "study", steps=60, seeds=2)
    everything = study.plan()
    job = study.submit("1-4%2")
    cluster.wait(lambda: len(study.rows()) >= 1, "no run ended", seconds=120)
    cluster.wait(lambda: len(list(study.folder.glob("runs/*/step-*.json"))) > 3, "no other began", seconds=120)
    cluster.call("scancel", job)
    study.finish(job)
    done = [row["run_id"] for row in study.rows()]
    assert 1 <= len(done) < 4 and all(row["status"] == "done" for row in study.rows())
    assert not list(study.folder.glob("runs/*/lock")) and "start 1" not in study.logs()
    left = study.plan("--missing")
    assert sorted(done + left) == sorted(everything)
    study.finish(study.submit(f"1-{len(left)}"))
    assert sorted(row["run_id"] for row in study.rows()) == sorted(everything), study.logs()
    assert study.plan("--missing") == []
