"""From predictions and targets to COCO's box and mask AP, as data.

Each image is reduced to its IoUs (:func:`compare`), without run-length encodings;
:func:`coco_metrics` matches and counts them all as pycocotools does, and the tests hold it
to pycocotools' numbers. Metrics: https://cocodataset.org/#detection-eval; notebook 06.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.models.detection.roi_heads import expand_boxes

_NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # of an image and class
_AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # all, small, medium, large


@dataclass(frozen=True)
class ImageIoUs:
    """What the metrics need to know of one image with D detections and G objects; no pixels."""

    labels: np.ndarray  # int64 [D]
    scores: np.ndarray  # float64 [D]
    target_labels: np.ndarray  # int64 [G]
    target_areas: np.ndarray  # float64 [G], in pixels
    iscrowd: np.ndarray  # bool [G]
    box_areas: np.ndarray  # float64 [D]
    box_ious: np.ndarray  # float64 [D, G]; with a crowd: the share of the detection inside it
    mask_areas: np.ndarray | None
    mask_ious: np.ndarray | None


@dataclass(frozen=True)
class ClassMatches:
    """Which object each detection of one class was matched with; detections by falling score.

    ``images`` [D] is an image's place in the evaluation, ``detections`` [D] a detection's
    in its prediction; ``scores`` [D]. For the 10 IoU thresholds, ``targets`` [10, D] is the
    object's place in the image's target or -1, and ``ignored`` [10, D] says that the
    detection does not count, since it lies on a crowd. ``num_objects`` [images].
    """

    images: np.ndarray
    detections: np.ndarray
    scores: np.ndarray
    targets: np.ndarray
    ignored: np.ndarray
    num_objects: np.ndarray


@dataclass(frozen=True, repr=False)
class CocoMetrics:
    """COCO's twelve numbers, in [0, 1]; None where there is no object to measure on.

    ``AP`` is averaged over IoU thresholds 0.50, 0.55 … 0.95 and over classes; ``AR`` is
    the recall with at most 100 detections of an image and class. Small is an area under
    32² pixels, large one over 96².

    ``per_class`` maps a label to its AP. ``precision`` and ``scores``, float64
    [10 IoU thresholds, 101 recalls 0, 0.01 … 1, classes in the order of per_class], are
    the precision-recall curves and the score at each of their points; precision is 0
    where a recall is not reached, and both are -1 for a class without objects.
    ``matches`` maps a label to the pairs behind them. ``num_dropped`` detections were
    beyond the 100 of their image and class, and not counted.
    """

    AP: float | None
    AP50: float | None
    AP75: float | None
    AP_small: float | None
    AP_medium: float | None
    AP_large: float | None
    AR1: float | None
    AR10: float | None
    AR: float | None
    AR_small: float | None
    AR_medium: float | None
    AR_large: float | None
    per_class: dict[int, float | None]
    precision: np.ndarray
    scores: np.ndarray
    matches: dict[int, ClassMatches]
    num_dropped: int

    def __repr__(self) -> str:
        values = ((name, getattr(self, name)) for name in _NAMES)
        text = "  ".join(f"{name} {'no such objects' if v is None else f'{v:.3f}'}" for name, v in values)
        if self.num_dropped:
            text += f"  ({self.num_dropped} detections beyond {MAX_DETECTIONS} of an image and class are not counted)"
        return text


@dataclass(frozen=True, repr=False)
class CocoResults:
    """Box metrics, and mask metrics where targets and predictions hold masks (else None).

    ``images`` holds the IoUs of every image, in the loader's order.
    """

    box: CocoMetrics
    mask: CocoMetrics | None
    images: Sequence[ImageIoUs]

    @property
    def num_images(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        lines = [f"{self.num_images} images", f"box   {self.box}"]
        return "\n".join(lines + ([f"mask  {self.mask}"] if self.mask else []))


def compare(prediction: dict, target: dict, size: tuple[int, int]) -> ImageIoUs:
    """The IoU of every detection of an image with every object of it.

    Args:
        prediction: ``boxes`` float [D, 4] XYXY, ``labels`` int64 [D], ``scores`` [D] and, for
            mask metrics, ``masks`` float [D, 1, H, W] in [0, 1], cut at 0.5.
        target: ``boxes`` float [G, 4], ``labels`` int64 [G]; it may have ``masks`` uint8
            [G, H, W], ``area`` [G] and ``iscrowd`` [G].
        size: height and width of the image, in pixels.

    Raises:
        ValueError: boxes, labels or scores are missing, or boxes are not [N, 4]; there is not one
            label, score, area, iscrowd and mask for each box; or the masks are not of the image's size.
    """
    prediction, target = _as_numpy(prediction, size, "prediction"), _as_numpy(target, size, "target")
    iscrowd = target.get("iscrowd", np.zeros(len(target["boxes"]))).astype(bool)
    x, y, w, h = (side[:, None] for side in _xywh(prediction["boxes"]))
    gx, gy, gw, gh = _xywh(target["boxes"])
    inside = np.maximum(np.minimum(x + w, gx + gw) - np.maximum(x, gx), 0)
    inside = inside * np.maximum(np.minimum(y + h, gy + gh) - np.maximum(y, gy), 0)
    areas = (w * h)[:, 0]
    empty = not len(areas) + len(iscrowd)  # nothing that could have a mask
    masks = {"mask_areas": areas if empty else None, "mask_ious": inside if empty else None}
    if "masks" in prediction and ("masks" in target or not len(iscrowd)):
        truth = target.get("masks", np.zeros((0, *size))).astype(bool)
        mask_areas, mask_inside = np.zeros(len(areas)), np.zeros(inside.shape)
        for d, (top, left, crop) in enumerate(_crops(prediction, size)):
            mask_areas[d] = np.count_nonzero(crop)
            rows, columns = slice(top, top + crop.shape[0]), slice(left, left + crop.shape[1])
            mask_inside[d] = [np.count_nonzero(mask[rows, columns] & crop) for mask in truth]
        truth_areas = np.array([np.count_nonzero(mask) for mask in truth])
        masks = {"mask_areas": mask_areas, "mask_ious": _iou(mask_inside, mask_areas, truth_areas, iscrowd)}
    return ImageIoUs(
        labels=prediction["labels"],
        scores=prediction["scores"].astype(np.float64),
        target_labels=target["labels"],
        target_areas=target.get("area", gw * gh).astype(np.float64),
        iscrowd=iscrowd,
        box_areas=areas,
        box_ious=_iou(inside, areas, gw * gh, iscrowd),
        **masks,
    )


def _as_numpy(output: dict, size: tuple[int, int], name: str) -> dict[str, np.ndarray]:
    keys = ("boxes", "labels", "scores", "area", "iscrowd", "masks")
    tensors = {key: output[key].detach() for key in keys if key in output}
    if "masks" in tensors and tensors["masks"].device.type != "cpu":
        tensors["masks"] = tensors["masks"] > 0.5  # a quarter of the bytes to copy
    tensors = {key: tensor.cpu() for key, tensor in tensors.items()}
    arrays = {k: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for k, t in tensors.items()}
    required = ("boxes", "labels", "scores") if name == "prediction" else ("boxes", "labels")
    if missing := [key for key in required if key not in arrays]:
        raise ValueError(f"a {name} lacks {', '.join(missing)}")
    if arrays["boxes"].shape[1:] != (4,):
        raise ValueError(f"a {name} has boxes of the shape {list(arrays['boxes'].shape)}; they have to be [N, 4]")
    for key, array in arrays.items():
        if len(array) != len(arrays["boxes"]):
            raise ValueError(f"a {name} has {len(arrays['boxes'])} boxes and {len(array)} {key}")
    if "masks" in arrays and arrays["masks"].shape[-2:] != tuple(size):
        raise ValueError(f"a {name} has masks of {arrays['masks'].shape[-2:]} pixels; its image has {tuple(size)}")
    return arrays


def _xywh(boxes: np.ndarray) -> np.ndarray:
    """In COCO's form and in float64, so that IoUs are pycocotools' to the last bit."""
    corner, opposite = np.split(boxes.astype(np.float64), 2, axis=1)
    return np.hstack([corner, opposite - corner]).T


def _iou(inside: np.ndarray, areas: np.ndarray, target_areas: np.ndarray, iscrowd: np.ndarray) -> np.ndarray:
    union = areas[:, None] + np.where(iscrowd, 0, target_areas - inside)
    return np.divide(inside, union, out=np.zeros_like(inside), where=inside > 0)


def _crops(prediction: dict[str, np.ndarray], size: tuple[int, int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Top, left and bool pixels of every mask: of its box where nothing lies outside, of the whole image else."""
    masks = prediction["masks"].reshape(-1, *size)
    boxes = expand_boxes(torch.from_numpy(prediction["boxes"]), 1.1).numpy()
    pixels = np.empty(size, bool)  # of one mask after the other: it stays in the processor's cache
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        np.greater(mask, 0.5, out=pixels)
        top, left = max(int(top) - 1, 0), max(int(left) - 1, 0)
        crop = pixels[top : max(int(bottom) + 2, 0), left : max(int(right) + 2, 0)]
        inside = np.count_nonzero(crop) == np.count_nonzero(pixels)
        yield (top, left, crop) if inside else (0, 0, pixels)


