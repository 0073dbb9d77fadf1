"""The check of a dataset: what it finds in damaged samples, and that it is silent on good ones."""

from __future__ import annotations

import contextlib
import itertools
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision import tv_tensors
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import v2

from tutorial_lib.checks import PROBLEMS, check_dataset
from tutorial_lib.data import boxes_from_masks, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

HEIGHT, WIDTH = SIZE = (60, 80)
BOXES = [[50, 30, 62, 57], [3, 5, 20, 12], [30, 8, 36, 40]]  # each is off the middle


def good_sample(index=0):
    """Blocks of noise and three dark objects."""
    noise = torch.rand(1, 3, 10, 14, generator=torch.Generator().manual_seed(index))
    image, masks = torch.nn.functional.interpolate(noise, SIZE)[0] * 0.6 + 0.2, torch.zeros(3, *SIZE, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES, strict=True):
        mask[y1:y2, x1:x2] = 1
        image[:, y1:y2, x1:x2] *= 0.3
    objects = {"boxes": torch.tensor(BOXES).float(), "labels": torch.tensor([1, 2, 1]), "masks": masks}
    area = masks.sum(dim=(1, 2)).float()
    return image, {**objects, "image_id": index, "area": area, "iscrowd": torch.zeros(3, dtype=torch.int64)}


class Files(Dataset):
    """Good samples with file names; ``damage`` is a function for all of them, or maps an index to a function."""

    def __init__(self, count=4, damage=None, root="/data"):
        self.file_names = [f"{i}.png" for i in range(count)]
        self.damage = dict.fromkeys(range(count), damage) if callable(damage) else damage or {}
        if root:
            self.root = root

    def __len__(self):
        return len(self.file_names)

    def __getitem__(self, index):
        return self.damage.get(index, lambda *sample: sample)(*good_sample(index))


def check(dataset, num_classes=3, other=None, **options):
    return check_dataset(dataset, num_classes, other, **{"progress": False, **options})


def found(report):
    """Of each kind, the indices of the samples."""
    return {group[0].kind: [finding.index for finding in group] for group in report.grouped()}


def put(**values):
    """Damage a good sample, its image or its target: a function changes the old value, None removes it."""

    def damage(image, target):
        sample = {"image": image, **target}
        sample |= {key: value(sample[key]) if callable(value) else value for key, value in values.items()}
        return sample.pop("image"), {key: value for key, value in sample.items() if value is not None}

    return damage


