"""Training through the peers' optimizers beside ours, as benchmarks/peers.py stored it, as a table."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from sam_repro.paper.measured_speeds import stored
from sam_repro.paper.render.sheet import spread_of
from sam_repro.paper.statistics import compare, interval

PAIRS = (("ours-sam", "davda54"), ("ours-gsam", "juntang"))
HEAD = "ours | peer | ours, % | peer, % | difference | ms a step | peer / ours | seconds (first seed)"


def load(folder: Path | None = None) -> list[dict[str, Any]]:
    """The stored results, by file name."""
    return [tree for _, tree in stored(folder, "runs") if tree.get("kind") == "peers"]


def table(result: dict[str, Any]) -> str:
    """Ours beside the peer's: accuracies and times of the seeds that both have."""
    lines = [f"| {HEAD} |", "|---|---|" + "--:|" * 6]
    for names in PAIRS:
        found = [{r["seed"]: r for r in result["runs"] if r["party"] == name} for name in names]
        ours, peer = ({s: runs[s] for s in sorted(found[0].keys() & found[1].keys())} for runs in found)
        if not ours:
            continue
        accuracy = [{s: 100 * r["correct"] / r["total"] for s, r in runs.items()} for runs in (ours, peer)]
        tested = compare(accuracy[1], accuracy[0])
        assert tested is not None
        p = "" if tested.p is None else f", p = {tested.p:.2g}"
        step = [statistics.median(r["steady_ms"] for r in runs.values()) for runs in (ours, peer)]
        cells = [*names, *(spread_of(interval(list(a.values())), 2) for a in accuracy)]
        cells += [f"{tested.difference:+.2f} (n = {tested.n}{p})", f"{step[0]:.2f}, {step[1]:.2f}"]
        cells += [f"{step[1] / step[0]:.3f}", ", ".join(map(seconds, (ours, peer)))]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{k} {result['versions'][k]}" for k in ("python", "torch", "timm"))
    told = f"{result['hardware']}; {versions}; commit {result['commit'][:8]}; `{' '.join(result['overrides'])}`"
    return "\n".join([*lines, "", told])


def seconds(runs: dict[int, dict[str, Any]]) -> str:
    """Median seconds of a party's training loop, and those of its first seed, which may have compiled."""
    whole = [run["seconds"] for run in runs.values()]
    return f"{statistics.median(whole):.1f} ({whole[0]:.1f})"
