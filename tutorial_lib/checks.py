"""What torchvision's detection models need from a dataset, checked sample by sample, in plain English.

A rule has two parts: a line in ``_ERRORS`` or ``_WARNINGS`` names the kind of problem and what to do about it, and a
function of ``_RULES`` yields the kind with a message. Notebook 07 uses :func:`check_dataset`.
"""

from __future__ import annotations

import contextlib
import functools
import html
import random
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.ops import box_convert, box_iou
from torchvision.transforms.v2.functional import horizontal_flip, vertical_flip
from torchvision.tv_tensors import BoundingBoxes
from tqdm import tqdm

from tutorial_lib.data import boxes_from_masks

_SHORT, _ONLY_IMAGE = "boxes one pixel short", "image changes, boxes do not"
_READ_AGAIN = 32  # so many samples with objects
_LAST_PIXEL = "torchvision.ops.masks_to_boxes returns the index of the last pixel: add 1 to x2 and y2."
_TOGETHER = "Pass image and target to one v2 transform, boxes as tv_tensors.BoundingBoxes, masks as tv_tensors.Mask."

# What to do about each kind of problem. Errors make training or evaluation fail, or the model learn something wrong.
_ERRORS = {
    "no objects in the dataset": "Check the folder, the file pattern, and how annotations and images are matched.",
    "unreadable sample": "dataset[index] shows the whole traceback. Fix the file, or leave it out.",
    "sample is not a pair": "__getitem__ must return (image, target).",
    # The image
    "image is not a float32 tensor": "Use v2.ToImage() and v2.ToDtype(torch.float32, scale=True).",
    "image not of shape [3, H, W]": 'Channels first: image.permute(2, 0, 1). RGB: Image.open(path).convert("RGB").',
    "NaN or infinity in the image": "Look for a division by 0 in the transforms, or leave the image out.",
    "image already normalised": "Pass pixels in [0, 1]: the model itself subtracts the mean and divides by std.",
    "image not in [0, 1]": "Divide by 255, or use v2.ToDtype(torch.float32, scale=True) on uint8.",
    # The target
    "target is not a dict": 'A target is a dict of tensors: {"boxes": ..., "labels": ...}.',
    "missing key": 'A target needs "boxes" and "labels", for Mask R-CNN also "masks", even without objects.',
    "wrong type": "Boxes are float32, labels int64, masks uint8: torch.as_tensor(value, dtype=...).",
    "wrong shape": "N objects have boxes [N, 4]; labels, area and iscrowd [N]; masks [N, H, W], of the image's size. "
    "Without objects, boxes are torch.zeros((0, 4)); boxes.reshape(-1, 4) gives this shape for any N.",
    "numbers of objects differ": "Every object needs one of each. v2.SanitizeBoundingBoxes removes area and iscrowd "
    "together with a box only if its labels_getter returns them, too.",
    "label 0": "Number classes from 1: 0 is the background for R-CNN and SSD. (RetinaNet and FCOS do train a class 0.)",
    "negative label": "Number classes from 1. Faster R-CNN and Mask R-CNN ignore such objects without a message.",
    "label beyond num_classes": "num_classes counts the background: it is 1 + the highest label. On CUDA this is the "
    "error 'device-side assert triggered', which names no sample.",
    "area or iscrowd out of range": "area is in pixels, the mask's if there is one, and over 0; iscrowd is 0 or 1.",
    "image_id used more than once": "Evaluation takes them for one image. Give each an int of its own.",
    # Boxes and masks
    "NaN or infinity in boxes": "Look for a division by 0 or an empty mask, or leave the object out.",
    "boxes in another format": "Boxes are XYXY (left, top, right, bottom) in pixels. Convert those of all samples: "
    'torchvision.ops.box_convert(boxes, "xywh", "xyxy"); multiply normalised x by the width, y by the height.',
    "box with negative size": "x1 < x2 and y1 < y2. A flip by hand has to swap x1 and x2, too.",
    "box without size": f"{_LAST_PIXEL} If the box is not from a mask, leave the object out.",
    "box outside the image": "Clip boxes (v2.ClampBoundingBoxes). Or was only the image resized?",
    "mask values other than 0 and 1": "Use one mask per object: masks > 0, or ids == k for k from 1 to N.",
    "empty mask": "The object has no pixels: leave out its box, label and mask.",
    "box and mask disagree": "Are they in the same order? boxes_from_masks(masks) computes the boxes of masks.",
    # Several readings, two datasets
    "image and boxes move apart": _TOGETHER,
    "image in both datasets": "Split by file. Keep what belongs together (a video, a patient) in one part.",
}
_WARNINGS = {
    "no objects": "This is allowed, and teaches only the background. Is the annotation missing?",
    "image_id is not an int": "Use an int, for instance the index: COCO's evaluation expects one.",
    "box differs from its mask": "Fine if boxes include hidden parts; otherwise use boxes_from_masks(masks).",
    _SHORT: _LAST_PIXEL,
    _ONLY_IMAGE: f"Does a transform crop, shift or rotate only the image? {_TOGETHER}",
}
# Of each kind, its severity and what to do.
PROBLEMS = {kind: ("error", hint) for kind, hint in _ERRORS.items()}
PROBLEMS |= {kind: ("warning", hint) for kind, hint in _WARNINGS.items()}


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
        place = "dataset" if self.index is None else f"sample {self.index}"
        return place + (f" ({self.file})" if self.file else "")


