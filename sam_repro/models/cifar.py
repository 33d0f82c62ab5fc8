"""Networks for 32-pixel images, which timm lacks: ResNets with a 3x3 stem, and Wide ResNets."""

from __future__ import annotations

import timm
import torch.nn.functional as F
from torch import Tensor, nn


def small_stem_resnet(name: str, **kwargs) -> nn.Module:
    """timm's ResNet `name` with a 3x3 stem of stride 1 and no pooling after it (kuangliu/pytorch-cifar).

    11,173,962 parameters for resnet18 and 10 classes.
    """
    model = timm.create_model(name, **kwargs)
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class WideBlock(nn.Module):
    """BN, ReLU, 3x3; BN, ReLU, 3x3; the shortcut branches off after the first ReLU where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(x))
        short = x if self.shortcut is None else self.shortcut(y)
        return short + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """WRN-depth-width (Zagoruyko & Komodakis 2016), without dropout. 36,479,194 parameters for 28-10 and 10 classes."""

    def __init__(self, num_classes: int = 10, depth: int = 28, width: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest:
            raise TypeError(f"the depth of a Wide ResNet is 6 n + 4, not {depth}")
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        layers, channels = [], 16
        for stage, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(blocks):
                layers.append(WideBlock(channels, stage * width, stride if block == 0 else 1))
                channels = stage * width
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Linear:
        """The head, as timm's models call it."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, classes)."""
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


# by the name in configs/model/<name>.yaml, in the place of a timm name
CIFAR_MODELS = {
    "resnet18_cifar": lambda **kwargs: small_stem_resnet("resnet18", **kwargs),
    "resnet50_cifar": lambda **kwargs: small_stem_resnet("resnet50", **kwargs),
    "wide_resnet": WideResNet,
}
