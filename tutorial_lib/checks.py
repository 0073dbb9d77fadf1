"""What a dataset has to give torchvision's detection models, checked sample by sample, in plain English.

``PROBLEMS`` lists all that is looked for. Notebook 06 uses :func:`check_dataset` on data of one's own.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import random
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.ops import box_convert, box_iou
from torchvision.tv_tensors import BoundingBoxes
from tqdm import tqdm

from tutorial_lib.data import boxes_from_masks
from tutorial_lib.visualization import show

_FLOAT_IMAGE = "v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])"
_LAST_PIXEL = "torchvision.ops.masks_to_boxes gives the last pixel's index for x2 and y2: add 1 to both."
_ON_CUDA = "On CUDA this is the error 'device-side assert triggered', which names no sample."
_TOGETHER = (
    "Give image and target to one torchvision.transforms.v2 transform, with boxes as tv_tensors.BoundingBoxes and "
    "masks as tv_tensors.Mask: plain tensors are not moved."
)

_ALONE = "image changes, boxes do not"
_SANITIZE = "v2.SanitizeBoundingBoxes drops area and iscrowd with boxes only if its labels_getter gives them, too."
_READ_AGAIN = 32  # so many samples

# Each kind of problem: how bad it is, and what to do.
PROBLEMS: dict[str, tuple[str, str]] = {
    "empty dataset": ("error", "Look at the path and the pattern that the files are searched with."),
    "no objects in the dataset": ("error", "Look at how the annotations are read, and matched with the images."),
    "unreadable sample": ("error", "Call dataset[index] to see the whole traceback; repair or leave out the file."),
    "sample is not a pair": ("error", "__getitem__ returns (image, target)."),
    # The image
    "image is not a tensor": ("error", f"Convert it with {_FLOAT_IMAGE}."),
    "image in another layout": ("error", "The channels come first: image.permute(2, 0, 1)."),
    "image without 3 channels": ("error", 'Open it with Image.open(path).convert("RGB").'),
    "grey image": ("warning", 'The model repeats the one channel; Image.open(path).convert("RGB") says so openly.'),
    "image too small": ("error", "Is this an image? At least 2 pixels a side; some tens for anything to be found."),
    "image not float32": ("error", f"Convert it with {_FLOAT_IMAGE}."),
    "NaN or infinity in the image": ("error", "Look for a division by 0 in the transforms; repair or leave out."),
    "image already normalised": ("error", "Give pixels in [0, 1]: the model subtracts mean and divides by std itself."),
    "image not in [0, 1]": ("error", "Divide by 255, or use v2.ToDtype(torch.float32, scale=True) on uint8."),
    # The target
    "target is not a dict": ("error", 'A target is a dict of tensors: {"boxes": ..., "labels": ...}.'),
    "missing key": ("error", 'A target needs "boxes" [N, 4] and "labels" [N]; Mask R-CNN needs "masks" [N, H, W].'),
    "not a tensor": ("error", "Make it a tensor with torch.as_tensor(value, dtype=...)."),
    "wrong dtype": ("error", "boxes and area float32, labels and iscrowd int64, masks uint8: value.to(dtype)."),
    "wrong shape": ("error", "boxes [N, 4]; labels, area, iscrowd [N]; masks [N, H, W], one for each object."),
    "empty boxes of a wrong shape": ("error", "Without objects: torch.zeros((0, 4)); boxes.reshape(-1, 4) does it."),
    "masks of another size than the image": ("error", "Resize, crop and rotate image and masks together."),
    "numbers of objects differ": ("error", f"One of each for each box. {_SANITIZE}"),
    "no objects": ("warning", "Allowed, but such a sample teaches the background only: is its annotation missing?"),
    "label 0": ("error", "0 is the background, and is not trained as an object: number your classes from 1."),
    "negative label": ("error", f"Number your classes from 1. {_ON_CUDA}"),
    "label beyond num_classes": ("error", f"num_classes counts the background: 1 + the highest label. {_ON_CUDA}"),
    "area or iscrowd out of range": ("error", "area is the mask's in pixels, over 0; iscrowd is 0 or 1."),
    "image_id is a tensor": ("warning", "Use an int: it needs no device, and can be a key of a dict."),
    "image_id is not an int": ("warning", "Use an int, the index for instance; COCO's evaluation wants one."),
    "image_id used more than once": ("error", "Evaluation would take them for one image: give each its own int."),
    # Boxes
    "NaN or infinity in boxes": ("error", "Look for a division by 0 or an empty mask; leave out the object."),
    "XYWH boxes": (
        "error",
        'Use torchvision.ops.box_convert(boxes, "xywh", "xyxy"); boxes of one source are XYWH in all samples.',
    ),
    "normalised boxes": ("error", "Boxes are in absolute pixels: multiply x by the width and y by the height."),
    "boxes in another form": ("error", "Boxes are XYXY (left, top, right, bottom) in absolute pixels."),
    "box with negative size": ("error", "x1 < x2 and y1 < y2: after a flip by hand, swap x1 and x2 too."),
    "box without size": ("error", f"Leave the object out (v2.SanitizeBoundingBoxes). {_LAST_PIXEL}"),
    "box outside the image": ("error", "Clip the boxes (v2.ClampBoundingBoxes); or was the image resized alone?"),
    "box a pixel outside the image": ("warning", "Are the corners 1-based? Subtract 1, or clip the boxes."),
    # Masks
    "mask values other than 0 and 1": ("error", "One mask an object: masks > 0, or ids == k for k in 1 to N."),
    "empty mask": ("error", "The object has no pixels: leave out its box, label and mask."),
    "box and mask disagree": ("error", "Are they in one order? boxes_from_masks(masks) gives the boxes of masks."),
    "box differs from its mask": ("warning", "Fine if boxes include hidden parts; else use boxes_from_masks(masks)."),
    "boxes one pixel short": ("warning", _LAST_PIXEL),
    # Several readings, several datasets
    "image and boxes move apart": ("error", _TOGETHER),
    _ALONE: ("warning", f"If an augmentation crops, shifts or rotates the image: {_TOGETHER}"),
    "image in both datasets": ("error", "Split by file; what belongs together (a video, a patient), into one part."),
}

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOATS = (torch.float32, torch.float64)
_DTYPES = {
    "boxes": _FLOATS,
    "labels": (torch.int64,),
    "masks": (torch.uint8, torch.bool),
    "area": _FLOATS + _INTEGERS,
    "iscrowd": (*_INTEGERS, torch.bool),
}


@dataclass(frozen=True)
class Finding:
    """One problem of one sample; ``kind`` is a key of :data:`PROBLEMS`, ``index`` None for the dataset as a whole."""

    kind: str
    message: str
    index: int | None = None
    file: str | None = None

    @property
    def severity(self) -> str:
        """``"error"``: training or evaluation would fail, or learn something wrong; ``"warning"``: look at it."""
        return PROBLEMS[self.kind][0]

    @property
    def hint(self) -> str:
        """What to do."""
        return PROBLEMS[self.kind][1]

    @property
    def where(self) -> str:
        if self.index is None:
            return "dataset"
        return f"sample {self.index}" + (f" ({self.file})" if self.file else "")


@dataclass(frozen=True)
class Report:
    """What :func:`check_dataset` found: print it, show it in a notebook, or let it raise.

    ``worst`` holds the first finding of up to three samples, those with most errors, and the samples as they were read.
    """

    findings: tuple[Finding, ...]
    num_samples: int
    num_objects: int
    worst: tuple[tuple[Finding, Any], ...] = field(default=(), repr=False, compare=False)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "warning"]

    @property
    def summary(self) -> str:
        """One line: how much was looked at, and how much was found."""
        text = f"{_count(self.num_samples, 'sample')} with {_count(self.num_objects, 'object')}: "
        return text + f"{_count(len(self.errors), 'error')}, {_count(len(self.warnings), 'warning')}"

    def grouped(self) -> list[list[Finding]]:
        """The findings of each kind; errors first, what is most frequent first."""
        groups = defaultdict(list)
        for finding in self.findings:
            groups[finding.kind].append(finding)
        return sorted(groups.values(), key=lambda group: (group[0].severity, -len(group)))

    def __str__(self) -> str:
        lines = [self.summary]
        for group in self.grouped():
            lines += ["", f"{group[0].severity}: {group[0].kind}, {_places(group)}"]
            for text in (group[0].message, f"→ {group[0].hint}"):
                lines.append(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    "))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Report {self.summary}>"

    def _repr_html_(self) -> str:
        rows = ""
        for group in self.grouped():
            colour = {"error": "#c62828", "warning": "#b26a00"}[group[0].severity]
            cells = [group[0].kind, _places(group), group[0].message, group[0].hint]
            cells = "".join(f'<td style="text-align:left">{html.escape(cell)}</td>' for cell in cells)
            name = f'<td style="text-align:left;color:{colour};font-weight:bold">{group[0].severity}</td>'
            rows += f'<tr style="vertical-align:top">{name}{cells}</tr>'
        heads = "".join(
            f'<th style="text-align:left">{head}</th>'
            for head in ("", "problem", "where", "what was seen first", "what to do")
        )
        table = f"<table><tr>{heads}</tr>{rows}</table>" if rows else ""
        pictures = ""
        for finding, sample in self.worst:
            title = f"{finding.where}: {finding.kind}"
            if jpeg := _picture(*_pair(sample), title):
                source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
                pictures += f'<img alt="{html.escape(title)}" src="{source}" style="display:inline;margin:4px">'
        return f"<p><b>{html.escape(self.summary)}</b></p>{table}<div>{pictures}</div>"

    def raise_for_errors(self) -> Report:
        """Return the report itself if it holds no errors.

        Raises:
            ValueError: naming the first three errors, their samples and files, and how many more there are.
        """
        if not self.errors:
            return self
        lines = [f"{error.where}: {error.kind}: {error.message} {error.hint}" for error in self.errors[:3]]
        more = [f"... and {_count(len(self.errors) - 3, 'more error')}"] if len(self.errors) > 3 else []
        raise ValueError("\n".join(["the dataset cannot be trained on:", *lines, *more]))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _places(group: list[Finding]) -> str:
    if len(group) == 1:
        return group[0].where
    first = ", ".join(finding.where.removeprefix("sample ") for finding in group[:4])
    return f"{len(group)} samples: {first}{', …' if len(group) > 4 else ''}"


def _picture(image: Any, target: Any, title: str) -> bytes:
    """A JPEG; empty where nothing can be drawn, however broken image and target are."""
    file, open_figures = io.BytesIO(), plt.get_fignums()
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if image.is_floating_point() and not 0 <= image.min() <= image.max() <= 1:
            image = (image - image.min()) / (image.max() - image.min())
        for drawn in (target, None):  # without the target, where it is the target that cannot be drawn
            with contextlib.suppress(Exception):
                figure = show([image], [drawn], [textwrap.fill(title, 40)], cell=(3.6, 3.2))
                figure.savefig(file, format="jpeg", dpi=80)
                break
    for number in set(plt.get_fignums()) - set(open_figures):
        plt.close(number)
    return file.getvalue()


def check_dataset(
    dataset: Dataset, num_classes: int | None = None, other: Dataset | None = None, *, progress: bool = True
) -> Report:
    """Look at every sample of a dataset for what would fail in training or evaluation, or teach something wrong.

    Up to 32 samples with objects are read several times, to see whether random transforms move image and boxes
    together. The generators of torch (on the CPU), numpy and ``random`` are seeded meanwhile, and set back afterwards.

    Args:
        dataset: map-style, of (image, target): a list, a ``Subset``, anything with ``__len__`` and ``__getitem__``.
            ``image`` should be float32 [3, H, W] in [0, 1]; ``target`` a dict with ``boxes`` float32 [N, 4] XYXY in
            absolute pixels and ``labels`` int64 [N] from 1; it may have ``masks`` uint8 or bool [N, H, W] of 0 and
            1, ``image_id`` int, ``area`` [N] and ``iscrowd`` [N]. Files are named where it has ``file_names``.
        num_classes: the model's, background included; labels must be under it.
        other: a second dataset, say the test images, that should share no image with the first. Compared by
            ``root`` and ``file_names`` where both have them and the same root, else by pixels: then give both
            without random transforms. It is not checked itself.
        progress: show a bar.

    Raises:
        TypeError: ``dataset`` or ``other`` is not map-style.

    Source: notebook 06.
    """
    for data in [dataset] if other is None else [dataset, other]:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, IterableDataset):
            need = "check_dataset needs a dataset with __len__ and __getitem__ (of a DataLoader, its .dataset)"
            raise TypeError(f"{need}, not a {type(data).__name__}")
    files, other_files = _files(dataset), _files(other)
    by_name = bool(files and other_files) and files[0][0] == other_files[0][0]
    names = [name for _, name in files] if files else [None] * len(dataset)
    findings, worst, objects, ids, digests = [], [], {}, defaultdict(list), []
    with _seeded():
        for index in tqdm(range(len(dataset)), file=sys.stdout, leave=False, disable=not progress):
            sample = _read(dataset, index)
            problems = list(_sample_problems(sample, num_classes))
            boxes, (_, target) = _boxes(sample), _pair(sample)
            if boxes is not None and len(boxes):
                objects[index] = len(boxes)
                if len(objects) <= _READ_AGAIN:
                    again = (_read(dataset, index) for _ in range(3 if len(dataset) >= 8 else 8))
                    problems += {kind: (kind, text) for one in again for kind, text in _move(sample, one)}.values()
            image_id = target.get("image_id") if isinstance(target, dict) else None
            if isinstance(image_id, Tensor) and image_id.numel() == 1:
                image_id = image_id.item()
            if isinstance(image_id, Integral):
                ids[image_id].append(index)
            if other is not None and not by_name:
                digests.append(_digest(sample))
            new = sorted((Finding(*one, index, names[index]) for one in problems), key=lambda finding: finding.severity)
            findings += new
            if new:
                num_errors = sum(finding.severity == "error" for finding in new)
                worst = sorted([*worst, (num_errors, new[0], sample)], key=lambda entry: -entry[0])[:3]
        if other is not None:
            read = tqdm(range(0 if by_name else len(other)), file=sys.stdout, leave=False, disable=not progress)
            others = other_files if by_name else [_digest(_read(other, j)) for j in read]
            places = {key: j for j, key in enumerate(others) if key is not None}
            for index, key in enumerate(files if by_name else digests):
                if key in places:
                    message = f"It is sample {places[key]} of the other dataset, too."
                    findings.append(Finding("image in both datasets", message, index, names[index]))
    for image_id, indices in ids.items():
        if len(indices) > 1:
            message = f"The samples {_some(indices)} have the image_id {image_id}."
            findings.append(Finding("image_id used more than once", message, indices[0], names[indices[0]]))
    # What chance may bring about on a few samples counts only where it is on most.
    for kind, tried in (("boxes one pixel short", len(objects)), (_ALONE, min(len(objects), _READ_AGAIN))):
        if 2 * sum(finding.kind == kind for finding in findings) <= tried:
            findings = [finding for finding in findings if finding.kind != kind]
    if not len(dataset):
        findings.append(Finding("empty dataset", "It has length 0."))
    elif not objects:
        findings.append(Finding("no objects in the dataset", f"No box in {_count(len(dataset), 'sample')}."))
    worst = tuple((finding, sample) for _, finding, sample in worst if finding in findings)
    return Report(tuple(findings), len(dataset), sum(objects.values()), worst)


def _files(dataset: Any) -> list[tuple[str, str]] | None:
    """Root and file name of every sample, through ``Subset``; None where they are not known."""
    if isinstance(dataset, Subset):
        files = _files(dataset.dataset)
        return files and [files[int(i)] if int(i) < len(files) else ("", "no such file") for i in dataset.indices]
    names = getattr(dataset, "file_names", None)
    if not isinstance(names, (list, tuple)) or len(names) != len(dataset):
        return None
    root = str(Path(str(getattr(dataset, "root", ""))).resolve())
    return [(root, str(name)) for name in names]


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed CUDA, too
    np.random.seed(0)
    random.seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _read(dataset: Dataset, index: int) -> Any:
    """The sample, or the exception that reading it raised."""
    try:
        return dataset[index]
    except Exception as error:
        return error


def _pair(sample: Any) -> tuple[Any, Any]:
    return tuple(sample) if isinstance(sample, (tuple, list)) and len(sample) == 2 else (None, None)


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().as_subclass(Tensor)


def _boxes(sample: Any) -> Tensor | None:
    """Boxes float64 [N, 4], or None where they are anything else than finite numbers of that shape."""
    target = _pair(sample)[1]
    boxes = target.get("boxes") if isinstance(target, dict) else None
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.is_complex():
        return None
    boxes = _plain(boxes).double()
    return boxes if boxes.isfinite().all() else None


def _mask_boxes(sample: Any) -> Tensor | None:
    """The boxes of the masks, float64 [N, 4], NaN for an empty one; None where masks do not fit image and boxes."""
    image, target = _pair(sample)
    boxes, masks = _boxes(sample), target.get("masks") if isinstance(target, dict) else None
    if boxes is None or not isinstance(masks, Tensor) or masks.shape != (len(boxes), *(_size(image) or ())):
        return None
    masks = _plain(masks) != 0
    tight = boxes_from_masks(masks).double()
    tight[~masks.flatten(1).any(dim=1)] = torch.nan
    return tight


def _size(image: Any) -> tuple[int, int] | None:
    """Height and width, also of images that are not as they should be; None of what is no image."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    if not isinstance(image, (Tensor, np.ndarray)) or image.ndim not in (2, 3):
        return None
    return tuple(image.shape[:2] if _channels_last(image) else image.shape[-2:])


