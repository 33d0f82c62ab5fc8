"""Why a run failed: one line in its folder, gone once it goes on; and what that means for the exit code."""

from __future__ import annotations

import contextlib
import errno
import time
from pathlib import Path

from sam_repro.records.files import write_atomic
from sam_repro.records.lock import RunLock

NAME = "error.txt"
# The file system refuses: full, over quota, read-only, forbidden, broken.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EFBIG)


def note(run_dir: Path, sentence: str) -> None:
    """Leave the sentence, with the time; where that cannot be written (a full disk, say), nothing."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with contextlib.suppress(OSError):
        write_atomic(run_dir / NAME, f"{stamp} {' '.join(sentence.split())}\n")


def read(run_dir: Path) -> str:
    """The line, or the empty string where the run did not fail."""
    try:
        return (run_dir / NAME).read_text(errors="replace").strip()
    except OSError:
        return ""


def clear(run_dir: Path) -> None:
    """The run goes on."""
    (run_dir / NAME).unlink(missing_ok=True)


def give_up(run_dir: Path, lock: RunLock, sentence: str) -> None:
    """Leave the sentence and the run, for a process that ends at once."""
    note(run_dir, sentence)
    lock.release()


def sentence_of(error: Exception) -> str:
    """An exception in one line; with its kind, unless its message is written for people."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if hasattr(error, "code") or isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def is_about_files(error: Exception) -> bool:
    """Whether the file system refused."""
    return isinstance(error, OSError) and error.errno in REFUSALS


def exit_code(error: Exception) -> int:
    """2 for what somebody must change, 75 for what another try may get past, 1 for a bug."""
    return getattr(error, "code", 2 if is_about_files(error) else 1)
