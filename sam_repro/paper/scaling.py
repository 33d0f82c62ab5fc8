"""Many GPUs of one host: what benchmarks/scaling.py measured, beside the model of docs/SCALING.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam_repro.paper.measured_speeds import stored
from sam_repro.paper.render.style import PALETTE, RC, SOFT, save

Result = dict[str, Any]
BUS = 329e9  # bytes/s: bus bandwidth of an all-reduce of 1 GiB on two H100 of one host, measured outside this project

ORDER = ("vanilla", "sam", "gsam")


def load(folder: Path | None = None) -> list[Result]:
    """The results of benchmarks/scaling.py, by file name."""
    return [tree for _, tree in stored(folder) if any(e.get("kind") == "scaling" for e in tree["entries"])]


def reduction(bytes_: float, gpus: int, bus: float = BUS) -> float:
    """Seconds of a ring all-reduce, t = 2 (N - 1) / N x bytes / B."""
    return 2 * (gpus - 1) / gpus * bytes_ / bus


def with_predictions(entries: list[Result]) -> list[Result]:
    """Entries with the model's figures and `efficiency`: images/s over N times one GPU's of the same run, or NaN."""
    one = {key(e): e for e in entries if e["gpus"] == 1}
    found = []
    for e in entries:
        base, nan = one.get(key(e)), float("nan")
        wire = reduction(e["bytes"] * (0.5 if e["reduce"] == "bf16" else 1), e["gpus"])
        row = {**e, "predicted_reduction": wire, "efficiency": nan, "predicted_efficiency": nan}
        if base:
            row["efficiency"] = e["images_per_second"] / (e["gpus"] * base["images_per_second"])
            row["predicted_efficiency"] = base["step"] / (base["step"] + wire)
        found.append(row)
    return found


def key(entry: Result) -> tuple[str, str, int, str]:
    """What is compared over numbers of GPUs."""
    return entry["model"], entry["method"], entry["m"], entry["reduce"]


def table(results: list[Result]) -> str:
    """Markdown with a line of provenance, a result after the other."""
    return "\n\n".join(map(one_table, results))


def one_table(result: Result) -> str:
    """Of one result."""
    head = ["model", "method", "m", "GPUs", "ms a step", "without reduction", "reduction", "predicted", "images/s"]
    head += ["efficiency", "predicted"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    for e in with_predictions(result["entries"]):
        many = e["gpus"] > 1
        cells = [e["model"], e["method"] + (", bf16" if e["reduce"] == "bf16" else ""), str(e["m"]), str(e["gpus"])]
        cells += [f"{1e3 * e['step']:.2f}", f"{1e3 * e['alone']:.2f}" if many else "–"]
        cells += [f"{1e3 * e[k]:.2f}" if many else "–" for k in ("reduction", "predicted_reduction")]
        cells += [f"{e['images_per_second']:,.0f}"]
        cells += [f"{100 * e[k]:.1f} %" if many else "–" for k in ("efficiency", "predicted_efficiency")]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{k} {result['versions'][k]}" for k in ("torch", "timm"))
    most = max(e["gpus"] for e in result["entries"])
    how = "fp32" if "CPU" in result["hardware"] else "bf16, compiled"
    told = f"{most} x {result['hardware']}, {result['batch']} resident images a GPU, {how}, {versions}, commit "
    told += (
        f"{result['commit'][:8]}, median of {result['rounds']} rounds of {result['steps']} steps, the slowest rank's. "
    )
    told += "Without reduction: all GPUs at work at the same time, each for itself. Reduction: by itself. "
    return "\n".join([*lines, "", told + f"Predicted: a ring at {BUS / 1e9:.0f} GB/s, nothing hidden."])


def draw(results: list[Result], stem: Path) -> list[Path]:
    """Efficiency over the number of GPUs, a panel a model, result and precision of the reduction; dashed: predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple[int, str], list[Result]] = {}
    for i, result in enumerate(results):
        card = result["hardware"].removeprefix("NVIDIA ").split()[0]
        for e in with_predictions(result["entries"]):
            panels.setdefault((i, f"{e['model']}, {card}, {e['reduce']}"), []).append(e)
    parties = {(e["method"], e["m"]) for entries in panels.values() for e in entries}
    colours = list(zip(PALETTE, sorted(parties, key=lambda p: (ORDER.index(p[0]), -p[1])), strict=False))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(RC):
        size = (2.9 * columns, 2.8 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")
        for ax, ((_, title), entries) in zip(axes.flat, panels.items(), strict=False):
            ours = sorted(entries, key=lambda e: e["gpus"])
            for colour, (method, m) in colours:
                points = [e for e in ours if (e["method"], e["m"]) == (method, m)]
                gpus = [e["gpus"] for e in points]
                ax.plot(gpus, [100 * e["efficiency"] for e in points], "o-", color=colour, markersize=4)
                ax.plot(gpus, [100 * e["predicted_efficiency"] for e in points], "--", color=colour, linewidth=1)
            ax.set_xscale("log", base=2)
            numbers = sorted({e["gpus"] for e in ours})
            ax.set_xticks(numbers, [str(n) for n in numbers])
            ax.set_title(title)
            ax.set_xlabel("GPUs")
        for ax in axes[:, 0]:
            ax.set_ylabel("% of N times one GPU")
        for colour, (method, m) in colours:
            axes.flat[-1].plot([], [], "o-", color=colour, markersize=4, label=f"{method}, m = {m}")
        axes.flat[-1].plot([], [], "--", color=SOFT, linewidth=1, label="predicted")
        axes.flat[-1].legend(fontsize=7.5)
        paths = save(figure, stem)
        plt.close(figure)
    return paths
