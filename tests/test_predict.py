"""Detectors from checkpoints, and a folder of images through one: COCO results, table and pictures."""

import csv
import json
import runpy
import shutil
import sys

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.resnet import resnet50
from torchvision.ops.misc import FrozenBatchNorm2d

from tests.in_parts import write_coco
from tutorial_lib.checkpoint import save_checkpoint
from tutorial_lib.coco import CocoDataset
from tutorial_lib.data import collate_fn
from tutorial_lib.engine import evaluate
from tutorial_lib.offline.mini_models import fasterrcnn_mini_fpn, maskrcnn_mini_fpn
from tutorial_lib.offline.sample import CATEGORIES
from tutorial_lib.predict import load_detector, predict_folder
from tutorial_lib.transforms import get_transform

CPU = torch.device("cpu")
MINI = {"name": "maskrcnn_mini_fpn", "categories": CATEGORIES, "min_size": (160, 192), "max_size": 300}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of the starter weights, which know the classes of the scenes."""
    path = tmp_path_factory.mktemp("saved") / "best.pt"
    save_checkpoint(path, model=maskrcnn_mini_fpn(weights="DEFAULT"), epoch=1, **MINI)
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Six scenes and their COCO file."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    return folder, write_coco(folder, 6)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    runpy.run_path("tutorial_lib/predict.py", run_name="__main__")


def test_results_have_the_ids_of_the_annotations(saved, scenes, tmp_path):
    """pycocotools scores the file as `evaluate` scores the model."""
    images, annotations = scenes
    model, categories = load_detector(saved, CPU)
    results = predict_folder(
        model, categories, images, tmp_path, score_threshold=0.05, device=CPU, annotations=annotations
    )
    truth = COCO(str(annotations))
    found = truth.loadRes(str(tmp_path / "predictions.json"))
    assert len(found.anns) == len(results) > 20
    assert all(truth.imgs[one["image_id"]]["file_name"] == one["file_name"] for one in results)
    dataset = CocoDataset(images, annotations, get_transform(train=False))
    expected = evaluate(model, DataLoader(dataset, collate_fn=collate_fn), CPU, progress=False)
    for kind, ours in (("bbox", expected.box), ("segm", expected.mask)):
        scored = COCOeval(truth, found, kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
        assert ours.AP > 0.1 and scored.stats[0] == pytest.approx(ours.AP, abs=1e-3)


def test_a_folder_without_annotations(saved, scenes, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "sub folder").mkdir(parents=True)
    shutil.copy(scenes[0] / "000.png", images / "b.png")
    shutil.copy(scenes[0] / "001.png", images / "sub folder" / "ä.PNG")
    Image.new("L", (40, 30)).save(images / "a.png")
    (images / "c.jpg").write_text("no image")
    (images / "notes.txt").write_text("notes")
    model, categories = load_detector(saved, CPU)
    with pytest.warns(UserWarning, match=r"1 file\(s\) are no images: notes.txt"):
        with pytest.raises(ValueError, match=r"1 image\(s\): .*c.jpg cannot be read as an image"):
            predict_folder(model, categories, images, out, device=CPU)
    results = json.loads((out / "predictions.json").read_text())
    assert {(one["file_name"], one["image_id"]) for one in results} == {("b.png", 2), ("sub folder/ä.PNG", 4)}
    rows = list(csv.DictReader((out / "predictions.csv").open(encoding="utf-8")))
    for one, row in zip(results, rows, strict=True):
        assert CATEGORIES[one["category_id"]] == row["category"] and one["file_name"] == row["file_name"]
        x, y, width, height = one["bbox"]
        corners = [float(row[name]) for name in ("x1", "y1", "x2", "y2")]
        assert corners == pytest.approx([x, y, x + width, y + height], abs=0.006)  # the table is rounded
        assert 0.5 <= one["score"] == pytest.approx(float(row["score"]), abs=6e-5)
        assert one["segmentation"]["size"] == [96, 128]
    pictures = {path.relative_to(out / "pictures").as_posix() for path in (out / "pictures").rglob("*.jpg")}
    assert pictures == {"a.png.jpg", "b.png.jpg", "sub folder/ä.PNG.jpg"}
    assert not list(out.glob("*.tmp"))
    with pytest.raises(FileExistsError, match="predictions.json is of an earlier run; choose another folder"):
        predict_folder(model, categories, images, out, device=CPU)


def test_boxes_only_and_no_pictures(scenes, tmp_path, monkeypatch):
    save_checkpoint(
        tmp_path / "boxes.pt", model=fasterrcnn_mini_fpn(weights="DEFAULT"), **MINI | {"name": "fasterrcnn_mini_fpn"}
    )
    more = ("--score-threshold", 0.9, "--no-pictures", "--annotations", scenes[1], "--device", "cpu")
    command(monkeypatch, tmp_path / "boxes.pt", "--images", scenes[0], "--out", tmp_path / "out", *more)
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert results and all(one["score"] >= 0.9 and "segmentation" not in one for one in results)
    assert not list((tmp_path / "out").rglob("*.jpg"))


def test_the_model_comes_back_as_it_was(saved):
    model, categories = load_detector(saved, "cpu")
    original = maskrcnn_mini_fpn(weights="DEFAULT", min_size=MINI["min_size"], max_size=MINI["max_size"]).eval()
    assert categories == CATEGORIES and not model.training
    image = torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # It has BatchNorm, which rounds otherwise than the frozen one of the weights: 2e-5 of a pixel.
        torch.testing.assert_close(model([image]), original([image]), rtol=0, atol=1e-3)


def test_frozen_batch_norm_of_torchvisions_weights_has_an_eps_of_0(tmp_path):
    torch.manual_seed(0)
    norm = lambda channels: FrozenBatchNorm2d(channels, eps=0.0)  # noqa: E731
    backbone = _resnet_fpn_extractor(resnet50(norm_layer=norm), 3)
    original = FasterRCNN(backbone, 2, min_size=64, max_size=64).eval()
    for name, buffer in original.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1e-5)  # as large as PyTorch's eps
        elif name.endswith("bn1.weight"):
            buffer.fill_(1e-3)
    sizes = {"min_size": (64,), "max_size": 64, "categories": ["__background__", "person"]}
    save_checkpoint(tmp_path / "best.pt", model=original, name="fasterrcnn_resnet50_fpn", **sizes)
    model, _ = load_detector(tmp_path / "best.pt", CPU)
    with torch.no_grad():
        stem = torch.nn.Sequential(*list(original.backbone.body.values())[:2])
        again = torch.nn.Sequential(*list(model.backbone.body.values())[:2])
        image = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(again(image), stem(image))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": None}, "bad.pt lacks categories, which"),
        ({"name": None, "max_size": None}, "bad.pt lacks name, max_size, which"),
        ({"name": "fasterrcnn_mini_fpn"}, "bad.pt does not hold the model that it names, fasterrcnn_mini_fpn: "),
        ({"name": "my_model"}, "bad.pt does not hold the model that it names, my_model: Unknown model"),
        ({"categories": ["__background__", "person"]}, "(?s)bad.pt does not hold .*size mismatch"),
    ],
)
def test_checkpoints_that_are_none(tmp_path, change, message):
    parts = {"model": maskrcnn_mini_fpn(num_classes=8), **MINI} | change
    save_checkpoint(tmp_path / "bad.pt", **{name: part for name, part in parts.items() if part is not None})
    with pytest.raises(ValueError, match=message):
        load_detector(tmp_path / "bad.pt", CPU)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--images nowhere", 1, "error: nowhere is no folder with images"),
        ("--images tests", 1, "error: tests is no folder with images"),
        ("--images . --device gpu", 1, "gpu"),
        ("--images . --annotations nowhere.json", 1, "nowhere.json"),
        ("--images . --score-threshold 2", 2, "--score-threshold 2.0 must be from 0 to 1"),
        ("--images . --score-threshold nan", 2, "--score-threshold nan must be from 0 to 1"),
        ("", 2, "the following arguments are required: --images"),
    ],
)
@pytest.mark.filterwarnings("ignore:.* are no images")
def test_arguments_that_cannot_be(saved, tmp_path, monkeypatch, capsys, arguments, code, message):
    with pytest.raises(SystemExit, match=str(code)):
        command(monkeypatch, saved, *arguments.split(), "--out", tmp_path / "out")
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_classes_that_the_annotations_lack(saved, scenes, tmp_path):
    content = json.loads(scenes[1].read_text())
    content["categories"][0]["name"] = "pedestrian"
    file = tmp_path / "other.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="other.json lacks categories of the model: person"):
        predict_folder(*load_detector(saved, CPU), scenes[0], tmp_path / "out", annotations=file)
