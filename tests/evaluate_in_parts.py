"""Run by test_train.py under torch.distributed.run: every process evaluates its part, the first writes what all got.

python -m torch.distributed.run --nproc-per-node 2 tests/evaluate_in_parts.py DATA_FOLDER NUM_IMAGES OUT_FILE
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from tutorial_lib.engine import evaluate
from tutorial_lib.penn_fudan import PennFudanDataset, collate_fn
from tutorial_lib.transforms import get_transform


class Remembered(nn.Module):
    """Predictions that depend on the image alone: some good, some poor, with equal scores among them."""

    def forward(self, images):
        predictions = []
        for image in images:
            height, width = image.shape[-2:]
            generator = torch.Generator().manual_seed(int(image.sum().item() * 1000) % 2**31)
            count = 30
            corner = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.8, height * 0.4])
            size = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.2, height * 0.6]) + 4
            opposite = torch.minimum(corner + size, torch.tensor([width, height]))
            boxes = torch.cat([corner, opposite], dim=1).float()
            masks = torch.zeros(count, 1, height, width)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
                mask[0, y1:y2, x1:x2] = 1
            scores = torch.randint(0, 10, (count,), generator=generator) / 10
            labels = torch.ones(count, dtype=torch.int64)
            predictions.append({"boxes": boxes, "labels": labels, "scores": scores, "masks": masks})
        return predictions


if __name__ == "__main__":
    data, num_images, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dataset = Subset(PennFudanDataset(data, get_transform(train=False)), range(num_images))
    sampler = DistributedSampler(dataset, shuffle=False)
    loader = DataLoader(dataset, 2, sampler=sampler, collate_fn=collate_fn)
    results = evaluate(Remembered(), loader, torch.device("cpu"), progress=False)
    mine = {"num_images": results.num_images}
    for kind in ("box", "mask"):
        metrics = getattr(results, kind)
        mine[kind] = {name: getattr(metrics, name) for name in ("AP", "AP50", "AP75", "AR", "AR1")}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(everyone))
    dist.destroy_process_group()
