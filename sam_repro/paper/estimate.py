"""What a run costs: images, EFLOP, GPU-hours and money, from speeds measured on the hardware."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from sam_repro.config.schema import Config
from sam_repro.errors import UserError
from sam_repro.paper.measured_speeds import (
    Entry,
    Rate,
    forward_gflop,
    is_named,
    load_rates,
    loader_rate,
    passes_of,
    step_rate,
)
from sam_repro.paper.memory import footprint
from sam_repro.paper.outcomes import Outcome
from sam_repro.paper.render.numbers import number
from sam_repro.paper.runs import Run
from sam_repro.paper.spec import Table
from sam_repro.records.ledger import Row

# Training images of the data sets, as published; Flowers and Pets: train + val.
TRAIN_IMAGES = {"imagenet": 1_281_167, "cifar10": 50_000, "cifar100": 50_000, "flowers": 2_040, "pets": 3_680}
TRAIN_IMAGES |= {"imagenette": 9_469, "imagewoof": 9_025, "digits": 1_438, "synthetic": 256, "tin32": 100_000}


@dataclass(frozen=True)
class Cost:
    """What one run, or several, costs; None where it is not known."""

    images: float  # that pass through the model once forward and backward: steps x batch
    eflop: float | None
    hours: float | None  # GPU-hours
    how: str
    forward: float | None = None  # GFLOP of one image's forward pass
    passes: float | None = None  # of the method


def steps_of(cfg: Config) -> int:
    """Updates of a run, as sam_repro.training.main counts them."""
    if cfg.recipe.steps is not None:
        return cfg.recipe.steps
    if cfg.data.name not in TRAIN_IMAGES:
        raise UserError(f"the number of training images of data={cfg.data.name} is not known; set recipe.steps")
    samples = round(TRAIN_IMAGES[cfg.data.name] * cfg.data.train_fraction)
    return max(1, int(cfg.recipe.epochs * samples / cfg.recipe.batch_size))


def own_hours(rows: Iterable[Row], gpu: str) -> list[float]:
    """Hours of a row's finished runs on some hardware."""
    return [row["hours"] for row in rows if row["status"] == "done" and is_named(row["hardware"], gpu)]


def cost_of(r: Run, entries: list[Entry], tflops: float | None = None, *, own: Sequence[float] = ()) -> Cost:
    """What one run costs on the hardware of `entries`; `own`: hours of other seeds of its row there."""
    cfg = r.config
    images = float(steps_of(cfg) * cfg.recipe.batch_size)
    forward, passes = forward_gflop(cfg.model.name, cfg.data.image_size), passes_of(cfg)
    eflop = None if forward is None else images * 3 * forward * passes * 1e-9
    rate = slower(step_rate(cfg, entries), loader_rate(cfg, entries))
    hours, how = (images / rate.images_per_second / 3600, rate.how) if rate else (None, "not measured")
    if own:
        hours, how = fmean(own), f"its own ({len(own)} finished)"
    elif rate is None and tflops and eflop is not None:
        hours, how = eflop * 1e6 / tflops / 3600, f"assumed {tflops:g} TFLOP/s"
    return Cost(images, eflop, hours, how, forward, passes)


def slower(step: Rate | None, loader: Rate | None) -> Rate | None:
    """The speed of the slower of the two; the step's alone where the loader was not measured; else unknown."""
    if step is None:
        return None
    if loader is None:
        return Rate(step.images_per_second, f"step {step.how}, loader not measured")
    if loader.images_per_second < step.images_per_second:
        return Rate(loader.images_per_second, f"loader-bound, {loader.how}")
    return Rate(step.images_per_second, f"step {step.how}")


HEADER = (
    f"{'runs':>4} {'images':>10} {'GFLOP':>6} {'passes':>6} {'EFLOP':>8} {'GPU-hours':>10} {'days':>7} {'price':>8}"
)
HEADER += f" {'actual h':>12} {'GB':>11}"  # least to fastest
ALL = "of these, with a known speed"  # the longest name under the rows


