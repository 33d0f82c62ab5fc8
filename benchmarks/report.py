"""What the benchmarks of this folder measured: tables and charts from the JSON files in results/benchmarks/.

    python benchmarks/report.py speed                    # what a step costs, model by model
    python benchmarks/report.py scaling                  # many GPUs, compared with the model of docs/SCALING.md
    python benchmarks/report.py peers                    # the same training through other people's optimizers
    python benchmarks/report.py codes                    # the same step through other people's code, JAX's too
    python benchmarks/report.py costs                    # Table 1 by these speeds; rehearsal, rehearsal_gpu likewise
    python benchmarks/report.py speed --chart results/figures/speed
    python benchmarks/report.py --check                  # exit code 1 where a document is stale; --write makes it anew

A document has such a table between the lines

    <!-- python benchmarks/report.py speed -->
    <!-- end of benchmarks/report.py -->

Every ratio is of figures measured in one run, by step.py, scaling.py or peers.py; a dash is what was not run.
"""

from __future__ import annotations

import re
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import report_codes, report_imagenet
from sam_repro.paper.measured_speeds import stored
from sam_repro.paper.render.numbers import markdown_table, number
from sam_repro.paper.render.sheet import spread_of
from sam_repro.paper.render.style import METHODS, RC, SOFT, save
from sam_repro.paper.statistics import compare, interval

BLOCK = re.compile(
    r"(<!-- python benchmarks/report\.py (\w+) -->\n)(.*?)(<!-- end of benchmarks/report\.py -->)", re.DOTALL
)
Result = dict[str, Any]


class Report(NamedTuple):
    """A kind of result: which files have it, its table and its chart."""

    load: Callable[[Path | None], list[Result]]
    table: Callable[[list[Result]], str]
    draw: Callable[[list[Result], Path], list[Path]] | None


def main(argv: list[str] | None = None) -> int:
    """Print a table, or check or write those in the documents; returns the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=sorted(REPORTS))
    parser.add_argument("--folder", type=Path, help="of the JSON files (default: results/benchmarks)")
    parser.add_argument("--chart", type=Path, metavar="STEM", help="draw STEM.svg and STEM.png")
    parser.add_argument("--check", action="store_true", help="complain about documents whose tables are stale")
    parser.add_argument("--write", action="store_true", help="write the tables in the documents anew")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="checkout with the documents")
    args = parser.parse_args(argv)
    if args.check or args.write:
        return documents(args.root, args.folder, write=args.write)
    if args.kind is None:
        parser.error("name a kind of report, or --check or --write")
    report = REPORTS[args.kind]
    results = report.load(args.folder)
    if not results:
        print(f"error: no file in {args.folder or 'results/benchmarks'} is of {args.kind}", file=sys.stderr)
        return 2
    print(report.table(results))
    if args.chart:
        if report.draw is None:
            parser.error(f"{args.kind} has no chart")
        print("\n".join(map(str, report.draw(results, args.chart))))
    return 0


def documents(root: Path, folder: Path | None, *, write: bool) -> int:
    """Compare the tables in README.md, docs/ and benchmarks/ with what the files say, or write them."""
    stale = 0
    for path in [
        root / "README.md",
        *sorted((root / "docs").rglob("*.md")),
        *sorted((root / "benchmarks").glob("*.md")),
    ]:
        text = path.read_text() if path.is_file() else ""
        fresh = BLOCK.sub(lambda block: block[1] + table_of(block[2], folder) + "\n" + block[4], text)
        if fresh == text:
            continue
        if write:
            path.write_text(fresh)
            print(f"wrote {path}")
        else:
            stale += 1
            print(f"{path} is stale or was edited by hand; `python benchmarks/report.py --write` makes it anew")
    return 1 if stale else 0


def table_of(kind: str, folder: Path | None) -> str:
    """The table of a kind of report."""
    return REPORTS[kind].table(REPORTS[kind].load(folder))


def versions_of(result: Result, *names: str) -> str:
    """'torch 2.11.0, timm 1.0.29'."""
    return ", ".join(f"{name} {result['versions'][name]}" for name in names)


# ---- speed: what a step costs, by step.py ----------------------------------------------------------------------------

# The floor is two forward+backward passes and one optimizer step, written plainly with the same layers.
PARTIES = {"gsam-m": "GSAM, one group", "gsam-64": "GSAM, m = 64", "davda54": "davda54 SAM", "juntang": "juntang GSAM"}


def load_speed(folder: Path | None) -> list[Result]:
    """The results of step.py, by file name."""
    return [tree for _, tree in stored(folder) if "matmul_tflops" in tree]


def by_model(results: list[Result]) -> dict[str, dict[str, Result]]:
    """model -> party -> entry, in the files' order; a party with groups is named with its m, the whole batch "m".

    A model measured on other hardware than the first file's has that in its name.
    """
    models: dict[str, dict[str, Result]] = {}
    for result in results:
        elsewhere = "" if result["hardware"] == results[0]["hardware"] else f" ({result['hardware']})"
        for entry in result["entries"]:
            party = entry["method"]
            if party in ("gsam", "sam"):
                party += "-m" if entry["m"] == entry["batch"] else f"-{entry['m']}"
            models.setdefault(entry["model"] + elsewhere, {})[party] = entry
    return models


def speed_table(results: list[Result]) -> str:
    """One line per model, and one line of provenance per kind of run."""
    header = [
        "model",
        "vanilla, timm's layers",
        "vanilla, ours",
        "of the ceiling",
        "floor",
        *PARTIES.values(),
        "memory",
    ]
    table = markdown_table(header, (speed_line(model, parties) for model, parties in by_model(results).items()))
    lines = [table, "", "Images per second; then times the floor. "]
    lines[-1] += "Memory: GSAM's with one group over vanilla's, both at their peak."
    runs: dict[str, list[str]] = {}
    for r in results:
        text = f"{r['hardware']}, batch {r['batch']} at 224 px, bf16, compiled, {versions_of(r, 'torch', 'timm')}, "
        text += f"commit {r['commit'][:8]}, median of {r['rounds']} rounds of {r['steps']} steps"
        models = "/".join(dict.fromkeys(e["model"] for e in r["entries"]))
        runs.setdefault(text, []).append(f"{r['matmul_tflops']:.0f} TFLOP/s for {models}")
    ceiling = "the ceiling, a large bf16 product in the same process"
    return "\n".join([*lines, *(f"{text}; {ceiling}: {', '.join(speeds)}." for text, speeds in runs.items())])


def speed_line(model: str, parties: dict[str, Result]) -> list[str]:
    """A model's cells."""

    def value(party: str, key: str, scale: float = 1.0) -> float | None:
        entry = parties.get(party, {})
        return scale * entry[key] if key in entry else None

    gsam, vanilla = value("gsam-m", "peak_bytes"), value("vanilla", "peak_bytes")
    share, floor = value("ours-vanilla", "ceiling_share", 100), value("floor", "seconds", 1e3)
    return [
        model,
        number(value("timm", "images_per_second"), ",.0f"),
        number(value("ours-vanilla", "images_per_second"), ",.0f"),
        "–" if share is None else f"{share:.1f} %",
        "–" if floor is None else f"{floor:.1f} ms",
        *(number(value(party, "over_floor"), ".3f") for party in PARTIES),
        "–" if gsam is None or vanilla is None else f"+{(gsam - vanilla) / 1e9:.2f} GB",
    ]


