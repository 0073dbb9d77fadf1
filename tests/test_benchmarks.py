"""The stored results of the benchmarks say what they were measured on, and add up."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torchvision.models import get_model_weights
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from tools.benchmarks import RESULTS, full_cpu, growth, recipes, time_to_ap
from tools.benchmarks.backbones import BUDGETS, TRUNKS
from tools.benchmarks.speed import WORKS, detector, evaluator
from tools.notebooks import ROOT
from tutorial_lib.offline.mini_models import maskrcnn_mini_fpn
from tutorial_lib.presets import FULL_ON_CPU, PRESETS

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
    code = "import sys; sys.modules['resource'] = None; import tools.benchmarks.speed, tools.benchmarks.backbones"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize("build", [lambda preset: detector(preset, MultiScaleRoIAlign), full_cpu.pretrained])
def test_at_full_the_model_that_is_timed_is_built_as_for_coco(build, capsys):
    model = build(PRESETS["full"])
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


def test_both_evaluators_give_the_same_aps():
    assert evaluator(3, rounds=2).keys() >= {"classic", "ours", "rounds"}  # it asserts that they do


def test_ratios_are_those_of_the_seconds():
    rows = {row["work"]: row for row in stored("speed")["rows"]}
    assert rows.keys() <= WORKS.keys()
    assert {"sample_from_cache", "train_step_cpu", "inference_cpu", "epoch_cpu", "evaluator_50"} <= rows.keys()
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


def test_time_to_ap_counts_runs_that_never_arrive_with_all_their_seconds():
    def row(recipe, seed, *masks):
        return {"recipe": recipe, "seed": seed, "history": [[10.0 * n, 0.9, ap] for n, ap in enumerate(masks, start=1)]}

    assert time_to_ap.seconds_to(row("ours", 0, 0.3, 0.42, 0.41), 0.41) == (20.0, True)
    assert time_to_ap.seconds_to(row("ours", 0, 0.3, 0.42, 0.41), 0.43) == (30.0, False)
    ours = [row("ours", seed, 0.5) for seed in range(3)]
    classic = [row("classic", 0, 0.1, 0.1, 0.41), row("classic", 1, 0.1, 0.46), row("classic", 2, *[0.3] * 8)]
    alone = row("ours", 3, 0.1)  # without a classic run beside it
    table = time_to_ap.summary([*classic, *ours, alone])
    assert table["0.40"] == {
        "median_seconds": {"classic": 30.0, "ours": 10.0}, "arrived": {"classic": 2, "ours": 3},
        "runs": 3, "median_ratio": 3.0,
    }  # fmt: skip
    assert table["0.50"]["arrived"] == {"classic": 0, "ours": 3} and table["0.50"]["median_ratio"] == 3.0


def test_time_to_ap_is_measured_with_every_seed():
    results = stored("time_to_ap")
    ran = [(row["recipe"], row["seed"]) for row in results["rows"]]
    assert ran == [(recipe, seed) for recipe in time_to_ap.RECIPES for seed in time_to_ap.SEEDS]
    assert results["summary"] == time_to_ap.summary(results["rows"])
    assert {row["weights"] for row in results["rows"]} == {
        get_model_weights("maskrcnn_mini_fpn").DEFAULT.meta["sha256"][:16]
    }
    assert results["summary"]["0.45"]["arrived"]["ours"] == 3


def test_a_recipe_is_the_mean_of_its_seeds():
    measured_on = dict.fromkeys(("device", "threads", "torch", "torchvision", "python", "date"), "here")
    histories = [[10.0, 0.9, 0.9], [20.0, 0.1, 0.2], [30.0, 0.2, 0.3], [40.0, 0.3, 0.4]], [[8.0, 0.6, 0.5]]
    runs = [
        {"seed": 1 - seed, "epochs": 4, "history": history, "test_box_AP": 0.6, "test_mask_AP": seed / 2} | measured_on
        for seed, history in enumerate(histories)
    ]
    row = {"change": "none", "seeds": [0, 1], "epochs": 4, "val_box_AP": 0.3, "val_mask_AP": 0.35}
    row |= {"test_box_AP": 0.6, "test_mask_AP": 0.25, "seconds": 24}
    assert recipes.mean_row("none", runs) == row | measured_on


def test_person_can_be_left_out_of_the_mean():
    model = maskrcnn_mini_fpn(num_classes=4)
    old = [layer.clone() for layer in model.roi_heads.box_predictor.bbox_pred.weight.detach().split(4)]
    recipes.mean_without_person(model, 2)
    background, person = model.roi_heads.box_predictor.bbox_pred.weight.detach().split(4)
    torch.testing.assert_close(background, old[0])
    torch.testing.assert_close(person, (old[2] + old[3]) / 2)


def test_recipes_are_measured_with_every_seed():
    rows = {row["change"]: row for row in stored("recipes")["rows"] if "older" not in row}
    assert rows.keys() == {*recipes.TIMED.values(), *recipes.CHANGES}
    assert all(row["seeds"] == list(time_to_ap.SEEDS) for row in rows.values())
    timed = stored("time_to_ap")["rows"]
    for recipe, change in recipes.TIMED.items():
        assert rows[change] == recipes.mean_row(change, [row for row in timed if row["recipe"] == recipe])


def test_minutes_of_notebook_04_add_up():
    preset = replace(PRESETS["full"], split=(100, 20, 50), long_epochs=3)
    seconds = 3 * (150 + 10 + 20) + 3 * 50 + 2 * 20
    assert full_cpu.minutes(preset, training=1.5, loss=0.5, evaluation=1.0) == seconds / 60


def test_full_on_a_cpu_is_measured_as_it_is():
    if not (RESULTS / "full_cpu.json").exists():
        pytest.skip("not measured yet: python -m tools.benchmarks.full_cpu")
    results = stored("full_cpu")
    assert "AP is not measured" in results["what"]
    for row in results["rows"]:
        assert (row["min_size"], row["max_size"], row["epochs"]) == (
            list(FULL_ON_CPU["min_size"]),
            FULL_ON_CPU["max_size"],
            FULL_ON_CPU["long_epochs"],
        )


@pytest.mark.parametrize("series", growth.SERIES)
def test_growth_is_measured(series, tmp_path):
    growth.write_images(tmp_path, number=10, objects=2, side=64)
    row = growth.measured(series, 10, tmp_path)
    assert PROVENANCE <= row.keys() and (row["series"], row["number"]) == (series, 10)
    assert row["seconds"] > 0 and row.get("bytes", 0) >= 0
    assert ("setup_seconds" in row) == ("training" in series and "objects" not in series)
    assert row.get("findings", 0) == 0
    if "box_AP" in row:
        assert 0.1 < row["box_AP"] < 0.9  # there is something to match, and something to miss


def test_growth_is_the_slope_of_the_two_largest():
    numbers = {1: (5.0, 2**30), 10: (2.0, 1000), 100: (200.0, 2**20)}
    rows = [{"series": "a", "number": n, "seconds": s, "bytes": b} for n, (s, b) in numbers.items()]
    assert growth.exponents([*rows, {"series": "b", "number": 1}]) == {"a": {"seconds": 2.0, "bytes": 0.0}}


def test_nothing_grows_worse_than_linear():
    if not (RESULTS / "growth.json").exists():
        pytest.skip("not measured yet: python -m tools.benchmarks.growth")
    results = stored("growth")
    measured = [(row["series"], row["number"]) for row in results["rows"]]
    assert measured == [(name, number) for name, (*_, numbers) in growth.SERIES.items() for number in numbers]
    assert results["exponents"] == growth.exponents(results["rows"])
    for name, exponents in results["exponents"].items():
        assert exponents.keys() >= {"seconds", "bytes"}
        for what, exponent in exponents.items():  # sorting has up to 1.08; the rest is for a clock's noise
            assert exponent <= 1.15, f"{name}: {what}"