def set_at(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def on_canvas(boxes, size=SIZE, format="XYXY"):
    return tv_tensors.BoundingBoxes(boxes, format=format, canvas_size=size)


EMPTY = put(**dict.fromkeys(("boxes", "labels", "masks", "area", "iscrowd"), lambda value: value[:0]))
SHORT = put(boxes=lambda boxes: boxes - torch.tensor([0, 0, 1, 1]))
LABEL_0 = put(labels=torch.tensor([1, 0, 0]))
SCALE = torch.tensor([WIDTH, HEIGHT] * 2)
FORMAT, SHAPE = "boxes in another format", "image not of shape [3, H, W]"
CANVAS, RANGE = "canvas of another size", "keypoints out of range"
FLOAT, NAN, OUTSIDE = "image is not a float32 tensor", "NaN or infinity in the image", "box outside the image"
DISAGREE, DIFFER, OUT = "box and mask disagree", "numbers of objects differ", "area or iscrowd out of range"
BAD = [  # damage, kind of problem, what its message says
    (lambda image, target: (1 / 0, target), "unreadable sample", r"ZeroDivisionError: .*test_checks\.py:\d+ in <lam"),
    (lambda image, target: image, "sample is not a pair", "type Tensor"),
    (lambda image, target: (image, target, 0), "sample is not a pair", "tuple .length 3"),
    (lambda image, target: (image, [target]), "target is not a dict", "list .length 1"),
    # The image
    (put(image=v2.ToPILImage()), FLOAT, "type Image"),
    (put(image=lambda image: (image * 255).to(torch.uint8)), FLOAT, "torch.uint8"),
    (put(image=lambda image: image * 255), "image not in [0, 1]", r"from [\d.]+ to 2\d\d\."),
    (put(image=lambda image: (image - 0.45) / 0.22), "image already normalised", r"from -\d.\d+ to \d.\d+"),
    (put(image=set_at((0, 0, 0), torch.nan)), NAN, "nan"),
    (put(image=lambda image: image[[0, 1, 2, 0]]), SHAPE, r"\[4, 60, 80\]"),
    (put(image=lambda image: image.permute(1, 2, 0)), SHAPE, r"\[60, 80, 3\]"),
    (put(image=lambda image: image[:, :0]), SHAPE, r"\[3, 0, 80\]"),
    (put(image=lambda image: image * 0 + 1), "image nearly of one value", "from 1 to 1"),
    (put(image=lambda image: image / 255), "image nearly of one value", "to 0.003"),
    # Keys, types, shapes
    (put(boxes=None), "missing key", r"^1 of \d+ samples lack boxes; this one has labels, masks"),
    (put(labels=None), "missing key", "lack labels; this"),
    (put(boxes=BOXES), "wrong type", "boxes is of type list"),
    (put(boxes=Tensor.long), "wrong type", "boxes .*int64"),
    (put(labels=torch.ones(3)), "wrong type", "labels .*float32"),
    (put(boxes=torch.tensor(BOXES[0]).float()), "wrong shape", r"boxes .* \[4\], and not \[N, 4\]"),
    (lambda *sample: put(boxes=torch.tensor([]))(*EMPTY(*sample)), "wrong shape", r"\[0\], and not \[N, 4\]"),
    (put(masks=lambda masks: masks.amax(0)), "wrong shape", r"masks .* \[60, 80\], and not \[N, 60, 80\]"),
    (put(masks=lambda masks: masks[:, :30, :40]), "wrong shape", r"masks .* \[3, 30, 40\]"),
    (put(labels=torch.tensor([1, 2])), DIFFER, "3 boxes, 2 labels, 3 masks"),
    (EMPTY, "no objects", r"\[0, 4\]"),
    (LABEL_0, "label 0", r"labels\[1\] is 0 \(2 such among 3\)"),
    (put(labels=torch.tensor([1, 2, -1])), "negative label", r"labels\[2\] is -1"),
    (put(labels=torch.tensor([1, 3, 2])), "label beyond num_classes", r"labels\[1\] is 3, num_classes is 3"),
    (put(area=set_at(1, 0)), OUT, r"area\[1\] is 0.0"),
    (put(iscrowd=set_at(2, 2)), OUT, r"iscrowd\[2\] is 2"),
    (put(image_id=torch.tensor([7])), "image_id is not an int", r"int64.*\[7\]"),
    # Boxes
    (put(boxes=set_at((1, 2), torch.nan)), "NaN or infinity in boxes", r"boxes\[1\] is \[3.0, 5.0, nan"),
    (put(boxes=lambda boxes: box_convert(boxes, "xyxy", "xywh")), FORMAT, "as XYWH they fit their masks, IoU 1.00"),
    (put(boxes=lambda boxes: on_canvas(boxes, format="XYWH")), FORMAT, "format XYWH"),
    (put(boxes=lambda boxes: box_convert(boxes, "xyxy", "cxcywh") / SCALE), FORMAT, "normalised CXCYWH"),
    (put(boxes=lambda boxes: boxes[:, [1, 0, 3, 2]]), FORMAT, "Read as YXYX"),
    (
        put(boxes=lambda boxes: on_canvas(boxes, (120, 160))),
        CANVAS,
        r"boxes .* \(120, 160\), but the image is \(60, 80\)",
    ),
    (put(boxes=lambda boxes: boxes[:, [2, 1, 0, 3]]), "box with negative size", r"\[62.0, 30.0, 50.0, 57.0\]"),
    (put(boxes=set_at((2, 2), 30)), "box without size", r"boxes\[2\] is \[30.0, 8.0, 30.0, 40.0\]"),
    (put(boxes=set_at((0, 2), 99)), OUTSIDE, r"boxes\[0\] .* in an image 80 wide and 60 high"),
    (put(masks=set_at((1, 7, 7), 3)), "mask values other than 0 and 1", r"masks\[1\] has the values \[0, 1, 3\]"),
    (put(masks=set_at(1, 0)), "empty mask", r"masks\[1\] has the values 0"),
    (put(boxes=lambda boxes: boxes[[1, 2, 0]]), DISAGREE, r"\[3.0, 5.0.*mask \[50.0, 30.*IoU 0.00"),
    (put(boxes=set_at((2, 2), 44)), DISAGREE, r"\[30.0, 8.0, 44.0, 40.0\].*IoU 0.43"),
    (put(boxes=set_at((2, 3), 52)), "box differs from its mask", r"\[30.0, 8.0, 36.0, 52.0\].*IoU 0.73"),
]


BOXES_ONLY = [
    (put(boxes=lambda boxes: box_convert(boxes, "xyxy", "xywh")), FORMAT, "as XYWH all would fit"),
    (put(boxes=lambda boxes: boxes / SCALE), FORMAT, r"are in \[0, 1\], in an image 80 wide and 60 high"),
    (put(boxes=lambda boxes: boxes * 0, area=None), "box without size", "3 such among 3"),
    (put(boxes=lambda boxes: boxes - 9), OUTSIDE, r"boxes\[1\] is \[-6.0, -4.0, 11.0, 3.0\]"),
]
POINTS = torch.tensor([[[x1, y1, 2], [x2, y2, 1], [0, 0, 0]] for x1, y1, x2, y2 in BOXES]).float()
KEYPOINTS = [
    (put(keypoints=POINTS[0]), "wrong shape", r"\[3, 3\], and not \[N, K, 3\]"),
    (put(keypoints=POINTS[..., :2]), "wrong shape", r"\[3, 3, 2\], and not \[N, K, 3\]"),
    (put(keypoints=POINTS[:2]), DIFFER, "3 iscrowd, 2 keypoints"),
    (
        put(keypoints=POINTS + torch.tensor([0, 50, 0])),
        RANGE,
        r"keypoints\[0\] is \[50.0, 80.0, 2.0, 62.*3 such among 3",
    ),
    (put(keypoints=POINTS / torch.tensor([WIDTH, HEIGHT, 1])), RANGE, r"\[0.625, 0.5, 2.0"),
    (put(keypoints=POINTS * torch.tensor([1, 1, 2])), RANGE, "50.0, 30.0, 4.0"),
]


@pytest.mark.parametrize(
    ("table", "before"), [(BAD, put()), (BOXES_ONLY, put(masks=None, area=None)), (KEYPOINTS, put(keypoints=POINTS))]
)
def test_damaged_samples_are_found_and_nothing_is_said_that_is_not_so(table, before):
    damages = [lambda *sample, damage=damage: damage(*before(*sample)) for damage, _, _ in table]
    report = check(Files(len(table), dict(enumerate(damages))))
    for index, (_, kind, message) in enumerate(table):
        findings = [finding for finding in report.findings if finding.index == index]
        assert [finding.kind for finding in findings] == [kind], (index, kind, message, findings)
        assert re.search(message, findings[0].message), (index, message, findings)
        assert findings[0].file == f"{index}.png" and findings[0].hint == PROBLEMS[kind][1]
    assert all(kind in str(report) for kind in found(report))


def test_every_kind_of_problem_is_tested():
    kinds = {kind for table in (BAD, BOXES_ONLY, KEYPOINTS) for _, kind, _ in table}
    kinds |= {kind for _, _, expected in CASES for kind in expected}
    assert kinds | {MOVE_APART, "image changes, boxes do not"} == set(PROBLEMS)


NO_OBJECTS, ONE_SHORT, SHARED = "no objects in the dataset", "boxes one pixel short", "image in both datasets"
MOVE_APART, MIRRORED = "image and boxes move apart", put(image=lambda image: image.flip(-1))
IMAGE, TARGET = good_sample()
MISSING, BINARY = "missing key", put(image=lambda image: (image > 0.5).float())
UNUSED, ONLY_OTHER, FAR = "unused labels", "labels only in the other dataset", "boxes far from right and bottom"
NOT_ONE, AREA, HIDDEN = "mask is not one object", "area of another size", "no visible keypoints"


def with_masks(masks):
    """A damage: other objects, all of class 1."""
    target = {"masks": masks, "boxes": boxes_from_masks(masks), "area": masks.sum(dim=(1, 2)).float()}
    return put(**target, labels=torch.ones(len(masks), dtype=torch.int64), iscrowd=torch.zeros(len(masks)))


def soft_edges():
    """A mask of 0 and 255 with soft edges, read as one object for each value."""
    ramp = (40 - ((torch.arange(HEIGHT)[:, None] - 30).square() + (torch.arange(WIDTH) - 40).square()).sqrt()).clip(
        0, 25
    )
    return torch.stack([(ramp.round() == value).to(torch.uint8) for value in range(1, 26)])


def labelled(*labels):
    return put(labels=torch.tensor(labels))


class WithTargets(Files):
    def get_target(self, index):
        return self[index][1]


JOINED = with_masks(TARGET["masks"].amax(dim=0, keepdim=True))
MANY = put(
    **dict.fromkeys(("boxes", "labels", "masks", "area", "iscrowd"), lambda value: value.repeat_interleave(34, 0))
)
ENLARGED = put(image=lambda image: image.repeat_interleave(2, 1).repeat_interleave(2, 2), masks=None)
CASES = [  # dataset, what else check_dataset is given, what it finds
    ([], {}, {NO_OBJECTS: [None]}),
    (Files(2, EMPTY), {}, {NO_OBJECTS: [None], "no objects": [0, 1]}),
    (Files(1, lambda *sample: 1 / 0), {}, {"unreadable sample": [0]}),  # whether it holds objects is not known
    (Files(6, {i: put(image_id=np.int64(9)) for i in (1, 3, 4)}), {}, {"image_id used more than once": [3, 4]}),
    (Files(4, {1: put(area=None), 3: put(masks=None, image_id=None)}), {}, {MISSING: [1, 3]}),
    (Files(3, put(poses=torch.ones(3), text="", size=torch.tensor(SIZE))), {}, {"key not checked": [None]}),
    (Files(2, {0: put(keypoints=POINTS), 1: put(keypoints=POINTS[:, :2])}), {}, {"wrong shape": [None]}),
    (Files(3, put(keypoints=POINTS * torch.tensor([1, 1, 0]))), {}, {HIDDEN: [0, 1, 2]}),
    (Files(3, put(iscrowd=torch.tensor([0, 1, 0]))), {}, {"crowds": [None]}),
    (Files(2, {1: MANY}), {}, {"many objects": [None]}),
    (Files(12, ENLARGED), {}, {FAR: [None]}),
    (Files(4, BINARY), {}, {"image of 0 and 1": [0, 1, 2, 3]}),
    (Files(4, put(area=lambda area: area * 4)), {}, {AREA: [0, 1, 2, 3]}),
    (Files(4, put(area=lambda area: area * 4, masks=None)), {}, {AREA: [0, 1, 2, 3]}),
    # Masks that are not instances
    (
        Files(8, {0: EMPTY} | dict.fromkeys((2, 3, 5, 6), JOINED)),
        {"num_classes": None},
        {"no objects": [0], NOT_ONE: [2, 3, 5, 6]},
    ),
    (Files(4, lambda *one: put(iscrowd=torch.ones(1))(*JOINED(*one))), {"num_classes": 2}, {"crowds": [None]}),
    (Files(4, with_masks(soft_edges())), {"num_classes": 2}, {NOT_ONE: [0, 0, 1, 1, 2, 2, 3, 3]}),
    (Files(4, with_masks(1 - TARGET["masks"].amax(dim=0, keepdim=True))), {"num_classes": 2}, {NOT_ONE: [0, 1, 2, 3]}),
    # Classes
    (Files(4), {"num_classes": 5}, {UNUSED: [None]}),
    (Files(4), {"num_classes": 4, "other": Files(2, labelled(1, 3, 3), "/b")}, {SHARED: [0, 1], ONLY_OTHER: [None]}),
    (
        Subset(Files(4), [0, 1]),
        {"num_classes": 4, "other": Subset(WithTargets(4, labelled(3, 3, 3)), [2, 3])},
        {ONLY_OTHER: [None]},
    ),
    (Files(40, {i: labelled(1, 1, 1) for i in range(1, 40)}), {}, {"rare labels": [None]}),
    (Files(4, {0: SHORT, 1: SHORT}), {}, {}),  # of few samples it can be chance
    (Files(4, {0: SHORT, 1: SHORT, 3: SHORT}), {}, {ONE_SHORT: [0, 1, 3]}),
    ([(IMAGE * 255, TARGET | {"area": torch.zeros(3)})], {}, {OUT: [0], "image not in [0, 1]": [0]}),
    # Two datasets: by name if they have the same root, and then the other is not read; else by pixels
    (Subset(Files(6), [0, 2]), {"other": Subset(Files(6), [1, 3])}, {}),
    (Subset(Files(6), [0, 2, 4]), {"other": Subset(Subset(Files(6, "unread"), [5, 4, 3]), [0, 1])}, {SHARED: [2]}),
    (Files(2), {"other": Files(2, MIRRORED, root="/other")}, {}),
    (Files(2, root=None), {"other": Files(2, MIRRORED, root=None)}, {}),
    (Files(2, root=None), {"other": Files(1, root=None)}, {SHARED: [0]}),
    ([good_sample(0), good_sample(1)], {"other": [good_sample(7), good_sample(1), None]}, {SHARED: [1]}),
    # Good samples
    ([good_sample(i) for i in range(5)], {}, {}),
    (Subset(Files(5), [3, 0, 2]), {}, {}),
    (Files(4, labelled(1, 90, 5)), {"num_classes": None}, {UNUSED: [None]}),
    (Files(10, {0: labelled(1, 2, 1), **{i: labelled(1, 1, 1) for i in range(3, 10)}}), {}, {}),  # not yet rare
    (Files(12, put(boxes=torch.tensor([[30.0, 20, 50, 40]] * 3), masks=None, area=None)), {}, {}),  # in the middle
    (Files(4, put(image=lambda image: image * 0.1)), {}, {}),  # dark
    (Files(4, {0: BINARY, 1: put(area=lambda area: area * 4)}), {}, {}),  # of few samples they can be chance
    (Files(11, dict.fromkeys((2, 3, 5, 7, 9), JOINED)), {}, {}),  # hidden in part
    (Files(4, put(keypoints=POINTS)), {}, {}),
    (Files(4, {1: put(keypoints=POINTS * torch.tensor([1, 1, 0]))}), {}, {MISSING: [0, 2, 3]}),
    (Files(4, put(masks=None)), {}, {}),
    (Files(4, put(area=None, iscrowd=None, image_id=None)), {}, {}),
    (Files(4, put(masks=Tensor.bool, boxes=Tensor.double, iscrowd=Tensor.bool, image_id=np.int64)), {}, {}),
    (Files(4, put(boxes=lambda boxes: boxes + torch.tensor([-1, -1, 1, 1]))), {}, {}),
    (Files(4, put(boxes=set_at((2, 3), 46))), {}, {}),  # with a hidden part: IoU 0.84
    (Files(4, put(image=lambda image: image[:1])), {}, {}),  # grey
]


def test_what_is_found_in_whole_datasets():
    for number, (dataset, options, expected) in enumerate(CASES):
        report = check(dataset, **options)
        assert found(report) == expected and report.num_samples == len(dataset), (number, report)
        assert report.errors or report.raise_for_errors() is report
    assert boxes_from_masks(TARGET["masks"]).tolist() == BOXES  # what it calls good is the library's, to the pixel
    thin = TARGET["masks"][:1] * (torch.arange(WIDTH) == 55).to(torch.uint8)
    report = check([(IMAGE, {"boxes": masks_to_boxes(thin), "masks": thin, "labels": torch.tensor([1])})], 2)
    assert found(report) == {"box without size": [0], ONE_SHORT: [0]} and "add 1" in report.errors[0].hint


def test_empty_masks_where_masks_to_boxes_refuses_them(monkeypatch):
    """As torchvision 0.21's does."""

    def refuse(masks):
        if not masks.flatten(1).any(dim=1).all():
            raise IndexError("max(): Expected reduction dim 0 to have non-zero size.")
        return masks_to_boxes(masks)

    monkeypatch.setattr("tutorial_lib.data.masks_to_boxes", refuse)
    report = check(Files(3, {0: put(masks=set_at(1, 0)), 2: put(masks=lambda masks: masks * 0)}))
    assert found(report) == {"empty mask": [0, 2]}


def test_only_map_style_datasets_are_taken():
    class Stream(IterableDataset):
        __len__ = __iter__ = None

    for data in (iter([]), Stream(), DataLoader(Files())):
        for arguments in ((data,), (Files(), 3, data)):
            with pytest.raises(TypeError, match=rf"__getitem__ \(of a DataLoader.*not a {type(data).__name__}"):
                check(*arguments)


COMPLEX = torch.complex64
GARBAGE = [
    (torch.zeros(3, 0, 0), {"boxes": torch.zeros(0)}),
    (torch.zeros(3, 9, 9, dtype=COMPLEX), {1: 2, None: object(), "area": torch.ones(2, dtype=COMPLEX)}),
    (torch.tensor(1.0), {"boxes": torch.tensor(1.0), "labels": None, "masks": torch.zeros(2, 2)}),
    (torch.full((3, 9, 9), torch.nan), {"boxes": torch.full((2, 4), torch.nan), "labels": torch.ones(2)}),
    (torch.rand(3, 9, 9).bfloat16(), {"boxes": torch.full((2, 4), 3e38), "labels": torch.ones(2).long()}),
    (torch.zeros(1, 2, 3, 4, 5), {"masks": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}),
    (np.array([[object()]]), {"image_id": torch.tensor(torch.nan), "boxes": [[None]]}),
    (Image.new("L", (9, 9)), {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1).long()}),
]


