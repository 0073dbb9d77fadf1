"""Run by test_train.py under PyTorch's launcher; every process writes what it found.

    python -m torch.distributed.run --nproc-per-node 2 tests/in_parts.py train OUT_FOLDER ARGUMENTS OF THE SCRIPT
    python -m torch.distributed.run --nproc-per-node 2 tests/in_parts.py killed OUT_FOLDER ARGUMENTS OF THE SCRIPT
    python -m torch.distributed.run --nproc-per-node 3 tests/in_parts.py evaluate OUT_FOLDER DATA_FOLDER

The folder then holds process0.json, process1.json …. ``killed`` ends the first process in its second epoch.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.mask import encode, toBbox
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Subset

from tutorial_lib import engine
from tutorial_lib.data import collate_fn
from tutorial_lib.offline.mini_models import maskrcnn_mini_fpn
from tutorial_lib.offline.sample import CATEGORIES, draw_scene
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform


def write_coco(folder: Path, num_images: int, masks: bool = True, first: int = 0, **more) -> Path:
    """Street scenes by day in ``folder``, and beside it their COCO file, whose ids have gaps; the path of that file."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(first, first + num_images):
        scene, ids, names = draw_scene(np.random.default_rng([7, number]), (128, 96))
        scene.save(folder / f"{number:03d}.png")
        images.append({"id": 5 * number + 3, "file_name": f"{number:03d}.png", "width": 128, "height": 96})
        for k, name in enumerate(names, 1):
            rle = encode(np.asfortranarray(ids == k, np.uint8))
            one = {"id": len(annotations) + 1, "image_id": images[-1]["id"], "category_id": 10 * CATEGORIES.index(name)}
            one |= {"bbox": toBbox(rle).tolist(), "area": int((ids == k).sum()), "iscrowd": 0}
            segmentation = {"segmentation": {"size": [96, 128], "counts": rle["counts"].decode()}}
            annotations.append(one | (segmentation if masks else {}))
    categories = [{"id": 10 * label, "name": name} for label, name in enumerate(CATEGORIES)][1:]
    path = folder.with_name(f"{folder.name}{first}.json")
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories, **more}))
    return path


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


def trained(killed: bool, *arguments: str) -> dict:
    """`python -m tutorial_lib.train`, and what its epochs saw and ended with."""
    found, original = {"image_ids": [], "weights": []}, engine.train_one_epoch

    def recorded(model, optimizer, loader, device, **options):
        batches = list(loader)
        found["image_ids"].append([[target["image_id"] for target in targets] for _, targets in batches])
        losses = original(model, optimizer, batches, device, **options)
        found["weights"].append([parameter.double().sum().item() for parameter in model.parameters()])
        if killed and len(found["weights"]) == 2 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return losses

    engine.train_one_epoch = recorded
    sys.argv[1:] = arguments
    runpy.run_module("tutorial_lib.train", run_name="__main__")
    return found


if __name__ == "__main__":
    job, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if job == "evaluate":
        dist.init_process_group("gloo")
        found = [evaluated(sys.argv[3], num_images, in_parts=True) for num_images in (12, 5)]
        dist.destroy_process_group()
    else:
        found = trained(job == "killed", *sys.argv[3:])
    (out / f"process{os.environ['RANK']}.json").write_text(json.dumps(found))
