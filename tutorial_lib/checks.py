"""What torchvision's detection models need from a dataset, checked sample by sample, in plain English.

A rule has two parts: a line in ``_ERRORS`` or ``_WARNINGS`` names the kind of problem and what to do about it, and a
function yields the kind with a message: ``_Sample._read`` and the ``..._rules`` for one sample, ``_dataset_rules`` for
all together. Notebook 07 uses :func:`check_dataset`.
"""

from __future__ import annotations

import contextlib
import random
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.ops import box_area, box_convert, box_iou
from torchvision.transforms.v2.functional import horizontal_flip, vertical_flip
from torchvision.tv_tensors import BoundingBoxes
from tqdm import tqdm

from tutorial_lib.data import boxes_from_masks

# So many samples with objects are read again; objects of an image are many; samples or objects are few.
_READ_AGAIN, _MANY, _FEW = 32, 100, 10
_SHORT, _ONLY_IMAGE, _MASK = "boxes one pixel short", "image changes, boxes do not", "mask is not one object"
# In a few samples these can be chance. They count where most samples with objects have them.
_USUAL = ("image of 0 and 1", "no visible keypoints", "area of another size", _SHORT, _ONLY_IMAGE, _MASK)
_LAST_PIXEL = "torchvision.ops.masks_to_boxes returns the index of the last pixel: add 1 to x2 and y2."
_TOGETHER = "Pass image and target to one v2 transform, boxes as tv_tensors.BoundingBoxes, masks as tv_tensors.Mask."

# What to do about each kind of problem. Errors make training or evaluation fail, or the model learn something wrong.
_ERRORS = {
    "no objects in the dataset": "Check the folder, the file pattern, and how annotations and images are matched.",
    "unreadable sample": "The file or its annotation (a polygon of two points?) is at fault: fix it, or leave it out.",
    "sample is not a pair": "__getitem__ must return (image, target).",
    # The image
    "image is not a float32 tensor": "Use v2.ToImage() and v2.ToDtype(torch.float32, scale=True).",
    "image not of shape [3, H, W]": 'Channels first: image.permute(2, 0, 1). RGB: Image.open(path).convert("RGB").',
    "NaN or infinity in the image": "Look for a division by 0 in the transforms, or leave the image out.",
    "image already normalised": "Pass pixels in [0, 1]: the model itself subtracts the mean and divides by std.",
    "image not in [0, 1]": "Divide by 255, or use v2.ToDtype(torch.float32, scale=True) on uint8.",
    # The target
    "target is not a dict": 'A target is a dict of tensors: {"boxes": ..., "labels": ...}.',
    "missing key": "All need boxes, labels, and what the others have. Without objects: boxes=torch.zeros(0, 4), "
    "labels=torch.zeros(0, dtype=torch.int64), masks=torch.zeros(0, H, W, dtype=torch.uint8).",
    "wrong type": "Boxes are float32, labels int64, masks uint8: torch.as_tensor(value, dtype=...).",
    "wrong shape": "Boxes [N, 4]; labels, area, iscrowd [N]; masks [N, H, W]; keypoints [N, K, 3]; no box: [0, 4].",
    "numbers of objects differ": "v2.SanitizeBoundingBoxes drops area and iscrowd if its labels_getter returns them.",
    "label 0": "Number classes from 1: 0 is the background for R-CNN and SSD. (RetinaNet and FCOS do train a class 0.)",
    "negative label": "Number classes from 1. Faster R-CNN and Mask R-CNN ignore such objects without a message.",
    "label beyond num_classes": "num_classes is 1 + the highest label. CUDA says only 'device-side assert triggered'.",
    "area or iscrowd out of range": "area is in pixels, the mask's if there is one, and over 0; iscrowd is 0 or 1.",
    "keypoints out of range": "x and y are pixels inside the image; then 0 (no point), 1 (hidden) or 2 (seen).",
    "image_id used more than once": "Evaluation takes them for one image. Give each an int of its own.",
    # Boxes and masks
    "canvas of another size": f"{_TOGETHER} transform= moves only the image. Or does EXIF turn it?",
    "NaN or infinity in boxes": "Look for a division by 0 or an empty mask, or leave the object out.",
    "boxes in another format": 'Use XYXY in pixels: ops.box_convert(boxes, "xywh", "xyxy"), or times width and height.',
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
    "image nearly of one value": "Look at it: a failed read, 16 bits cut to 8, or a second division by 255?",
    "no objects": "This is allowed, and teaches only the background. Is the annotation missing?",
    "image_id is not an int": "Use an int, for instance the index: COCO's evaluation expects one.",
    "key not checked": "Check it yourself. Transforms move only tv_tensors, and models ignore what they do not know.",
    "crowds": "Training takes a crowd for one object, evaluation does not. To train: CocoDataset(..., crowds=False).",
    "many objects": "Memory grows with boxes x anchors, and with N x H x W bytes of masks: cut such images into tiles.",
    "unused labels": "num_classes is 1 + the highest label. Number without gaps; or are annotations missing?",
    "labels only in the other dataset": "No model detects what training does not show: split in another way.",
    "rare labels": "They are hardly learned: get more objects, join classes, or show their images more often.",
    "boxes far from right and bottom": f"Was only the image enlarged? {_TOGETHER}",
    "box differs from its mask": "Fine if boxes include hidden parts; otherwise use boxes_from_masks(masks).",
    # Those of _USUAL
    "image of 0 and 1": "Are 16-bit values cut to 8 bits? Line art may be so.",
    "no visible keypoints": "Points of visibility 0 are not learned: 1 is a hidden point, 2 one that is seen.",
    "area of another size": "Evaluation reads it. Compute it from the mask, after transforms that resize or crop.",
    _SHORT: _LAST_PIXEL,
    _ONLY_IMAGE: f"Does a transform crop, shift or rotate only the image? {_TOGETHER}",
    _MASK: "A number in a mask file must be one object, 0 the background. Of classes, or of 0 and 255, convert."
    'from_masks(kind="semantic") makes objects. Resize masks with NEAREST, save them as PNG.',
}
# What to do about each kind of problem, which is a warning unless it is one of the errors.
PROBLEMS = {kind: ("error" if kind in _ERRORS else "warning", hint) for kind, hint in (_ERRORS | _WARNINGS).items()}


