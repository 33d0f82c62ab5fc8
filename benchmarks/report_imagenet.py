"""Tables of docs/IMAGENET.md: what Table 1 costs by measured speeds, and what the dress rehearsal measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam_repro.paper.estimate import cost_of
from sam_repro.paper.ledger_join import join_table
from sam_repro.paper.measured_speeds import load_rates, stored
from sam_repro.paper.memory import footprint, load_passes
from sam_repro.paper.render.numbers import hours_words, markdown_table
from sam_repro.paper.spec import load_table

PRICE = 2.5  # dollars per GPU-hour: an assumption, which the page names
CARDS = ("h100", "h200")
METHODS = ("Vanilla", "SAM", "GSAM")
NOT_RUN = "not run"
Result = dict[str, Any]


def load_costs(folder: Path | None) -> list[Result]:
    """One run of each row of Table 1: model, method, hours by card, memory."""
    rates, passes = {card: load_rates(card, folder) for card in CARDS}, load_passes("h200", folder)
    found = []
    for outcome in join_table(load_table("table1"), seeds=1):
        run = outcome.runs[0]
        hours = {card: cost_of(run, rates[card]).hours for card in CARDS}
        needs = footprint(run.config, passes)
        memory = (needs.least, needs.fastest) if needs else None
        row = outcome.row
        found.append({"model": row.model, "method": row.method.split(" (")[0], "hours": hours, "memory": memory})
    return found


def costs_table(results: list[Result]) -> str:
    """A line per model: hours of one GPU by method, then days of eight, price and memory of GSAM."""
    header = ["model", *(f"{card.upper()}: {method}" for card in CARDS for method in METHODS)]
    header += ["GSAM: days on 8 H100", "$", "GB of a GPU"]
    models: dict[str, dict[str, Result]] = {}
    for r in results:
        models.setdefault(r["model"], {})[r["method"]] = r
    lines = []
    for model, methods in models.items():
        hours = [methods[method]["hours"][card] for card in CARDS for method in METHODS]
        gsam, memory = methods["GSAM"]["hours"]["h100"], methods["GSAM"]["memory"]
        price = [f"{gsam / 8 / 24:.2f}", f"{gsam * PRICE:,.0f}"] if gsam else [NOT_RUN] * 2
        lines.append([model, *(hours_words(h) if h else NOT_RUN for h in hours), *price])
        lines[-1].append("{:.1f} to {:.1f}".format(*memory) if memory else NOT_RUN)
    return markdown_table(header, lines)


def load_rehearsal(folder: Path | None) -> list[Result]:
    """What rehearsal.py measured on processors, by file name."""
    return [tree for _, tree in stored(folder, "steps") if tree.get("kind") == "rehearsal"]


def rehearsal_table(results: list[Result]) -> str:
    """A line per step, and one of provenance, for each machine."""
    tables = []
    for r in results:
        lines = [[what, *cells] for what, *cells in rehearsal_lines(r["steps"])]
        table = markdown_table(["step", "seconds", "peak, MB", "also"], lines)
        commits = ", ".join(sorted({step["commit"][:8] for step in r["steps"].values()}))
        tables.append(f"{table}\n\n{r['hardware']}, {r['cores']} cores, commit {commits}, {r['date']}")
    return "\n\n".join(tables) or NOT_RUN


def rehearsal_lines(steps: Result) -> list[list[str]]:
    """The cells of each step that was run."""
    lines = []
    for name, found in layouts_of(steps.get("write", {})).items():
        first, again = found["first"], found["again"]
        also = f"{first['images_per_second']:,.0f} images/s"
        lines.append([f"`write imagenet` from {LAYOUTS[name]}", seconds(first), mb(first), also])
        lines.append([f"the same, up to date ({name})", seconds(again), mb(again), "nothing is written"])
    for name in ("killed", "full"):
        if found := steps.get(name):
            count = f" of {found['images']:,} images" if "images" in found else ""
            why = f"SIGKILL at {found['killed_after_s']:.0f} s" if name == "killed" else "a full disk"
            also = f"after {why}{count}; {same(found)}"
            lines.append(["the same command goes on", seconds(found["again"]), mb(found["again"]), also])
    for name, found in layouts_of(steps.get("open", {})).items():
        opened = f"{found['open_train_s'] + found['open_val_s']:.1f}"
        also = f"first batch {found['first_batch_s']:.2f} s, order of an epoch {found['order_s']:.2f} s, "
        also += f"from its middle {found['middle_s']:.2f} s; {found['bytes_per_image']:.0f} bytes per image, "
        also += f"{found['cpu_s']:.1f} s of a core in all"
        where = name.replace("from_tars", "`.beton`").replace("folders", "class folders").replace("1 processes", "one")
        lines.append([f"open, {where}", opened, f"{found['private_peak_mb']:.0f} each", also])
    if found := steps.get("folders"):
        also = f"{found['files']:,} files, {found['bytes_per_image']:.0f} bytes per image"
        lines.append(["list the class folders", f"{found['seconds']:.1f}", f"{found['held_mb']:.0f} held", also])
    for name, found in layouts_of(steps.get("evaluate", {})).items():
        also = f"a toy's whole run; counted {found['evals']['val']['total']:,} images"
        also += f" with {name}".replace("1 processes", "one process")
        lines.append(["train one step, evaluate", seconds(found), mb(found), also])
    if found := steps.get("log"):
        also = f"{found['lines']:,} lines, {found['mb']:.0f} MB, a line per step"
        lines.append(
            ["resume `log.jsonl` of 300 epochs", f"{found['start_s']:.1f}", f"{found['held_mb']:.1f} held", also]
        )
    if found := steps.get("checkpoint"):
        also = f"{found['bytes'] / 1e9:.2f} GB; load {found['load_s']:.1f} s"
        lines.append(["save ViT-B/32 and AdamW's state", f"{found['save_s']:.1f}", "–", also])
    return lines


LAYOUTS = {"folders": "class folders", "tars": "the tar of tars", "flat": "flat validation images (val only)"}


def layouts_of(step: Result) -> dict[str, Result]:
    """The parts of a step, without its other facts."""
    return {name: part for name, part in step.items() if isinstance(part, dict)}


def seconds(part: Result) -> str:
    """Of a command."""
    return f"{part['seconds']:.1f}"


def mb(part: Result) -> str:
    """A command's peak."""
    return f"{part['peak_mb']:,.0f}"


