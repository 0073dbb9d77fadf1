"""Notebook 05 on other folders than its own: only the settings cell is changed, as a reader would do it."""

from __future__ import annotations

import json

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from tools.notebooks import SOURCES, read_source
from tutorial_lib.convert import to_voc, to_yolo

NUM_IMAGES, CATEGORIES = 24, ["disc", "block"]
CORNERS = ((20, 30, 60, 80), (90, 40, 140, 90))  # of the disc and of the block, XYXY


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def polygon(k: int) -> list[list[float]]:
    x1, y1, x2, y2 = CORNERS[k]
    if k:
        return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.stack([(x1 + x2) / 2 + 20 * np.cos(angles), (y1 + y2) / 2 + 25 * np.sin(angles)], axis=1)
    return points.round(2).tolist()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same pictures of a bright disc and a dark block, annotated in every format; one has no object."""
    root = tmp_path_factory.mktemp("own data")
    rng = np.random.default_rng(0)
    annotations, images, entries = [], [], {}
    for i in range(NUM_IMAGES):
        part = "train" if i < 16 else "val"
        pixels = rng.integers(90, 130, (120, 160, 3), np.uint8)
        classes = np.zeros((120, 160), np.uint8)
        for k, (x1, y1, x2, y2) in enumerate(CORNERS if i != 3 else ()):
            classes[y1:y2, x1:x2] = k + 1
            pixels[y1:y2, x1:x2] = (220, 200, 60) if k == 0 else (20, 30, 60)
        folders = {"flat": f"bild {i:02}.png", "parts": f"{part}/bild {i:02}.png", "labelme": f"bild {i:02}.png"}
        for folder, name in folders.items():
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / name)
        for kind, values in {"semantic": classes, "instances": (classes > 0) * np.uint8(7) + classes}.items():
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(np.where(classes > 0, values, 0).astype(np.uint8)).save(root / kind / f"bild {i:02}.png")
        for k in range(2 * (i != 3)):
            (root / "objects" / f"bild {i:02}").mkdir(parents=True, exist_ok=True)
            mask = Image.fromarray((classes == k + 1) * np.uint8(255))
            mask.save(root / "objects" / f"bild {i:02}" / f"{k}.png")
            flat = [number for point in polygon(k) for number in point]
            x1, y1, x2, y2 = CORNERS[k]
            annotations.append({
                "id": len(annotations) + 1, "image_id": i + 1, "category_id": k + 1, "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "segmentation": [flat],
            })  # fmt: skip
        images.append({"id": i + 1, "file_name": f"bild {i:02}.png", "width": 160, "height": 120})
        shapes = [{"label": c, "points": polygon(k), "shape_type": "polygon"} for k, c in enumerate(CATEGORIES)]
        shapes = shapes * (i != 3)
        about = {"shapes": shapes, "imagePath": f"bild {i:02}.png", "imageWidth": 160, "imageHeight": 120}
        (root / "labelme" / f"bild {i:02}.json").write_text(json.dumps(about))
        regions = [
            {
                "shape_attributes": {
                    "name": "polygon",
                    "all_points_x": [x for x, _ in polygon(k)],
                    "all_points_y": [y for _, y in polygon(k)],
                },
                "region_attributes": {"class": name},
            }
            for k, name in enumerate(CATEGORIES * (i != 3))
        ]
        entries[f"{i}"] = {"filename": f"bild {i:02}.png", "size": 1, "regions": regions}
    categories = [{"id": i, "name": name} for i, name in enumerate(CATEGORIES, 1)]
    coco = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (root / "coco.json").write_text(json.dumps(coco))
    (root / "via.json").write_text(json.dumps(entries))
    to_voc(coco, root / "voc", one_based=True)
    in_parts = [{**one, "file_name": f"{'train' if one['id'] < 17 else 'val'}/{one['file_name']}"} for one in images]
    to_yolo({**coco, "images": in_parts}, root / "yolo", segments=True)
    (root / "train.txt").write_text("\n".join(f"bild {i:02}" for i in range(14)))
    (root / "test.txt").write_text("\n".join(f"bild {i:02}.png" for i in range(14, 20)))
    return root


SETTINGS = {  # format: images, labels, what else is set
    "voc": ("flat", "voc", {"MODEL": "fasterrcnn_mini_fpn", "MASKS": None}),
    "yolo": ("parts", "yolo", {"SPLIT": {"train": "train", "val": "val"}}),
    "labelme": ("labelme", "labelme", {}),
    "via": ("flat", "via.json", {}),
    "instances": ("flat", "instances", {"CATEGORIES": ["thing"]}),
    "semantic": ("flat", "semantic", {}),
    "objects": ("flat", "objects", {"CATEGORIES": ["thing"]}),
    "coco": ("flat", "coco.json", {"SPLIT": {"train": "train.txt", "test": "test.txt"}}),
}


def run_cells(root, kind, until):
    """The notebook's names after its cells up to the one that holds ``until``."""
    images, labels, more = SETTINGS[kind]
    changed = {"ROOT": root, "FORMAT": kind, "IMAGES": root / images, "LABELS": root / labels, "EPOCHS": 6}
    changed |= {"CATEGORIES": CATEGORIES, "MIN_SIZE": (96,), "MAX_SIZE": 128, **more}
    if kind == "coco":
        changed["SPLIT"] = {part: root / file for part, file in changed["SPLIT"].items()}
    code = [cell.source for cell in read_source(SOURCES / "05_your_own_data.py").cells if cell.cell_type == "code"]
    (last,) = [number for number, source in enumerate(code) if until in source]
    names = {}
    for source in code[: last + 1]:
        exec(compile(source, f"cell of {kind}", "exec"), names)
        if "def group_of" in source:
            assert changed.keys() <= names.keys()
            names |= changed
    return names


