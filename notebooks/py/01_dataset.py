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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/torchvision-detection-tutorial/blob/main/notebooks/01_dataset.ipynb)
#
# You turn a folder of photographs and masks into what torchvision's detection
# models are trained on: images, and targets with boxes, labels and masks.

# %% [markdown]
# ## What you'll do
#
# - look at one photograph and its mask, then take the mask apart by hand;
# - find out why torchvision's `masks_to_boxes` gives boxes that are one pixel too small;
# - write the dataset class, its transforms, a seeded split and a `DataLoader`;
# - plot what every training run will depend on: how many people, how large, how tall.
#
# **You need** PyTorch and torchvision, and to have seen a `Dataset` before. No
# knowledge of detection. No GPU.
#
# | preset | data | download | time, with one thread on a machine with 2 CPU cores |
# |---|---|---|---|
# | `quick` | synthetic street scenes | none | under half a minute |
# | `laptop`, `full` | the PennFudan photographs | 51 MB | under half a minute, after the download |

# %% [markdown]
# ## Set-up
#
# The notebooks import a small library, `tutorial_lib`. This cell installs it where
# it is missing, as on Colab, and leaves PyTorch as it is.

# %% tags=["set-up"]
import importlib.util

ADDRESS = "https://github.com/YOUR_ACCOUNT/torchvision-detection-tutorial"
if importlib.util.find_spec("tutorial_lib") is None:
    packages = f"tutorial_lib@git+{ADDRESS} pycocotools"
    get_ipython().run_line_magic("pip", f"install -q --no-deps {packages}")

# %% [markdown]
# The preset is the one dial: it decides where the data come from. Choose it here,
# `choose_preset("laptop")`, or with the environment variable `TUTORIAL_PRESET`. If
# you choose nothing, it is `full` where there is a CUDA GPU and `quick` elsewhere.
# `prepare_data` keeps one copy for all notebooks: in `data/` of a clone of the project,
# else in a cache folder of your account.

# %% tags=["nbval-ignore-output"]
import torch

from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset, prepare_data, provenance

preset = choose_preset()
SEED = 0
root = prepare_data(preset)
print(provenance(preset, pick_device(), weights="no model is trained here"))

# %% [markdown]
# ## One image and its mask
#
# PennFudan is a set of 170 photographs from around the University of Pennsylvania and
# Fudan University, published with [a paper of
# 2007](https://www.cis.upenn.edu/~jshi/ped_html/) by Wang, Shi, Song and Shen. The
# people in them are outlined, pixel by pixel. (A few people, mostly half hidden, were never
# annotated. Detecting them counts as an error.) Its `readme.txt` says that such works may
# not be reposted without permission, so this project downloads it and never carries it.
#
# At `quick` the images are synthetic: `tutorial_lib/offline/sample.py` makes people in fog,
# in the same folders. So every line below is the same.

# %%
import matplotlib.pyplot as plt
from PIL import Image

image_path = sorted((root / "PNGImages").glob("*.png"))[0]
mask_path = root / "PedMasks" / f"{image_path.stem}_mask.png"
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for panel, path in zip(axes, (image_path, mask_path), strict=True):
    panel.imshow(Image.open(path), cmap="viridis", interpolation="nearest")
    panel.set_title(path.relative_to(root).as_posix(), fontsize=10)
    panel.axis("off")
plt.show()

# %% [markdown]
# On the left is the image. On the right is its mask, a grey PNG of the same size
# whose pixels are not brightness but **numbers of people**: 0 is the background, 1
# the pixels of the first person, 2 those of the second. (The colours are the plot's;
# opened in an image viewer, a mask looks all black, since 2 of 255 is nearly black.)
#
# The folders:

# %% tags=["nbval-ignore-output"]
for folder in ("PNGImages", "PedMasks", "Annotation"):
    files = sorted(path.name for path in (root / folder).iterdir())
    print(f"{folder:10} {len(files)} files: {files[0]}, {files[1]}, …")

# %% [markdown]
# `Annotation` holds text files with a box for every person, numbered from 1 and with
# the last pixel included. We compute our boxes from the masks instead, and use those
# files further down to check them.
#
# ## From a mask to instances
#
# Take a mask small enough to print: two people, of which the second is one pixel
# wide, as a person almost hidden behind a wall can be.

