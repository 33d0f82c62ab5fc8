"""The data of a run: its loaders, its share of the batch, and how many steps follow from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sam_repro.config.checks import check_warmup
from sam_repro.config.schema import Config
from sam_repro.data.evalsets import canonical, require
from sam_repro.data.images.augment import cutout, mixup
from sam_repro.data.loaders.build import Loader, build_loader
from sam_repro.distributed.ranks import Ranks
from sam_repro.errors import UserError, plural
from sam_repro.training.run import Run


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: Loader
    evaluation: dict[str, Loader]  # by split; the first one scores the checkpoints
    test_sets: list[str]  # counted once, after training
    local_batch: int  # images per step of this rank
    total: int  # steps of the run

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training split."""
        return len(self.train)


def open_data(cfg: Config, run: Run) -> Data:
    """Open every loader that the run needs. They are closed with the run.

    Raises:
        UserError: for images that are missing, a batch that does not divide, or fewer images than a batch.
    """
    ranks, recipe = run.ranks, cfg.recipe
    local_batch = split_batch(cfg, ranks.world)
    train = run.closing(open_split(cfg, ranks, "train", training=True, batch_size=local_batch))
    splits = ["minival", "val"] if cfg.data.train_fraction < 1 else ["val"]
    size = cfg.data.eval_batch_size
    evaluation = {s: run.closing(open_split(cfg, ranks, s, training=False, batch_size=size)) for s in splits}
    test_sets = require(cfg.data, [name for name in canonical(cfg.data.eval_sets) if name != "val"])
    if len(train) == 0:
        raise UserError(
            f"the training split has {plural(train.samples, 'image')}, fewer than one batch of {recipe.batch_size}: "
            "lower recipe.batch_size"
        )
    total = recipe.steps or max(1, int(recipe.epochs * train.samples / recipe.batch_size))
    check_warmup(cfg, total)
    return Data(train, evaluation, test_sets, local_batch, total)


def open_split(cfg: Config, ranks: Ranks, split: str, *, training: bool, batch_size: int) -> Loader:
    """The loader of one split, "train" | "minival" | "val", for this rank."""
    return build_loader(
        cfg.data,
        cfg.augment,
        split=split,  # pyright: ignore[reportArgumentType]
        training=training,
        batch_size=batch_size,
        seed=cfg.seed,
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
    )


def split_batch(cfg: Config, world: int) -> int:
    """Images per rank and step."""
    batch, m = cfg.recipe.batch_size, cfg.optim.m if cfg.optim.perturb != "none" else 1
    local, rest = divmod(batch, world)
    if rest or local % m:
        why = f"recipe.batch_size={batch} does not divide over {plural(world, 'process')}"
        if not rest:
            why = f"optim.m={m} does not divide the batch of {plural(local, 'image')} per process"
        fitting = [str(n) for n in range(1, batch + 1) if batch % (n * m) == 0 and n <= 1024]
        remedy = f"numbers of processes that fit: {', '.join(fitting)}"
        if not fitting:
            remedy = f"set recipe.batch_size to a multiple of {m}, or lower optim.m"
        raise UserError(f"{why}; {remedy}")
    if cfg.augment.mixup and (cfg.optim.m == 1 or local % (cfg.optim.m or local)):
        per_process = plural(local, "image")
        why = "mixes nothing" if cfg.optim.m == 1 else f"does not divide the batch of {per_process} per process"
        raise UserError(f"augment.mixup mixes within groups of optim.m={cfg.optim.m} images, which {why}")
    return local


def batches(loader: Loader, step: int, total: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of updates `step` ... `total` - 1, starting in the middle of an epoch if necessary."""
    while step < total:
        epoch, start = divmod(step, len(loader))
        for batch in loader.epoch(epoch, start):
            yield batch
            step += 1
            if step == total:
                return


def augment(cfg: Config, images: Tensor, labels: Tensor, *, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Apply cutout and mixup to a batch on the device, if configured.

    Args:
        images: (B, 3, H, W) uint8, this rank's.
        labels: (B,) class numbers.

    Returns:
        images as they came in; labels as they were, or with mixup the targets (B, classes).
    """
    if cfg.augment.cutout:
        hide = {"side": cfg.augment.cutout, "mean": cfg.data.mean, "first": rank * len(images)}
        images = cutout(images, **hide, seed=cfg.seed, step=step)
    if cfg.augment.mixup:
        mix = {"p": cfg.augment.mixup, "classes": cfg.data.num_classes, "m": cfg.optim.m or len(images)}
        images, labels = mixup(images, labels, **mix, seed=cfg.seed, step=step, rank=rank)
    return images, labels
