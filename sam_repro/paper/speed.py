"""What a step costs, from results/benchmarks/: one line a model, and a picture of the ratios.

  sam-repro speed                                      # the table of README
  sam-repro speed --chart results/figures/speed        # and its bars
  sam-repro speed --scaling [--chart STEM]             # many GPUs: the table of docs/SCALING.md

The floor is two forward+backward passes and one optimizer step, written plainly with the same layers. Every ratio is of
figures measured in one run, by benchmarks/step.py; a dash is what was not run.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sam_repro.errors import UserError
from sam_repro.paper import scaling
from sam_repro.paper.measured_speeds import stored
from sam_repro.paper.render.style import RC, save

Result = dict[str, Any]
PARTIES = {"gsam-m": "GSAM, one group", "gsam-64": "GSAM, m = 64", "davda54": "davda54 SAM", "juntang": "juntang GSAM"}


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--folder", type=Path, help="of the JSON files (default: results/benchmarks)")
    parser.add_argument("--scaling", action="store_true", help="what benchmarks/scaling.py measured, instead")
    parser.add_argument("--chart", type=Path, metavar="STEM", help="draw STEM.svg and STEM.png")


def run(args: Namespace) -> int:
    """Print the table."""
    part = scaling if args.scaling else sys.modules[__name__]
    results = part.load(args.folder)
    if not results:
        script = "scaling" if args.scaling else "step"
        raise UserError(f"no file of benchmarks/{script}.py in results/benchmarks; see benchmarks/README.md")
    print(part.table(results))
    if args.chart:
        print("\n".join(map(str, part.draw(results, args.chart))))
    return 0


def load(folder: Path | None = None) -> list[Result]:
    """The results of benchmarks/step.py, by file name."""
    return [tree for _, tree in stored(folder) if "matmul_tflops" in tree]


def by_model(results: list[Result]) -> dict[str, dict[str, Result]]:
    """model -> party -> entry, in the files' order; a party with groups is named with its m, the whole batch "m".

    A model measured on other hardware than the first file's has that in its name.
    """
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        elsewhere = "" if result["hardware"] == results[0]["hardware"] else f" ({result['hardware']})"
        for entry in result["entries"]:
            party = entry["method"]
            if party in ("gsam", "sam"):
                party += "-m" if entry["m"] == entry["batch"] else f"-{entry['m']}"
            found.setdefault(entry["model"] + elsewhere, {})[party] = entry
    return found


def table(results: list[Result]) -> str:
    """Markdown, and one line of provenance a kind of run."""
    head = ["model", "vanilla, timm's layers", "vanilla, ours", "of the ceiling", "floor", *PARTIES.values(), "memory"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for model, parties in by_model(results).items():
        ours, floor = parties.get("ours-vanilla"), parties.get("floor")
        cells = [model, rate(parties.get("timm")), rate(ours)]
        cells += [f"{100 * ours['ceiling_share']:.1f} %" if ours else "–"]
        cells += [f"{1e3 * floor['seconds']:.1f} ms" if floor else "–"]
        cells += [f"{parties[p]['over_floor']:.3f}" if "over_floor" in parties.get(p, {}) else "–" for p in PARTIES]
        gsam, vanilla = parties.get("gsam-m"), parties.get("vanilla")
        more = gsam["peak_bytes"] - vanilla["peak_bytes"] if gsam and vanilla else None
        cells += [f"+{more / 1e9:.2f} GB" if more is not None else "–"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Images a second; then times the floor. Memory: GSAM's with one group over vanilla's, both at their peak.",
    ]
    runs: dict[str, list[str]] = {}
    for r in results:
        versions = ", ".join(f"{k} {r['versions'][k]}" for k in ("torch", "timm"))
        told = f"{r['hardware']}, batch {r['batch']} at 224 px, bf16, compiled, {versions}, commit {r['commit'][:8]}"
        told += f", median of {r['rounds']} rounds of {r['steps']} steps"
        models = "/".join(dict.fromkeys(e["model"] for e in r["entries"]))
        runs.setdefault(told, []).append(f"{r['matmul_tflops']:.0f} TFLOP/s for {models}")
    lines += [
        f"{told}; the ceiling, a large bf16 product in the same process: {', '.join(c)}." for told, c in runs.items()
    ]
    return "\n".join(lines)


def rate(entry: Result | None) -> str:
    """Images a second, or a dash."""
    return f"{entry['images_per_second']:,.0f}" if entry else "–"


def draw(results: list[Result], stem: Path) -> list[Path]:
    """Bars: what each party costs over the floor, model by model; the line is the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = dict(zip(PARTIES, ("#0072B2", "#56B4E9", "#E69F00", "#D55E00"), strict=True))
    found = by_model(results)
    bars = [
        [(party, parties[party]["over_floor"]) for party in PARTIES if "over_floor" in parties.get(party, {})]
        for parties in found.values()
    ]
    with matplotlib.rc_context(RC | {"axes.grid.axis": "x"}):
        figure, ax = plt.subplots(figsize=(7.2, 0.6 + 0.26 * sum(len(b) + 1 for b in bars)))
        y, ticks = 0.0, []
        for group in bars:
            ticks.append(y + (len(group) - 1) / 2)
            for party, ratio in group:
                excess = 100 * (ratio - 1)
                ax.barh(y, excess, height=0.8, color=colours[party])
                ax.text(max(excess, 0) + 0.6, y, f"{PARTIES[party]}  {excess:+.1f}", va="center", fontsize=8.5)
                y += 1
            y += 0.8
        ax.axvline(0, color="#1b1f24", linewidth=1)
        ax.set_yticks(ticks, list(found))
        ax.invert_yaxis()
        ax.set_xlim(right=1.3 * ax.get_xlim()[1])
        ax.set_xlabel("% over the floor of two passes and one update")
        ax.set_title("What a sharpness-aware step costs over its floor")
        paths = save(figure, stem)
        plt.close(figure)
    return paths
