"""What a sharpness-aware step costs, compared with its floor and its peers, in one run on one GPU.

    python benchmarks/step.py --models vit_b32 resnet50 --output results/benchmarks/h100-step.json
    python benchmarks/step.py --device cpu --models vit_digits --size 32 --batch 64 --m 64 16     # fp32, not compiled

Synthetic uint8 images resident on the device, the model's own recipe, on a GPU bf16 and compiled. There the parties run
one after the other, on a CPU in turns; each is warmed up and measured for `--rounds` rounds of `--steps` steps. A
figure is the median over rounds of the mean step; the floor is measured again at the end, to see a drift.
Parties:

    timm        vanilla with timm's own layers, written plainly: compiled model, fp32 leaves, autocast, .backward()
    vanilla     the same with this project's layers (linear patch embedding, attention in one tile, blocked stem)
    floor       two such forward+backward passes and one base-optimizer step: what SAM cannot go below, written plainly
                with the same layers as everybody below
    ours-vanilla  this project's engine with method `vanilla`
    ours-floor  the engine's own two passes and one base-optimizer step: the stricter floor
    gsam-m<M>   this project's engine, groups of M images
    sam-m<M>    likewise, SAM
    davda54, juntang   the peers' optimizers in their own recipe, if --peers names a folder with sam.py and gsam/
    pytorch_optimizer  its SAM likewise, if it is installed
    jax, jax-<party>   the official JAX code, if --big-vision names a checkout of it: all parties of step_jax.py, or one

A run that is cut off goes on with --resume: what the file has is not measured again, but for the floor.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from clock import seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step_parties import Bench, Party

from sam_repro.distributed.ranks import Ranks
from sam_repro.models.build import build_model
from sam_repro.records import ledger
from sam_repro.training.run import hardware

BEGUN = time.perf_counter()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_b32", "resnet50", "vit_b16", "mixer_b16"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", type=int, default=224, help="side of an image")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--m", nargs="+", type=int, default=[512, 64])
    parser.add_argument("--groups", default="auto", help="optim.groups of the m < batch parties")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--peers", type=Path, help="folder with davda54's sam.py and juntang-zhuang's gsam/")
    parser.add_argument("--big-vision", type=Path, help="checkout of google-research/big_vision")
    parser.add_argument("--parties", nargs="+", help="only these")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no party is begun")
    parser.add_argument("--resume", action="store_true", help="keep what --output has of the same commit and hardware")
    parser.add_argument("--warm", action="store_true", help="compile everything, so that a later start finds it cached")
    parser.add_argument("--profile", metavar="PARTY", help="print the kernels of one party")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def matmul_ceiling() -> float:
    """TFLOP/s of an 8192^3 bf16 product on random data: what the chip can do."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / statistics.median(seconds(lambda: torch.mm(a, b), 20) for _ in range(5)) / 1e12