def test_garbage_is_reported_and_raises_nothing():
    for sample in GARBAGE:
        report = check([good_sample(), sample, "x"], other=[sample])
        assert {1, 2} <= {finding.index for finding in report.errors}, sample
        assert str(report) and repr(report) == str(report)


def test_silent_on_the_synthetic_sample(sample_root):
    for train in (False, True):
        assert not found(check(PennFudanDataset(sample_root, get_transform(train)), num_classes=2))
    train, _, test = split_dataset(PennFudanDataset(sample_root, get_transform(train=False)), (6, 3, 3), seed=0)
    assert not found(check(train, num_classes=2, other=test))
    assert len(check(train, num_classes=2, other=train.dataset).errors) == 6


def test_silent_on_the_photographs_unless_only_the_images_are_flipped(penn_fudan_root):
    for train in (False, True):
        report = check(PennFudanDataset(penn_fudan_root, get_transform(train)), num_classes=2)
        assert report.summary == "170 samples with 423 objects: 0 errors, 0 warnings"
        assert report.classes == {1: (423, 170)} and report.objects_per_image == (1, 2, 8)
    flip = v2.Compose([put(image=v2.Compose([FLIP, PHOTOMETRIC])), get_transform(train=False)])
    report = check(Subset(PennFudanDataset(penn_fudan_root, flip), range(0, 170, 10)), num_classes=2)
    assert found(report).keys() == {MOVE_APART} and len(report.errors) > 5