@pytest.mark.filterwarnings("ignore:.*without annotations:UserWarning")
@pytest.mark.filterwarnings("ignore:.*without a label file:UserWarning")
@pytest.mark.filterwarnings("ignore:.*not listed:UserWarning")
@pytest.mark.parametrize("kind", SETTINGS)
def test_the_settings_are_enough_to_read_any_format(root, kind, monkeypatch):
    monkeypatch.setenv("TUTORIAL_DEVICE", "cpu")
    names = run_cells(root, kind, "assert val and test")
    one = kind in ("instances", "objects")
    assert names["categories"] == ["__background__", *(["thing"] if one else CATEGORIES)]
    dataset, parts = names["plain"], [names[part] for part in ("train", "val", "test")]
    assert len(dataset) >= NUM_IMAGES - 1 and sum(map(len, parts)) <= len(dataset) and all(parts)
    _, target = dataset[0]
    boxes = target["boxes"].round().int().tolist()
    assert boxes == [list(corners) for corners in CORNERS] and ("masks" in target) is (kind != "voc")
    assert target["labels"].tolist() == ([1, 1] if one else [1, 2])
    if kind == "yolo":
        assert all(dataset.file_names[i].startswith("val/") for i in parts[1]) and len(parts[1]) == 8
        assert all(dataset.file_names[i].startswith("train/") for part in (parts[0], parts[2]) for i in part)
    if kind == "coco":
        assert parts[2] == list(range(14, 20)) and set(parts[0] + parts[1]) == set(range(14))


def test_a_yolo_folder_becomes_a_saved_detector_and_an_onnx_file(root, monkeypatch):
    monkeypatch.setenv("TUTORIAL_DEVICE", "cpu")
    run = run_cells(root, "yolo", "export_onnx(best")["RUN"]
    again, before = (json.loads((run / name / "predictions.json").read_text()) for name in ("again", "predictions"))
    assert len(again) == len(before) > 0 and {"best.pt", "model.onnx", "model_run.py"} <= {
        path.name for path in run.iterdir()
    }
