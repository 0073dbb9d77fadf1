"""The classic way and ours, side by side in one run, on the same inputs.

    python -m tests.benchmarks.speed [work ...]

Rows of ``results/speed.json`` hold the seconds of both and their ratio; works that are
not named keep their rows. The works of the name `..._cuda` run where there is a card, and need no network: the
model has random weights there. The loop that they are compared with is in ``classic.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.models import get_model
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import masks_to_boxes

import tutorial_lib.models  # registers the mini models
from tests.benchmarks import RESULTS, provenance, write_results
from tests.benchmarks.classic import Classic, ClassicDataset, classic_evaluate, classic_predict, classic_step
from tutorial_lib.coco_eval import coco_metrics, compare
from tutorial_lib.engine import evaluate, predict, train_one_epoch, use_bfloat16
from tutorial_lib.penn_fudan import PennFudanDataset, collate_fn, split_dataset
from tutorial_lib.presets import Preset, choose_preset, prepare_data
from tutorial_lib.transforms import get_transform


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


def preset_at_hand(device: torch.device) -> Preset:
    """Full on CUDA; on a CPU laptop where PENN_FUDAN_ROOT is set, else quick."""
    cpu = "laptop" if os.environ.get("PENN_FUDAN_ROOT") else "quick"
    return choose_preset("full" if device.type == "cuda" else cpu)


def alternating(classic: Callable, ours: Callable, inputs: list) -> dict:
    """Median seconds of both on every input, one after the other, so that a busy machine slows both."""
    seconds: dict[str, list[float]] = {"classic": [], "ours": []}
    for item in [inputs[0], *inputs]:  # the first is a warm-up
        for name, function in (("classic", classic), ("ours", ours)):
            begun = time.perf_counter()
            function(item)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()} | {"repeats": len(inputs)}


def sample(in_memory: bool) -> dict:
    """One image and its target, without augmentation."""
    preset = preset_at_hand(torch.device("cpu"))
    root = prepare_data(preset)
    ours = PennFudanDataset(root, get_transform(train=False), in_memory=in_memory)
    indices = list(range(min(len(ours), 100)))
    if in_memory:
        for index in indices:
            ours[index]
    classic = ClassicDataset(root, get_transform(train=False))
    return alternating(classic.__getitem__, ours.__getitem__, indices) | {"preset": preset.name}


def pair_of_models(
    preset: Preset, device: torch.device, change: Callable = use_bfloat16, new_predictors: bool = True
) -> list[torch.nn.Module]:
    """The preset's Mask R-CNN for people, twice; the second changed. Random weights at full."""
    torch.manual_seed(0)
    sizes = {"min_size": preset.min_size[-1], "max_size": preset.max_size}
    if preset.name == "full":
        model = get_model(preset.mask_rcnn, weights=None, weights_backbone=None, num_classes=2, **sizes)
    else:
        model = get_model(preset.mask_rcnn, weights=preset.weights, **sizes)
        if new_predictors:
            tutorial_lib.models.replace_mask_predictor(tutorial_lib.models.replace_box_predictor(model, 2), 2)
    models = [model.to(device), copy.deepcopy(model).to(device)]
    change(models[1], device)
    return models


def channels_last(model: torch.nn.Module, device: torch.device) -> None:
    model.to(memory_format=torch.channels_last)


def train_step(device: torch.device, change: Callable = use_bfloat16) -> dict:
    """A training step on 12 batches that are in memory."""
    preset = preset_at_hand(device)
    classic, ours = pair_of_models(preset, device, change)
    dataset = PennFudanDataset(prepare_data(preset), get_transform(train=True))
    train_set = split_dataset(dataset, preset.split, seed=0)[0]
    torch.manual_seed(0)
    loader = DataLoader(train_set, preset.batch_size, shuffle=True, drop_last=True, collate_fn=collate_fn)
    batches = list(itertools.islice(itertools.cycle(loader), 12))
    sgd = torch.optim.SGD(classic.parameters(), lr=1e-4, momentum=0.9)
    adamw = torch.optim.AdamW(ours.parameters(), lr=1e-4, fused=True)
    classic.train()
    return alternating(
        lambda batch: classic_step(classic, sgd, *batch, device),
        lambda batch: train_one_epoch(ours, adamw, [batch], device, progress=False),
        batches,
    ) | {"preset": preset.name, "bfloat16": "forward" in vars(ours.backbone)}


