"""The Penn-Fudan pedestrian database: download, data set, split, batches, collate_fn.

Notebook 01 builds them by hand, the batch sampler apart.
Data: Wang, Shi, Song, Shen, "Object Detection Combining Recognition and
Segmentation", ACCV 2007, https://www.cis.upenn.edu/~jshi/ped_html/
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import shutil
import struct
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch
from kornia_rs.io import decode_image_png_u8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

URL = "https://www.cis.upenn.edu/~jshi/ped_html/PennFudanPed.zip"
NUM_IMAGES = 170
# Over the names and SHA-256 of the 340 files of PNGImages and PedMasks, in order.
DIGEST = "313ac6cb0e3e2f9bc6b1d41903bd13b17707af114cfef636ff09a5de0ed44b0f"

_TIMEOUT = 30  # seconds without a byte
_MAX_BYTES = 100_000_000  # what no answer may exceed; the archive has 51 MB
_SCRATCH = ".PennFudanPed-download-"  # and what mkdtemp adds
_DAY = 86_400

# Bit depth, colour type, and no interlacing, as a PNG file's header has them; and kornia_rs's name for them.
_PLAIN_PNG = {(None, 8, 0, 0): "mono", ("RGB", 8, 2, 0): "rgb"}
_MAY_TURN = (b"eXIf", b"Raw profile", b"xmp")  # where a PNG file can say that the camera was turned


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
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def read_image(path: str | Path, mode: str | None = None) -> Tensor:
    """An image file as uint8 [C, H, W].

    Args:
        mode: ``"RGB"`` to convert to it, turned as the camera's EXIF note says; None to leave
            grey values and palette indices as they are.

    Plain PNG files, as PennFudan's, are decoded by kornia_rs, faster than by Pillow (notebook 07). All others are
    Pillow's, and so are those that kornia_rs refuses, of which Pillow says what is wrong. A file whose checksums (CRC)
    fit its pixels is taken; Pillow looks at those of other parts, too.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it cannot be read as an image; the message names it.
    """
    data = Path(path).read_bytes()
    if data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR") and not any(word in data for word in _MAY_TURN):
        with contextlib.suppress(Exception):  # Pillow says what is wrong
            width, height, depth, colour, interlaced = struct.unpack_from(">IIBBxxB", data, 16)
            kind = _PLAIN_PNG[mode, depth, colour, interlaced]
            if width * height <= Image.MAX_IMAGE_PIXELS:
                return torch.from_numpy(decode_image_png_u8(data, (height, width), kind)).permute(2, 0, 1)
    with _opened(path) as image:
        if mode:
            ImageOps.exif_transpose(image, in_place=True)
        return pil_to_tensor(image if mode in (None, image.mode) else image.convert(mode))


class PennFudanDataset(Dataset):
    """Images and targets of PennFudan, or of any folder with its layout.

    Args:
        root: the folder that holds ``PNGImages/NAME.png`` (RGB) and
            ``PedMasks/NAME_mask.png`` (one 8-bit channel: 0 is background, k the
            pixels of the k-th person).
        transforms: called with (image, target), returns both.
        in_memory: keep every sample once it is decoded, before its transforms: about 1 MB for each of
            PennFudan's. Workers of a DataLoader keep a copy each, and without ``persistent_workers=True`` lose it
            at the end of every epoch.

    A sample is ``(image, target)``: ``image`` a ``tv_tensors.Image``, uint8 [3, H, W]
    in [0, 255] before transforms; ``target`` as :meth:`get_target` gives it.

    Raises:
        FileNotFoundError: a folder, or the mask of an image, is missing.
        ValueError: there are no images, an image or mask cannot be read, or the two
            differ in size. The message names the file.

    Source: notebook 01.
    """

    def __init__(self, root: str | Path, transforms: Callable | None = None, *, in_memory: bool = False):
        self.root, self.transforms, self.in_memory = Path(root), transforms, in_memory
        self._samples: dict[int, tuple[Tensor, dict]] = {}
        for folder in (self.root, self.root / "PNGImages", self.root / "PedMasks"):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is not a folder; PennFudan has PNGImages and PedMasks in its root")
        self.file_names = sorted(path.name for path in (self.root / "PNGImages").glob("*.png"))
        if not self.file_names:
            raise ValueError(f"{self.root / 'PNGImages'} holds no .png files")
        for name in self.file_names:
            if not self._mask_path(name).is_file():
                raise FileNotFoundError(f"{self._mask_path(name)}, the mask of {name}, is missing")

    def _mask_path(self, name: str) -> Path:
        return self.root / "PedMasks" / f"{Path(name).stem}_mask.png"

    def __len__(self) -> int:
        return len(self.file_names)

    def get_height_and_width(self, index: int) -> tuple[int, int]:
        """In pixels, from the first bytes of the mask's file (0.1 ms).

        Raises:
            ValueError: it is no image; the message names it.
        """
        path = self._mask_path(self.file_names[index])
        with _opened(path) as mask:
            return mask.height, mask.width

    def get_target(self, index: int) -> dict[str, Tensor | int]:
        """The target of one image, without decoding the image.

        Returns:
            ``boxes`` float32 [N, 4] XYXY in absolute pixels, half-open; ``labels``
            int64 [N], all 1 (person); ``masks`` uint8 [N, H, W] of 0 and 1;
            ``image_id`` int; ``area`` float32 [N], of the mask, in pixels;
            ``iscrowd`` int64 [N], all 0.
        """
        index = range(len(self))[operator.index(index)]
        path = self._mask_path(self.file_names[index])
        mask = read_image(path)
        if len(mask) != 1:
            raise ValueError(f"{path} has {len(mask)} channels; a mask has one, with the person's number in each pixel")
        if mask.dtype != torch.uint8:
            raise ValueError(f"{path} is a {mask.dtype} mask; save it with 8 bits a pixel")
        pixels = mask.flatten().bincount()  # of each number
        ids = pixels[1:].nonzero().flatten() + 1
        masks = (mask == ids[:, None, None].to(mask.dtype)).to(torch.uint8)
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes_from_masks(masks), format="XYXY", canvas_size=masks.shape[-2:]),
            "labels": torch.ones(len(ids), dtype=torch.int64),
            "masks": tv_tensors.Mask(masks),
            "image_id": index,
            "area": pixels[ids].float(),
            "iscrowd": torch.zeros(len(ids), dtype=torch.int64),
        }

    def _decode(self, index: int) -> tuple[Tensor, dict[str, Tensor | int]]:
        path = self.root / "PNGImages" / self.file_names[index]
        image = tv_tensors.Image(read_image(path, "RGB"))
        target = self.get_target(index)
        if image.shape[-2:] != target["masks"].shape[-2:]:
            sizes = [f"{w} x {h}" for h, w in (image.shape[-2:], target["masks"].shape[-2:])]
            raise ValueError(f"{path} is {sizes[0]} pixels, but its mask {self._mask_path(path.name)} is {sizes[1]}")
        return image, target

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor | int]]:
        index = range(len(self))[operator.index(index)]  # also of a NumPy number or a tensor, and from the end
        if self.in_memory:
            if index not in self._samples:
                image, target = self._decode(index)
                self._samples[index] = image.clone(memory_format=torch.contiguous_format), target
            image, target = self._samples[index]
            image = image.clone()  # what is kept must not be changed in place
            target = {name: v.clone() if isinstance(v, Tensor) else v for name, v in target.items()}
        else:
            image, target = self._decode(index)
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target


def split_dataset(dataset: Dataset, sizes: Sequence[int], seed: int) -> tuple[Subset, ...]:
    """Split a data set into parts of the given sizes, at random but always alike for a seed.

    The same seed picks the same indices from every data set of the same length: call it
    on a data set with training transforms for the first part, and on one without for
    the others.

    Raises:
        ValueError: the sizes add up to more than the data set holds, or one is not positive.

    Source: notebook 01.
    """
    if min(sizes) < 1 or sum(sizes) > len(dataset):
        parts = f"sizes {tuple(sizes)} must be positive, and add up to at most {len(dataset)}"
        raise ValueError(f"{parts}, the data set's length")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
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
        aspect_ratios: width / height of every image of the data set, in its order.
        batch_size: of each process.
        num_windows: the fewer, the less padding, and the more often the same images meet again; with one for
            each batch, or more, it is plain shuffling. Notebook 07 shows what both are worth.
        num_replicas: the number of processes. Each takes its part of the same batches, so that none waits long for
            another that has larger images.
        rank: of this process.
        generator: what draws the order; None is torch's own, as in ``torch.utils.data.RandomSampler``, and that is
            in the checkpoints of :func:`tutorial_lib.engine.save_checkpoint`, while this one is not. Several
            processes need one each, of the same seed, and have to draw the same number of epochs.

    Raises:
        ValueError: the ratios are not finite numbers over 0, there is not one batch for each process, a number is not
            positive, or several processes have no generator.

    Source: notebook 07; the grouping of torchvision's detection references.
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
        numbers = {"batch_size": batch_size, "num_windows": num_windows, "num_replicas": num_replicas}
        for name, number in numbers.items():
            if operator.index(number) < 1:
                raise ValueError(f"{name} {number} must be positive")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} must be from 0 to num_replicas - 1, which is {num_replicas - 1}")
        if len(aspect_ratios) < batch_size * num_replicas:
            raise ValueError(
                f"{len(aspect_ratios)} images are too few for {num_replicas} process(es) with batches of {batch_size}"
            )
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


def _is_penn_fudan(folder: Path) -> bool:
    digest = hashlib.sha256()
    for path in sorted((folder / "PNGImages").glob("*.png")) + sorted((folder / "PedMasks").glob("*.png")):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest() == DIGEST


def download_penn_fudan(root: str | Path, url: str = URL) -> Path:
    """Download PennFudan (51 MB) and unpack it, unless it is there already.

    Its terms are in its readme.txt: it is for your own work, and not to be reposted.

    Args:
        root: the folder to put ``PennFudanPed`` in; made if need be.
        url: where the zip file is; https, or http on this machine itself.

    Returns:
        The folder ``root/PennFudanPed``. It appears only when all its photographs and
        masks are there, each as published (by their SHA-256).

    Raises:
        ValueError: the address is not https.
        RuntimeError: the download is cut short, is no zip file or holds other files than
            PennFudan's. The message names the address and what came. Nothing is left behind.
        OSError: the address cannot be reached.
    """
    root = Path(root)
    folder = root / "PennFudanPed"
    if folder.is_dir() and _is_penn_fudan(folder):
        return folder
    if folder.exists():
        raise RuntimeError(f"{folder} is there, but is not all of PennFudan as published; move it away and try again")
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(f"{_SCRATCH}*/"):  # of a download that was killed
        if time.time() - left_over.stat().st_mtime > _DAY:
            shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(dir=root, prefix=_SCRATCH) as scratch:
        archive = Path(scratch) / "PennFudanPed.zip"
        _fetch(url, archive)
        if not zipfile.is_zipfile(archive):
            start = archive.read_bytes()[:60]
            raise RuntimeError(f"{url} gave no zip file, but something that starts with {start!r} (a proxy's page?)")
        try:
            with zipfile.ZipFile(archive) as zipped:
                outside = [name for name in zipped.namelist() if not _stays_inside(Path(scratch), name)]
                if not outside:
                    zipped.extractall(scratch)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
            raise RuntimeError(f"{url}: the archive is damaged or cannot be unpacked ({error}); try again") from error
        if outside:
            raise RuntimeError(f"{url}: the archive would write outside its folder ({outside[0]!r}); not unpacked")
        if not _is_penn_fudan(Path(scratch) / "PennFudanPed"):
            raise RuntimeError(f"{url}: the archive does not hold the {NUM_IMAGES} photographs and masks of PennFudan")
        try:
            (Path(scratch) / "PennFudanPed").rename(folder)
        except OSError:  # another process was faster
            if not _is_penn_fudan(folder):
                raise
    return folder


def _stays_inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())


def _require_https(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        raise ValueError(f"{url} is not an https address")


def _fetch(url: str, path: Path) -> None:
    _require_https(url)
    try:
        response = urllib.request.urlopen(url, timeout=_TIMEOUT)
    except HTTPException as error:
        raise RuntimeError(f"{url}: what answers there is no web server ({error!r})") from error
    with response, path.open("wb") as file:
        _require_https(response.url)  # after redirects
        size = int(response.headers.get("Content-Length", 0))
        with tqdm(total=size or None, unit="B", unit_scale=True, desc="PennFudan", file=sys.stdout, leave=False) as bar:
            try:
                while chunk := response.read(1 << 18):
                    file.write(chunk)
                    bar.update(len(chunk))
                    if file.tell() > _MAX_BYTES:
                        raise RuntimeError(f"{url} sends over {_MAX_BYTES:,} bytes, twice what PennFudan has")
            except (HTTPException, TimeoutError) as error:
                raise RuntimeError(f"{url}: the download stopped ({error}); try again") from error
        if size and file.tell() != size:
            raise RuntimeError(f"{url}: the download stopped after {file.tell():,} of {size:,} bytes; try again")
