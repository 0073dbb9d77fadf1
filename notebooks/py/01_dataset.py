# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Build a detection dataset: PennFudan, its masks and boxes
#
# You turn a folder of photographs and masks into what torchvision's detection models
# train on: images, and targets with boxes, labels and masks.

# %% [markdown]
# ## What you'll do
#
# - take a mask apart by hand, and see why `masks_to_boxes` makes boxes too small;
# - write the dataset class, its transforms, a seeded split and a `DataLoader`;
# - plot how many people there are, and how large.
#
# **You need** to have seen a `Dataset` before. No knowledge of detection, no GPU.
# It takes less than a minute on one CPU core, and downloads 51 MB the first time.

# %% [markdown]
# ## Set-up
#
# The notebooks import a small library, `tutorial_lib`. This cell installs it where
# it is missing, as on Colab, and leaves PyTorch as it is.

# %% tags=["set-up"]
import importlib.util

ADDRESS = ""
if importlib.util.find_spec("tutorial_lib") is None:
    assert ADDRESS, "tutorial_lib is missing: set ADDRESS, or pip install a clone of this project"
    packages = f"tutorial_lib@git+{ADDRESS} pycocotools defusedxml"
    get_ipython().run_line_magic("pip", f"install -q --no-deps {packages}")

# %% [markdown]
# The preset decides where the data come from. Choose it in this cell, as in
# `choose_preset("laptop")`, or with the environment variable `TUTORIAL_PRESET`. If you choose
# nothing, it is `full` where there is a CUDA GPU and `quick` elsewhere.
#
# `laptop` and `full` download photographs, and this notebook is about those. `quick` makes synthetic
# street scenes in the same folders: other pictures, other numbers.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset, prepare_data, provenance

preset = choose_preset()
SPLIT, SEED = preset.split, 0  # training, validation and test images
root = prepare_data(preset)
print(provenance(preset, pick_device(), weights="no model is trained here"))
print(f"{SPLIT = }\n{SEED = }")

# %% [markdown]
# ## One photograph, two kinds of mask
#
# PennFudan holds 170 photographs of streets and campuses, published with
# [a paper of 2007](https://www.cis.upenn.edu/~jshi/ped_html/) by Wang, Shi, Song and Shen. The
# people are outlined, pixel by pixel. A few people, mostly half hidden, were never annotated.
# Detecting them counts as an error. The terms, from its `readme.txt`:
#
# > All persons copying this information are expected to adhere to the terms and constraints
# > invoked by each author's copyright. In most cases, these works may not be reposted
# > without the explicit permission of the copyright holder.
#
# So this project does not contain the dataset. The notebooks' stored outputs hold pictures of
# some photographs, as results.

# %%
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

image_paths = sorted((root / "PNGImages").glob("*.png"))[:30]
mask_paths = [root / "PedMasks" / f"{path.stem}_mask.png" for path in image_paths]
crowded = int(np.argmax([Image.open(path).getextrema()[1] for path in mask_paths]))
mask = np.array(Image.open(mask_paths[crowded]))
pictures = {
    "the photograph": Image.open(image_paths[crowded]),
    "a semantic mask: person or not": mask > 0,
    "its instance mask: which person": mask,
}
figure, panels = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for panel, (title, picture) in zip(panels, pictures.items(), strict=True):
    panel.imshow(picture, interpolation="nearest")
    panel.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# A mask has the photograph's size, and a number in every pixel:
#
# - In a **semantic** mask the number is a class. (We made this one, with `mask > 0`.) People who
#   touch become one region.
# - In an **instance** mask the number is an object's id: 0 for the background, 1 for the first
#   person, 2 for the second. (Image viewers show it nearly black.)
#
# PennFudan has instance masks. The class below reads only those: from a semantic mask it would
# make one big person.
#
# ## From a mask to instances
#
# Here is a mask small enough to print. Its second person is one pixel wide. A detection model wants
# one binary mask for each person. Comparing the mask `[H, W]` with the ids `[N, 1, 1]` broadcasts
# to `[N, H, W]`:

# %%
import torch

toy_mask = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 2],
        [0, 1, 1, 1, 0, 2],
        [0, 0, 1, 0, 0, 2],
    ]
)
ids = toy_mask.unique()
ids = ids[ids > 0]
toy_masks = (toy_mask == ids[:, None, None]).to(torch.uint8)
print(f"{ids = }\n{toy_masks.shape = }\n{toy_masks}")

# %% [markdown]
# ## From instances to boxes
#
# A box is the smallest rectangle around a mask, as `x1, y1, x2, y2` in pixels. torchvision has a
# function:

# %%
from torchvision.ops import masks_to_boxes

too_small = masks_to_boxes(toy_masks)
print(too_small)
print("widths, x2 - x1:", (too_small[:, 2] - too_small[:, 0]).tolist())

