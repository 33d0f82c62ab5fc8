"""The parties of step.py: a model, a method and an engine or a peer's optimizer, as a step to call again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import nn

from sam_repro.config.compose import compose_config
from sam_repro.config.schema import Config
from sam_repro.distributed.ranks import Ranks
from sam_repro.models.build import build_model
from sam_repro.models.layers.attention import ShortAttention
from sam_repro.models.layers.grouped import GroupedLayerNorm, GroupedLinear
from sam_repro.models.layers.max_pool import StemPool
from sam_repro.models.layers.patch_linear import PatchLinear
from sam_repro.models.layers.stem_conv import StemConv
from sam_repro.models.objective import loss_of
from sam_repro.optim import build_base, decay_groups
from sam_repro.training.method import gradient_step

Party = Callable[[], None]

# This project's layers and those of timm that they stand for.
OURS: dict[type, type] = {
    PatchLinear: nn.Conv2d,
    StemConv: nn.Conv2d,
    StemPool: nn.MaxPool2d,
    ShortAttention: Attention,
}
OURS |= {GroupedLinear: nn.Linear, GroupedLayerNorm: nn.LayerNorm}


class Bench:
    """One model on one device and everything that the parties share."""

    def __init__(self, name: str, batch: int, size: int, device: str):
        self.name, self.batch, self.size = name, batch, size
        self.ranks = Ranks(0, 1, 0, 1, torch.device(device))
        self.device, self.gpu = self.ranks.device, self.ranks.device.type == "cuda"
        self.images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=self.device)
        self.labels = torch.randint(0, 1000, (batch,), device=self.device)

    def config(self, *overrides: str) -> Config:
        fixed = [f"recipe.batch_size={self.batch}", f"train.device={self.device.type}", "train.dtype=auto"]
        fixed += [f"data.image_size={self.size}", f"data.eval_resize={self.size}"]
        return compose_config([f"model={self.name}", *fixed, *overrides])

    def model(self, cfg: Config) -> torch.nn.Module:
        torch.manual_seed(0)
        model = build_model(cfg.model, num_classes=1000, image_size=self.size, loss=cfg.recipe.loss).to(self.device)
        return model.to(memory_format=torch.channels_last) if cfg.model.family == "resnet" else model

    def base(self, cfg: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
        groups = decay_groups(model.named_parameters(), cfg.recipe.weight_decay)
        return build_base(cfg.recipe.base, groups, lr=1e-4)

    # ---- parties -----------------------------------------------------------------------------------------------------

    def plain(self, passes: int, *, timm: bool = False) -> Party:
        """The obvious loop: compiled, autocast, .backward()."""
        cfg = self.config("optim=vanilla")
        model = self.model(cfg)
        if timm:
            for module in model.modules():  # every layer of ours is a subclass of what timm built
                module.__class__ = OURS.get(type(module), type(module))
        base = self.base(cfg, model)
        forward = self.plain_loss(cfg, model)

        def step() -> None:
            for _ in range(passes):
                base.zero_grad(set_to_none=True)
                forward().backward()
            base.step()

        return step

    def plain_loss(self, cfg: Config, model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        loss = loss_of(cfg)
        layout = torch.channels_last if cfg.model.family == "resnet" else torch.contiguous_format

        def forward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.gpu):
                x = (images.float() / 127.5 - 1).contiguous(memory_format=layout)
                z = model(x)
            return loss(z.float(), labels)

        compiled = torch.compile(forward, dynamic=False) if self.gpu else forward
        return lambda: compiled(self.images, self.labels)

    def engine(self, *overrides: str, passes: int = 1) -> Party:
        """This project's engine; `passes` > 1 repeats the gradient before the one base-optimizer step."""
        return self.engine_and_gradient(*overrides, passes=passes)[0]

    def engine_and_gradient(self, *overrides: str, passes: int = 1) -> tuple[Party, torch.Tensor]:
        """The same, and the flat buffer that holds the gradient after a call."""
        cfg = self.config(*overrides)
        model = self.model(cfg)
        base = self.base(cfg, model)
        step = gradient_step(cfg, model, self.ranks, local_batch=self.batch, bf16=self.gpu)

        def run() -> None:
            for _ in range(passes):
                step(self.images, self.labels, rho=0.1)
            base.step()

        return run, step.flat

    def davda54(self) -> Party:
        from sam import SAM  # pyright: ignore[reportMissingImports]

        return self.two_steps(SAM)

    def pytorch_optimizer(self) -> Party:
        from pytorch_optimizer import SAM  # pyright: ignore[reportMissingImports]

        return self.two_steps(SAM)

    def two_steps(self, sam: Callable[..., Any]) -> Party:
        """The loop of davda54's README, which others took over with its two methods."""
        cfg = self.config("optim=sam")
        model = self.model(cfg)
        kind = torch.optim.AdamW if cfg.recipe.base == "adamw" else torch.optim.SGD
        optimizer = sam(model.parameters(), kind, rho=0.1, lr=1e-4, fused=True)
        loss = self.plain_loss(cfg, model)

        def step() -> None:
            loss().backward()
            optimizer.first_step(zero_grad=True)
            loss().backward()
            optimizer.second_step(zero_grad=True)

        return step

    def juntang(self) -> Party:
        from gsam import GSAM, ProportionScheduler  # pyright: ignore[reportMissingImports]

        cfg = self.config("optim=gsam")
        model = self.model(cfg)
        base = self.base(cfg, model)
        lr = torch.optim.lr_scheduler.ConstantLR(base, factor=1.0)
        rho = ProportionScheduler(lr, max_lr=1e-4, min_lr=0.0, max_value=0.1, min_value=0.0)
        optimizer = GSAM(model.parameters(), base_optimizer=base, model=model, gsam_alpha=0.4, rho_scheduler=rho)
        layout = torch.channels_last if cfg.model.family == "resnet" else torch.contiguous_format
        compiled = torch.compile(model, dynamic=False) if self.gpu else model
        loss = loss_of(cfg)

        def logits(images: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.gpu):
                return compiled((images.float() / 127.5 - 1).contiguous(memory_format=layout)).float()

        def step() -> None:
            def closure():
                optimizer.base_optimizer.zero_grad()
                with torch.enable_grad():
                    z = logits(self.images)
                    value = loss(z, self.labels)
                value.backward()
                return z, value.detach()

            optimizer.step(closure)

        return step
