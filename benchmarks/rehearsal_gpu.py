"""The rehearsal's part that needs a GPU: the README's command on data of ImageNet's shape.

    python benchmarks/rehearsal_gpu.py --images data/photographs --budget 500 --output <gpu>-rehearsal.json
    python benchmarks/rehearsal_gpu.py --images data/photographs --toy --work toy --output toy.json   # a CPU, a minute

--images: any folder of JPEGs, of which 1,000 are used (those of Imagenette at 224 px, 100 per class, are 11 MB); they
are enlarged to 500 px and at least 43 kB. A stage that is done is not done again: the same command goes on with the
next one, as far as --budget seconds allow. The result is stored after every stage, in --work and in --output.
Everything else that it makes is below --work (default: runs/rehearsal). It needs neither FFCV nor a network.

make            train.beton and val.beton; what the disk or the time cannot hold points at what is stored
resident_b32    `debug=profile`: the same steps on images that are on the GPU
b32             `python train.py model=vit_b32 optim=gsam data.root=...` as typed, SIGUSR2 after 300 steps
restart         the same command goes on; SIGUSR2 and SIGKILL in mid-epoch; every sample is compared with what was due
resident_b16, b16   the same with ViT-B/16, 100 steps
end             four steps, then the real end of a run: 50,000 images counted, sharpness, weights, the ledger's row
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sam_repro.records import ledger
from sam_repro.records.log import read_log

TOY = ["model.tiny=true", "data.image_size=64", "data.eval_resize=64", "recipe.batch_size=32", "optim.m=8"]
TOY += ["train.threads=1", "train.log_every=2", "train.save_every_steps=10"]
TOY += ["sharpness.images=0", "data.train_fraction=0.9"]
Result = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "rehearsal", help="holds data and runs")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds of this call")
    parser.add_argument("--make-seconds", type=float, default=120.0, help="of them for storing training images")
    parser.add_argument("--bytes", type=int, default=43_000, help="of an image, at least")
    parser.add_argument("--gpu", default="h200", help="whose stored speeds `estimate` takes")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--toy", action="store_true", help="toy models and 8,000 images: is this script sound?")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


# ---- one run of train.py, watched from outside ----------------------------------------------------------------------


class Run:
    """`train.py` with some overrides, as a process; its memory is sampled while it lives."""

    def __init__(self, work: Path, overrides: list[str], *, watched: Path | None = None) -> None:
        self.began, self.log = time.perf_counter(), work / f"output-{time.time_ns()}.txt"
        program = [str(ROOT / "train.py")] if watched is None else [__file__, "--watched", str(watched)]
        self.command = ["train.py", *overrides]
        with open(self.log, "w") as out:
            self.process = subprocess.Popen([sys.executable, *program, *overrides], cwd=ROOT, stdout=out, stderr=out)
        self.peaks = {"host_gb": 0.0, "host_private_gb": 0.0, "gpu_gb": 0.0}
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while self.process.poll() is None:
            try:
                memory = psutil.Process(self.process.pid).memory_full_info()
                found = {"host_gb": memory.rss / 1e9, "host_private_gb": memory.uss / 1e9, "gpu_gb": gpu_gb()}
                self.peaks = {key: max(self.peaks[key], found[key]) for key in found}
            except psutil.Error:
                return
            time.sleep(1)

    def text(self) -> str:
        """What it said so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, reached: Callable[[], bool], deadline: float) -> bool:
        """Until `reached`; False where the process ended or the deadline passed first."""
        while self.process.poll() is None and time.perf_counter() < deadline:
            if reached():
                return True
            time.sleep(0.1)
        return reached()

    def end(self, number: signal.Signals | None) -> tuple[int, float]:
        """(exit code, seconds it took to leave) after a signal, or by itself with None."""
        began = time.perf_counter()
        if number is not None and self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(), time.perf_counter() - began

    def facts(self) -> Result:
        """What can be read from its output: first step, memory, backend; and its memory as sampled."""
        text = self.text()
        first = re.search(r"the first step was done after (\d+) s", text)
        memory = re.search(r"passes of \d+ images.*", text)
        loader = re.search(r"\w+ loader: .*", text)
        resumed = re.search(r"resumed at step (\d+)", text)
        return {
            "command": " ".join(self.command),
            "first_step_s": int(first[1]) if first else None,
            "memory": memory[0] if memory else None,
            "loader": loader[0] if loader else None,
            "resumed_at": int(resumed[1]) if resumed else 0,
            "peaks": self.peaks,
            "seconds": time.perf_counter() - self.began,
            "said": text.splitlines()[:16],
            "last_lines": text.splitlines()[-3:],
        }