def inference(device: torch.device) -> dict:
    """Detections with a score of at least 0.5 and their masks, of one image after the other, before finetuning."""
    preset = preset_at_hand(device)
    classic, ours = pair_of_models(preset, device, new_predictors=False)
    dataset = PennFudanDataset(prepare_data(preset), get_transform(train=False))
    images = [dataset[index][0] for index in range(30)]
    return alternating(
        lambda image: classic_predict(classic, [image], device, 0.5),
        lambda image: predict(ours, [image], device, 0.5),
        images,
    ) | {"preset": preset.name, "bfloat16": "forward" in vars(ours.backbone)}


def epoch(device: torch.device) -> dict:
    """The second epoch of training and evaluation on the test images, data included; after one to warm up."""
    preset = preset_at_hand(device)
    root = prepare_data(preset)
    models = pair_of_models(preset, device)
    row: dict = {"preset": preset.name, "bfloat16": "forward" in vars(models[1].backbone)}
    for name, model in zip(("classic", "ours"), models, strict=True):
        kind = ClassicDataset if name == "classic" else PennFudanDataset
        options = {} if name == "classic" else {"in_memory": True}
        train_set, _, _ = split_dataset(kind(root, get_transform(train=True), **options), preset.split, seed=0)
        _, _, test_set = split_dataset(kind(root, get_transform(train=False), **options), preset.split, seed=0)
        torch.manual_seed(0)
        train_loader = DataLoader(train_set, preset.batch_size, shuffle=True, drop_last=True, collate_fn=collate_fn)
        test_loader = DataLoader(test_set, preset.batch_size, collate_fn=collate_fn)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        if name == "ours":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            begun = time.perf_counter()
            if name == "classic":
                model.train()
                for images, targets in train_loader:
                    classic_step(model, optimizer, images, targets, device)
            else:
                train_one_epoch(model, optimizer, train_loader, device, progress=False)
            trained = time.perf_counter()
            if name == "classic":
                classic_evaluate(model, test_loader, device)
            else:
                evaluate(model, test_loader, device, progress=False)
            ended = time.perf_counter()
        row |= {name: ended - begun, f"{name}_training": trained - begun, f"{name}_evaluation": ended - trained}
        if device.type == "cuda":
            row[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def trainings(**ways: tuple[int, dict[str, str]]) -> dict:
    """The training of two epochs by `tutorial_lib.train`, for each way: how many processes, and their environment."""
    seconds = {}
    for name, (count, environment) in ways.items():
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        with tempfile.TemporaryDirectory() as out:
            arguments = ["--preset", preset_at_hand(CPU).name, "--epochs", "2", "--out", out]
            subprocess.run(
                [sys.executable, *launcher, "-m", "tutorial_lib.train", *arguments],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            seconds[name] = json.loads((Path(out) / "results.json").read_text())["training_seconds"]
    return {**seconds, "preset": preset_at_hand(CPU).name, "ways": {name: list(way) for name, way in ways.items()}}


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORKS: dict[str, Callable[[], dict]] = {
    "sample_from_disk": lambda: sample(in_memory=False),
    "sample_from_cache": lambda: sample(in_memory=True),
    "train_step_cpu": lambda: train_step(CPU),
    "inference_cpu": lambda: inference(CPU),
    "epoch_cpu": lambda: epoch(CPU),
    "channels_last_cpu": lambda: train_step(CPU, channels_last),
    "two_processes_cpu": lambda: trainings(
        classic=(1, {"OMP_NUM_THREADS": str(torch.get_num_threads())}), ours=(2, {"OMP_NUM_THREADS": "1"})
    ),
    "large_pages_cpu": lambda: trainings(
        classic=(1, {"THP_MEM_ALLOC_ENABLE": "0"}), ours=(1, {"THP_MEM_ALLOC_ENABLE": "1"})
    ),
    "evaluator_50": lambda: evaluator(50, paste=True),
    "evaluator_1000": lambda: evaluator(1000, paste=True),
    "evaluator_50_pasted": lambda: evaluator(50, paste=False),
    "evaluator_1000_pasted": lambda: evaluator(1000, paste=False),
    "train_step_cuda": lambda: train_step(CUDA),
    "inference_cuda": lambda: inference(CUDA),
    "epoch_cuda": lambda: epoch(CUDA),
}

if __name__ == "__main__":
    at_hand = [work for work in WORKS if not work.endswith("_cuda") or torch.cuda.is_available()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", default=at_hand, help=", ".join(WORKS))
    works = parser.parse_args().works
    path = RESULTS / "speed.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {row["work"]: row for row in rows}
    for work in works:
        device = CUDA if work.endswith("_cuda") else CPU
        row = {"work": work, **WORKS[work](), **provenance(device)}
        row["ratio"] = round(row["classic"] / row["ours"], 2)
        rows[work] = row
        print(row, flush=True)
        write_results("speed", {"rows": [rows[name] for name in WORKS if name in rows]})
