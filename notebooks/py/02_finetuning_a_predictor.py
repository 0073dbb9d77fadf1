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
# # Finetune a predictor: Faster R-CNN learns a new set of classes
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/torchvision-detection-tutorial/blob/main/notebooks/02_finetuning_a_predictor.ipynb)
#
# You take a detector that was trained on other pictures, exchange its last layer for
# one with your classes, and train it on 100 photographs (at `quick`, on 40 drawn scenes).

# %% [markdown]
# ## What you'll do
#
# - see what Faster R-CNN and Mask R-CNN are made of;
# - ask a pre-trained detector for people *before* any training, and measure it;
# - replace its classifier, and check which weights are new and which are kept;
# - write one training step by hand, then the loop;
# - compare before and after, on images that were not used for anything else;
# - follow one picture through every part of the model, to its boxes, masks and losses.
#
# **You need** notebook [01](01_dataset.ipynb), or a data set that gives what it builds.
#
# | preset | detector | trained on | time |
# |---|---|---|---|
# | `quick` | `fasterrcnn_mini_fpn`, 2.2 M parameters | 40 drawn scenes | 1.3 min on one CPU core |
# | `laptop` | the same | 100 photographs | 7.3 min on one CPU core |
# | `full` | `fasterrcnn_resnet50_fpn`, 41.8 M parameters | 100 photographs | not measured yet: it needs a CUDA card |

# %% [markdown]
# ## Set-up
#
# The notebooks import a small library, `tutorial_lib`. This cell installs it where
# it is missing, as on Colab, and leaves PyTorch as it is.

# %% tags=["set-up"]
import importlib.util

ADDRESS = "https://github.com/YOUR_ACCOUNT/torchvision-detection-tutorial"
if importlib.util.find_spec("tutorial_lib") is None:
    packages = f"tutorial_lib@git+{ADDRESS} pycocotools kornia-rs"
    get_ipython().run_line_magic("pip", f"install -q --no-deps {packages}")

# %% [markdown]
# The preset, as in notebook 01. `fetch_weights` downloads what the preset needs now, so that a
# missing network stops us here and not in the middle.

# %% tags=["nbval-ignore-output"]
import torch

import tutorial_lib.models  # registers the small models with torchvision
from tutorial_lib.engine import pick_device
from tutorial_lib.presets import (
    choose_preset,
    fetch_weights,
    prepare_data,
    provenance,
)

preset = choose_preset()
SEED = 0
EPOCHS = preset.epochs
device = pick_device()
root = prepare_data(preset)
fetch_weights(preset.faster_rcnn, preset.weights)
fetch_weights(preset.mask_rcnn, preset.weights)
print(provenance(preset, device))

# %% [markdown]
# ## What a Faster R-CNN is made of
#
# Faster R-CNN ([Ren et al. 2015, arXiv 1506.01497](https://arxiv.org/abs/1506.01497))
# finds objects in two stages: the RPN proposes places, and the RoI heads (RoI is a region of interest) classify and
# correct each. The names are those of the parts in torchvision:

# %%
import matplotlib.pyplot as plt

from tutorial_lib.visualization import draw_detector

draw_detector(masks=False)
plt.show()

# %% [markdown]
# 1. `transform` resizes and normalises the images and pads them to one batch.
# 2. `backbone` is a classification network without its classifier. It turns the
#    batch into feature maps; with a feature pyramid (FPN), into one for each of several scales.
# 3. `rpn`, the region proposal network, looks at every place (cell) of the feature maps, where
#    it has a few boxes of fixed sizes, the *anchors*. For each it says whether there
#    is an object (any object) and how the anchor should be moved. The best are the *proposals*.
# 4. `roi_heads.box_roi_pool` cuts the features under each proposal out, as 7 × 7 values
#    for each channel, whatever the proposal's size.
# 5. `roi_heads.box_head` makes a vector of them, and `roi_heads.box_predictor` two
#    things of the vector: a score for each class, and a correction of the box for each class.
#
# Mask R-CNN ([He et al. 2017, arXiv 1703.06870](https://arxiv.org/abs/1703.06870)) adds
# a third branch, which predicts a mask of 28 × 28 for each class. At test time it is
# asked only for the boxes that were found. ("Look inside", further down, follows a picture
# through all of them.)

# %%
draw_detector(masks=True)
plt.show()

# %% [markdown]
# ## Start from a detector that was trained before
#
# torchvision's detectors come with weights trained on [COCO](https://cocodataset.org): 118,000
# photographs, 80 kinds of things. The preset decides which one is built here; at `full` the line below
# is, word for word in a script of your own,
#
# ```python
# from torchvision.models.detection import fasterrcnn_resnet50_fpn
# model = fasterrcnn_resnet50_fpn(weights="DEFAULT")
# ```
#
# At `quick` and `laptop` it is a small model with the same parts, whose weights were
# trained on drawn street scenes and are a file of this project (see the end of this notebook).
#
# Older texts write `pretrained=True`. torchvision still accepts it, with the warning that it
# "is deprecated since 0.13 and may be removed in the future", and loads `COCO_V1`, the same
# as `weights="DEFAULT"` today. Write `weights=`: it says which ones.
#
# `min_size` and `max_size` say how large the model makes its images. `min_size` may hold several sizes, as it does at
# `laptop`: then each training image gets a random one of them, and in evaluation all get the last.

# %%
from torchvision.models import get_model, get_model_weights

weights = get_model_weights(preset.faster_rcnn)[preset.weights]
model = get_model(
    preset.faster_rcnn,
    weights=weights,
    min_size=preset.min_size,
    max_size=preset.max_size,
).to(device)
categories = weights.meta["categories"]
print(categories[:2])
assert categories.index("person") == 1

# %% [markdown]
# Weights know their categories. "person" is number 1 of COCO and of our drawn scenes, and
# 1 is the label that our data set gives to people. So we can ask this model for people
# **without training anything**, and measure the answer. We call this row *zero-shot*: the model knows the class, but has
# seen none of our images. It tells what finetuning buys.

# %%
from torch.utils.data import DataLoader