def gpu_gb() -> float:
    """GB in use on the first GPU, all processes together; 0 where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return 0.0
    return float(said[0]) * 2**20 / 1e9 if said else 0.0


def losses(folder: Path) -> list[Result]:
    """The training lines of the only run below a folder."""
    found = list(folder.glob("*/log.jsonl"))
    return [record for record in read_log(found[0]) if "loss" in record] if found else []


def reached(folder: Path, step: int) -> Callable[[], bool]:
    """Whether the log of the run below `folder` has come to a step."""
    return lambda: bool(lines := losses(folder)) and lines[-1]["step"] >= step


# ---- stages ---------------------------------------------------------------------------------------------------------


class Stages:
    """The stages, each a function of the seconds that it may take; its result, or None where it was not completed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.data = args, args.work, args.work / "data"
        self.data.mkdir(parents=True, exist_ok=True)

    def overrides(self, model: str, runs: str, *more: str) -> list[str]:
        """The README's command, and where its files go."""
        folder = self.work / runs
        typed = [f"model={model}", "optim=gsam", f"data.root={self.data}"]
        where = [
            f"log.runs_dir={folder}",
            f"log.ledger_dir={folder}/ledger",
            "log.wandb=disabled",
            "log.progress=lines",
        ]
        return [*typed, *where, *(TOY if self.args.toy else []), *more]

    def make(self, seconds: float) -> Result:
        """The data."""
        from rehearsal_data import WHAT, class_counts, make_beton, photographs

        toy = self.args.toy
        photos = photographs(self.args.images, 3_000 if toy else self.args.bytes, 96 if toy else 500)
        limit = {"seconds": self.args.make_seconds, "reserve": 8e9 if not toy else 1e8}
        val = make_beton(self.data / "val.beton", photos, np.full(1000, 1 if toy else 50), seconds=15, reserve=0)
        train = make_beton(self.data / "train.beton", photos, class_counts(8000 if toy else 1_281_167), **limit)
        return {"what": WHAT, "photographs": len(photos), "train": train, "val": val}

    def resident(self, model: str, seconds: float) -> Result | None:
        """Images per second of the same step on images that are on the GPU."""
        steps = 10 if self.args.toy else 40 if model == "vit_b32" else 20
        profile = ["debug=profile", f"recipe.steps={steps}", f"model={model}", "optim=gsam"]
        folder = self.work / f"resident_{model}"
        where = [f"log.runs_dir={folder}", f"log.ledger_dir={folder}/ledger"]
        run = Run(self.work, [*profile, *where, *([*TOY, "data.train_fraction=1"] if self.args.toy else [])])
        run.wait_for(lambda: False, time.perf_counter() + seconds)
        code, _ = run.end(signal.SIGKILL if run.process.poll() is None else None)
        lines = losses(folder)[1:]
        if not lines:
            return None
        return {"exit_code": code, "images_per_second": rate_of(lines), "steps": lines[-1]["step"]} | run.facts()

    def typed(self, model: str, seconds: float) -> Result | None:
        """The command as typed, until SIGUSR2."""
        goal, runs = (20 if self.args.toy else 300 if model == "vit_b32" else 100), model
        run = Run(self.work, self.overrides(model, runs))
        whole = run.wait_for(reached(self.work / runs, goal), time.perf_counter() + seconds)
        code, left = run.end(signal.SIGUSR2)
        lines = losses(self.work / runs)
        if len(lines) < 2:
            print(run.text()[-3000:], flush=True)
            return None
        found = {"exit_code": code, "seconds_to_leave": left, "reached_the_goal": whole, "steps": lines[-1]["step"]}
        found |= {"images_per_second": rate_of(lines[1:]), "lines": lines, "estimate": self.estimate(model)}
        return found | self.sizes(self.work / runs) | run.facts()

    def estimate(self, model: str) -> Result | None:
        """The rate that `sam-repro estimate` takes for the same run."""
        from sam_repro.config.compose import compose_config
        from sam_repro.paper.measured_speeds import load_rates, step_rate

        rate = step_rate(compose_config([f"model={model}", "optim=gsam"]), load_rates(self.args.gpu))
        return None if rate is None else {"images_per_second": rate.images_per_second, "how": rate.how}

    def sizes(self, folder: Path) -> Result:
        """Bytes of the files that a run leaves."""
        files = [p for run in folder.glob("*-s0-*") for p in run.iterdir() if p.is_file()]
        return {"files": {p.name: p.stat().st_size for p in sorted(files)}}

    def restart(self, seconds: float) -> Result | None:
        """SIGUSR2, SIGKILL and going on, in the run of `b32`; each step's samples are noted and compared."""
        folder, watched = self.work / "vit_b32", self.work / "watched.jsonl"
        if not losses(folder):
            print("restart: goes on from the run of b32, which is not there", flush=True)
            return None
        watched.unlink(missing_ok=True)
        start, deadline = losses(folder)[-1]["step"], time.perf_counter() + seconds
        overrides = self.overrides("vit_b32", "vit_b32", "train.log_every=1", "train.save_every_steps=10")
        parts, before = [], []
        for goal, number in ((12, signal.SIGUSR2), (27, signal.SIGKILL), (40, signal.SIGUSR2)):
            run = Run(self.work, overrides, watched=watched)
            run.wait_for(reached(folder, start + goal), deadline)
            code, left = run.end(number)
            lines = losses(folder)
            part = {
                "signal": number.name,
                "exit_code": code,
                "seconds_to_leave": left,
                "log_reached": lines[-1]["step"],
            }
            parts.append(part | run.facts())
            if number == signal.SIGKILL:
                before = lines
        again = {r["step"]: r["loss"] for r in losses(folder)}
        redone = [r for r in before if r["step"] > parts[-1]["resumed_at"] and r["step"] in again]
        steps = [r["step"] for r in losses(folder) if r["step"] > parts[0]["resumed_at"]]
        found = {"parts": parts, "losses": {str(s): again[s] for s in steps}, "samples": self.due(watched, overrides)}
        found["steps_made_twice"] = [{"step": r["step"], "loss": r["loss"], "again": again[r["step"]]} for r in redone]
        once = list(range(parts[0]["resumed_at"] + 1, parts[0]["resumed_at"] + 1 + len(steps)))
        return found | {"each_step_once": steps == once}

    def due(self, watched: Path, overrides: list[str]) -> Result:
        """Compare what each step saw with what was due, rendered on the processor from the epoch's order."""
        import torch

        from sam_repro.config.compose import compose_config
        from sam_repro.data.loaders.batches import start_batch
        from sam_repro.data.loaders.build import build_loader

        cfg = compose_config([*overrides, "data.backend=torch"])
        options = {"batch_size": cfg.recipe.batch_size, "seed": cfg.seed, "device": torch.device("cpu")}
        loader: Any = build_loader(cfg.data, cfg.augment, split="train", training=True, **options)
        seen = [json.loads(line) for line in watched.read_text().splitlines()]
        wrong, known, size = [], {}, cfg.data.image_size
        for record in seen:
            step = record["step"]
            if step not in known:
                epoch, place = divmod(step, len(loader))
                indices = loader.plan.batches(epoch, 0)[place]
                out = np.empty((len(indices), size, size, 3), np.uint8)
                for task in start_batch(loader.pool, loader.fill, indices, out, epoch):
                    task.result()
                sums = out.reshape(len(out), -1).sum(1, dtype=np.int64)
                known[step] = digest(loader.source.labels[indices]), digest(sums)
            if known[step] != (record["labels"], record["pixels"]):
                wrong.append(step)
        epoch = len(loader)
        loader.close()
        steps = [record["step"] for record in seen]
        return {
            "compared": "SHA-256 of the batch's labels and of every image's sum of pixels",
            "steps_seen": len(seen),
            "first": min(steps),
            "last": max(steps),
            "steps_per_epoch": epoch,
            "wrong": wrong,
        }

    def end(self, seconds: float) -> Result | None:
        """A short run to its end."""
        more = ["recipe.steps=4", "recipe.warmup_steps=2", "train.log_every=1"]
        run = Run(self.work, self.overrides("vit_b32", "end", *more))
        run.wait_for(lambda: False, time.perf_counter() + seconds)
        whole = run.process.poll() is not None
        code, _ = run.end(None if whole else signal.SIGUSR2)
        rows = list((self.work / "end" / "ledger").glob("*.json"))
        evals = ledger.read_row(rows[0])["evals"] if rows else None
        found = {"exit_code": code, "evals": evals, "output": run.text().splitlines()[-12:]}
        return found | self.sizes(self.work / "end") | run.facts()


