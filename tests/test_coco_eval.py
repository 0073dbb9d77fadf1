"""COCO metrics: the same numbers as pycocotools driven by hand, and cases worked out on paper."""

from __future__ import annotations

import contextlib
import functools
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.roi_heads import paste_masks_in_image

from tutorial_lib.coco_eval import bootstrap_interval, coco_metrics, compare, mean_and_spread

NUM_CASES = 210
NAMES = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
NAMES += ["AR1", "AR10", "AR", "AR_small", "AR_medium", "AR_large"]


def evaluate(sizes, targets, predictions):
    return coco_metrics([compare(*image) for image in zip(predictions, targets, sizes, strict=True)])


def run_pycocotools(sizes, targets, predictions, kind):
    """pycocotools' COCOeval, the way pycocotools' own demo gets them; ids here have gaps on purpose."""
    ids = [10 + 3 * i for i in range(len(sizes))]
    dataset = {
        "images": [{"id": id_, "height": size[0], "width": size[1]} for id_, size in zip(ids, sizes, strict=True)],
        "categories": [{"id": label} for label in range(1, 6)],
        "annotations": [],
    }
    results = []
    for id_, target, prediction in zip(ids, targets, predictions, strict=True):
        for i, (x1, y1, x2, y2) in enumerate(target["boxes"].double().numpy()):
            annotation = {
                "id": len(dataset["annotations"]) + 1,
                "image_id": id_,
                "category_id": int(target["labels"][i]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(target["area"][i]),
                "iscrowd": int(target["iscrowd"][i]),
            }
            if kind == "segm":
                annotation["segmentation"] = mask_utils.encode(np.asfortranarray(target["masks"][i].numpy()))
            dataset["annotations"].append(annotation)
        for i, (x1, y1, x2, y2) in enumerate(prediction["boxes"].double().numpy()):
            result = {
                "image_id": id_,
                "category_id": int(prediction["labels"][i]),
                "score": float(prediction["scores"][i]),
            }
            if kind == "segm":
                mask = (prediction["masks"][i, 0].numpy() > 0.5).astype(np.uint8)
                result["segmentation"] = mask_utils.encode(np.asfortranarray(mask))
            else:
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        if results:
            found = truth.loadRes(results)
        else:  # loadRes does not take an empty list
            found = COCO()
            found.dataset = {**dataset, "annotations": []}
            found.createIndex()
        coco_eval = COCOeval(truth, found, kind)
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return coco_eval


def random_objects(rng, count, size, masks_from=None, jitter=0.0):
    """Boxes of all three of COCO's sizes and masks inside them, some of them of one pixel.

    With masks_from, boxes near those given (so that there is something to match)."""
    height, width = size
    boxes = np.zeros((count, 4), np.float32)
    masks = np.zeros((count, height, width), np.float32)
    for i in range(count):
        if masks_from is not None and len(masks_from) and rng.random() < 0.75:
            near = masks_from[rng.integers(len(masks_from))]
            x1, y1, x2, y2 = near + rng.normal(0, jitter, 4) * (np.tile(near[2:] - near[:2], 2))
        else:
            x1, y1 = rng.uniform(0, width - 2), rng.uniform(0, height - 2)
            x2, y2 = x1 + rng.uniform(1, width), y1 + rng.uniform(1, height)
            if rng.random() < 0.3:
                x1, y1 = np.floor((x1, y1))
                x2, y2 = x1 + 1, y1 + 1
        x1, y1 = np.clip((x1, y1), 0, (width - 1, height - 1))
        x2, y2 = np.clip((x2, y2), (x1 + 1, y1 + 1), (width, height))
        boxes[i] = x1, y1, x2, y2
        columns, rows = slice(int(x1), max(int(x2), int(x1) + 1)), slice(int(y1), max(int(y2), int(y1) + 1))
        masks[i, rows, columns] = 1
        if rng.random() < 0.3:  # ragged, though never empty
            masks[i] *= rng.random((height, width)) < 0.8
            masks[i, rows.start, columns.start] = 1
    return boxes, masks


def random_case(seed):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 6))
    sizes, targets, predictions = [], [], []
    for _ in range(int(rng.integers(1, 6))):
        size = (int(rng.integers(30, 90)), int(rng.integers(30, 90)))
        if seed % 3 == 0:
            size = (size[0] + 80, size[1] + 80)  # large enough for "large" objects
        boxes, masks = random_objects(rng, int(rng.choice([0, 1, 2, 5])), size)
        targets.append(
            {
                "boxes": torch.from_numpy(boxes),
                "labels": torch.from_numpy(rng.integers(1, classes + 1, len(boxes))),
                "masks": torch.from_numpy(masks.astype(np.uint8)),
                "area": torch.from_numpy(masks.sum((1, 2))),
                "iscrowd": torch.from_numpy((rng.random(len(boxes)) < 0.2).astype(np.int64)),
                "image_id": 0,
            }
        )
        many = seed % 10 == 0 and not predictions  # more than the 100 that COCO counts
        count = 130 if many else int(rng.choice([0, 1, 4, 12]))
        boxes, masks = random_objects(rng, count, size, boxes, jitter=0.08)
        scores = rng.random(count)
        if rng.random() < 0.5:
            scores = np.round(scores, 1)  # ties
        grey = np.where(masks > 0, rng.uniform(0.5, 1, masks.shape), rng.uniform(0, 0.5, masks.shape))  # 0.5 is outside
        labels = np.ones(count, np.int64) if many else rng.integers(1, classes + 1, count)
        predictions.append(
            {
                "boxes": torch.from_numpy(boxes),
                "labels": torch.from_numpy(labels),
                "scores": torch.from_numpy(scores.astype(np.float32)),
                "masks": torch.from_numpy(grey.astype(np.float32))[:, None],
            }
        )
        sizes.append(size)
    return sizes, targets, predictions