class Augmented(Files):
    def __init__(self, transform, count=12, keys=("boxes", "labels")):
        super().__init__(count)
        self.transform, self.keys = transform, keys

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=SIZE)
        target["masks"] = tv_tensors.Mask(target["masks"])
        return self.transform(tv_tensors.Image(image), {key: target[key] for key in self.keys})


FLIP, PHOTOMETRIC, SANITIZE = v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort(p=1), v2.SanitizeBoundingBoxes()
CROP = v2.Compose([v2.RandomResizedCrop(SIZE, (0.6, 1.0)), FLIP, SANITIZE])
TOGETHER = [
    FLIP, CROP, get_transform(train=True), put(image=v2.RandomErasing(p=0.5, scale=(0.02, 0.2))),
    v2.Compose([FLIP, v2.RandomVerticalFlip(), PHOTOMETRIC, v2.RandomInvert(), v2.RandomGrayscale(0.5)]),
    v2.Compose([v2.RandomApply([v2.GaussianBlur(5, (1, 2))]), v2.GaussianNoise(0, 0.05)]),
    v2.Compose([v2.RandomIoUCrop(), SANITIZE]), v2.Compose([v2.RandomResize(40, 90), PHOTOMETRIC]),
    v2.Compose([v2.RandomAffine(4, (0.03, 0.03)), SANITIZE]),
    lambda image, target: FLIP((image + image.flip(-1)) / 2, target),  # its own mirror image
]  # fmt: skip


