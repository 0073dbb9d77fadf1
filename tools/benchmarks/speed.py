"""The classic way and ours, side by side in one run, on the same inputs.

    python -m tools.benchmarks.speed [work ...]

Rows of ``results/speed.json`` hold the seconds of both and their ratio; works that are not named keep their rows. The
classic loop is in ``classic.py``. Ours has the large memory pages that the Makefile asks Linux for. Set
PENN_FUDAN_ROOT to measure on the photographs. The works of the name `..._cuda` need a GPU, and with PENN_FUDAN_ROOT no
network: the model has random weights there. `train_step_cuda` keeps a training for each line on the GPU, which needs
some 25 GB (estimated).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.models import ResNet50_Weights, get_model, resnet50
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import MultiScaleRoIAlign, masks_to_boxes

from tools.benchmarks import RESULTS, provenance, write_results
from tools.benchmarks.classic import Classic, ClassicDataset, classic_evaluate, classic_predict, classic_step
from tutorial_lib.coco_eval import coco_metrics, compare
from tutorial_lib.data import AspectRatioBatchSampler, collate_fn, split_dataset
from tutorial_lib.engine import evaluate, has_fast_bfloat16, predict, train_one_epoch, use_bfloat16
from tutorial_lib.models import replace_predictors
from tutorial_lib.offline.roi_align import EmbeddingBagRoIAlign
from tutorial_lib.penn_fudan import PennFudanDataset
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
    masks = paste_masks_in_image(blob.clamp(0, 1)[:, None], found, size)
    scores = torch.from_numpy(rng.random(100)).float()
    prediction = {"boxes": found, "labels": torch.ones(100, dtype=torch.int64), "scores": scores, "masks": masks}
    return prediction, target, size


def evaluator(num_images: int, rounds: int = 1) -> dict:
    """Ours beside the classic evaluator, on 100 detections an image, the mean of several rounds in turn.

    Both begin with masks of the image's size, as Mask R-CNN gives them.
    """
    rows = [evaluated(num_images) for _ in range(rounds)]
    seconds = {name: [row[name] for row in rows] for name in ("classic", "ours")}
    means = {name: statistics.mean(values) for name, values in seconds.items()}
    return rows[0] | means | ({"rounds": seconds} if rounds > 1 else {})


def evaluated(num_images: int) -> dict:
    """One round of :func:`evaluator`."""
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
            timed("classic", classic.update, prediction, number)
            compared.append(timed("ours", compare, prediction, target, size))
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
    """Median seconds of both on every input, in turn, so that a busy machine slows both; and quartiles of the ratio."""
    functions = {"classic": classic, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number, item in enumerate([inputs[0], *inputs]):  # the first is a warm-up
        for name in sorted(functions, reverse=number % 2 == 1):
            begun = time.perf_counter()
            functions[name](item)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    pairs = list(zip(seconds["classic"][1:], seconds["ours"][1:], strict=True))
    quartiles = statistics.quantiles([theirs / mine for theirs, mine in pairs], n=4)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return medians | {"repeats": len(pairs), "ratio_quartiles": [round(quartiles[k], 2) for k in (0, 2)]}


def sample() -> dict:
    """One image and its target, without augmentation: from the disk the classic way, ours from memory."""
    preset = preset_at_hand(CPU)
    root = prepare_data(preset)
    ours = PennFudanDataset(root, get_transform(train=False), in_memory=True)
    classic = ClassicDataset(root, get_transform(train=False))
    indices = list(range(min(len(ours), 100)))
    for index in indices:  # so that the disk is read, and the cache is full
        ours[index]
    return alternating(classic.__getitem__, ours.__getitem__, indices) | {"preset": preset.name}


def detector(preset: Preset, roi_align: type[MultiScaleRoIAlign]) -> torch.nn.Module:
    """The preset's Mask R-CNN as it is before finetuning.

    At full it is built as for COCO, so with BatchNorm and the first layers frozen, but from random weights. The last
    BatchNorm of each block is 0, without which frozen ones would let the features grow from block to block.
    """
    sizes = {"min_size": preset.min_size, "max_size": preset.max_size}
    if preset.name == "full":
        random = resnet50(zero_init_residual=True).state_dict()
        with mock.patch.object(ResNet50_Weights, "get_state_dict", lambda *args, **kwargs: random):
            return get_model(preset.mask_rcnn, weights=None, weights_backbone="DEFAULT", **sizes)
    levels = ["0", "1", "2", "3"]
    pools = {"box_roi_pool": roi_align(levels, 7, 2), "mask_roi_pool": roi_align(levels, 14, 2)}
    return get_model(preset.mask_rcnn, weights=preset.weights, **pools, **sizes)


def channels_last(model: torch.nn.Module, device: torch.device) -> None:
    use_bfloat16(model, device)
    model.to(memory_format=torch.channels_last)


def nothing(model: torch.nn.Module, device: torch.device) -> None:
    pass


@dataclass(frozen=True)
class Loop:
    """A training loop: the classic one, or ours with what is switched on in it."""

    classic: bool = False
    large_pages: bool = True
    roi_align: type[MultiScaleRoIAlign] = EmbeddingBagRoIAlign
    num_windows: int = 5
    change: Callable = use_bfloat16


OURS = Loop()
PLAIN = Loop(large_pages=False, roi_align=MultiScaleRoIAlign, num_windows=1000, change=nothing)
CLASSIC = replace(PLAIN, classic=True)


def one_after_the_other(device: torch.device) -> dict[str, Loop]:
    """From the classic loop to ours, one change at a time; all have their batches in memory."""
    loops = {"classic": CLASSIC, "fused AdamW": PLAIN}
    if device.type == "cuda":
        loops = {"classic": CLASSIC, "fused AdamW, pinned memory": PLAIN}
    else:
        loops["large pages"] = replace(PLAIN, large_pages=True)
        loops["RoIAlign as an embedding bag"] = replace(OURS, num_windows=1000, change=nothing)
    loops["images of similar shapes"] = replace(OURS, change=nothing)
    if has_fast_bfloat16(device):
        loops["bfloat16"] = OURS
    return loops


def own_process(loop: Loop) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, {"THP_MEM_ALLOC_ENABLE": str(int(loop.large_pages))}):
        pool.submit(os.getpid).result()  # starts it
    return pool


def loaders(loop: Loop, preset: Preset, device: torch.device) -> tuple[DataLoader, DataLoader]:
    """Of the training and the test images."""
    root = prepare_data(preset)
    kind, options = (ClassicDataset, {}) if loop.classic else (PennFudanDataset, {"in_memory": True})
    train_set, _, _ = split_dataset(kind(root, get_transform(train=True), **options), preset.split, seed=0, block=10)
    _, _, test_set = split_dataset(kind(root, get_transform(train=False), **options), preset.split, seed=0, block=10)
    how = {"batch_size": preset.batch_size, "shuffle": True, "drop_last": True}
    if not loop.classic:
        ratios = [w / h for h, w in map(train_set.dataset.get_height_and_width, train_set.indices)]
        how = {"batch_sampler": AspectRatioBatchSampler(ratios, preset.batch_size, loop.num_windows)}
    both = {"collate_fn": collate_fn, "pin_memory": not loop.classic and device.type == "cuda"}
    return DataLoader(train_set, **how, **both), DataLoader(test_set, preset.batch_size, **both)


def model_and_optimizer(loop: Loop, preset: Preset, device: torch.device) -> tuple:
    torch.manual_seed(0)
    model = replace_predictors(detector(preset, loop.roi_align), 2).to(device)
    loop.change(model, device)
    if loop.classic:
        return model.train(), torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


prepared: dict = {}  # of a process that times steps


def prepare_steps(loop: Loop, device: torch.device) -> int:
    preset = preset_at_hand(device)
    model, optimizer = model_and_optimizer(loop, preset, device)
    train_loader, _ = loaders(loop, preset, device)
    torch.manual_seed(0)
    prepared.update(loop=loop, device=device, model=model, optimizer=optimizer, batches=list(train_loader))
    return len(prepared["batches"])


def timed_step(number: int) -> float:
    model, optimizer, device = (prepared[name] for name in ("model", "optimizer", "device"))
    batch = prepared["batches"][number]
    torch.manual_seed(number)  # all take the same of several min_size
    begun = time.perf_counter()
    if prepared["loop"].classic:
        classic_step(model, optimizer, *batch, device)
    else:
        train_one_epoch(model, optimizer, [batch], device, progress=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def train_step(device: torch.device, loops: dict[str, Loop]) -> dict:
    """The mean step of two epochs, on batches that are in memory: one of the first loop, one of the second, and so on.

    The first loop's seconds are ``classic``, the last one's are ``ours``.
    """
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(own_process(loop)) for name, loop in loops.items()}
        count = min(pools[name].submit(prepare_steps, loop, device).result() for name, loop in loops.items())
        rounds: dict[str, list[float]] = {name: [] for name in loops}
        for pool in pools.values():
            pool.submit(timed_step, 0).result()  # a warm-up
        for _ in range(2):
            seconds: dict[str, list[float]] = {name: [] for name in loops}
            for number in range(count):
                for name, pool in pools.items():
                    seconds[name].append(pool.submit(timed_step, number).result())
            for name, values in seconds.items():
                rounds[name].append(statistics.mean(values))
    steps = {name: statistics.mean(values) for name, values in rounds.items()}
    first, *_, last = loops
    return {
        "classic": steps[first],
        "ours": steps[last],
        "repeats": 2 * count,
        "rounds": {"classic": rounds[first], "ours": rounds[last]},
        "steps": steps,
        "preset": preset_at_hand(device).name,
        "bfloat16": has_fast_bfloat16(device),
    }


def inference(device: torch.device) -> dict:
    """Detections with a score of at least 0.5 and their masks, of one image after the other, before finetuning.

    At full the weights are random, and the scores of two classes near 0.5: ``detections_over_0.5`` says how many masks
    were wanted.
    """
    preset = preset_at_hand(device)
    models = []
    for roi_align in (MultiScaleRoIAlign, EmbeddingBagRoIAlign):
        torch.manual_seed(0)
        model = detector(preset, roi_align)
        if preset.name == "full":
            replace_predictors(model, 2)
        models.append(model.to(device))
    classic, ours = models
    use_bfloat16(ours, device)
    dataset = PennFudanDataset(prepare_data(preset), get_transform(train=False))
    images = [dataset[index][0] for index in range(30)]
    row = alternating(
        lambda image: classic_predict(classic, [image], device, 0.5),
        lambda image: predict(ours, [image], device, 0.5),
        images,
    )
    found = [len(prediction["scores"]) for image in images for prediction in predict(ours, [image], device, 0.5)]
    row |= {"preset": preset.name, "bfloat16": has_fast_bfloat16(device)}
    return row | {"detections_over_0.5": statistics.mean(found)}


def peak_bytes(device: torch.device) -> int | None:
    """Of the GPU since the last reset, or of this process; None where Linux does not say it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # getrusage would begin with the peak of the process that started this one
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def epochs(loop: Loop, preset: Preset, device: torch.device, count: int = 2) -> dict:
    """Seconds of training and of evaluating the test images, data included, by epoch; and training's peak of memory.

    What is evaluated is the model before training, with 100 detections an image, so that both ways predict the same.
    """
    model, optimizer = model_and_optimizer(loop, preset, device)
    untrained = copy.deepcopy(model)
    train_loader, test_loader = loaders(loop, preset, device)
    seconds: dict[str, list[float]] = {"training": [], "evaluation": []}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(count):
        begun = time.perf_counter()
        if loop.classic:
            model.train()
            for images, targets in train_loader:
                classic_step(model, optimizer, images, targets, device)
        else:
            train_one_epoch(model, optimizer, train_loader, device, progress=False)
        seconds["training"].append(time.perf_counter() - begun)
    peak = peak_bytes(device)
    for _ in range(count):
        begun = time.perf_counter()
        if loop.classic:
            classic_evaluate(untrained, test_loader, device)
        else:
            evaluate(untrained, test_loader, device, progress=False)
        seconds["evaluation"].append(time.perf_counter() - begun)
    return seconds | {"peak_bytes": peak}


