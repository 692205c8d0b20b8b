"""The parameters of a ResNet-20 for CIFAR-10, as a list of shapes."""

from __future__ import annotations

from itertools import pairwise


def resnet20_shapes() -> list[tuple[int, ...]]:
    """3 stages of 3 blocks with 16, 32 and 64 channels, batch normalisation, shortcuts that are
    padded with zeros and so have no parameters, a linear head for 10 classes.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2.
    """
    layers = [3, 16, *[16] * 6, *[32] * 6, *[64] * 6]
    shapes: list[tuple[int, ...]] = []
    for inputs, outputs in pairwise(layers):
        shapes += [(outputs, inputs, 3, 3), (outputs,), (outputs,)]
    return [*shapes, (10, 64), (10,)]