def same(part: Result) -> str:
    """Whether the file is that of the undisturbed command."""
    return "the file is equal" if part["equal_to_undisturbed"] else "the file DIFFERS"


def load_gpu(folder: Path | None) -> list[Result]:
    """What rehearsal_gpu.py measured, by file name."""
    return [tree for _, tree in stored(folder, "stages") if tree.get("kind") == "rehearsal-gpu"]


def gpu_table(results: list[Result]) -> str:
    """A line per model of each machine; `not run` where there is none."""
    header = ["model", "images/s, resident", "images/s, from the file", "of resident", "first step, s", "GPU, GB"]
    header += ["host, GB", "exit after USR2, s"]
    lines, notes = [], []
    for r in results:
        for short in ("b32", "b16"):
            lines.append([f"vit_{short}", *gpu_cells(r["stages"], short)])
        notes.append(gpu_note(r))
    lines = lines or [[f"vit_{short}", *[NOT_RUN] * 7] for short in ("b32", "b16")]
    return "\n\n".join([markdown_table(header, lines), *notes])


def gpu_cells(stages: Result, short: str) -> list[str]:
    """The cells of a model."""
    resident, typed = stages.get(f"resident_{short}"), stages.get(short)
    speed = f"{resident['images_per_second']:,.0f}" if resident else NOT_RUN
    if typed is None:
        return [speed, *[NOT_RUN] * 6]
    share = f"{100 * typed['images_per_second'] / resident['images_per_second']:.1f} %" if resident else NOT_RUN
    peaks = typed["peaks"]
    cells = [speed, f"{typed['images_per_second']:,.0f}", share, str(typed["first_step_s"]), f"{peaks['gpu_gb']:.1f}"]
    return [*cells, f"{peaks['host_private_gb']:.1f}", f"{typed['seconds_to_leave']:.1f}"]


def gpu_note(result: Result) -> str:
    """Hardware, the data and the proof about the samples."""
    stages = result["stages"]
    text = f"{result['hardware']}, {result['cores']} cores, torch {result['versions']['torch']}, "
    text += f"commit {result['commit'][:8]}, {result['date']}."
    if made := stages.get("make"):
        train = made["train"]
        text += f" {train['samples']:,} images of {train['bytes_per_image']:,} bytes"
        pointing = f"; {train['stored']:,} are stored, the others point at them."
        text += pointing if train["stored"] < train["samples"] else "."
    if found := stages.get("restart"):
        samples = found["samples"]
        wrong = f"{len(samples['wrong'])} of {samples['steps_seen']} steps had other samples than those due"
        text += f" Restarts (SIGUSR2, SIGKILL, from step {samples['first']} to {samples['last']}): {wrong}."
    else:
        text += f" Restarts: {NOT_RUN}."
    return text


def log_lines(results: list[Result]) -> str:
    """What the command as typed said first."""
    said = [r["stages"]["b32"]["said"] for r in results if "said" in r["stages"].get("b32", {})]
    return "\n".join(["```", *said[0], "```"]) if said else NOT_RUN
