"""COCO metrics: the same numbers as pycocotools driven by hand, and cases worked out on paper."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.roi_heads import paste_masks_in_image

from tutorial_lib.coco_eval import bootstrap_interval, class_table, coco_metrics, compare

NAMES = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
NAMES += ["AR1", "AR10", "AR", "AR_small", "AR_medium", "AR_large"]


def evaluate(sizes, targets, predictions):
    return coco_metrics([compare(*image) for image in zip(predictions, targets, sizes, strict=True)])


def run_pycocotools(sizes, targets, predictions, kind):
    """pycocotools' COCOeval, the way pycocotools' own demo gets them; ids here have gaps on purpose."""
    entries = {"area": [], "scores": []}
    for also, parts in (("area", targets), ("scores", predictions)):
        for i, part in enumerate(parts):
            for n, (x1, y1, x2, y2) in enumerate(part["boxes"].double().tolist()):
                entry = {"id": len(entries[also]) + 1, "image_id": 10 + 3 * i, "category_id": int(part["labels"][n])}
                entry |= {also.removesuffix("s"): part[also][n].item(), "iscrowd": int(part["iscrowd"][n])}
                if kind == "bbox":
                    entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
                else:
                    pixels = (part["masks"][n].squeeze().numpy() > 0.5).astype(np.uint8)
                    entry["segmentation"] = mask_utils.encode(np.asfortranarray(pixels))
                entries[also].append(entry)
    images = [{"id": 10 + 3 * i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)]
    truth, found = COCO(), COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        # Versions 2.0.9 and 2.0.10 need `info`; loadRes does not take an empty list.
        truth.dataset = {"info": {}, "images": images, "categories": [{"id": label} for label in range(1, 6)]}
        found.dataset = truth.dataset | {"annotations": []}
        truth.dataset["annotations"] = entries["area"]
        truth.createIndex(), found.createIndex()
        coco_eval = COCOeval(truth, truth.loadRes(entries["scores"]) if entries["scores"] else found, kind)
        coco_eval.evaluate(), coco_eval.accumulate(), coco_eval.summarize()
    return coco_eval


def random_objects(rng, count, size, grid, near=None):
    """Boxes of all three of COCO's sizes, many near those given or each other, with masks inside, some of one pixel."""
    height, width = size
    boxes, masks = np.zeros((count, 4), np.float32), np.zeros((count, height, width), np.float32)
    for i in range(count):
        others = boxes[:i] if near is None else near
        if len(others) and rng.random() < (0.4 if near is None else 0.85):
            box = others[rng.integers(len(others))]
            corners = box + rng.normal(0, 0.06, 4) * np.tile(box[2:] - box[:2], 2)
        else:
            x, y = rng.uniform(0, (width - 2, height - 2))
            w, h = rng.uniform(1, (width, height)) if rng.random() < 0.7 else (1, 1)
            corners = x, y, x + w, y + h
        x1, y1, x2, y2 = np.round(np.divide(corners, grid)) * grid
        x1, y1 = np.clip((x1, y1), 0, (width - 1, height - 1))
        boxes[i] = x1, y1, *np.clip((x2, y2), (x1 + 1, y1 + 1), (width, height))
        left, top, right, bottom = boxes[i].astype(int)
        masks[i, top : max(bottom, top + 1), left : max(right, left + 1)] = 1
        if rng.random() < 0.3:  # ragged, though never empty
            masks[i] *= rng.random((height, width)) < 0.8
            masks[i, top, left] = 1
    return boxes, masks