# %% [markdown]
# The first person fills columns 1, 2 and 3, but `x2 - x1` is 2, because `x2` is the **last**
# pixel. The second person gets a width of 0. The models refuse such a target:

# %%
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn

model = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
thin = {"boxes": too_small, "labels": torch.tensor([1, 1])}
try:
    model([torch.rand(3, 4, 6)], [thin])
except AssertionError as error:
    print("AssertionError:", error)

# %% [markdown]
# (The model has resized the image, so the message has other numbers.)
#
# The fix is to add one pixel at the right and at the bottom. The box is then *half-open*, like a
# Python slice: `mask[y1:y2, x1:x2]` is the person. The library has the same function, in the file that
# the first line names:

# %% tags=["copy-me"]
# tutorial_lib/data.py
from torch import Tensor
from torchvision.ops import masks_to_boxes


def boxes_from_masks(masks: Tensor) -> Tensor:
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    return boxes


# %%
toy_boxes = boxes_from_masks(toy_masks)
print(toy_boxes)
x1, y1, x2, y2 = toy_boxes[1].int().tolist()
assert (toy_masks[1, y1:y2, x1:x2] == 1).all()  # all of the thin person, and no more
assert (x2 - x1) * (y2 - y1) == toy_masks[1].sum()

# %% [markdown]
# ## The dataset class
#
# A `Dataset` returns an image and its target. Three things may be new:
#
# - `tv_tensors` know whether they are an image, boxes or masks. A transform can then move all
#   three together.
# - `exif_transpose` turns a photograph upright. Phones may store it sideways, with an EXIF note.
# - `ids > 0` is safer than dropping the first id. A close-up may have no background pixel, and
#   then the first id is a person.

# %% tags=["copy-me"]
# Copy me: runs alone
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes


class MyPennFudan(torch.utils.data.Dataset):
    def __init__(self, root, transforms=None):
        self.root, self.transforms = Path(root), transforms
        self.images = sorted((self.root / "PNGImages").glob("*.png"))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        path = self.images[index]
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        mask = Image.open(self.root / "PedMasks" / f"{path.stem}_mask.png")
        image, mask = tv_tensors.Image(image), tv_tensors.Mask(mask)
        ids = mask.unique()
        masks = (mask == ids[ids > 0][:, None, None]).to(torch.uint8)
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1
        size = masks.shape[-2:]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.ones(len(masks), dtype=torch.int64),
            "masks": tv_tensors.Mask(masks),
            "image_id": index,
            "area": masks.sum(dim=(1, 2), dtype=torch.float32),
            "iscrowd": torch.zeros(len(masks), dtype=torch.int64),
        }
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target


# %% [markdown]
# The target's fields:
#
# - `boxes`: `x1, y1, x2, y2` in pixels of this image, half-open.
# - `labels`: the class; 1 is person. **0 is the background**, so a detector of people has
#   `num_classes=2`.
# - `masks`: 1 where the person is seen.
# - `image_id`: names the image in evaluation.
# - `area`: pixels of the mask. [COCO](https://cocodataset.org)'s metrics sort objects by it into
#   small, medium and large.
# - `iscrowd`: 1 marks a crowd that is outlined as one object. The metrics ignore crowds, but models
#   train on them. Leave crowds out of training targets. PennFudan has none.
#
# The library's `PennFudanDataset` does the same. It also names the file when a mask is missing
# or has another size, and `get_target(i)` reads only the mask. We use it from here on.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.penn_fudan import PennFudanDataset

dataset = PennFudanDataset(root)
image, target = dataset[crowded]
my_image, my_target = MyPennFudan(root)[crowded]
assert torch.equal(image, my_image)
assert all(torch.equal(target[key], my_target[key]) for key in ("boxes", "masks"))
for name, value in {"image": image, **target}.items():
    dtype, shape = getattr(value, "dtype", ""), list(getattr(value, "shape", []))
    print(f"{name:9} {type(value).__name__:14} {dtype!s:14} {shape}")

# %%
from tutorial_lib.visualization import show

images, targets = zip(*(dataset[i] for i in (crowded, 0, 1)), strict=True)
show(images, targets)
plt.show()

# %% [markdown]
# ### 345 people or 423?
#
# The paper counts 345 people, and many texts repeat it. The masks hold 423: the authors later added
# 78 who are very small or mostly hidden (`added-object-list.txt`). Before you compare results, ask
# which people were counted. Our notebooks use all 423.

# %% tags=["nbval-ignore-output"]
import re
from collections import Counter

all_targets = [dataset.get_target(i) for i in range(len(dataset))]
people = sum(len(target["labels"]) for target in all_targets)
listed = root / "added-object-list.txt"
text = listed.read_text() if listed.exists() else ""
added = Counter(re.findall(r"^(\S+\.png)\t", text, flags=re.MULTILINE))
print(f"{people} in the masks, {people - added.total()} without those added later")

