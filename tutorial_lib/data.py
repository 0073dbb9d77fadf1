"""What every detection dataset needs: boxes from masks, images from files, a split, batches.

Notebook 01 builds them by hand, the batch sampler apart.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import pil_to_tensor

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


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


def read_image(path: str | Path, mode: str | None = None, *, turned: bool = True) -> Tensor:
    """An image file as uint8 [C, H, W].

    Args:
        mode: ``"RGB"`` to convert to it. Pixels of 16 or 32 bits and floats, which Pillow would cut off at 255, are
            scaled from the image's own minimum and maximum to 0 and 255; a constant image becomes 0. (Pillow itself
            reads a PNG file of 16 bits a colour as 8 bits.) None leaves grey values and palette indices as they are:
            those of 16 and 32 bits as int32, floats as float32, one bit as bool.
        turned: with a mode, turn the image as the camera's EXIF note says.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it cannot be read as an image, or has to be scaled and holds NaN or infinity; the message names it.

    Source: notebook 01.
    """
    with opened(path) as image:
        if mode and turned:
            ImageOps.exif_transpose(image, in_place=True)
        image = image.convert("I") if image.mode.startswith("I;16") else image
        if mode and image.mode in ("I", "F"):
            pixels = np.asarray(image, dtype=np.float64)
            if not np.isfinite(pixels).all():
                raise ValueError("there is NaN or infinity among its pixels")
            image = Image.fromarray(np.uint8(((pixels - pixels.min()) * (255 / (np.ptp(pixels) or 1))).round()))
        return pil_to_tensor(image if mode in (None, image.mode) else image.convert(mode))


class DetectionDataset(Dataset):
    """What the dataset classes share. A subclass gives ``_decode(index)``: image and target before transforms.

    Args:
        file_names: of the images, in the dataset's order.
        transforms: called with (image, target), returns both.
        in_memory: keep every sample once it is decoded, before its transforms: image and masks take a byte for
            each pixel and channel. Workers of a DataLoader keep a copy each, and without
            ``persistent_workers=True`` lose it at the end of every epoch.

    An index is an int, a NumPy integer or a tensor, and may count from the end.
    """

    def __init__(self, file_names: Sequence[str], transforms: Callable | None = None, in_memory: bool = False):
        self.file_names, self.transforms, self.in_memory = list(file_names), transforms, in_memory
        self._samples: dict[int, tuple[Tensor, dict]] = {}

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor | int]]:
        index = range(len(self))[index]  # of any kind of integer, also from the end
        sample = self._samples.get(index) or self._decode(index)
        if self.in_memory:
            self._samples[index] = sample
            sample = copy.deepcopy(sample)  # what is kept must not be changed in place
        return sample if self.transforms is None else self.transforms(*sample)


def image_of(target: dict, path: Path, source: str) -> Tensor:
    """The image of a target, as ``tv_tensors.Image``, uint8 [3, H, W]: it has the size that the boxes were made for.

    It is turned as its EXIF note says, but where only its pixels as stored have that size.

    Raises:
        ValueError: it has another size; the message names the file, both sizes and ``source``, which has the other.
    """
    for turned in (True, False):
        image = read_image(path, "RGB", turned=turned)
        if image.shape[1:] == target["boxes"].canvas_size:
            return tv_tensors.Image(image.contiguous())
    stored, other = (f"{width} x {height}" for height, width in (image.shape[1:], target["boxes"].canvas_size))
    raise ValueError(f"{path} is {stored} pixels, but {source} is {other}")


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
        self, aspect_ratios: Sequence[float], batch_size: int, num_windows: int = 5, *,
        num_replicas: int = 1, rank: int = 0, generator: torch.Generator | None = None,
    ):  # fmt: skip
        self.aspect_ratios = ratios = torch.as_tensor(aspect_ratios, dtype=torch.float64).clone()
        parts = f"{num_replicas} process(es) with batches of {batch_size}"
        is_good = ratios.dim() == 1 and (ratios.isfinite() & (ratios > 0)).all()
        for wrong, message in (
            (not is_good, "aspect_ratios has to be one finite number over 0, width / height, for each image"),
            (min(batch_size, num_windows, num_replicas) < 1, "batch_size, num_windows and num_replicas start at 1"),
            (not 0 <= rank < num_replicas, f"rank {rank} must be from 0 to num_replicas - 1, {num_replicas - 1}"),
            (len(ratios) < batch_size * num_replicas, f"{len(ratios)} images are too few for {parts}"),
            (num_replicas > 1 and generator is None, "several processes need a generator each, of the same seed"),
        ):
            if wrong:
                raise ValueError(message)
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
