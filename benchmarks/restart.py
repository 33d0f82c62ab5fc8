"""A real run on all GPUs of a host, a rank killed (`kill -9`) and brought back by torchrun; and the same undisturbed.

    python benchmarks/restart.py --gpus 4 --kill-at 1000 --output results/benchmarks/<gpu>-restart.json \\
        model=vit_s32 optim=gsam_constant data=imagenette data.root=data/imagenette160 ...

The run saves every `--save-every` steps. Once its log has reached `--kill-at` the last rank gets SIGKILL; torchrun
(--max-restarts) starts all ranks again. Recorded: where it was killed and where it went on, the seconds from the kill
to the first step after it, whether the log has each step once, and how far its final weights and test accuracy are from
the undisturbed run's (GPU sums depend on order: equal to the bit only where the kernels are deterministic).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sam_repro.records import ledger
from sam_repro.records.log import read_log


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="of train.py")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()), help="processes")
    parser.add_argument("--kill-at", type=int, required=True, help="the step in the log after which a rank dies")
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--output", type=Path)
    return parser.parse_intermixed_args()


def train(folder: Path, args: argparse.Namespace, kill_at: int | None) -> dict[str, Any]:
    """One run under torchrun; with `kill_at` its last rank dies there, once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.gpus}"]
    command += [
        "--max-restarts=2",
        str(ROOT / "train.py"),
        *args.overrides,
        f"train.save_every_steps={args.save_every}",
    ]
    command += [f"log.runs_dir={folder}", f"log.ledger_dir={folder}/ledger", "log.wandb=disabled", "log.progress=lines"]
    begun = time.perf_counter()
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[tuple[float, str]] = []
    reader = threading.Thread(target=lambda: said.extend((time.perf_counter(), line) for line in run.stdout or ()))
    reader.start()
    killed: dict[str, Any] = {}
    while kill_at is not None and not killed and run.poll() is None:
        time.sleep(0.05)
        logs = list(folder.glob("*/log.jsonl"))
        step = max((r["step"] for r in read_log(logs[0])), default=0) if logs else 0
        if step >= kill_at:
            ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if "RANK" in p.environ()]
            last = max(ranks, key=lambda p: int(p.environ()["RANK"]))
            killed = {"log_reached": step, "rank": int(last.environ()["RANK"]), "at": time.perf_counter()}
            os.kill(last.pid, signal.SIGKILL)
    code = run.wait()
    reader.join()
    (row_file,) = (folder / "ledger").glob("*.json") if code == 0 else (None,)
    if row_file is None:
        raise SystemExit(f"the run ended with exit code {code}:\n" + "".join(line for _, line in said[-20:]))
    row = ledger.read_row(row_file)
    logged = [r["step"] for r in read_log(folder / row["run_id"] / "log.jsonl") if "loss" in r]
    found = {"exit_code": code, "seconds": time.perf_counter() - begun, "evals": row["evals"], "steps": row["steps"]}
    found |= {"hardware": row["hardware"], "world": row["world"], "each_step_once": logged == sorted(set(logged))}
    if killed:
        after = [(at, line) for at, line in said if at > killed["at"]]
        resumed = [int(m[1]) for _, line in after if (m := re.search(r"resumed at step (\d+)", line))]
        first = [at - killed["at"] for at, line in after if "the first step was done" in line]
        found["killed"] = {"rank": killed["rank"], "log_reached": killed["log_reached"]}
        found |= {"resumed_at": resumed[:1], "seconds_to_first_step": first[:1]}
    return found | {"weights": load_file(folder / row["run_id"] / "model.safetensors")}


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        killed = train(Path(folder) / "killed", args, args.kill_at)
        quiet = train(Path(folder) / "quiet", args, None)
    pairs = [(w.double(), quiet["weights"][name].double()) for name, w in killed.pop("weights").items()]
    largest = max((a - b).abs().max().item() for a, b in pairs if a.is_floating_point())
    del quiet["weights"]
    result = {"overrides": args.overrides, "gpus": args.gpus, "killed": killed, "undisturbed": quiet}
    result |= {"largest_difference_of_a_weight": largest, "hardware": killed["hardware"], **ledger.provenance()}
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
