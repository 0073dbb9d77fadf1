"""Run by test_train.py under torch.distributed.run: what every process trained on, and the weights it ended with.

python -m torch.distributed.run --nproc-per-node 2 tests/train_in_parts.py OUT_FOLDER
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from tutorial_lib import train
from tutorial_lib.engine import train_one_epoch
from tutorial_lib.presets import PRESETS

if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mine = {"image_ids": [], "weights": []}

    def recorded(model, optimizer, loader, device, **options):
        batches = list(loader)
        mine["image_ids"].append([[target["image_id"] for target in targets] for _, targets in batches])
        losses = train_one_epoch(model, optimizer, batches, device, **options)
        mine["weights"].append([parameter.double().sum().item() for parameter in model.parameters()])
        return losses

    train.train_one_epoch = recorded
    preset = replace(PRESETS["quick"], batch_size=4, min_size=(96,), max_size=192)
    mine |= train.train(preset, out, epochs=2, learning_rate=1e-3, seed=0, device=torch.device("cpu"))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        (out / "everyone.json").write_text(json.dumps(everyone))
    dist.destroy_process_group()
