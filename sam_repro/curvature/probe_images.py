"""The images and the loss that the curvature of a run is measured with."""

from __future__ import annotations

from torch import nn

from sam_repro.config.schema import Config
from sam_repro.data.loaders.build import build_loader
from sam_repro.distributed.ranks import Ranks
from sam_repro.models.objective import objective_of
from sam_repro.optim.hessian import Batch, Hessian


def probe_batches(cfg: Config, ranks: Ranks, *, images: int, batch: int, seed: int = 0) -> list[Batch]:
    """This rank's share of a class-balanced sample of the training split, in batches that stay on the device.

    The sample depends on `seed` and the data, not on the ranks, the batches or the seed of the run. Images are
    centre-cropped as in evaluation; labels are those of training, noise included.
    """
    loader = build_loader(
        cfg.data, cfg.augment, split="train", training=False, batch_size=batch, seed=seed,
        rank=ranks.rank, world=ranks.world, device=ranks.device, sample=images,
    )  # fmt: skip
    try:
        return list(loader.epoch(0))
    finally:
        loader.close()


def loss_hessian(cfg: Config, model: nn.Module, batches: list[Batch], ranks: Ranks) -> Hessian:
    """The Hessian of the training loss over these images, in fp32, on all ranks; the model must be in eval mode."""
    objective = objective_of(cfg, model, ranks.device, bf16=False)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Over many batches both ways cost the same work, but a convolution's second backward pass is itself made of
    # convolutions with kernels as large as the image, for which GPUs have no fast code.
    mode = "forward" if cfg.model.family == "resnet" else "reverse"
    return Hessian(objective, params, batches, all_reduce=ranks.sum_ if ranks.world > 1 else None, mode=mode)
