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
# one with your classes, and train it on 100 photographs (at `quick`, on 40 synthetic images).

# %% [markdown]
# ## What you'll do
#
# - see what Faster R-CNN and Mask R-CNN are made of;
# - ask a pre-trained detector for people *before* any training, and measure it;
# - replace its classifier, and check which weights are new and which are kept;
# - write one training step by hand, then the loop;
# - compare before and after, on images that were not used for anything else.
#
# **You need** notebook [01](01_dataset.ipynb), or a dataset that gives what it builds.
#
# | preset | detector | trained on | time |
# |---|---|---|---|
# | `quick` | `fasterrcnn_mini_fpn`, 2.2 M parameters | 40 synthetic images | 1 min or so on one CPU core |
# | `laptop` | the same | 100 photographs | 7 min or so on one CPU core |
# | `full` | `fasterrcnn_resnet50_fpn`, 41.8 M parameters | 100 photographs | a GPU; without one, smaller images and fewer epochs (not measured yet) |

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
# The preset, as in notebook 01. `fetch_weights` downloads what the preset needs now, so that a
# missing network stops us here and not in the middle.

# %% tags=["nbval-ignore-output"]
import torch

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
print(provenance(preset, device))

# %% [markdown]
# ## What a Faster R-CNN is made of
#
# Faster R-CNN ([Ren et al. 2015, arXiv 1506.01497](https://arxiv.org/abs/1506.01497))
# finds objects in two stages. The RPN proposes boxes, and the RoI heads (RoI is a region of
# interest) classify and correct each of them. The names are torchvision's:
#
# ![Faster R-CNN: images go through transform, as one batch, to the backbone. Its feature maps go to the rpn, which gives proposals, and to roi_heads. There box_roi_pool, box_head and box_predictor make boxes, labels and scores of feature maps and proposals.](images/faster_rcnn.svg)
#
# 1. `transform` resizes and normalises the images and pads them to one batch.
# 2. `backbone` is a classification network without its classifier. It turns the
#    batch into feature maps; with a feature pyramid (FPN), into one for each of several scales.
# 3. `rpn`, the region proposal network, looks at every location of the feature maps. There
#    it has a few boxes of fixed sizes, the *anchors*. For each it says whether there
#    is an object (any object) and how the anchor should be moved. The best are the *proposals*.
# 4. `roi_heads.box_roi_pool` cuts the features under each proposal out, as 7 × 7 values
#    for each channel, whatever the proposal's size.
# 5. `roi_heads.box_head` makes a vector of them, and `roi_heads.box_predictor` two
#    things of the vector: a score for each class, and a correction of the box for each class.
#
# Mask R-CNN ([He et al. 2017, arXiv 1703.06870](https://arxiv.org/abs/1703.06870)) adds
# a third branch, which predicts a mask of 28 × 28 for each class. In evaluation it gets only
# the boxes that were detected. Notebook [08](08_inside_mask_rcnn.ipynb) follows a picture
# through all of these parts.
#
# ![Mask R-CNN: as Faster R-CNN, with a second row in roi_heads. There mask_roi_pool, mask_head and mask_predictor make masks of the feature maps and of the boxes that box_predictor gives, in training of the proposals.](images/mask_rcnn.svg)

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
# trained on synthetic street scenes and are a file of this project (see the end of this notebook).
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
# Weights know their categories. "person" is number 1 of COCO and of our synthetic scenes, and
# 1 is the label that our dataset gives to people. So we can ask this model for people
# **without training anything**, and measure the answer. We call this row *zero-shot*: the model knows the class, but has
# seen none of our images. It tells what finetuning buys.

# %%
from torch.utils.data import DataLoader

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
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
# How to read it: *precision* is the share of detections that are right, *recall* the share of objects that are detected.
# **AP** is COCO's average precision, the area under the
# precision-recall curve, averaged over how exactly a box has to fit: an IoU of at least 0.50,
# 0.55 … 0.95. IoU, *intersection over union*, is the area that two boxes share divided by the
# area that they cover together. AP50 asks for an IoU of 0.5 only, AP75 for 0.75. AR is the recall with up to
# 100 detections an image, averaged over the same thresholds; AR1 and AR10 allow 1 and 10. Small is an area under
# 32² pixels, large one over 96². All are between 0 and 1; "no such objects" means there was nothing to measure on.
#
# And how it looks, with the detections that score at least 0.5. The model also detects
# the other classes that it knows:

# %%
import matplotlib.pyplot as plt

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

# %%
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

old_parameters = dict(model.named_parameters())

