"""Small networks of today, from torch's own layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 64, 4, 4


def _encoder(width: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)


class VisionTransformer(nn.Module):
    """Layers with 4 heads over an image's patches; the mean of their outputs is classified.

    Source: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021; the mean in place of a
    class token as in Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022.

    Args:
        channels: of the images.
        size: their height and width.
        num_classes: outputs.
        patch: height and width of a patch.
        width: of a patch's embedding.
        layers: how many.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        num_classes: int,
        *,
        patch: int,
        width: int = WIDTH,
        layers: int = LAYERS,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.encoder = _encoder(width, layers)
        self.output = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (batch, channels, size, size)."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.output(self.encoder(x).mean(dim=1))
        return logits


class CharacterTransformer(nn.Module):
    """Layers with 4 heads over characters, each of which sees those before it.

    Source: Vaswani et al., "Attention is all you need", NeurIPS 2017; normalisation before each
    layer and small initial embeddings as in Radford et al., "Language models are unsupervised
    multitask learners", 2019.

    Args:
        vocabulary: how many characters there are.
        context: characters of a piece of text, at most.
        width: of a character's embedding.
        layers: how many.
    """

    def __init__(
        self, vocabulary: int, context: int, *, width: int = WIDTH, layers: int = LAYERS
    ) -> None:
        super().__init__()
        self.embed = nn.Parameter(0.02 * torch.randn(vocabulary, width))
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.encoder = _encoder(width, layers)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of each character's successor, (batch, length, vocabulary)."""
        length = characters.shape[1]
        x = F.embedding(characters, self.embed) + self.position[:length]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        logits: Tensor = self.output(self.encoder(x, mask=later, is_causal=True))
        return logits
