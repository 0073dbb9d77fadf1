"""From predictions and targets to COCO's box and mask AP, with pycocotools.

pycocotools converts, matches and counts; this module hands it the images of one
loader, and gives its numbers back as data instead of a printed table.
Metrics: https://cocodataset.org/#detection-eval
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert

_NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's twelve numbers, in [0, 1]; None where there is no object to measure on.

    ``AP`` is averaged over IoU thresholds 0.50, 0.55 … 0.95 and over classes; ``AR`` is
    the recall with at most 100 detections an image. Small is an area under 32² pixels,
    large one over 96². ``per_class`` maps a label to its AP. ``precision`` is float64
    [10 IoU thresholds, 101 recalls 0, 0.01 … 1, classes in the order of per_class],
    -1 for a class without objects.
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

    def __str__(self) -> str:
        values = ((name, getattr(self, name)) for name in _NAMES)
        return "  ".join(f"{name} {'no such objects' if v is None else f'{v:.3f}'}" for name, v in values)


@dataclass(frozen=True)
class CocoResults:
    """Box metrics, and mask metrics where targets and predictions hold masks (else None)."""

    box: CocoMetrics
    mask: CocoMetrics | None
    num_images: int

    def __str__(self) -> str:
        lines = [f"{self.num_images} images", f"box   {self.box}"]
        return "\n".join(lines + ([f"mask  {self.mask}"] if self.mask else []))


def encode_masks(masks: Tensor) -> list[dict]:
    """COCO run-length encodings of binary masks, uint8 or bool [N, H, W]."""
    return mask_utils.encode(np.asfortranarray(masks.to(torch.uint8).permute(1, 2, 0).numpy()))


def coco_annotations(output: dict, size: tuple[int, int]) -> list[dict]:
    """A target or a prediction as COCO annotations, without image_id and id.

    Args:
        output: ``boxes`` float [N, 4] XYXY, ``labels`` int64 [N]; a target may have
            ``masks`` uint8 [N, H, W], ``area`` [N], ``iscrowd`` [N]; a prediction has
            ``scores`` [N] and may have ``masks`` float [N, 1, H, W] in [0, 1], which are
            cut at 0.5.
        size: height and width of the image, in pixels.
    """
    output = {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in output.items()}
    boxes = box_convert(output["boxes"].double(), "xyxy", "xywh").tolist()
    annotations = [
        {"bbox": box, "category_id": label, "area": box[2] * box[3], "iscrowd": 0}
        for box, label in zip(boxes, output["labels"].tolist(), strict=True)
    ]
    fields = {"score": "scores"} if "scores" in output else {"area": "area", "iscrowd": "iscrowd"}
    for field, key in fields.items():
        if key in output:
            for annotation, value in zip(annotations, output[key].tolist(), strict=True):
                annotation[field] = value
    if "masks" in output:
        masks = output["masks"] > 0.5
        encoded = encode_masks(masks.reshape(-1, *size))
        for annotation, code in zip(annotations, encoded, strict=True):
            annotation["segmentation"] = code
    return annotations


def _coco(images: Sequence[dict], annotations: Sequence[Sequence[dict]], categories: Sequence[int], kind: str) -> COCO:
    dataset = {
        "images": list(images),
        "categories": [{"id": label, "name": str(label)} for label in categories],
        "annotations": [],
    }
    for image, of_image in zip(images, annotations, strict=True):
        for annotation in of_image:
            number = len(dataset["annotations"]) + 1  # from 1: pycocotools takes 0 for "unmatched"
            annotation = {**annotation, "id": number, "image_id": image["id"]}
            if kind == "segm" and "score" in annotation:
                annotation["area"] = int(mask_utils.area(annotation["segmentation"]))
            dataset["annotations"].append(annotation)
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _metrics(images, targets, predictions, kind: str) -> CocoMetrics:
    categories = sorted({a["category_id"] for of_image in [*targets, *predictions] for a in of_image})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(images, targets, categories, kind)
        found = _coco(images, predictions, categories, kind)
        coco_eval = COCOeval(truth, found, kind)
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    precision = coco_eval.eval["precision"][:, :, :, 0, -1]
    per_class = {
        label: float(precision[:, :, k].mean()) if (precision[:, :, k] > -1).any() else None
        for k, label in enumerate(categories)
    }
    numbers = (float(v) if v >= 0 else None for v in coco_eval.stats)
    return CocoMetrics(**dict(zip(_NAMES, numbers, strict=True)), per_class=per_class, precision=precision)


def coco_metrics(
    sizes: Sequence[tuple[int, int]], targets: Sequence[Sequence[dict]], predictions: Sequence[Sequence[dict]]
) -> CocoResults:
    """Box metrics, and mask metrics where there are masks, of a set of images.

    Args:
        sizes: height and width of every image, in pixels.
        targets, predictions: for every image, what :func:`coco_annotations` gives. Images
            are known by their place in these lists, so that ``image_id`` need not be unique.

    Raises:
        ValueError: the three differ in length, or there are no images.
    """
    if not len(sizes) == len(targets) == len(predictions) or not sizes:
        counts = f"{len(sizes)} sizes, {len(targets)} targets and {len(predictions)} predictions"
        raise ValueError(f"{counts}: one of each is needed for every image, and at least one image")
    images = [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes, start=1)]
    every = [a for of_image in [*targets, *predictions] for a in of_image]
    box = _metrics(images, targets, predictions, "bbox")
    has_masks = bool(every) and all("segmentation" in a for a in every)
    return CocoResults(box, _metrics(images, targets, predictions, "segm") if has_masks else None, len(images))