@functools.cache
def random_results(seed):
    return evaluate(*random_case(seed))


def target(boxes, labels=None, **more):
    labels = [1] * len(boxes) if labels is None else labels
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), **more}


def prediction(boxes, scores, labels=None, **more):
    return target(boxes, labels, scores=torch.tensor(scores, dtype=torch.float32), **more)


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_equals_plain_pycocotools(seed):
    sizes, targets, predictions = random_case(seed)
    results = random_results(seed)
    assert results.num_images == len(sizes)
    has_boxes = any(len(output["boxes"]) for output in [*targets, *predictions])
    assert (results.mask is not None) == has_boxes
    for kind, metrics in (("bbox", results.box), ("segm", results.mask)):
        if metrics is None:
            continue
        coco_eval = run_pycocotools(sizes, targets, predictions, kind)
        stats, precision = coco_eval.stats, coco_eval.eval["precision"]
        ours = [-1.0 if getattr(metrics, name) is None else getattr(metrics, name) for name in NAMES]
        np.testing.assert_allclose(ours, stats, rtol=0, atol=1e-9)
        for k, (label, ap) in enumerate(metrics.per_class.items()):
            expected = precision[:, :, label - 1, 0, 2]
            np.testing.assert_allclose(metrics.precision[:, :, k], expected, rtol=0, atol=1e-9)
            expected = expected[expected > -1]
            assert ap is None if not len(expected) else ap == pytest.approx(expected.mean(), abs=1e-9)


def test_the_random_cases_hold_what_they_are_for():
    """Else the comparison above could pass on easy cases only."""
    cases = [random_case(seed) for seed in range(NUM_CASES)]
    pairs = [pair for _, targets, predictions in cases for pair in zip(targets, predictions, strict=True)]
    areas = torch.cat([truth["area"] for truth, _ in pairs])
    assert (areas == 1).any() and (areas > 96**2).any() and ((areas > 32**2) & (areas < 96**2)).any()
    assert any(truth["iscrowd"].any() for truth, _ in pairs)
    assert any(len(truth["boxes"]) == 0 and len(found["boxes"]) == 0 for truth, found in pairs)
    assert any(len(truth["boxes"]) and not len(found["boxes"]) for truth, found in pairs)
    assert any(len(found["boxes"]) and not len(truth["boxes"]) for truth, found in pairs)
    assert any(len(found["boxes"]) > 100 for _, found in pairs)
    assert any(len(found["scores"].unique()) < len(found["scores"]) for _, found in pairs)
    assert any(len(truth["labels"].unique()) > 2 for truth, _ in pairs)
    aps = [random_results(seed).box.AP for seed in range(NUM_CASES)]
    assert sum(ap is not None and 0.05 < ap < 0.95 for ap in aps) > 90