# %%
toy_mask = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 2],
        [0, 1, 1, 1, 0, 2],
        [0, 0, 1, 0, 0, 2],
    ],
    dtype=torch.uint8,
)
ids = toy_mask.unique()
ids = ids[ids != 0]
print(f"{ids = }")

# %% [markdown]
# A detection model wants one binary mask for each person. Comparing the mask
# `[H, W]` with the ids `[N, 1, 1]` broadcasts to `[N, H, W]`, one plane for each id:

# %%
toy_masks = (toy_mask == ids[:, None, None]).to(torch.uint8)
print(f"{toy_masks.shape = }")
print(toy_masks)

# %% [markdown]
# ## From instances to boxes
#
# A box is `x1, y1, x2, y2` in pixels: the smallest rectangle around the mask. By hand,
# for the first person: rows 1 to 3 and columns 1 to 3 hold pixels.

# %%
y, x = toy_masks[0].nonzero(as_tuple=True)
print("first and last column:", x.min().item(), x.max().item())
print("first and last row:   ", y.min().item(), y.max().item())

# %% [markdown]
# torchvision has a function for this:

# %%
from torchvision.ops import masks_to_boxes

print(masks_to_boxes(toy_masks))

# %% [markdown]
# It gives the first and the **last** pixel. But the first person is 3 pixels wide and
# `x2 - x1` is 2, and the second has a width of 0. The models compute widths and areas
# as `x2 - x1`, so to them the second person does not exist. They refuse such a target:

# %%
from torchvision.models import get_model

model = get_model("fasterrcnn_mini_fpn", weights=None, num_classes=2)
target = {"boxes": masks_to_boxes(toy_masks), "labels": torch.tensor([1, 1])}
try:
    model([torch.rand(3, 4, 6)], [target])
except AssertionError as error:
    print("AssertionError:", error)

# %% [markdown]
# (The numbers are those of the image as the model has resized it.)
#
# The fix is to add one pixel at the right and at the bottom, so that a box ends where
# the next pixel begins (*half-open*, like a Python slice: `mask[y1:y2, x1:x2]` is the
# person). Then `x2 - x1` is the width in pixels. The first line of the next cell names
# the file of the library that has the same function. Later notebooks import it.

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
assert (x2 - x1, y2 - y1) == (1, 3)
assert (toy_masks[1, y1:y2, x1:x2] == 1).all()

# %% [markdown]
# ## How many people, and are the boxes right?
#
# The annotators of PennFudan drew boxes too. Counting people and comparing all the
# edges, ours and theirs, takes one pass over the masks. Theirs are 1-based and include
# the last pixel, so `xmin - 1, ymin - 1, xmax, ymax` should be ours.

# %% tags=["nbval-ignore-output"]
import re

import numpy as np

people, agree = 0, torch.zeros(4, dtype=torch.int64)
for path in sorted((root / "PedMasks").glob("*.png")):
    mask = torch.from_numpy(np.array(Image.open(path)))
    boxes = boxes_from_masks(mask == mask.unique()[1:, None, None])
    text = (root / "Annotation" / f"{path.stem.removesuffix('_mask')}.txt").read_text()
    theirs = re.findall(r"\((\d+), (\d+)\) - \((\d+), (\d+)\)", text)
    theirs = torch.tensor([[int(v) for v in box] for box in theirs])
    people += len(boxes)
    agree += (boxes == theirs - torch.tensor([1, 1, 0, 0])).sum(dim=0)
print(f"{people} people; edges that agree (left, top, right, bottom): {agree.tolist()}")

# %%
assert (agree >= 0.97 * people).all()

# %% [markdown]
# On the photographs that is 423 people, with 418, 422, 412 and 423 of the edges equal.
# The rest are slips of the annotation. Without the added pixel the right and bottom
# edges that agree would all be one short.
#
# The paper says **345** people, and so do many texts about this dataset. Both are
# right: the paper left out people who are very small or mostly hidden. They were
# labelled later, and `added-object-list.txt` lists them.

# %% tags=["nbval-ignore-output"]
added_list = root / "added-object-list.txt"
lines = added_list.read_text().splitlines() if added_list.exists() else []
added = sum(line.split("\t")[0].endswith(".png") for line in lines)
print(f"{people} in the masks, {people - added} without those that were added later")

