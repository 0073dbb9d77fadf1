"""Backbones under Faster R-CNN, trained and measured at the same budget on the same split.

    python -m tools.benchmarks.backbones [quick] [laptop] [full]

Every row of ``results/backbones.json`` is one backbone at one preset: the same images, epochs, image size, batch,
optimizer and seed for all of a preset, no epoch chosen, the test images read once at the end. ``quick`` trains on the
synthetic sample, ``laptop`` on PennFudan, ``full`` on PennFudan on a GPU from ImageNet weights; where those cannot
be fetched it says so, starts from random weights, and writes ``random`` into the row.

``train_images_per_second`` is of whole epochs with loading and augmentation, ``inference_images_per_second`` of
the test images, loaded before the clock starts and after one batch that is not counted, both in float32. ``memory`` is
the peak of the training in MiB: on a CPU of the resident memory of the row's own process (``ru_maxrss``), of
which ``memory_before`` was taken before the model was built, by Python and the libraries; on CUDA of the tensors
(``torch.cuda.max_memory_allocated``). ``box_AP`` and ``box_AP50`` are on the test images.

Rows of the named presets that are there already, of the same device and code, are not measured again; rows of
presets that are not named stay. Needs Linux or macOS (``resource``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.models import get_model_weights, mobilenet_v2
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from tools.benchmarks import RESULTS, provenance, write_results
from tools.notebooks import ROOT, code_of_module, library_hash
from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.engine import evaluate, pick_device, train_one_epoch, warmup_cosine
from tutorial_lib.models import backbone_with_fpn
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.presets import choose_preset, fetch_weights, prepare_data
from tutorial_lib.transforms import get_transform

TRUNKS = {
    "mobilenet_v2": "mobilenet_v2",  # without FPN: the classic swap
    "mobilenet_v2_fpn": "mobilenet_v2",
    "mobilenet_v3_large_fpn": "mobilenet_v3_large",
    "resnet18_fpn": "resnet18",
    "resnet50_fpn": "resnet50",
    "convnext_tiny_fpn": "convnext_tiny",
}


@dataclass(frozen=True)
class Budget:
    """``channels`` is the pyramid's width, ``smallest`` the anchor size on its first map; it doubles at each."""

    epochs: int
    batch_size: int
    min_size: int
    max_size: int
    learning_rate: float
    channels: int
    smallest: int
    proposals: int
    box_batch_size_per_image: int


# The proposals of an image, after non-maximum suppression, and the sizes are small where a CPU has to do the work.
BUDGETS = {
    "quick": Budget(3, 4, 128, 256, 1e-3, 96, 16, 150, 64),
    "laptop": Budget(6, 4, 128, 256, 1e-3, 96, 16, 150, 64),
    "full": Budget(20, 4, 800, 1333, 1e-4, 256, 32, 1000, 512),
}


def detector(backbone: str, weights: str | None, budget: Budget) -> FasterRCNN:
    settings = {
        "num_classes": 2, "min_size": budget.min_size, "max_size": budget.max_size,
        "rpn_pre_nms_top_n_train": 2 * budget.proposals, "rpn_post_nms_top_n_train": 2 * budget.proposals,
        "rpn_pre_nms_top_n_test": budget.proposals, "rpn_post_nms_top_n_test": budget.proposals,
        "box_batch_size_per_image": budget.box_batch_size_per_image,
    }  # fmt: skip
    sizes, ratios = [budget.smallest * 2**level for level in range(5)], (0.5, 1.0, 2.0)
    if backbone.endswith("_fpn"):
        pyramid = backbone_with_fpn(TRUNKS[backbone], weights, budget.channels)
        anchors = AnchorGenerator(tuple((size,) for size in sizes), (ratios,) * 5)
        return FasterRCNN(pyramid, rpn_anchor_generator=anchors, **settings)
    trunk = mobilenet_v2(weights=weights).features
    trunk.out_channels = 1280
    anchors, roi_pool = AnchorGenerator((tuple(sizes),), (ratios,)), MultiScaleRoIAlign(["0"], 7, 2)
    return FasterRCNN(trunk, rpn_anchor_generator=anchors, box_roi_pool=roi_pool, **settings)