def _channels_last(image: Tensor | np.ndarray) -> bool:
    return image.ndim == 3 and image.shape[2] in (1, 3, 4) and image.shape[0] > 4


def _digest(sample: Any) -> str | None:
    """The same for the same pixels; None of what is no image."""
    image = _pair(sample)[0]
    if _size(image) is None:
        return None
    pixels = np.ascontiguousarray(_plain(image) if isinstance(image, Tensor) else image)
    return hashlib.sha256(f"{pixels.dtype}{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


Problems = Iterator[tuple[str, str]]  # of kind and message


def _sample_problems(sample: Any, num_classes: int | None) -> Problems:
    if isinstance(sample, Exception):
        yield "unreadable sample", f"Reading it raised {type(sample).__name__}: {' '.join(str(sample).split())[:300]}"
    elif not isinstance(sample, (tuple, list)) or len(sample) != 2:
        length = f" of {len(sample)}" if isinstance(sample, (tuple, list)) else ""
        yield "sample is not a pair", f"It is a {type(sample).__name__}{length}."
    else:
        image, target = sample
        yield from _image_problems(image)
        if not isinstance(target, dict):
            yield "target is not a dict", f"It is a {type(target).__name__}."
            return
        yield from _target_problems(target, _size(image), num_classes)
        boxes, size = _boxes(sample), _size(image)
        form = target["boxes"].format.value if isinstance(target.get("boxes"), BoundingBoxes) else "XYXY"
        if form != "XYXY":
            yield _FORMS.get(form, "boxes in another form"), f"They are BoundingBoxes of format {form}."
        elif boxes is not None and len(boxes) and size is not None:
            yield from _box_problems(boxes, _mask_boxes(sample), size)


def _image_problems(image: Any) -> Problems:
    if not isinstance(image, Tensor):
        yield "image is not a tensor", f"It is a {type(image).__module__}.{type(image).__name__}."
        return
    image, shape = _plain(image), list(image.shape)
    if _channels_last(image):
        yield "image in another layout", f"It has the shape {shape}; the model takes [3, H, W]."
    elif image.ndim != 3 or shape[0] not in (1, 3):
        yield "image without 3 channels", f"It has the shape {shape}; the model takes [3, H, W]."
    elif shape[0] == 1:
        yield "grey image", f"It has the shape {shape}."
    if not image.numel() or min(_size(image) or [2]) < 2:
        yield "image too small", f"It has the shape {shape}."
        return
    if image.dtype != torch.float32:
        yield "image not float32", f"It is {_dtype(image)}; the model takes float32 in [0, 1]."
    if not image.is_floating_point():
        return
    low, high = image.min().item(), image.max().item()
    if not image.isfinite().all():
        yield "NaN or infinity in the image", f"So are {(~image.isfinite()).sum()} of its {image.numel()} values."
    elif low < -0.01:
        yield "image already normalised", f"Its values go from {low:.3g} to {high:.3g}."
    elif high > 1.01:
        yield "image not in [0, 1]", f"Its values go from {low:.3g} to {high:.3g}."


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _target_problems(target: dict, size: tuple[int, int] | None, num_classes: int | None) -> Problems:
    """All but the coordinates of boxes."""
    good = {}
    for key, dtypes in _DTYPES.items():
        value = target.get(key)
        if key not in target:
            if key in ("boxes", "labels"):
                yield "missing key", f'There is no "{key}" among its keys, {[str(name) for name in target]}.'
            continue
        if not isinstance(value, Tensor):
            yield "not a tensor", f"{key} is a {type(value).__name__}."
            continue
        if value.dtype not in dtypes:
            yield "wrong dtype", f"{key} is {_dtype(value)}."
            continue
        wanted = {"boxes": (4,), "masks": value.shape[1:] if size is None else size}.get(key, ())
        if key == "boxes" and tuple(value.shape) == (0,):
            yield "empty boxes of a wrong shape", "boxes have the shape [0]; the model takes [0, 4]."
        elif key == "masks" and value.ndim == 3 and tuple(value.shape[1:]) != tuple(wanted):
            sizes = [f"{w} x {h}" for h, w in (value.shape[1:], size)]
            yield "masks of another size than the image", f"The masks are {sizes[0]} pixels, the image {sizes[1]}."
        elif value.ndim != 1 + len(wanted) or tuple(value.shape[1:]) != tuple(wanted):
            yield "wrong shape", f"{key} has the shape {list(value.shape)}."
        else:
            good[key] = _plain(value)
    counts = {key: len(value) for key, value in good.items()}
    if len(set(counts.values())) > 1:
        yield "numbers of objects differ", ", ".join(f"{count} {key}" for key, count in counts.items()) + "."
    if counts.get("boxes") == 0:
        yield "no objects", "boxes have the shape [0, 4]."
    # Comparisons that hold of bad objects; nothing of an empty tensor is bad.
    boxes, labels, masks, area, iscrowd = (good.get(key, torch.zeros(0, 1, 1)) for key in _DTYPES)
    limit = torch.inf if num_classes is None else num_classes
    yield from _first("NaN or infinity in boxes", "boxes", boxes, ~boxes.isfinite().all(dim=1))
    yield from _first("label 0", "labels", labels, labels == 0)
    yield from _first("negative label", "labels", labels, labels < 0)
    yield from _first("label beyond num_classes", "labels", labels, labels >= limit, f", num_classes is {num_classes}")
    yield from _first("area or iscrowd out of range", "area", area, ~(area > 0))
    yield from _first("area or iscrowd out of range", "iscrowd", iscrowd, (iscrowd != 0) & (iscrowd != 1))
    if masks.numel() and masks.max() > 1:
        yield "mask values other than 0 and 1", f"Their values are {_some(masks.unique().tolist())}."
    pixels = (masks != 0).flatten(1).sum(dim=1)
    yield from _first("empty mask", "the number of pixels of masks", pixels, pixels == 0)
    if "image_id" in target:
        image_id = target["image_id"]
        if isinstance(image_id, Tensor):
            yield "image_id is a tensor", f"It is {_dtype(image_id)} of shape {list(image_id.shape)}."
        elif not isinstance(image_id, Integral):
            yield "image_id is not an int", f"It is a {type(image_id).__name__}, {image_id!r:.60}."


_FORMS = {"XYWH": "XYWH boxes", "normalised": "normalised boxes"}


def _some(values: list) -> str:
    return ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")


def _first(kind: str, name: str, values: Tensor, bad: Tensor, more: str = "") -> Problems:
    """The first of the bad objects, and how many there are."""
    if bad.any():
        first = int(bad.nonzero()[0][0])
        also = f" ({int(bad.sum())} such among {len(values)})" if bad.sum() > 1 else ""
        value = values[first].tolist()
        value = [round(number, 3) for number in value] if isinstance(value, list) else value
        yield kind, f"{name}[{first}] is {value}{more}{also}."


def _box_problems(boxes: Tensor, tight: Tensor | None, size: tuple[int, int]) -> Problems:
    """Of finite boxes [N, 4], N > 0; ``tight`` [N, 4] are the boxes of the masks, where there are good ones."""
    height, width = size
    ends, in_image = torch.tensor([width, height] * 2), f" in an image {width} wide and {height} high"
    fit = None if tight is None else _fit(boxes, tight)
    if tight is not None and fit < 0.5:
        corners = boxes.view(-1, 2, 2)
        forms = {"XYXY with swapped corners": torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)}
        forms["YXYX"] = boxes[:, [1, 0, 3, 2]]
        for form in ("XYXY", "XYWH", "CXCYWH"):
            forms[form] = box_convert(boxes, form.lower(), "xyxy")
            forms[f"normalised {form}"] = box_convert(boxes * ends, form.lower(), "xyxy")
        best = max(forms, key=lambda form: _fit(forms[form], tight))
        if _fit(forms[best], tight) > 0.8:
            kind = _FORMS.get(best.split()[0], "boxes in another form")
            yield kind, f"Read as {best} they fit their masks, IoU {_fit(forms[best], tight):.2f}; as XYXY, {fit:.2f}."
            return
    if (fit is None or fit < 0.5) and 0 <= boxes.min() <= boxes.max() <= 1 and max(size) > 2:
        yield "normalised boxes", f"All coordinates are in [0, 1]{in_image}."
        return
    start, end = boxes[:, :2], boxes[:, 2:]
    negative = (end < start).any(dim=1)
    if negative.any() and (end > 0).all() and (start >= 0).all() and (start + end <= ends[:2] + 1).all():
        guess = f"; as left, top, width and height all would fit{in_image}, so they seem to be XYWH"
        yield from _first("XYWH boxes", "boxes", boxes, negative, guess)
        return
    flat = (end == start).any(dim=1) & ~negative
    yield from _first("box with negative size", "boxes", boxes, negative)
    yield from _first("box without size", "boxes", boxes, flat)
    beyond = torch.cat([-boxes, boxes - ends], dim=1).amax(dim=1)
    yield from _first("box outside the image", "boxes", boxes, beyond > 1, in_image)
    yield from _first("box a pixel outside the image", "boxes", boxes, (beyond > 0.05) & (beyond <= 1), in_image)
    if tight is None:
        return
    apart = (tight - boxes) * torch.tensor([1, 1, -1, -1])  # how far the mask lies inside, at each side
    if 2 * ((apart - torch.tensor([0, 0, -1, -1])).abs().amax(dim=1) < 0.01).sum() > len(boxes):
        yield "boxes one pixel short", "They end one pixel before their masks at the right and at the bottom."
    # At the image's border a box may be larger than what a crop has left of its mask.
    cut = (apart > -1).all(dim=1) & (torch.cat([boxes, ends - boxes], dim=1) < 1).any(dim=1)
    judged = (apart.abs().amax(dim=1) > 2) & ~cut & ~negative & ~flat
    ious = box_iou(boxes, tight).diagonal()
    for kind, low, high in (("box and mask disagree", 0, 0.5), ("box differs from its mask", 0.5, 0.8)):
        bad = judged & (low <= ious) & (ious < high)
        for i in bad.nonzero()[:1, 0].tolist():
            beside = f", the box of its mask {tight[i].tolist()}, IoU {ious[i]:.2f}"
            yield from _first(kind, "boxes", boxes, bad, beside)