def random_case(seed):
    rng = np.random.default_rng(seed)
    classes, grid = int(rng.integers(1, 6)), rng.choice([0.1, 8])  # with 8, equal IoUs and areas of just 32²
    sizes, targets, predictions = [], [], []
    for k in range(int(rng.integers(1, 6))):
        size = tuple((rng.integers(30, 90, 2) + 130 * (seed % 3 == 0)).tolist())  # then with "large" objects
        near, masks = random_objects(rng, int(rng.choice([0, 1, 3, 9])), size, grid)
        labels, crowd = rng.integers(1, classes + 1, len(near)), (rng.random(len(near)) < 0.3).astype(np.int64)
        target = {"boxes": near, "labels": labels, "masks": masks.astype(np.uint8), "area": masks.sum((1, 2))}
        many = seed % 10 == 0 and k == 0  # more than the 100 that COCO counts
        count = 130 if many else int(rng.choice([0, 1, 6, 30]))
        boxes, masks = random_objects(rng, count, size, grid, near)
        scores = np.round(rng.random(count), 1 if rng.random() < 0.5 else 9).astype(np.float32)  # or ties
        grey = np.where(masks > 0, rng.uniform(0.5, 1, masks.shape), rng.uniform(0, 0.5, masks.shape))  # 0.5 is outside
        labels = np.ones(count, np.int64) if many else rng.integers(1, classes + 1, count)
        found = {"boxes": boxes, "labels": labels, "scores": scores, "masks": grey.astype(np.float32)[:, None]}
        for part, parts in ((target | {"iscrowd": crowd}, targets), (found | {"iscrowd": 0 * labels}, predictions)):
            parts.append({key: torch.from_numpy(value) for key, value in part.items()})
        sizes.append(size)
    return sizes, targets, predictions


def test_random_sets_of_images_equal_plain_pycocotools():
    pairs, aps = [], []
    for seed in range(25):
        sizes, targets, predictions = random_case(seed)
        results = evaluate(sizes, targets, predictions)
        pairs += zip(targets, predictions, strict=True)
        aps.append(results.box.AP or 0)
        assert (results.mask is not None) == any(len(output["boxes"]) for output in [*targets, *predictions])
        for kind, metrics in (("bbox", results.box), ("segm", results.mask or results.box)):
            theirs = run_pycocotools(sizes, targets, predictions, kind)
            ours = [-1.0 if getattr(metrics, name) is None else getattr(metrics, name) for name in NAMES]
            np.testing.assert_allclose(ours, theirs.stats, rtol=0, atol=1e-9, err_msg=f"{seed} {kind}")
            for k, (label, ap) in enumerate(metrics.per_class.items()):
                precision, scores = (theirs.eval[name][:, :, label - 1, 0, 2] for name in ("precision", "scores"))
                np.testing.assert_allclose(metrics.precision[:, :, k], precision, rtol=0, atol=1e-9)
                assert (ap is None) == (precision == -1).all()
                if ap is not None:
                    assert ap == pytest.approx(precision.mean(), abs=1e-9)
                    np.testing.assert_allclose(metrics.scores[:, :, k], scores, rtol=0, atol=1e-9)
    # The sets hold what they are for; else the comparison could pass on easy ones only.
    areas = torch.cat([truth["area"] for truth, _ in pairs])
    assert (areas == 1).any() and (areas > 96**2).any() and ((areas > 32**2) & (areas < 96**2)).any()
    assert any(truth["iscrowd"].any() for truth, _ in pairs)
    assert any(len(truth["labels"].unique()) > 2 for truth, _ in pairs)
    assert len({(len(truth["boxes"]) > 0, len(found["boxes"]) > 0) for truth, found in pairs}) == 4
    assert any(len(found["boxes"]) > 100 for _, found in pairs)
    assert any(len(found["scores"].unique()) < len(found["scores"]) for _, found in pairs)
    assert sum(0.05 < ap < 0.95 for ap in aps) >= 12


# Worked out on paper