def rate_of(lines: list[Result]) -> float:
    """Images per second: the median over lines of the log."""
    return median(line["images_per_second"] for line in lines)


def digest(numbers: np.ndarray) -> str:
    """SHA-256 of int64 numbers."""
    return hashlib.sha256(np.ascontiguousarray(numbers, np.int64).tobytes()).hexdigest()


STAGES: dict[str, tuple[Callable[[Stages, float], Result | None], float]] = {  # and the seconds it needs at least
    "make": (Stages.make, 60),
    "resident_b32": (lambda s, t: s.resident("vit_b32", t), 60),
    "b32": (lambda s, t: s.typed("vit_b32", t), 100),
    "restart": (Stages.restart, 150),
    "resident_b16": (lambda s, t: s.resident("vit_b16", t), 90),
    "b16": (lambda s, t: s.typed("vit_b16", t), 150),
    "end": (Stages.end, 60),
}


# ---- the watched process: notes what each step sees -----------------------------------------------------------------


def watched(log: Path, overrides: list[str]) -> None:
    """train.py, but each step's labels and sums of pixels are written to `log` first."""
    import torch

    from sam_repro.cli.train import cli
    from sam_repro.training import fit

    augment = fit.augment
    file = open(log, "ab", buffering=0)  # noqa: SIM115 (as long as the process)

    def noting(cfg, images, labels, *, step, rank):
        sums = images.sum((1, 2, 3), dtype=torch.int64)
        line = {"step": step, "labels": digest(labels.cpu().numpy()), "pixels": digest(sums.cpu().numpy())}
        file.write(json.dumps(line).encode() + b"\n")
        return augment(cfg, images, labels, step=step, rank=rank)

    fit.augment = noting
    sys.argv = ["train.py", *overrides]
    cli()