def _fit(boxes: Tensor, others: Tensor) -> float:
    """The median IoU of boxes [N, 4] with those at the same place in ``others``; NaN counts as 0."""
    return box_iou(boxes, others).diagonal().nan_to_num(0).median().item()


_FLIPS = {  # dimensions of an image, and what turning them round does
    (): "stayed",
    (-1,): "flipped left to right",
    (-2,): "flipped upside down",
    (-2, -1): "turned by 180 degrees",
}


def _move(first: Any, again: Any) -> Problems:
    """Compare two readings of one sample with objects."""
    if isinstance(again, Exception):
        yield from _sample_problems(again, None)
    boxes, others = _boxes(first), _boxes(again)
    images = [_pair(sample)[0] for sample in (first, again)]
    if not all(isinstance(image, Tensor) and image.ndim == 3 and min(image.shape[1:]) > 1 for image in images):
        return
    if others is None or len(boxes) != len(others):
        return
    height, width = (min(lengths) for lengths in zip(*(image.shape[1:] for image in images), strict=True))
    edges = [_edges(image[:, :height, :width]) for image in images]
    flips = _FLIPS if images[0].shape == images[1].shape else [()]
    alike = {flip: (edges[0].flip(flip) * edges[1]).sum().item() for flip in flips}
    fits = {flip: _fit(_flip(boxes, flip, height, width), others) for flip in flips}
    image, box = max(alike, key=alike.get), max(fits, key=fits.get)
    clear = all(alike[image] > score + 0.2 for flip, score in alike.items() if flip != image)
    if alike[image] > 0.6 and clear and fits[box] > 0.95 and fits[image] < 0.8:
        yield "image and boxes move apart", f"Read again, the image {_FLIPS[image]}, but boxes {_FLIPS[box]}."
    elif alike[image] < 0.2 and torch.equal(boxes, others):
        yield _ALONE, "Read again, the image has its edges elsewhere; the boxes are the same."


def _edges(image: Tensor) -> Tensor:
    """Where the edges of an image are, whatever its colours, in at most 64 x 64 cells; NaN where there are none."""
    grey = _plain(image).float().mean(dim=0)
    edges = (grey[1:, :-1] - grey[:-1, :-1]).abs() + (grey[:-1, 1:] - grey[:-1, :-1]).abs()
    cells = adaptive_avg_pool2d(edges.sqrt()[None], tuple(min(64, length) for length in edges.shape))[0]
    cells = cells - cells.mean()
    return cells / cells.norm()


def _flip(boxes: Tensor, flip: tuple[int, ...], height: int, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    if -1 in flip:
        x1, x2 = width - x2, width - x1
    if -2 in flip:
        y1, y2 = height - y2, height - y1
    return torch.stack([x1, y1, x2, y2], dim=1)
