"""The loop of the public reference scripts and tutorials, written from their description, to compare with.

Float32, SGD, images decoded from disk in every epoch, losses read after every step, one COCOeval update for
each image.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as F


class ClassicDataset(Dataset):
    """PennFudan as torchvision's tutorial reads it."""

    def __init__(self, root, transforms):
        self.root, self.transforms = Path(root), transforms
        self.images = sorted((self.root / "PNGImages").glob("*.png"))
        self.masks = sorted((self.root / "PedMasks").glob("*.png"))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = tv_tensors.Image(Image.open(self.images[index]).convert("RGB"))
        mask = torch.from_numpy(np.array(Image.open(self.masks[index])))
        ids = torch.unique(mask)[1:]
        masks = (mask == ids[:, None, None]).to(dtype=torch.uint8)
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1  # so that both ways train on the same boxes
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=F.get_size(image)),
            "masks": tv_tensors.Mask(masks),
            "labels": torch.ones(len(ids), dtype=torch.int64),
            "image_id": index,
            "area": (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0]),
            "iscrowd": torch.zeros(len(ids), dtype=torch.int64),
        }
        return self.transforms(image, target)


def classic_step(model: nn.Module, optimizer: torch.optim.Optimizer, images, targets, device: torch.device) -> None:
    images = [image.to(device) for image in images]
    targets = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in targets]
    losses = model(images, targets)
    total = sum(losses.values())
    if not math.isfinite(total.item()):
        raise FloatingPointError("loss")
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    _ = {name: value.item() for name, value in losses.items()}  # for the log


@torch.inference_mode()
def classic_predict(model: nn.Module, images, device: torch.device, score_threshold: float) -> list[dict]:
    outputs = model.eval()([image.to(device) for image in images])
    outputs = [{k: v.to("cpu") for k, v in output.items()} for output in outputs]
    return [{k: v[output["scores"] >= score_threshold] for k, v in output.items()} for output in outputs]


class Classic:
    """The usual evaluator: one COCOeval update an image, its masks encoded one by one; pycocotools' own table."""

    def __init__(self, targets: list[dict], sizes: list[tuple[int, int]]):
        dataset: dict = {"info": {}, "images": [], "categories": [{"id": 1}], "annotations": []}
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


def classic_evaluate(model: nn.Module, data_loader: DataLoader, device: torch.device) -> list[np.ndarray]:
    targets = [target for _, of_batch in data_loader for target in of_batch]
    evaluator = Classic(targets, [tuple(target["masks"].shape[-2:]) for target in targets])
    with contextlib.redirect_stdout(io.StringIO()):
        for images, of_batch in data_loader:
            for target, output in zip(of_batch, classic_predict(model, images, device, 0), strict=True):
                evaluator.update(output, target["image_id"])
        return evaluator.finish()