def epoch(device: torch.device) -> dict:
    """An epoch of training and evaluation after one to warm up, data included; each loop in its own process."""
    preset = preset_at_hand(device)
    row: dict = {"preset": preset.name, "bfloat16": has_fast_bfloat16(device)}
    for name, loop in {"classic": CLASSIC, "ours": OURS}.items():
        with own_process(loop) as pool:
            values = pool.submit(epochs, loop, preset, device).result()
        training, evaluation = values["training"][1], values["evaluation"][1]
        row |= {name: training + evaluation, f"{name}_training": training, f"{name}_evaluation": evaluation}
        row[f"{name}_peak_bytes"] = values["peak_bytes"]
    return row


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORKS: dict[str, Callable[[], dict]] = {
    "sample_from_cache": sample,
    "train_step_cpu": lambda: train_step(CPU, one_after_the_other(CPU)),
    "inference_cpu": lambda: inference(CPU),
    "epoch_cpu": lambda: epoch(CPU),
    "channels_last_cpu": lambda: train_step(CPU, {"contiguous": OURS, "last": replace(OURS, change=channels_last)}),
    "evaluator_50": lambda: evaluator(50, rounds=4),
    "evaluator_1000": lambda: evaluator(1000),
    "train_step_cuda": lambda: train_step(CUDA, one_after_the_other(CUDA)),
    "inference_cuda": lambda: inference(CUDA),
    "epoch_cuda": lambda: epoch(CUDA),
}

if __name__ == "__main__":
    at_hand = [work for work in WORKS if not work.endswith("_cuda") or torch.cuda.is_available()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", default=at_hand, help=", ".join(WORKS))
    works = parser.parse_args().works
    if unknown := set(works) - WORKS.keys():
        parser.error(f"there is no work {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    path = RESULTS / "speed.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {row["work"]: row for row in rows}
    for work in works:
        device = CUDA if work.endswith("_cuda") else CPU
        row = {"work": work, **provenance(device), **WORKS[work]()}
        row["ratio"] = round(row["classic"] / row["ours"], 2)
        rows[work] = row
        print(row, flush=True)
        write_results("speed", {"rows": [rows[name] for name in WORKS if name in rows]})
