"""Residual networks for 32×32 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, fan_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, channels - fan_in
        self.conv1 = nn.Conv2d(fan_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        total: Tensor = out + F.pad(shortcut, (0, 0, 0, 0, 0, self.more))
        return total.relu()


class CifarResNet(nn.Module):
    """Three stages of blocks with 16, 32 and 64 channels; shortcuts padded with zeros.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2;
    initial convolutions as in He et al., "Delving deep into rectifiers", ICCV 2015.

    Args:
        depth: 6 n + 2 layers: 20, 32, 44, 56, 110.
        num_classes: outputs.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks = []
        fan_in = 16
        for stage, channels in enumerate((16, 32, 64)):
            for number in range((depth - 2) // 6):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(_Block(fan_in, channels, stride))
                fan_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.output = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (batch, 3, 32, 32)."""
        x = self.blocks(self.norm(self.conv(images)).relu())
        logits: Tensor = self.output(x.mean(dim=(2, 3)))
        return logits
