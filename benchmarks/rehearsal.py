"""Dress rehearsal at ImageNet's counts on a machine without a GPU: what a long run meets, one command per step.

    python benchmarks/rehearsal.py make --images photographs --work /data/rehearsal   # 1.33 million files, twice
    python benchmarks/rehearsal.py write killed full open evaluate folders log checkpoint --work /data/rehearsal \\
        --output results/benchmarks/<machine>-rehearsal.json

    make        class folders, tar of tars and flat validation images, of small files (--side pixels): about 8 GB
    write       `sam-repro write imagenet` from the three: seconds, peak memory, images/s; then again, up to date
    killed      SIGKILL in the middle; the same command goes on, and the file is the undisturbed one
    full        the disk is full in the middle; the same command goes on (needs root, for a tmpfs of a limited size)
    open        open, first batch, order of an epoch, start in its middle: seconds and memory of 1, 2 and 8 processes
    evaluate    a toy model counts the 50,000 images: exact, on one process and on two
    folders     FolderSource on the class folders
    log         log.jsonl of a whole run (a line per step), resumed
    checkpoint  ViT-B/32's weights and AdamW's state: save and load

The part that needs a GPU: rehearsal_gpu.py. --count makes a smaller set. Each step adds to the JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rehearsal_data import TRAIN, VAL, WHAT, class_counts, make_flat, make_folders, make_tars, photographs

from sam_repro.data.write.partial import ENTRY
from sam_repro.records import ledger

Result = dict[str, Any]
RANKS = (1, 2, 8)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=list(STEPS))
    parser.add_argument("--images", type=Path, help="make: folder of JPEGs")
    parser.add_argument("--work", type=Path, required=True, help="holds everything that is made")
    parser.add_argument("--count", type=int, default=TRAIN, help="training images")
    parser.add_argument("--val", type=int, default=VAL, help="validation images, a multiple of 1,000")
    parser.add_argument("--side", type=int, default=64, help="make: pixels of the longer side of an image")
    parser.add_argument("--bytes", type=int, default=0, help="make: of an image, at least")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


# ---- processes ------------------------------------------------------------------------------------------------------


def measured(command: list[str], *, ok: tuple[int, ...] = (0,), **options: Any) -> Result:
    """Run a command: seconds, peak resident memory in MB, exit code, what it said."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = [line.split("\r")[-1] for line in said.splitlines()]
    found = {"seconds": round(time.perf_counter() - began, 2), "peak_mb": round(usage.ru_maxrss / 1024, 1)}
    if process.returncode not in ok:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said[-2000:]}")
    return found | {"exit_code": process.returncode, "said": [line for line in lines if "image/s" not in line][-8:]}


def writer(src: Path, dst: Path) -> list[str]:
    """The command of the README."""
    program = "import sys; from sam_repro.cli.main import main; sys.exit(main())"
    return [sys.executable, "-c", program, "write", "imagenet", "--src", str(src), "--dst", str(dst)]


def child(step: str, *words: object) -> list[str]:
    """This file as a process that does one thing and prints JSON."""
    return [sys.executable, __file__, "--child", step, *map(str, words)]


# ---- steps ----------------------------------------------------------------------------------------------------------


def make(args: argparse.Namespace) -> Result:
    """The trees and archives."""
    photos = photographs(args.images, args.bytes, args.side)
    counts, found = class_counts(args.count), {}
    makers: dict[str, Callable[[Path], None]] = {
        "folders": lambda root: make_folders(root, photos, counts, args.val),
        "tars": lambda root: make_tars(root, photos, counts, args.val),
        "flat": lambda root: make_flat(root, photos, args.val),
    }
    for name, maker in makers.items():
        shutil.rmtree(args.work / name, ignore_errors=True)
        began = time.perf_counter()
        maker(args.work / name)
        found[name] = {"seconds": round(time.perf_counter() - began, 2)}
    size = sum(len(data) for data, _, _ in photos) / len(photos)
    return found | {"what": WHAT, "train": args.count, "val": args.val, "bytes_per_image": round(size)}


def write(args: argparse.Namespace) -> Result:
    """`sam-repro write imagenet` from each layout, then again."""
    found = {}
    for name in ("folders", "tars", "flat"):
        dst = args.work / f"from_{name}"
        shutil.rmtree(dst, ignore_errors=True)
        images = args.val + (args.count if name != "flat" else 0)
        first = measured(writer(args.work / name, dst))
        first["images_per_second"] = round(images / first["seconds"], 1)
        sizes = {p.name: p.stat().st_size for p in sorted(dst.iterdir())}
        again = measured(writer(args.work / name, dst))
        found[name] = {"images": images, "first": first, "again": again, "files": sizes}
    pairs = [args.work / f"from_{name}" / "train.beton" for name in ("folders", "tars")]
    return found | {"folders_and_tars_equal": subprocess.run(["cmp", *pairs]).returncode == 0}