@dataclass(frozen=True)
class Report:
    """What :func:`check_dataset` found: print it, show it in a notebook, or let it raise."""

    findings: tuple[Finding, ...]
    num_samples: int
    num_objects: int

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "warning"]

    @property
    def summary(self) -> str:
        """One line: how much was checked, and how much was found."""
        text = f"{_count(self.num_samples, 'sample')} with {_count(self.num_objects, 'object')}: "
        return text + f"{_count(len(self.errors), 'error')}, {_count(len(self.warnings), 'warning')}"

    def grouped(self) -> list[list[Finding]]:
        """The findings of each kind: errors first, then the most frequent first."""
        kinds = dict.fromkeys(finding.kind for finding in self.findings)
        groups = [[finding for finding in self.findings if finding.kind == kind] for kind in kinds]
        return sorted(groups, key=lambda group: (group[0].severity, -len(group)))

    def __str__(self) -> str:
        lines = [self.summary]
        for severity, kind, where, message, hint in map(_row, self.grouped()):
            lines += ["", f"{severity}: {kind}, {where}"]
            for text in (message, f"→ {hint}"):
                lines.append(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    "))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [("severity", "kind", "where", "first message", "what to do"), *map(_row, self.grouped())]
        cells = ["".join(f'<td style="text-align:left">{html.escape(text)}</td>' for text in row) for row in rows]
        table = "".join(f"<tr>{row}</tr>" for row in cells) if self.findings else ""
        return f"<p>{html.escape(self.summary)}</p><table>{table}</table>"

    def raise_for_errors(self) -> Report:
        """Return the report itself if it holds no errors.

        Raises:
            ValueError: with the first three errors, their samples and files, and how many more there are.
        """
        if not self.errors:
            return self
        lines = [f"{error.where}: {error.kind}: {error.message} {error.hint}" for error in self.errors[:3]]
        more = [f"... and {_count(len(self.errors) - 3, 'more error')}"] if len(self.errors) > 3 else []
        raise ValueError("\n".join(["the dataset cannot be trained on:", *lines, *more]))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(values: list, most: int) -> str:
    return ", ".join(map(str, values[:most])) + (", …" if len(values) > most else "")


def _row(group: list[Finding]) -> tuple[str, str, str, str, str]:
    """Severity, kind, samples, first message and hint of the findings of one kind."""
    first, places = group[0], list(dict.fromkeys(finding.where.removeprefix("sample ") for finding in group))
    where = first.where if len(places) == 1 else f"{len(places)} samples: {_some(places, 4)}"
    return first.severity, first.kind, where, first.message, first.hint


def check_dataset(
    dataset: Dataset, num_classes: int | None = None, other: Dataset | None = None, *, progress: bool = True
) -> Report:
    """Check every sample of a dataset for what would fail in training or evaluation, or teach something wrong.

    Up to 32 samples with objects are read several times, to see whether random transforms move image and boxes
    together. The random generators of torch (on the CPU), numpy and ``random`` are seeded for that time only.

    Args:
        dataset: map-style, of (image, target): a list, a ``Subset``, anything with ``__len__`` and ``__getitem__``.
            ``image`` should be float32 [3, H, W] in [0, 1]; ``target`` a dict with ``boxes`` float32 [N, 4] XYXY in
            absolute pixels and ``labels`` int64 [N] from 1; it may have ``masks`` uint8 or bool [N, H, W] of 0 and
            1, ``image_id`` int, ``area`` [N] and ``iscrowd`` [N]. If it has ``file_names``, findings name the file.
        num_classes: the model's, background included; labels must be lower.
        other: a second dataset, such as the test images, that should share no image with the first. Images are
            compared by ``file_names`` if both datasets have them and the same ``root``, else by pixels: then pass
            both without random transforms. The second dataset is not checked.
        progress: show a bar.

    Raises:
        TypeError: ``dataset`` or ``other`` is not map-style.

    Source: notebook 07.
    """
    for data in [dataset] if other is None else [dataset, other]:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, IterableDataset):
            need = "check_dataset needs a dataset with __len__ and __getitem__ (of a DataLoader, its .dataset)"
            raise TypeError(f"{need}, not a {type(data).__name__}")
    bar = functools.partial(tqdm, file=sys.stdout, leave=False, disable=not progress)
    root, names = _files(dataset)
    other_root, other_names = (None, []) if other is None else _files(other)
    by_name = root is not None and root == other_root
    findings, objects, ids, digests = [], [], {}, []
    with contextlib.ExitStack() as undo:
        undo.callback(torch.set_rng_state, torch.get_rng_state())
        undo.callback(np.random.set_state, np.random.get_state())
        undo.callback(random.setstate, random.getstate())
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed CUDA, too
        np.random.seed(0)
        random.seed(0)
        for index in bar(range(len(dataset))):
            sample = _Sample(dataset, index)
            problems = sample.problems + [problem for rule in _RULES for problem in rule(sample, num_classes)]
            if len(sample.boxes):
                objects.append(len(sample.boxes))
                if len(objects) <= _READ_AGAIN:
                    again = (_Sample(dataset, index) for _ in range(3 if len(dataset) >= 8 else 8))
                    problems += {problem[0]: problem for one in again for problem in _moves(sample, one)}.values()
            findings += [Finding(kind, message, index, names[index]) for kind, message in problems]
            if isinstance(image_id := sample.target.get("image_id"), Integral):
                ids.setdefault(image_id, []).append(index)
            if other is not None and not by_name:
                digests.append(_digest(sample.image))
        if other is not None and not by_name:
            other_names = [_digest(_Sample(other, index).image) for index in bar(range(len(other)))]
    places = {key: index for index, key in enumerate(other_names)}
    for index, key in enumerate(names if by_name else digests):
        if key is not None and key in places:
            message = f"It is also sample {places[key]} of the other dataset."
            findings.append(Finding("image in both datasets", message, index, names[index]))
    for image_id, indices in ids.items():
        if len(indices) > 1:
            message = f"The samples {_some(indices, 8)} have the image_id {image_id}."
            findings.append(Finding("image_id used more than once", message, indices[0], names[indices[0]]))
    # In a few samples these can be chance: they count where most samples have them.
    for kind, tried in ((_SHORT, len(objects)), (_ONLY_IMAGE, min(len(objects), _READ_AGAIN))):
        if 2 * sum(finding.kind == kind for finding in findings) <= tried:
            findings = [finding for finding in findings if finding.kind != kind]
    if not objects and all(finding.severity == "warning" for finding in findings):
        findings.append(Finding("no objects in the dataset", f"There is no box in {_count(len(dataset), 'sample')}."))
    return Report(tuple(findings), len(dataset), sum(objects))