# %% [markdown]
# This matters when you compare results: with the masks as they are, a detector is
# asked for the 78 difficult ones as well. On the photographs all our notebooks count 423.
#
# ## The dataset
#
# What is left is to give the image and its target together, as a `Dataset` does. Two
# things in this class may be new:
#
# - `tv_tensors.Image`, `BoundingBoxes` and `Mask` are tensors that know what they
#   are, so that a transform can move all three together;
# - the target is a dictionary with the keys that torchvision's models and its reference
#   scripts ask for; `image_id`, `area` and `iscrowd` are named as in
#   [COCO](https://cocodataset.org), the large dataset whose metrics most detectors are measured with.

# %% tags=["copy-me"]
from pathlib import Path

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes


class MyPennFudan(torch.utils.data.Dataset):
    def __init__(self, root, transforms=None):
        self.transforms = transforms
        self.images = sorted((Path(root) / "PNGImages").glob("*.png"))
        self.masks = sorted((Path(root) / "PedMasks").glob("*.png"))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = tv_tensors.Image(Image.open(self.images[index]).convert("RGB"))
        mask = tv_tensors.Mask(Image.open(self.masks[index]))
        masks = (mask == mask.unique()[1:, None, None]).to(torch.uint8)
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
# `PennFudanDataset` of the library does the same. It also says which file is at fault
# when a mask is missing or of another size, and has `get_target(i)`, which reads only the
# mask. From here on we use that one.

# %%
from tutorial_lib.penn_fudan import PennFudanDataset

dataset = PennFudanDataset(root)
image, target = dataset[0]
my_image, my_target = MyPennFudan(root)[0]
assert torch.equal(image, my_image)
assert all(torch.equal(target[k], my_target[k]) for k in ("boxes", "labels", "masks"))

# %% [markdown]
# ### What every field means
#
# | field | type and shape | meaning |
# |---|---|---|
# | `boxes` | float32 `[N, 4]` | `x1, y1, x2, y2` in pixels of this image, half-open |
# | `labels` | int64 `[N]` | the class; 1 is person. **0 is kept for the background**, so a detector of only people has `num_classes=2` |
# | `masks` | uint8 `[N, H, W]` | 1 where the person is seen |
# | `image_id` | int | names the image; evaluation and error messages use it |
# | `area` | float32 `[N]` | pixels of the mask; COCO sorts people into small, medium and large by it |
# | `iscrowd` | int64 `[N]` | 1 marks a group too dense to outline one by one, which COCO's evaluation leaves out; there are none here |

# %%
n, (height, width) = len(target["labels"]), image.shape[-2:]
assert image.dtype == torch.uint8 and image.shape == (3, height, width)
assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (
    n,
    4,
)
assert target["labels"].dtype == torch.int64 and target["labels"].unique().tolist() == [
    1
]
assert target["masks"].dtype == torch.uint8 and target["masks"].shape == (
    n,
    height,
    width,
)
assert target["area"].dtype == torch.float32 and target["iscrowd"].sum() == 0
print(
    type(image).__name__,
    type(target["boxes"]).__name__,
    type(target["masks"]).__name__,
)

# %% [markdown]
# Plotted on the image, one colour for each person:

# %%
from tutorial_lib.visualization import show

images, targets = zip(*(dataset[i] for i in range(3)), strict=True)
show(images, targets)
plt.show()

# %% [markdown]
# ## Transforms that move everything together
#
# A flipped image with boxes that stayed where they were is a dataset that teaches
# nonsense, and nothing would fail. `torchvision.transforms.v2` takes image and target
# in one call, finds the tensors that know what they are, and moves them all:

# %%
from torchvision.transforms import v2

flip = v2.RandomHorizontalFlip(p=1.0)
turn = v2.RandomPerspective(distortion_scale=0.3, p=1.0)
torch.manual_seed(SEED)
samples = [(image, target), flip(image, target), turn(image, target)]
images, targets = zip(*samples, strict=True)
show(images, targets, titles=["as it is", "flipped", "in another perspective"])
plt.show()

# %% [markdown]
# Look at the third picture: each box still holds its person, but some are larger than
# they need to be. The corners of the *box* were moved, and a box was put around them; the
# mask was moved pixel by pixel. A flip does not have that problem, which can be checked:

# %%
_, flipped = flip(image, target)
assert torch.equal(flipped["boxes"], boxes_from_masks(flipped["masks"]))
_, turned = turn(image, target)
assert not torch.equal(turned["boxes"], boxes_from_masks(turned["masks"]))

