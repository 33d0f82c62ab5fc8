"""Data sets and their batches. It imports nothing heavy: `sam-repro write` and every `--help` do without torch."""

import os
import stat
import tempfile
from pathlib import Path


def place_for_kernels(code: Path, environ: dict[str, str]) -> None:
    """Name a folder of the temporary ones for numba's cache, where it could write neither beside the code nor at home.

    As in a container's image or another user's site-packages. Without any place numba refuses to import a kernel.
    """
    home = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/nonexistent")) / ".cache")
    existing = next(folder for folder in (home, *home.absolute().parents) if folder.exists())
    if environ.get("NUMBA_CACHE_DIR") or os.access(code, os.W_OK) or os.access(existing, os.W_OK):
        return
    folder = Path(tempfile.gettempdir()) / f"sam_repro_numba_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Compiled code is loaded from it: not from a folder into which somebody else can write.
    found = folder.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    environ["NUMBA_CACHE_DIR"] = str(folder) if ours else tempfile.mkdtemp(prefix="sam_repro_numba_")


place_for_kernels(Path(__file__).parent, os.environ)  # pyright: ignore[reportArgumentType]