# %% [markdown]
# ## Transforms that move everything together
#
# If you flip an image and forget its boxes, nothing fails, and the model learns nonsense.
# `torchvision.transforms.v2` takes image and target in one call, and moves both:

# %%
from torchvision.transforms import v2

image, target = dataset[0]
flipped = v2.RandomHorizontalFlip(p=1.0)(image, target)
turned = v2.RandomRotation(degrees=(20, 20))(image, target)
titles = ["as it is", "flipped", "turned"]
images, targets = zip((image, target), flipped, turned, strict=True)
show(images, targets, titles)
plt.show()
for title, moved in zip(titles, targets, strict=True):
    tight = torch.equal(moved["boxes"], boxes_from_masks(moved["masks"]))
    print(f"{title:8} boxes fit their masks: {tight}")

# %% [markdown]
# The turned boxes are larger than they need to be. The transform turned the corners of each box and
# put a new box around them; it turned the mask pixel by pixel. A flip has no such problem.
#
# So for training we flip the image and distort its colours. That may even change the order of the
# channels. `ToDtype(..., scale=True)` turns uint8 in [0, 255] into float32 in [0, 1], and
# `ToPureTensor` makes plain tensors. Nothing is resized or normalised: the model does both, and
# scales its detections back to the size of your image. Below is one photograph four times, as
# training sees it.

# %% tags=["copy-me"]
# tutorial_lib/transforms.py
import torch
from torchvision.transforms import v2


def get_transform(train: bool) -> v2.Transform:
    augment = [v2.RandomHorizontalFlip(p=0.5), v2.RandomPhotometricDistort(p=0.5)]
    convert = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return v2.Compose([*augment, *convert] if train else convert)


# %%
torch.manual_seed(SEED)
samples = [get_transform(train=True)(image, target) for _ in range(4)]
images, targets = zip(*samples, strict=True)
show(images, targets, columns=4, cell=(3.2, 2.8))
plt.show()

# %% [markdown]
# ## Training, validation and test
#
# The model learns from the training images. With the validation images you choose when to stop, and
# which learning rate to use. The test images decide nothing. These notebooks measure on them at the
# end, and choose nothing by them.
#
# PyTorch's
# [finetuning tutorial](https://docs.pytorch.org/tutorials/intermediate/torchvision_tutorial.html)
# evaluates on the test images after every epoch. The best of those results is too good, because the
# test images chose it.
#
# Neighbours in file order often show the same place. A model that was trained on one has nearly
# seen the other. So the split cuts the file order into blocks, and shuffles the blocks:

# %% tags=["copy-me"]
# tutorial_lib/data.py
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset, Subset


def split_dataset(
    dataset: Dataset, sizes: Sequence[int], seed: int, block: int = 1
) -> tuple[Subset, ...]:
    if min(sizes) < 1 or sum(sizes) > len(dataset):
        raise ValueError(
            f"sizes {tuple(sizes)} must be positive, and add up to at most {len(dataset)} samples"
        )
    blocks = torch.arange(len(dataset)).split(block)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(blocks), generator=generator).tolist()
    order = torch.cat([blocks[i] for i in shuffled]).tolist()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return tuple(
        Subset(dataset, order[end - size : end])
        for size, end in zip(sizes, ends, strict=True)
    )


# %% [markdown]
# Only the training images get random flips. A `Subset` reads the dataset it was cut from, so we
# split two datasets. The same seed gives both the same parts:

# %% tags=["nbval-ignore-output"]
augmented = PennFudanDataset(root, get_transform(train=True))
plain = PennFudanDataset(root, get_transform(train=False))
train_set, _, _ = split_dataset(augmented, SPLIT, SEED, block=10)
_, val_set, test_set = split_dataset(plain, SPLIT, SEED, block=10)

learned = set(train_set.indices)
print("part        images  people  small  added later  beside a training image")
parts = {"training": train_set, "validation": val_set, "test": test_set}
for name, part in parts.items():
    areas = torch.cat([all_targets[i]["area"] for i in part.indices])
    small = (areas < 32**2).sum().item()
    later = sum(added[dataset.file_names[i]] for i in part.indices)
    beside = sum(bool({i - 1, i + 1} & learned) for i in part.indices)
    print(f"{name:10} {len(part):7} {len(areas):7} {small:6} {later:12} {beside:24}")

