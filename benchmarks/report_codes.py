"""The same step through everybody's code, in one run on one GPU: table and chart of step.py with --big-vision."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from sam_repro.paper.measured_speeds import stored
from sam_repro.paper.render.numbers import markdown_table
from sam_repro.paper.render.style import METHODS, RC, SOFT, save

Result = dict[str, Any]

# What is computed, and who of ours computes it.
OURS = {
    "vanilla": "ours-vanilla",
    "floor": "ours-floor",
    "one perturbation": "gsam-m{batch}",
    "m = 64": "gsam-m64",
}
NAMES = {
    "timm": "timm's layers, compiled",
    "vanilla": "our layers, compiled",
    "floor": "our layers, compiled",
    "floor-again": "the same again",
    "davda54": "davda54 SAM",
    "juntang": "juntang GSAM",
    "pytorch_optimizer": "pytorch_optimizer SAM",
}


def load_codes(folder: Path | None) -> list[Result]:
    """The results of step.py that have parties of the official JAX code, by file name."""
    return [t for _, t in stored(folder) if any(e.get("method", "").startswith("jax-") for e in t["entries"])]


def what_of(entry: Result) -> str:
    """The key of OURS that an entry is compared with."""
    if entry["m"] == 64 and entry["m"] != entry["batch"]:
        return "m = 64"
    for what in ("vanilla", "floor"):
        if what in entry["method"]:
            return what
    return "vanilla" if entry["method"] == "timm" else "one perturbation"


def who_of(entry: Result) -> str:
    """The party as a reader calls it."""
    method = entry["method"]
    if method in ("gsam", "sam") or method.startswith("ours-"):
        return "this project" + (", SAM" if method == "sam" else "")
    if not method.startswith("jax-"):
        return NAMES.get(method, method)
    words = [w for w in ("scan", "vmap") if f"-{w}" in method]
    words += [{"cudnn": "cuDNN's attention", "bf16": "bf16 residuals"}.get(method.rsplit("-", 1)[-1], "as it is")]
    return f"official JAX, {', '.join(words)}"


def cells_of(result: Result, model: str) -> dict[tuple[str, str], Result]:
    """(what, who) -> entry with `of_ours`, seconds over this project's, in the order of the table."""
    entries = [e for e in result["entries"] if e["model"] == model]
    found = {(what_of(e), who_of(e)): e for e in entries}
    ours = {what: e["seconds"] for (what, who), e in found.items() if who == "this project"}
    ordered = sorted(found, key=lambda key: (list(OURS).index(key[0]), key[1] != "this project", found[key]["seconds"]))
    return {key: found[key] | {"of_ours": found[key]["seconds"] / ours.get(key[0], float("nan"))} for key in ordered}


def models_of(results: list[Result]) -> dict[str, dict[tuple[str, str], Result]]:
    """Model -> its cells."""
    return {m: cells_of(r, m) for r in results for m in dict.fromkeys(e["model"] for e in r["entries"])}


def codes_table(results: list[Result]) -> str:
    """A line per party of every model; under them where and with what they were measured."""
    header = ["model", "step", "code", "ms", "images/s", "GB", "over ours"]
    lines = [
        [model, what, who, f"{1e3 * e['seconds']:.1f}", f"{e['images_per_second']:,.0f}"]
        + [f"{e['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in e else "–", f"{e['of_ours']:.2f}"]
        for model, cells in models_of(results).items()
        for (what, who), e in cells.items()
    ]
    told = []
    for r in results:
        jax = next(e["jax"] for e in r["entries"] if "jax" in e)
        torch = r["versions"]["torch"]
        spread = 100 * statistics.median(max(e["rounds"]) / min(e["rounds"]) - 1 for e in r["entries"])
        text = (
            f"{r['hardware']}, batch {r['batch']} at 224 px, bf16; torch {torch}, jax {jax}; commit {r['commit'][:8]}"
        )
        text += f"; median of {r['rounds']} rounds of {r['steps']} steps, whose median spread is {spread:.1f} %."
        told.append(text + " GB: torch's peak, XLA's plan.")
    return "\n".join([markdown_table(header, lines, text_columns=3), "", *dict.fromkeys(told)])


def draw_codes(results: list[Result], stem: Path) -> list[Path]:
    """Bars per model and step: the time of each code over this project's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = {"vanilla": "vanilla", "one perturbation": "gsam", "m = 64": "gsam_constant"}
    colours = {what: METHODS[method].colour for what, method in methods.items()}
    models = {model: {k: e for k, e in cells.items() if k[0] in colours} for model, cells in models_of(results).items()}
    with matplotlib.rc_context(RC | {"axes.grid.axis": "x"}):
        tallest = max(map(len, models.values()))
        figure, axes = plt.subplots(1, len(models), figsize=(5.2 * len(models), 0.8 + 0.26 * tallest), squeeze=False)
        for ax, (model, cells) in zip(axes.flat, models.items(), strict=True):
            for y, ((what, who), e) in enumerate(cells.items()):
                fill = colours[what] if who == "this project" else "none"
                ax.barh(y, e["of_ours"], height=0.8, facecolor=fill, edgecolor=colours[what], linewidth=1.5)
                ax.text(e["of_ours"] + 0.02, y, f"{who}  {1e3 * e['seconds']:.0f} ms", va="center", fontsize=7.5)
            whats = [what for what, _ in cells]
            ax.set_yticks([whats.index(w) for w in dict.fromkeys(whats)], dict.fromkeys(whats))
            ax.axvline(1, color=SOFT, linewidth=1)
            ax.set_xlim(0, 1.7 * max(e["of_ours"] for e in cells.values()))
            ax.invert_yaxis()
            ax.set_title(model)
            ax.set_xlabel("time of a step over this project's")
        figure.tight_layout()
        paths = save(figure, stem)
        plt.close(figure)
    return paths