@dataclass(frozen=True)
class Finding:
    """One problem of one sample; ``kind`` is a key of :data:`PROBLEMS`, ``index`` None for the dataset as a whole.

    ``severity`` is ``"error"`` where training or evaluation would fail, or learn something wrong, and ``"warning"``
    where you should look; ``hint`` is what to do.
    """

    kind: str
    message: str
    index: int | None = None
    file: str | None = None
    severity = property(lambda self: PROBLEMS[self.kind][0])
    hint = property(lambda self: PROBLEMS[self.kind][1])

    where = property(lambda x: "dataset" if x.index is None else f"sample {x.index}" + f" ({x.file})" * bool(x.file))


@dataclass(frozen=True)
class Report:
    """What :func:`check_dataset` found: print it, show it in a notebook, or let it raise.

    ``objects_per_image`` is the least, the median and the most; ``classes`` has of each label the numbers of objects
    and of images; ``categories`` the name of each label, if the dataset has names.
    """

    findings: tuple[Finding, ...]
    num_samples: int
    num_objects: int
    objects_per_image: tuple[int, float, int] = (0, 0, 0)
    classes: dict[int, tuple[int, int]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    errors = property(lambda self: [finding for finding in self.findings if finding.severity == "error"])
    warnings = property(lambda self: [finding for finding in self.findings if finding.severity == "warning"])

    @property
    def summary(self) -> str:
        """One line: how much was checked, and how much was found."""
        text = f"{_count(self.num_samples, 'sample')} with {_count(self.num_objects, 'object')}: "
        return text + f"{_count(len(self.errors), 'error')}, {_count(len(self.warnings), 'warning')}"

    def grouped(self) -> list[list[Finding]]:
        """The findings of each kind: errors first, then those of the most samples first."""
        kinds = dict.fromkeys(one.kind for one in self.findings)
        groups = [[one for one in self.findings if one.kind == kind] for kind in kinds]
        return sorted(groups, key=lambda group: (group[0].severity, -len({finding.index for finding in group})))

    def __repr__(self) -> str:
        lines = [self.summary, "objects per image: {0:g} to {2:g}, median {1:g}".format(*self.objects_per_image)]
        for label, (objects, images) in self.classes.items():
            lines.append(f"{objects:>9} in {images:>6} images: label {label} {self.categories.get(label, '')}".rstrip())
        for group in self.grouped():
            first, places = group[0], list(dict.fromkeys(finding.where.removeprefix("sample ") for finding in group))
            where = first.where if len(places) == 1 else f"{len(places)} samples: {_some(places, 4)}"
            lines += ["", f"{first.severity}: {first.kind}, {where}"]
            lines += [textwrap.indent(textwrap.fill(text, 96), "    ") for text in (first.message, f"→ {first.hint}")]
        return "\n".join(lines)

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


def _some(values: list, most: int = 8) -> str:
    return ", ".join(map(str, values[:most])) + (", …" if len(values) > most else "")


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
            1, ``keypoints`` [N, K, 3] of x, y and visibility (0, 1 or 2), ``image_id`` int, ``area`` [N] and
            ``iscrowd`` [N]. If it has ``file_names``, findings name the file; if it has ``categories``, with
            ``"__background__"`` first, the report names the classes.
        num_classes: the model's, background included; labels must be lower.
        other: a second dataset, such as the test images, that should share no image with the first. Images are
            compared by ``file_names`` if both datasets have them and the same ``root``, else by pixels: then pass
            both without random transforms. Its labels are compared, too, if its images are read or if it has
            ``get_target(index)``. The second dataset is not checked.
        progress: show a bar.

    Raises:
        TypeError: ``dataset`` or ``other`` is not map-style.

    Source: notebook 07.
    """
    for data in [dataset] if other is None else [dataset, other]:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, IterableDataset):
            raise TypeError(f"a dataset needs __getitem__ (of a DataLoader, its .dataset), not a {type(data).__name__}")
    bar = {"file": sys.stdout, "leave": False, "disable": not progress}
    (base, entries), (other_base, other_entries) = _files(dataset), _files(other or [])
    names, other_names = ([name for _, name in pairs] for pairs in (entries, other_entries))
    roots = [getattr(data, "root", None) for data in (base, other_base)]
    by_name = None not in (*roots, *names[:1], *other_names[:1]) and str(roots[0]) == str(roots[1])
    samples, tried, other_labels, places = [], 0, set(), {}
    with torch.random.fork_rng(devices=[]), contextlib.ExitStack() as undo:
        undo.callback(np.random.set_state, np.random.get_state())
        undo.callback(random.setstate, random.getstate())
        for seed in (torch.default_generator.manual_seed, np.random.seed, random.seed):
            seed(0)  # torch.manual_seed would seed CUDA, too
        for index in tqdm(range(len(other or [])), **bar):
            read = (lambda i: (None, other_base.get_target(other_entries[i][0]))) if by_name else other.__getitem__
            sample = _Sample(read, index)
            other_labels.update(sample.labels)
            places[other_names[index] if by_name else _digest(sample.image)] = index
        for index in tqdm(range(len(dataset)), **bar):
            samples.append(sample := _Sample(dataset.__getitem__, index))
            for rule in (_image_rules, _object_rules, _box_rules):
                sample.problems += rule(sample, num_classes)
            tried += len(sample.boxes) > 0
            if len(sample.boxes) and tried <= _READ_AGAIN:
                again = (_Sample(dataset.__getitem__, index) for _ in range(3 if len(dataset) >= 8 else 8))
                sample.problems += {problem[0]: problem for one in again for problem in _moves(sample, one)}.values()
            if (key := names[index] if by_name else other and _digest(sample.image)) in places and key is not None:
                sample.problems += [("image in both datasets", f"It is sample {places[key]} of the other, too.")]
            sample.image, sample.mask_bytes = None, sample.tensors.pop("masks", torch.zeros(0)).numel()
    categories = dict(enumerate(getattr(base, "categories", None) or ()))
    categories = categories if categories.get(0) == "__background__" else {}
    objects = Counter(label for sample in samples for label in sample.labels)
    classes = {label: (objects[label], sum(label in one.labels for one in samples)) for label in sorted(objects)}
    general = list(_dataset_rules(samples, num_classes or len(categories), classes, other_labels, categories))
    findings = [Finding(*problem, i, names[i]) for i, sample in enumerate(samples) for problem in sample.problems]
    kinds = Counter(kind for kind, _ in {(finding.kind, finding.index) for finding in findings})
    least = dict.fromkeys(_USUAL, tried / 2) | {_ONLY_IMAGE: min(tried, _READ_AGAIN) / 2}
    findings = tuple(finding for finding in findings if kinds[finding.kind] > least.get(finding.kind, 0))
    findings += tuple(Finding(*problem) for problem in general)
    numbers = [len(sample.boxes) for sample in samples] or [0]
    return Report(findings, len(dataset), sum(numbers), tuple(np.quantile(numbers, (0, 0.5, 1))), classes, categories)


def _files(dataset: object) -> tuple[object, list[tuple[int | None, str | None]]]:
    """What is below ``Subset``, and of each sample its index there and its file name; None where they are not known."""
    if isinstance(dataset, Subset):
        base, entries = _files(dataset.dataset)
        return base, [entries[int(i)] if int(i) < len(entries) else (None, None) for i in dataset.indices]
    names = getattr(dataset, "file_names", None)
    known = isinstance(names, (list, tuple)) and len(names) == len(dataset)
    return dataset, list(enumerate(map(str, names) if known else [None] * len(dataset)))


_KEYS = ("boxes", "labels", "masks", "area", "iscrowd", "keypoints")
_DTYPES = {"boxes": (torch.float32, torch.float64), "labels": (torch.int64,), "masks": (torch.uint8, torch.bool)}


class _Sample:
    """A sample as it was read: what of it has the right form, and the ``problems`` of the rest.

    ``tensors`` holds those parts of the target that have the right shape; ``size`` is the image's height and width,
    None where its shape is wrong; ``boxes`` is float64 [N, 4], and empty where boxes are not finite numbers; ``labels``
    is a list. ``keys`` tells of all keys of the target whether the value is a tensor.
    """

    def __init__(self, read: Callable[[int], object], index: int):
        self.index, self.image, self.size, self.image_id, self.keys, self.tensors = index, None, None, None, None, {}
        self.problems = list(self._read(read, index))
        boxes, labels = (self.tensors.get(key, torch.zeros(0, 4)) for key in ("boxes", "labels"))
        self.boxes = boxes.double() if boxes.isfinite().all() else torch.zeros(0, 4).double()
        self.labels = [] if labels.is_floating_point() else labels.tolist()
        height, width = self.size or (torch.inf, torch.inf)
        self.ends, self.place = torch.tensor([width, height] * 2), f", in an image {width} wide and {height} high"

    def _read(self, read: Callable[[int], object], index: int) -> Iterator[tuple[str, str]]:
        try:
            sample = read(index)
        except Exception as error:
            text, at = " ".join(str(error).split())[:300], traceback.extract_tb(error.__traceback__)[-1]
            yield "unreadable sample", f"{type(error).__name__}: {text} ({at.filename}:{at.lineno} in {at.name})"
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
        self.image_id, self.keys = target.get("image_id"), {key: isinstance(target[key], Tensor) for key in target}
        if not isinstance(target.get("image_id", 0), (int, np.integer)):
            yield "image_id is not an int", f"It is {_type(self.image_id)}: {self.image_id!r:.60}."
        for key, value in ((key, target[key]) for key in _KEYS if key in target):
            if not isinstance(value, Tensor) or value.dtype not in _DTYPES.get(key, (value.dtype,)):
                yield "wrong type", f"{key} is {_type(value)}."
            if isinstance(value, Tensor):
                shape = ("N", *{"boxes": (4,), "masks": self.size or "HW", "keypoints": ("K", 3)}.get(key, ()))
                if len(shape) == value.ndim and all(a in (b, *"NKHW") for a, b in zip(shape, value.shape, strict=True)):
                    self.tensors[key] = _plain(value)
                else:
                    yield "wrong shape", f"{key} has shape {list(value.shape)}, and not [{', '.join(map(str, shape))}]."
            if self.size and (canvas := getattr(value, "canvas_size", self.size)) != self.size:
                yield "canvas of another size", f"{key} have the canvas_size {canvas}, but the image is {self.size}."
            if isinstance(value, BoundingBoxes) and value.format.value != "XYXY":
                yield "boxes in another format", f"They are BoundingBoxes of format {value.format.value}."


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().as_subclass(Tensor).real


def _type(value: object) -> str:
    detail = getattr(value, "dtype", f"length {len(value)}" if isinstance(value, (tuple, list)) else None)
    return f"of type {type(value).__name__}" + (f" ({detail})" if detail else "")


def _digest(image: object) -> int | None:
    """The same for the same pixels; None for what is not a tensor."""
    return hash((image.shape, image.float().numpy().tobytes())) if isinstance(image, Tensor) else None


def _image_rules(sample: _Sample, num_classes: int | None) -> Iterator[tuple[str, str]]:
    image = sample.image
    if isinstance(image, Tensor) and image.is_floating_point() and image.numel():
        low, high = image.min().item(), image.max().item()
        faults = (
            ("NaN or infinity in the image", not np.isfinite(high - low)),
            ("image already normalised", low < -0.01),
            ("image not in [0, 1]", high > 1.01),
            ("image nearly of one value", high - low < 0.02 or image.std() < 0.002),
            ("image of 0 and 1", ((image <= 0) | (image >= 1)).float().mean() > 0.98),
        )
        yield from [(kind, f"Its values range from {low:.3g} to {high:.3g}.") for kind, found in faults if found][:1]


def _object_rules(sample: _Sample, num_classes: int | None) -> Iterator[tuple[str, str]]:
    counts = {key: len(value) for key, value in sample.tensors.items()}
    if len(set(counts.values())) > 1:
        yield "numbers of objects differ", ", ".join(f"{count} {key}" for key, count in counts.items()) + "."
    if counts.get("boxes") == 0:
        yield "no objects", "boxes have the shape [0, 4]."
    # Of each kind: which objects are bad. No object of an empty tensor is.
    boxes, labels, masks, area, iscrowd, keypoints = (sample.tensors.get(key, torch.zeros(0, 3, 3)) for key in _KEYS)
    highest = torch.inf if num_classes is None else num_classes - 1
    yield from _first("NaN or infinity in boxes", "boxes", boxes, ~boxes.isfinite().all(dim=1))
    yield from _first("label 0", "labels", labels, labels == 0)
    yield from _first("negative label", "labels", labels, labels < 0)
    yield from _first("label beyond num_classes", "labels", labels, labels > highest, f", num_classes is {num_classes}")
    yield from _first("area or iscrowd out of range", "area", area, ~(area > 0))
    yield from _first("area or iscrowd out of range", "iscrowd", iscrowd, (iscrowd != 0) & (iscrowd != 1))
    yield from _first("mask values other than 0 and 1", "masks", masks, (masks > 1).flatten(1).any(dim=1))
    yield from _first("empty mask", "masks", masks, (masks == 0).flatten(1).all(dim=1))
    points, visibility = keypoints[..., :2], keypoints[..., 2]
    seen, outside = visibility > 0, ~((points >= -1) & (points <= sample.ends[:2] + 1)).all(dim=2)
    wrong = ~torch.isin(visibility, torch.arange(3)) | seen & (outside | (points[seen] <= 1).all())
    yield from _first("keypoints out of range", "keypoints", keypoints.flatten(1), wrong.any(dim=1), sample.place)
    yield from _first("no visible keypoints", "visibility of keypoints", visibility, ~seen.any().repeat(len(seen)))


def _first(kind: str, name: str, values: Tensor, bad: Tensor, more: str = "") -> Iterator[tuple[str, str]]:
    """The first of the bad objects, and how many there are."""
    if bad.any():
        first, count = int(bad.int().argmax()), int(bad.sum())
        value, verb = (values[first], "is") if values.ndim < 3 else (values[first].unique(), "has the values")
        shown = [round(number, 3) for number in value.flatten().tolist()]
        shown = shown[0] if len(shown) == 1 else f"[{_some(shown)}]"
        also = f" ({count} such among {len(values)})" if count > 1 else ""
        yield kind, f"{name}[{first}] {verb} {shown}{more}{also}."


def _box_rules(sample: _Sample, num_classes: int | None) -> Iterator[tuple[str, str]]:
    boxes, masks, ends, tight = sample.boxes, sample.tensors.get("masks"), sample.ends, None
    if not len(boxes) or sample.size is None or "boxes in another format" in dict(sample.problems):
        return
    start, end = boxes[:, :2], boxes[:, 2:]
    size, negative = (end - start).prod(dim=1), (end < start).any(dim=1)
    # In which format do boxes fit their masks, or without masks the image?
    if masks is not None and len(masks) == len(boxes):
        filled, size, tight = masks != 0, (masks != 0).sum(dim=(1, 2)), torch.full_like(boxes, torch.nan)
        tight[size > 0] = boxes_from_masks(masks[size > 0]).double()  # before torchvision 0.26 it raises on others
        formats = {"YXYX": boxes[:, [1, 0, 3, 2]]}
        for name in ("XYXY", "XYWH", "CXCYWH"):
            formats[name] = box_convert(boxes, name.lower(), "xyxy")
            formats[f"normalised {name}"] = box_convert(boxes * ends, name.lower(), "xyxy")
        fits = {name: _fit(read, tight) for name, read in formats.items()}
        best = max(fits, key=fits.get)
        if fits["XYXY"] < 0.5 and fits[best] > 0.8:
            yield "boxes in another format", f"Read as {best} they fit their masks, IoU {fits[best]:.2f}."
            return
    elif 0 <= boxes.min() and 0 < boxes.max() <= 1:
        yield "boxes in another format", f"All are in [0, 1]{sample.place}, so they seem to be normalised."
        return
    elif negative.any() and (start >= 0).all() and (end > 0).all() and (start + end <= ends[:2] + 1).all():
        yield from _first("boxes in another format", "boxes", boxes, negative, f"; as XYWH all would fit{sample.place}")
        return
    yield from _first("box with negative size", "boxes", boxes, negative)
    yield from _first("box without size", "boxes", boxes, (end == start).any(dim=1) & ~negative)
    beyond = torch.cat([-boxes, boxes - ends], dim=1).amax(dim=1)
    yield from _first("box outside the image", "boxes", boxes, beyond > 1, sample.place)
    if len(area := sample.tensors.get("area", size)) == len(size):
        differs = (area * size > 0) & ((area > 2 * size) | (2 * area < size) & (tight is not None))
        yield from _first("area of another size", "area", area, differs, f", not {_some(size.int().tolist())}")
    if tight is None:
        return
    sides = tight[:, 2:] - tight[:, :2]
    empty = sides - torch.stack([filled.any(dim=1).sum(dim=1), filled.any(dim=2).sum(dim=1)], dim=1)
    apart, fill = (empty / ends[:2]).amax(dim=1), size / sides.prod(dim=1)
    border = torch.cat([filled[:, [0, -1]], filled[:, :, [0, -1]].mT], dim=2).flatten(1).float().mean(dim=1)
    thin = (fill < 0.25) & ((box_iou(tight, tight) > 0.5).sum(dim=1) > 1)
    crowd = (sample.tensors.get("iscrowd", torch.zeros(0)) == 1).any()  # may be in pieces
    yield from _first(_MASK, "the gap inside masks", apart, (apart > 0.1) & ~crowd, " of the image")
    yield from _first(_MASK, "the part of the image's border inside masks", border, border > 0.75)
    yield from _first(_MASK, "of nearly equal boxes, the part in masks", fill, thin & (2 * thin.sum() > len(thin)))
    gap = (tight - boxes) * torch.tensor([1, 1, -1, -1])  # from the box inwards to its mask, at each side
    if 2 * ((gap - torch.tensor([0, 0, -1, -1])).abs().amax(dim=1) < 0.01).sum() > len(boxes):
        yield _SHORT, "They end one pixel before their masks at the right and at the bottom."
    # At the image's border a box may be larger than what a crop has left of its mask.
    cut = (gap > -1).all(dim=1) & (torch.cat([boxes, ends - boxes], dim=1) < 1).any(dim=1)
    judged = (gap.abs().amax(dim=1) > 2) & ~cut & (end > start).all(dim=1)
    ious = _ious(boxes, tight)
    for kind, low, high in (("box and mask disagree", 0, 0.5), ("box differs from its mask", 0.5, 0.8)):
        bad = judged & (low <= ious) & (ious < high)
        first = int(bad.int().argmax())
        beside = f", the box of its mask {tight[first].tolist()}, IoU {ious[first]:.2f}"
        yield from _first(kind, "boxes", boxes, bad, beside)


def _ious(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each of boxes [N, 4] with the one of the same index in ``others``."""
    shared = torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])
    shared = shared.clamp(min=0).prod(dim=1)
    return shared / (box_area(boxes) + box_area(others) - shared)


