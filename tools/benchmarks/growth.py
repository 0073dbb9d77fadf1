"""How time and memory grow with the number of images, and with the number of objects in an image.

    python -m tools.benchmarks.growth [--largest 1000] [series ...]

Every measurement has its own process, on synthetic images that are made for it. Rows of ``results/growth.json`` hold
``seconds`` of the processor, in all threads, so that it matters little what else the machine does; and ``bytes``, the
process's peak of memory less its peak before the work, when PyTorch was imported. Set OMP_NUM_THREADS=1.

- ``training``: ``setup_seconds`` to make the dataset of a COCO file, split it, and make batch sampler and loader.
  ``seconds`` are of an epoch on 8 of 10 images, at most 128 pixels wide, 3 objects each, with batches of 4, read from
  disk: the first 50 steps are timed (``steps_timed``), and all are taken to be as long. ``bytes`` see these steps only.
- ``training, in memory``: the same, when all samples have been read and kept.
- ``training, objects``: ``seconds`` of a step, a batch of 4 images of at most 256 pixels, by objects in each.
- ``evaluation``: ``seconds`` of ``evaluate`` with 100 detections and 10 objects an image. A stand-in for the model
  hands out detections that were made before, with masks of the size of the images, 64 x 64 pixels, so neither a
  model nor pasting is timed. ``kept_bytes`` are in the results' ``images``.
- ``evaluation, objects``: the same, of 100 images, by objects in each.
- ``check_dataset``: ``seconds`` of ``tutorial_lib.checks.check_dataset`` on the training images and transforms.

The model is the untrained ``maskrcnn_mini_fpn``, with ``min_size`` and ``max_size`` of the images, in float32.

``exponents`` have the slope of each between the two largest numbers of a series, on logarithmic scales: 0 is what does
not grow, 1 is linear. An exponent of 2 would be worse than linear: ten times the images, a hundred times the seconds.
Below 1, a part does not grow. Sorting n detections takes n log n steps, which is an exponent of up to 1.08 here.

With ``--largest`` or the names of series nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.models import get_model

import tutorial_lib.offline  # noqa: F401  (registers the mini models)
from tools.benchmarks import provenance, write_results
from tools.benchmarks.speed import peak_bytes
from tutorial_lib.checks import check_dataset
from tutorial_lib.coco import CocoDataset
from tutorial_lib.data import AspectRatioBatchSampler, collate_fn, split_dataset
from tutorial_lib.engine import evaluate, train_one_epoch
from tutorial_lib.transforms import get_transform

CPU = torch.device("cpu")
BATCH_SIZE, STEPS = 4, 50
SIDE, CROWDED_SIDE = 128, 256  # of images with few and with many objects
DETECTIONS, DETECTED_SIDE, DIFFERENT = 100, 64, 20  # an image's; its pixels; so many are made, and used in turn


def write_images(folder: Path, number: int, objects: int, side: int) -> None:
    """Images with diamonds on noise, upright or wide, as files beside a COCO file ``coco.json``."""
    rng = np.random.default_rng(number)
    (folder / "images").mkdir()
    images, annotations = [], []
    for image_id in range(1, number + 1):
        width, height = (int(length) for length in rng.permutation([side, side * 3 // 4]))
        noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        image = noise.resize((width, height))
        draw, name = ImageDraw.Draw(image), f"{image_id:05}.jpg"
        for w, h in rng.integers(side // 16, side // 4, (objects, 2)).tolist():
            x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
            corners = [x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 2]
            draw.polygon(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
            shape = {"bbox": [x, y, w, h], "segmentation": [corners]}
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, **shape})
        image.save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "diamond"}]}
    (folder / "coco.json").write_text(json.dumps(content), encoding="utf-8")


def dataset_of(folder: Path, in_memory: bool = False) -> CocoDataset:
    return CocoDataset(folder / "images", folder / "coco.json", get_transform(train=True), in_memory=in_memory)


def timed_steps(batches: list | DataLoader, steps: int, side: int) -> float:
    """Mean seconds of the first steps, after one that is not counted."""
    torch.manual_seed(0)
    sizes = {"min_size": side * 3 // 4, "max_size": side}
    model = get_model("maskrcnn_mini_fpn", weights=None, num_classes=2, **sizes)
    train = partial(train_one_epoch, model, torch.optim.AdamW(model.parameters(), lr=1e-4), device=CPU, progress=False)
    train(list(itertools.islice(batches, 1)))
    begun = time.process_time()
    train(itertools.islice(batches, steps))
    return (time.process_time() - begun) / steps


def training(number: int, folder: Path, in_memory: bool = False) -> dict:
    begun = time.process_time()
    dataset = dataset_of(folder, in_memory)
    part, _, _ = split_dataset(dataset, (number * 8 // 10, number // 10, number // 10), seed=0)
    shapes = map(dataset.get_height_and_width, part.indices)
    sampler = AspectRatioBatchSampler([width / height for height, width in shapes], BATCH_SIZE)
    loader = DataLoader(part, batch_sampler=sampler, collate_fn=collate_fn)
    setup = time.process_time() - begun
    for index in part.indices if in_memory else []:
        dataset[index]
    steps = min(STEPS, len(loader))
    seconds = timed_steps(loader, steps, SIDE)
    row = {"setup_seconds": setup, "seconds": seconds * len(loader), "steps": len(loader), "steps_timed": steps}
    return row | {"seconds_per_image": seconds / BATCH_SIZE}


def training_objects(number: int, folder: Path) -> dict:
    dataset = dataset_of(folder)
    batches = list(DataLoader(dataset, BATCH_SIZE, collate_fn=collate_fn))
    return {"seconds": timed_steps(batches, len(batches), CROWDED_SIDE), "steps_timed": len(batches)}


def rectangles(boxes: Tensor) -> Tensor:
    """The pixels of boxes, bool [N, side, side]."""
    inside = torch.arange(DETECTED_SIDE) >= boxes[:, :2, None]
    inside &= torch.arange(DETECTED_SIDE) < boxes[:, 2:, None]
    return inside[:, 1, :, None] & inside[:, 0, None, :]


class Prepared(nn.Module):
    """Hands out predictions in turn, whatever the images, with scores of their own."""

    def __init__(self, predictions: list[dict]):
        super().__init__()
        self.predictions = itertools.cycle(predictions)

    def forward(self, images: list[Tensor]) -> list[dict]:
        return [next(self.predictions) | {"scores": torch.rand(DETECTIONS)} for _ in images]


def evaluation(number: int, folder: Path, objects: int = 10) -> dict:
    torch.manual_seed(0)
    samples, predictions = [], []
    for _ in range(DIFFERENT):
        start = torch.randint(DETECTED_SIDE * 3 // 4, (objects, 2))
        boxes = torch.cat([start, start + torch.randint(4, DETECTED_SIDE // 4, (objects, 2))], dim=1).float()
        target = {"boxes": boxes, "labels": torch.ones(objects).long(), "masks": rectangles(boxes).byte()}
        samples.append((torch.zeros(3, DETECTED_SIDE, DETECTED_SIDE), target))
        near = boxes[torch.arange(DETECTIONS) % objects] + torch.randint(-1, 2, (DETECTIONS, 4))
        masks = rectangles(near)[:, None].float()
        predictions.append({"boxes": near, "labels": torch.ones(DETECTIONS).long(), "masks": masks})
    loader = DataLoader(Subset(samples, [index % DIFFERENT for index in range(number)]), collate_fn=collate_fn)
    begun = time.process_time()
    results = evaluate(Prepared(predictions), loader, CPU, progress=False)
    seconds = time.process_time() - begun
    kept = sum(value.nbytes for image in results.images for value in vars(image).values())
    return {"seconds": seconds, "detections": DETECTIONS, "kept_bytes": kept, "box_AP": results.box.AP}


def evaluation_objects(number: int, folder: Path) -> dict:
    return evaluation(100, folder, objects=number)


def checking(number: int, folder: Path) -> dict:
    dataset = dataset_of(folder)
    begun = time.process_time()
    report = check_dataset(dataset, num_classes=2, progress=False)
    return {"seconds": time.process_time() - begun, "findings": len(report.findings)}


def few_objects(number: int) -> dict:
    return {"number": number, "objects": 3, "side": SIDE}


def many_objects(number: int) -> dict:
    return {"number": BATCH_SIZE * 10, "objects": number, "side": CROWDED_SIDE}


# What measures a series, the arguments of write_images for it, and the numbers.
IMAGES = (100, 1_000, 10_000)
SERIES: dict[str, tuple[Callable, Callable | None, tuple[int, ...]]] = {
    "training": (training, few_objects, IMAGES),
    "training, in memory": (partial(training, in_memory=True), few_objects, IMAGES[:2]),
    "training, objects": (training_objects, many_objects, (1, 10, 100, 300)),
    "evaluation": (evaluation, None, IMAGES),
    "evaluation, objects": (evaluation_objects, None, (1, 10, 100)),
    "check_dataset": (checking, few_objects, IMAGES),
}


def measured(series: str, number: int, folder: Path) -> dict:
    """A row, in this process."""
    before = peak_bytes(CPU)
    values = SERIES[series][0](number, folder)
    peak = peak_bytes(CPU)
    if peak:
        values |= {"bytes": peak - before, "peak_bytes": peak}
    return {"series": series, "number": number, **values, **provenance(CPU)}


def measure(series: str, number: int) -> dict:
    """A row, in a process of its own, which is where possible a copy of one that has imported most already."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["tools.benchmarks.speed"])
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(1, mp_context=context) as pool:
        if images := SERIES[series][1]:
            write_images(Path(scratch), **images(number))
        return pool.submit(measured, series, number, Path(scratch)).result()


