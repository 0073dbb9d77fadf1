"""The Penn-Fudan pedestrian database: its dataset class, and its download.

Notebook 01 builds the class by hand.
Data: Wang, Shi, Song, Shen, "Object Detection Combining Recognition and
Segmentation", ACCV 2007, https://www.cis.upenn.edu/~jshi/ped_html/
"""

from __future__ import annotations

import copy
import hashlib
import operator
import shutil
import socket
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from tutorial_lib.data import boxes_from_masks, opened, read_image

URL = "https://www.cis.upenn.edu/~jshi/ped_html/PennFudanPed.zip"
NUM_IMAGES = 170
# Over the names and SHA-256 of the 340 files of PNGImages and PedMasks, in order.
DIGEST = "313ac6cb0e3e2f9bc6b1d41903bd13b17707af114cfef636ff09a5de0ed44b0f"

_MAX_BYTES = 100_000_000  # the archive has 51 MB, and 53 MB when it is unpacked
_TIMEOUT = 30  # seconds without a byte
_SCRATCH = ".PennFudanPed-download-"  # and what mkdtemp adds


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
        if missing := [mask for mask in map(self._mask_path, self.file_names) if not mask.is_file()]:
            raise FileNotFoundError(f"{len(missing)} masks are missing; the first is {missing[0]}")

    def _mask_path(self, name: str) -> Path:
        return self.root / "PedMasks" / f"{Path(name).stem}_mask.png"

    def __len__(self) -> int:
        return len(self.file_names)

    def get_height_and_width(self, index: int) -> tuple[int, int]:
        """In pixels, from the first bytes of the mask's file (0.1 ms).

        Raises:
            ValueError: it is no image; the message names it.
        """
        with opened(self._mask_path(self.file_names[index])) as mask:
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
        if len(mask) != 1 or mask.dtype != torch.uint8:
            found = f"{len(mask)} channel(s) of {mask.dtype}"
            raise ValueError(f"{path} has {found}; a mask has one of uint8, with the person's number in each pixel")
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
        image = tv_tensors.Image(read_image(path, "RGB").contiguous())
        target = self.get_target(index)
        if image.shape[-2:] != target["masks"].shape[-2:]:
            sizes = [f"{w} x {h}" for h, w in (image.shape[-2:], target["masks"].shape[-2:])]
            raise ValueError(f"{path} is {sizes[0]} pixels, but its mask {self._mask_path(path.name)} is {sizes[1]}")
        return image, target

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor | int]]:
        index = range(len(self))[operator.index(index)]  # also of a NumPy number or a tensor, and from the end
        sample = self._samples.get(index) or self._decode(index)
        if self.in_memory:
            self._samples[index] = sample
            sample = copy.deepcopy(sample)  # what is kept must not be changed in place
        image, target = sample
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target


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
        ValueError: the address is not https, or redirects to one that is not.
        RuntimeError: the download is cut short, is too large, is no zip file or holds other files
            than PennFudan's. The message names the address and what came. Nothing is left behind.
        OSError: the address cannot be reached.
    """
    root = Path(root)
    folder = root / "PennFudanPed"
    if folder.is_dir() and _is_penn_fudan(folder):
        return folder
    if folder.exists():
        raise RuntimeError(f"{folder} is there, but is not all of PennFudan as published; move it away and try again")
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(f"{_SCRATCH}*/"):  # of a download that was killed, over a day ago
        if time.time() - left_over.stat().st_mtime > 86_400:
            shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(dir=root, prefix=_SCRATCH) as scratch:
        archive, unpacked = Path(scratch) / "PennFudanPed.zip", Path(scratch) / "PennFudanPed"
        _download(url, archive)
        if not zipfile.is_zipfile(archive):
            came = f"{archive.stat().st_size:,} bytes that start with {archive.read_bytes()[:60]!r}"
            raise RuntimeError(f"{url} gave no zip file, or only a part of one: {came} (a proxy's page?)")
        try:
            with zipfile.ZipFile(archive) as zipped:
                _limit(url, sum(file.file_size for file in zipped.infolist()))
                zipped.extractall(scratch)  # drops ".." and drives from the names
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
            raise RuntimeError(f"{url}: the archive cannot be unpacked ({error}); try again") from error
        if not _is_penn_fudan(unpacked):
            raise RuntimeError(f"{url}: the archive does not hold the {NUM_IMAGES} photographs and masks of PennFudan")
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            if not _is_penn_fudan(folder):
                raise
    return folder


def _download(url: str, archive: Path) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        _require_https(url)
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as response:
            address = response.url  # after redirects
            _require_https(address)
            _limit(url, int(response.headers.get("Content-Length", 0)))
        torch.hub.download_url_to_file(address, str(archive))
        _limit(url, archive.stat().st_size)
    except (HTTPException, TimeoutError) as error:
        raise RuntimeError(f"{url}: the download stopped ({error!r}); try again") from error
    finally:
        socket.setdefaulttimeout(before)


def _require_https(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        raise ValueError(f"{url} is not an https address")


def _limit(url: str, size: int) -> None:
    if size > _MAX_BYTES:
        raise RuntimeError(f"{url} gives {size:,} bytes, over {_MAX_BYTES:,}: PennFudan has 51 MB")