def _files(dataset: Any) -> tuple[str | None, list[str | None]]:
    """The folder and the file name of every sample, through ``Subset``; None where they are not known."""
    if isinstance(dataset, Subset):
        root, names = _files(dataset.dataset)
        return root, [names[int(i)] if int(i) < len(names) else None for i in dataset.indices]
    root, names = getattr(dataset, "root", None), getattr(dataset, "file_names", None)
    if not isinstance(names, (list, tuple)) or len(names) != len(dataset):
        return None, [None] * len(dataset)
    return None if root is None else str(root), [str(name) for name in names]


Problems = Iterator[tuple[str, str]]  # of kind and message
_KEYS = ("boxes", "labels", "masks", "area", "iscrowd")
_DTYPES = {"boxes": (torch.float32, torch.float64), "labels": (torch.int64,), "masks": (torch.uint8, torch.bool)}


class _Sample:
    """A sample as it was read: what of it has the right form, and the ``problems`` of the rest.

    ``tensors`` holds those parts of the target that have the right shape; ``size`` is the image's height and width,
    None where its shape is wrong; ``boxes`` is float64 [N, 4], and empty where boxes are not finite numbers.
    """

    def __init__(self, dataset: Dataset, index: int):
        self.image, self.size, self.target, self.tensors = None, None, {}, {}
        self.problems = list(self._read(dataset, index))
        boxes = self.tensors.get("boxes", torch.zeros(0, 4)).double()
        self.boxes = boxes if boxes.isfinite().all() else boxes[:0]

    def _read(self, dataset: Dataset, index: int) -> Problems:
        try:
            sample = dataset[index]
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            yield "unreadable sample", f"Reading it raised {type(error).__name__}: {text}"
            return
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            yield "sample is not a pair", f"It is {_type(sample)}."
            return
        self.image, target = sample
        if isinstance(self.image, Tensor):
            self.image = _plain(self.image)
            if self.image.ndim == 3 and self.image.shape[0] in (1, 3) and min(self.image.shape[1:]) > 1:
                self.size = tuple(self.image.shape[1:])
            else:
                yield "image not of shape [3, H, W]", f"It has the shape {list(self.image.shape)}."
        if not isinstance(self.image, Tensor) or self.image.dtype != torch.float32:
            yield "image is not a float32 tensor", f"It is {_type(self.image)}."
        if not isinstance(target, dict):
            yield "target is not a dict", f"It is {_type(target)}."
            return
        self.target = target
        for key in _KEYS:
            value = target.get(key)
            if isinstance(value, Tensor):
                inner = {"boxes": (4,), "masks": self.size or value.shape[1:3]}.get(key, ())
                if value.ndim == 1 + len(inner) and value.shape[1:] == inner:
                    self.tensors[key] = _plain(value)
                else:
                    right = ", ".join(map(str, ("N", *inner)))
                    yield "wrong shape", f"{key} has the shape {list(value.shape)}, and not [{right}]."
            if key not in target:
                if key in ("boxes", "labels"):
                    yield "missing key", f'There is no "{key}" among its keys, {[str(name) for name in target]}.'
            elif not isinstance(value, Tensor) or value.dtype not in _DTYPES.get(key, (value.dtype,)):
                yield "wrong type", f"{key} is {_type(value)}."


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().as_subclass(Tensor).real


