"""slurm/array.sbatch without a SLURM: which lines of a plan it trains, after which exit codes it requeues itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def array(where: Path, line: str, *, code: int = 0) -> tuple[int, list[str], str, bool]:
    """Exit code, the words that train.py got, what was printed, and whether the job was requeued.

    srun and scontrol are programs that note how they are called; the first ends with `code`.
    """
    folder = where / "bin"
    folder.mkdir(exist_ok=True)
    (where / "slurm/logs").mkdir(parents=True, exist_ok=True)
    for name, then in {
        "srun": f'printf "%s\\n" "$@" > {where}/words; exit {code}',
        "scontrol": f"touch {where}/requeued",
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{then}\n")
        (folder / name).chmod(0o755)
    (where / "plan.tsv").write_text(f"first\tmodel=vit_s32\n{line}\n")
    env = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    env |= {"SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_GPU": "1", "PLAN": "plan.tsv", "DATA_ROOT": ""}
    env |= {"PATH": f"{folder}:{os.environ['PATH']}"}
    job = ["bash", str(ROOT / "slurm/array.sbatch")]
    done = subprocess.run(job, cwd=where, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    words = (where / "words").read_text().splitlines() if (where / "words").exists() else []
    if "train.py" in words:
        words = words[words.index("train.py") + 1 :]
    return done.returncode, words, done.stdout, (where / "requeued").exists()


LINES = {
    "a=1 b=2": ["a=1", "b=2"],
    "'a=1 2' \"b='x'\"": ["a=1 2", "b='x'"],
    r"a=\$HOME 'b=$(touch x)' c=`d`": ["a=$HOME", "b=$(touch x)", "c=`d`"],
}


@pytest.mark.parametrize("text", LINES)
def test_the_words_of_a_line_reach_the_command(text, tmp_path):
    code, words, output, _ = array(tmp_path, f"run\t{text}")
    assert code == 0 and words == LINES[text], output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("line", ["run\ta='b", 'run\ta=1 b="c', "run a=1", "run\t", "run", ""])
def test_a_line_that_cannot_be_split_trains_nothing(line, tmp_path):
    code, words, output, requeued = array(tmp_path, line)
    assert code == 2 and not words and not requeued
    assert "error: " in output and "line 2" in output and "plan.tsv" in output


CODES = {0: False, 2: False, 3: False, 4: False, 143: False, 138: True, 140: True, 1: True, 75: True, 137: True}


@pytest.mark.parametrize("code", CODES)
def test_what_the_next_start_may_get_past_is_requeued(code, tmp_path):
    assert array(tmp_path, "run\ta=1", code=code)[0] == code
    assert (tmp_path / "requeued").exists() == CODES[code]


def test_a_run_that_dies_again_and_again_is_not(tmp_path):
    for start in range(5):
        (tmp_path / "requeued").unlink(missing_ok=True)
        array(tmp_path, "run\ta=1", code=137)
        assert (tmp_path / "requeued").exists() == (start < 3)
