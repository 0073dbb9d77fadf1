"""Run by test_train.py under torch.distributed.run: every process evaluates its part, the first writes what all got.

python -m torch.distributed.run --nproc-per-node 2 tests/evaluate_in_parts.py DATA_FOLDER NUM_IMAGES OUT_FILE
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Subset

from tutorial_lib.engine import evaluate
from tutorial_lib.models import maskrcnn_mini_fpn
from tutorial_lib.penn_fudan import PennFudanDataset, collate_fn
from tutorial_lib.transforms import get_transform


def starter() -> nn.Module:
    """Its predictions for an image are the same in every process, since images come one by one."""
    return maskrcnn_mini_fpn(weights="DEFAULT")


if __name__ == "__main__":
    data, num_images, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dataset = Subset(PennFudanDataset(data, get_transform(train=False)), range(num_images))
    sampler = DistributedSampler(dataset, shuffle=False)
    how = {"batch_sampler": BatchSampler(sampler, 1, drop_last=False)} if num_images == 5 else {"sampler": sampler}
    loader = DataLoader(dataset, **how, collate_fn=collate_fn)
    results = evaluate(starter(), loader, torch.device("cpu"), progress=False)
    mine = {"num_images": results.num_images}
    for kind in ("box", "mask"):
        metrics = getattr(results, kind)
        mine[kind] = {name: getattr(metrics, name) for name in ("AP", "AP50", "AP75", "AR", "AR1")}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(everyone))
    dist.destroy_process_group()