from tutorial_lib.penn_fudan import PennFudanDataset, collate_fn, split_dataset
from tutorial_lib.transforms import get_transform

augmented = PennFudanDataset(root, get_transform(train=True))
plain = PennFudanDataset(root, get_transform(train=False))
train_set, _, _ = split_dataset(augmented, preset.split, SEED)
_, val_set, test_set = split_dataset(plain, preset.split, SEED)

torch.manual_seed(SEED)
train_loader = DataLoader(
    train_set,
    preset.batch_size,
    shuffle=True,
    drop_last=True,
    collate_fn=collate_fn,
)
val_loader = DataLoader(val_set, preset.batch_size, collate_fn=collate_fn)
test_loader = DataLoader(test_set, preset.batch_size, collate_fn=collate_fn)

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import evaluate

zero_shot = evaluate(model, test_loader, device)
print(zero_shot)

# %% [markdown]
# How to read it: *precision* is the share of detections that are right, *recall* the share of objects that are found.
# **AP** is COCO's average precision, the area under the
# precision-recall curve, averaged over how exactly a box has to fit: an IoU of at least 0.50,
# 0.55 … 0.95. IoU, *intersection over union*, is the area that two boxes share divided by the
# area that they cover together. AP50 asks for an IoU of 0.5 only, AP75 for 0.75. AR is the recall with up to
# 100 detections an image, averaged over the same thresholds; AR1 and AR10 allow 1 and 10. Small is an area under
# 32² pixels, large one over 96². All are between 0 and 1; "no such objects" means there was nothing to measure on.
#
# And how it looks, with the detections that score at least 0.5. The model also draws
# boxes around what else it knows:

# %%
from tutorial_lib.engine import predict
from tutorial_lib.visualization import show

shown = [test_set[i] for i in range(3)]
images, targets = zip(*shown, strict=True)
before = predict(model, images, device, score_threshold=0.5)
show(images, before, categories=categories)
plt.show()

# %% [markdown]
# ## Replace the predictor
#
# The model's `box_predictor` has two linear layers on the same input. `cls_score` has an
# output for each class it was trained on, `bbox_pred` four for each (at `full` that is 91:
# COCO's numbers run to 90, with gaps, and 0 is the background):

# %% tags=["nbval-ignore-output"]
print(model.roi_heads.box_predictor)

# %% [markdown]
# Ours has two classes: background, always number 0, and person. So we need a new predictor
# with the same input and two outputs. These are the lines that everyone copies:

# %% tags=["nbval-ignore-output"]
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

old_parameters = dict(model.named_parameters())

num_classes = 2  # background and person
in_features = model.roi_heads.box_predictor.cls_score.in_features
model.roi_heads.box_predictor = FastRCNNPredictor(in_features, num_classes).to(device)
print(f"{in_features = }")

# %% [markdown]
# What has changed? A parameter is kept if it is the *same object* as before:

# %%
new = [n for n, p in model.named_parameters() if p is not old_parameters.get(n)]
kept = [n for n, p in model.named_parameters() if p is old_parameters.get(n)]
print("new:", *new, sep="\n  ")
assert all(name.startswith("roi_heads.box_predictor.") for name in new)
assert set(kept) | set(new) == set(old_parameters)

# %% [markdown]
# Four tensors are new and random; the transform, the backbone, the RPN and the box head are
# as they were. That is why so few pictures are enough: nearly all of the model already
# knows how to see. (Not all of it will be trained, either: of a pre-trained ResNet-50, torchvision
# freezes the first two of five stages and every BatchNorm, so the optimizer below is
# given only what has `requires_grad`.) As a function of the library, for later notebooks:

# %% tags=["copy-me"]
# tutorial_lib/models.py
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor


def replace_box_predictor(model: FasterRCNN, num_classes: int) -> FasterRCNN:
    old = model.roi_heads.box_predictor.cls_score
    new = FastRCNNPredictor(old.in_features, num_classes)
    model.roi_heads.box_predictor = new.to(old.weight.device)
    return model


# %% [markdown]
# ## Two modes, two kinds of answers
#
# In **training** mode the model wants targets, and returns losses; in **evaluation** mode
# it takes images alone, and returns detections.

# %%
images, targets = next(iter(train_loader))
images = [image.to(device) for image in images]
targets = [
    {k: v.to(device) if torch.is_tensor(v) else v for k, v in t.items()}
    for t in targets
]
model.train()
losses = model(images, targets)
print("training:  ", sorted(losses))

model.eval()
with torch.inference_mode():
    detections = model(images)
print("evaluation:", sorted(detections[0]))

# %% [markdown]
# The four losses, two for each stage:
#
# | loss | asks |
# |---|---|
# | `loss_objectness` | does the RPN tell anchors with an object from those without? |
# | `loss_rpn_box_reg` | does it move those anchors to the object? |
# | `loss_classifier` | does the `box_predictor` name the proposals? |
# | `loss_box_reg` | does it correct their boxes? |
#
# Mask R-CNN has a fifth, `loss_mask`: is each of the 28 × 28 pixels right? What each
# field of a detection means you know from notebook 01; `scores` is new, and comes sorted.

# %%
mask_rcnn = get_model("maskrcnn_mini_fpn", weights=None, num_classes=2).train()
mask_losses = mask_rcnn(
    [i.cpu() for i in images],
    [{k: v.cpu() if torch.is_tensor(v) else v for k, v in t.items()} for t in targets],
)
assert set(mask_losses) - set(losses) == {"loss_mask"}

# %% [markdown]
# ## One step by hand
#
# Training minimises the sum of the losses. A step is the same as for a classifier:

# %% tags=["nbval-ignore-output"]
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=preset.learning_rate, weight_decay=0.01)

model.train()
losses = model(images, targets)
loss = sum(losses.values())
optimizer.zero_grad()
loss.backward()
optimizer.step()
print(
    f"loss {loss.item():.3f} =",
    " + ".join(f"{v.item():.3f}" for v in losses.values()),
)