num_classes = 2  # background and person
in_features = model.roi_heads.box_predictor.cls_score.in_features
model.roi_heads.box_predictor = FastRCNNPredictor(in_features, num_classes).to(device)

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
    model.roi_heads.box_predictor = new.to(old.weight)
    return model


# %% [markdown]
# ## Two modes, two kinds of answers
#
# In **training** mode the model wants targets, and returns losses; in **evaluation** mode
# it takes only images, and returns detections.

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
# progress bar, the learning rate's schedule, and a stop when the loss is no longer finite.
# (One step with such a loss spoils every weight.) This cell needs nothing else of ours:

# %% tags=["copy-me"]
# tutorial_lib/engine.py
import sys
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm


def to_device(
    images: Iterable[Tensor], targets: Iterable[dict], device: torch.device
) -> tuple[list, list]:
    to = partial(
        Tensor.to, device=device, non_blocking=device.type == "cuda"
    )  # MPS would copy from freed memory
    images = [to(image) for image in images]
    targets = [
        {k: to(v) if isinstance(v, Tensor) else v for k, v in target.items()}
        for target in targets
    ]
    return images, targets


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
        images, targets = to_device(images, targets, device)
        losses = model(images, targets)
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            values = ", ".join(
                f"{name} {value.item():.3g}" for name, value in losses.items()
            )
            raise FloatingPointError(
                f"the loss is not finite at step {len(history) + 1} ({values}) on the images with image_id "
                f"{[target.get('image_id') for target in targets]}: look at their pixels and boxes "
                "(tutorial_lib.checks.check_dataset does), then lower the learning rate or lengthen the warm-up"
            )
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
# A person counts as detected when some detection has an IoU of at least 0.5 with them.
# This is the test image with the most *missed* people. Their boxes are on the left, all
# detections with a score of at least 0.5 on the right.

# %%
from torchvision.ops import box_iou

test_samples = [test_set[i] for i in range(len(test_set))]
detected = [predict(model, [image], device)[0] for image, _ in test_samples]
missed = []
for (_, target), prediction in zip(test_samples, detected, strict=True):
    overlap = box_iou(target["boxes"], prediction["boxes"])
    best = (
        overlap.max(dim=1).values
        if overlap.numel()
        else torch.zeros(len(target["boxes"]))
    )
    missed.append(best < 0.5)
worst = max(range(len(missed)), key=lambda i: missed[i].sum())
image, target = test_samples[worst]
not_detected = {"boxes": target["boxes"][missed[worst]]}
show(
    [image, image],
    [not_detected, detected[worst]],
    ["missed", "detections"],
    columns=2,
    cell=(5.5, 4),
)
plt.show()

# %% tags=["nbval-ignore-output"]
people = sum(len(target["boxes"]) for _, target in test_samples)
num_missed = int(sum(m.sum() for m in missed))
print(f"{num_missed} of {people} people on the test images are missed at score 0.5")

# %% tags=["results", "nbval-ignore-output"]
{"box_AP": round(finetuned.box.AP, 4)}

# %% [markdown]
# ## Where the small models' weights come from
#
# `quick` and `laptop` need a detector that was trained before, and no download. Its
# weights are a file of 5 MB in this project, trained by
# `python -m tools.pretrain` on synthetic scenes like these, with seven kinds of things in
# them:

# %%
import numpy as np
from torchvision.transforms.v2.functional import pil_to_tensor

from tutorial_lib.offline.sample import draw_scene

scenes = [
    draw_scene(np.random.default_rng([SEED, i]), others=(2, 4))[0] for i in range(4)
]
show([pil_to_tensor(scene) for scene in scenes], columns=4)
plt.show()

# %% [markdown]
# They stand in for COCO in the order of the lesson: pre-train, look, finetune. They have never
# seen a photograph, nor the fog of the images at `quick`; the zero-shot row above shows it.
# `python -m tools.benchmarks.starter` measures what they are worth. After 4 epochs on the 100
# photographs of `laptop`, Mask R-CNN has a test mask AP of 0.346 ± 0.016 from these weights,
# and of 0.006 ± 0.007 from random ones. (Means and spreads of 3 seeds, on 2 CPU cores;
# `tutorial_lib/results/starter.json`.)

# %% [markdown]
# ## Recap
#
# - **Measure** the model before you train it; that row costs one pass over the test images.
# - **Replace** `roi_heads.box_predictor` with one for your classes, background included.
# - **Check** what is new and what is kept; everything but four tensors is.
# - **Sum** the losses, step, and stop if the sum is not finite.
# - **Choose** on validation, **report** on test.

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
