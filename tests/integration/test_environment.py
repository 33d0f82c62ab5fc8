"""Environments as clusters and containers have them: read-only code and home, a umask, no shared memory."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENV, ROOT, TINY, only

# root may write everywhere, unless it gives that up
UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
SHORT = [*TINY, "recipe.steps=2", "recipe.warmup_steps=1", "log.wandb=disabled"]


@pytest.fixture
def read_only(tmp_path):
    """A copy of the code and a home, neither of which can be written."""
    shutil.copytree(ROOT / "sam_repro", tmp_path / "code/sam_repro", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    folders = [tmp_path / "home", tmp_path / "code", *(p for p in tmp_path.glob("code/**/") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield tmp_path
    for folder in folders:
        folder.chmod(0o755)


def test_kernels_are_compiled_where_code_and_home_are_read_only(read_only):
    """In a folder of one's own; not in one that somebody else has put there."""
    env = {"PATH": os.environ["PATH"], "HOME": str(read_only / "home"), "TMPDIR": str(read_only / "temporary")}
    env |= {"PYTHONPATH": str(read_only / "code"), "PYTHONDONTWRITEBYTECODE": "1"}
    modules = "sam_repro.data.loaders.memory_loader, sam_repro.data.images.jpeg"
    command = [*UNPRIVILEGED, sys.executable, "-c", f"import os, {modules}; print(os.environ['NUMBA_CACHE_DIR'])"]
    for _ in range(2):
        done = subprocess.run(command, cwd=read_only, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip()).parent
    assert folder.parent == read_only / "temporary" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    done = subprocess.run(command, cwd=read_only, env=env, text=True, capture_output=True)
    assert done.returncode == 0 and Path(done.stdout.strip()).parent != folder


def test_a_change_of_a_kernel_reaches_those_in_other_files_that_call_it(tmp_path):
    """numba's cache of a kernel knows the kernel's own file only, so after an upgrade old machine code would go on."""
    package = tmp_path / "sam_repro"
    shutil.copytree(ROOT / "sam_repro", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "data/called.py").write_text("from numba import njit\n@njit(cache=True)\ndef number():\n    return 1\n")
    (package / "data/calling.py").write_text(
        "from numba import njit\nfrom sam_repro.data.called import number\n"
        "@njit(cache=True)\ndef twice():\n    return 2 * number()\n"
    )
    program = "from sam_repro.data.calling import twice; n = twice(); print(n, len(twice.stats.cache_hits))"
    env = {k: v for k, v in ENV.items() if k != "NUMBA_CACHE_DIR"} | {"PYTHONPATH": str(tmp_path)}

    def answer(program: str) -> str:
        return subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, env=env, text=True).strip()

    assert [answer(program), answer(program)] == ["2 0", "2 1"]
    called = package / "data/called.py"
    called.write_text(called.read_text().replace("return 1", "return 4"))
    assert answer(f"import numba; {program}") == "8 0"  # also where numba is there before us


def test_what_a_run_leaves_has_the_mode_that_the_umask_says(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *SHORT]
    subprocess.run(command, cwd=tmp_path, env=ENV, check=True, umask=0o027, capture_output=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".pt", ".json", ".jsonl", ".md", ".yaml"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


@pytest.mark.skipif(os.geteuid() != 0, reason="unmounting needs root")
def test_without_shared_memory_a_run_is_done(tmp_path):
    inside = f"umount -l /dev/shm; exec {sys.executable} {ROOT}/train.py {' '.join(SHORT)}"
    command = ["unshare", "--mount", "bash", "-c", inside]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert only(tmp_path, "runs/tiny/ledger/*.json")
