"""Wall time to an AP on the photographs: the classic recipe beside notebook 04's, from the same weights.

    PENN_FUDAN_ROOT=/path/to/PennFudanPed python -m tools.benchmarks.time_to_ap [classic] [ours] [--processes 2]

The model, its starter weights, the split and the image sizes are those of `laptop`. The classic recipe is that of the
public reference scripts: float32, torchvision's own RoIAlign, new predictors with random weights (but the transposed
convolution, which does not depend on the classes, keeps its own), SGD 0.005 with momentum 0.9 and weight decay 5e-4, a
linear warm-up in the first epoch, a tenth of the rate after 16 and 22 of 26 epochs, batches of 2, images decoded from
the disk, flips only, and in each epoch an evaluation with pasted masks. Ours is notebook 04's, whose predictors start
from the mean of the old classes. The clock starts before the dataset is opened, and the evaluation of each epoch is
part of the time. The best epoch is measured on the test images afterwards.

Rows go to ``results/time_to_ap.json``, one for each recipe and seed; those of the same weights and code here are not
measured again. With two processes, a run shares the machine with another one, whichever its recipe. A run that never
has an AP counts with all its seconds: it would have needed more. So a ratio with such a classic run is a lower bound.
``arrived`` says how many runs had it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2

from tools.benchmarks import RESULTS, provenance, write_results
from tools.benchmarks.classic import ClassicDataset, classic_evaluate, classic_step
from tools.benchmarks.speed import detector
from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.engine import evaluate, train_one_epoch, use_bfloat16, validation_loss, warmup_cosine
from tutorial_lib.models import replace_predictors
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.presets import PRESETS, Preset, prepare_data
from tutorial_lib.transforms import get_transform

CPU = torch.device("cpu")
PRESET = PRESETS["laptop"]
SEEDS = range(3)
THRESHOLDS = (0.40, 0.45, 0.50)
CLASSIC_EPOCHS, CLASSIC_STEPS = 26, (16, 22)


def random_predictors(model: nn.Module, num_classes: int) -> nn.Module:
    """The model with new layers where they depend on the classes, as torchvision builds them."""
    heads = model.roi_heads
    heads.box_predictor = FastRCNNPredictor(heads.box_predictor.cls_score.in_features, num_classes)
    heads.mask_predictor.mask_fcn_logits = nn.Conv2d(heads.mask_predictor.mask_fcn_logits.in_channels, num_classes, 1)
    return model


def classic(seed: int) -> Iterator[tuple[nn.Module, float, float]]:
    """The model, its box AP and its mask AP on the validation images, after each epoch."""
    torch.manual_seed(seed)
    convert = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    root = prepare_data(PRESET)
    augmented = ClassicDataset(root, v2.Compose([v2.RandomHorizontalFlip(), *convert]))
    train_set, _, _ = split_dataset(augmented, PRESET.split, seed=0, block=10)
    _, val_set, _ = split_dataset(ClassicDataset(root, v2.Compose(convert)), PRESET.split, seed=0, block=10)
    train_loader = DataLoader(train_set, 2, shuffle=True, collate_fn=collate_fn)
    val_loader = DataLoader(val_set, 1, collate_fn=collate_fn)
    model = random_predictors(detector(PRESET, MultiScaleRoIAlign), 2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.005, momentum=0.9, weight_decay=0.0005)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=len(train_loader) - 1)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, CLASSIC_STEPS, gamma=0.1)
    for epoch in range(CLASSIC_EPOCHS):
        model.train()
        for images, targets in train_loader:
            classic_step(model, optimizer, images, targets, CPU)
            if epoch == 0:
                warm_up.step()
        steps.step()
        box, mask = classic_evaluate(model, val_loader, CPU)
        yield model, float(box[0]), float(mask[0])


def ours(
    seed: int, preset: Preset = PRESET, new_predictors: Callable = replace_predictors
) -> Iterator[tuple[nn.Module, float, float]]:
    """The same, as notebook 04 trains; with changes for ``recipes.py``."""
    torch.manual_seed(seed)
    root = prepare_data(preset)
    augmented = PennFudanDataset(root, get_transform(train=True), in_memory=True)
    plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
    train_set, _, _ = split_dataset(augmented, preset.split, seed=0, block=10)
    _, val_set, _ = split_dataset(plain, preset.split, seed=0, block=10)
    options = {"batch_size": preset.batch_size, "collate_fn": collate_fn}
    train_loader = DataLoader(train_set, shuffle=True, drop_last=True, **options)
    val_loader = DataLoader(val_set, **options)
    sizes = {"min_size": preset.min_size, "max_size": preset.max_size}
    model = new_predictors(get_model(preset.mask_rcnn, weights=preset.weights, **sizes), 2)
    use_bfloat16(model, CPU)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=preset.learning_rate, weight_decay=0.01)
    schedule = warmup_cosine(optimizer, len(train_loader), preset.long_epochs * len(train_loader))
    for _ in range(preset.long_epochs):
        train_one_epoch(model, optimizer, train_loader, CPU, lr_scheduler=schedule, progress=False)
        validation_loss(model, val_loader, CPU)
        results = evaluate(model, val_loader, CPU, progress=False)
        yield model, results.box.AP, results.mask.AP


RECIPES = {"classic": classic, "ours": ours}


def measured(train: Callable[[int], Iterator], seed: int) -> dict:
    """The AP of each epoch, and on the test images that of the epoch with the best validation mask AP."""
    begun, history, best = time.perf_counter(), [], {}
    for model, box, mask in train(seed):
        history.append([round(time.perf_counter() - begun, 1), round(box, 4), round(mask, 4)])
        if history[-1][2] == max(row[2] for row in history):
            best = copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    plain = PennFudanDataset(prepare_data(PRESET), get_transform(train=False))
    test_set = split_dataset(plain, PRESET.split, seed=0, block=10)[2]
    results = evaluate(model, DataLoader(test_set, PRESET.batch_size, collate_fn=collate_fn), CPU, progress=False)
    test = {"test_box_AP": results.box.AP, "test_mask_AP": results.mask.AP}
    return {"seed": seed, "epochs": len(history), "history": history} | test | provenance(CPU)


def in_processes(
    trains: dict[str, Callable], jobs: list[tuple[str, int]], processes: int
) -> Iterator[tuple[str, dict]]:
    """The name and the row of each job, a name and a seed, as they are done, in processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(measured, trains[name], seed): name for name, seed in jobs}
        for done in as_completed(futures):
            yield futures[done], done.result()