def plain_name(model: str) -> str:
    """'ViT-B/32' of 'vit_b32', 'ResNet-50' of 'resnet50'; what stands in brackets stays, without the maker."""
    name, *rest = model.split(" (NVIDIA ")
    name = re.sub(r"^resnet(\d+)$", r"ResNet-\1", name)
    words = {"vit": "ViT", "mixer": "Mixer"}
    name = re.sub(r"^(vit|mixer)_([a-z])(\d+)$", lambda m: f"{words[m[1]]}-{m[2].upper()}/{m[3]}", name)
    return name + "".join(f" ({text}" for text in rest)


def draw_speed(results: list[Result], stem: Path) -> list[Path]:
    """Bars: what each party costs over the floor, model by model; the line is the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    blue, sam = METHODS["gsam"].colour, METHODS["sam"].colour  # ours filled, the peers' in outline
    colours = dict(zip(PARTIES, (blue, METHODS["gsam_constant"].colour, sam, blue), strict=True))
    models = by_model(results)
    bars = [
        [(party, parties[party]["over_floor"]) for party in PARTIES if "over_floor" in parties.get(party, {})]
        for parties in models.values()
    ]
    with matplotlib.rc_context(RC | {"axes.grid.axis": "x"}):
        figure, ax = plt.subplots(figsize=(7.2, 0.6 + 0.26 * sum(len(b) + 1 for b in bars)))
        y, ticks = 0.0, []
        for group in bars:
            ticks.append(y + (len(group) - 1) / 2)
            for party, ratio in group:
                excess = 100 * (ratio - 1)
                fill = "none" if party in ("davda54", "juntang") else colours[party]
                ax.barh(y, excess, height=0.8, facecolor=fill, edgecolor=colours[party], linewidth=1.5)
                text = f"{PARTIES[party]}  {excess:+.1f} %".replace("-", "−")
                ax.text(max(excess, 0) + 0.9, y, text, va="center", fontsize=8.5)
                y += 1
            y += 0.8
        ax.axvline(0, color="#1b1f24", linewidth=1)
        ax.set_yticks(ticks, map(plain_name, models))
        ax.invert_yaxis()
        ax.set_xlim(right=1.3 * ax.get_xlim()[1])
        ax.set_xlabel("% more time than two plain passes and one update (H100 unless named; batch 512)")
        ax.set_title("What a sharpness-aware step costs")
        paths = save(figure, stem)
        plt.close(figure)
    return paths


# ---- scaling: many GPUs of one host, by scaling.py -------------------------------------------------------------------

NAMES = {"vanilla": "vanilla", "sam": "SAM", "gsam": "GSAM"}
BUS = 329e9  # bytes/s: bus bandwidth of an all-reduce of 1 GiB on two H100 of one host, measured outside this project


def load_scaling(folder: Path | None) -> list[Result]:
    """The results of scaling.py, by file name."""
    return [tree for _, tree in stored(folder) if any(e.get("kind") == "scaling" for e in tree["entries"])]


def reduction(bytes_: float, gpus: int, bus: float = BUS) -> float:
    """Seconds of a ring all-reduce, t = 2 (N - 1) / N x bytes / B."""
    return 2 * (gpus - 1) / gpus * bytes_ / bus


def with_predictions(entries: list[Result]) -> list[Result]:
    """Entries with the model's figures and `efficiency`: images/s over N times one GPU's of the same run, or NaN."""
    one = {subject(e): e for e in entries if e["gpus"] == 1}
    predicted = []
    for e in entries:
        base, nan = one.get(subject(e)), float("nan")
        wire = reduction(e["bytes"] * (0.5 if e["reduce"] == "bf16" else 1), e["gpus"])
        row = {**e, "predicted_reduction": wire, "efficiency": nan, "predicted_efficiency": nan}
        if base:
            row["efficiency"] = e["images_per_second"] / (e["gpus"] * base["images_per_second"])
            row["predicted_efficiency"] = base["step"] / (base["step"] + wire)
        predicted.append(row)
    return predicted


def subject(entry: Result) -> tuple[str, str, int, str]:
    """What is compared over numbers of GPUs."""
    return entry["model"], entry["method"], entry["m"], entry["reduce"]


def scaling_table(results: list[Result]) -> str:
    """A table with a line of provenance per result."""
    header = ["model", "method", "m", "GPUs", "ms per step", "without reduction", "reduction", "predicted", "images/s"]
    header += ["efficiency", "predicted"]
    tables = []
    for r in results:
        lines = map(scaling_line, with_predictions(r["entries"]))
        how = "fp32" if "CPU" in r["hardware"] else "bf16, compiled"
        text = (
            f"{max(e['gpus'] for e in r['entries'])} x {r['hardware']}, {r['batch']} resident images per GPU, {how}, "
        )
        text += f"{versions_of(r, 'torch', 'timm')}, commit {r['commit'][:8]}, median of {r['rounds']} rounds of "
        text += f"{r['steps']} steps, the slowest rank's. Without reduction: all GPUs at work at the same time, each "
        text += f"for itself. Reduction: by itself. Predicted: a ring at {BUS / 1e9:.0f} GB/s, nothing hidden."
        tables.append(f"{markdown_table(header, lines, text_columns=2)}\n\n{text}")
    return "\n\n".join(tables)


def scaling_line(e: Result) -> list[str]:
    """An entry's cells; what needs two GPUs is a dash with one."""

    def many(key: str, form: str, scale: float) -> str:
        return format(scale * e[key], form) if e["gpus"] > 1 else "–"

    share = [many(key, ".1f", 100) for key in ("efficiency", "predicted_efficiency")]
    return [
        e["model"],
        e["method"] + (", bf16" if e["reduce"] == "bf16" else ""),
        str(e["m"]),
        str(e["gpus"]),
        f"{1e3 * e['step']:.2f}",
        *(many(key, ".2f", 1e3) for key in ("alone", "reduction", "predicted_reduction")),
        f"{e['images_per_second']:,.0f}",
        *(cell if cell == "–" else f"{cell} %" for cell in share),
    ]


