"""What every detection dataset needs: boxes from masks, images from files, a split, batches.

Notebook 01 builds them by hand, the batch sampler apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import pil_to_tensor


def boxes_from_masks(masks: Tensor) -> Tensor:
    """The boxes around instance masks.

    Args:
        masks: uint8 or bool [N, H, W], each with at least one pixel.

    Returns:
        float32 [N, 4], XYXY in absolute pixels, half-open: ``x2 - x1`` is the width
        in pixels. (``torchvision.ops.masks_to_boxes`` gives the index of the last
        pixel instead, one less at the right and at the bottom.)

    Source: notebook 01.
    """
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    return boxes


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """``PIL.Image.open``, whose errors name the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as an image, or has more pixels than Pillow reads (``Image.MAX_IMAGE_PIXELS``).
    """
    try:
        with Image.open(path) as image:
            yield image
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def read_image(path: str | Path, mode: str | None = None) -> Tensor:
    """An image file as uint8 [C, H, W].

    Args:
        mode: ``"RGB"`` to convert to it, turned as the camera's EXIF note says; None to leave
            grey values and palette indices as they are.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it cannot be read as an image; the message names it.

    Source: notebook 01.
    """
    with opened(path) as image:
        if mode:
            ImageOps.exif_transpose(image, in_place=True)
        return pil_to_tensor(image if mode in (None, image.mode) else image.convert(mode))


def split_dataset(dataset: Dataset, sizes: Sequence[int], seed: int, block: int = 1) -> tuple[Subset, ...]:
    """Split a dataset into parts of the given sizes, at random but always alike for a seed.

    Neighbours in a dataset's order often show the same place or moment, and a model that was trained on one of them
    has nearly seen the other. So ``block`` consecutive samples stay together, but for a block that an end of a part
    cuts in two.

    The same seed picks the same indices from every dataset of the same length: call it
    on a dataset with training transforms for the first part, and on one without for
    the others.

    Raises:
        ValueError: the sizes add up to more than the dataset holds, or one is not positive.

    Source: notebook 01.
    """
    if min(sizes) < 1 or sum(sizes) > len(dataset):
        raise ValueError(f"sizes {tuple(sizes)} must be positive, and add up to at most {len(dataset)} samples")
    blocks = torch.arange(len(dataset)).split(block)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(blocks), generator=generator).tolist()
    order = torch.cat([blocks[i] for i in shuffled]).tolist()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return tuple(Subset(dataset, order[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def collate_fn(batch: list[tuple]) -> tuple[tuple, ...]:
    """From a list of (image, target) to (images, targets), two tuples: images differ in size, so nothing is stacked."""
    return tuple(zip(*batch, strict=True))


class AspectRatioBatchSampler(Sampler[list[int]]):
    """Random batches of images of much the same shape, so that little of a batch is padding.

    torchvision's detectors pad the images of a batch to the widest and the tallest, and compute on the padding
    too. In every epoch the images are shuffled and cut into windows, those of a window are sorted by aspect ratio and
    cut into batches, and the batches are shuffled. What is left over, less than a batch of each process, is dropped, in
    every epoch anew: it is for training, not for evaluation.

    Args:
        aspect_ratios: width / height of every image of the dataset, in its order.
        batch_size: of each process.
        num_windows: the fewer, the less padding, and the more often the same images meet again; with one for
            each batch, or more, it is plain shuffling. Notebook 10 shows what both are worth.
        num_replicas: the number of processes. Each takes its part of the same batches, so that none waits long for
            another that has larger images.
        rank: of this process.
        generator: what draws the order; None is torch's own, as in ``torch.utils.data.RandomSampler``, and that is
            in the checkpoints of :func:`tutorial_lib.checkpoint.save_checkpoint`, while this one is not. Several
            processes need one each, of the same seed, and have to draw the same number of epochs.

    Raises:
        ValueError: the ratios are not finite numbers over 0, there is not one batch for each process, a number is not
            positive, or several processes have no generator.

    Source: notebook 10; the grouping of torchvision's detection references.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float],
        batch_size: int,
        num_windows: int = 5,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        generator: torch.Generator | None = None,
    ):
        self.aspect_ratios = torch.as_tensor(aspect_ratios, dtype=torch.float64).clone()
        if self.aspect_ratios.dim() != 1 or not (self.aspect_ratios.isfinite() & (self.aspect_ratios > 0)).all():
            raise ValueError("aspect_ratios has to be one finite number over 0, width / height, for each image")
        if min(batch_size, num_windows, num_replicas) < 1:
            numbers = f"batch_size {batch_size}, num_windows {num_windows}, num_replicas {num_replicas}"
            raise ValueError(f"{numbers}: each must be at least 1")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} must be from 0 to num_replicas - 1, which is {num_replicas - 1}")
        if len(aspect_ratios) < batch_size * num_replicas:
            whole = f"{num_replicas} process(es) with batches of {batch_size}"
            raise ValueError(f"{len(aspect_ratios)} images are too few for {whole}")
        if num_replicas > 1 and generator is None:
            raise ValueError("several processes draw the same batches only with a generator each, of the same seed")
        self.batch_size, self.num_windows, self.generator = batch_size, num_windows, generator
        self.num_replicas, self.rank = num_replicas, rank

    def __len__(self) -> int:
        return len(self.aspect_ratios) // (self.batch_size * self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size * self.num_replicas
        order = torch.randperm(len(self.aspect_ratios), generator=self.generator)[: len(self) * size]
        windows = order.view(-1, size).tensor_split(min(self.num_windows, len(self)))
        by_shape = [window.flatten()[self.aspect_ratios[window.flatten()].argsort()] for window in windows]
        batches = torch.cat(by_shape).split(size)
        for number in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[number][self.rank :: self.num_replicas].tolist()