def forward_gflop(bench: Bench) -> float:
    """GFLOP of one image's forward pass, 2 x MAC."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build_model(bench.config().model, num_classes=1000, image_size=bench.size)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, bench.size, bench.size))
    return counter.get_total_flops() / 1e9


def makers_of(bench: Bench, args: argparse.Namespace) -> dict[str, Callable[[], Party]]:
    """The parties that are wanted and can be had, each as what builds it."""
    makers: dict[str, Callable[[], Party]] = {
        "timm": lambda: bench.plain(1, timm=True),
        "vanilla": lambda: bench.plain(1),
        "floor": lambda: bench.plain(2),
        "ours-vanilla": lambda: bench.engine("optim=vanilla", f"optim.m={args.batch}"),
        "ours-floor": lambda: bench.engine("optim=vanilla", f"optim.m={args.batch}", passes=2),
    }
    for m in args.m:
        for method in ("gsam", "sam"):
            makers[f"{method}-m{m}"] = lambda method=method, m=m: bench.engine(
                f"optim={method}", f"optim.m={m}", f"optim.groups={args.groups}"
            )
    if args.peers:
        sys.path.insert(0, str(args.peers))
        makers |= {"davda54": bench.davda54, "juntang": bench.juntang}
    if importlib.util.find_spec("pytorch_optimizer"):
        makers["pytorch_optimizer"] = bench.pytorch_optimizer
    makers["floor-again"] = makers["floor"]  # last, to see a drift of the machine
    if args.parties:
        makers = {k: v for k, v in makers.items() if k in args.parties}
    return makers


def bench_model(
    name: str, args: argparse.Namespace, ceiling: float, rows: list[dict], save: Callable[[], None]
) -> None:
    """Add every party of one model to the rows of the JSON, saved after each. `ceiling`: TFLOP/s, 0 if not known."""
    bench = Bench(name, args.batch, args.size, args.device)
    medians = {party_of(row): row["seconds"] for row in rows if row["model"] == name}
    known = set(medians)
    makers = {party: make for party, make in makers_of(bench, args).items() if party not in known - {"floor"}}
    if known.issuperset(makers):  # the floor is measured again with others only
        makers = {}
    gflop = forward_gflop(bench)
    official = jax_process(name, args, known) if args.big_vision and args.warm else None  # compiles with the others
    # A GPU does not hold the captured memory of all; a CPU does, and other people's work on it is then everybody's.
    for turn in [[party] for party in makers] if bench.gpu else [list(makers)]:
        if left(args) < 0:
            print(f"{name} {', '.join(turn)}: not run, the time is over", flush=True)
            continue
        gc.collect()
        torch.cuda.empty_cache()
        if bench.gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runs, setup = {}, {}
        for party in turn:
            with forgiven(f"{name} {party}"):
                start = time.perf_counter()
                runs[party] = makers[party]()
                seconds(runs[party], 3)
                setup[party] = time.perf_counter() - start
        if args.warm:
            print("".join(f"{name} {party}: compiled, {setup[party]:.0f} s\n" for party in setup), end="", flush=True)
            continue
        times = {party: [] for party in setup}
        for measured, party in itertools.product(range(args.rounds), setup):
            if len(times[party]) == measured:  # it has not failed
                with forgiven(f"{name} {party}"):
                    times[party].append(seconds(runs[party], args.steps))
        if args.profile in times:
            profile(runs[args.profile])
        runs.clear()
        for party in [p for p in times if len(times[p]) == args.rounds]:
            medians[party] = median = statistics.median(times[party])
            method, _, m = party.partition("-m")
            row = {"method": method, "m": int(m or args.batch), "seconds": median, "rounds": times[party]}
            row |= {"peak_bytes": torch.cuda.max_memory_allocated() - before} if bench.gpu else {}
            row["setup_seconds"] = setup[party]
            if ceiling and party in ("timm", "vanilla", "ours-vanilla"):
                row["ceiling_share"] = 3 * gflop * args.batch / median / 1e3 / ceiling
            rows[:] = [r for r in rows if (r["model"], party_of(r)) != (name, party)]  # the floor of another start
            rows.append(shared(name, args, median) | row | over(medians, median))
            save()
            tell(party, rows[-1])
    if args.big_vision:
        torch.cuda.empty_cache()
        official = official or jax_process(name, args, known)
        for line in official.stdout or ():
            row = json.loads(line)
            rows.append(shared(name, args, row["seconds"]) | row | over(medians, row["seconds"]) | {"dtype": "bf16"})
            save()
            tell(row["method"], rows[-1])
        official.wait()


def shared(name: str, args: argparse.Namespace, seconds: float) -> dict:
    """What all rows of a model have."""
    row = {"kind": "step", "model": name, "batch": args.batch, "image_size": args.size}
    row["images_per_second"] = args.batch / seconds
    return row | {"dtype": "bf16" if args.device == "cuda" else "fp32"}


def over(medians: dict[str, float], median: float) -> dict:
    """A party's time over the floors."""
    return {f"over_{floor}": median / medians[floor] for floor in ("floor", "ours-floor") if floor in medians}


