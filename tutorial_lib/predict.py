"""Run a saved detector on a folder of images, and write what it detects: COCO results, a table and pictures.

    python -m tutorial_lib.predict runs/first/best.pt --images folder --out predictions

The checkpoint is one of :mod:`tutorial_lib.train` or of notebook 05. The exit code is 1 if an image could not be read.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from pycocotools.mask import encode
from torch import nn
from torchvision.models import get_model
from tqdm import tqdm

import tutorial_lib.presets  # noqa: F401  (through it torchvision knows the mini models)
from tutorial_lib.checkpoint import load_checkpoint
from tutorial_lib.coco import CocoDataset
from tutorial_lib.data import IMAGE_SUFFIXES, read_image
from tutorial_lib.engine import pick_device, predict
from tutorial_lib.visualization import show


def load_detector(path: str | Path, device=None) -> tuple[nn.Module, list[str]]:
    """The detector of a checkpoint, in evaluation mode, and its categories, ``"__background__"`` first.

    Args:
        path: of :func:`tutorial_lib.checkpoint.save_checkpoint`, with ``model``, ``name`` (of one of torchvision's
            models or a mini model), ``categories``, ``min_size`` and ``max_size``.
        device: :func:`tutorial_lib.engine.pick_device` unless given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, lacks one of these, or is of another model than its ``name`` says.

    Source: notebook 05.
    """
    saved = load_checkpoint(path)
    if missing := [key for key in ("model", "name", "categories", "min_size", "max_size") if key not in saved]:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which tutorial_lib.train and notebook 05 save")
    name, more = saved["name"], {"min_size": saved["min_size"], "max_size": saved["max_size"]}
    try:
        model = get_model(name, weights=None, weights_backbone=None, num_classes=len(saved["categories"]), **more)
        model.load_state_dict(saved["model"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not hold the model that it names, {name}: {error}") from error
    if name.endswith("rcnn_resnet50_fpn") and "backbone.body.bn1.num_batches_tracked" not in saved["model"]:
        for module in model.modules():  # it began as torchvision's weights: frozen BatchNorm with an eps of 0
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    return model.to(device or pick_device()).eval(), saved["categories"]


def predict_folder(
    model, categories, images, out, *, score_threshold=0.5, device=None, annotations=None, pictures=True, progress=True
) -> list[dict]:
    """Predict the images of a folder, and of the folders in it, one by one.

    Writes ``out/pictures/FILE_NAME.jpg`` on the way; at the end ``out/predictions.csv`` (a row for each detection: file
    name, category, score and x1, y1, x2, y2 in pixels) and ``out/predictions.json`` (what is returned).

    Args:
        model, categories: as :func:`load_detector` gives them.
        images, out: folders; ``out`` is made if need be.
        score_threshold: in [0, 1]; detections with a lower score are left out.
        device: the model's; :func:`tutorial_lib.engine.pick_device` unless given.
        annotations: a COCO file. Its images are predicted, and they and the categories (by name) have its ids. Without
            it, images are numbered from 1 in the order of their names, and a category's id is its label.
        pictures: whether to write them.
        progress: show a bar.

    Returns:
        COCO results, a dict for each detection: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels
        of the image, turned as its EXIF note or the annotations say), ``score``, ``file_name`` (relative to ``images``,
        with "/"), and from Mask R-CNN ``segmentation`` (compressed RLE).

    Raises:
        FileExistsError: ``out`` holds predictions already.
        ValueError: there are no images, or the annotations lack a category of the model. Or images cannot be read:
            raised at the end, when all others are predicted and written; the message names the files.

    Source: notebook 05.
    """
    images, out, device = Path(images), Path(out), device or pick_device()
    if (out / "predictions.json").exists():
        raise FileExistsError(f"{out / 'predictions.json'} is of an earlier run; choose another folder")
    if annotations:
        coco = CocoDataset(images, annotations, masks=False)
        names, category_ids = coco.file_names, dict(zip(coco.categories, coco.category_ids, strict=True))
    else:
        files = sorted(path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file())
        names = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
        category_ids = {category: label for label, category in enumerate(categories)}
        if others := sorted(set(files) - set(names)):
            warnings.warn(f"{len(others)} file(s) are no images: {', '.join(others[:20])}", stacklevel=2)
    if missing := sorted(set(categories) - set(category_ids)):
        raise ValueError(f"{annotations} lacks categories of the model: {', '.join(missing)}")
    if not names:
        raise ValueError(f"{images} is no folder with images")
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    results, rows, unreadable = [], [("file_name", "category", "score", "x1", "y1", "x2", "y2")], []
    for number, name in enumerate(tqdm(names, file=sys.stdout, leave=False, disable=not progress)):
        image_id = coco.get_target(number)["image_id"] if annotations else number + 1
        try:  # the dataset turns an image as its boxes are
            image = (coco[number][0] if annotations else read_image(images / name, "RGB")) / 255
        except (OSError, ValueError) as error:
            unreadable.append(str(error))
            continue
        (found,) = predict(model, [image], device, score_threshold)
        for i, (x1, y1, x2, y2) in enumerate(found["boxes"].tolist()):
            category, score = categories[found["labels"][i]], found["scores"][i].item()
            rows.append((name, category, round(score, 4), *(round(edge, 2) for edge in (x1, y1, x2, y2))))
            result = {"image_id": image_id, "category_id": category_ids[category], "score": score}
            results.append(result | {"bbox": [x1, y1, x2 - x1, y2 - y1], "file_name": name})
            if "masks" in found:
                rle = encode(np.asfortranarray(found["masks"][i, 0] > 0.5, np.uint8))
                results[-1]["segmentation"] = rle | {"counts": rle["counts"].decode()}
        if pictures:
            picture = out / "pictures" / f"{name}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            figure = show([image], [found], [name], categories=categories, cell=(8, 6))
            figure.savefig(picture)
            plt.close(figure)
    with (out / "predictions.csv.tmp").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    (out / "predictions.json.tmp").write_text(json.dumps(results), encoding="utf-8")
    for name in ("predictions.csv", "predictions.json"):
        (out / f"{name}.tmp").replace(out / name)
    if unreadable:
        raise ValueError(f"{out} lacks {len(unreadable)} image(s): {'; '.join(unreadable)}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run")
    parser.add_argument("--images", required=True, help="a folder; the folders in it are read, too")
    parser.add_argument("--out", required=True, help="a folder, made if need be")
    parser.add_argument("--annotations", help="a COCO file, whose ids images and categories then have")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="from 0 to 1 (default 0.5)")
    parser.add_argument("--device", help="cuda, cpu …; else TUTORIAL_DEVICE; else a GPU where there is one")
    parser.add_argument("--no-pictures", action="store_false", dest="pictures")
    options = vars(parser.parse_args())
    if not 0 <= options["score_threshold"] <= 1:
        parser.error(f"--score-threshold {options['score_threshold']} must be from 0 to 1")
    try:
        model, categories = load_detector(options.pop("checkpoint"), options["device"])
        predict_folder(model, categories, **options)
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
