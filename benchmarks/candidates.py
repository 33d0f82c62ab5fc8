"""What each faster layer that is being tried is worth: next to the default and the floor, in turns, in one process.

    python benchmarks/candidates.py --models vit_b32 mixer_b32 --output results/benchmarks/<gpu>-candidates.json
    python benchmarks/candidates.py --device cpu --models mixer_s32 --size 64 --batch 8 --m 4    # does it start?

The step is GSAM's with groups of `--m` images. A candidate is a word or several joined by +: those of SAM_REPRO_TRY
(sam_repro/models/layers/candidates.py), `loop` for optim.groups=loop, and `lanes2` for SAM_REPRO_LANES=2. Floor,
default and candidate stay in memory together and are timed in turns, `--rounds` rounds of `--steps` steps; then the
next candidate takes the place of the last. The file is written after each, and --resume goes on with it. `difference`
is how far the fourth step's gradient is from the default's, relative to that: rounding in bf16 makes it some percent.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from clock import seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step import forgiven
from step_parties import Bench, Party

from sam_repro.distributed.ranks import Ranks
from sam_repro.models.layers import candidates
from sam_repro.records import ledger
from sam_repro.training.run import hardware

BEGUN = time.perf_counter()
CANDIDATES = {
    "vit": ["sums", "sums+gelu", "loop+lanes4"],
    "mixer": ["sums", "sums+tokens", "sums+tokens+gelu"],
    "resnet": ["lanes2", "lanes4"],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_b32", "mixer_b32", "resnet50", "vit_s16", "vit_b16"])
    parser.add_argument("--candidates", nargs="+", help="only these; default: by the model's family")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", type=int, default=224, help="side of an image")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--m", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no candidate is begun")
    parser.add_argument("--resume", action="store_true", help="keep what --output has of the same commit and hardware")
    parser.add_argument("--warm", action="store_true", help="compile everything, so that a later start finds it cached")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def build(bench: Bench, candidate: str, m: int) -> tuple[Party, torch.Tensor]:
    """GSAM's step with a candidate ("": the default), warmed up; and the gradient of its fourth step."""
    words = candidate.split("+") if candidate else []
    lanes = [int(w.removeprefix("lanes")) for w in words if w.startswith("lanes")]
    candidates.TRIED = frozenset(w for w in words if w != "loop" and not w.startswith("lanes"))
    if bench.gpu:
        from sam_repro.optim.gpu import fused_step  # imports Triton, which only a GPU's torch has

        fused_step.LANES = lanes[0] if lanes else 1
    strategy = "loop" if "loop" in words else "auto"
    run, flat = bench.engine_and_gradient("optim=gsam", f"optim.m={m}", f"optim.groups={strategy}")
    seconds(run, 4)
    return run, flat.clone()


def compare(bench: Bench, candidate: str, floor: Party, default: tuple[Party, torch.Tensor], args) -> dict:
    """One candidate's row."""
    run, gradient = build(bench, candidate, args.m)
    parties = {"floor": floor, "default": default[0], "candidate": run}
    times: dict[str, list[float]] = {who: [] for who in parties}
    for _ in range(args.rounds):
        for who, party in parties.items():
            times[who].append(seconds(party, args.steps))
    medians = {who: statistics.median(each) for who, each in times.items()}
    row = {"kind": "candidate", "model": bench.name, "candidate": candidate, "m": args.m, "batch": args.batch}
    row |= {"image_size": args.size, "seconds": medians["candidate"], "rounds": times}
    row |= {f"over_{who}": medians["candidate"] / medians[who] for who in ("floor", "default")}
    row |= {"default_over_floor": medians["default"] / medians["floor"]}
    row |= {"difference": ((gradient - default[1]).norm() / default[1].norm()).item()}
    return row


def bench_model(name: str, args: argparse.Namespace, rows: list[dict], save) -> None:
    """Every candidate of one model that has no row."""
    bench = Bench(name, args.batch, args.size, args.device)
    known = {row["candidate"] for row in rows if row["model"] == name}
    wanted = [c for c in args.candidates or CANDIDATES[bench.config().model.family] if c not in known]
    if not wanted or time.perf_counter() - BEGUN > args.seconds:
        print(f"{name}: {'not run, the time is over' if wanted else 'nothing is missing'}", flush=True)
        return
    floor = bench.plain(2)
    seconds(floor, 2)
    default = build(bench, "", args.m)
    for candidate in wanted:
        if time.perf_counter() - BEGUN > args.seconds:
            print(f"{name} {candidate}: not run, the time is over", flush=True)
            continue
        gc.collect()
        with forgiven(f"{name} {candidate}"):
            if args.warm:
                build(bench, candidate, args.m)
                continue
            rows.append(row := compare(bench, candidate, floor, default, args))
            save()
            print(told(row), flush=True)


def told(row: dict) -> str:
    """A row for the person watching."""
    ms = ", ".join(f"{who} {1e3 * statistics.median(each):.2f} ms" for who, each in row["rounds"].items())
    ratios = (
        f"{row['over_default']:.3f} of the default, {row['default_over_floor']:.3f} -> {row['over_floor']:.3f} floors"
    )
    return f"{row['model']:10} {row['candidate']:20} {ratios}; {ms}; gradient differs by {row['difference']:.1e}"


def main() -> None:
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # pyright: ignore: every party compiles the same function anew
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows: list[dict] = []
    result = {"hardware": hardware(Ranks(0, 1, 0, 1, torch.device(args.device))), **ledger.provenance()}
    result |= {"rounds": args.rounds, "steps": args.steps, "entries": rows}
    if args.resume and args.output and args.output.exists():
        before = json.loads(args.output.read_text())
        if [before[key] for key in ("hardware", "commit")] == [result[key] for key in ("hardware", "commit")]:
            rows += before["entries"]

    def save() -> None:
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    for name in args.models:
        with forgiven(name):
            bench_model(name, args, rows, save)


if __name__ == "__main__":
    main()
