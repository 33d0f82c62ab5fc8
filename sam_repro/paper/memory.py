"""What a run takes of a card's memory, from the trial passes stored in results/benchmarks/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sam_repro.config.memory import GB, Needs, batch_bytes, choices
from sam_repro.config.schema import Config
from sam_repro.paper.measured_speeds import Entry, is_named, stored

FIELDS = ("per_image", "per_group", "sums")  # of Needs, after "fixed"


@dataclass(frozen=True)
class Footprint:
    """Passes that a run can choose from, and what they need."""

    needs: Needs
    sizes: list[int]  # images per pass, the most first

    @property
    def fastest(self) -> float:
        """GB with as many images per pass as make a GPU faster."""
        return self.needs.at(self.sizes[0]) / GB

    @property
    def least(self) -> float:
        """GB with as few as possible: one image, or BatchNorm's group."""
        return min(map(self.needs.at, self.sizes)) / GB

    def chosen(self, budget: float) -> int:
        """Images per pass on a card of so many bytes; 0 where none fit."""
        return next(iter(self.needs.fitting(self.sizes, budget)), 0)


def load_passes(gpu: str, folder: Path | None = None) -> list[Entry]:
    """Stored trial passes, those measured on hardware that is named `gpu` first: activations are alike on all GPUs."""
    entries = [
        (tree, entry) for _, tree in stored(folder) for entry in tree["entries"] if entry.get("kind") == "passes"
    ]
    return [entry for tree, entry in sorted(entries, key=lambda pair: not is_named(pair[0].get("hardware", ""), gpu))]


def footprint(cfg: Config, entries: list[Entry], gpus: int = 1) -> Footprint | None:
    """A run's needs on each of so many GPUs; None where its model was not measured at this image size.

    A method that was not measured takes those of SAM, which makes as many passes at a time.
    """
    perturbed = cfg.optim.perturb != "none"
    same = [e for e in entries if e["model"] == cfg.model.name and e["image_size"] == cfg.data.image_size]
    same = [e for e in same if (e["method"] != "vanilla") == perturbed]
    entry = next((e for e in same if e["method"] == cfg.optim.name), same[0] if same else None)
    batch = cfg.recipe.batch_size // gpus
    if entry is None or not batch:
        return None
    batchnorm = cfg.model.family == "resnet"
    m = min(cfg.optim.m or batch, batch) if perturbed or batchnorm else min(entry["m"], batch)
    needs = Needs(entry["fixed"] + batch_bytes(batch, cfg.data.image_size), *(entry[key] for key in FIELDS), m=m)
    return Footprint(needs, list(choices(batch, m, at_once=perturbed and not batchnorm, divisible=not batchnorm)))