def draw_scaling(results: list[Result], stem: Path) -> list[Path]:
    """Efficiency over the number of GPUs; a panel per model, result and precision of the reduction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple[int, str], list[Result]] = {}
    for i, result in enumerate(results):
        card = result["hardware"].removeprefix("NVIDIA ").split()[0]
        for e in with_predictions(result["entries"]):
            panels.setdefault((i, f"{plain_name(e['model'])}, {card}, {e['reduce']}"), []).append(e)
    parties = {(e["method"], e["m"]) for entries in panels.values() for e in entries}
    largest = {method: max(m for other, m in parties if other == method) for method, _ in parties}
    ordered = sorted(parties, key=lambda p: (list(METHODS).index(p[0]), -p[1]))
    # GSAM with smaller groups as GSAM with a constant radius, as in the chart of speeds
    marks = [(METHODS["gsam_constant" if m < largest[method] else method], (method, m)) for method, m in ordered]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(RC):
        size = (2.9 * columns, 2.8 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")
        for ax, ((_, title), entries) in zip(axes.flat, panels.items(), strict=False):
            for (colour, marker, _), party in marks:
                points = [e for e in sorted(entries, key=lambda e: e["gpus"]) if (e["method"], e["m"]) == party]
                gpus = [e["gpus"] for e in points]
                ax.plot(gpus, [100 * e["efficiency"] for e in points], marker=marker, color=colour, markersize=5.5)
                ax.plot(gpus, [100 * e["predicted_efficiency"] for e in points], "--", color=colour, linewidth=1)
            ax.set_xscale("log", base=2)
            numbers = sorted({e["gpus"] for e in entries})
            ax.set_xticks(numbers, [str(n) for n in numbers])
            ax.set_title(title)
            ax.set_xlabel("GPUs")
        for ax in axes[:, 0]:
            ax.set_ylabel("speed, % of N × one GPU's")
        for (colour, marker, _), (method, m) in marks:
            axes.flat[-1].plot([], [], marker=marker, color=colour, markersize=5.5, label=NAMES[method] + f", m = {m}")
        axes.flat[-1].plot([], [], "--", color=SOFT, linewidth=1, label="predicted")
        axes.flat[-1].legend(fontsize=9, frameon=False, loc="center left")
        paths = save(figure, stem)
        plt.close(figure)
    return paths


# ---- peers: the same training through other people's optimizers, by peers.py -----------------------------------------

PAIRS = (("ours-sam", "davda54"), ("ours-sam", "pytorch_optimizer"), ("ours-gsam", "juntang"))


def load_peers(folder: Path | None) -> list[Result]:
    """The results of peers.py, by file name."""
    return [tree for _, tree in stored(folder, "runs") if tree.get("kind") == "peers"]


def peers_table(results: list[Result]) -> str:
    """A table with a line of provenance per result: ours compared with the peer's, by the seeds that both have."""
    header = ["ours", "peer", "ours, %", "peer, %", "difference", "ms per step", "peer / ours", "seconds (first seed)"]
    tables = []
    for r in results:
        text = f"{r['hardware']}; {versions_of(r, 'python', 'torch', 'timm')}; commit {r['commit'][:8]}; "
        text += f"`{' '.join(r['overrides'])}`"
        tables.append(f"{markdown_table(header, peers_lines(r), text_columns=2)}\n\n{text}")
    return "\n\n".join(tables)