def _type(value: Any) -> str:
    length = f" (length {len(value)})" if isinstance(value, (tuple, list)) else ""
    return f"of type {type(value).__name__}" + (f" ({value.dtype})" if isinstance(value, Tensor) else length)


def _digest(image: Any) -> int | None:
    """The same for the same pixels; None for what is not a tensor."""
    return hash((image.shape, image.float().numpy().tobytes())) if isinstance(image, Tensor) else None


def _image_rules(sample: _Sample, num_classes: int | None) -> Problems:
    image = sample.image
    if isinstance(image, Tensor) and image.is_floating_point() and image.numel():
        low, high = image.min().item(), image.max().item()
        message = f"Its values range from {low:.3g} to {high:.3g}."
        if not np.isfinite(high - low):
            yield "NaN or infinity in the image", message
        elif low < -0.01:
            yield "image already normalised", message
        elif high > 1.01:
            yield "image not in [0, 1]", message


def _object_rules(sample: _Sample, num_classes: int | None) -> Problems:
    counts = {key: len(value) for key, value in sample.tensors.items()}
    if len(set(counts.values())) > 1:
        yield "numbers of objects differ", ", ".join(f"{count} {key}" for key, count in counts.items()) + "."
    if counts.get("boxes") == 0:
        yield "no objects", "boxes have the shape [0, 4]."
    if not isinstance(image_id := sample.target.get("image_id", 0), Integral):
        yield "image_id is not an int", f"It is {_type(image_id)}: {image_id!r:.60}."
    # Of each kind: which objects are bad. No object of an empty tensor is.
    boxes, labels, masks, area, iscrowd = (sample.tensors.get(key, torch.zeros(0, 1, 1)) for key in _KEYS)
    highest = torch.inf if num_classes is None else num_classes - 1
    yield from _first("NaN or infinity in boxes", "boxes", boxes, ~boxes.isfinite().all(dim=1))
    yield from _first("label 0", "labels", labels, labels == 0)
    yield from _first("negative label", "labels", labels, labels < 0)
    yield from _first("label beyond num_classes", "labels", labels, labels > highest, f", num_classes is {num_classes}")
    yield from _first("area or iscrowd out of range", "area", area, ~(area > 0))
    yield from _first("area or iscrowd out of range", "iscrowd", iscrowd, (iscrowd != 0) & (iscrowd != 1))
    yield from _first("mask values other than 0 and 1", "masks", masks, (masks > 1).flatten(1).any(dim=1))
    yield from _first("empty mask", "masks", masks, (masks == 0).flatten(1).all(dim=1))