def test_silent_where_image_and_boxes_move_together():
    for transform, count in itertools.product(TOGETHER, (1, 12)):
        report = check(Augmented(transform, count))
        assert found(report).keys() <= {"no objects", NO_OBJECTS, UNUSED}, str(report)  # a crop may leave none
    for transform in (FLIP, CROP):
        report = check(Augmented(transform, keys=("boxes", "labels", "masks")))
        assert found(report).keys() <= {"empty mask"}, str(report)


def test_sanitizing_that_leaves_area_behind_is_found():
    """v2.SanitizeBoundingBoxes removes boxes, labels and masks, and other tensors only if it is told to."""
    report = check(Augmented(v2.SanitizeBoundingBoxes(min_size=7), 1, ("boxes", "labels", "area", "iscrowd")))
    assert [finding.message for finding in report.errors] == ["2 boxes, 2 labels, 3 area, 3 iscrowd."]
    assert found(report).keys() == {DIFFER} and "labels_getter" in report.errors[0].hint


def test_image_that_moves_without_its_boxes_is_found():
    for count, transform, message in (
        (12, put(image=FLIP), "image flipped left to right, but the boxes stayed"),
        (1, put(image=FLIP), "image flipped left to right, but the boxes stayed"),
        (12, put(image=v2.RandomVerticalFlip()), "image flipped upside down, but the boxes stayed"),
        (12, put(image=v2.RandomHorizontalFlip(0.15)), "image flipped left to right, but the boxes stayed"),
        (12, lambda image, target: (image, FLIP(target)), "image stayed, but the boxes flipped left to right"),
    ):
        report = check(Augmented(transform, count))
        assert found(report).keys() == {MOVE_APART}, str(report)
        assert any(message in finding.message for finding in report.errors), str(report)