def exponents(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Of each series, between the two largest numbers; of memory from 1 MiB on."""
    slopes: dict[str, dict[str, float]] = {}
    for series in dict.fromkeys(row["series"] for row in rows):
        of_series = sorted((row for row in rows if row["series"] == series), key=lambda row: row["number"])
        if len(of_series) < 2:
            continue
        last, largest = of_series[-2:]
        step = math.log(largest["number"] / last["number"])
        slopes[series] = {
            name: round(math.log(max(largest[name], least) / max(last[name], least)) / step, 2)
            for name, least in (("setup_seconds", 0), ("seconds", 0), ("bytes", 2**20))
            if name in largest
        }
    return slopes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="*", default=list(SERIES), help="; ".join(SERIES))
    parser.add_argument("--largest", type=int, help="leave out greater numbers")
    arguments = parser.parse_args()
    if unknown := set(arguments.series) - SERIES.keys():
        parser.error(f"there is no series {', '.join(sorted(unknown))}; there are: {'; '.join(SERIES)}")
    rows = []
    for name in arguments.series:
        for number in SERIES[name][2]:
            if number <= (arguments.largest or number):
                rows.append(measure(name, number))
                print(rows[-1], flush=True)
    results = {"rows": rows, "exponents": exponents(rows)}
    print(json.dumps(results["exponents"], indent=1))
    if arguments.largest is None and arguments.series == list(SERIES):
        write_results("growth", results)