def killed(args: argparse.Namespace) -> Result:
    """SIGKILL in the middle of writing from the tars, then the same command."""
    dst = args.work / "killed"
    shutil.rmtree(dst, ignore_errors=True)
    command, journal = writer(args.work / "tars", dst), dst / ".train.beton.journal"
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (
        journal.exists() and journal.stat().st_size > ENTRY.itemsize * args.count / 3
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    code, seconds = process.wait(), time.perf_counter() - began
    again = measured(command)
    whole = subprocess.run(["cmp", dst / "train.beton", args.work / "from_tars" / "train.beton"]).returncode == 0
    shutil.rmtree(dst)
    return {"exit_code": code, "killed_after_s": round(seconds, 2), "again": again, "equal_to_undisturbed": whole}


def full(args: argparse.Namespace) -> Result:
    """A disk that somebody else fills in the middle; once there is room, the same command."""
    disk, need = args.work / "small_disk", (args.work / "from_tars" / "train.beton").stat().st_size
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={round(1.3 * need)}", "tmpfs", disk], check=True)
    try:
        dst, ballast = disk / "data", disk / "ballast"
        command, partial = writer(args.work / "tars", dst), dst / ".train.beton.partial"
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > need / 2):
            time.sleep(0.05)
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, round(0.6 * need))
        said = process.communicate()[0].splitlines()
        kept = partial.stat().st_size if partial.exists() else 0
        ballast.unlink()
        again = measured(command)
        whole = subprocess.run(["cmp", dst / "train.beton", args.work / "from_tars" / "train.beton"]).returncode == 0
        found = {"exit_code": process.returncode, "said": said[-1].split("\r")[-1], "bytes_kept": kept}
        return found | {"again": again, "equal_to_undisturbed": whole}
    finally:
        subprocess.run(["umount", disk], check=True)


def open_data(args: argparse.Namespace) -> Result:
    """Each rank's memory and seconds from opening to the first batch, in the middle of an epoch too."""
    found: Result = {}
    for source in ("from_tars", "folders"):
        for world in RANKS if source == "from_tars" else (1,):
            commands = [child("open", args.work / source, rank, world) for rank in range(world)]
            processes = [subprocess.Popen(c, cwd=ROOT, stdout=subprocess.PIPE, text=True) for c in commands]
            ranks = [json.loads(process.communicate()[0]) for process in processes]
            found[f"{source}, {world} processes"] = {k: max(rank[k] for rank in ranks) for k in ranks[0]}
    return found