def peers_lines(result: Result) -> Iterator[list[str]]:
    """The cells of each pair of parties."""
    for names in PAIRS:
        parties = [{r["seed"]: r for r in result["runs"] if r["party"] == name} for name in names]
        ours, peer = ({s: runs[s] for s in sorted(parties[0].keys() & parties[1].keys())} for runs in parties)
        if not ours:
            continue
        accuracy = [{s: 100 * r["correct"] / r["total"] for s, r in runs.items()} for runs in (ours, peer)]
        tested = compare(accuracy[1], accuracy[0])
        assert tested is not None
        p = "" if tested.p is None else f", p = {tested.p:.2g}"
        step = [statistics.median(r["steady_ms"] for r in runs.values()) for runs in (ours, peer)]
        cells = [*names, *(spread_of(interval(list(a.values())), 2) for a in accuracy)]
        cells += [f"{tested.difference:+.2f} (n = {tested.n}{p})", f"{step[0]:.2f}, {step[1]:.2f}"]
        yield [*cells, f"{step[1] / step[0]:.3f}", ", ".join(map(seconds, (ours, peer)))]


def seconds(runs: dict[int, Result]) -> str:
    """Median seconds of a party's training loop, and those of its first seed, which may have compiled."""
    whole = [run["seconds"] for run in runs.values()]
    return f"{statistics.median(whole):.1f} ({whole[0]:.1f})"


REPORTS = {
    "speed": Report(load_speed, speed_table, draw_speed),
    "scaling": Report(load_scaling, scaling_table, draw_scaling),
    "peers": Report(load_peers, peers_table, None),
    "codes": Report(report_codes.load_codes, report_codes.codes_table, report_codes.draw_codes),
    "costs": Report(report_imagenet.load_costs, report_imagenet.costs_table, None),
    "rehearsal": Report(report_imagenet.load_rehearsal, report_imagenet.rehearsal_table, None),
    "rehearsal_gpu": Report(report_imagenet.load_gpu, report_imagenet.gpu_table, None),
    "rehearsal_log": Report(report_imagenet.load_gpu, report_imagenet.log_lines, None),
}

if __name__ == "__main__":
    sys.exit(main())
