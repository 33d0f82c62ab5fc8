"""What loaders deliver, compared in one run on one machine; on a GPU also what training gets from them.

    python benchmarks/loader.py --images photographs.zip --output results/benchmarks/<machine>-loader.json
    python benchmarks/loader.py --images photographs.zip --end-to-end gsam-m512 vanilla gsam-m64 --output ...
    python benchmarks/loader.py --show results/benchmarks/<machine>-loader.json

Every party (loader_parties.py) reads the same JPEG bytes and runs in a process of its own, which rests while another is
measured; the parties take turns for `--rounds` rounds. A figure is the median over rounds of images/s, and of images
per second that a core was busy. Without --images the pictures are generated, which the result says.

--end-to-end trains ViT-B/32 with this project's own engine, batch 512, bf16, fed by each loader, and by a batch that is
resident on the GPU.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import loader_parties
from loader_parties import PARTIES, available, processor_seconds, synchronise

from sam_repro.data.beton import MAX_SIDE, write_beton
from sam_repro.data.manifest import write_manifest
from sam_repro.data.write.dataset import encode
from sam_repro.records import ledger

CLASSES = 10
FED = ("ours-ffcv", "ours-torch", "ffcv", "torchvision-uint8")  # parties of --end-to-end


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder or .zip of JPEGs of about 500 px; read as they are")
    parser.add_argument(
        "--count", type=int, help="images per epoch, by repetition (default: 32 batches, or four per worker)"
    )
    parser.add_argument("--parties", nargs="*", help=f"only these of {', '.join(PARTIES)}; none: no loader alone")
    parser.add_argument("--batch", type=int, help="default: 512 on a GPU, else 64")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--end-to-end", nargs="+", metavar="METHOD", default=[], help="vanilla, gsam-m512, gsam-m64")
    parser.add_argument("--steps", type=int, default=24, help="of each end-to-end measurement")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--show", type=Path, metavar="JSON", help="print the tables of a stored result, measure nothing"
    )
    args = parser.parse_args()
    args.batch = args.batch or (512 if args.device == "cuda" else 64)
    args.count = args.count or max(32, 4 * args.workers) * args.batch
    return args


def read_images(source: Path | None) -> tuple[list[bytes], str]:
    """(JPEGs, what they are)."""
    if source is None:
        return [generated(i) for i in range(200)], "200 generated pictures, 500x375, quality 90"
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            names = [n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg"))]
            note = archive.read("README.txt").decode().strip() if "README.txt" in archive.namelist() else source.name
            return [archive.read(n) for n in names], note
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    return [p.read_bytes() for p in files], f"{len(files)} files of {source.name}"


def generated(index: int) -> bytes:
    """A picture with a photograph's spectrum (amplitude 1 / frequency), which is what decoding time depends on."""
    rng, height, width = np.random.default_rng(index), 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
    planes = []
    for power, contrast in ((1.1, 50), (1.6, 20), (1.6, 20)):  # luma, chroma
        noise = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        plane = np.fft.irfft2(noise / frequency**power, (height, width))
        planes.append(128 + contrast * (plane - plane.mean()) / plane.std())
    image = Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8), "YCbCr").convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def prepare(root: Path, jpegs: list[bytes], count: int) -> float:
    """`count` images by repetition, as root/train/<class>/*.jpg, train.beton and segments/train.beton.

    The first two have the same bytes, the third has the JPEGs as `sam-repro write` stores them. Returns how many bytes
    those have for each byte of their sources.
    """
    sides = [Image.open(io.BytesIO(j)).size for j in jpegs]
    for label in range(CLASSES):
        (root / "train" / f"c{label}").mkdir(parents=True)
    files = [root / "train" / f"c{i % CLASSES}" / f"{i:06}.jpg" for i in range(count)]
    for i, file in enumerate(files):
        if i < len(jpegs):
            file.write_bytes(jpegs[i])
        else:
            file.hardlink_to(files[i % len(jpegs)])
    which = [(i % len(jpegs), i % CLASSES) for i in range(count)]
    (root / "segments").mkdir()
    stored = [encode(j, max_side=MAX_SIDE, quality=90, segment=64).data for j in jpegs]
    for beton, contents in ((root / "train.beton", jpegs), (root / "segments" / "train.beton", stored)):
        samples = ((contents[k], sides[k][1], sides[k][0], label, False) for k, label in which)
        write_beton(beton, samples, capacity=count)
        write_manifest(beton, [f"c{c}" for c in range(CLASSES)])
    return sum(map(len, stored)) / sum(map(len, jpegs))


