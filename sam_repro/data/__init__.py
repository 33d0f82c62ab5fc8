"""Data sets and their batches. It imports nothing heavy: `sam-repro write` and every `--help` do without torch."""

import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path


def digest_of_kernels(code: Path) -> str:
    """Of the modules below `code` that numba compiles. numba itself stamps a kernel with its own file only."""
    sources = [content for path in sorted(code.rglob("*.py")) if b"njit" in (content := path.read_bytes())]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:12]


def place_for_kernels(code: Path, environ: dict[str, str]) -> Path:
    """The folder of numba's cache: a new one for every version of the kernels, so that no older machine code runs.

    It is in the folder that the user names, next to the code, at home, or among the temporary ones: the first that can
    be written. A container's image, or another user's site-packages, has neither of the first three. Without any place
    numba refuses to import a kernel.
    """
    name = f"kernels_{digest_of_kernels(code)}"
    given = Path(environ.get("NUMBA_CACHE_DIR") or code / "__pycache__")
    if given.name == name:  # this process's parent has named it
        return given
    if environ.get("NUMBA_CACHE_DIR") or os.access(code, os.W_OK):
        return given / name
    home = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/nonexistent")) / ".cache")
    existing = next(folder for folder in (home, *home.absolute().parents) if folder.exists())
    if os.access(existing, os.W_OK):
        return home / "sam_repro" / name
    folder = Path(tempfile.gettempdir()) / f"sam_repro_numba_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Compiled code is loaded from it: not from a folder into which somebody else can write.
    status = folder.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return (folder if ours else Path(tempfile.mkdtemp(prefix="sam_repro_numba_"))) / name


os.environ["NUMBA_CACHE_DIR"] = str(place_for_kernels(Path(__file__).parent, dict(os.environ)))
if "numba" in sys.modules:  # it has read the environment already
    sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]
