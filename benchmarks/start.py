"""Seconds until the first step of `train.py`: of a first start, and of a second that finds everything compiled.

    python benchmarks/start.py --output results/benchmarks/<gpu>-start.json model=vit_b32 optim=gsam

Generated images (debug=profile), a batch of 512, two steps. Each start is a process of its own and a row of the file,
with the seconds of the whole process; `compiled` says whether an earlier start used the same TORCHINDUCTOR_CACHE_DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sam_repro.records import ledger


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of train.py")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--output", type=Path)
    return parser.parse_intermixed_args()


def start(overrides: list[str], cache: str) -> dict:
    """One start."""
    keys = ["debug=profile", "recipe.batch_size=512", "recipe.steps=2", "log.progress=lines", "log.wandb=disabled"]
    with tempfile.TemporaryDirectory() as folder:
        where = [f"log.runs_dir={folder}", f"log.ledger_dir={folder}/rows"]
        command, environ = [sys.executable, str(ROOT / "train.py")], os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        begun = time.perf_counter()
        done = subprocess.run([*command, *keys, *overrides, *where], env=environ, capture_output=True, text=True)
        whole = time.perf_counter() - begun
        rows = list(Path(folder, "rows").glob("*.json"))
        hardware = ledger.read_row(rows[0])["hardware"] if rows else ""
    said = done.stdout + done.stderr
    if not (first := re.search(r"the first step was done after (\d+) s", said)):
        raise SystemExit(f"exit code {done.returncode}:\n{said[-2000:]}")
    return {"kind": "start", "first_step_seconds": int(first[1]), "seconds": whole, "hardware": hardware}


def main() -> None:
    args, rows = arguments(), []
    result = {"overrides": args.overrides, **ledger.provenance(), "entries": rows}
    with tempfile.TemporaryDirectory() as cache:  # an empty one: the first start compiles
        for number in range(args.starts):
            rows.append({"compiled": number > 0} | start(args.overrides, cache))
            result["hardware"] = rows[-1]["hardware"]
            print(json.dumps(rows[-1]), flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