def test_other_moves_of_only_the_image_are_a_warning():
    crop, turn = v2.RandomResizedCrop(SIZE, (0.05, 0.3)), v2.RandomAffine(45, (0.3, 0.3))
    for transform in (turn, crop, v2.RandomPerspective(0.6, 1), v2.RandomResize(60, 120)):
        report = check(Augmented(put(image=transform)))
        resized = {CANVAS} if isinstance(transform, v2.RandomResize) else set()
        assert found(report).keys() == {"image changes, boxes do not"} | resized, str(report)


class Recorder(Files):
    """Notes random numbers; from the second reading on it raises ``error``, if there is one."""

    def __init__(self, error=None):
        super().__init__(2)
        self.error, self.noted = error, []

    def __getitem__(self, index):
        self.noted.append((torch.rand(()).item(), np.random.rand(), random.random()))
        if self.error and len(self.noted) > 1:
            raise self.error
        return super().__getitem__(index)


def test_the_check_reads_alike_each_time_and_random_numbers_go_on_as_before():
    noted = []
    for seed, error in enumerate((None, None, KeyboardInterrupt)):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        states, dataset = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()), Recorder(error)
        with pytest.raises(KeyboardInterrupt) if error else contextlib.nullcontext():
            check(dataset)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
        noted.append(dataset.noted)
    assert noted[0] == noted[1] and len(set(noted[0])) == len(noted[0]) and noted[2] == noted[0][:2]
    assert found(check(Recorder(ValueError))) == {"unreadable sample": [0, 1]}  # read again


