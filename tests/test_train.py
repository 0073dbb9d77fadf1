"""The training script on the preset's and on one's own data, and evaluation in several processes (launcher, gloo)."""

import csv
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

from tests.in_parts import evaluated, write_coco
from tests.processes import launch
from tutorial_lib import engine
from tutorial_lib.checkpoint import load_checkpoint
from tutorial_lib.offline.sample import CATEGORIES
from tutorial_lib.predict import load_detector
from tutorial_lib.presets import PRESETS

SMALL = ("--preset", "quick", "--min-size", 64, "--max-size", 96, "--batch-size", 4, "--device", "cpu")


def in_processes(number, out, job, *arguments):
    """What each process found, and what they printed."""
    finished = launch(number, "tests/in_parts.py", job, out, *arguments, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return [json.loads((out / f"process{rank}.json").read_text()) for rank in range(number)], finished.stdout


def script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    runpy.run_module("tutorial_lib.train", run_name="__main__")


def read_data(*arguments):
    return runpy.run_module("tutorial_lib.train")["read_data"](*arguments)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of 14 scenes with masks of seven classes, and the arguments that train on it."""
    folder = tmp_path_factory.mktemp("own") / "scenes"
    return ("--images", folder, "--annotations", write_coco(folder, 14), *SMALL, "--epochs", 3)


def test_evaluation_in_parts_is_evaluation_of_the_whole(sample_root, tmp_path):
    """Three processes share 12 images evenly, and of 5, one is given twice."""
    found, _ = in_processes(3, tmp_path, "evaluate", sample_root)
    whole = [evaluated(sample_root, num_images, in_parts=False) for num_images in (12, 5)]
    assert all(0 < whole[0][1 + i] < 1 for i in (0, 1, 3, 5, 6, 8))  # AP, AP50 and AR: not all or nothing
    for part in found:
        for i in range(2):
            assert part[i] == pytest.approx(whole[i], abs=1e-9)


def test_the_presets_run_trains_chooses_and_reports(tmp_path, monkeypatch, capsys):
    script(monkeypatch, "--preset", "quick", "--epochs", 1, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "epoch 1/1" in printed and "person" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_test_images"] == 16 and 0.01 < results["box_AP"] < 1 and 0 <= results["mask_AP"] < 1
    assert {"processes": 1, "epochs": 1, "seed": 0, "batch_size": 4}.items() <= results["settings"].items()
    checkpoint = load_checkpoint(tmp_path / "best.pt")
    assert checkpoint["epoch"] == results["epoch"] and checkpoint["categories"] == ["__background__", "person"]


def check_same(out, other):
    """Weights, optimizer, and the log but for its seconds."""
    for name in ("last.pt", "best.pt"):
        first, second = load_checkpoint(out / name), load_checkpoint(other / name)
        torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
        assert first["epoch"] == second["epoch"]
    optimizers = [load_checkpoint(folder / "last.pt")["optimizer"]["state"] for folder in (out, other)]
    torch.testing.assert_close(*optimizers, rtol=0, atol=0)
    logs = [list(csv.DictReader((folder / "log.csv").open())) for folder in (out, other)]
    assert [row["epoch"] for row in logs[0]] == ["1", "2", "3"]
    for row in logs[0] + logs[1]:
        assert float(row.pop("seconds")) > 0 and 0 <= float(row["validation_mask_AP"]) <= 1
    assert logs[0] == logs[1] and {"loss", "loss_mask", "learning_rate", "validation_box_AP"} < logs[0][0].keys()


def test_own_data_resume_to_the_last_bit(own, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    script(monkeypatch, *own, "--out", whole)
    printed = capsys.readouterr().out
    assert printed.count("0 errors") == 3 and printed.count("epoch 3/3") == 1  # the check of every part
    results = json.loads((whole / "results.json").read_text())
    assert results["num_test_images"] == 2 and [row["class"] for row in results["classes"]] == CATEGORIES[1:]
    model, categories = load_detector(whole / "best.pt", "cpu")
    assert categories == CATEGORIES and model.roi_heads.has_mask() and model.transform.min_size == (64,)

    original, epochs = engine.train_one_epoch, []

    def stop_in_the_second_epoch(model, optimizer, loader, device, **options):
        epochs.append(original(model, optimizer, loader, device, **options))
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return epochs[-1]

    monkeypatch.setattr(engine, "train_one_epoch", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        script(monkeypatch, *own, "--out", stopped)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"last.pt cannot go on .*learning_rate was 0.0005, is 0.002; epochs was 3, is 4.: take a"
    ):
        script(monkeypatch, *own, "--epochs", 4, "--learning-rate", 0.002, "--out", stopped, "--resume")
    script(monkeypatch, *own, "--out", stopped, "--resume")
    check_same(whole, stopped)
    with pytest.raises(SystemExit, match="2"):
        script(monkeypatch, *own, "--out", stopped)
    assert "are of an earlier run; give --out another folder, or --resume" in capsys.readouterr().err


def test_two_processes_train_one_model_and_resume_when_one_was_killed(own, tmp_path):
    whole, stopped, own = tmp_path / "whole", tmp_path / "stopped", (*own, "--batch-size", 2)
    (first, second), printed = in_processes(2, tmp_path, "train", *own, "--out", whole)
    assert printed.count("epoch 3/3") == 1  # said once, not by every process
    for epoch in range(3):
        steps = list(zip(first["image_ids"][epoch], second["image_ids"][epoch], strict=True))
        assert len(steps) == 2 and all(len(part) == 2 for step in steps for part in step)
        assert len({image_id for step in steps for part in step for image_id in part}) == 8  # each image once
    assert first["image_ids"][0] != first["image_ids"][1]
    assert first["weights"] == second["weights"] and first["weights"][0] != first["weights"][1]
    model = load_checkpoint(whole / "best.pt")["model"]
    assert not any(name.startswith("module.") for name in model)  # loads without a process group

    finished = launch(2, "tests/in_parts.py", "killed", tmp_path, *own, "--out", stopped, timeout=120)
    assert finished.returncode != 0 and load_checkpoint(stopped / "last.pt")["epoch"] == 1  # all have ended
    (again, _), _ = in_processes(2, tmp_path, "train", *own, "--out", stopped, "--resume")
    assert again["image_ids"] == first["image_ids"][1:]
    check_same(whole, stopped)


def test_three_files_of_boxes_and_an_export(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    files = [write_coco(scenes, 4, masks=False, first=4 * part) for part in range(3)]
    write_coco(scenes, 1, first=99)
    data = ("--images", scenes, "--annotations", *files, *SMALL, "--epochs", 1, "--out", out)
    with pytest.warns(UserWarning, match="1 images of .*scenes are in no file: '099.png'") as warned:
        script(monkeypatch, *data, "--export", "--workers", 1)
    assert not any("are not listed" in str(warning.message) for warning in warned)  # each file lists only its part
    results = json.loads((out / "results.json").read_text())
    assert results["mask_AP"] is None and results["num_test_images"] == 4 and "validation_box_AP" in results
    assert load_checkpoint(out / "best.pt")["name"] == "fasterrcnn_mini_fpn" and (out / "model.onnx").is_file()
    assert "starter weights" in results["made_by"] and "4 + 4 + 4 images" in results["made_by"]


def test_crowds_are_left_out_in_training_only_and_blocks_stay_together(tmp_path):
    file = write_coco(tmp_path / "scenes", 21)
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(content))
    parts, categories = read_data(PRESETS["quick"], tmp_path / "scenes", [file])
    assert [len(part) for part in parts] == [15, 3, 3] and categories == CATEGORIES
    assert sorted(index for part in parts for index in part.indices) == list(range(21))
    assert not any(len(target["boxes"]) for _, target in parts[0])
    assert all(target["iscrowd"].all() for _, target in parts[1]) and any(len(t["boxes"]) for _, t in parts[2])
    steps = [b - a for part in parts[1:] for a, b in zip(part.indices, part.indices[1:], strict=False)]
    assert steps.count(1) >= 2  # neighbours


def test_augmentations_can_be_left_out(tmp_path):
    file = write_coco(tmp_path / "scenes", 4)
    flip, colour = v2.RandomHorizontalFlip, v2.RandomPhotometricDistort
    for left_out in ((), (flip,), (flip, colour)):
        parts, _ = read_data(PRESETS["quick"], tmp_path / "scenes", [file], None, left_out)
        for part, augments in zip(parts, (True, False, False), strict=True):
            kinds = {type(step) for step in part.dataset.transforms.transforms}
            assert kinds & {flip, colour} == ({flip, colour} - set(left_out) if augments else set())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["categories"].pop(), r"b0.json has the categories .*, but .*a0.json has"),
        (lambda data: data["images"].clear() or data["annotations"].clear(), "b0.json"),
        (lambda data: [one.pop("segmentation") for one in data["annotations"]], "b0.json"),
        (lambda data: None, "image in both datasets"),
    ],
)
def test_files_that_do_not_fit(tmp_path, monkeypatch, change, message):
    first, second = write_coco(tmp_path / "a", 4), tmp_path / "b0.json"
    content = json.loads(first.read_text())
    change(content)
    second.write_text(json.dumps(content))
    data = ("--images", tmp_path / "a", "--annotations", first, second, second)
    with pytest.raises(ValueError, match=message):
        script(monkeypatch, *data, *SMALL, "--out", tmp_path / "out")


def test_too_few_images_for_the_batch(tmp_path, monkeypatch):
    files = [write_coco(tmp_path / "a", 3, first=3 * part) for part in range(3)]
    with pytest.raises(ValueError, match=r"3 images are too few for 1 process\(es\) with batches of 4"):
        script(monkeypatch, "--images", tmp_path / "a", "--annotations", *files, *SMALL, "--out", tmp_path / "out")


def test_too_few_images_to_split(tmp_path):
    with pytest.raises(ValueError, match=r"a0.json lists 3 image\(s\), too few"):
        read_data(PRESETS["quick"], tmp_path / "a", [write_coco(tmp_path / "a", 3)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs 0: at least 1 is needed"),
        ("--batch-size -1", "--batch-size -1: at least 1"),
        ("--num-windows 0", "--num-windows 0: at least 1"),
        ("--seed -1", "--seed -1: at least 0"),
        ("--workers -1", "--workers -1: at least 0"),
        ("--learning-rate 0", "--learning-rate 0.0 must be over 0"),
        ("--learning-rate nan", "--learning-rate nan must be over 0"),
        ("--min-size 64 600", "--min-size [64, 600] must be over 0, and at most --max-size, 384"),
        ("--max-size 0", "at most --max-size, 0"),
        ("--device gpu", "argument --device: invalid choice: 'gpu'"),
        ("--device cuda", "0 GPU(s) for 1 process(es); --device cpu goes without"),
        ("--batch-size 41", "40 training images are too few for 1 process(es) with batches of 41; lower --batch-size"),
        ("--images .", "--images and --annotations belong together"),
        ("--annotations README.md", "--images and --annotations belong together"),
        ("--images . --annotations README.md README.md", "there must be one annotation file or three"),
        ("--images nowhere --annotations README.md", "nowhere: no such file or folder"),
        ("--images . --annotations nowhere.json", "nowhere.json: no such file"),
        ("--model retinanet_resnet50_fpn", "argument --model: invalid choice: 'retinanet_resnet50_fpn'"),
        ("--weights COCO_V1", "--weights COCO_V1: fasterrcnn_mini_fpn has DRAWN_V1, DEFAULT, none"),
        ("--model maskrcnn_resnet50_fpn --weights DRAWN_V1", "maskrcnn_resnet50_fpn has COCO_V1, DEFAULT, none"),
        ("--resume", "--resume: there is no "),
    ],
)
def test_arguments_that_cannot_be(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit, match="2"):
        script(monkeypatch, "--preset", "quick", *arguments.split(), "--out", tmp_path / "out")
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_export_needs_its_packages(tmp_path, monkeypatch, capsys):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else original(name))
    with pytest.raises(SystemExit, match="2"):
        script(monkeypatch, "--preset", "quick", "--export", "--out", tmp_path / "out")
    assert "--export needs onnx: pip install 'tutorial-lib[export]'" in capsys.readouterr().err


def test_each_process_has_its_own_gpu(tmp_path, monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        script(monkeypatch, "--device", "cuda", "--preset", "quick", "--batch-size", 21, "--out", tmp_path / "out")
    assert chosen == [torch.device("cuda:1")]
    assert "too few for 2 process(es) with batches of 21; lower --batch-size" in capsys.readouterr().err