def main() -> None:
    if sys.argv[1:2] == ["--watched"]:
        watched(Path(sys.argv[2]), sys.argv[3:])
        return
    args, began = arguments(), time.perf_counter()
    args.work = args.work.absolute()
    stages = Stages(args)
    own = args.work / "result.json"
    known = own if own.exists() else args.output  # on another machine: without the data and the runs
    result: Result = {"kind": "rehearsal-gpu", "stages": {}}
    if known is not None and known.exists():
        result = json.loads(known.read_text())
    missing = [name for name in args.stages if not result["stages"].get(name)]
    again = set() if own.exists() else {"make"} if missing else set()
    again |= {"b32"} if again and "restart" in missing else set()
    result |= {"hardware": hardware(), "date": time.strftime("%Y-%m-%d"), **ledger.provenance()}
    for name in args.stages:
        left = args.budget - (time.perf_counter() - began)
        need = 5 if args.toy else STAGES[name][1]
        if name not in missing and name not in again:
            print(f"{name}: done before", flush=True)
            continue
        if left < need:
            print(f"{name}: {left:.0f} s are left of --budget, it needs {need}; the same command goes on", flush=True)
            break
        print(f"{name}: {left:.0f} s are left", flush=True)
        found = STAGES[name][0](stages, left - 15)
        if found is None:
            print(f"{name}: not completed", flush=True)
            continue
        result["stages"][name] = found | {"commit": result["commit"]}
        result |= {"gpu": args.gpu, "entries": entries(result["stages"])}
        print(
            json.dumps({name: {k: v for k, v in found.items() if k not in ("lines", "losses")}}, indent=1), flush=True
        )
        for path in filter(None, (own, args.output)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")


def entries(stages: dict[str, Result]) -> list[Result]:
    """What `sam-repro estimate` reads: the speeds of the step on resident images."""
    alike = {"kind": "step", "method": "gsam", "m": 64, "batch": 4096, "dtype": "bf16", "image_size": 224}
    found = ((f"vit_{short}", stages.get(f"resident_{short}")) for short in ("b32", "b16"))
    return [alike | {"model": m, "images_per_second": s["images_per_second"]} for m, s in found if s]


def hardware() -> str:
    """The GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {ledger.cpu_name()}"


if __name__ == "__main__":
    main()
