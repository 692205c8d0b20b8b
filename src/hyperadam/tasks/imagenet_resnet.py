"""Residual networks for ImageNet."""

from __future__ import annotations

from torch import Tensor, nn

STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks of each stage, by depth."""

WIDENING = 4
"""A deep network's block gives this many times the channels of its 3×3 convolution."""


def _normalised(fan_in: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(fan_in, channels, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class _Block(nn.Module):
    def __init__(self, fan_in: int, channels: int, stride: int, *, deep: bool) -> None:
        super().__init__()
        fan_out = WIDENING * channels if deep else channels
        if deep:
            layers = [
                *_normalised(fan_in, channels, 1),
                nn.ReLU(),
                *_normalised(channels, channels, 3, stride),
                nn.ReLU(),
                *_normalised(channels, fan_out, 1),
            ]
        else:
            layers = [
                *_normalised(fan_in, channels, 3, stride),
                nn.ReLU(),
                *_normalised(channels, channels, 3),
            ]
        self.layers = nn.Sequential(*layers)
        same = stride == 1 and fan_in == fan_out
        self.shortcut = nn.Sequential(*([] if same else _normalised(fan_in, fan_out, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.layers(x) + self.shortcut(x)
        return total.relu()


class ImageNetResNet(nn.Module):
    """Four stages of blocks with 64 to 512 channels; a 1×1 convolution where a shortcut changes.

    Blocks have two 3×3 convolutions up to depth 34, and one between two of 1×1 from 50 on. The 3×3
    convolution has the stride, as is usual today, where the source had it in the 1×1 before.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, table 1; the
    stride as in Goyal et al., "Accurate, large minibatch SGD", 2017, section 5.1; initial
    convolutions as in He et al., "Delving deep into rectifiers", ICCV 2015.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: outputs.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_normalised(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
        )
        deep = depth >= 50
        blocks: list[nn.Module] = []
        fan_in = 64
        for stage, count in enumerate(STAGES[depth]):
            channels = 64 * 2**stage
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(_Block(fan_in, channels, stride, deep=deep))
                fan_in = WIDENING * channels if deep else channels
        self.blocks = nn.Sequential(*blocks)
        self.output = nn.Linear(fan_in, num_classes)
        for module in self.modules():
            # Drawing numbers that are not stored imports torch's compiler, for seconds.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (batch, 3, height, width); 224×224 at the source."""
        x = self.blocks(self.stem(images))
        logits: Tensor = self.output(x.mean(dim=(2, 3)))
        return logits