# %% [markdown]
# ## The loop
#
# Around that step, the library's `train_one_epoch` puts what a real run needs: a
# progress bar, the learning rate's schedule, and a stop when the loss is no longer a number
# (one such step spoils every weight, and all that follows is wasted).

# %% tags=["copy-me"]
# tutorial_lib/engine.py
import sys

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from tutorial_lib.engine import memory_advice, raise_non_finite, to_device


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader,
    device: torch.device,
    *,
    lr_scheduler: LRScheduler | None = None,
    progress: bool = True,
) -> dict[str, float]:
    model.train()
    history = []
    for images, targets in tqdm(
        data_loader, file=sys.stdout, leave=False, disable=not progress
    ):
        with memory_advice(device):
            images, targets = to_device(images, targets, device)
            losses = model(images, targets)
            loss = sum(losses.values())
            if not torch.isfinite(loss):
                raise_non_finite(losses, targets, step=len(history) + 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()
        history.append(torch.stack([loss, *losses.values()]).detach())
    if not history:
        raise ValueError(
            "data_loader gives no batches: it is empty, or drop_last leaves nothing of it"
        )
    means = torch.stack(history).mean(dim=0).tolist()
    return dict(zip(["loss", *losses], means, strict=True))


# %% [markdown]
# The schedule raises the learning rate over the first epoch, while the new predictor is
# still random and its gradients are large, and then lowers it to zero. After every
# epoch we look at the **validation** images; the test images decide nothing.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import warmup_cosine

torch.manual_seed(SEED)
optimizer = torch.optim.AdamW(parameters, lr=preset.learning_rate, weight_decay=0.01)
steps = len(train_loader)
schedule = warmup_cosine(optimizer, warmup_steps=steps, total_steps=EPOCHS * steps)
history = []
for epoch in range(1, EPOCHS + 1):
    losses = train_one_epoch(
        model, optimizer, train_loader, device, lr_scheduler=schedule
    )
    box = evaluate(model, val_loader, device).box
    history.append({**losses, "AP": box.AP, "AP50": box.AP50})
    print(
        f"epoch {epoch}/{EPOCHS}  loss {losses['loss']:.3f}  validation AP {box.AP:.3f}"
    )

# %%
from tutorial_lib.visualization import plot_history

curves = {k: [row[k] for row in history] for k in history[0]}
loss_curves = {k: v for k, v in curves.items() if k.startswith("loss")}
plot_history(
    [loss_curves, {k: curves[k] for k in ("AP", "AP50")}],
    ["loss", "on validation"],
)
plt.show()

# %% [markdown]
# ## Before and after
#
# Now the test images again, as before training:

# %% tags=["nbval-ignore-output"]
finetuned = evaluate(model, test_loader, device)
print(f"{'':12}{'AP':>8}{'AP50':>8}{'AP75':>8}{'AR':>8}")
for name, result in (
    ("zero-shot", zero_shot.box),
    ("finetuned", finetuned.box),
):
    numbers = (result.AP, result.AP50, result.AP75, result.AR)
    print(f"{name:12}" + "".join(f"{v or 0:8.3f}" for v in numbers))

# %%
assert history[-1]["loss"] < history[0]["loss"]
assert preset.name == "full" or finetuned.box.AP > zero_shot.box.AP + 0.05

# %% [markdown]
# The same three pictures as above, before (upper row) and after (lower row):

# %%
images = [image.cpu() for image, _ in shown]
after = predict(model, images, device, score_threshold=0.5)
titles = ["before"] * 3 + ["after"] * 3
show([*images, *images], [*before, *after], titles=titles)
plt.show()

# %% [markdown]
# ## Where it fails
#
# A person counts as found when some detection overlaps them with an IoU of at least
# 0.5. This is the test image with the most people who were *not* found; their boxes are on the left,
# all detections over 0.5 on the right.

# %%
from torchvision.ops import box_iou

test_samples = [test_set[i] for i in range(len(test_set))]
found = [predict(model, [image], device)[0] for image, _ in test_samples]
missed = []
for (_, target), prediction in zip(test_samples, found, strict=True):
    overlap = box_iou(target["boxes"], prediction["boxes"])
    best = (
        overlap.max(dim=1).values
        if overlap.numel()
        else torch.zeros(len(target["boxes"]))
    )
    missed.append(best < 0.5)
worst = max(range(len(missed)), key=lambda i: missed[i].sum())
image, target = test_samples[worst]
not_found = {"boxes": target["boxes"][missed[worst]]}
show(
    [image, image],
    [not_found, found[worst]],
    ["not found", "detections"],
    columns=2,
    cell=(5.5, 4),
)
plt.show()

# %% tags=["nbval-ignore-output"]
people = sum(len(target["boxes"]) for _, target in test_samples)
lost = int(sum(m.sum() for m in missed))
print(f"{lost} of {people} people on the test images are not found at score 0.5")

# %% tags=["results", "nbval-ignore-output"]
{"box_AP": round(finetuned.box.AP, 4)}

# %% [markdown]
# ## Look inside
#
# What happens between a picture and its boxes? We take the first of the three
# pictures above and call the model's own parts on it, one after the other, in the
# order of the drawing at the top. Every shape that is printed is checked, and at the
# end the parts, called by hand, have to give what `model([image])` gives.
#
# To see masks as well, we build a Mask R-CNN around the detector that we have
# just trained. Its state dict lacks nothing but the third branch:

# %%
inside = get_model(
    preset.mask_rcnn,
    weights=preset.weights,
    min_size=preset.min_size[-1],
    max_size=preset.max_size,
)
inside = replace_box_predictor(inside, num_classes).to(device)
missing, unexpected = inside.load_state_dict(model.state_dict(), strict=False)
assert not unexpected
assert all(name.startswith("roi_heads.mask_") for name in missing)

# %% [markdown]
# The branch has not met the features of the finetuned backbone yet. So it is trained
# for two passes over the training images, on `loss_mask` alone; everything else stays
# as it is. (Notebook [04](04_penn_fudan_mask_rcnn.ipynb) trains a Mask R-CNN as a
# whole, and longer.)

# %% tags=["nbval-ignore-output"]
from itertools import chain

branch = nn.ModuleList([inside.roi_heads.mask_head, inside.roi_heads.mask_predictor])
inside.requires_grad_(False)
branch.requires_grad_(True)
optimizer = torch.optim.AdamW(branch.parameters(), lr=1e-3)
inside.train()
inside.backbone.eval()  # BatchNorm's statistics stay as they are

torch.manual_seed(SEED)
branch_losses = []
for images, targets in chain(train_loader, train_loader):
    loss = inside(*to_device(images, targets, device))["loss_mask"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    branch_losses.append(loss.item())
for half in (branch_losses[:steps], branch_losses[steps:]):
    print(f"loss_mask {sum(half) / steps:.3f}")

# %% [markdown]
# ### 1. `transform`: from the picture to a batch
#
# The shorter side becomes `min_size` (here the one size of evaluation), unless the longer one would then exceed
# `max_size`. Both are rounded down, and the batch is padded at the right and the
# bottom to multiples of 32, so that the backbone can halve it five times.

# %% tags=["nbval-ignore-output"]
inside.eval().requires_grad_(False)
image, target = shown[0]
image = image.to(device)
batch, _ = inside.transform([image])
height, width = batch.image_sizes[0]
print("the picture:", list(image.shape))
print("resized:    ", [3, height, width])
print("the batch:  ", list(batch.tensors.shape))

# %% [markdown]
# The same by hand. Normalising subtracts ImageNet's mean of each channel and divides
# by its standard deviation, since that is what the weights were trained with. It
# comes before the padding, whose zeros are therefore not black but the mean colour.

# %%
import math

scale = min(
    preset.min_size[-1] / min(image.shape[1:]), preset.max_size / max(image.shape[1:])
)
assert [height, width] == [int(side * scale) for side in image.shape[1:]]
padded = [math.ceil(side / 32) * 32 for side in (height, width)]
assert list(batch.tensors.shape) == [1, 3, *padded]

mean = torch.tensor(inside.transform.image_mean, device=device)[:, None, None]
std = torch.tensor(inside.transform.image_std, device=device)[:, None, None]
resized = torch.nn.functional.interpolate(
    ((image - mean) / std)[None], size=(height, width), mode="bilinear"
)
by_hand = torch.zeros_like(batch.tensors)
by_hand[..., :height, :width] = resized
torch.testing.assert_close(batch.tensors, by_hand)

# %% [markdown]
# On the left, at one scale: the picture, and how it lies in a batch together with the
# second one, with the normalisation taken back for the eye. On the right the top of
# the first person, 40 pixels wide, before and after: what the model gets to see.

# %%
both, _ = inside.transform([image, shown[1][0].to(device)])
pictures = [image, *(both.tensors * std + mean)]
pictures = [p.clamp(0, 1).permute(1, 2, 0).cpu() for p in pictures]
x1, top, x2, _ = target["boxes"][0].tolist()
left = (x1 + x2) / 2 - 20
figure, panels = plt.subplots(
    1, 5, figsize=(15, 3), width_ratios=[4, 4, 4, 3, 3], layout="constrained"
)
titles = ["the picture", "in a batch of two", "the other one", "40 pixels", "resized"]
for axes, i, title in zip(panels, (0, 1, 2, 0, 1), titles, strict=True):
    axes.imshow(pictures[i], interpolation="nearest")
    axes.set_title(title)
for axes in panels[:3]:
    axes.set_xlim(0, max(p.shape[1] for p in pictures))
    axes.set_ylim(max(p.shape[0] for p in pictures), 0)
for axes, factor in zip(panels[3:], (1, width / image.shape[2]), strict=True):
    axes.set_xlim(left * factor, (left + 40) * factor)
    axes.set_ylim((top + 40) * factor, top * factor)
plt.show()

# %% [markdown]
# ### 2. `backbone`: five maps of the same picture
#
# Each level of the pyramid has the same number of channels. A cell of level `"0"`
# stands for 4 × 4 pixels of the batch, one of `"pool"` for 64 × 64:

# %% tags=["nbval-ignore-output"]
features = inside.backbone(batch.tensors)
strides = (4, 8, 16, 32, 64)
for (level, feature), stride in zip(features.items(), strides, strict=True):
    print(f"level {level:4}  stride {stride:2}  {list(feature.shape)}")
    cells = [math.ceil(side / stride) for side in padded]
    assert list(feature.shape) == [1, inside.backbone.out_channels, *cells]

# %% [markdown]
# For each cell, the length of its vector of channels. The fine levels follow
# outlines, the coarse ones know only roughly where. (Not all that is bright is a
# thing: beyond the edge of its input a convolution sees zeros, and the cells there
# show it.)

# %%
view = (batch.tensors[0] * std + mean).clamp(0, 1).permute(1, 2, 0).cpu()
extent = (0, padded[1], padded[0], 0)
figure, panels = plt.subplots(2, 3, figsize=(13, 6), layout="constrained")
for axes in panels.flat:
    axes.axis("off")
panels[0, 0].imshow(view, extent=extent)
panels[0, 0].set_title("the batch")
for axes, level in zip(panels.flat[1:], features, strict=True):
    lengths = features[level][0].norm(dim=0).cpu()
    axes.imshow(lengths, cmap="magma", extent=extent)
    axes.set_title(f'level "{level}"')
plt.show()

# %% [markdown]
# ### 3. `rpn`: anchors, objectness, proposals
#
# `rpn.head` goes over every level with the same weights. For each of three anchors in
# a cell it gives one logit, the *objectness*, and four numbers that move the anchor.

# %% tags=["nbval-ignore-output"]
maps = list(features.values())
objectness, deltas = inside.rpn.head(maps)
anchors = inside.rpn.anchor_generator(batch, maps)
per_level = [logits.numel() for logits in objectness]
for feature, logits, delta in zip(maps, objectness, deltas, strict=True):
    print(list(logits.shape), list(delta.shape))
    assert list(logits.shape) == [1, 3, *feature.shape[2:]]
    assert list(delta.shape) == [1, 3 * 4, *feature.shape[2:]]
print("anchors:", list(anchors[0].shape))
assert list(anchors[0].shape) == [sum(per_level), 4]

# %% [markdown]
# The anchors of one cell in the middle of each level, and, for every cell, the
# sigmoid of the best objectness of its three. A person lights up on the levels whose
# anchors are of about their size:


# %%
def outline(axes, boxes, colour, **line):
    """Draw boxes as lines, which may be thinner than a pixel."""
    for x1, y1, x2, y2 in boxes.tolist():
        axes.add_patch(
            plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, **line)
        )


figure, panels = plt.subplots(2, 3, figsize=(13, 6), layout="constrained")
for axes in panels.flat:
    axes.axis("off")
panels[0, 0].imshow(view, extent=extent)
panels[0, 0].set_title("anchors of one cell of each level")
of_levels = anchors[0].split(per_level)
for i, (axes, level) in enumerate(zip(panels.flat[1:], features, strict=True)):
    rows, columns = objectness[i].shape[2:]
    grid = of_levels[i].view(rows, columns, 3, 4)
    outline(panels[0, 0], grid[rows // 2, columns // 2], f"C{i}", lw=1.5)
    heat = objectness[i][0].sigmoid().amax(dim=0).cpu()
    drawn = axes.imshow(heat, cmap="magma", vmin=0, vmax=1, extent=extent)
    axes.set_title(f'objectness, level "{level}"')
figure.colorbar(drawn, ax=panels[:, -1], shrink=0.8)
plt.show()

# %% [markdown]
# `box_coder.decode` moves all anchors. The first two numbers shift the centre, in
# widths and heights of the anchor; the other two are logarithms of the factors for
# its width and height. Then `filter_proposals` takes the best of each level, and
# non-maximum suppression (NMS) drops what overlaps a better one of that level by an
# IoU over 0.7:

# %% tags=["nbval-ignore-output"]
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import box_convert

logits, moves = concat_box_prediction_layers(objectness, deltas)
moved = inside.rpn.box_coder.decode(moves, anchors).view(1, -1, 4)
filtered = inside.rpn.filter_proposals(moved, logits, batch.image_sizes, per_level)
proposals, proposal_scores = filtered
print(f"{len(moved[0])} moved anchors, {len(proposals[0])} proposals")
assert len(proposals[0]) <= inside.rpn.post_nms_top_n()
assert inside.rpn.nms_thresh == 0.7

top = logits.flatten().topk(30).indices
centre, size = box_convert(anchors[0][top], "xyxy", "cxcywh").split(2, dim=1)
centre, size = centre + moves[top, :2] * size, size * moves[top, 2:].exp()
by_hand = box_convert(torch.cat([centre, size], dim=1), "cxcywh", "xyxy")
torch.testing.assert_close(moved[0, top], by_hand, rtol=0, atol=0.01)

# %% [markdown]
# The 30 anchors with the highest objectness, where they are moved to, and the 30 best
# that are left after NMS:

# %%
figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
titles = ["the 30 best anchors", "moved", "the 30 best after NMS"]
drawn = [anchors[0][top], moved[0, top], proposals[0][:30]]
for axes, title, boxes in zip(panels, titles, drawn, strict=True):
    axes.imshow(view, extent=extent)
    axes.axis("off")
    axes.set_title(title)
    outline(axes, boxes, "yellow", lw=0.8)
plt.show()

# %% [markdown]
# NMS leaves fewer boxes for each person, and so room for others among the 30. There
# can still be several for each: boxes from two levels are never compared, and 0.7 is lenient,
# so that of two people who stand close together neither is dropped. Of all levels together
# at most `post_nms_top_n` are kept.
#
# ### 4. `box_roi_pool`: the features under each proposal
#
# RoIAlign lays a grid of 7 × 7 over each proposal, whatever its size, and takes for each cell the mean
# of 2 × 2 points (`sampling_ratio=2`), read from the features by bilinear interpolation. A large proposal is read from a
# coarse level, a small one from a fine level: from `"0"` where the root of its area
# is below 112 pixels, from `"1"` below 224, `"2"` below 448.

# %% tags=["nbval-ignore-output"]
from torchvision.ops import box_area, nms, roi_align

pooled = inside.roi_heads.box_roi_pool(features, proposals, batch.image_sizes)
levels = inside.roi_heads.box_roi_pool.map_levels(proposals)
print(list(pooled.shape))
channels = inside.backbone.out_channels
assert list(pooled.shape) == [len(proposals[0]), channels, 7, 7]
sides = box_area(proposals[0]).sqrt()
expected = torch.bucketize(
    sides, torch.tensor([112.0, 224, 448], device=device), right=True
)
assert (levels == expected).float().mean() > 0.99

first = levels[0].item()
grid = {"output_size": 7, "spatial_scale": 1 / strides[first], "sampling_ratio": 2}
by_hand = roi_align(maps[first], [proposals[0][:1]], **grid)
torch.testing.assert_close(pooled[:1], by_hand)

# %% [markdown]
# Four proposals that lie apart. Above, the picture under them. In the middle, what
# RoIAlign makes of its pixels, to show how coarse 7 × 7 is. Below, its crop of the
# feature map, which the head gets; of the channels only the length of their vector is
# drawn:

# %%
apart = nms(proposals[0], proposal_scores[0], 0.2)[:4]
pixels = view.permute(2, 0, 1)[None]
small = roi_align(pixels, [proposals[0][apart].cpu()], 7, sampling_ratio=2)
figure, panels = plt.subplots(3, 4, figsize=(10, 7.5), layout="constrained")
for axes in panels.flat:
    axes.axis("off")
for (above, middle, below), i, crop in zip(panels.T, apart, small, strict=True):
    x1, y1, x2, y2 = proposals[0][i].round().int().tolist()
    above.imshow(view[y1:y2, x1:x2])
    above.set_title(f'{x2 - x1} × {y2 - y1} pixels, level "{levels[i]}"', fontsize=10)
    middle.imshow(crop.permute(1, 2, 0))
    below.imshow(pooled[i].norm(dim=0).cpu(), cmap="magma")
plt.show()

# %% [markdown]
# ### 5. `box_head` and `box_predictor`: what it is, and where exactly
#
# The crop becomes a vector, and the vector two scores and two boxes: one for each
# class, and the background's box is never used. `postprocess_detections` moves the
# proposals, drops those that score at most 0.05, and runs NMS again, now within each
# class and at an IoU of 0.5:

# %% tags=["nbval-ignore-output"]
vectors = inside.roi_heads.box_head(pooled)
class_logits, box_regression = inside.roi_heads.box_predictor(vectors)
print(*(list(t.shape) for t in (vectors, class_logits, box_regression)))
assert list(vectors.shape) == [len(proposals[0]), in_features]
assert list(class_logits.shape) == [len(proposals[0]), num_classes]
assert list(box_regression.shape) == [len(proposals[0]), num_classes * 4]

boxes, scores, labels = inside.roi_heads.postprocess_detections(
    class_logits, box_regression, proposals, batch.image_sizes
)
assert inside.roi_heads.score_thresh == 0.05 and inside.roi_heads.nms_thresh == 0.5

# %% [markdown]
# The 20 proposals that look most like a person, how the second stage corrects them,
# and what is left with a score over 0.5:

# %%
likely = class_logits.softmax(dim=1)[:, 1].topk(20).indices
corrected = inside.roi_heads.box_coder.decode(box_regression, proposals)[:, 1]
figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
titles = ["the 20 likeliest proposals", "corrected", "after NMS, score over 0.5"]
drawn = [proposals[0][likely], corrected[likely], boxes[0][scores[0] > 0.5]]
for axes, title, chosen in zip(panels, titles, drawn, strict=True):
    axes.imshow(view, extent=extent)
    axes.axis("off")
    axes.set_title(title)
    outline(axes, chosen, "yellow", lw=1)
plt.show()

# %% [markdown]
# ### 6. The mask branch: 28 × 28, pasted
#
# For each detection the features are pooled again, to 14 × 14, and become 28 × 28
# logits for each class the branch knows. The label says which of them counts:

# %% tags=["nbval-ignore-output"]
from torchvision.models.detection.roi_heads import maskrcnn_inference

mask_features = inside.roi_heads.mask_roi_pool(features, boxes, batch.image_sizes)
mask_logits = inside.roi_heads.mask_predictor(inside.roi_heads.mask_head(mask_features))
masks = maskrcnn_inference(mask_logits, labels)
print(*(list(t.shape) for t in (mask_features, mask_logits, masks[0])))
found = len(boxes[0])
assert list(mask_features.shape) == [found, channels, 14, 14]
assert list(mask_logits.shape) == [found, len(categories), 28, 28]
assert list(masks[0].shape) == [found, 1, 28, 28]

# %% [markdown]
# `transform.postprocess` brings everything back to the pixels of the picture, and
# pastes each mask into its box, stretched to its size. That was the last step. The
# parts by hand give what the model gives, and the boxes are those of the Faster
# R-CNN, since only the mask branch was trained here. Trained as a whole, as in notebook 04,
# `loss_mask` changes the backbone, and with it the boxes.

# %%
result = {
    "boxes": boxes[0],
    "labels": labels[0],
    "scores": scores[0],
    "masks": masks[0],
}
detections = inside.transform.postprocess(
    [result.copy()], batch.image_sizes, [image.shape[1:]]
)[0]
expected = inside([image])[0]
assert set(detections) == set(expected)
for name in expected:
    torch.testing.assert_close(detections[name], expected[name], rtol=1e-3, atol=1e-2)
faster_rcnn = predict(model, [image], device, score_threshold=0)[0]
torch.testing.assert_close(
    detections["boxes"].cpu(), faster_rcnn["boxes"], rtol=1e-3, atol=1e-2
)

# %% [markdown]
# The two best detections: the mask as predicted, pasted into the picture, and cut at
# 0.5. The axes count cells on the left, pixels of the picture elsewhere. An outline
# cannot be finer than the 28 cells across its box, however large the picture:

# %%
figure, panels = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
for i, (left, middle, right) in enumerate(panels[:found]):
    left.imshow(masks[0][i, 0].cpu(), cmap="magma", vmin=0, vmax=1)
    left.set_title("28 × 28, as predicted")
    pasted = detections["masks"][i, 0].cpu()
    x1, y1, x2, y2 = detections["boxes"][i].tolist()
    margin = 0.2 * max(x2 - x1, y2 - y1)
    for axes in (middle, right):
        axes.imshow(image.permute(1, 2, 0).cpu())
        outline(axes, detections["boxes"][i : i + 1], "yellow", lw=1)
        axes.set_xlim(max(0, x1 - margin), min(image.shape[2], x2 + margin))
        axes.set_ylim(min(image.shape[1], y2 + margin), max(0, y1 - margin))
    middle.imshow(pasted, cmap="magma", vmin=0, vmax=1, alpha=0.7)
    middle.set_title("pasted into its box")
    right.contour(pasted, levels=[0.5], colors="cyan", linewidths=1.5)
    right.set_title("cut at 0.5")
plt.show()

# %% [markdown]
# ### 7. Where the losses come from
#
# In training mode the same parts run, and their answers are compared with the target.
# First the anchors. One is *positive* if its IoU with a person is at least 0.7, or if
# no other fits that person better; *negative* if its IoU with everybody is below 0.3;
# what lies between is ignored. There are far too many negatives, so at most 256
# anchors are drawn at random, at most half of them positive.

# %% tags=["nbval-ignore-output"]
inside.train()
inside.backbone.eval()
torch.manual_seed(SEED)
_, targets = to_device([], [target], device)
_, targets = inside.transform([image], targets)
anchor_labels, matched = inside.rpn.assign_targets_to_anchors(anchors, targets)
drawn = inside.rpn.fg_bg_sampler(anchor_labels)
positive, negative = drawn[0][0].bool(), drawn[1][0].bool()
for name, value in (("positive", 1), ("negative", 0), ("ignored", -1)):
    kind = anchor_labels[0] == value
    used = kind & (positive | negative)
    print(f"{name:8} {kind.sum().item():6}, drawn {used.sum().item():3}")
assert positive.sum() + negative.sum() == 256 and positive.sum() <= 128
assert (anchor_labels[0] == 1).sum() < (anchor_labels[0] == 0).sum() / 10
matcher = inside.rpn.proposal_matcher
assert (matcher.low_threshold, matcher.high_threshold) == (0.3, 0.7)

# %% [markdown]
# The boxes of the target are dashed. Positive anchors are few, and need not fit well:
# that is what the four numbers are for.

# %%
figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
titles = ["positive, drawn", "30 of those ignored", "negative, drawn"]
ignored = (anchor_labels[0] == -1).nonzero().flatten()
ignored = ignored[torch.linspace(0, len(ignored) - 1, 30).long()]
for axes, title, which, colour in zip(
    panels, titles, (positive, ignored, negative), ("C2", "C1", "C3"), strict=True
):
    axes.imshow(view, extent=extent)
    axes.set(xlim=extent[:2], ylim=extent[2:], title=title)
    axes.axis("off")
    outline(axes, anchors[0][which], colour, lw=1.5 if which is positive else 0.7)
    outline(axes, targets[0]["boxes"], "white", lw=1.5, ls="--")
plt.show()

# %% [markdown]
# `loss_objectness` is the mean cross-entropy over all anchors drawn.
# `loss_rpn_box_reg` looks at the positive ones only: how far are the four numbers
# from those that would have moved the anchor onto its person? The sum is divided by the
# number of all anchors drawn, negatives included.

# %%
from torch.nn import functional as F

sampled = positive | negative
objectness_terms = F.binary_cross_entropy_with_logits(
    logits.flatten(), anchor_labels[0], reduction="none"
)
wanted = inside.rpn.box_coder.encode(matched, anchors)[0]
move_terms = F.smooth_l1_loss(moves, wanted, beta=1 / 9, reduction="none").sum(dim=1)
by_hand = {
    "loss_objectness": objectness_terms[sampled].mean(),
    "loss_rpn_box_reg": move_terms[positive].sum() / sampled.sum(),
}

# %% [markdown]
# The second stage does the same with proposals. `select_training_samples` adds the
# target's own boxes to them, calls a proposal a person if its IoU with one is at
# least 0.5 and background if not, and draws a fixed number of them at random, at most a quarter of it people.
# `loss_classifier` is the mean over all drawn; `loss_box_reg` sums over the people among them, and divides by all drawn:

# %%
filtered = inside.rpn.filter_proposals(moved, logits, batch.image_sizes, per_level)
rois, matched, roi_labels, wanted = inside.roi_heads.select_training_samples(
    filtered[0], targets
)
person = roi_labels[0] == 1
assert person.sum() <= inside.roi_heads.fg_bg_sampler.batch_size_per_image / 4
assert inside.roi_heads.proposal_matcher.high_threshold == 0.5
pooled = inside.roi_heads.box_roi_pool(features, rois, batch.image_sizes)
class_logits, box_regression = inside.roi_heads.box_predictor(
    inside.roi_heads.box_head(pooled)
)
class_terms = F.cross_entropy(class_logits, roi_labels[0], reduction="none")
of_person = box_regression.view(-1, num_classes, 4)[:, 1]
box_terms = F.smooth_l1_loss(of_person, wanted[0], beta=1 / 9, reduction="none").sum(1)
by_hand["loss_classifier"] = class_terms.mean()
by_hand["loss_box_reg"] = box_terms[person].sum() / len(person)

# %% [markdown]
# And the masks: for each proposal that is a person, `project_masks_on_boxes` cuts the part under
# it out of that person's target mask, as 28 × 28, with RoIAlign again. `loss_mask` is the mean
# cross-entropy of all their cells, in the logits of the person's class:

# %%
from torchvision.models.detection.roi_heads import project_masks_on_boxes

people = rois[0][person]
mask_targets = project_masks_on_boxes(
    targets[0]["masks"], people, matched[0][person], 28
)
mask_features = inside.roi_heads.mask_roi_pool(features, [people], batch.image_sizes)
mask_logits = inside.roi_heads.mask_predictor(inside.roi_heads.mask_head(mask_features))
mask_logits = mask_logits[:, 1]
mask_terms = F.binary_cross_entropy_with_logits(
    mask_logits, mask_targets, reduction="none"
)
assert mask_terms.shape == mask_targets.shape == (len(people), 28, 28)
by_hand["loss_mask"] = mask_terms.mean()

# %% [markdown]
# With the same seed the model draws the same anchors and proposals, so all five must
# agree:

# %% tags=["nbval-ignore-output"]
torch.manual_seed(SEED)
losses = inside(*to_device([image], [target], device))
assert set(losses) == set(by_hand)
for name, value in losses.items():
    print(f"{name:18}{value.item():.4f}   by hand {by_hand[name].item():.4f}")
    torch.testing.assert_close(value, by_hand[name], rtol=1e-4, atol=1e-5)

# %% [markdown]
# Where on the picture do they come from? For each loss of the boxes, the anchors or
# proposals with the ten largest terms, the largest in yellow:

# %%
sources = {
    "loss_objectness": (anchors[0][sampled], objectness_terms[sampled]),
    "loss_rpn_box_reg": (anchors[0][positive], move_terms[positive]),
    "loss_classifier": (rois[0], class_terms),
    "loss_box_reg": (people, box_terms[person]),
}
figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
for axes, (name, (chosen, terms)) in zip(panels.flat, sources.items(), strict=True):
    axes.imshow(view, extent=extent, alpha=0.6)
    axes.set(xlim=extent[:2], ylim=extent[2:], title=name)
    axes.axis("off")
    for i in terms.argsort()[-10:]:
        colour = plt.cm.plasma((terms[i] / terms.max()).item())
        outline(axes, chosen[i : i + 1], colour, lw=1.8)
plt.show()

# %% [markdown]
# And for `loss_mask`, the proposals with the smallest and the largest mean: the
# target, the prediction, and the terms of the mean. They show what each
# prediction gets wrong:

# %%
order = mask_terms.mean(dim=(1, 2)).argsort()
figure, panels = plt.subplots(2, 4, figsize=(11, 6), layout="constrained")
for row, i in zip(panels, (order[0], order[-1]), strict=True):
    x1, y1, x2, y2 = people[i].round().int().tolist()
    row[0].imshow(view[y1:y2, x1:x2])
    row[0].set_title("the proposal")
    for axes, cells, title in (
        (row[1], mask_targets[i], "target"),
        (row[2], mask_logits[i].sigmoid(), "prediction"),
        (row[3], mask_terms[i], "terms of loss_mask"),
    ):
        axes.imshow(cells.cpu(), cmap="magma", vmin=0)
        axes.set_title(title)
for axes in panels.flat:
    axes.axis("off")
plt.show()

# %% [markdown]
# ### The whole way
#
# The drawing at the top of this notebook, with the same picture at every stage, and
# its width and height there:

# %%
heat = features["1"][0].norm(dim=0).cpu()
heat = torch.tensor(plt.cm.magma(plt.Normalize()(heat)))[..., :3].permute(2, 0, 1)
best = {k: v[detections["scores"] > 0.5] for k, v in detections.items()}
boxes_alone = {"boxes": best["boxes"], "scores": best["scores"]}
stages = {
    "images": (image, None),
    "transform": (pixels[0], None),
    'backbone, level "1"': (heat, None),
    "rpn, the 15 best proposals": (pixels[0], {"boxes": proposals[0][:15]}),
    "roi_heads, boxes that score over 0.5": (image, boxes_alone),
    "roi_heads, their masks": (image, best),
}
sizes = [" × ".join(map(str, picture.shape[:0:-1])) for picture, _ in stages.values()]
titles = [f"{name} ({size})" for name, size in zip(stages, sizes, strict=True)]
show(*zip(*stages.values(), strict=True), titles, cell=(4.2, 3.2))
plt.show()

# %% [markdown]
# ## Where the small models' weights come from
#
# `quick` and `laptop` need a detector that was trained before, and no download. Its
# weights are a file of 5 MB in this project, trained by
# `python -m tutorial_lib.weights.pretrain` on scenes like these, drawn by code, with seven
# kinds of things in them:

# %%
import numpy as np
from torchvision.transforms.v2.functional import pil_to_tensor

from tutorial_lib.sample import draw_scene

scenes = [
    draw_scene(np.random.default_rng([SEED, i]), others=(2, 4))[0] for i in range(4)
]
show([pil_to_tensor(scene) for scene in scenes], columns=4)
plt.show()

# %% [markdown]
# They stand in for COCO in the order of the lesson: pre-train, look, finetune. They have never
# seen a photograph, nor fog, in which the sample of `quick` lies; the zero-shot row
# above shows it. What they are worth is measured by `python -m tests.benchmarks.starter`: after 4 epochs on the 100 photographs of
# `laptop`, Mask R-CNN has a test mask AP of 0.346 ± 0.016 from these weights and of 0.006 ± 0.007 from random ones (means and
# spreads of 3 seeds, on 2 CPU cores; `tests/benchmarks/results/starter.json`).

# %% [markdown]
# ## Recap
#
# - **Measure** the model before you train it; that row costs one pass over the test images.
# - **Replace** `roi_heads.box_predictor` with one for your classes, background included.
# - **Check** what is new and what is kept; everything but four tensors is.
# - **Sum** the losses, step, and stop if the sum is not finite.
# - **Choose** on validation, **report** on test.
# - **Look** inside when an answer surprises you: each part can be called alone, and what it gives drawn.

# %% [markdown]
# ## On your own
#
# 1. Train only the new predictor: set `requires_grad_(False)` on everything else. What
#    does AP lose, and the time of an epoch?
#    <details><summary>Hint</summary>Loop over <code>old_parameters.values()</code> before building the optimizer.</details>
# 2. Keep "person" instead of starting at random: copy the rows of the old `cls_score` and
#    `bbox_pred` for classes 0 and 1 into the new ones.
#    <details><summary>Hint</summary><code>bbox_pred</code> has four rows for each class, so classes 0 and 1 are rows 0 to 7.</details>
# 3. Train three seeds. How far apart are the APs?
#    <details><summary>Hint</summary>Set <code>SEED</code> for the training only, and keep the split's.</details>
# 4. Take somebody who was not found in "Where it fails" through "Look inside". Which part loses them: is
#    there no proposal with an IoU of at least 0.5, is its score low, or does the last NMS drop it?
#    <details><summary>Hint</summary><code>image, target = test_samples[worst]</code>; scale the target's boxes to the batch, and compare with <code>box_iou</code> after each stage.</details>

# %% [markdown]
# ## In practice
#
# - `num_classes` counts the background. With ten kinds of things it is 11, and their labels are 1 to
#   10. A label of 0 is accepted in silence, and teaches the model that the object is background.
#   One that is too large is `IndexError: Target 11 is out of bounds` on the CPU, and on CUDA a
#   "device-side assert".
# - The optimizer must be built **after** the predictor is replaced, or it trains the old one.
# - Replacing the predictor throws away what the model knew of your class. When "person" is all
#   you need, the zero-shot row may already do.
# - Every number here is from one seed and few test images (16 at `quick`, 50 elsewhere), and the third decimal means little:
#   exercise 3 shows how far apart seeds are.
#
# ## Further reading
#
# - [Faster R-CNN](https://arxiv.org/abs/1506.01497), [Feature Pyramid
#   Networks](https://arxiv.org/abs/1612.03144), [Mask R-CNN](https://arxiv.org/abs/1703.06870).
# - [torchvision's detection models](https://docs.pytorch.org/vision/stable/models.html#object-detection-instance-segmentation-and-person-keypoint-detection).
# - [What COCO's metrics are](https://cocodataset.org/#detection-eval).
#
# **Next:** [03, swap the backbone](03_swapping_the_backbone.ipynb).
