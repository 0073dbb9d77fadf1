"""Any dataset that has a COCO file: images in a folder, objects in one JSON file.

Other formats become a COCO file first (``tutorial_lib.convert``). Notebook 05 shows the way.
Format: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torchvision import tv_tensors

from tutorial_lib.data import IMAGE_SUFFIXES, DetectionDataset, image_of, read_image

_WORDS = {int: "a whole number", str: "text"}


class CocoDataset(DetectionDataset):
    """Images of a folder, and their objects as a COCO file states them.

    Args:
        images: the folder that the file's ``file_name`` start from. A name with a folder that is not there is
            looked for without it.
        annotations: path of the JSON file, as CVAT, Label Studio, Roboflow and LabelMe's exporters write it; or its
            content as a dict, which is what the functions of ``tutorial_lib.convert`` return.
        transforms: called with (image, target), returns both.
        in_memory: as for :class:`tutorial_lib.data.DetectionDataset`.
        masks: None for masks where the file has any, True to require them, False for boxes without masks.
        crowds: False leaves out annotations with ``iscrowd`` 1. Do so for training: torchvision's models would train
            on a crowd as on one object. Evaluation needs them.

    A sample is ``(image, target)``: ``image`` a ``tv_tensors.Image``, uint8 [3, H, W] in [0, 255] before transforms,
    as :func:`tutorial_lib.data.read_image` gives it; ``target`` as :meth:`get_target` does. An image is turned as its
    EXIF note says if it then has the file's ``width`` and ``height``, and kept as it is stored if only that has them.

    Of the file's fields these are read:
        - ``bbox`` is ``[x, y, width, height]`` in pixels, fractions allowed; x, y is the left upper corner, and 0, 0
          that of the image, so the box is half-open: ``x + width`` is where the next pixel begins. Boxes are cut at
          the image's edges. Where there is none, it is the box around the mask.
        - ``segmentation`` is a list of polygons ``[x1, y1, x2, y2, ...]`` of the same object, in the same
          coordinates, filled as pycocotools does; or run lengths, ``{"size": [height, width], "counts": ...}``,
          compressed (text) or not (a list). Parts of fewer than three points have no pixels, and count as no mask.
        - ``width`` and ``height``: those of the image file if both are missing.
        - ``area`` is not read: a mask's pixels are counted. ``iscrowd`` 0 may be left out.
        - Categories may have any ids: label i is the i-th smallest. Roboflow's category 0 that only heads the others
          (its ``supercategory`` is "none", and it is the ``supercategory`` of all others) is no class.

    Objects without size (no width or height inside the image, or no pixel in the mask) are left out, with a warning
    that counts them.

    Attributes:
        root: the folder of images. file_names: of the images, in the file's order.
        categories: the names of the classes by label; the first is ``"__background__"``.
        category_ids: the file's own ids by label; the first, of the background, is -1.
        masks: whether targets have masks.
        not_listed: image files of the folder that the file does not list; a warning counts them.

    Raises:
        FileNotFoundError: a folder or file is missing; of images it says how many and the first.
        ValueError: the file is not JSON, or not as above; an id, a name or a file is used twice; an annotation is of
            an unknown image or category; only a part of the objects has a mask, and ``masks`` is not False. The
            message names the file and the entry. Reading a sample: the image has another size than the file says.

    Source: notebook 05.
    """

    def __init__(
        self, images: str | Path, annotations: str | Path | dict, transforms: Callable | None = None, *,
        in_memory: bool = False, masks: bool | None = None, crowds: bool = True,
    ):  # fmt: skip
        self.root, self._source = Path(images), "the dict" if isinstance(annotations, dict) else str(annotations)
        try:
            data = annotations if isinstance(annotations, dict) else json.loads(Path(annotations).read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{annotations} is not JSON: {error}") from error
        files, images, classes = {path.relative_to(self.root).as_posix() for path in self.root.rglob("*")}, {}, {}
        for where, entry in _entries(self._source, data, "images", file_name=str):
            name = entry["file_name"].replace("\\", "/")
            name = name if name in files else name.rsplit("/", 1)[-1]
            size = (entry.get("height"), entry.get("width"))
            size = tuple(read_image(self.root / name, "RGB").shape[1:]) if size == (None, None) else size
            if any(type(side) is not int or side < 1 for side in size):
                raise ValueError(f"{where}: height and width are {size}; they have to be whole numbers of pixels")
            images[entry["id"]] = (entry["id"], name, size, [])
        self._images = list(images.values())
        super().__init__([name for _, name, _, _ in self._images], transforms, in_memory)
        if missing := [name for name in self.file_names if name not in files]:
            raise FileNotFoundError(f"{self._source}: {len(missing)} images are not in {self.root}: {missing[0]} ...")
        for _, entry in _entries(self._source, data, "categories", name=str):
            classes[entry["id"]] = entry["name"], entry.get("supercategory")
        above = {str(parent) for key, (_, parent) in classes.items() if key}
        if classes.get(0) == (*above, "none"):
            del classes[0]  # Roboflow's heading of all others
        self.category_ids = [-1, *sorted(classes)]
        self.categories = ["__background__", *(classes[key][0] for key in self.category_ids[1:])]
        for what, names in (("file_name", sorted(self.file_names)), ("category", sorted(self.categories))):
            if twice := [name for name, after in zip(names, names[1:], strict=False) if name == after]:
                raise ValueError(f"{self._source}: two entries have the {what} {twice[0]!r}; rename one")
        labels = {key: label for label, key in enumerate(self.category_ids) if label}
        small, cut = [], []
        for where, entry in _entries(self._source, data, "annotations", image_id=images, category_id=labels):
            _, _, size, objects = images[entry["image_id"]]
            if (crowd := entry.get("iscrowd", 0)) not in (0, 1):
                raise ValueError(f"{where}: iscrowd is {crowd!r}; it has to be 0 or 1")
            try:
                box, mask = _box_and_mask(entry, size, with_mask=masks is not False)
            except (LookupError, TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{where}: {error}") from error
            inside = box.clip(0, size[::-1] * 2).astype(np.float32)
            pixels = None if mask is None else int(rle.area(mask))
            if (inside[2:] <= inside[:2]).any() or pixels == 0:
                small.append(entry["id"])
            elif crowds or not crowd:
                objects.append(((*inside, labels[entry["category_id"]], crowd, pixels or 0), mask, entry["id"]))
                cut += [entry["id"]] if abs(box - inside).max() > 1 else []
        with_mask = {key: mask is not None for *_, objects in self._images for _, mask, key in objects}
        self.masks = any(with_mask.values()) if masks is None else masks
        if self.masks and (without := [key for key, has in with_mask.items() if not has]):
            lacking = f"{self._source}: {len(without)} of {len(with_mask)} objects have no mask"
            raise ValueError(f"{lacking}, annotations {str(without[:5])[1:-1]}; masks=False reads the boxes of all")
        self.not_listed = sorted(
            name for name in files.difference(self.file_names) if name.lower().endswith(IMAGE_SUFFIXES)
        )
        for what, which in (
            ("objects have no size inside the image and are left out: annotations", small),
            ("boxes reach over a pixel beyond the image and are cut: annotations", cut),
            (f"image files in {self.root} are not listed:", self.not_listed),
        ):
            if which:
                warnings.warn(f"{self._source}: {len(which)} {what} {str(which[:5])[1:-1]}", stacklevel=2)

    def get_height_and_width(self, index: int) -> tuple[int, int]:
        """In pixels, as the file says; no image is read."""
        return self._images[index][2]

    def get_target(self, index: int) -> dict[str, torch.Tensor | int]:
        """The target of one image, without decoding the image.

        Returns:
            ``boxes`` float32 [N, 4] XYXY in absolute pixels, half-open; ``labels`` int64 [N], places in
            ``categories``; ``masks`` uint8 [N, H, W] of 0 and 1, if the dataset has them; ``image_id`` int, the file's
            own; ``area`` float32 [N] in pixels, of the mask, or of the box where there are no masks; ``iscrowd`` int64
            [N] of 0 and 1. Without objects, N is 0.
        """
        image_id, _, size, objects = self._images[index]
        rows = torch.tensor([row for row, _, _ in objects], dtype=torch.float64).reshape(-1, 7)
        boxes = tv_tensors.BoundingBoxes(rows[:, :4].float(), format="XYXY", canvas_size=size)
        target = {"boxes": boxes, "labels": rows[:, 4].long(), "image_id": image_id, "iscrowd": rows[:, 5].long()}
        if not self.masks:
            return target | {"area": (rows[:, 2:4] - rows[:, :2]).prod(dim=1).float()}
        masks = rle.decode([mask for _, mask, _ in objects]) if objects else np.zeros((*size, 0), np.uint8)
        masks = tv_tensors.Mask(torch.from_numpy(masks).permute(2, 0, 1).contiguous())
        return target | {"masks": masks, "area": rows[:, 6].float()}

    def _decode(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor | int]]:
        target = self.get_target(index)
        return image_of(target, self.root / self.file_names[index], f"its entry in {self._source}"), target


def _entries(source: str, data: dict, kind: str, **fields: type | dict) -> Iterator[tuple[str, dict]]:
    """What to call each entry of a kind in a message, and itself; fields are of a type, or an id of a dict."""
    entries, seen = data.get(kind) if isinstance(data, dict) else None, set()
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{source} has no list of {kind}; a COCO file has images, annotations and categories")
    for place, entry in enumerate(entries):
        where = f"{source}: {kind}[{place}], id {entry.get('id')!r}"
        for key, right in {"id": int, **fields}.items():
            value = entry.get(key)
            if isinstance(right, dict):
                good, need = type(value) is int and value in right, "the id of one that is listed"
            else:
                good, need = type(value) is right and value not in seen, f"{_WORDS[right]}, and an id used once"
            if not good:
                raise ValueError(f"{where}: {key} is {value!r}; it has to be {need}")
        seen.add(entry["id"])
        yield where, entry


def _box_and_mask(entry: dict, size: tuple[int, int], with_mask: bool) -> tuple[np.ndarray, dict | None]:
    """The box float64 [4], XYXY, not yet cut to the image, and the mask as compressed run lengths."""
    shape, mask = entry.get("segmentation"), None
    if shape and (with_mask or "bbox" not in entry):
        if isinstance(shape, dict):
            counts = shape["counts"]
            mask = rle.frPyObjects(shape, *size) if isinstance(counts, list) else {"size": size, "counts": counts}
            pixels, total = rle.decode(mask), sum(counts) if isinstance(counts, list) else size[0] * size[1]
            if [*shape["size"], total, pixels.sum()] != [*size, pixels.size, rle.area(mask)]:
                raise ValueError(f"the run lengths of its segmentation do not fit the image's height and width, {size}")
            mask = rle.encode(pixels)
        elif parts := [part for part in (_numbers("segmentation", part) for part in shape) if len(part) >= 6]:
            mask = rle.merge(rle.frPyObjects(parts, *size))
    box = rle.toBbox(mask) if mask and "bbox" not in entry else entry.get("bbox")
    x, y, width, height = _numbers("bbox", box, 4)
    return np.array([x, y, x + width, y + height]), mask


def _numbers(name: str, values: list, count: int | None = None) -> list[float]:
    numbers = np.asarray(values)
    is_list = numbers.ndim == 1 and len(numbers) == (count or len(numbers) // 2 * 2)
    if not is_list or numbers.dtype.kind not in "iuf" or not (abs(numbers) < 1e6).all():
        need = f"{count or 'an even number of'} finite numbers of pixels"
        raise ValueError(f"{name} is {str(values):.60}; it has to be a list of {need}")
    return numbers.astype(float).tolist()