def open_child(root: str, rank: str, world: str) -> Result:
    """One rank: what opening, the first batch and an epoch's order take."""
    import torch

    from sam_repro.config.compose import compose_config
    from sam_repro.data.loaders.build import build_loader

    cfg = compose_config(["model=vit_b32", "optim=gsam", f"data.root={root}", "data.workers=2"])
    options = {"seed": 0, "rank": int(rank), "world": int(world), "device": torch.device("cpu")}
    before, found, began = memory(), {}, time.process_time()

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        found[f"{name}_s"] = round(time.perf_counter() - began, 3)
        found[f"{name}_mb"] = round((memory() - before) / 1e6, 1)
        return result

    train: Any = timed(
        "open_train",
        lambda: build_loader(cfg.data, cfg.augment, split="train", training=True, batch_size=64, **options),
    )
    timed(
        "open_val", lambda: build_loader(cfg.data, cfg.augment, split="val", training=False, batch_size=64, **options)
    )
    batches = timed("first_batch", lambda: (it := train.epoch(0), next(it)))
    timed("order", lambda: train.plan.batches(0, 0))
    middle = timed("middle", lambda: (it := train.epoch(0, len(train) // 2), next(it)))
    found["cpu_s"] = round(time.process_time() - began, 2)
    for iterator, _ in (batches, middle):
        iterator.close()
    peak = psutil.Process().memory_info()
    found["private_peak_mb"] = round(max(found[k] for k in found if k.endswith("_mb")), 1)
    return found | {"rss_mb": round(peak.rss / 1e6, 1), "bytes_per_image": found["order_mb"] * 1e6 / train.samples}


def memory() -> int:
    """Bytes that only this process holds."""
    gc.collect()
    return psutil.Process().memory_full_info().uss


def evaluate(args: argparse.Namespace) -> Result:
    """Train a toy for a step and count every image, on one process and on two."""
    toy = ["model=vit_s32", "optim=gsam", "model.tiny=true", "data.image_size=64", "data.eval_resize=64"]
    toy += ["recipe.steps=1", "recipe.warmup_steps=0", "recipe.batch_size=64", "optim.m=8", "sharpness.images=0"]
    toy += ["data.train_fraction=1", f"data.root={args.work / 'from_tars'}", "log.wandb=disabled", "log.progress=lines"]
    found = {}
    for world in (1, 2):
        runs = args.work / "evaluate"
        shutil.rmtree(runs, ignore_errors=True)
        start = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        where = [f"log.runs_dir={runs}", f"log.ledger_dir={runs}/ledger", f"train.threads={max(1, 2 // world)}"]
        run = measured([sys.executable, *start, str(ROOT / "train.py"), *toy, *where])
        (row,) = (runs / "ledger").glob("*.json")
        found[f"{world} processes"] = run | {"evals": ledger.read_row(row)["evals"]}
        shutil.rmtree(runs)
    return found


def folders(args: argparse.Namespace) -> Result:
    """FolderSource on the class folders, in a process of its own."""
    return json.loads(measured(child("folders", args.work / "folders" / "train"))["said"][-1])


def folders_child(root: str) -> Result:
    """Seconds and memory of listing the files."""
    from sam_repro.data.datasets import FolderSource

    before, began = memory(), time.perf_counter()
    source = FolderSource(Path(root))
    seconds, held = time.perf_counter() - began, memory() - before
    found = {"files": len(source.files), "seconds": round(seconds, 2), "held_mb": round(held / 1e6, 1)}
    return found | {"bytes_per_image": round(held / len(source.files), 1)}


def log(args: argparse.Namespace) -> Result:
    """log.jsonl of a whole run, a line per step, as a resumed run opens it."""
    return json.loads(measured(child("log", args.work))["said"][-1])


def log_child(work: str) -> Result:
    """Write the log of 300 epochs, then start it again at its last step."""
    from sam_repro.config.compose import compose_config
    from sam_repro.training.run_log import RunLog, rates

    cfg = compose_config(["model=vit_b32", "optim=gsam", "log.progress=lines", "log.wandb=disabled"])
    folder, total = Path(work) / "log", 300 * TRAIN // 4096
    folder.mkdir(exist_ok=True)
    words = ("loss", "grad_norm", "grad_norm_robust", "surrogate_gap", "cosine", "lr", "rho")
    with open(folder / "log.jsonl", "w") as file:
        for step in range(1, total + 1):
            line = {"step": step, "epoch": step / 312, **{word: step / 7 for word in words}}
            file.write(json.dumps(line | rates(0.5, 1, total - step, 4096, step / 7200)) + "\n")
    began, before = time.perf_counter(), memory()
    again = RunLog(folder, cfg, run_id="rehearsal")
    again.start(total - 1, total)
    found = {"lines": total, "mb": round((folder / "log.jsonl").stat().st_size / 1e6, 1)}
    found |= {"start_s": round(time.perf_counter() - began, 2), "held_mb": round((memory() - before) / 1e6, 1)}
    again.close()
    shutil.rmtree(folder)
    return found


def checkpoint(args: argparse.Namespace) -> Result:
    """Save and load ViT-B/32's weights and both moments, in a process of its own."""
    return json.loads(measured(child("checkpoint", args.work))["said"][-1])


def checkpoint_child(work: str) -> Result:
    """Seconds and bytes of a checkpoint."""
    import torch

    from sam_repro.training.checkpoint import load_newest, save

    folder = Path(work) / "checkpoint"
    folder.mkdir(exist_ok=True)
    state = {name: torch.randn(88_224_232) for name in ("model", "m", "v")} | {"step": 1}
    began = time.perf_counter()
    path = save(folder, state, step=1, config_hash="0" * 8)
    saved = time.perf_counter()
    load_newest(folder, config_hash="0" * 8, device=torch.device("cpu"))
    found = {"save_s": round(saved - began, 2), "load_s": round(time.perf_counter() - saved, 2)}
    found["bytes"] = path.stat().st_size
    shutil.rmtree(folder)
    return found


CHILDREN: dict[str, Callable[..., Result]] = {
    "open": open_child,
    "folders": folders_child,
    "log": log_child,
    "checkpoint": checkpoint_child,
}
STEPS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "make": make,
    "write": write,
    "killed": killed,
    "full": full,
    "open": open_data,
    "evaluate": evaluate,
    "folders": folders,
    "log": log,
    "checkpoint": checkpoint,
}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
        return
    args = arguments()
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    own = args.output or args.work / "result.json"
    result: Result = json.loads(own.read_text()) if own.exists() else {"kind": "rehearsal", "steps": {}}
    result |= {"hardware": f"CPU {ledger.cpu_name()}", "date": time.strftime("%Y-%m-%d"), **ledger.provenance()}
    for step in args.steps:
        found = STEPS[step](args)
        result["steps"][step] = found | {"commit": result["commit"]}
        print(json.dumps({step: found}, indent=1), flush=True)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