# %% [markdown]
# So for training we flip, and distort the colours: brightness, contrast, saturation, hue,
# and the order of the colour channels (hence the odd colours below). `ToDtype(..., scale=True)`
# turns uint8 in [0, 255] into float32 in [0, 1], and `ToPureTensor` turns the image, boxes
# and masks back into plain tensors. Nothing is resized or normalised: the model does both itself, and
# scales its detections back to the size of your image.

# %% tags=["copy-me"]
# tutorial_lib/transforms.py
import torch
from torchvision.transforms import v2


def get_transform(train: bool) -> v2.Transform:
    augment = [
        v2.RandomHorizontalFlip(p=0.5),
        v2.RandomPhotometricDistort(p=0.5),
    ]
    convert = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return v2.Compose([*augment, *convert] if train else convert)


# %% [markdown]
# The same photograph four times, as a training run would see it:

# %%
torch.manual_seed(SEED)
samples = [get_transform(train=True)(image, target) for _ in range(4)]
images, targets = zip(*samples, strict=True)
show(images, targets, columns=4)
plt.show()

# %% [markdown]
# ## Train, validation and test
#
# Three parts: one to learn from, one to choose by (when to stop, which learning rate),
# and one that is read **once**, at the end. PyTorch's [finetuning
# tutorial](https://docs.pytorch.org/tutorials/intermediate/torchvision_tutorial.html) has two, and reads the test
# images after every epoch. Whoever then reports the best of those epochs reports a number
# that is better than it should be.

# %% tags=["copy-me"]
# tutorial_lib/data.py
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset, Subset


def split_dataset(
    dataset: Dataset, sizes: Sequence[int], seed: int
) -> tuple[Subset, ...]:
    if min(sizes) < 1 or sum(sizes) > len(dataset):
        parts = f"sizes {tuple(sizes)} must be positive, and add up to at most {len(dataset)}"
        raise ValueError(f"{parts}, the dataset's length")
    order = torch.randperm(
        len(dataset), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return tuple(
        Subset(dataset, order[end - size : end])
        for size, end in zip(sizes, ends, strict=True)
    )


# %% [markdown]
# The training images want random flips, the others do not. A `Subset` takes its
# samples from the dataset it was cut from, so we split two datasets with the same seed.
# Both get the same parts:

# %%
augmented = PennFudanDataset(root, get_transform(train=True))
plain = PennFudanDataset(root, get_transform(train=False))
train_set, _, _ = split_dataset(augmented, preset.split, SEED)
_, val_set, test_set = split_dataset(plain, preset.split, SEED)

parts = [set(part.indices) for part in (train_set, val_set, test_set)]
assert [len(part) for part in parts] == list(preset.split)
assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])

# %% [markdown]
# ## Batches of images that differ in size
#
# A `DataLoader` stacks its samples into one tensor. Photographs of different sizes
# cannot be stacked:

# %%
from torch.utils.data import DataLoader, default_collate

try:
    default_collate([torch.zeros(3, 4, 5), torch.zeros(3, 6, 5)])
except RuntimeError as error:
    print("RuntimeError:", error)

# %% [markdown]
# So the detection models take a *list* of images and a list of targets, and
# `collate_fn` only sorts a batch of pairs into a pair of tuples:


# %% tags=["copy-me"]
# tutorial_lib/data.py
def collate_fn(batch: list[tuple]) -> tuple[tuple, ...]:
    return tuple(zip(*batch, strict=True))


# %%
loader = DataLoader(train_set, batch_size=3, shuffle=True, collate_fn=collate_fn)
torch.manual_seed(SEED)
images, targets = next(iter(loader))
assert len(images) == len(targets) == 3
assert all(image.dtype == torch.float32 and image.max() <= 1 for image in images)
show(images, targets)
plt.show()

# %% [markdown]
# ## What is in it
#
# Before training, look at the numbers that anchors, image size and metrics depend on.
# `get_target` reads masks only, so this takes only a moment.

# %%
all_targets = [dataset.get_target(i) for i in range(len(dataset))]
counts = [len(target["labels"]) for target in all_targets]
boxes = torch.cat([target["boxes"] for target in all_targets])
box_width, box_height = (boxes[:, 2:] - boxes[:, :2]).unbind(dim=1)

figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
axes[0].hist(counts, bins=np.arange(0.5, max(counts) + 1.5), rwidth=0.8)
axes[0].set(xlabel="people in an image", ylabel="images")
axes[1].scatter(box_width, box_height, s=8)
axes[1].set(xlabel="box width, pixels", ylabel="box height, pixels", xlim=0, ylim=0)
axes[2].hist(box_height / box_width, bins=30)
axes[2].set(xlabel="aspect ratio of the box, height / width", ylabel="people")
plt.show()

# %% tags=["nbval-ignore-output"]
ratio = (box_height / box_width).median().item()
tenths = torch.quantile(box_height, torch.tensor([0.1, 0.5, 0.9])).tolist()
print(
    f"{len(boxes)} people in {len(dataset)} images, {len(boxes) / len(dataset):.1f} each"
)
print(
    f"box height: 10 % under {tenths[0]:.0f}, half under {tenths[1]:.0f}, 90 % under {tenths[2]:.0f} pixels"
)
print(f"median aspect ratio {ratio:.1f}")

# %% [markdown]
# People are tall: the anchors of torchvision's models come in ratios 0.5, 1 and 2, and
# in the photographs the median person, at 2.7, is beyond the last of these. Anchors are
# boxes of fixed shapes from which the model starts, and which it then moves and stretches. They only have to be near
# enough for that, so it works all the same. Notebook 09 comes back to it.
#
# ## A good case, and a difficult one
#
# The sample with the most people, and the one with the smallest person. In the second, ask
# yourself whether you would have detected them; what is hard to label is hard to detect.

# %%
smallest = [min(target["area"], default=torch.inf) for target in all_targets]
chosen = [int(np.argmax(counts)), int(np.argmin(smallest))]
images, targets = zip(*(dataset[i] for i in chosen), strict=True)
show(
    images,
    targets,
    titles=["most people", "smallest person"],
    columns=2,
    cell=(5.5, 4),
)
plt.show()

# %% [markdown]
# ## Recap
#
# - **Split** a mask into instances with one comparison, `mask == ids[:, None, None]`.
# - **Add** a pixel to what `masks_to_boxes` gives, or a thin person gets a box without a width.
# - **Return** image and target as `tv_tensors`, so that transforms keep them together.
# - **Keep** a test part, apart from training and validation, for the one number you report.
# - **Plot** sizes and ratios before you train.

# %% [markdown]
# ## On your own
#
# 1. Write `check(dataset)`, which looks at every sample and lists the boxes that do not
#    agree with their masks.
#    <details><summary>Hint</summary>Compare <code>target["boxes"]</code> with <code>boxes_from_masks(target["masks"])</code>.</details>
# 2. Use `v2.RandomPerspective` for training without the loose boxes.
#    <details><summary>Hint</summary>A transform can be any function of (image, target): at the end, drop the people who left the picture (<code>keep = (masks != 0).flatten(1).any(dim=1)</code>, an index for every field but <code>image_id</code>), and compute boxes and areas again from the masks.</details>
# 3. Read your own data: masks of one person per file, say, or a COCO file.
#    <details><summary>Hint</summary><code>__init__</code> lists other files and <code>__getitem__</code> reads them; the target stays as it is; for COCO see <code>torchvision.datasets.wrap_dataset_for_transforms_v2</code>.</details>

# %% [markdown]
# ## In practice
#
# - Several photographs of PennFudan show the same place, and a random split puts them on
#   both sides. Test numbers are therefore kinder than a new city would be.
# - With `num_workers > 0` on macOS and Windows, a dataset class has to be importable:
#   define it in a file (as `tutorial_lib` does), not in the notebook.
# - `PennFudanDataset(root, transforms, in_memory=True)` decodes each file once and keeps it, which for 170
#   photographs takes about 200 MB. Notebooks 04 and 06 read each file many times and ask for it.
# - Masks saved as JPEG are useless: compression invents ids along every edge.
#
# ## Further reading
#
# - [PennFudan's page](https://www.cis.upenn.edu/~jshi/ped_html/), with the paper.
# - [torchvision: transforms v2](https://docs.pytorch.org/vision/stable/transforms.html)
#   and [TVTensors](https://docs.pytorch.org/vision/stable/tv_tensors.html).
# - [COCO's data format](https://cocodataset.org/#format-data).
#
# **Next:** [02, finetune a predictor](02_finetuning_a_predictor.ipynb).