def _fit(boxes: Tensor, others: Tensor) -> float:
    """The median IoU of boxes [N, 4] with the boxes of the same index in ``others``; NaN counts as 0."""
    return _ious(boxes, others).nan_to_num(0).median().item()


def _dataset_rules(samples: list[_Sample], num_classes: int, classes: dict, other: set, names: dict) -> Iterator[tuple]:
    """What only all samples together show: yields what concerns the dataset, and adds the rest to the samples."""
    targets = [sample for sample in samples if sample.keys is not None]
    wanted = {"boxes", "labels"}.union(*(target.keys for target in targets)) & {*_KEYS, "image_id"}
    lacks = [tuple(sorted(wanted - target.keys.keys())) for target in targets]
    counts, first_of = Counter(lacks), {}
    for target, lack in zip(targets, lacks, strict=True):
        if lack:
            rest = "the others have them" if counts.keys() == {(), lack} else f"this one has {_some([*target.keys])}"
            target.problems += [
                ("missing key", f"{counts[lack]} of {len(lacks)} samples lack {', '.join(lack)}; {rest}.")
            ]
        if "image_id" in target.keys and (first := first_of.setdefault(str(target.image_id), target)) is not target:
            target.problems += [("image_id used more than once", f"Sample {first.index} has {target.image_id}, too.")]
    tensors = Counter(key for target in targets for key, is_tensor in target.keys.items() if is_tensor)
    for key in tensors.keys() - {*_KEYS, "image_id", "size", "orig_size"}:
        yield "key not checked", f"{key!r} is a tensor in {tensors[key]} of {len(targets)} samples."
    points = {value.shape[1] for sample in samples if len(value := sample.tensors.get("keypoints", ()))}
    if len(points) > 1:
        yield "wrong shape", f"keypoints are [N, K, 3] with {sorted(points)} as K: it must be one number."
    numbers = [len(sample.boxes) for sample in samples]
    if many := sum(number > _MANY for number in numbers):
        most = f"at most {max(numbers)}, masks of {max(sample.mask_bytes for sample in samples) / 2**20:.0f} MiB"
        yield "many objects", f"{_count(many, 'image')} of {len(numbers)} with over {_MANY} objects, {most}."
    if crowds := sum((sample.tensors.get("iscrowd", torch.zeros(0)) == 1).sum().item() for sample in samples):
        yield "crowds", f"{_count(crowds, 'object')} with iscrowd 1."
    if sum(number > 0 for number in numbers) >= _FEW:
        boxes = torch.cat([sample.boxes / sample.ends for sample in samples])
        start, rest = boxes[:, :2].amin(dim=0), 1 - boxes[:, 2:].amax(dim=0)
        if (rest > 0.2).all() and (start < rest / 3).all():
            yield "boxes far from right and bottom", f"They leave {rest[0]:.0%} of width and {rest[1]:.0%} of height."
    if not any(numbers) and not any(PROBLEMS[kind][0] == "error" for one in samples for kind, _ in one.problems):
        yield "no objects in the dataset", f"There is no box in {_count(len(samples), 'sample')}."
    new, highest = other - classes.keys(), num_classes or max(classes, default=0) + 1
    unused = set(range(1, highest)) - classes.keys() - new
    rare = [label for label, (n, _) in classes.items() if n * (20 if n < _FEW else 100) < max(classes.values())[0]]
    for kind, labels in (("unused labels", unused), ("labels only in the other dataset", new), ("rare labels", rare)):
        if labels and classes:
            yield kind, f"{_count(len(labels), 'label')}: {_some([names.get(one, one) for one in sorted(labels)])}."


_FLIPS = {"stayed": torch.clone, "flipped left to right": horizontal_flip, "flipped upside down": vertical_flip}


def _moves(first: _Sample, again: _Sample) -> Iterator[tuple[str, str]]:
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