class Party:
    """A loader in a process of its own."""

    def __init__(self, name: str, root: Path, args: argparse.Namespace) -> None:
        self.name, self.rounds = name, []
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        command = [sys.executable, loader_parties.__file__, name, root, args.batch, args.workers, args.device]
        self.process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def answer(self) -> dict[str, float] | None:
        """The process's next line; None, with its last words, once it failed."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        print(f"{self.name} failed: {self.errors.read().strip()[-400:]}", flush=True)
        return None

    def measure(self, seconds: float) -> bool:
        """One round; False once it failed."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        result = self.answer()
        self.rounds += [result] if result else []
        return result is not None

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def loaders_alone(root: Path, args: argparse.Namespace, save: Callable[[list[dict[str, Any]]], None]) -> None:
    """Every party's rate, in turns."""
    names = [n for n in available() if args.parties is None or n in args.parties]
    together = args.workers >= 2 * len(names)  # else one at a time, so that the first batch has the machine for itself
    parties, first = [], {}
    waiting = [Party(name, root, args) for name in names] if together else (Party(name, root, args) for name in names)
    for party in waiting:
        started = party.answer()
        if started:
            parties.append(party)
            first[party.name] = started["first_batch_seconds"]
            print(f"{party.name:20} first batch after {first[party.name]:.1f} s", flush=True)
    for number in range(args.rounds):
        parties = [p for p in parties if p.measure(args.seconds)]
        entries = []
        for p in parties:
            rates = [r["images"] / r["seconds"] for r in p.rounds]
            per_core = [r["images"] / r["cpu_seconds"] for r in p.rounds]
            entry = {"kind": "party", "party": p.name, "images_per_second": statistics.median(rates)}
            entry |= {"images_per_busy_core_second": statistics.median(per_core), "rounds": p.rounds}
            entries.append(entry | {"first_batch_seconds": first[p.name]})
        save(entries)
        rates = ", ".join(f"{e['party']} {e['images_per_second']:.0f}" for e in entries)
        print(f"round {number + 1}, medians so far: {rates}", flush=True)
    for party in parties:
        party.close()


def end_to_end(root: Path, args: argparse.Namespace, save: Callable[[list[dict[str, Any]]], None]) -> None:
    """Training fed by each loader, and by a batch that is resident on the GPU."""
    from sam_repro.config.compose import compose_config
    from sam_repro.distributed.ranks import Ranks
    from sam_repro.models.build import build_model
    from sam_repro.optim import build_base, decay_groups
    from sam_repro.training.method import gradient_step

    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    names = [n for n in FED if n in available() and (not args.parties or n in args.parties)]
    if "ffcv" in names:
        loader_parties.keep_stock_ffcv()
    batches = {n: PARTIES[n](root, args.batch, args.workers, device) for n in names}
    images = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8, device=device)
    labels = torch.randint(0, CLASSES, (args.batch,), device=device)
    resident = iter(lambda: (images.to(memory_format=torch.channels_last), labels), None)
    entries: list[dict[str, Any]] = []
    for method in args.end_to_end:
        name, _, m = method.partition("-m")
        overrides = [f"recipe.batch_size={args.batch}", f"optim.m={m or args.batch}", f"train.device={args.device}"]
        cfg = compose_config(["model=vit_b32", f"optim={name}", "train.dtype=bf16", *overrides])
        torch.manual_seed(0)
        model = build_model(cfg.model, num_classes=1000, image_size=224, loss=cfg.recipe.loss).to(device)
        base = build_base(cfg.recipe.base, decay_groups(model.named_parameters(), cfg.recipe.weight_decay), lr=1e-4)
        step = gradient_step(cfg, model, Ranks(0, 1, 0, 1, device), local_batch=args.batch, bf16=True)

        def train(
            feed: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, step=step, base=base, clip=cfg.recipe.clip
        ) -> None:
            for _ in range(steps):
                x, y = next(feed)
                step(x, y, rho=0.1)
                step.clip_(clip)
                base.step()
            synchronise()

        start = time.perf_counter()
        train(resident, 4)
        print(f"{method}: compiled after {time.perf_counter() - start:.0f} s", flush=True)
        own: list[dict[str, Any]] = []
        for party, feed in [("resident", resident), *batches.items(), ("resident", resident)]:
            train(feed, 6 if party == "resident" else max(6, 2 * loader_parties.lockstep(party, args.workers)))
            start, cpu = time.perf_counter(), processor_seconds()
            train(feed, args.steps)
            seconds, cpu = time.perf_counter() - start, processor_seconds() - cpu
            rate = args.batch * args.steps / seconds
            own.append({"kind": "fed", "method": method, "party": party, "images_per_second": rate})
            own[-1] |= {"seconds": seconds, "busy_cores": cpu / seconds}
            best = max(e["images_per_second"] for e in own if e["party"] == "resident")
            for entry in own:
                entry["of_resident"] = entry["images_per_second"] / best
            save(entries + own)
            print(f"{method:10} {party:18} {rate:8.0f} img/s, {cpu / seconds:.1f} cores busy", flush=True)
        entries += own
        del step, base, model, train


