"""Transforms that move an image, its boxes and its masks together (notebook 01)."""

from __future__ import annotations

import torch
from torchvision.transforms import v2


def get_transform(train: bool) -> v2.Transform:
    """The transform of the training images, or of the images that are only looked at.

    Args:
        train: with a random horizontal flip and random changes of brightness,
            contrast, saturation, hue and the order of the colour channels.

    Returns:
        A transform of (image, target) to float32 [3, H, W] in [0, 1] and plain
        tensors. Size and normalisation are left to the model
        (``torchvision.models.detection.transform.GeneralizedRCNNTransform``).

    Source: notebook 01.
    """
    augment = [v2.RandomHorizontalFlip(p=0.5), v2.RandomPhotometricDistort(p=0.5)]
    convert = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return v2.Compose([*augment, *convert] if train else convert)
