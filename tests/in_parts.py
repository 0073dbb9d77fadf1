"""Run by test_train.py under PyTorch's launcher; every process writes what it found.

    python -m torch.distributed.run --nproc-per-node 2 tests/in_parts.py train OUT_FOLDER
    python -m torch.distributed.run --nproc-per-node 3 tests/in_parts.py evaluate OUT_FOLDER DATA_FOLDER

The folder then holds process0.json, process1.json ….
"""

import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Subset

from tutorial_lib import engine, presets
from tutorial_lib.data import collate_fn
from tutorial_lib.offline.mini_models import maskrcnn_mini_fpn
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform


def evaluated(data: str, num_images: int, in_parts: bool) -> list:
    """With images one by one, predictions are the same in every process."""
    dataset = Subset(PennFudanDataset(data, get_transform(train=False)), range(num_images))
    how = {"sampler": DistributedSampler(dataset, shuffle=False)} if in_parts else {}
    if in_parts and num_images == 5:
        how = {"batch_sampler": BatchSampler(how["sampler"], 1, drop_last=False)}
    loader = DataLoader(dataset, **how, collate_fn=collate_fn)
    results = engine.evaluate(maskrcnn_mini_fpn(weights="DEFAULT"), loader, torch.device("cpu"), progress=False)
    kinds = (results.box, results.mask)
    return [results.num_images, *(value for m in kinds for value in (m.AP, m.AP50, m.AP75, m.AR, m.AR1))]


def trained(out: Path) -> dict:
    """`python -m tutorial_lib.train`, and what its epochs saw and ended with."""
    found, original = {"image_ids": [], "weights": []}, engine.train_one_epoch

    def recorded(model, optimizer, loader, device, **options):
        batches = list(loader)
        found["image_ids"].append([[target["image_id"] for target in targets] for _, targets in batches])
        losses = original(model, optimizer, batches, device, **options)
        found["weights"].append([parameter.double().sum().item() for parameter in model.parameters()])
        return losses

    engine.train_one_epoch = recorded
    presets.PRESETS["quick"] = replace(presets.PRESETS["quick"], min_size=(96,), max_size=192)
    sys.argv[1:] = ["--preset", "quick", "--epochs", "2", "--batch-size", "4", "--out", str(out)]
    runpy.run_module("tutorial_lib.train", run_name="__main__")
    return found


if __name__ == "__main__":
    job, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if job == "train":
        found = trained(out)
    else:
        dist.init_process_group("gloo")
        found = [evaluated(sys.argv[3], num_images, in_parts=True) for num_images in (12, 5)]
        dist.destroy_process_group()
    (out / f"process{os.environ['RANK']}.json").write_text(json.dumps(found))