def party_of(row: dict) -> str:
    """The party of a row."""
    return row["method"] if row["method"] not in ("gsam", "sam") else f"{row['method']}-m{row['m']}"


def left(args: argparse.Namespace) -> float:
    """Seconds that are left."""
    return args.seconds - (time.perf_counter() - BEGUN)


def jax_process(name: str, args: argparse.Namespace, known: set[str]) -> subprocess.Popen:
    """step_jax.py for one model, which prints a row for each of its parties."""
    options = {"big-vision": args.big_vision, "model": name, "batch": args.batch, "size": args.size}
    options |= {"rounds": args.rounds, "steps": args.steps, "seconds": left(args)}
    command = [sys.executable, str(Path(__file__).with_name("step_jax.py")), "--skip", *known]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    wanted = [party.removeprefix("jax-") for party in args.parties or () if party.startswith("jax-")]
    command += ["--parties", *wanted] if args.parties and "jax" not in args.parties else []
    return subprocess.Popen([*command, *["--warm"] * args.warm], stdout=subprocess.PIPE, text=True)


@contextmanager
def forgiven(who: str) -> Iterator[None]:
    """One party's failure must not cost the others their run."""
    try:
        yield
    except Exception as error:
        print(f"{who} failed: {type(error).__name__}: {str(error)[:400]}", flush=True)


def tell(party: str, row: dict) -> None:
    """A row for the person watching."""
    words = [", ".join(f"{k[5:]} x {v:.3f}" for k, v in row.items() if k.startswith("over_"))]
    words += [f"peak {row['peak_bytes'] / 1e9:.2f} GB"] if "peak_bytes" in row else []
    words += [f"ready after {row['setup_seconds']:.0f} s"]
    words += [f"spread {100 * (max(row['rounds']) / min(row['rounds']) - 1):.1f} %"]
    words += [f"{100 * row['ceiling_share']:.1f} % of the ceiling"] if "ceiling_share" in row else []
    said = f"{row['model']:10} {party:24} {1e3 * row['seconds']:8.2f} ms {row['images_per_second']:8.0f} img/s  "
    print(said + ", ".join(filter(None, words)), flush=True)


def profile(party: Party) -> None:
    """Print where the GPU's time goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            party()
        torch.cuda.synchronize()
    kernels = sorted(trace.key_averages(), key=lambda k: -k.device_time_total)
    total = sum(k.device_time_total for k in kernels)
    print(f"kernels: {total / 3e3:.2f} ms per step")
    for k in kernels[:32]:
        print(f"  {k.device_time_total / 3e3:7.3f} ms  {k.count // 3:5d} x  {k.key[:110]}", flush=True)


def main() -> None:
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if args.device == "cpu":
        torch.set_num_threads(1)  # as the demo does
    ceiling = matmul_ceiling() if args.device == "cuda" else 0.0
    result = {
        "hardware": hardware(Ranks(0, 1, 0, 1, torch.device(args.device))),
        **({"matmul_tflops": ceiling} if ceiling else {}),
        "batch": args.batch,
        "rounds": args.rounds,
        "steps": args.steps,
        **ledger.provenance(),
        "entries": [],
    }
    print(f"{result['hardware']}" + (f", {ceiling:.0f} TFLOP/s bf16 product" if ceiling else ""), flush=True)
    same = ("hardware", "batch", "commit")
    if args.resume and args.output and args.output.exists():
        before = json.loads(args.output.read_text())
        if [before[key] for key in same] == [result[key] for key in same]:
            result["entries"] = before["entries"]

    def save() -> None:
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    for name in args.models:
        bench_model(name, args, ceiling, result["entries"], save)


if __name__ == "__main__":
    main()
