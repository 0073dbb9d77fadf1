"""Train the mini models' starter weights on drawn scenes.

    python -m tutorial_lib.weights.pretrain --steps 4000 --out runs/starter

Scene i is drawn from (seed, i), so a run is known by its arguments. It writes
``checkpoint.pt`` every 200 steps, goes on from it when it is called again with the
same folder, and ends with ``mini_fpn.pt`` (half precision) and ``metrics.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from tutorial_lib.models import maskrcnn_mini_fpn
from tutorial_lib.sample import CATEGORIES, draw_scene

HELD_OUT = 1_000_000_000  # held-out scenes are numbered from here


class DrawnScenes(Dataset):
    """Scenes ``start`` to ``start + length`` of a seed, with all the categories labelled."""

    def __init__(self, seed: int, start: int, length: int, train: bool):
        self.seed, self.start, self.length = seed, start, length
        augment = [v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort(p=0.7)] if train else []
        self.transforms = v2.Compose([*augment, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        number = self.start + index
        rng = np.random.default_rng([self.seed, number])
        size = (int(rng.integers(200, 320)), int(rng.integers(176, 256)))
        labels: list[str] = []
        while not labels:
            image, ids, labels = draw_scene(rng, size, people=(0, 6), others=(0, 5))
        masks = torch.from_numpy(ids)[None] == torch.arange(1, len(labels) + 1)[:, None, None]
        boxes = torch.zeros(len(labels), 4)
        for i, mask in enumerate(masks):
            y, x = mask.nonzero(as_tuple=True)
            boxes[i] = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=masks.shape[-2:]),
            "labels": torch.tensor([CATEGORIES.index(name) for name in labels]),
            "masks": tv_tensors.Mask(masks.to(torch.uint8)),
            "image_id": number,
            "area": masks.flatten(1).sum(1).float(),
            "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
        }
        return self.transforms(tv_tensors.Image(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)), target)


def _collate(batch):
    return tuple(zip(*batch, strict=True))


def pretrain(out: Path, steps: int, batch_size: int, learning_rate: float, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    model = maskrcnn_mini_fpn(num_classes=len(CATEGORIES), min_size=(160, 192, 224, 256)).to(device)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    start = 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
        print(f"going on from step {start}")
    scenes = DrawnScenes(seed, start * batch_size, (steps - start) * batch_size, train=True)
    loader = DataLoader(scenes, batch_size, num_workers=1, collate_fn=_collate, prefetch_factor=4)
    model.train()
    begun, losses = time.perf_counter(), []
    for step, (images, targets) in enumerate(loader, start=start + 1):
        images = [image.to(device) for image in images]
        targets = [{k: v.to(device) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % 100 == 0:
            rate = (step - start) / (time.perf_counter() - begun)
            mean = torch.stack(losses).mean().item()
            losses.clear()
            if not np.isfinite(mean):
                raise FloatingPointError(f"the loss is not finite at step {step}")
            print(f"step {step}/{steps}  loss {mean:.3f}  {rate:.2f} steps/s", flush=True)
        if step % 200 == 0 or step == steps:
            state = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(), "step": step,
            }  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({k: v.cpu().contiguous() for k, v in half.items()}, out / "mini_fpn.pt")
    recipe = {
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "device": str(device), "torch": torch.__version__,
    }  # fmt: skip
    (out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/starter"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = vars(parser.parse_args())
    pretrain(**arguments)
