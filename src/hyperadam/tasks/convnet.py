"""The papers' convolutional networks."""

from __future__ import annotations

from torch import Tensor, nn

HIDDEN = 64


class ConvNet(nn.Module):
    """Blocks of two 3×3 convolutions and a 2×2 maximum, then linear layers; relu between them.

    CNN-1, ``c-c-p-f``: one block of 16 channels. CNN-2, ``c-c-p-c-c-p-f-f``: blocks of 16 and 32,
    and a hidden layer of 64.

    Args:
        channels: of the images.
        size: their height and width.
        num_classes: outputs.
        blocks: one or two.
        batch_norm: normalise behind each convolution.
    """

    def __init__(
        self, channels: int, size: int, num_classes: int, *, blocks: int, batch_norm: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        fan_in = channels
        for block in range(blocks):
            for _ in range(2):
                layers.append(nn.Conv2d(fan_in, fan_in := 16 * 2**block, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(fan_in))
                layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.Flatten())
        count = fan_in * (size // 2**blocks) ** 2
        self.hidden = nn.Linear(count, HIDDEN) if blocks == 2 else None
        self.output = nn.Linear(HIDDEN if blocks == 2 else count, num_classes)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of images (batch, channels, size, size).

        Args:
            images: from 0 to 1.
            mask: factors of the hidden layer's units, (batch, 64): dropout.
        """
        x = self.features(images)
        if self.hidden is not None:
            x = self.hidden(x).relu()
        if mask is not None:
            x = x * mask
        logits: Tensor = self.output(x)
        return logits