def test_hand_computed_ap_of_two_objects_and_three_predictions():
    """Right at 0.9, wrong at 0.8, right at 0.7: precision 1 up to recall 0.50 (51 points), then 2/3 (50 points)."""
    first, second, elsewhere = [0, 0, 50, 60], [60, 60, 100, 110], [0, 80, 40, 120]
    box = evaluate(
        [(120, 120)], [target([first, second])], [prediction([second, elsewhere, first], [0.7, 0.8, 0.9])]
    ).box
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert box.AP == pytest.approx(expected, abs=1e-9)
    assert box.AP50 == pytest.approx(expected, abs=1e-9)
    assert box.per_class == {1: pytest.approx(expected, abs=1e-9)}
    assert (box.AR1, box.AR10, box.AR) == (0.5, 1.0, 1.0)
    assert box.AP_medium == pytest.approx(expected, abs=1e-9)  # 3000 and 2000 pixels
    assert box.AP_small is None and box.AP_large is None
    np.testing.assert_allclose(box.precision[0, :51, 0], 1)
    np.testing.assert_allclose(box.precision[0, 51:, 0], 2 / 3)


@pytest.mark.parametrize(("width", "thresholds_met"), [(100, 10), (92, 9), (62, 3), (52, 1), (48, 0)])
def test_hand_computed_ap_of_a_box_that_is_too_narrow(width, thresholds_met):
    """IoU = width / 100, so AP is the share of 0.50, 0.55 … 0.95 that it reaches."""
    box = evaluate([(100, 100)], [target([[0, 0, 100, 40]])], [prediction([[0, 0, width, 40]], [0.3])]).box
    assert box.AP == pytest.approx(thresholds_met / 10, abs=1e-9)
    assert box.AP50 == pytest.approx(float(width >= 50), abs=1e-9)
    assert box.AP75 == pytest.approx(float(width >= 75), abs=1e-9)


def test_perfect_predictions_give_one():
    masks = torch.zeros(2, 40, 50, dtype=torch.uint8)
    masks[0, 5:25, 5:30] = 1
    masks[1, 30, 40] = 1
    boxes = [[5, 5, 30, 25], [40, 30, 41, 31]]
    results = evaluate(
        [(40, 50)],
        [target(boxes, [1, 3], masks=masks)],
        [prediction(boxes, [0.9, 0.2], [1, 3], masks=masks[:, None].float())],
    )
    for metrics in (results.box, results.mask):
        assert [metrics.AP, metrics.AP50, metrics.AP75, metrics.AR] == pytest.approx([1.0] * 4, abs=1e-9)
        assert metrics.per_class == {1: pytest.approx(1.0), 3: pytest.approx(1.0)}


def test_boxes_and_masks_are_measured_apart():
    """Right boxes, of which the masks fill the wrong half."""
    truth, wrong = torch.zeros(1, 20, 20, dtype=torch.uint8), torch.zeros(1, 1, 20, 20)
    truth[0, :, :10], wrong[0, 0, :, 10:] = 1, 1
    box = [[0, 0, 20, 20]]
    results = evaluate([(20, 20)], [target(box, masks=truth)], [prediction(box, [0.9], masks=wrong)])
    assert results.box.AP == pytest.approx(1.0, abs=1e-9) and results.mask.AP == 0


def test_per_class_and_classes_without_objects():
    """Class 2 is found, class 4 missed, class 7 predicted where there is none."""
    first, second = [0, 0, 20, 20], [30, 30, 50, 50]
    box = evaluate([(60, 60)], [target([first, second], [2, 4])], [prediction([first, second], [0.9, 0.8], [2, 7])]).box
    assert box.per_class == {2: pytest.approx(1.0), 4: 0.0, 7: None}
    assert box.AP == pytest.approx(0.5, abs=1e-9)
    assert (box.precision[:, :, 2] == -1).all()


@pytest.mark.parametrize("labels", [[1], [1, 5, 9]])
def test_shape_of_precision(labels):
    boxes = [[i, 0, i + 20, 20] for i in range(len(labels))]
    box = evaluate([(40, 40)], [target(boxes, labels)], [prediction(boxes, [0.5] * len(labels), labels)]).box
    assert box.precision.shape == (10, 101, len(labels))
    assert box.precision.dtype == np.float64
    assert list(box.per_class) == labels


