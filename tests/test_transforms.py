from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from tutorial_lib.penn_fudan import PennFudanDataset, boxes_from_masks
from tutorial_lib.transforms import get_transform

SEEDS = range(40)


@pytest.fixture(scope="module")
def sample(sample_root) -> tuple[Tensor, dict]:
    """The drawn image with the most people."""
    dataset = PennFudanDataset(sample_root)
    return max((dataset[index] for index in range(len(dataset))), key=lambda sample: len(sample[1]["boxes"]))


@pytest.fixture(scope="module")
def halves() -> tuple[Tensor, dict]:
    """Black at the left, where the one object is, and white at the right."""
    image, mask = torch.zeros(3, 8, 12, dtype=torch.uint8), torch.zeros(1, 8, 12, dtype=torch.uint8)
    image[:, :, 6:] = 255
    mask[:, :, :6] = 1
    boxes = tv_tensors.BoundingBoxes(boxes_from_masks(mask), format="XYXY", canvas_size=(8, 12))
    return tv_tensors.Image(image), {"boxes": boxes, "masks": tv_tensors.Mask(mask), "image_id": 0}


def with_seed(seed: int, transform: v2.Transform, sample: tuple) -> tuple:
    torch.manual_seed(seed)
    return transform(*sample)


def alike(one: tuple, other: tuple) -> bool:
    (a, s), (b, t) = one, other
    return torch.equal(a, b) and all(torch.equal(s[k], t[k]) if torch.is_tensor(s[k]) else s[k] == t[k] for k in s)


@pytest.mark.parametrize("index", range(12))
def test_flip_moves_boxes_onto_the_flipped_masks(sample_root, index):
    image, target = PennFudanDataset(sample_root)[index]
    flipped_image, flipped = v2.RandomHorizontalFlip(p=1)(image, target)
    assert torch.equal(flipped_image, image.flip(-1))
    assert torch.equal(flipped["masks"], target["masks"].flip(-1))
    assert torch.equal(flipped["boxes"].as_subclass(Tensor), boxes_from_masks(flipped["masks"].as_subclass(Tensor)))
    assert not torch.equal(flipped["boxes"], target["boxes"])


def test_flip_of_a_real_photograph(penn_fudan_root):
    for index in range(0, 170, 17):
        flipped = v2.RandomHorizontalFlip(p=1)(*PennFudanDataset(penn_fudan_root)[index])[1]
        assert torch.equal(flipped["boxes"].as_subclass(Tensor), boxes_from_masks(flipped["masks"].as_subclass(Tensor)))


@pytest.mark.parametrize("train", [True, False])
def test_output_is_plain_float32_in_0_to_1(sample, train):
    kinds = {
        "boxes": torch.float32, "labels": torch.int64, "masks": torch.uint8, "area": torch.float32,
        "iscrowd": torch.int64,
    }  # fmt: skip
    for seed in SEEDS:
        image, target = with_seed(seed, get_transform(train), sample)
        assert type(image) is Tensor and image.dtype == torch.float32 and image.shape == sample[0].shape
        assert image.min() >= 0 and 0.1 < image.max() <= 1
        assert {key: value.dtype for key, value in target.items() if key != "image_id"} == kinds
        assert all(type(target[key]) is Tensor for key in kinds)
        assert target["image_id"] == sample[1]["image_id"]


@pytest.mark.parametrize("train", [True, False])
def test_boxes_and_area_agree_with_the_masks(sample, train):
    for seed in SEEDS:
        _, target = with_seed(seed, get_transform(train), sample)
        assert len(target["masks"]) == len(sample[1]["masks"]) > 1
        assert torch.equal(target["boxes"], boxes_from_masks(target["masks"]))
        assert torch.equal(target["area"], target["masks"].sum(dim=(1, 2)).float())


def test_image_moves_with_its_masks(halves):
    """The object is the dark half before and after, whatever happens to the colours."""
    left = 0
    for seed in SEEDS:
        image, target = with_seed(seed, get_transform(train=True), halves)
        inside = target["masks"][0].bool()
        assert image[:, inside].max() < image[:, ~inside].min()
        left += int(target["masks"][0, 0, 0])
    assert 0.25 * len(SEEDS) < left < 0.75 * len(SEEDS)


def test_training_images_change_in_colour(sample):
    """Their mean, which no flip changes, does not stay."""
    means = {round(with_seed(seed, get_transform(train=True), sample)[0].mean().item(), 4) for seed in SEEDS}
    assert len(means) > len(SEEDS) / 2


def test_other_images_are_left_as_they_are(sample):
    image, target = sample
    for seed in SEEDS[:5]:
        converted, same = with_seed(seed, get_transform(train=False), sample)
        torch.testing.assert_close(converted, image.as_subclass(Tensor).float() / 255, rtol=0, atol=1e-6)
        assert torch.equal(same["masks"], target["masks"]) and torch.equal(same["boxes"], target["boxes"])


def test_same_seed_gives_the_same_result(sample):
    results = [[with_seed(seed, get_transform(train=True), sample) for seed in SEEDS[:8]] for _ in range(2)]
    assert all(alike(one, other) for one, other in zip(*results, strict=True))
    assert not all(alike(results[0][0], other) for other in results[0][1:])


def test_input_is_not_changed(sample):
    image, target = sample
    before = image.clone(), {k: v.clone() if torch.is_tensor(v) else v for k, v in target.items()}
    with_seed(0, get_transform(train=True), sample)
    assert alike(before, sample) and image.dtype == torch.uint8


def test_image_without_people():
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(8, 12)),
        "masks": tv_tensors.Mask(torch.zeros(0, 8, 12, dtype=torch.uint8)),
    }
    image = tv_tensors.Image(torch.zeros(3, 8, 12, dtype=torch.uint8))
    for seed in SEEDS[:8]:
        moved = with_seed(seed, get_transform(train=True), (image, target))[1]
        assert moved["boxes"].shape == (0, 4) and moved["masks"].shape == (0, 8, 12)


def test_data_set_applies_the_transform(sample_root):
    image, target = PennFudanDataset(sample_root, get_transform(train=False))[3]
    assert type(image) is Tensor and image.dtype == torch.float32
    assert torch.equal(target["boxes"], boxes_from_masks(target["masks"]))