def test_errors_name_index_file_and_how_many_more():
    with pytest.raises(ValueError) as caught:
        check(Files(8, dict.fromkeys((1, 3, 4, 5, 7), LABEL_0))).raise_for_errors()
    parts = ["sample 1 (1.png)", "sample 3 (3.png)", "sample 4 (4.png)", "labels[1] is 0", "2 more errors"]
    assert all(part in str(caught.value) for part in parts) and "5.png" not in str(caught.value)
    for dataset in (Files(5, {4: LABEL_0}), [LABEL_0(*good_sample(i)) for i in range(5)]):
        report = check(Subset(dataset, [4, 99]))  # there is no sample 99
        assert {finding.where for finding in report.errors} >= {f"sample 0{' (4.png)' * isinstance(dataset, Files)}"}


def test_report_tells_a_problem_of_many_samples_once_and_escapes_html():
    samples = [LABEL_0(*good_sample(i)) for i in range(30)]
    samples[7] = put(image_id="x", area=set_at(0, 0), iscrowd=set_at(0, 2))(*samples[7])
    report = check(samples, 2)
    text = str(report)
    assert text.startswith("30 samples with 90 objects: 32 errors, 1 warning\nobjects per image: 3 to 3, median 3\n")
    assert "label 0, 30 samples: 0, 1, 2, 3, …" in text and "out of range, sample 7\n" in text
    assert [len(group) for group in report.grouped()] == [30, 2, 1] and len(text.splitlines()) < 20
    assert text.index("label 0,") < text.index("image_id is not") and max(map(len, text.splitlines())) <= 100


