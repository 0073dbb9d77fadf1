"""Notebook 04's run as a script, in one process or in several of PyTorch's own launcher, on one machine.

It differs in the order of the images: those of a batch have similar shapes, where an epoch has more batches than
``--num-windows``.

    python -m tutorial_lib.train --out runs/first
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tutorial_lib.train --out runs/second

Each process takes its own images, and the gradients are averaged, so two processes make half as many steps, of twice
the batch size, unless ``--batch-size`` halves it; the learning rate is not changed for it. (On Windows, set
``USE_LIBUV=0`` first.) The epoch is chosen on the validation images, and the test images are read once, at the end.
The folder then holds ``best.pt`` (:func:`tutorial_lib.checkpoint.load_checkpoint`) and ``results.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.models import get_model

from tutorial_lib.checkpoint import load_checkpoint, save_checkpoint
from tutorial_lib.data import AspectRatioBatchSampler, collate_fn, split_dataset
from tutorial_lib.engine import evaluate, pick_device, train_one_epoch, use_bfloat16, warmup_cosine
from tutorial_lib.models import replace_predictors
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.presets import PRESETS, Preset, choose_preset, fetch_weights, prepare_data, provenance
from tutorial_lib.transforms import get_transform


def train(
    preset: Preset,
    out: Path,
    epochs: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    num_windows: int = 5,
) -> dict:
    """Finetune the preset's Mask R-CNN on people; where there is a process group, call it in each process.

    Args:
        out: the folder for ``best.pt``, which the first process writes and all read; made if need be.
        learning_rate: the highest of the schedule.
        num_windows: of :class:`tutorial_lib.data.AspectRatioBatchSampler`.

    Returns:
        The best epoch, its AP on validation and the results on the test images, the same in every process; and the
        seconds of training, this process's own.

    Raises:
        FileExistsError: the folder holds a run already, or ``out`` is a file.
        FloatingPointError, ValueError, RuntimeError, OSError: as the functions of ``engine`` and ``presets`` that
            it calls.

    Source: notebooks 04 and 10.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("best.pt", "results.json"):
            if (out / name).exists():
                raise FileExistsError(f"{out / name} is of an earlier run; give --out another folder")
    if rank:  # the first process downloads, the others find it there
        dist.barrier()
    root = prepare_data(preset)
    fetch_weights(preset.mask_rcnn, preset.weights)
    if world > 1 and rank == 0:
        dist.barrier()

    augmented = PennFudanDataset(root, get_transform(train=True), in_memory=True)
    plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
    train_set = split_dataset(augmented, preset.split, seed=0, block=10)[0]
    ratios = [width / height for height, width in map(augmented.get_height_and_width, train_set.indices)]
    order = torch.Generator().manual_seed(seed)  # the same in every process
    batches = AspectRatioBatchSampler(
        ratios, preset.batch_size, num_windows, num_replicas=world, rank=rank, generator=order
    )
    options = {"collate_fn": collate_fn, "pin_memory": device.type == "cuda"}
    train_loader = DataLoader(train_set, batch_sampler=batches, **options)
    val_loader, test_loader = (
        DataLoader(part, preset.batch_size, sampler=DistributedSampler(part, world, rank, shuffle=False), **options)
        for part in split_dataset(plain, preset.split, seed=0, block=10)[1:]
    )

    torch.manual_seed(seed)
    model = get_model(preset.mask_rcnn, weights=preset.weights, min_size=preset.min_size, max_size=preset.max_size)
    model = replace_predictors(model, 2).to(device)
    use_bfloat16(model, device)
    torch.manual_seed(seed + rank)  # from here on each process draws its own augmentation and proposals
    wrapped = DistributedDataParallel(model) if world > 1 else model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    steps = len(train_loader)
    schedule = warmup_cosine(optimizer, steps, epochs * steps)
    best, seconds = {"epoch": 0, "validation_mask_AP": -1.0}, 0.0
    for epoch in range(1, epochs + 1):
        begun = time.perf_counter()
        losses = train_one_epoch(wrapped, optimizer, train_loader, device, lr_scheduler=schedule, progress=rank == 0)
        seconds += time.perf_counter() - begun
        if world > 1:  # DDP copies the first process's BatchNorm statistics before a step, but not after the last
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        mask_ap = evaluate(model, val_loader, device, progress=False).mask.AP
        if mask_ap > best["validation_mask_AP"]:
            best = {"epoch": epoch, "validation_mask_AP": mask_ap}
            if rank == 0:
                save_checkpoint(out / "best.pt", model=model, epoch=epoch, preset=preset.name)
        if rank == 0:
            print(
                f"epoch {epoch}/{epochs}  loss here {losses['loss']:.3f}  validation mask AP {mask_ap:.3f}", flush=True
            )
    if world > 1:
        dist.barrier()
    model.load_state_dict(load_checkpoint(out / "best.pt")["model"])
    test = evaluate(model, test_loader, device, progress=False)
    return {
        **best,
        "box_AP": test.box.AP,
        "mask_AP": test.mask.AP,
        "num_test_images": test.num_images,
        "training_seconds": round(seconds, 1),
    }


def a_device(text: str) -> torch.device:
    """For argparse, which tells the user of a ValueError alone."""
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise ValueError from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder, made if need be")
    parser.add_argument("--preset", choices=PRESETS, help="else TUTORIAL_PRESET; else full on CUDA, quick elsewhere")
    parser.add_argument("--epochs", type=int, help="else the preset's long_epochs")
    parser.add_argument("--batch-size", type=int, help="of each process; else the preset's")
    parser.add_argument("--learning-rate", type=float, help="else the preset's")
    parser.add_argument("--num-windows", type=int, default=5, help="fewer: less padding; 1000: plain shuffling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", type=a_device, help="cuda, cpu …; else TUTORIAL_DEVICE; else a GPU where there is one"
    )
    arguments = parser.parse_args()
    for name in ("epochs", "batch_size", "num_windows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: at least one is needed")
    if arguments.learning_rate is not None and not 0 < arguments.learning_rate < math.inf:
        parser.error(f"--learning-rate {arguments.learning_rate} must be over 0")
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = arguments.device or pick_device()
    if device.type == "cuda":
        if world > torch.cuda.device_count():
            parser.error(f"{torch.cuda.device_count()} GPU(s) for {world} process(es); --device cpu goes without")
        if world > 1 or device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif world > 1:
        device = torch.device("cpu")  # gloo has no MPS
    preset = choose_preset(arguments.preset, device)
    preset = replace(preset, batch_size=arguments.batch_size or preset.batch_size)
    if world * preset.batch_size > preset.split[0]:
        whole = f"{world} process(es) with batches of {preset.batch_size}"
        parser.error(f"{preset.split[0]} training images are too few for {whole}: lower --batch-size")
    if world > 1:  # an hour for the first process's downloads
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    epochs = arguments.epochs or preset.long_epochs
    learning_rate = preset.learning_rate if arguments.learning_rate is None else arguments.learning_rate
    results = train(preset, arguments.out, epochs, learning_rate, arguments.seed, device, arguments.num_windows)
    if int(os.environ.get("RANK", 0)) == 0:
        how = f"{world} process(es), {epochs} epochs, seed {arguments.seed}, batches of {preset.batch_size} each"
        how = f"{how}, {arguments.num_windows} windows, learning rate {learning_rate:g}"
        made_by = f"{provenance(preset, device)} | {how}"
        (arguments.out / "results.json").write_text(json.dumps({**results, "made_by": made_by}, indent=1) + "\n")
        print(results)
    if world > 1:
        dist.destroy_process_group()