def test_crowds_are_neither_objects_nor_mistakes():
    boxes = [[0, 0, 20, 20], [30, 30, 60, 60]]
    inside_the_crowd = [32, 32, 42, 42]
    found = prediction([boxes[0], inside_the_crowd], [0.5, 0.9])
    crowd = target(boxes, iscrowd=torch.tensor([0, 1]))
    assert evaluate([(60, 60)], [crowd], [found]).box.AP == pytest.approx(1.0, abs=1e-9)
    assert evaluate([(60, 60)], [target(boxes)], [found]).box.AP < 0.5
    only_crowds = target(boxes, iscrowd=torch.tensor([1, 1]))
    assert evaluate([(60, 60)], [only_crowds], [found]).box.AP is None


def test_no_predictions_at_all():
    masks = torch.ones(1, 10, 10, dtype=torch.uint8)
    empty = prediction([], [], masks=torch.zeros(0, 1, 10, 10))
    results = evaluate([(10, 10)] * 2, [target([[0, 0, 10, 10]], masks=masks)] * 2, [empty] * 2)
    for metrics in (results.box, results.mask):
        assert metrics.AP == metrics.AP50 == metrics.AR == 0.0
        assert metrics.AP_large is None
        assert metrics.per_class == {1: 0.0}


@pytest.mark.parametrize("boxes", [[], [[0, 0, 10, 10]]], ids=["no predictions", "predictions"])
def test_no_objects_at_all(boxes):
    none = target([], masks=torch.zeros(0, 20, 20, dtype=torch.uint8))
    found = prediction(boxes, [0.9] * len(boxes), masks=torch.ones(len(boxes), 1, 20, 20))
    results = evaluate([(20, 20)], [none], [found])
    assert all(getattr(results.box, name) is None for name in NAMES)
    assert set(results.box.per_class.values()) <= {None}
    assert str(results.box).count("no such objects") == 12
    assert "-1" not in str(results)


def test_str_names_every_number():
    results = evaluate([(20, 20)] * 3, [target([[0, 0, 10, 10]])] * 3, [prediction([[0, 0, 10, 10]], [0.9])] * 3)
    text = str(results)
    assert text.splitlines()[0] == "3 images"
    assert [word for word in text.split() if word.startswith(("AP", "AR"))] == NAMES
    assert "AP 1.000" in text and "AP_large no such objects" in text
    assert "mask" not in text and "-1" not in text


def test_boxes_alone_give_no_mask_metrics():
    results = evaluate([(20, 20)], [target([[0, 0, 10, 10]])], [prediction([[0, 0, 10, 10]], [0.9])])
    assert results.mask is None and results.box.AP == pytest.approx(1.0, abs=1e-9)


def test_predictions_without_masks_give_no_mask_metrics():
    masks = torch.ones(1, 20, 20, dtype=torch.uint8)
    results = evaluate([(20, 20)], [target([[0, 0, 20, 20]], masks=masks)], [prediction([[0, 0, 20, 20]], [0.9])])
    assert results.mask is None


@pytest.mark.parametrize("image_ids", [["a", "b"], [7, 7], [torch.tensor([3]), torch.tensor([3])], [1, 0]])
def test_images_are_known_by_their_place(image_ids):
    first, second = [0, 0, 10, 10], [20, 20, 40, 40]
    targets = [target([box], image_id=id_) for box, id_ in zip([first, second], image_ids, strict=True)]
    right = [prediction([box], [0.9]) for box in (first, second)]
    results = evaluate([(40, 40)] * 2, targets, right)
    assert results.num_images == 2 and results.box.AP == pytest.approx(1.0, abs=1e-9)
    assert evaluate([(40, 40)] * 2, targets, right[::-1]).box.AP == 0


@pytest.mark.parametrize("missing", ["boxes", "labels", "scores"])
def test_a_prediction_that_lacks_a_part_is_refused(missing):
    prediction = {"boxes": torch.zeros(1, 4), "labels": torch.ones(1).long(), "scores": torch.ones(1)}
    target = {key: prediction[key] for key in ("boxes", "labels")}
    del prediction[missing]
    with pytest.raises(ValueError, match=f"prediction lacks {missing}"):
        compare(prediction, target, (10, 10))


