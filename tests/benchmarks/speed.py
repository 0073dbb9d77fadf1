"""The classic way and ours, side by side in one run, on the same inputs.

    python -m tests.benchmarks.speed [work ...]

Rows of ``results/speed.json`` hold the seconds of both and their ratio; works that are
not named keep their rows.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import masks_to_boxes

from tests.benchmarks import RESULTS, provenance, write_results
from tutorial_lib.coco_eval import coco_metrics, compare


def scene(number: int) -> tuple[dict, dict, tuple[int, int]]:
    """What Mask R-CNN could predict on an image of PennFudan's size: 100 detections, and up to 8 objects."""
    rng = np.random.default_rng(number)
    size = (int(rng.integers(311, 480)), int(rng.integers(311, 620)))
    count = int(rng.integers(1, 9))
    masks = np.zeros((count, *size), np.uint8)
    rows, columns = np.ogrid[: size[0], : size[1]]
    for mask in masks:
        ry, rx = rng.uniform(40, 150), rng.uniform(15, 60)
        y, x = rng.uniform(ry / 2, size[0] - ry / 2), rng.uniform(rx / 2, size[1] - rx / 2)
        mask[((rows - y) / ry) ** 2 + ((columns - x) / rx) ** 2 < 1] = 1
    masks = torch.from_numpy(masks)
    boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    target = {"boxes": boxes, "labels": torch.ones(count, dtype=torch.int64), "masks": masks, "image_id": number}
    near = boxes[torch.from_numpy(rng.integers(count, size=100))]
    spread = torch.from_numpy(rng.normal(0, 0.25, (100, 4))).float() * (near[:, 2:] - near[:, :2]).repeat(1, 2)
    found = near + spread
    found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2] + 4)
    limit = torch.tensor([size[1], size[0]]).repeat(2)
    found = torch.minimum(found.clamp(min=0), limit)
    found[:, :2] = torch.minimum(found[:, :2], limit[:2] - 5)
    found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2] + 4)
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    blob = torch.from_numpy(1.1 - np.hypot(y, x) + rng.normal(0, 0.1, (100, 28, 28))).float()
    prediction = {
        "boxes": found, "labels": torch.ones(100, dtype=torch.int64),
        "scores": torch.from_numpy(rng.random(100)).float(), "roi_masks": blob.clamp(0, 1)[:, None],
    }  # fmt: skip
    return prediction, target, size


def pasted(prediction: dict, size: tuple[int, int]) -> dict:
    prediction = dict(prediction)
    masks = prediction.pop("roi_masks")
    return {**prediction, "masks": paste_masks_in_image(masks, prediction["boxes"], size)}


class Classic:
    """The usual evaluator: one COCOeval update an image, its masks encoded one by one; pycocotools' own table."""

    def __init__(self, targets: list[dict], sizes: list[tuple[int, int]]):
        dataset: dict = {"images": [], "categories": [{"id": 1}], "annotations": []}
        for target, (height, width) in zip(targets, sizes, strict=True):
            dataset["images"].append({"id": target["image_id"], "height": height, "width": width})
            for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
                dataset["annotations"].append({
                    "id": len(dataset["annotations"]) + 1, "image_id": target["image_id"],
                    "category_id": 1, "iscrowd": 0,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": (box[2] - box[0]) * (box[3] - box[1]),
                    "segmentation": mask_utils.encode(np.asfortranarray(mask.numpy())),
                })  # fmt: skip
        self.truth = COCO()
        self.truth.dataset = dataset
        self.truth.createIndex()
        self.evals = {kind: COCOeval(self.truth, iouType=kind) for kind in ("bbox", "segm")}
        self.images: dict[str, list] = {kind: [] for kind in self.evals}

    def update(self, prediction: dict, image_id: int) -> None:
        masks = prediction["masks"] > 0.5
        codes = [
            mask_utils.encode(np.array(mask.numpy()[0, :, :, np.newaxis], dtype=np.uint8, order="F"))[0]
            for mask in masks
        ]
        for code in codes:
            code["counts"] = code["counts"].decode("utf-8")
        scores, labels = prediction["scores"].tolist(), prediction["labels"].tolist()
        boxes = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in prediction["boxes"].tolist()]
        fields = {"bbox": ("bbox", boxes), "segm": ("segmentation", codes)}
        for kind, (name, values) in fields.items():
            results = [
                {"image_id": image_id, "category_id": label, name: value, "score": score}
                for label, value, score in zip(labels, values, scores, strict=True)
            ]
            coco_eval = self.evals[kind]
            coco_eval.cocoDt = self.truth.loadRes(results)
            coco_eval.params.imgIds = [image_id]
            coco_eval.evaluate()
            shape = (-1, len(coco_eval.params.areaRng), 1)
            self.images[kind].append(np.asarray(coco_eval.evalImgs, dtype=object).reshape(shape))

    def finish(self) -> list[np.ndarray]:
        for kind, coco_eval in self.evals.items():
            coco_eval.evalImgs = list(np.concatenate(self.images[kind], axis=-1).flatten())
            coco_eval.params.imgIds = [image["id"] for image in self.truth.dataset["images"]]
            coco_eval._paramsEval = copy.deepcopy(coco_eval.params)
            coco_eval.accumulate()
            coco_eval.summarize()
        return [self.evals[kind].stats for kind in ("bbox", "segm")]


def evaluator(num_images: int, paste: bool) -> dict:
    """Ours beside the classic evaluator, on 100 detections an image.

    With ``paste``, both begin with Mask R-CNN's 28 × 28 masks, which the classic one has to
    paste to full size; without, both begin with masks of full size.
    """
    seconds = {"classic": 0.0, "ours": 0.0}

    def timed(name: str, function: Callable, *args):
        begun = time.perf_counter()
        result = function(*args)
        seconds[name] += time.perf_counter() - begun
        return result

    targets, sizes = zip(*((target, size) for _, target, size in map(scene, range(num_images))), strict=True)
    compared = []
    with contextlib.redirect_stdout(io.StringIO()):
        classic = timed("classic", Classic, targets, sizes)
        for number, (target, size) in enumerate(zip(targets, sizes, strict=True)):
            prediction = scene(number)[0]
            full = timed("classic", pasted, prediction, size) if paste else pasted(prediction, size)
            timed("classic", classic.update, full, number)
            compared.append(timed("ours", compare, prediction if paste else full, target, size))
        stats = timed("classic", classic.finish)
        results = timed("ours", coco_metrics, compared)
    for theirs, metrics in zip(stats, (results.box, results.mask), strict=True):
        assert abs(theirs[0] - metrics.AP) < 1e-9 and abs(theirs[8] - metrics.AR) < 1e-9
    kept = sum(value.nbytes for image in compared for value in vars(image).values())
    return {**seconds, "kept_bytes_per_image": round(kept / num_images)}


WORKS: dict[str, Callable[[], dict]] = {
    "evaluator_50": lambda: evaluator(50, paste=True),
    "evaluator_1000": lambda: evaluator(1000, paste=True),
    "evaluator_50_pasted": lambda: evaluator(50, paste=False),
    "evaluator_1000_pasted": lambda: evaluator(1000, paste=False),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", default=list(WORKS), help=", ".join(WORKS))
    works = parser.parse_args().works
    path = RESULTS / "speed.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {row["work"]: row for row in rows}
    for work in works:
        row = {"work": work, **WORKS[work](), **provenance(torch.device("cpu"))}
        row["ratio"] = round(row["classic"] / row["ours"], 2)
        rows[work] = row
        print(row, flush=True)
        write_results("speed", {"rows": list(rows.values())})