# %% [markdown]
# Compare the parts before you trust them. Small people (COCO's word for masks under 32 × 32 pixels)
# and those added later are the difficult ones, and each part should have its share. With so few
# images, the shares differ. That is one reason why test results differ from validation results.
#
# The last column counts images that have a training image as neighbour in file order. Blocks of ten
# leave a few. All parts still show the same streets and campuses. In a new city, expect worse
# results.
#
# ## Batches of images that differ in size
#
# A `DataLoader` stacks its samples into one tensor. Where sizes differ, that fails: `stack expects
# each tensor to be equal size`. So the models take lists of images and targets, and
# `collate_fn` turns a list of pairs into a pair of tuples:


# %% tags=["copy-me"]
# tutorial_lib/data.py
def collate_fn(batch: list[tuple]) -> tuple[tuple, ...]:
    return tuple(zip(*batch, strict=True))


# %%
from torch.utils.data import DataLoader

loader = DataLoader(train_set, batch_size=3, shuffle=True, collate_fn=collate_fn)
torch.manual_seed(SEED)
images, targets = next(iter(loader))
show(images, targets)
plt.show()

# %% [markdown]
# ## What is in it
#
# How many people are there, and how large? The answers guide your choices, so take them from the
# training images:

# %%
train_targets = [all_targets[i] for i in train_set.indices]
counts = [len(target["labels"]) for target in train_targets]
boxes = torch.cat([target["boxes"] for target in train_targets])
width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(dim=1)

figure, panels = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
panels[0].hist(counts, bins=np.arange(0.5, max(counts) + 1.5), rwidth=0.8)
panels[0].set(xlabel="people in an image", ylabel="images")
panels[1].scatter(width, height, s=8)
panels[1].set(xlabel="box width, pixels", ylabel="box height, pixels", xlim=0, ylim=0)
panels[2].hist(height / width, bins=30)
panels[2].axvline((height / width).median(), color="black", label="median")
panels[2].axvline(2, color="black", linestyle="--", label="tallest anchor")
panels[2].set(xlabel="aspect ratio of the box, height / width", ylabel="people")
panels[2].legend()
plt.show()

# %% [markdown]
# *Anchors* are boxes of fixed shapes. The model starts from them, then moves and stretches them.
# torchvision's have the ratios 0.5, 1 and 2, so many people are slimmer than any anchor. Training
# works all the same, because a rough fit is enough. Notebook [09](09_anchors_and_backbones.ipynb)
# has more.
#
# Last, a good case and a difficult one. Would you have detected the smallest person?

# %%
smallest = [target["area"].min().item() for target in train_targets]
chosen = [train_set.indices[i] for i in (np.argmax(counts), np.argmin(smallest))]
images, targets = zip(*(dataset[i] for i in chosen), strict=True)
titles = ["most people", "smallest person"]
show(images, targets, titles, columns=2, cell=(5.5, 4))
plt.show()

# %% [markdown]
# ## Recap
#
# - **Split** a mask into instances with one comparison, `mask == ids[:, None, None]`.
# - **Add** a pixel to what `masks_to_boxes` gives.
# - **Return** image and target as `tv_tensors`, so that transforms keep them together.
# - **Keep** test images apart, and choose nothing by them.
# - **Plot** sizes and ratios before you train.

# %% [markdown]
# ## On your own
#
# 1. PennFudan's authors made boxes too, in `Annotation/NAME.txt`. They count pixels from 1 and include the last one. Do
#    ours agree?
#    <details><summary>Hint</summary>Read theirs with
#    <code>re.findall(r"\((\d+), (\d+)\) - \((\d+), (\d+)\)", text)</code>. Of 423 boxes, 418 agree
#    at the left edge, 422 at the top, 412 at the right and 423 at the bottom.</details>
# 2. Train with `v2.RandomRotation`, but without the loose boxes.
#    <details><summary>Hint</summary>A transform can be any function of (image, target). Compute
#    boxes and areas again from the masks. Keep only people who are still in the picture:
#    <code>(masks != 0).flatten(1).any(1)</code>.</details>
# 3. Split image by image, as most texts do. How many test images are then beside a training image?
#    <details><summary>Hint</summary>That is <code>block=1</code>.</details>
#    <details><summary>Solution</summary>40 of 50, at seed 0.</details>

# %% [markdown]
# ## In practice
#
# - Split your own data by place, day or video, not by image. Otherwise the model has nearly seen
#   the test images.
# - The workers of a `DataLoader` (`num_workers > 0`) import the dataset class, so define it in a `.py` file. A
#   class from a notebook fails on macOS and Windows, and on Linux since Python 3.14. In a script, start training under
#   `if __name__ == "__main__":`.
# - Never save masks as JPEG: compression invents ids along every edge.
#
# ## Further reading
#
# - torchvision on [transforms v2](https://docs.pytorch.org/vision/stable/transforms.html) and
#   [TVTensors](https://docs.pytorch.org/vision/stable/tv_tensors.html).
#
# **Next:** [02, finetune a predictor](02_finetuning_a_predictor.ipynb).