def line_of(o: Outcome, costs: list[Cost], gpus: int, price: float | None, memory: str) -> str:
    """What a row costs, all its seeds together, with the hours of the runs that are finished; and its `memory`."""
    actual = f"{sum(row.get('hours', 0.0) for row in o.ledger):.2f} ({len(o.ledger)})" if o.ledger else "–"
    how = costs[0].how if costs else "shared with a row above, finished, or nothing to run"
    how = f"after {o.row.tuned.partition(':')[0]}" if o.row.tuned and not o.runs else how
    one = costs[0] if costs else Cost(0, None, None, "")
    arithmetic = f"{number(one.forward, '.3g'):>6} {number(one.passes, '.3g'):>6}"
    return f"{len(costs):>4} {figures(add(costs), arithmetic, gpus, price)} {actual:>12} {memory}  {how}"


def memory_cells(o: Outcome, passes: list[Entry], gpus: int, card: float | None) -> str:
    """GB of one of `gpus` GPUs, with as few images per pass as possible and with the fastest number.

    Given the bytes of a `card`, also the images per pass that a run on it would take.
    """
    footprints = [f for r in o.runs if (f := footprint(r.config, passes, gpus)) is not None]
    gigabytes = (
        f"{min(f.least for f in footprints):.1f}–{max(f.fastest for f in footprints):.1f}" if footprints else "–"
    )
    if card is None:
        return f"{gigabytes:>11}"
    images = min(f.chosen(card) for f in footprints) if footprints else None
    return f"{gigabytes:>11} {'–' if images is None else images or 'no':>8}"


def figures(cost: Cost, arithmetic: str, gpus: int, price: float | None) -> str:
    """Images, GFLOP and passes, EFLOP, hours, days and price in columns."""
    hours = cost.hours
    cells = [f"{cost.images:>10.3g}", arithmetic, f"{number(cost.eflop, '.3g'):>8}"]
    cells += [f"{hours:>10.4g}", f"{hours / gpus / 24:>7.3g}"] if hours is not None else [f"{'–':>10}", f"{'–':>7}"]
    cells.append(f"{hours * price:>8.5g}" if hours is not None and price is not None else f"{'–':>8}")
    return " ".join(cells)


def add(costs: Iterable[Cost]) -> Cost:
    """The sum; unknown as soon as one part is."""
    costs = list(costs)
    eflops, hours = [c.eflop for c in costs], [c.hours for c in costs]
    return Cost(
        sum(c.images for c in costs),
        None if None in eflops else sum(e for e in eflops if e is not None),
        None if None in hours else sum(h for h in hours if h is not None),
        "",
    )


def summary(costs: list[Cost], width: int, gpus: int, price: float | None) -> str:
    """The total, and the part of it that is known where not all is."""
    known = [c for c in costs if c.hours is not None]
    blank = " " * 13
    lines = [f"  {'all, shared runs once':<{width}} {len(costs):>4} {figures(add(costs), blank, gpus, price)}"]
    if known and len(known) < len(costs):
        lines.append(f"  {ALL:<{width}} {len(known):>4} {figures(add(known), blank, gpus, price)}")
    lines.append("  EFLOP = images x GFLOP of a forward pass x 3 (backward: twice the forward) x passes / 10^9")
    return "\n".join(lines)


def row_costs(table: Table, outcomes: list[Outcome], entries: list[Entry]) -> dict[str, Cost]:
    """{row id: cost of all its runs}, for the report."""
    return {o.row.id: add(cost_of(r, entries) for r in o.runs) for o in outcomes if o.runs}


def estimated_and_actual(table: Table, outcomes: Iterable[Outcome]) -> list[list[object]]:
    """Cells of a line per hardware of known speed: hours of the finished runs, estimated and actual."""
    runs = {r.run_id: r for o in outcomes for r in o.runs}
    rows = {row["run_id"]: row for o in outcomes for row in o.ledger if row["status"] == "done"}
    lines = []
    for hardware in dict.fromkeys(row["hardware"] for row in rows.values()):
        entries = load_rates(hardware)
        here = [(row, cost_of(runs[i], entries).hours) for i, row in rows.items() if row["hardware"] == hardware]
        known = [(row, hours) for row, hours in here if hours is not None and row.get("hours")]
        if known:
            estimated, actual = sum(hours for _, hours in known), sum(row["hours"] for row, _ in known)
            ratios = [hours / row["hours"] for row, hours in known]
            sharing = "–".join(map(str, sorted({row.get("sharing", 1) for row, _ in known})))
            cells = [table.title, hardware, sharing, len(known), f"{estimated:.3f}", f"{actual:.3f}"]
            lines.append([*cells, f"{estimated / actual:.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}"])
    return lines