def peak_memory(device: torch.device) -> int:
    """In MiB, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    import resource  # not on Windows, where the tests import this module

    # Linux counts in KiB, macOS in bytes. The parent process holds no more than this one imports.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


@torch.inference_mode()
def inference_seconds(model: FasterRCNN, loader: DataLoader, device: torch.device) -> float:
    model.eval()
    batches = [[image.to(device) for image in images] for images, _ in loader]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    model(batches[0])
    wait()
    begun = time.perf_counter()
    for images in batches:
        model(images)
    wait()
    return time.perf_counter() - begun


def measure(name: str, backbone: str, limit: int | None) -> dict:
    """One row, in this process, which should be fresh: its peak memory is read."""
    preset, budget, device = choose_preset(name), BUDGETS[name], pick_device()
    root, weights = prepare_data(preset), preset.trunk_weights
    try:
        fetch_weights(TRUNKS[backbone], weights)
    except RuntimeError as error:
        print(f"{backbone} starts from random weights, and its AP is that much lower: {error}", file=sys.stderr)
        weights = None
    train_set = split_dataset(PennFudanDataset(root, get_transform(train=True)), preset.split, seed=0, block=10)[0]
    test_set = split_dataset(PennFudanDataset(root, get_transform(train=False)), preset.split, seed=0, block=10)[2]
    if limit is not None:
        train_set, test_set = (torch.utils.data.Subset(part, range(limit)) for part in (train_set, test_set))
    loader = DataLoader(train_set, budget.batch_size, shuffle=True, drop_last=True, collate_fn=collate_fn)
    test_loader = DataLoader(test_set, budget.batch_size, collate_fn=collate_fn)
    memory_before = peak_memory(device)
    torch.manual_seed(0)
    model = detector(backbone, weights, budget).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.learning_rate, weight_decay=0.01, fused=True)
    schedule = warmup_cosine(optimizer, len(loader), budget.epochs * len(loader))
    begun = time.perf_counter()
    for _ in range(budget.epochs):
        losses = train_one_epoch(model, optimizer, loader, device, lr_scheduler=schedule, progress=False)
    seconds, memory = time.perf_counter() - begun, peak_memory(device)
    trained_on = budget.epochs * len(loader) * budget.batch_size
    inference = inference_seconds(model, test_loader, device)
    box = evaluate(model, test_loader, device, progress=False).box
    return {
        "preset": name,
        "data": preset.data,
        "backbone": backbone,
        "weights": get_model_weights(TRUNKS[backbone])[weights].name if weights else "random",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_images_per_second": round(trained_on / seconds, 2),
        "inference_images_per_second": round(len(test_set) / inference, 2),
        "memory": memory,
        "memory_before": memory_before,
        "box_AP": box.AP,
        "box_AP50": box.AP50,
        "loss": losses["loss"],
        "images_trained_on": trained_on,
        **vars(budget),
        **provenance(device),
    }


def of_this_code() -> dict[str, str]:
    this_file = code_of_module(Path(__file__).read_text(encoding="utf-8"))
    return {"library_hash": library_hash(), "this_file": hashlib.sha256(this_file.encode()).hexdigest()[:16]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help=f"{', '.join(BUDGETS)}; quick and laptop unless named")
    parser.add_argument("--only", choices=TRUNKS, help="measure only this backbone, print its row and write nothing")
    parser.add_argument("--limit", type=int, help="with --only: train and test on so many images, to try it")
    arguments = parser.parse_args()
    presets = arguments.presets or ["quick", "laptop"]
    if arguments.only:
        print(json.dumps(measure(presets[0], arguments.only, arguments.limit)))
        sys.exit()
    path, same = RESULTS / "backbones.json", of_this_code()
    where = {"device": provenance(pick_device())["device"]}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [row for row in rows if row["preset"] not in presets or (same | where).items() <= row.items()]
    for name in presets:
        for backbone in TRUNKS:
            if (name, backbone) in {(row["preset"], row["backbone"]) for row in rows}:
                continue
            begun = time.perf_counter()
            command = [sys.executable, "-m", "tools.benchmarks.backbones", name, "--only", backbone]
            finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(finished.stdout.splitlines()[-1]) | same)
            print(f"{time.perf_counter() - begun:.0f} s: {rows[-1]}", flush=True)
            write_results("backbones", {"rows": rows})