def seconds_to(row: dict, threshold: float) -> tuple[float, bool]:
    """When the validation mask AP was first there, and whether it ever was; else all seconds of the run."""
    seconds = [second for second, _, mask in row["history"] if mask >= threshold]
    return (seconds[0], True) if seconds else (row["history"][-1][0], False)


def summary(rows: list[dict]) -> dict:
    """For each threshold the median seconds of both recipes, how many runs arrived, and the median of the ratios.

    The median ratio is that of the seeds, not of the medians.
    """
    table = {}
    for threshold in THRESHOLDS:
        found = {(row["recipe"], row["seed"]): seconds_to(row, threshold) for row in rows}
        seeds = sorted(seed for recipe, seed in found if recipe == "ours" and ("classic", seed) in found)
        ratios = {seed: found["classic", seed][0] / found["ours", seed][0] for seed in seeds}
        table[f"{threshold:.2f}"] = {
            "median_seconds": {n: statistics.median(found[n, seed][0] for seed in seeds) for n in RECIPES},
            "arrived": {name: sum(found[name, seed][1] for seed in seeds) for name in RECIPES},
            "runs": len(seeds),
            "median_ratio": round(statistics.median(ratios.values()), 2),
        }
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, of one thread each")
    arguments = parser.parse_args()
    same = {
        "weights": get_model_weights(PRESET.mask_rcnn).DEFAULT.meta["sha256"][:16],
        "this_file": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16],
    }
    path = RESULTS / "time_to_ap.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [row for row in rows if same.items() <= row.items()]
    known = {(row["recipe"], row["seed"]) for row in rows}
    jobs = [(recipe, seed) for seed in SEEDS for recipe in arguments.recipes if (recipe, seed) not in known]
    for recipe, row in in_processes(RECIPES, jobs, arguments.processes):
        rows.append({"recipe": recipe} | row | same)
        print(recipe, row["seed"], row["history"][-1], flush=True)
        rows.sort(key=lambda row: (row["recipe"], row["seed"]))
        of_seed = Counter(row["seed"] for row in rows)
        write_results("time_to_ap", {"summary": summary(rows) if 2 in of_seed.values() else {}, "rows": rows})
