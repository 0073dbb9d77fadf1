"""The stored results of the benchmarks say what they were measured on, and add up."""

import json
import subprocess
import sys

import pytest
import torch
from torchvision.models import get_model_weights
from torchvision.ops import FrozenBatchNorm2d

from tests.benchmarks import RESULTS
from tests.benchmarks.backbones import BUDGETS, TRUNKS
from tests.benchmarks.speed import WORKS, detector, processes_at_hand
from tests.benchmarks.starter import EPOCHS, SEEDS, summary
from tests.benchmarks.windows import NUM_WINDOWS
from tests.benchmarks.windows import SEEDS as WINDOWS_SEEDS
from tools.notebooks import ROOT
from tutorial_lib.models import EmbeddingBagRoIAlign
from tutorial_lib.presets import PRESETS

PROVENANCE = {"device", "threads", "torch", "torchvision", "python", "date"}


def stored(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_every_row_says_what_it_was_measured_on(name):
    rows = stored(name)["rows"]
    assert rows
    for row in rows:
        assert PROVENANCE <= row.keys()
        assert str(ROOT) not in json.dumps(row)


def test_the_benchmarks_can_be_imported_on_windows():
    code = "import sys; sys.modules['resource'] = None; import tests.benchmarks.speed, tests.benchmarks.backbones"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_at_full_the_model_that_is_timed_is_built_as_for_coco():
    model = detector(PRESETS["full"], EmbeddingBagRoIAlign)
    blocks = model.backbone.body
    assert isinstance(blocks.layer3[0].bn1, FrozenBatchNorm2d)
    assert {name.split(".")[0] for name, p in blocks.named_parameters() if p.requires_grad} == {
        "layer2",
        "layer3",
        "layer4",
    }
    model.transform.min_size, model.transform.max_size = (128,), 128
    box = torch.tensor([[10.0, 20.0, 60.0, 90.0]])
    masks = torch.zeros(1, 128, 128, dtype=torch.uint8)
    masks[0, 20:90, 10:60] = 1
    with torch.no_grad():
        losses = model([torch.rand(3, 128, 128)], [{"boxes": box, "labels": torch.tensor([1]), "masks": masks}])
    assert all(loss < 8 for loss in losses.values()), losses  # 31 where features grow from block to block


@pytest.mark.parametrize(("threads", "processes"), [(1, 1), (2, 2), (3, 2), (4, 4), (16, 4)])
def test_processes_have_whole_images(monkeypatch, threads, processes):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert processes_at_hand() == processes


def test_ratios_are_those_of_the_seconds():
    rows = {row["work"]: row for row in stored("speed")["rows"]}
    assert rows.keys() <= WORKS.keys()
    assert {"sample_from_disk", "sample_from_cache", "train_step_cpu", "inference_cpu", "evaluator_50"} <= rows.keys()
    for row in rows.values():
        assert row["ratio"] == round(row["classic"] / row["ours"], 2)


def test_every_backbone_is_measured_at_the_same_budget():
    rows = stored("backbones")["rows"]
    measured = {"parameters", "train_images_per_second", "inference_images_per_second", "memory", "box_AP"}
    for name in {row["preset"] for row in rows}:
        of_preset = [row for row in rows if row["preset"] == name]
        assert [row["backbone"] for row in of_preset] == list(TRUNKS)
        for row in of_preset:
            assert measured <= row.keys() and 0 <= row["box_AP"] <= 1
            assert vars(BUDGETS[name]).items() <= row.items()


def test_starter_weights_are_measured_with_every_seed():
    results = stored("starter")
    rows = results["rows"]
    ran = [(row["preset"], row["weights"], row["seed"], row["epochs"]) for row in rows]
    kinds = [("quick", "DEFAULT"), ("laptop", "DEFAULT"), ("laptop", "random")]
    wanted = [(name, weights, seed, EPOCHS[name]) for name, weights in kinds for seed in SEEDS[name]]
    assert sorted(ran) == sorted(wanted)
    assert results["summary"] == summary(rows)
    assert results["starter"]["_metrics"] == get_model_weights("maskrcnn_mini_fpn").DEFAULT.meta["_metrics"]


def test_starter_weights_are_worth_having():
    rows = stored("starter")["rows"]
    quick = [row for row in rows if row["preset"] == "quick"]
    assert all(row["mask_AP"] >= row["zero_shot_mask_AP"] + 0.15 for row in quick)
    by_weights = {
        weights: [row["mask_AP"] for row in rows if (row["preset"], row["weights"]) == ("laptop", weights)]
        for weights in ("DEFAULT", "random")
    }
    assert min(by_weights["DEFAULT"]) > max(by_weights["random"]) + 0.05


def test_every_number_of_windows_is_measured_with_every_seed():
    rows = stored("windows")["rows"]
    wanted = [
        (name, number, seed) for name, numbers in NUM_WINDOWS.items() for number in numbers for seed in WINDOWS_SEEDS
    ]
    assert sorted((row["preset"], row["num_windows"], row["seed"]) for row in rows) == sorted(wanted)
    for name in NUM_WINDOWS:
        assert {row["epochs"] for row in rows if row["preset"] == name} == {EPOCHS[name]}