def test_report_counts_the_objects_of_each_class_by_name():
    dataset = Files(4, {0: EMPTY, 2: labelled(2, 2, 2)})
    dataset.categories = ["__background__", "cat", "dog", "bird"]
    report = check(Subset(dataset, [0, 1, 2]), None)
    assert report.classes == {1: (2, 1), 2: (4, 2)} and report.objects_per_image == (0, 3, 3)
    assert "2 in      1 images: label 1 cat\n" in str(report) and "4 in      2 images: label 2 dog\n" in str(report)
    assert [finding.message for finding in report.findings if finding.kind == UNUSED] == ["1 label: bird."]
    dataset.categories = ["cat", "dog"]  # whether the background counts is not known
    assert "cat" not in str(check(dataset))


def test_message_counts_the_samples_that_lack_a_key_and_the_hint_has_the_empty_tensors():
    report = check(Files(40, {3: put(boxes=None, labels=None), 7: put(boxes=None, labels=None)}))
    assert {finding.message for finding in report.errors} == {
        "2 of 40 samples lack boxes, labels; the others have them."
    }
    assert [finding.index for finding in report.errors] == [3, 7]
    empty = re.findall(r"(\w+)=(torch.zeros\(.*?\))[,.]", report.errors[0].hint)
    image, target = put(**{key: eval(value, {"torch": torch, "H": HEIGHT, "W": WIDTH}) for key, value in empty})(
        IMAGE, {"image_id": 99}
    )
    keys = ("boxes", "labels", "masks", "image_id")
    others = [(image, {key: target[key] for key in keys}) for image, target in map(good_sample, range(3))]
    assert len(empty) == 3 and found(check([*others, (image, target)])) == {"no objects": [3]}


def test_progress_bar_goes_to_stdout_and_is_gone_at_the_end(capsys):
    for progress in (True, False):
        check(Files(), progress=progress)
        captured = capsys.readouterr()
        assert captured.err == "" and bool(captured.out) == progress
        assert not captured.out.rstrip(" ").rstrip("\r").endswith("it/s]")