def test_boxes_without_a_second_dimension_are_refused():
    nothing = {"boxes": torch.tensor([]), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    with pytest.raises(ValueError, match=r"boxes of the shape \[0\]"):
        compare(nothing, nothing, (10, 10))


def test_boxes_alone_give_no_mask_metrics_where_nothing_is_found():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    target = {"boxes": torch.tensor([[0.0, 0, 4, 4]]), "labels": torch.ones(1).long(), "masks": torch.ones(1, 10, 10)}
    assert coco_metrics([compare(nothing, target, (10, 10))]).mask is None


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        coco_metrics([])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("labels", torch.ones(2, dtype=torch.int64), "a target has 1 boxes and 2 labels"),
        ("area", torch.ones(3), "a target has 1 boxes and 3 area"),
        ("masks", torch.ones(2, 20, 20, dtype=torch.uint8), "a target has 1 boxes and 2 masks"),
        ("masks", torch.ones(1, 20, 30, dtype=torch.uint8), r"masks of \(20, 30\) pixels; its image has \(20, 20\)"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        compare(prediction([], []), target([[0, 0, 9, 9]]) | {key: value}, (20, 20))


def test_the_inputs_are_left_as_they_were():
    truth = target([[0, 0, 10, 10]], masks=torch.ones(1, 20, 20, dtype=torch.uint8))
    found = prediction([[0, 0, 9, 10]], [0.9], masks=torch.ones(1, 1, 20, 20))
    before = repr((truth, found))
    first = evaluate([(20, 20)], [truth], [found])
    assert repr((truth, found)) == before
    assert str(evaluate([(20, 20)], [truth], [found])) == str(first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_point_type_and_gradients(dtype):
    masks = torch.zeros(1, 1, 20, 20, dtype=dtype)
    masks[..., :10] = 0.7
    found = prediction([[0, 0, 10, 20]], [0.5], masks=masks.requires_grad_())
    image = compare(found, target([[0, 0, 10, 20]], masks=(masks[0] > 0.5).to(torch.uint8)), (20, 20))
    assert image.box_ious == image.mask_ious == 1.0 and image.mask_areas == 200


def test_half_is_outside_a_mask():
    masks = torch.full((1, 1, 4, 6), 0.5)
    masks[0, 0, 1, 2:5] = 0.51
    image = compare(prediction([[2, 1, 5, 2]], [0.75], masks=masks), target([[0, 0, 6, 4]]), (4, 6))
    assert image.mask_ious is None  # the target has no masks
    truth = target([[0, 0, 6, 4]], masks=torch.ones(1, 4, 6, dtype=torch.uint8))
    image = compare(prediction([[2, 1, 5, 2]], [0.75], masks=masks), truth, (4, 6))
    assert image.mask_areas == [3] and image.mask_ious == 3 / 24


def test_boxes_are_measured_in_float64():
    """The difference of two float32 numbers needs more than float32."""
    truth = target([[0.1, 0.2, 900.3, 700.7]])
    x1, y1, x2, y2 = (float(value) for value in truth["boxes"][0])
    image = compare(prediction([[0.1, 0.2, 900.3, 700.7]], [1.0]), truth, (800, 1000))
    assert image.target_areas[0] == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("seed", range(30))
def test_masks_as_predicted_give_what_pasted_ones_give(seed):
    """Boxes of all sizes, some of them partly outside the image."""
    generator = torch.Generator().manual_seed(seed)
    size = (int(torch.randint(20, 200, (), generator=generator)), int(torch.randint(20, 200, (), generator=generator)))
    corner = torch.rand(40, 2, generator=generator) * torch.tensor([size[1], size[0]]) - 10
    boxes = torch.cat([corner, corner + torch.rand(40, 2, generator=generator) ** 3 * 150 + 11], dim=1)
    small = torch.nn.functional.avg_pool2d(torch.rand(40, 1, 30, 30, generator=generator), 3, stride=1)
    truth = target(
        [[0, 0, *size[::-1]]] * 3, masks=(torch.rand(3, *size, generator=generator) > 0.4).to(torch.uint8),
        iscrowd=torch.tensor([0, 0, 1]),
    )  # fmt: skip
    found = {"boxes": boxes, "labels": torch.ones(40, dtype=torch.int64), "scores": torch.rand(40)}
    pasted = compare({**found, "masks": paste_masks_in_image(small, boxes, size)}, truth, size)
    direct = compare({**found, "roi_masks": small}, truth, size)
    assert pasted.mask_areas.any()
    np.testing.assert_array_equal(direct.mask_areas, pasted.mask_areas)
    np.testing.assert_array_equal(direct.mask_ious, pasted.mask_ious)


def test_masks_that_leave_their_box_are_measured_whole():
    masks = torch.zeros(1, 1, 40, 40)
    masks[0, 0, 5:35, 5:35] = 1
    truth = target([[5, 5, 35, 35]], masks=masks[0].to(torch.uint8))
    image = compare(prediction([[20, 20, 25, 25]], [0.9], masks=masks), truth, (40, 40))
    assert image.mask_areas == [900] and image.mask_ious == [[1.0]]


def test_matches_name_the_pairs():
    """Image 0: found, found twice. Image 1: an object missed, a detection on nothing."""
    first, second = [0, 0, 50, 60], [60, 60, 100, 110]
    near = [0, 0, 50, 40]  # IoU 2/3 with first
    box = evaluate(
        [(120, 120)] * 2,
        [target([second, first]), target([first])],
        [prediction([near, first], [0.6, 0.9]), prediction([second], [0.7])],
    ).box
    matches = box.matches[1]
    assert matches.images.tolist() == [0, 1, 0]
    assert matches.detections.tolist() == [1, 0, 0]
    np.testing.assert_allclose(matches.scores, [0.9, 0.7, 0.6])
    assert matches.targets[0].tolist() == [1, -1, -1]  # the second detection of `first` is a duplicate
    assert matches.num_objects.tolist() == [2, 1] and not matches.ignored.any()
    alone = evaluate([(120, 120)], [target([first])], [prediction([near], [0.6])]).box.matches[1]
    assert alone.targets[:, 0].tolist() == [0, 0, 0, 0, -1, -1, -1, -1, -1, -1]  # 0.50 to 0.65


@pytest.mark.parametrize("seed", range(0, NUM_CASES, 15))
def test_scores_of_the_curve_are_those_of_pycocotools(seed):
    sizes, targets, predictions = random_case(seed)
    coco_eval = run_pycocotools(sizes, targets, predictions, "bbox")
    for k, (label, ap) in enumerate(random_results(seed).box.per_class.items()):
        if ap is not None:
            expected = coco_eval.eval["scores"][:, :, label - 1, 0, 2]
            np.testing.assert_allclose(random_results(seed).box.scores[:, :, k], expected, rtol=0, atol=1e-9)


def test_detections_beyond_the_hundred_are_counted_and_said():
    box = [0, 0, 10, 10]
    results = evaluate([(20, 20)] * 2, [target([box])] * 2, [prediction([box] * 103, [0.5] * 103)] * 2)
    assert results.box.num_dropped == 6
    assert "6 detections beyond 100" in str(results)
    assert "beyond" not in str(evaluate([(20, 20)], [target([box])], [prediction([box] * 100, [0.5] * 100)]))


def bootstrap_by_evaluating_again(sizes, targets, predictions, num_samples, seed):
    rng = np.random.default_rng(seed)
    aps = []
    for _ in range(num_samples):
        drawn = rng.integers(len(sizes), size=len(sizes))
        ap = evaluate(*([values[i] for i in drawn] for values in (sizes, targets, predictions))).box.AP
        aps += [] if ap is None else [ap]
    return np.quantile(aps, [0.05, 0.95])


@pytest.mark.parametrize("seed", [7, 14, 37])
def test_bootstrap_is_that_of_evaluating_every_draw(seed):
    """Without ties in score, which pycocotools settles by the order of the images."""
    case = random_case(seed)
    for prediction in case[2]:
        prediction["scores"] += (
            torch.rand(len(prediction["scores"]), generator=torch.Generator().manual_seed(seed)) / 99
        )
    interval = bootstrap_interval(evaluate(*case).box, level=0.9, num_samples=40, seed=seed)
    np.testing.assert_allclose(interval, bootstrap_by_evaluating_again(*case, 40, seed), rtol=0, atol=1e-9)
    assert len(case[0]) > 1 and interval[0] < interval[1]


def test_bootstrap_refuses_to_resample_nothing():
    with pytest.raises(ValueError, match="no objects"):
        bootstrap_interval(evaluate([(9, 9)], [target([])], [prediction([], [])]).box)


def test_mean_and_spread():
    assert mean_and_spread([0.5, 0.6, 0.7]) == (pytest.approx(0.6), pytest.approx(0.1))
    with pytest.raises(ValueError, match="two seeds"):
        mean_and_spread([0.5])
