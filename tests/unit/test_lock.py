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
    leave(tmp_path, host=module.socket.gethostname(), pid=2**22 + 1)
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
    with pytest.raises(ValueError, match="took .* over"):
        lock.check()
    lock.release()
    assert (tmp_path / "lock").exists()  # the other's
