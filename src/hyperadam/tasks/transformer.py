"""Small networks of today, from torch's own layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 64, 4, 4


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)


class VisionTransformer(nn.Module):
    """Four layers of width 64 with 4 heads over patches; the mean of their outputs is classified.

    Source: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021; the mean in place of a
    class token as in Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022.

    Args:
        channels: of the images.
        size: their height and width.
        num_classes: outputs.
        patch: height and width of a patch.
    """

    def __init__(self, channels: int, size: int, num_classes: int, *, patch: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, WIDTH, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, WIDTH))
        self.encoder = _encoder()
        self.output = nn.Linear(WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (batch, channels, size, size)."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.output(self.encoder(x).mean(dim=1))
        return logits


class CharacterTransformer(nn.Module):
    """Four layers of width 64 with 4 heads over characters, each of which sees those before it.

    Source: Vaswani et al., "Attention is all you need", NeurIPS 2017; normalisation before each
    layer and small initial embeddings as in Radford et al., "Language models are unsupervised
    multitask learners", 2019.

    Args:
        vocabulary: how many characters there are.
        context: characters of a piece of text, at most.
    """

    def __init__(self, vocabulary: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(0.02 * torch.randn(vocabulary, WIDTH))
        self.position = nn.Parameter(0.02 * torch.randn(context, WIDTH))
        self.encoder = _encoder()
        self.output = nn.Linear(WIDTH, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of each character's successor, (batch, length, vocabulary)."""
        length = characters.shape[1]
        x = F.embedding(characters, self.embed) + self.position[:length]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        logits: Tensor = self.output(self.encoder(x, mask=later, is_causal=True))
        return logits