def target(boxes, labels=None, **more):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.ones(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return {"boxes": boxes, "labels": labels, **more}


def prediction(boxes, scores, labels=None, **more):
    return target(boxes, labels, scores=torch.tensor(scores, dtype=torch.float32), **more)


def squares(count, size=20):
    """Masks of the whole image."""
    return torch.ones(count, size, size, dtype=torch.uint8)


def test_two_objects_and_three_predictions():
    """Right at 0.9, wrong at 0.8, right at 0.7: precision 1 up to recall 0.50 (51 points), then 2/3 (50 points)."""
    first, second, elsewhere = [0, 0, 50, 60], [60, 60, 100, 110], [0, 80, 40, 120]
    found = prediction([second, elsewhere, first], [0.7, 0.8, 0.9])
    results = evaluate([(120, 120)], [target([first, second])], [found])
    box, expected = results.box, (51 * 1 + 50 * 2 / 3) / 101
    assert [box.AP, box.AP50, box.AP_medium, box.per_class[1]] == pytest.approx([expected] * 4, abs=1e-9)
    assert (box.AR1, box.AR10, box.AR) == (0.5, 1.0, 1.0)
    assert box.AP_small is None and box.AP_large is None  # 3000 and 2000 pixels
    np.testing.assert_allclose(box.precision[0, :, 0], [1] * 51 + [2 / 3] * 50)
    text = repr(results)
    assert text.splitlines()[0] == "1 images" and "AP 0.835" in text and "AP_large no such objects" in text
    assert [word for word in text.split() if word.startswith(("AP", "AR"))] == NAMES
    assert "mask" not in text and "beyond" not in text
    late = prediction([elsewhere] * 103 + [first], [0.9] * 103 + [0.5])
    results = evaluate([(120, 120)] * 2, [target([first])] * 2, [late] * 2)
    assert results.box.num_dropped == 8 and "8 detections beyond 100" in repr(results) and results.box.AR == 0


def test_nothing_found_is_0_and_nothing_to_find_is_none():
    truth, none = target([[0, 0, 20, 20]], masks=squares(1)), target([], masks=squares(0))
    nothing, found = (prediction([[0, 0, 20, 20]] * n, [0.9] * n, masks=squares(n)[:, None].float()) for n in (0, 1))
    results = evaluate([(20, 20)], [truth], [nothing])
    assert "mask  AP 0.000" in repr(results)
    for metrics in (results.box, results.mask):
        assert (metrics.AP, metrics.AR, metrics.AP_large, metrics.per_class) == (0.0, 0.0, None, {1: 0.0})
    for some in (nothing, found):
        box = evaluate([(20, 20)], [none], [some]).box
        assert all(getattr(box, name) is None for name in NAMES) and set(box.per_class.values()) <= {None}
        assert repr(box).count("no such objects") == 12
        with pytest.raises(ValueError, match="no objects"):
            bootstrap_interval(box)
    with pytest.raises(ValueError, match="no images"):
        coco_metrics([])


def test_masks_are_of_all_images_or_of_none():
    box = [[0, 0, 20, 20]]
    masks = {"masks": squares(1)}
    truth, found = target(box, **masks), prediction(box, [0.9], masks=squares(1)[:, None].float())
    bare_truth, bare = target(box), prediction(box, [0.9])
    for targets, predictions in (([truth, truth, bare_truth], [found] * 3), ([truth] * 3, [found, found, bare])):
        with pytest.raises(ValueError, match="1 of 3 images, the first with index 2, have no masks"):
            evaluate([(20, 20)] * 3, targets, predictions)
    no_objects, nothing = target([]), prediction([], [])
    for targets, predictions in ((truth, bare), (bare_truth, found), (bare_truth, bare), (truth, nothing)):
        assert evaluate([(20, 20)], [targets], [predictions]).mask is None
        assert evaluate([(20, 20)] * 2, [no_objects, targets], [nothing, predictions]).mask is None
    empty = {**nothing, "masks": squares(0)[:, None].float()}
    assert evaluate([(20, 20)], [no_objects], [empty]).mask is None
    targets, predictions = [truth, no_objects, no_objects, no_objects, truth], [found, found, empty, nothing, empty]
    assert evaluate([(20, 20)] * 5, targets, predictions).mask.AR == 0.5


def test_parts_that_do_not_fit_are_refused():
    for which, key, value, message in (
        (0, "boxes", None, "a prediction lacks boxes"),
        (0, "scores", None, "a prediction lacks scores"),
        (1, "labels", None, "a target lacks labels"),
        (0, "boxes", torch.zeros(1), r"a prediction has boxes of the shape \[1\]"),
        (1, "labels", torch.ones(2), "a target has 1 boxes and 2 labels"),
        (1, "masks", squares(2), "a target has 1 boxes and 2 masks"),
        (1, "masks", squares(1)[:, 1:], r"a target has masks of \(19, 20\) pixels; its image has \(20, 20\)"),
    ):
        parts = [prediction([[0, 0, 9, 9]], [0.5]), target([[0, 0, 9, 9]])]
        parts[which] = {k: v for k, v in {**parts[which], key: value}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            compare(*parts, (20, 20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_point_type_and_gradients(dtype):
    masks = torch.full((1, 1, 20, 20), 0.5, dtype=dtype)  # 0.5 is outside
    masks[..., :10] = 0.7
    found = prediction([[0, 0, 10, 20]], [0.5], masks=masks.requires_grad_())
    truth = target([[0, 0, 10, 20]], masks=(masks[0] > 0.5).to(torch.uint8))
    before = repr((truth, found))
    image = compare(found, truth, (20, 20))
    assert image.box_ious == image.mask_ious == 1.0 and image.mask_areas == 200
    assert repr((truth, found)) == before
    # The difference of two float32 numbers needs more than float32.
    x1, y1, x2, y2 = (0.1, 0.2, 900.3, 700.7)
    image = compare(prediction([], []), target([[x1, y1, x2, y2]]), (800, 1000))
    assert image.target_areas[0] == (np.float32([x2, y2]).astype(float) - np.float32([x1, y1])).prod()


def test_masks_are_measured_whole_inside_and_outside_of_their_boxes():
    """Boxes of all sizes, some of them partly outside the image, with pasted masks; and the masks of other boxes."""
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        height, width = torch.randint(20, 200, (2,), generator=rng).tolist()
        corner = torch.rand(40, 2, generator=rng) * torch.tensor([width, height]) - 10
        boxes = torch.cat([corner, corner + torch.rand(40, 2, generator=rng) ** 3 * 150 + 11], dim=1)
        small = torch.nn.functional.avg_pool2d(torch.rand(40, 1, 30, 30, generator=rng), 3, stride=1)
        masks = paste_masks_in_image(small, boxes, (height, width))
        masks[:4] = masks[:4].roll(17, dims=-1)
        truth = target([[0, 0, width, height]] * 2, masks=(torch.rand(2, height, width, generator=rng) > 0.4).byte())
        image = compare({**prediction(boxes.tolist(), [0.5] * 40), "masks": masks}, truth, (height, width))
        pixels = masks > 0.5  # [40, 1, H, W]
        inside = (pixels & (truth["masks"] > 0)).sum((-2, -1))
        union = (pixels | (truth["masks"] > 0)).sum((-2, -1))
        np.testing.assert_array_equal(image.mask_areas, pixels.sum((1, 2, 3)))
        np.testing.assert_array_equal(image.mask_ious, inside.double() / union)
        assert image.mask_areas.any()


def test_matches_name_the_pairs():
    """Image 0: found, found twice. Image 1: an object missed, a detection on nothing."""
    first, second = [0, 0, 50, 60], [60, 60, 100, 110]
    near = [0, 0, 50, 40]  # IoU 2/3 with first
    found = [prediction([near, first], [0.6, 0.9]), prediction([second], [0.7])]
    matches = evaluate([(120, 120)] * 2, [target([second, first]), target([first])], found).box.matches[1]
    assert matches.images.tolist() == [0, 1, 0] and matches.detections.tolist() == [1, 0, 0]
    np.testing.assert_allclose(matches.scores, [0.9, 0.7, 0.6])
    assert matches.targets[0].tolist() == [1, -1, -1]  # the second detection of `first` is a duplicate
    assert matches.num_objects.tolist() == [2, 1] and not matches.ignored.any()
    alone = evaluate([(120, 120)], [target([first])], [prediction([near], [0.6])]).box.matches[1]
    assert alone.targets[:, 0].tolist() == [0, 0, 0, 0, -1, -1, -1, -1, -1, -1]  # 0.50 to 0.65


def test_class_table_of_a_case_worked_out_on_paper():
    """Cat: two objects; right at 0.9, wrong at 0.8, right at 0.7. Dog: two detections of score 0.6, one right."""
    first, second, elsewhere = [0, 0, 50, 60], [60, 60, 100, 110], [0, 80, 40, 119]
    truth = {"boxes": torch.tensor([first, second, first, elsewhere]).float()}
    truth |= {"labels": torch.tensor([1, 1, 2, 4]), "iscrowd": torch.tensor([0, 0, 0, 1])}
    found = prediction([first, elsewhere, second, elsewhere, first, first], [0.9, 0.8, 0.7, 0.6, 0.6, 0.5])
    found["labels"] = torch.tensor([1, 1, 1, 2, 2, 3])
    metrics = evaluate([(120, 120)], [truth], [found]).box
    empty = {"objects": 0, "AP": None, "AP50": None, "threshold": None, "F1": None}
    expected = [
        {"class": "cat", "objects": 2, "AP": (51 + 50 * 2 / 3) / 101, "threshold": 0.7, "F1": 0.8},
        {"class": "dog", "objects": 1, "AP": 0.5, "threshold": 0.6, "F1": 2 / 3},
        {"class": "bat", **empty},  # only detections
        {"class": "owl", **empty},  # only a crowd
        {"class": "ant", **empty},  # neither
    ]
    table = class_table(metrics, ["__background__", "cat", "dog", "bat", "owl", "ant"])
    for row, wanted in zip(table, expected, strict=True):
        assert list(row) == ["class", "objects", "AP", "AP50", "threshold", "F1"]
        assert row == pytest.approx({"AP50": wanted["AP"], **wanted}, abs=1e-6)
        assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("seed", [12, 37])
def test_class_table_finds_the_best_of_all_thresholds(seed):
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(6):
        corners = rng.integers(0, 90, (5, 2))
        boxes = np.concatenate([corners, corners + 20], axis=1)
        truth.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(rng.integers(1, 3, 5))})
        moved = boxes + rng.integers(-6, 7, boxes.shape)
        found.append(prediction(moved.tolist(), rng.integers(1, 9, 5) / 10))  # many equal scores
        found[-1]["labels"] = torch.tensor(rng.integers(1, 3, 5))
    for label, row in enumerate(class_table(evaluate([(120, 120)] * 6, truth, found).box, ["", "a", "b"]), 1):
        scores = {}
        for threshold in np.arange(1, 9) / 10:
            kept = [{k: v[p["scores"] >= threshold - 1e-6] for k, v in p.items()} for p in found]
            matches = evaluate([(120, 120)] * 6, truth, kept).box.matches[label]
            right = (matches.targets[0] >= 0).sum()
            scores[threshold] = 2 * right / (len(matches.scores) + row["objects"])
        assert row["F1"] == pytest.approx(max(scores.values()))
        assert scores[round(row["threshold"], 1)] == pytest.approx(row["F1"])


@pytest.mark.parametrize("seed", [12, 37])
def test_bootstrap_is_that_of_evaluating_every_resample(seed):
    """Without ties in score, which pycocotools settles by the order of the images."""
    case = random_case(seed)
    for found in case[2]:
        found["scores"] += torch.rand(len(found["scores"]), generator=torch.Generator().manual_seed(seed)) / 99
    interval = bootstrap_interval(evaluate(*case).box, level=0.9, num_samples=40, seed=seed)
    rng, aps = np.random.default_rng(seed), []
    for _ in range(40):
        chosen = rng.integers(len(case[0]), size=len(case[0]))
        aps.append(evaluate(*([values[i] for i in chosen] for values in case)).box.AP)
    expected = np.quantile([ap for ap in aps if ap is not None], [0.05, 0.95])
    np.testing.assert_allclose(interval, expected, rtol=0, atol=1e-9)
    assert len(case[0]) > 1 and interval[0] < interval[1]
