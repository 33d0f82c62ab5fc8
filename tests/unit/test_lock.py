"""The lock of a run directory: who is refused, and whose lock is taken over."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sam_repro.records import lock as module
from sam_repro.records.lock import Held, RunLock, is_held


def leave(folder: Path, **fields: object) -> Path:
    """A lock that somebody left."""
    path = folder / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "t", "job": None, "restart": "0"} | fields))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH", 2.5)


def test_held_and_released(tmp_path):
    lock = RunLock(tmp_path)
    assert is_held(tmp_path)
    with pytest.raises(Held, match=rf"another process is at work in \S+ \(process {os.getpid()} on [^{{}}]+\); if"):
        RunLock(tmp_path)
    lock.release()
    assert not is_held(tmp_path) and not list(tmp_path.iterdir())


def test_a_dead_process_of_this_host_is_no_holder(tmp_path):
    code = "import os\nfrom pathlib import Path\n"
    code += f"from sam_repro.records.lock import RunLock\nRunLock(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code + "\nos._exit(0)"], check=True)
    assert (tmp_path / "lock").exists() and not is_held(tmp_path)
    RunLock(tmp_path).release()


def test_another_machine_is_watched_for_signs_of_life(tmp_path, quick, capsys):
    """Whatever its clock says: what counts is whether the file is touched."""
    path = leave(tmp_path)
    os.utime(path, (time.time() + 9999,) * 2)
    RunLock(tmp_path).release()
    assert "watching" in capsys.readouterr().err

    path, stop = leave(tmp_path), threading.Event()

    def beat():
        while not stop.wait(0.3):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Held):
            RunLock(tmp_path)
    finally:
        stop.set()
        thread.join()


def test_an_earlier_start_of_the_same_slurm_job_is_dead(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave(tmp_path, job="7", restart="0")
    monkeypatch.setattr(module, "watch", lambda *_: pytest.fail("nothing to wait for"))
    RunLock(tmp_path).release()


def test_a_torn_lock_is_watched_too(tmp_path, quick):
    (tmp_path / "lock").write_text('{"host": "else')
    RunLock(tmp_path).release()


def test_of_many_that_take_over_one_wins(tmp_path):
    """Eight processes meet an abandoned lock at the same moment."""
    leave(tmp_path, pid=2**22 + 1, place=module.place(), born="1")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom sam_repro.records.lock import RunLock, Held\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try:\n    RunLock(Path(sys.argv[1])); print('mine', flush=True); time.sleep(1.5)\n"
        "except Held: print('refused')"
    )
    at = str(time.time() + 2)
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), at], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    assert sorted(p.communicate(timeout=60)[0].strip() for p in racers) == ["mine"] + ["refused"] * 7


# A process in a container of its own: number 1, or 2 under a shell, whatever the others are.
HOLDER = """
import os, sys, time
from pathlib import Path
from sam_repro.records import lock
lock.BEAT, lock.WATCH = 0.3, 2.5
try:
    held = lock.RunLock(Path(sys.argv[1]))
    print("mine", os.getpid(), flush=True)
    if sys.argv[2] == "stays": time.sleep(60)
    os._exit(9)  # as if killed: the lock stays
except lock.Held as error:
    print("refused", error)
"""
CONTAINER = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
contained = pytest.mark.skipif(
    subprocess.run([*CONTAINER, "true"], capture_output=True).returncode != 0, reason="new namespaces need root"
)


def in_container(folder: Path, how: str) -> subprocess.Popen[str]:
    command = [*CONTAINER, sys.executable, "-c", HOLDER, str(folder), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contained
def test_process_1_of_a_container_that_was_killed_and_restarted_goes_on(tmp_path):
    for _ in range(2):
        assert in_container(tmp_path, "goes").communicate(timeout=60)[0].split() == ["mine", "1"]


@contained
def test_two_containers_with_one_host_name_do_not_take_each_others_lock(tmp_path):
    first = in_container(tmp_path, "stays")
    try:
        assert first.stdout is not None and first.stdout.readline().split() == ["mine", "1"]
        assert in_container(tmp_path, "goes").communicate(timeout=60)[0].startswith("refused another process")
        assert is_held(tmp_path)
    finally:
        first.kill()


def test_a_number_that_was_given_again_is_no_holder(tmp_path):
    """The process lives, but was born at another moment."""
    leave(tmp_path, pid=os.getpid(), place=module.place(), born="1")
    assert not is_held(tmp_path)
    RunLock(tmp_path).release()
    leave(tmp_path, pid=os.getpid(), place=module.place(), born=module.birth(os.getpid()))
    with pytest.raises(Held):
        RunLock(tmp_path)


def test_without_proc_the_lock_of_a_live_process_is_watched(tmp_path, quick, monkeypatch, capsys):
    """As on macOS, where nobody can be seen."""
    monkeypatch.setattr(module, "place", lambda: None)
    monkeypatch.setattr(module, "BEAT", 0.3)
    lock = RunLock(tmp_path)
    with pytest.raises(Held):
        RunLock(tmp_path)
    assert "watching" in capsys.readouterr().err
    lock.release()


def test_what_killed_starts_left_is_swept(tmp_path):
    for name in ("lock.0123", "lock.taken.4567"):
        (tmp_path / name).write_text("{}")
    RunLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_away_is_no_other_holder(tmp_path, monkeypatch):
    lock = RunLock(tmp_path)
    with monkeypatch.context() as away:
        away.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))
        lock.check()
    lock.check()
    (tmp_path / "lock").unlink()
    with pytest.raises(ValueError, match="was removed while"):
        lock.check()
    lock.release()


def test_who_lost_the_run_notices(tmp_path):
    lock = RunLock(tmp_path)
    leave(tmp_path)
    with pytest.raises(ValueError, match="took over .* did not run"):
        lock.check()
    lock.release()
    assert (tmp_path / "lock").exists()  # the other's