def show(path: Path) -> str:
    """Markdown tables of a stored result."""
    result = json.loads(path.read_text())
    alone = [e for e in result["entries"] if e["kind"] == "party"]
    lines = []
    if alone:
        rate = {e["party"]: e["images_per_second"] for e in alone}
        core = {e["party"]: e["images_per_busy_core_second"] for e in alone}
        heads = ["loader", "images/s", "x torchvision", "x FFCV", "images/s per busy core", "x torchvision", "x FFCV"]
        lines = [f"| {' | '.join([*heads, 'first batch'])} |", f"|---|{'--:|' * len(heads)}"]
        for e in alone:
            cells = [e["party"]]
            for known in (rate, core):
                own = known[e["party"]]
                cells += [
                    f"{own:.0f}",
                    *(f"{own / known[p]:.2f}" if p in known else "" for p in ("torchvision", "ffcv")),
                ]
            cells.append(f"{e['first_batch_seconds']:.1f} s")
            lines.append(f"| {' | '.join(cells)} |")
    fed = [e for e in result["entries"] if e["kind"] == "fed"]
    if fed:
        lines += ["", "| method | fed by | images/s | of resident | busy cores |", "|---|---|--:|--:|--:|"]
    for e in fed:
        cells = [e["method"], e["party"], f"{e['images_per_second']:.0f}", f"{100 * e['of_resident']:.1f} %"]
        cells.append(f"{e['busy_cores']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines += ["", f"{result['hardware']}, {result['workers']} workers, batch {result['batch']}; {result['images']}, "]
    lines[-1] += f"{result['bytes_per_image'] / 1e3:.0f} kB each; median of {result['rounds']} rounds of "
    lines[-1] += f"{result['seconds']:g} s or more; {versions}; commit {result['commit'][:8]}."
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    if args.show:
        print(show(args.show))
        return
    if args.images and not args.images.exists():
        sys.exit(f"error: --images {args.images} does not exist")
    jpegs, what = read_images(args.images)
    if not jpegs:
        sys.exit(f"error: --images {args.images} holds no JPEGs")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
    facts = {"hardware": gpu or ledger.cpu_name(), "images": what, "distinct": len(jpegs), "batch": args.batch}
    facts |= {"bytes_per_image": sum(map(len, jpegs)) / len(jpegs), "workers": args.workers, "rounds": args.rounds}
    result = facts | {"seconds": args.seconds, **ledger.provenance(), "entries": []}
    done: list[dict[str, Any]] = []

    def save(entries: list[dict[str, Any]]) -> None:
        result["entries"] = done + entries
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        result["stored_of_source"] = prepare(Path(folder), jpegs, args.count)
        if args.parties != []:
            loaders_alone(Path(folder), args, save)
        done = result["entries"]
        if args.end_to_end:
            end_to_end(Path(folder), args, save)
    if args.output:
        print(show(args.output))


if __name__ == "__main__":
    main()
