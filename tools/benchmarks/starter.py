"""What the starter weights are worth: zero-shot, finetuned at `quick`, and on the photographs beside fresh heads.

    python -m tools.benchmarks.starter [quick] [laptop] [--processes 2]

`quick` finetunes on the synthetic sample with 3 seeds, as notebook 04; `laptop` on PennFudan (PENN_FUDAN_ROOT) with
3 seeds from the starter weights and 3 from their trunk with random FPN and heads, with the same budget: 4 epochs, a
fifth of notebook 04's. Rows of ``results/starter.json`` that are there already, of the same weights and code, are not
measured again, nor those of a preset that is not named.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from torch.utils.data import DataLoader
from torchvision.models import get_model, get_model_weights

from tools.benchmarks import RESULTS, provenance, write_results
from tools.notebooks import library_hash
from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.engine import evaluate, train_one_epoch, use_bfloat16, warmup_cosine
from tutorial_lib.models import replace_predictors
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.presets import PRESETS, Preset, choose_preset, prepare_data
from tutorial_lib.transforms import get_transform

SEEDS = {"quick": range(3), "laptop": range(3)}
EPOCHS = {"quick": PRESETS["quick"].long_epochs, "laptop": 4}
FRESH = "only the trunk's"


def finetune(preset: Preset, seed: int, weights: str | None) -> dict:
    """As notebook 04: the epoch is chosen on the validation images, the test images are read only for its row."""
    device, root, epochs = torch.device("cpu"), prepare_data(preset), EPOCHS[preset.name]
    augmented = PennFudanDataset(root, get_transform(train=True), in_memory=True)
    plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
    train_set = split_dataset(augmented, preset.split, seed=0, block=10)[0]
    _, val_set, test_set = split_dataset(plain, preset.split, seed=0, block=10)
    val_loader, test_loader = (DataLoader(s, preset.batch_size, collate_fn=collate_fn) for s in (val_set, test_set))
    torch.manual_seed(seed)
    sizes = {"min_size": preset.min_size, "max_size": preset.max_size}
    model = get_model(preset.mask_rcnn, weights=weights, **({} if weights else {"num_classes": 2}), **sizes)
    row = {"preset": preset.name, "weights": weights or FRESH, "seed": seed, "epochs": epochs}
    if weights is None:
        model.backbone.body = get_model(preset.mask_rcnn, weights="DEFAULT").backbone.body
    else:
        zero_shot = evaluate(model, test_loader, device)
        row |= {"zero_shot_box_AP": zero_shot.box.AP, "zero_shot_mask_AP": zero_shot.mask.AP}
        replace_predictors(model, 2)
    use_bfloat16(model, device)
    loader = DataLoader(train_set, preset.batch_size, shuffle=True, drop_last=True, collate_fn=collate_fn)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=preset.learning_rate, weight_decay=0.01)
    schedule = warmup_cosine(optimizer, len(loader), epochs * len(loader))
    best, seconds = (-1.0, None), 0.0
    for _ in range(epochs):
        begun = time.perf_counter()
        train_one_epoch(model, optimizer, loader, device, lr_scheduler=schedule)
        seconds += time.perf_counter() - begun
        mask_ap = evaluate(model, val_loader, device).mask.AP
        if mask_ap > best[0]:
            best = mask_ap, copy.deepcopy(model.state_dict())
    model.load_state_dict(best[1])
    results = evaluate(model, test_loader, device)
    for kind in ("box", "mask"):
        row |= {f"{kind}_AP": getattr(results, kind).AP, f"{kind}_AP50": getattr(results, kind).AP50}
    return {**row, "training_seconds": round(seconds, 1)} | provenance(device)


def summary(rows: list[dict]) -> dict:
    """Mean and spread over the seeds of every group of rows."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['preset']}, {row['weights']} weights", []).append(row)
    return {
        name: {
            key: {"mean": statistics.mean(values), "spread": statistics.stdev(values)}
            for key, values in ((key, [row[key] for row in group]) for key in group[0])
            if key.endswith("AP") or key.endswith("AP50")
        }
        | {"seeds": len(group)}
        for name, group in groups.items()
        if len(group) > 1
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, of one thread each if > 1")
    arguments = parser.parse_args()
    starter = get_model_weights("maskrcnn_mini_fpn").DEFAULT.meta
    same = {"library_hash": library_hash(), "this_file": hashlib.sha256(open(__file__, "rb").read()).hexdigest()[:16]}
    path = RESULTS / "starter.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    asked_for = arguments.presets
    rows = [r for r in rows if r["preset"] not in asked_for or all(r[key] == value for key, value in same.items())]
    known = {(row["preset"], row["weights"], row["seed"]) for row in rows}
    jobs = [
        (choose_preset(name), seed, weights)
        for name in arguments.presets
        for weights in (("DEFAULT", None) if name == "laptop" else ("DEFAULT",))
        for seed in SEEDS[name]
        if (name, weights or FRESH, seed) not in known
    ]
    pool = ProcessPoolExecutor(
        arguments.processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1 if arguments.processes > 1 else torch.get_num_threads(),),
    )
    with pool:
        for done in as_completed([pool.submit(finetune, *job) for job in jobs]):
            rows.append(done.result() | same)
            print(rows[-1], flush=True)
            rows.sort(key=lambda row: (-list(SEEDS).index(row["preset"]), row["weights"], row["seed"]))
            held_out = {key: starter[key] for key in ("recipe", "_metrics", "trained_with")}
            write_results("starter", {"starter": held_out, "summary": summary(rows), "rows": rows})