def _first(kind: str, name: str, values: Tensor, bad: Tensor, more: str = "") -> Problems:
    """The first of the bad objects, and how many there are."""
    if bad.any():
        first, count = int(bad.int().argmax()), int(bad.sum())
        value, verb = (values[first], "is") if values.ndim < 3 else (values[first].unique(), "has the values")
        shown = [round(number, 3) for number in value.flatten().tolist()]
        shown = shown[0] if len(shown) == 1 else f"[{_some(shown, 8)}]"
        also = f" ({count} such among {len(values)})" if count > 1 else ""
        yield kind, f"{name}[{first}] {verb} {shown}{more}{also}."


def _box_rules(sample: _Sample, num_classes: int | None) -> Problems:
    boxes, as_read, masks, tight = sample.boxes, sample.target.get("boxes"), sample.tensors.get("masks"), None
    if isinstance(as_read, BoundingBoxes) and as_read.format.value != "XYXY":
        yield "boxes in another format", f"They are BoundingBoxes of format {as_read.format.value}."
        return
    if not len(boxes) or sample.size is None:
        return
    height, width = sample.size
    ends, in_image = torch.tensor([width, height] * 2), f", in an image {width} wide and {height} high"
    start, end = boxes[:, :2], boxes[:, 2:]
    negative = (end < start).any(dim=1)
    # In which format do boxes fit their masks, or without masks the image?
    if masks is not None and len(masks) == len(boxes):
        full, tight = (masks != 0).flatten(1).any(dim=1), torch.full_like(boxes, torch.nan)
        tight[full] = boxes_from_masks(masks[full]).double()  # before torchvision 0.26 masks_to_boxes raises on others
        formats = {"YXYX": boxes[:, [1, 0, 3, 2]]}
        for name in ("XYXY", "XYWH", "CXCYWH"):
            formats[name] = box_convert(boxes, name.lower(), "xyxy")
            formats[f"normalised {name}"] = box_convert(boxes * ends, name.lower(), "xyxy")
        fits = {name: _fit(read, tight) for name, read in formats.items()}
        best = max(fits, key=fits.get)
        if fits["XYXY"] < 0.5 and fits[best] > 0.8:
            yield (
                "boxes in another format",
                f"Read as {best} they fit their masks, IoU {fits[best]:.2f}, and not as XYXY.",
            )
            return
    elif 0 <= boxes.min() and 0 < boxes.max() <= 1:
        yield "boxes in another format", f"All are in [0, 1]{in_image}, so they seem to be normalised."
        return
    elif negative.any() and (start >= 0).all() and (end > 0).all() and (start + end <= ends[:2] + 1).all():
        yield from _first("boxes in another format", "boxes", boxes, negative, f"; as XYWH all would fit{in_image}")
        return
    yield from _first("box with negative size", "boxes", boxes, negative)
    yield from _first("box without size", "boxes", boxes, (end == start).any(dim=1) & ~negative)
    beyond = torch.cat([-boxes, boxes - ends], dim=1).amax(dim=1)
    yield from _first("box outside the image", "boxes", boxes, beyond > 1, in_image)
    if tight is None:
        return
    gap = (tight - boxes) * torch.tensor([1, 1, -1, -1])  # from the box inwards to its mask, at each side
    if 2 * ((gap - torch.tensor([0, 0, -1, -1])).abs().amax(dim=1) < 0.01).sum() > len(boxes):
        yield _SHORT, "They end one pixel before their masks at the right and at the bottom."
    # At the image's border a box may be larger than what a crop has left of its mask.
    cut = (gap > -1).all(dim=1) & (torch.cat([boxes, ends - boxes], dim=1) < 1).any(dim=1)
    judged = (gap.abs().amax(dim=1) > 2) & ~cut & (end > start).all(dim=1)
    ious = box_iou(boxes, tight).diagonal()
    for kind, low, high in (("box and mask disagree", 0, 0.5), ("box differs from its mask", 0.5, 0.8)):
        bad = judged & (low <= ious) & (ious < high)
        first = int(bad.int().argmax())
        beside = f", the box of its mask {tight[first].tolist()}, IoU {ious[first]:.2f}"
        yield from _first(kind, "boxes", boxes, bad, beside)


