"""The Penn-Fudan pedestrian database: its dataset class, and its download.

Notebook 01 builds the class by hand.
Data: Wang, Shi, Song, Shen, "Object Detection Combining Recognition and
Segmentation", ACCV 2007, https://www.cis.upenn.edu/~jshi/ped_html/
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision import tv_tensors
from tqdm import tqdm

from tutorial_lib.data import DetectionDataset, boxes_from_masks, image_of, opened, read_image

URL = "https://www.cis.upenn.edu/~jshi/ped_html/PennFudanPed.zip"
NUM_IMAGES = 170
# Over the names and SHA-256 of the 340 files of PNGImages and PedMasks, in order.
DIGEST = "313ac6cb0e3e2f9bc6b1d41903bd13b17707af114cfef636ff09a5de0ed44b0f"

_MAX_BYTES = 100_000_000  # the archive has 51 MB, and 53 MB when it is unpacked
_TIMEOUT = 30  # seconds without a byte
_SCRATCH = ".PennFudanPed-download-"  # and what mkdtemp adds


class PennFudanDataset(DetectionDataset):
    """Images and targets of PennFudan, or of any folder with its layout.

    Args:
        root: the folder that holds ``PNGImages/NAME.png`` (RGB) and
            ``PedMasks/NAME_mask.png`` (one channel of 1, 8 or 16 bits: 0 is background,
            k the pixels of the k-th person; numbers may have gaps).
        transforms: called with (image, target), returns both.
        in_memory: keep every sample once it is decoded, before its transforms: about 1 MB for each of
            PennFudan's. Workers of a DataLoader keep a copy each, and without ``persistent_workers=True`` lose it
            at the end of every epoch.

    A sample is ``(image, target)``: ``image`` a ``tv_tensors.Image``, uint8 [3, H, W]
    in [0, 255] before transforms; ``target`` as :meth:`get_target` gives it.

    Raises:
        FileNotFoundError: there are no images, or the mask of an image is missing.
        ValueError: an image or mask cannot be read, the two differ in size, or a mask has only 0 and 255, so
            that it does not tell objects apart. The message names the file.

    Source: notebook 01.
    """

    def __init__(self, root: str | Path, transforms: Callable | None = None, *, in_memory: bool = False):
        self.root = Path(root)
        super().__init__(sorted(path.name for path in (self.root / "PNGImages").glob("*.png")), transforms, in_memory)
        if not self.file_names:
            raise FileNotFoundError(f"{self.root / 'PNGImages'} is no folder that holds .png files")
        if missing := [mask for mask in map(self._mask_path, self.file_names) if not mask.is_file()]:
            raise FileNotFoundError(f"{len(missing)} masks are missing; the first is {missing[0]}")

    def _mask_path(self, name: str) -> Path:
        return self.root / "PedMasks" / f"{Path(name).stem}_mask.png"

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
        index = range(len(self))[index]
        path = self._mask_path(self.file_names[index])
        mask = read_image(path)
        mask = mask.to(torch.uint8) if mask.dtype == torch.bool else mask
        if len(mask) != 1 or mask.is_floating_point() or not 0 <= int(mask.min()) <= int(mask.max()) < 65536:
            found = f"{path} has {len(mask)} channel(s) of {mask.dtype}"
            raise ValueError(f"{found}; a mask has one, with the person's number, 0 to 65535, in each pixel")
        pixels = mask.flatten().bincount()  # of each number
        ids = pixels[1:].nonzero().flatten() + 1
        if ids.tolist() == [255]:
            split = "from_masks(kind='semantic') of tutorial_lib.convert makes an object of each connected region"
            raise ValueError(f"{path} has only 0 and 255: {split}. If 255 is one object, save it as 1")
        masks = (mask == ids[:, None, None].to(mask.dtype)).to(torch.uint8)
        boxes = tv_tensors.BoundingBoxes(boxes_from_masks(masks), format="XYXY", canvas_size=masks.shape[-2:])
        target = {"boxes": boxes, "labels": torch.ones_like(ids), "masks": tv_tensors.Mask(masks), "image_id": index}
        return target | {"area": pixels[ids].float(), "iscrowd": torch.zeros_like(ids)}

    def _decode(self, index: int) -> tuple[Tensor, dict[str, Tensor | int]]:
        name, target = self.file_names[index], self.get_target(index)
        return image_of(target, self.root / "PNGImages" / name, f"its mask {self._mask_path(name)}"), target


def _is_penn_fudan(folder: Path) -> bool:
    files = sorted((folder / "PNGImages").glob("*.png")) + sorted((folder / "PedMasks").glob("*.png"))
    parts = (path.name.encode() + hashlib.sha256(path.read_bytes()).digest() for path in files)
    return hashlib.sha256(b"".join(parts)).hexdigest() == DIGEST


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
    root, folder = Path(root), Path(root) / "PennFudanPed"
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
        _check(url)
        try:
            with archive.open("wb") as file, urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
                _check(response.url, response.length or 0)  # after redirects
                with tqdm.wrapattr(response, "read", total=response.length, desc=archive.name) as source:
                    shutil.copyfileobj(source, file)
            _check(url, archive.stat().st_size)
            with zipfile.ZipFile(archive) as zipped:
                _check(url, sum(file.file_size for file in zipped.infolist()))
                zipped.extractall(scratch)  # drops ".." and drives from the names
        except (ValueError, urllib.error.URLError):
            raise
        except Exception as error:
            came = f"{archive.stat().st_size:,} bytes that start with {archive.read_bytes()[:60]!r} (a proxy's page?)"
            raise RuntimeError(f"{url} gave no whole zip file ({error!r}); try again. It gave {came}") from error
        if not _is_penn_fudan(unpacked):
            raise RuntimeError(f"{url}: the archive does not hold the {NUM_IMAGES} photographs and masks of PennFudan")
        if not folder.exists():  # else another process was faster
            unpacked.rename(folder)
    return folder


def _check(url: str, size: int = 0) -> None:
    """Is it an address to download from, and not too large?"""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        raise ValueError(f"{url} is not an https address")
    if size > _MAX_BYTES:
        raise RuntimeError(f"{url} gives {size:,} bytes, over {_MAX_BYTES:,}: PennFudan has 51 MB")
