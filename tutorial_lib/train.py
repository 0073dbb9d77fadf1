"""Train a detector on your own images, or on the preset's as notebook 04 does, in one process or in several.

    python -m tutorial_lib.train --images folder --annotations coco.json --epochs 20 --out runs/first
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tutorial_lib.train --out runs/second

Three COCO files are for training, validation and the test. One file is split into 70, 15 and 15 % of its images, the
same ones for every ``--seed``; blocks of up to 10 neighbours stay together, so that hardly any near-duplicates get into
two parts. :mod:`tutorial_lib.convert` makes COCO files of other formats. Crowds are left out in training.

Each process takes its own images, and the gradients are averaged, so two processes make half as many steps, of twice
the batch size, unless ``--batch-size`` halves it; the learning rate is not changed for it. (On Windows, set
``USE_LIBUV=0`` first.) The images of a batch have similar shapes, where an epoch has more batches than
``--num-windows``. The epoch is chosen on the validation images, by mask AP where there are masks, else by box AP. The
test images are read once, at the end.

The folder then holds ``best.pt`` (:func:`tutorial_lib.predict.load_detector`), ``last.pt`` for ``--resume`` (the same
command with it goes on after the last whole epoch, as if it had never stopped), ``log.csv`` with a row an epoch (losses
are the first process's; the learning rate is the one at the end of it), and ``results.json`` with a table by class.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.transforms import v2

from tutorial_lib.checkpoint import load_checkpoint, resume, save_checkpoint
from tutorial_lib.checks import check_dataset
from tutorial_lib.coco import CocoDataset
from tutorial_lib.coco_eval import class_table
from tutorial_lib.data import AspectRatioBatchSampler, collate_fn, split_dataset
from tutorial_lib.engine import evaluate, pick_device, train_one_epoch, use_bfloat16, warmup_cosine
from tutorial_lib.models import replace_predictors
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.predict import load_detector
from tutorial_lib.presets import PRESETS, Preset, choose_preset, fetch_weights, prepare_data, provenance
from tutorial_lib.transforms import get_transform


def read_data(preset: Preset, images, files: list[Path], masks=None, left_out=()) -> tuple[list[Subset], list[str]]:
    """The images for training, validation and the test, and the categories, ``"__background__"`` first.

    Args:
        preset: its dataset is read where there are no files.
        images: the folder that the files are about.
        files: one COCO file, three, or none.
        masks: of :class:`tutorial_lib.coco.CocoDataset`; None takes them where the first file has any.
        left_out: classes of ``torchvision.transforms.v2`` that the training images go without.

    Raises:
        ValueError: a file has other categories than the first, or too few images to split; the message names it.
        OSError, RuntimeError, ValueError: as ``CocoDataset`` and :func:`tutorial_lib.presets.prepare_data`.
    """
    transforms, wholes = [get_transform(train) for train in (True, False, False)], []
    transforms[0].transforms = [step for step in transforms[0].transforms if not isinstance(step, left_out)]
    sizes, block, categories = preset.split, 10, ["__background__", "person"]
    for transform, file in zip(transforms, files if len(files) == 3 else [*files] * 3, strict=False):
        with warnings.catch_warnings():
            if len(files) == 3:
                warnings.filterwarnings("ignore", ".* are not listed")  # the other two files list most of them
            wholes.append(whole := CocoDataset(images, file, transform, masks=masks, crowds=bool(wholes)))
        masks, categories, held_out = whole.masks, wholes[0].categories, round(0.15 * len(whole))
        sizes, block = (len(whole) - 2 * held_out, held_out, held_out), min(10, held_out) or 1
        if whole.categories != categories:
            raise ValueError(f"{file} has the categories {whole.categories[1:]}, but {files[0]} has {categories[1:]}")
        if len(whole) < (1 if len(files) == 3 else 4):
            raise ValueError(f"{file} lists {len(whole)} image(s), too few")
    if len(files) == 3:
        if nowhere := sorted(set.intersection(*(set(whole.not_listed) for whole in wholes))):
            warnings.warn(f"{len(nowhere)} images of {images} are in no file: {str(nowhere[:5])[1:-1]}", stacklevel=2)
        return [Subset(whole, range(len(whole))) for whole in wholes], categories
    if not files:
        root = prepare_data(preset)
        wholes = [PennFudanDataset(root, transform, in_memory=True) for transform in transforms]
    return [split_dataset(whole, sizes, seed=0, block=block)[i] for i, whole in enumerate(wholes)], categories


def text(value: str | float | None) -> str:
    """Of a number, four digits."""
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def train(parts: list[Subset], categories: list[str], settings: dict, out: Path, device, resuming=False) -> dict:
    """Finetune a detector and test it; where there is a process group, call it in each process.

    Args:
        parts: training, validation and test images, each a ``Subset`` of a dataset with ``get_height_and_width``.
        categories: ``"__background__"`` first.
        settings: ``model`` and ``weights`` (of torchvision's ``get_model``), ``min_size``, ``max_size``, ``epochs``,
            ``batch_size`` (of each process), ``learning_rate`` (the highest of the schedule), ``num_windows`` (of
            :class:`tutorial_lib.data.AspectRatioBatchSampler`), ``seed`` and ``workers`` (of each loader).
        out: a folder; the first process writes ``best.pt``, ``last.pt`` and ``log.csv``, and all read them.
        device: a ``torch.device``.
        resuming: go on from ``last.pt``.

    Returns:
        The best epoch, its AP on validation, and the results on the test images, the same in every process; and the
        seconds of training, this process's own.

    Raises:
        ValueError: the run in ``last.pt`` has other settings; the message says which. Or there are too few images.
        FloatingPointError, ValueError, RuntimeError, OSError: as the functions of ``engine`` that it calls.

    Source: notebooks 04, 05 and 10.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    was = load_checkpoint(out / "last.pt")["settings"] if resuming else settings
    changed = [f"{name} was {was.get(name)}, is {now}" for name, now in settings.items() if was.get(name) != now]
    if changed:
        raise ValueError(f"{out / 'last.pt'} cannot go on with other settings ({'; '.join(changed)}): take a new --out")
    batch_size, epochs = settings["batch_size"], settings["epochs"]
    ratios = [width / height for height, width in map(parts[0].dataset.get_height_and_width, parts[0].indices)]
    windows, order = settings["num_windows"], torch.Generator()  # of the same seed in every process
    batches = AspectRatioBatchSampler(ratios, batch_size, windows, num_replicas=world, rank=rank, generator=order)
    options = {"collate_fn": collate_fn, "pin_memory": device.type == "cuda", "num_workers": settings["workers"]}
    train_loader = DataLoader(parts[0], batch_sampler=batches, **options)
    samplers = [DistributedSampler(part, world, rank, shuffle=False) for part in parts]
    val_loader, test_loader = (DataLoader(parts[i], batch_size, sampler=samplers[i], **options) for i in (1, 2))
    torch.manual_seed(settings["seed"])
    sizes = {name: settings[name] for name in ("min_size", "max_size")}
    model = get_model(settings["model"], weights=settings["weights"], weights_backbone=None, **sizes)
    model = replace_predictors(model, len(categories)).to(device)
    use_bfloat16(model, device)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.01, fused=True)
    schedule = warmup_cosine(optimizer, len(train_loader), epochs * len(train_loader))
    detector = {"model": model, "name": settings["model"], "categories": categories, **sizes}
    state, history = {"optimizer": optimizer, "lr_scheduler": schedule}, []
    if resuming:
        history = resume(out / "last.pt", model=model, **state)["history"]
    elif rank == 0:  # so that a run that ends in its first epoch can go on, too
        save_checkpoint(out / "last.pt", **detector, **state, settings=settings, epoch=0, history=history)
    chosen_by = "validation_mask_AP" if model.roi_heads.has_mask() else "validation_box_AP"
    for epoch in range(len(history) + 1, epochs + 1):
        # What is random in an epoch follows from its number, so no state of a generator has to be kept.
        seed = 10**6 * settings["seed"] + 1000 * epoch
        order.manual_seed(seed)
        torch.manual_seed(seed + 1 + rank)  # each process draws its own augmentation and proposals
        begun = time.perf_counter()
        losses = train_one_epoch(wrapped, optimizer, train_loader, device, lr_scheduler=schedule, progress=rank == 0)
        row = {"epoch": epoch, **losses, "learning_rate": schedule.get_last_lr()[0]}
        row["seconds"] = time.perf_counter() - begun
        if world > 1:  # DDP copies the first process's BatchNorm statistics before a step, but not after the last
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        found = evaluate(model, val_loader, device, progress=False)
        row |= {"validation_box_AP": found.box.AP, "validation_mask_AP": found.mask and found.mask.AP}
        history.append(row)
        if rank == 0:
            if row is max(history, key=lambda row: (row[chosen_by] or 0.0, row["epoch"])):
                save_checkpoint(out / "best.pt", **detector, epoch=epoch)
            lines = [",".join(map(text, line)) + "\n" for line in [row, *(row.values() for row in history)]]
            (out / "log.csv.tmp").write_text("".join(lines))
            (out / "log.csv.tmp").replace(out / "log.csv")
            save_checkpoint(out / "last.pt", **detector, **state, settings=settings, epoch=epoch, history=history)
            print(f"epoch {epoch}/{epochs}  loss {text(row['loss'])}  {chosen_by} {text(row[chosen_by])}", flush=True)
    if world > 1:
        dist.barrier()
    best = load_checkpoint(out / "best.pt")
    model.load_state_dict(best["model"])
    test = evaluate(model, test_loader, device, progress=False)
    return {
        "epoch": best["epoch"], chosen_by: history[best["epoch"] - 1][chosen_by],
        "box_AP": test.box.AP, "mask_AP": test.mask and test.mask.AP, "num_test_images": test.num_images,
        "training_seconds": round(sum(row["seconds"] for row in history), 1),
        "classes": class_table(test.mask or test.box, categories),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a folder, made if need be")
    add("--images", type=Path, help="the folder of your images; without it, the preset's dataset")
    add("--annotations", type=Path, nargs="+", default=[], help="a COCO file, or three: training, validation, test")
    add("--preset", choices=PRESETS, help="else TUTORIAL_PRESET; else full on CUDA, quick elsewhere")
    detectors = [name for name in list_models() if name.startswith(("fasterrcnn_", "maskrcnn_"))]
    add("--model", choices=detectors, help="else the preset's Mask R-CNN where there are masks, else its Faster R-CNN")
    add("--weights", help="a name of the model's weights to start from, or none; else the preset's")
    add("--min-size", type=int, nargs="+", help="of the shorter side; of several a random one in training")
    add("--max-size", type=int, help="of the longer side, in pixels")
    add("--epochs", type=int, help="else the preset's long_epochs")
    add("--batch-size", type=int, help="of each process; else the preset's")
    add("--learning-rate", type=float, help="else the preset's")
    add("--num-windows", type=int, default=5, help="fewer: less padding; 1000: plain shuffling (default 5)")
    add("--seed", type=int, default=0)
    add("--no-flip", action="store_false", dest="flip", help="where left and right matter")
    add("--no-colour", action="store_false", dest="colour", help="where the colour tells the classes apart")
    add("--workers", type=int, default=0, help="more processes, which read the images")
    add("--device", choices=("cuda", "mps", "cpu"), help="else TUTORIAL_DEVICE; else a GPU where there is one")
    add("--resume", action="store_true", help="go on with the run in --out; the rest of the command as before")
    add("--export", action="store_true", help="write model.onnx at the end")
    given = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(given.device) if given.device else pick_device()
    if device.type == "cuda":
        if world > torch.cuda.device_count():
            parser.error(f"{torch.cuda.device_count()} GPU(s) for {world} process(es); --device cpu goes without")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif world > 1:
        device = torch.device("cpu")  # gloo has no MPS
    preset = choose_preset(given.preset, device)
    names = ("weights", "min_size", "max_size", "batch_size", "learning_rate")
    parser.set_defaults(epochs=preset.long_epochs, **{name: getattr(preset, name) for name in names})
    given = parser.parse_args()
    settings = {
        name: getattr(given, name) for name in (*names, "epochs", "num_windows", "seed", "workers", "flip", "colour")
    }
    images, files, out, shorter, longer = given.images, given.annotations, given.out, given.min_size, given.max_size
    run = [name for name in ("last.pt", "best.pt", "results.json") if (out / name).exists()]
    whole = f"{world} process(es) with batches of {given.batch_size}"
    too_many, in_order = world * given.batch_size > preset.split[0], 0 < min(shorter) <= max(shorter) <= longer
    complete = (images is None, len(files)) in [(True, 0), (False, 1), (False, 3)]
    refused = {
        "--images and --annotations belong together, and there must be one annotation file or three": not complete,
        f"--learning-rate {given.learning_rate} must be over 0": not 0 < given.learning_rate < float("inf"),
        f"--min-size {shorter} must be over 0, and at most --max-size, {longer}": not in_order,
        f"--resume: there is no {out / 'last.pt'}": given.resume and "last.pt" not in run,
        f"{run} in {out} are of an earlier run; give --out another folder, or --resume": run and not given.resume,
        f"{preset.split[0]} training images are too few for {whole}; lower --batch-size": too_many and not files,
    }
    refused |= {f"{path}: no such file or folder": not path.exists() for path in [images, *files] if path}
    for name, least in {"epochs": 1, "batch_size": 1, "num_windows": 1, "seed": 0, "workers": 0}.items():
        refused[f"--{name.replace('_', '-')} {settings[name]}: at least {least} is needed"] = settings[name] < least
    for name in ("onnx", "onnxruntime"):
        refused[f"--export needs {name}: pip install 'tutorial-lib[export]'"] = given.export and not find_spec(name)
    for name in [given.model] if given.model else [preset.faster_rcnn, preset.mask_rcnn]:
        known = [*get_model_weights(name).__members__, "none"]
        refused[f"--weights {given.weights}: {name} has {', '.join(known)}"] = given.weights not in known
    if wrong := [message for message, is_so in refused.items() if is_so]:
        parser.error("; ".join(wrong))
    if world > 1:  # an hour for the first process's downloads and checks
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    if rank:  # what the first process downloads, the others find
        dist.barrier()
    out.mkdir(parents=True, exist_ok=True)
    left_out = (v2.RandomHorizontalFlip,) * (not given.flip) + (v2.RandomPhotometricDistort,) * (not given.colour)
    parts, categories = read_data(preset, images, files, given.model and given.model.startswith("mask"), left_out)
    model = given.model or (preset.mask_rcnn if "masks" in parts[0][0][1] else preset.faster_rcnn)
    weights = None if given.weights == "none" else given.weights
    settings |= {"model": model, "weights": weights, "min_size": tuple(shorter), "processes": world}
    settings |= {"images": str(images.resolve()) if images else preset.data}
    settings |= {"annotations": [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" for file in files]}
    fetch_weights(model, weights)
    if files and rank == 0 and not given.resume:
        for name, part, other in zip(("training", "validation", "test"), parts, parts[1:] + parts[:1], strict=True):
            print(f"{name}: {check_dataset(part, len(categories), other).raise_for_errors()}\n")
    if world > 1 and rank == 0:
        dist.barrier()
    results = train(parts, categories, settings, out, device, given.resume)
    if rank == 0:
        preset = replace(preset, data=str(images or preset.data), split=tuple(map(len, parts)), mask_rcnn=model)
        made_by = {"settings": settings, "made_by": provenance(preset, device, None if weights else "random weights")}
        (out / "results.json").write_text(json.dumps(results | made_by, indent=1) + "\n", encoding="utf-8")
        classes = results.pop("classes")
        for row in [classes[0], *(row.values() for row in classes)]:
            print(*(f"{text(value):>12}" for value in row))
        print(results)
        if given.export:
            from tutorial_lib.export import export_onnx

            examples = [parts[2][i][0] for i in range(min(3, len(parts[2])))]
            try:
                print(export_onnx(load_detector(out / "best.pt", "cpu")[0], out / "model.onnx", examples, categories))
            except ValueError as error:
                parser.exit(1, f"the run is complete, but for --export: {error}\n")
    if world > 1:
        dist.destroy_process_group()
