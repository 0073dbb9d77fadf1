"""The transform moves an image, its boxes and its masks together."""

import copy

import pytest
import torch
from torch import Tensor

from tutorial_lib.data import boxes_from_masks
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

KINDS = {
    "boxes": torch.float32, "labels": torch.int64, "masks": torch.uint8, "area": torch.float32, "iscrowd": torch.int64,
}  # fmt: skip


@pytest.fixture(scope="module")
def sample(sample_root) -> tuple[Tensor, dict]:
    """The synthetic image with the most people, on the first of whom it is black."""
    image, target = max(PennFudanDataset(sample_root), key=lambda sample: len(sample[1]["boxes"]))
    return image * ~target["masks"][0].bool(), target


@pytest.mark.parametrize("train", [True, False])
def test_samples_are_plain_float32_and_move_together(sample, train):
    before, means, flipped = copy.deepcopy(sample), set(), []
    for seed in range(40):
        again = []
        for _ in range(2):
            torch.manual_seed(seed)
            again.append(get_transform(train)(*sample))
        (image, target), (same, _) = again
        assert type(image) is Tensor and torch.equal(image, same)
        assert image.dtype == torch.float32 and image.shape == sample[0].shape
        assert image.min() >= 0 and 0.1 < image.max() <= 1
        assert {key: v.dtype for key, v in target.items() if type(v) is Tensor} == KINDS
        assert target["image_id"] == sample[1]["image_id"]
        assert torch.equal(target["boxes"], boxes_from_masks(target["masks"])) and len(target["boxes"]) > 1
        assert torch.equal(target["area"], target["masks"].sum(dim=(1, 2)).float())
        person = target["masks"][0].bool()
        assert image[:, person].max() < image[:, ~person].mean()  # the dark pixels are where the person is
        means.add(round(image.mean().item(), 4))
        flipped.append(not torch.equal(target["masks"], sample[1]["masks"]))
        if not train:
            torch.testing.assert_close(image, sample[0].as_subclass(Tensor) / 255, rtol=0, atol=1e-6)
    assert 10 < sum(flipped) < 30 if train else not any(flipped)
    assert len(means) > 20 if train else len(means) == 1  # colours change, which no flip does to a mean
    assert torch.equal(before[0], sample[0]) and torch.equal(before[1]["boxes"], sample[1]["boxes"])
