"""The data set check: what it finds in damaged samples, and that it is silent on good ones."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import base64
import dataclasses
import io
import random
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2

from tutorial_lib.checks import PROBLEMS, check_dataset
from tutorial_lib.penn_fudan import PennFudanDataset, boxes_from_masks, split_dataset
from tutorial_lib.transforms import get_transform

HEIGHT, WIDTH = 60, 80
BOXES = [[50, 30, 62, 57], [3, 5, 20, 12], [30, 8, 36, 40]]  # each is off the middle


def good_sample(index=0):
    """Blocks of noise, three objects; the boxes are drawn into the image."""
    noise = torch.rand(3, 10, 14, generator=torch.Generator().manual_seed(index))
    image = torch.nn.functional.interpolate(noise[None], (HEIGHT, WIDTH))[0] * 0.6 + 0.2
    boxes = torch.tensor(BOXES, dtype=torch.float32)
    masks = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES, strict=True):
        mask[y1:y2, x1:x2] = 1
        image[:, y1:y2, x1:x2] *= 0.3
    return image, {
        "boxes": boxes,
        "labels": torch.tensor([1, 2, 1]),
        "masks": masks,
        "image_id": index,
        "area": masks.sum(dim=(1, 2)).float(),
        "iscrowd": torch.zeros(3, dtype=torch.int64),
    }


def check(dataset, **options):
    return check_dataset(dataset, **{"num_classes": 3, "progress": False, **options})


class Files(Dataset):
    """Good samples with file names, as PennFudanDataset has them; ``damage`` maps an index to a damaging function."""

    def __init__(self, count=4, damage=None, root="/data", start=0):
        self.file_names = [f"{chr(97 + start + i)}.png" for i in range(count)]
        self.root, self.start, self.damage = root, start, damage or {}

    def __len__(self):
        return len(self.file_names)

    def __getitem__(self, index):
        image, target = good_sample(self.start + index)
        return self.damage.get(index, lambda *sample: sample)(image, target)


# Bad samples: each is made from the good one.


def put(**values):
    """Replace parts of the target; a function is given the old value."""

    def damage(image, target):
        return image, target | {key: value(target[key]) if callable(value) else value for key, value in values.items()}

    return damage


def put_image(change):
    return lambda image, target: (change(image), target)


def drop(key):
    return lambda image, target: (image, {name: value for name, value in target.items() if name != key})


def without_masks(damage):
    return lambda image, target: damage(*drop("masks")(image, target))


def set_at(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def to_xywh(boxes):
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


def keep_objects(count):
    keys = ("boxes", "labels", "masks", "area", "iscrowd")
    return lambda image, target: (image, target | {key: target[key][:count] for key in keys})


def raises(image, target):
    raise OSError("no such\n  photograph")


SCALE = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
BAD = {  # name: damage, kind of problem, what its message says
    "read raises": (raises, "unreadable sample", "OSError: no such photograph"),
    "not a pair": (lambda image, target: image, "sample is not a pair", "a Tensor"),
    "three parts": (lambda image, target: (image, target, 0), "sample is not a pair", "a tuple of 3"),
    "nothing": (lambda image, target: None, "sample is not a pair", "a NoneType"),
    "target a list": (lambda image, target: (image, [target]), "target is not a dict", "a list"),
    "target and image swapped": (lambda image, target: (target, image), "target is not a dict", "a Tensor"),
    # Keys, types, shapes
    "no boxes": (drop("boxes"), "missing key", '"boxes" among its keys, .*labels'),
    "no labels": (drop("labels"), "missing key", '"labels" among its keys'),
    "boxes a list": (put(boxes=BOXES), "not a tensor", "boxes is a list"),
    "labels of numpy": (put(labels=np.ones(3, int)), "not a tensor", "labels is a ndarray"),
    "masks of numpy": (put(masks=lambda masks: masks.numpy()), "not a tensor", "masks is a ndarray"),
    "area a list": (put(area=[1.0, 2.0, 3.0]), "not a tensor", "area is a list"),
    "boxes int64": (put(boxes=lambda boxes: boxes.long()), "wrong dtype", "boxes is int64"),
    "boxes float16": (put(boxes=lambda boxes: boxes.half()), "wrong dtype", "boxes is float16"),
    "labels float32": (put(labels=torch.ones(3)), "wrong dtype", "labels is float32"),
    "labels int32": (put(labels=torch.ones(3, dtype=torch.int32)), "wrong dtype", "labels is int32"),
    "masks float32": (put(masks=lambda masks: masks.float()), "wrong dtype", "masks is float32"),
    "iscrowd float32": (put(iscrowd=torch.zeros(3)), "wrong dtype", "iscrowd is float32"),
    "area complex": (put(area=torch.ones(3, dtype=torch.complex64)), "wrong dtype", "area is complex64"),
    "one box flat": (put(boxes=torch.tensor(BOXES[0]).float()), "wrong shape", r"boxes has the shape \[4\]"),
    "boxes of 5": (put(boxes=torch.ones(3, 5)), "wrong shape", r"boxes has the shape \[3, 5\]"),
    "labels of 2 dimensions": (put(labels=torch.ones(3, 1).long()), "wrong shape", r"labels has the shape \[3, 1\]"),
    "one mask for all": (put(masks=lambda masks: masks.amax(0)), "wrong shape", r"masks has the shape \[60, 80\]"),
    "masks of 4 dimensions": (put(masks=lambda masks: masks[:, None]), "wrong shape", r"\[3, 1, 60, 80\]"),
    "area a number": (put(area=torch.tensor(9.0)), "wrong shape", r"area has the shape \[\]"),
    "empty boxes": (
        lambda image, target: put(boxes=torch.tensor([]))(*keep_objects(0)(image, target)),
        "empty boxes of a wrong shape",
        r"the shape \[0\]",
    ),
    "masks resized": (
        put(masks=torch.ones(3, 30, 40, dtype=torch.uint8)),
        "masks of another size than the image",
        "masks are 40 x 30 pixels, the image 80 x 60",
    ),
    "masks transposed": (
        put(masks=lambda masks: masks.mT),
        "masks of another size than the image",
        "masks are 60 x 80 pixels, the image 80 x 60",
    ),
    "one label less": (put(labels=torch.tensor([1, 2])), "numbers of objects differ", "3 boxes, 2 labels, 3 masks"),
    "one mask more": (put(masks=lambda m: torch.cat([m, m[:1]])), "numbers of objects differ", "3 boxes, .*4 masks"),
    "one area less": (put(area=torch.ones(2)), "numbers of objects differ", "3 boxes, .*2 area"),
    "one iscrowd less": (put(iscrowd=torch.zeros(2).long()), "numbers of objects differ", "3 boxes, .*2 iscrowd"),
    "no objects": (keep_objects(0), "no objects", r"the shape \[0, 4\]"),
    # Values
    "label 0": (put(labels=torch.tensor([1, 0, 0])), "label 0", r"labels\[1\] is 0 \(2 such among 3\)"),
    "label -1": (put(labels=torch.tensor([1, 2, -1])), "negative label", r"labels\[2\] is -1"),
    "label 3 of 3": (
        put(labels=torch.tensor([1, 3, 2])), "label beyond num_classes", r"labels\[1\] is 3, num_classes is 3",
    ),
    "area 0": (put(area=set_at(1, 0)), "area or iscrowd out of range", r"area\[1\] is 0.0"),
    "area NaN": (put(area=set_at(0, torch.nan)), "area or iscrowd out of range", r"area\[0\] is nan"),
    "iscrowd 2": (put(iscrowd=set_at(2, 2)), "area or iscrowd out of range", r"iscrowd\[2\] is 2"),
    "image_id a tensor": (put(image_id=torch.tensor([7])), "image_id is a tensor", r"int64 of shape \[1\]"),
    "image_id a name": (put(image_id="a.png"), "image_id is not an int", "a str, 'a.png'"),
    # Boxes
    "box NaN": (put(boxes=set_at((1, 2), torch.nan)), "NaN or infinity in boxes", r"boxes\[1\] is \[3.0, 5.0, nan"),
    "box infinite": (put(boxes=set_at((0, 3), torch.inf)), "NaN or infinity in boxes", r"boxes\[0\] .*inf"),
    "XYWH": (put(boxes=to_xywh), "XYWH boxes", "Read as XYWH they fit their masks, IoU 1.00"),
    "XYWH without masks": (without_masks(put(boxes=to_xywh)), "XYWH boxes", "seem to be XYWH"),
    "XYWH by name": (
        put(boxes=lambda boxes: tv_tensors.BoundingBoxes(to_xywh(boxes), format="XYWH", canvas_size=(HEIGHT, WIDTH))),
        "XYWH boxes",
        "BoundingBoxes of format XYWH",
    ),
    "normalised": (put(boxes=lambda boxes: boxes / SCALE), "normalised boxes", "Read as normalised XYXY"),
    "normalised without masks": (
        without_masks(put(boxes=lambda boxes: boxes / SCALE)), "normalised boxes", r"All coordinates are in \[0, 1\]",
    ),
    "as YOLO has them": (
        put(boxes=lambda boxes: v2.functional.convert_bounding_box_format(
            boxes, tv_tensors.BoundingBoxFormat.XYXY, tv_tensors.BoundingBoxFormat.CXCYWH) / SCALE),
        "normalised boxes",
        "normalised CXCYWH",
    ),
    "x and y swapped": (put(boxes=lambda boxes: boxes[:, [1, 0, 3, 2]]), "boxes in another form", "Read as YXYX"),
    "corners swapped": (put(boxes=lambda boxes: boxes[:, [2, 1, 0, 3]]), "boxes in another form", "swapped corners"),
    "negative size": (
        without_masks(put(boxes=set_at(0, torch.tensor([70.0, 30, 60, 55])))),
        "box with negative size",
        r"boxes\[0\] is \[70.0, 30.0, 60.0, 55.0\]",
    ),
    "zero width": (put(boxes=set_at((2, 2), 30)), "box without size", r"boxes\[2\] is \[30.0, 8.0, 30.0, 40.0\]"),
    "beyond the right": (
        put(boxes=set_at((0, 2), 99)), "box outside the image", r"boxes\[0\] .* in an image 80 wide and 60 high",
    ),
    "beyond the top": (put(boxes=set_at((1, 1), -4)), "box outside the image", r"boxes\[1\] is \[3.0, -4.0"),
    "elsewhere": (
        without_masks(put(boxes=lambda boxes: boxes + 100)), "box outside the image", r"\(3 such among 3\)",
    ),
    "a pixel beyond": (
        without_masks(put(boxes=set_at((0, 3), 61))), "box a pixel outside the image", r"boxes\[0\] .*61",
    ),
    # Masks
    "masks of 255": (put(masks=lambda masks: masks * 255), "mask values other than 0 and 1", "values are 0, 255"),
    "masks of ids": (
        put(masks=lambda masks: masks * torch.tensor([1, 2, 3])[:, None, None].to(torch.uint8)),
        "mask values other than 0 and 1",
        "values are 0, 1, 2, 3",
    ),
    "empty mask": (put(masks=set_at(1, 0)), "empty mask", r"masks\[1\] is 0"),
    "other objects' boxes": (
        put(boxes=lambda boxes: boxes[[1, 2, 0]]), "box and mask disagree", r"\[3.0, 5.0.*mask \[50.0, 30.*IoU 0.00",
    ),
    "box beside its mask": (put(boxes=set_at(2, torch.tensor([40.0, 8, 46, 40]))), "box and mask disagree", "IoU 0.00"),
    "box too wide": (put(boxes=set_at((2, 2), 44)), "box and mask disagree", r"\[30.0, 8.0, 44.0, 40.0\].*IoU 0.43"),
    "box of hidden parts": (
        put(boxes=set_at((2, 3), 52)), "box differs from its mask", r"\[30.0, 8.0, 36.0, 52.0\].*IoU 0.73",
    ),
    "boxes by masks_to_boxes": (
        put(boxes=lambda boxes: boxes - torch.tensor([0, 0, 1, 1])), "boxes one pixel short", "one pixel before",
    ),
    # Images
    "PIL image": (put_image(v2.ToPILImage()), "image is not a tensor", "PIL.Image.Image"),
    "image of numpy": (put_image(lambda image: image.numpy()), "image is not a tensor", "numpy.ndarray"),
    "uint8": (put_image(lambda image: (image * 255).to(torch.uint8)), "image not float32", "It is uint8"),
    "float64": (put_image(lambda image: image.double()), "image not float32", "It is float64"),
    "0 to 255": (put_image(lambda image: image * 255), r"image not in [0, 1]", r"from [\d.]+ to 2\d\d\."),
    "normalised image": (
        put_image(lambda image: (image - 0.45) / 0.22), "image already normalised", r"from -\d.\d+ to \d.\d+",
    ),
    "image NaN": (put_image(set_at((0, 0, 0), torch.nan)), "NaN or infinity in the image", "1 of its 14400"),
    "image infinite": (put_image(set_at((0, 0, 0), torch.inf)), "NaN or infinity in the image", "1 of its 14400"),
    "1 channel": (put_image(lambda image: image[:1]), "grey image", r"\[1, 60, 80\]"),
    "2 channels": (put_image(lambda image: image[:2]), "image without 3 channels", r"\[2, 60, 80\]"),
    "4 channels": (put_image(lambda image: image[[0, 1, 2, 0]]), "image without 3 channels", r"\[4, 60, 80\]"),
    "no channels": (put_image(lambda image: image[0]), "image without 3 channels", r"\[60, 80\]"),
    "a batch": (put_image(lambda image: image[None]), "image without 3 channels", r"\[1, 3, 60, 80\]"),
    "channels last": (put_image(lambda image: image.permute(1, 2, 0)), "image in another layout", r"\[60, 80, 3\]"),
    "one row": (put_image(lambda image: image[:, :1]), "image too small", r"\[3, 1, 80\]"),
    "no pixels": (put_image(lambda image: image[:, :0]), "image too small", r"\[3, 0, 80\]"),
}  # fmt: skip

# What a kind of damage brings with it.
ALSO = {
    "three parts": set(),
    "target and image swapped": {"image is not a tensor"},
    "one row": {"box outside the image", "masks of another size than the image"},
    "no pixels": {"box outside the image", "masks of another size than the image"},
}


@pytest.mark.parametrize(("damage", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_damaged_sample_is_found_and_named_with_what_to_do(request, damage, kind, message):
    systematic = kind == "boxes one pixel short"  # told only where most samples have it
    report = check(Files(4, damage={2: damage} | (dict.fromkeys((0, 3), damage) if systematic else {})))
    found = [finding for finding in report.findings if finding.kind == kind and finding.index == 2]
    assert len(found) == 1, report
    (finding,) = found
    assert finding.file == "c.png"
    assert re.search(message, finding.message), finding.message
    assert finding.hint and finding.severity in ("error", "warning")
    # Nothing is said that is not so.
    others = {other.kind for other in report.findings} - {kind}
    assert others <= ALSO.get(request.node.callspec.id, set()), report
    for part in (kind, finding.message.split()[0], "2 (c.png)", "→"):
        assert part in str(report)
    assert kind in report._repr_html_()


def test_the_table_covers_every_problem_of_a_sample():
    elsewhere = {"empty data set", "no objects in the data set", "image_id used more than once"}
    elsewhere |= {"image and boxes move apart", "image changes, boxes do not", "image in both data sets"}
    assert {kind for _, kind, _ in BAD.values()} | elsewhere == set(PROBLEMS)
    assert len(BAD) >= 40


WARNINGS = {
    "grey image", "no objects", "image_id is a tensor", "image_id is not an int", "box a pixel outside the image",
    "box differs from its mask", "boxes one pixel short", "image changes, boxes do not",
}  # fmt: skip


def test_all_else_is_an_error():
    assert {kind for kind, (severity, _) in PROBLEMS.items() if severity == "warning"} == WARNINGS


def test_empty_data_set():
    report = check([])
    assert [finding.kind for finding in report.errors] == ["empty data set"]
    assert report.errors[0].where == "data set" and report.num_samples == 0
    assert "empty data set" in str(report) and "empty data set" in report._repr_html_()


def test_data_set_without_any_object():
    report = check(Files(3, damage=dict.fromkeys(range(3), keep_objects(0))))
    assert [finding.kind for finding in report.errors] == ["no objects in the data set"]
    assert [finding.index for finding in report.warnings] == [0, 1, 2]


def test_image_ids_used_twice_are_reported_once_with_their_samples():
    report = check(Files(6, damage={1: put(image_id=9), 3: put(image_id=9), 4: put(image_id=torch.tensor([9]))}))
    (finding,) = report.errors
    assert finding.kind == "image_id used more than once" and finding.index == 1
    assert "samples 1, 3, 4 have the image_id 9" in finding.message
    assert [finding.index for finding in check(Files(6, damage={5: put(image_id=2)})).errors] == [2]


def test_one_pixel_short_counts_only_where_most_are():
    short = put(boxes=lambda boxes: boxes - torch.tensor([0, 0, 1, 1]))
    assert not check(Files(4, damage={0: short, 1: short})).findings
    report = check(Files(4, damage={0: short, 1: short, 3: short}))
    assert [(finding.kind, finding.index) for finding in report.warnings] == [
        ("boxes one pixel short", index) for index in (0, 1, 3)
    ]


def test_several_problems_of_one_sample_are_all_told():
    def damage(image, target):
        return image * 255, target | {"labels": torch.tensor([0, 1, 9]), "masks": target["masks"] * 255}

    kinds = {finding.kind for finding in check(Files(damage={0: damage})).findings}
    assert kinds == {
        "image not in [0, 1]", "label 0", "label beyond num_classes", "mask values other than 0 and 1"
    }  # fmt: skip


def test_labels_have_no_upper_bound_without_num_classes():
    big = put(labels=torch.tensor([1, 90, 5]))
    assert not check(Files(damage={0: big}), num_classes=None).findings


@pytest.mark.parametrize("data", [iter([]), 5, None, (sample for sample in [good_sample()])], ids=type)
def test_what_has_no_length_or_index_is_refused(data):
    with pytest.raises(TypeError, match=r"__len__ and __getitem__.*not a " + type(data).__name__):
        check(data)


def test_loaders_and_iterable_data_sets_are_refused():
    class Stream(IterableDataset):
        def __len__(self):
            return 1

        def __iter__(self):
            yield good_sample()

    for data in (Stream(), DataLoader(Files())):
        with pytest.raises(TypeError, match=r"its \.dataset"):
            check(data)
    with pytest.raises(TypeError, match="Stream"):
        check(Files(), other=Stream())


# Silence on good data


def assert_silent(report):
    assert not report.findings, str(report)
    assert report.raise_for_errors() is report
    assert "0 errors, 0 warnings" in str(report)


@pytest.mark.parametrize("wrap", [list, tuple, lambda data: Subset(data, [3, 0, 2]), lambda data: data])
def test_silent_on_good_samples(wrap):
    dataset = Files(5)
    data = wrap([dataset[i] for i in range(5)]) if wrap in (list, tuple) else wrap(dataset)
    report = check(data)
    assert_silent(report)
    assert (report.num_samples, report.num_objects) == (len(data), 3 * len(data))


@pytest.mark.parametrize(
    "change",
    [
        drop("masks"), drop("area"), drop("iscrowd"), drop("image_id"),
        put(masks=lambda masks: masks.bool()), put(boxes=lambda boxes: boxes.double()),
        put(iscrowd=torch.tensor([False, True, False])), put(image_id=lambda number: np.int64(number)),
        put(boxes=lambda boxes: boxes + torch.tensor([-1, -1, 1, 1])),
        put(boxes=set_at((2, 3), 46)),  # an amodal box, IoU 0.84
        put_image(tv_tensors.Image),
    ],
)  # fmt: skip
def test_silent_on_other_good_samples(change):
    assert_silent(check(Files(4, damage=dict.fromkeys(range(4), change))))


def test_silent_on_the_drawn_sample(sample_root):
    for train in (False, True):
        assert_silent(check(PennFudanDataset(sample_root, get_transform(train)), num_classes=2))


@pytest.mark.parametrize("train", [False, True])
def test_silent_on_the_photographs(penn_fudan_root, train):
    report = check(PennFudanDataset(penn_fudan_root, get_transform(train)), num_classes=2)
    assert_silent(report)
    assert (report.num_samples, report.num_objects) == (170, 423)


# Augmentations


class Augmented(Files):
    def __init__(self, transform, count=12, masks=False):
        super().__init__(count)
        self.transform, self.masks = transform, masks

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(HEIGHT, WIDTH))
        target["masks"] = tv_tensors.Mask(target["masks"])
        target = {key: target[key] for key in ("boxes", "labels", "masks")[: 3 if self.masks else 2]}
        return self.transform(tv_tensors.Image(image), target)


def image_alone(transform):
    return lambda image, target: (transform(image), target)


def boxes_alone(transform):
    return lambda image, target: (image, target | {"boxes": transform(target["boxes"])})


PHOTOMETRIC = v2.RandomPhotometricDistort(p=1)
GOOD_TRANSFORMS = {
    "flip": v2.RandomHorizontalFlip(0.5),
    "both flips and colours": v2.Compose(
        [v2.RandomHorizontalFlip(0.5), v2.RandomVerticalFlip(0.5), PHOTOMETRIC, v2.RandomInvert(0.5)]
    ),
    "grey": v2.RandomGrayscale(0.5),
    "blur": v2.RandomApply([v2.GaussianBlur(5, (1, 2))]),
    "noise": v2.GaussianNoise(0, 0.05),
    "erasing": lambda image, target: (v2.RandomErasing(p=0.5, scale=(0.02, 0.2))(image), target),
    "crop to one size": v2.Compose(
        [v2.RandomResizedCrop((HEIGHT, WIDTH), (0.6, 1.0)), v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes()]
    ),
    "IoU crop": v2.Compose([v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes()]),
    "resize": v2.Compose([v2.RandomResize(40, 90), PHOTOMETRIC]),
    "small turns": v2.Compose([v2.RandomAffine(4, (0.03, 0.03)), v2.SanitizeBoundingBoxes()]),
    "get_transform": get_transform(train=True),
}


@pytest.mark.parametrize("transform", GOOD_TRANSFORMS.values(), ids=GOOD_TRANSFORMS.keys())
@pytest.mark.parametrize("count", [1, 12])
def test_silent_where_image_and_boxes_move_together(transform, count):
    report = check(Augmented(transform, count))
    kinds = {finding.kind for finding in report.findings} - {"no objects", "no objects in the data set"}
    assert not kinds, str(report)  # a crop may lose all objects


@pytest.mark.parametrize(
    "transform", [v2.RandomHorizontalFlip(), v2.RandomResizedCrop((HEIGHT, WIDTH), (0.6, 1.0))], ids=["flip", "crop"]
)
def test_silent_where_masks_move_too(transform):
    report = check(Augmented(v2.Compose([transform, v2.SanitizeBoundingBoxes()]), masks=True))
    assert not {finding.kind for finding in report.findings} - {"empty mask"}, str(report)


def test_silent_where_the_image_is_its_own_mirror_image():
    """Whether it was flipped cannot be seen, so nothing is said of boxes that were."""

    def flip(image, target):
        return v2.RandomHorizontalFlip()((image + image.flip(-1)) / 2, target)

    assert_silent(check(Augmented(flip)))


def test_sanitizing_that_leaves_area_behind_is_found():
    """v2.SanitizeBoundingBoxes drops boxes, labels and masks, but no other tensor unless it is told to."""

    def transforms(image, target):
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(HEIGHT, WIDTH))
        return v2.SanitizeBoundingBoxes(min_size=7)(image, target | {"boxes": boxes})

    report = check(Files(3, damage={1: transforms}))
    (finding,) = report.errors
    assert finding.kind == "numbers of objects differ" and "2 boxes, 2 labels" in finding.message
    assert "3 area, 3 iscrowd" in finding.message and "labels_getter" in finding.hint


APART = {
    "image left to right": (image_alone(v2.RandomHorizontalFlip()), "flipped left to right, but boxes stayed"),
    "image upside down": (image_alone(v2.RandomVerticalFlip()), "flipped upside down, but boxes stayed"),
    "image with colours": (
        image_alone(v2.Compose([v2.RandomHorizontalFlip(), PHOTOMETRIC])),
        "flipped left to right, but boxes stayed",
    ),
    "boxes": (boxes_alone(v2.RandomHorizontalFlip()), "the image stayed, but boxes flipped left to right"),
    "seldom": (image_alone(v2.RandomHorizontalFlip(0.15)), "(flipped left to right, but boxes stayed)"),
}


@pytest.mark.parametrize(("transform", "message"), APART.values(), ids=APART.keys())
def test_image_that_moves_without_its_boxes_is_found(transform, message):
    report = check(Augmented(transform))
    assert report.errors and {finding.kind for finding in report.findings} == {"image and boxes move apart"}
    assert any(re.search(message, finding.message) for finding in report.errors), str(report)
    assert all(finding.file == "abcdefghijkl"[finding.index] + ".png" for finding in report.errors)
    with pytest.raises(ValueError, match="tv_tensors"):
        report.raise_for_errors()


def test_flip_of_one_sample_alone_is_found():
    report = check(Augmented(image_alone(v2.RandomHorizontalFlip()), count=1))
    assert [finding.kind for finding in report.errors] == ["image and boxes move apart"]


def test_flip_of_photographs_alone_is_found(penn_fudan_root):
    flip = v2.Compose([v2.RandomHorizontalFlip(), PHOTOMETRIC, v2.ToDtype(torch.float32, scale=True)])
    plain = v2.ToPureTensor()

    def transforms(image, target):
        return plain(flip(image), target)

    part = Subset(PennFudanDataset(penn_fudan_root, transforms), range(0, 170, 10))
    report = check(part, num_classes=2)
    assert {finding.kind for finding in report.findings} == {"image and boxes move apart"}
    assert len(report.errors) > 5


@pytest.mark.parametrize(
    "transform",
    [v2.RandomAffine(45, (0.3, 0.3)), v2.RandomResizedCrop((HEIGHT, WIDTH), (0.05, 0.3)), v2.RandomPerspective(0.6, 1)],
    ids=["turn and shift", "crop", "perspective"],
)
def test_other_moves_of_the_image_alone_are_a_warning(transform):
    report = check(Augmented(image_alone(transform)))
    assert {finding.kind for finding in report.warnings} == {"image changes, boxes do not"}
    assert not report.errors


def test_reading_that_fails_the_second_time_is_found():
    class Once(Files):
        seen = ()

        def __getitem__(self, index):
            if index in self.seen:
                raise RuntimeError("used up")
            self.seen += (index,)
            return super().__getitem__(index)

    report = check(Once(3))
    assert [(finding.kind, finding.index) for finding in report.errors] == [
        ("unreadable sample", index) for index in range(3)
    ]


# Random numbers


class Drawing(Files):
    fails = False

    def __getitem__(self, index):
        self.drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
        if self.fails:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.parametrize("fails", [False, True])
def test_random_numbers_go_on_as_if_nothing_had_been_read(fails):
    dataset = Drawing(2)
    dataset.drawn, dataset.fails = [], fails
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    try:
        check(dataset)
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert dataset.drawn


def test_the_check_reads_alike_each_time():
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        dataset = Drawing(2)
        dataset.drawn = []
        check(dataset)
        drawn.append(dataset.drawn)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == len(drawn[0])


# Two data sets


def test_images_shared_by_name_are_found_through_subsets():
    first, second = Subset(Files(6), [0, 2, 4]), Subset(Subset(Files(6), [5, 4, 3, 2]), [0, 1, 3])
    report = check(first, other=second)
    assert [(finding.index, finding.file) for finding in report.errors] == [(1, "c.png"), (2, "e.png")]
    assert "sample 2 of the other" in report.errors[0].message and "sample 1 of the" in report.errors[1].message
    assert_silent(check(Subset(Files(6), [0, 2]), other=Subset(Files(6), [1, 3])))


def test_names_are_compared_without_reading_the_other():
    class Unreadable(Files):
        def __getitem__(self, index):
            raise AssertionError("read")

    assert len(check(Files(2), other=Unreadable(2)).errors) == 2


def test_same_names_in_other_folders_are_other_images():
    class Later(Files):
        def __getitem__(self, index):
            return good_sample(index + 50)

    assert_silent(check(Files(2), other=Later(2, root="/other")))


def test_images_shared_by_pixels_are_found():
    report = check([good_sample(0), good_sample(1)], other=[good_sample(7), good_sample(1), None])
    (finding,) = report.errors
    assert (finding.kind, finding.index) == ("image in both data sets", 1) and "sample 1 of" in finding.message
    report = check(Files(2), other=Files(2, root="/copy", start=1))
    assert [(finding.index, finding.file) for finding in report.errors] == [(1, "b.png")]
    assert_silent(check([good_sample(0)], other=[good_sample(1)]))


def test_a_split_shares_nothing(sample_root):
    train, _, test = split_dataset(PennFudanDataset(sample_root, get_transform(train=False)), (6, 3, 3), seed=0)
    assert_silent(check(train, num_classes=2, other=test))
    assert len(check(train, num_classes=2, other=train.dataset).errors) == 6


def test_file_of_a_subset_is_that_of_its_index():
    report = check(Subset(Files(5, damage={4: put(labels=torch.tensor([0, 1, 1]))}), [1, 4, 0]))
    assert [(finding.index, finding.file) for finding in report.errors] == [(1, "e.png")]


def test_subset_with_indices_that_are_not_there():
    report = check(Subset([good_sample()], [0, 5]))
    assert [(finding.kind, finding.index) for finding in report.errors] == [("unreadable sample", 1)]
    report = check(Subset(Files(2), [0, 7]))
    assert report.num_samples == 2


def test_file_is_none_where_it_is_not_known():
    report = check([good_sample(), put(labels=torch.tensor([0, 1, 1]))(*good_sample(1))])
    assert [(finding.index, finding.file, finding.where) for finding in report.errors] == [(1, None, "sample 1")]


# The report


def test_raise_for_errors_names_index_file_and_how_many_more():
    dataset = Files(8, damage=dict.fromkeys((1, 3, 4, 5, 7), put(labels=torch.tensor([1, 0, 2]))))
    with pytest.raises(ValueError) as caught:
        check(dataset).raise_for_errors()
    text = str(caught.value)
    for part in ("sample 1 (b.png)", "sample 3 (d.png)", "sample 4 (e.png)", "labels[1] is 0", "2 more errors"):
        assert part in text
    assert "f.png" not in text and PROBLEMS["label 0"][1] in text


def test_warnings_do_not_raise():
    report = check(Files(damage={0: put(image_id=torch.tensor([0]))}))
    assert report.warnings and report.raise_for_errors() is report


def test_same_problem_on_many_images_is_printed_once():
    samples = [put(labels=torch.tensor([1, 0, 2]))(*good_sample(i)) for i in range(30)]
    samples[7] = put(image_id="x")(*samples[7])
    report = check(samples)
    text = str(report)
    assert text.startswith("30 samples with 90 objects: 30 errors, 1 warning")
    assert text.count("label 0") == 1 and "30 samples: 0, 1, 2, 3, …" in text
    assert text.index("label 0") < text.index("image_id is not an int") and len(text.splitlines()) < 12
    assert [len(group) for group in report.grouped()] == [30, 1]
    assert max(map(len, text.splitlines())) <= 110
    assert repr(report) == "<Report 30 samples with 90 objects: 30 errors, 1 warning>"


def test_report_and_findings_are_frozen():
    report = check(Files(damage={0: put(image_id="x")}))
    for thing, name in ((report, "num_samples"), (report.findings[0], "index")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 1)


def pictures(html):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(html)
    assert {tag for tag, _ in found} <= {"p", "b", "table", "tr", "th", "td", "div", "img"}
    sources = [attributes["src"] for tag, attributes in found if tag == "img"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]


def test_html_is_escaped_and_shows_the_worst_samples():
    def bad(image, target):
        return image, target | {"labels": torch.tensor([0, 7, -1])}

    dataset = Files(6, damage={1: put(image_id="<script>alert(1)</script>"), 4: bad, 5: raises})
    dataset.file_names[4] = '"><img src=x onerror=alert(2)>'
    report = check(dataset)
    html = report._repr_html_()
    assert "<script" not in html and "<img src=x" not in html
    assert "&lt;script&gt;" in html and "&lt;img src=x" in html
    shown = pictures(html)
    assert len(shown) == 2 and all(min(image.size) > 100 for image in shown)  # sample 5 has no picture
    assert report.worst[0][0].index == 4
    assert np.asarray(shown[0].convert("L")).std() > 20  # not blank


def test_at_most_three_pictures_and_no_open_figures():
    mine = plt.figure()
    report = check(Files(8, damage=dict.fromkeys(range(8), put(labels=torch.tensor([0, 1, 1])))))
    assert len(pictures(report._repr_html_())) == 3
    assert plt.get_fignums() == [mine.number] and plt.gcf() is mine
    plt.close("all")


def test_html_of_a_good_data_set_has_no_table():
    html = check(Files())._repr_html_()
    assert pictures(html) == [] and "<table" not in html and "0 errors, 0 warnings" in html


GARBAGE = {
    "nothing": (None, None),
    "words": ("image", "target"),
    "no pixels": (torch.zeros(3, 0, 0), {"boxes": torch.zeros(0)}),
    "complex": (torch.zeros(3, 9, 9, dtype=torch.complex64), {1: 2, None: object()}),
    "one number": (torch.tensor(1.0), {"boxes": torch.tensor(1.0), "labels": None, "masks": torch.zeros(2, 2)}),
    "all NaN": (torch.full((3, 9, 9), torch.nan), {"boxes": torch.full((2, 4), torch.nan), "labels": torch.ones(2)}),
    "huge boxes": (torch.rand(3, 9, 9), {"boxes": torch.full((2, 4), 3e38), "labels": torch.ones(2).long()}),
    "five dimensions": (torch.zeros(1, 2, 3, 4, 5), {"masks": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}),
    "booleans": (torch.ones(3, 9, 9, dtype=torch.bool), {"boxes": torch.ones(1, 4, dtype=torch.bool), "labels": []}),
    "array of objects": (np.array([[object()]]), {"image_id": torch.tensor(torch.nan), "boxes": [[None]]}),
    "grey PIL": (Image.new("L", (9, 9)), {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1).long()}),
}


@pytest.mark.parametrize("sample", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_reported_and_raises_nothing(sample):
    report = check([good_sample(), sample, "x"], other=[sample])
    assert {1, 2} <= {finding.index for finding in report.errors}
    assert str(report)
    pictures(report._repr_html_())
    assert plt.get_fignums() == []


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar_goes_to_stdout_and_is_gone_at_the_end(capsys, progress):
    check(Files(), progress=progress)
    captured = capsys.readouterr()
    assert captured.err == "" and bool(captured.out) == progress
    assert not captured.out.rstrip(" ").rstrip("\r").endswith("it/s]")


def test_boxes_of_masks_are_the_librarys():
    """The check calls good what ``boxes_from_masks`` gives, to the pixel."""
    _, target = good_sample()
    assert boxes_from_masks(target["masks"]).tolist() == BOXES