def _match(
    ious: np.ndarray, areas: np.ndarray, target_areas: np.ndarray, iscrowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the detections of one image and class, by falling score, the object that each fits best.

    For the four ranges of area and the ten IoU thresholds at once: the object's index or
    -1 [4, 10, D], whether the detection is ignored [4, 10, D], and the object [4, G].
    """

    def outside(areas):
        return (areas < _AREAS[:, :1]) | (areas > _AREAS[:, 1:])

    ignore = iscrowd | outside(target_areas)
    matched = np.full((4, 10, len(areas)), -1)
    ignored = np.zeros(matched.shape, bool)
    taken = np.zeros((4, 10, len(iscrowd)), bool)
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    for d in np.flatnonzero((ious >= thresholds[0]).any(axis=1)):
        free = (ious[d] >= thresholds) & (~taken | iscrowd)
        counted = free & ~ignore[:, None]
        # An object that does not count is taken only where none that counts is left.
        free = np.where(counted.any(axis=-1, keepdims=True), counted, free)
        best = len(iscrowd) - 1 - np.where(free, ious[d], -1)[..., ::-1].argmax(axis=-1)  # of equals, the last
        a, t = np.nonzero(free.any(axis=-1))
        matched[a, t, d] = best[a, t]
        ignored[a, t, d] = ignore[a, best[a, t]]
        taken[a, t, best[a, t]] = True
    ignored |= (matched < 0) & outside(areas)[:, None]
    return matched, ignored, ignore


def _curves(true: np.ndarray, false: np.ndarray, num_objects: float, scores: np.ndarray) -> np.ndarray:
    """Precision and score [2, 10, 101] at COCO's recalls, from what each detection adds [10, D], by falling score."""
    true, false = true.cumsum(axis=1, dtype=np.float64), false.cumsum(axis=1, dtype=np.float64)
    precision = true / (true + false + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    curves = np.zeros((2, len(true), len(RECALLS)))
    for t in range(len(true)):
        at = np.searchsorted(true[t] / num_objects, RECALLS)
        at = at[at < len(scores)]
        curves[:, t, : len(at)] = precision[t, at], scores[at]
    return curves


def _metrics(images: Sequence[ImageIoUs], kind: str) -> CocoMetrics:
    labels = sorted({int(label) for image in images for label in [*image.labels, *image.target_labels]})
    precision = np.full((4, 10, len(RECALLS), len(labels)), -1.0)
    scores = precision[0].copy()
    recall = np.full((4, 10, len(labels)), -1.0)
    recall_of_first = {1: recall[0].copy(), 10: recall[0].copy()}
    matches, num_dropped = {}, 0
    for k, label in enumerate(labels):
        parts, num_objects = [], np.zeros((4, len(images)), np.int64)
        for i, image in enumerate(images):
            found = np.flatnonzero(image.labels == label)
            found = found[np.argsort(-image.scores[found], kind="stable")]
            num_dropped += max(len(found) - MAX_DETECTIONS, 0)
            found = found[:MAX_DETECTIONS]
            objects = np.flatnonzero(image.target_labels == label)
            matched, ignored, ignore = _match(
                getattr(image, f"{kind}_ious")[np.ix_(found, objects)],
                getattr(image, f"{kind}_areas")[found],
                image.target_areas[objects],
                image.iscrowd[objects],
            )
            num_objects[:, i] = (~ignore).sum(axis=1)
            targets = np.append(objects, -1).astype(np.int32)[matched]
            parts.append((np.full(len(found), i), found, np.arange(len(found)), image.scores[found], targets, ignored))
        place, found, rank, score, targets, ignored = (
            np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)
        )
        order = np.argsort(-score, kind="stable")
        place, found, rank, score = (values[order] for values in (place, found, rank, score))
        targets, ignored = targets[..., order], ignored[..., order]
        true, false = (targets >= 0) & ~ignored, (targets < 0) & ~ignored
        for a, total in enumerate(num_objects.sum(axis=1)):
            if total:
                curves = _curves(true[a], false[a], total, score)
                precision[a, :, :, k] = curves[0]
                recall[a, :, k] = true[a].sum(axis=1) / total
                if a == 0:
                    scores[:, :, k] = curves[1]
                    for first, values in recall_of_first.items():
                        values[:, k] = (true[0] & (rank < first)).sum(axis=1) / total
        matches[label] = ClassMatches(place, found, score, targets[0].copy(), ignored[0].copy(), num_objects[0])

    def mean(values: np.ndarray) -> float | None:
        values = values[values > -1]
        return float(values.mean()) if values.size else None

    numbers = [mean(precision[0]), mean(precision[0, 0]), mean(precision[0, 5]), *map(mean, precision[1:])]
    numbers += [mean(recall_of_first[1]), mean(recall_of_first[10]), *map(mean, recall)]
    return CocoMetrics(
        **dict(zip(_NAMES, numbers, strict=True)),
        per_class={label: mean(precision[0, :, :, k]) for k, label in enumerate(labels)},
        precision=precision[0],
        scores=scores,
        matches=matches,
        num_dropped=num_dropped,
    )


def coco_metrics(images: Sequence[ImageIoUs]) -> CocoResults:
    """Box metrics, and mask metrics where there are masks, of a set of images.

    Args:
        images: what :func:`compare` gives for every image. Images are known by their
            place in this list, so that ``image_id`` need not be unique.

    Raises:
        ValueError: there are no images, or some have masks, in target and prediction, and others do not.
    """
    if not images:
        raise ValueError("there are no images to evaluate on")
    without = [i for i, image in enumerate(images) if image.mask_ious is None]
    if without and any(image.mask_ious is not None and image.mask_ious.shape[1] for image in images):
        lacking = f"{len(without)} of {len(images)} images, the first with index {without[0]}, have no masks"
        raise ValueError(f"{lacking} in their target or prediction, and others have: give all of them masks, or none")
    has_masks = not without and any(image.mask_ious.shape != (0, 0) for image in images)
    return CocoResults(_metrics(images, "box"), _metrics(images, "mask") if has_masks else None, images)


def class_table(metrics: CocoMetrics, categories: Sequence[str]) -> list[dict[str, Any]]:
    """What became of each class, and the score threshold that serves it best.

    Args:
        metrics: ``results.box`` or ``results.mask`` of :func:`tutorial_lib.engine.evaluate`.
        categories: ``"__background__"`` first; label i is ``categories[i]``.

    Returns:
        A dict for each class: its name under ``"class"``; the number of ``"objects"``, crowds not counted; ``"AP"`` and
        ``"AP50"`` in [0, 1], None without objects; and the ``"threshold"`` of the score with the best ``"F1"`` at
        IoU 0.5, both None for a class without objects or detections.

    Source: notebook 05.
    """
    rows, labels = [], list(metrics.matches)
    for label, name in list(enumerate(categories))[1:]:
        row = {"class": name, "objects": 0, "AP": None, "AP50": None, "threshold": None, "F1": None}
        if matches := metrics.matches.get(label):
            row["objects"] = objects = int(matches.num_objects.sum())
            if objects:
                row["AP"], row["AP50"] = metrics.per_class[label], metrics.precision[0, :, labels.index(label)].mean()
            if objects and len(matches.scores):
                counted = ~matches.ignored[0]
                f1 = 2 * ((matches.targets[0] >= 0) & counted).cumsum() / (counted.cumsum() + objects)
                f1[:-1][np.diff(matches.scores) == 0] = 0  # a threshold takes all detections of one score, or none
                row["threshold"], row["F1"] = matches.scores[f1.argmax()], f1.max()
        rows.append({key: float(value) if isinstance(value, np.floating) else value for key, value in row.items()})
    return rows


def bootstrap_interval(
    metrics: CocoMetrics, level: float = 0.95, num_samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """A percentile bootstrap interval of AP: how far it moves when the test images are drawn again.

    Args:
        metrics: ``results.box`` or ``results.mask`` of :func:`tutorial_lib.engine.evaluate`.
        level: the share of resamples inside the interval.
        num_samples: how many times the images are drawn, with replacement. A draw that holds no
            object at all is left out.

    Returns:
        The lower and the upper bound, in [0, 1].

    Raises:
        ValueError: there are no objects.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; notebook 06.
    """
    if metrics.AP is None:
        raise ValueError("AP is None: there are no objects to resample")
    num_images = len(next(iter(metrics.matches.values())).num_objects)
    rng = np.random.default_rng(seed)
    aps = []
    for _ in range(num_samples):
        times = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        per_class = []
        for matches in metrics.matches.values():
            if total := (times * matches.num_objects).sum():
                weights = times[matches.images] * ~matches.ignored
                true, false = weights * (matches.targets >= 0), weights * (matches.targets < 0)
                per_class.append(_curves(true, false, total, matches.scores)[0].mean())
        if per_class:
            aps.append(np.mean(per_class))
    return tuple(np.quantile(aps, [(1 - level) / 2, (1 + level) / 2]).tolist())