def _fit(boxes: Tensor, others: Tensor) -> float:
    """The median IoU of boxes [N, 4] with the boxes of the same index in ``others``; NaN counts as 0."""
    return box_iou(boxes, others).diagonal().nan_to_num(0).median().item()


_RULES = (_image_rules, _object_rules, _box_rules)
_FLIPS = {"stayed": torch.clone, "flipped left to right": horizontal_flip, "flipped upside down": vertical_flip}


def _moves(first: _Sample, again: _Sample) -> Problems:
    """Compare two readings of one sample."""
    yield from (problem for problem in again.problems if problem[0] == "unreadable sample")
    if first.size is None or again.size is None or len(first.boxes) != len(again.boxes):
        return
    height, width = size = tuple(map(min, first.size, again.size))
    edges = [_edges(sample.image[:, :height, :width]) for sample in (first, again)]
    boxes = BoundingBoxes(first.boxes, format="XYXY", canvas_size=size)
    alike = {name: (flip(edges[0]) * edges[1]).sum().item() for name, flip in _FLIPS.items()}
    fits = {name: _fit(flip(boxes), again.boxes) for name, flip in _FLIPS.items()}
    image, box = max(alike, key=alike.get), max(fits, key=fits.get)
    clear = all(alike[image] > score + 0.2 for name, score in alike.items() if name != image)
    if alike[image] > 0.6 and clear and fits[box] > 0.95 and fits[image] < 0.8:
        yield "image and boxes move apart", f"Read again, the image {image}, but the boxes {box}."
    elif alike[image] < 0.2 and torch.equal(first.boxes, again.boxes):
        yield _ONLY_IMAGE, "Read again, the image has its edges elsewhere; the boxes are the same."


def _edges(image: Tensor) -> Tensor:
    """Where the edges of an image are, whatever its colours, in at most 64 x 64 cells; NaN where there are none."""
    grey = image.float().mean(dim=0)
    edges = (grey[1:, :-1] - grey[:-1, :-1]).abs() + (grey[:-1, 1:] - grey[:-1, :-1]).abs()
    cells = torch.nn.functional.adaptive_avg_pool2d(edges.sqrt()[None], [min(64, n) for n in edges.shape])[0]
    cells = cells - cells.mean()
    return cells / cells.norm()
