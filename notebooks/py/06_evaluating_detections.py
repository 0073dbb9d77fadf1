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
# # Evaluate detections, and know what the number forgives
#
# One AP hides three things: how tightly boxes and masks fit, which errors cost most, and how far the number
# moves by chance. You train a Mask R-CNN three times, and look at each of the three.
#
# ## What you'll do
#
# - compute AP by hand on three images, and get the same number from pycocotools;
# - choose the score threshold of an application;
# - sort a detector's errors by cause, and rank the causes by the AP that fixing them would gain;
# - say how far AP moves with the seed, and with the choice of the test images.
#
# **You need** to have trained one of torchvision's detectors, as in notebook
# [02](02_finetuning_a_predictor.ipynb) or [04](04_penn_fudan_mask_rcnn.ipynb). On one CPU core it takes
# about 3 minutes at `quick` and 7 minutes at `laptop`. `full` is made for a GPU (not measured yet).

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
# The next cell turns the preset into plain constants. `full` takes torchvision's Mask R-CNN with a ResNet-50. `quick`
# and `laptop` take a small model with the same parts. `quick` has synthetic images instead of the photographs.
# There are three seeds, because one number has no spread.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset, fetch_weights, prepare_data, provenance

preset = choose_preset()
MODEL, WEIGHTS = preset.mask_rcnn, preset.weights
MIN_SIZE, MAX_SIZE = preset.min_size, preset.max_size
BATCH_SIZE, LEARNING_RATE, SPLIT = preset.batch_size, preset.learning_rate, preset.split
SEED, SEEDS, EPOCHS = 0, (0, 1, 2), 4

device, root = pick_device(), prepare_data(preset)
fetch_weights(MODEL, WEIGHTS)
print(provenance(preset, device))
print(f"{MODEL = }\n{WEIGHTS = }\n{MIN_SIZE = }\n{MAX_SIZE = }\n{BATCH_SIZE = }")
print(f"{LEARNING_RATE = }\n{SPLIT = }\n{SEED = }\n{SEEDS = }\n{EPOCHS = }")

# %% [markdown]
# ## The number to take apart
#
# Images that are neighbours in file order often show the same place. So each block of ten neighbours stays in one part
# of the split. The test loader has one image in each batch. torchvision's models pad a batch to one size, and that
# changes predictions a little.

# %%
from torch.utils.data import DataLoader

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

augmented = PennFudanDataset(root, get_transform(train=True), in_memory=True)
plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
train_set, _, _ = split_dataset(augmented, SPLIT, SEED, block=10)
_, val_set, test_set = split_dataset(plain, SPLIT, SEED, block=10)
val_loader = DataLoader(val_set, collate_fn=collate_fn)
test_loader = DataLoader(test_set, collate_fn=collate_fn)

# %% [markdown]
# The training is that of notebook 04, but shorter. The seed decides the order of the images, their
# augmentation, and which proposals are trained on.

# %%
import torch
from torchvision.models import get_model

from tutorial_lib.engine import train_one_epoch, use_bfloat16, warmup_cosine
from tutorial_lib.models import replace_predictors


def finetuned(seed):
    torch.manual_seed(seed)
    model = get_model(MODEL, weights=WEIGHTS, min_size=MIN_SIZE, max_size=MAX_SIZE)
    model = replace_predictors(model, num_classes=2).to(device)
    use_bfloat16(model, device)
    loader = DataLoader(
        train_set, BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=collate_fn
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = warmup_cosine(optimizer, len(loader), EPOCHS * len(loader))
    for _ in range(EPOCHS):
        train_one_epoch(model, optimizer, loader, device, lr_scheduler=schedule)
    return model


# %% [markdown]
# We keep the last epoch. In this notebook we choose nothing by the test images. We only look at their results:

# %% tags=["nbval-ignore-output"]
import statistics

from tutorial_lib.engine import evaluate

models = [finetuned(seed) for seed in SEEDS]
results = [evaluate(model, test_loader, device) for model in models]
print("           " + "".join(f"seed {seed}   " for seed in SEEDS) + "mean ± deviation")
for kind in ("box", "mask"):
    aps = [getattr(result, kind).AP for result in results]
    mean, spread = statistics.mean(aps), statistics.stdev(aps)
    row = "".join(f"  {ap:.3f}  " for ap in aps)
    print(f"{kind:4} AP  {row}   {mean:.3f} ± {spread:.3f}")

# %% [markdown]
# Only the seed differs. The last column has the sample standard deviation. From here on we look at the first model.
# These are its
# detections with a score of at least 0.5 on three test images:

# %%
import matplotlib.pyplot as plt

from tutorial_lib.engine import predict
from tutorial_lib.visualization import show

model, result = models[0], results[0]
pictures = [test_set[i][0] for i in range(3)]
show(pictures, predict(model, pictures, device, score_threshold=0.5))
plt.show()

# %% [markdown]
# ## How well does a box fit?
#
# Intersection over union, IoU, is the area that two boxes share, divided by the area that they
# cover together. Here are two boxes of 40 × 80 pixels. The second is the first, moved by 10 pixels to the right and 20
# down:

# %%
truth = torch.tensor([[30.0, 10, 70, 90]])
moved = torch.tensor([[40.0, 30, 80, 110]])
paper = torch.full((3, 120, 110), 0.93)
show([paper], [{"boxes": torch.cat([truth, moved])}], columns=1, cell=(3, 3))
plt.show()

# %% [markdown]
# They share 30 × 60 pixels. In the area that they cover together, these pixels count once. torchvision's `box_iou`
# gives the IoU of every box of one set with
# every box of another.

# %%
from torchvision.ops import box_iou

shared = (70 - 40) * (90 - 30)
covered = 40 * 80 + 40 * 80 - shared
print(f"by hand: {shared} / {covered} = {shared / covered:.3f}")
print(f"box_iou: {box_iou(truth, moved).item():.3f}")

# %% [markdown]
# A shift by a quarter of the width and of the height leaves an IoU under 0.5.
#
# ## How well does a mask fit?
#
# Count pixels: divide those that two masks share by those that they cover together. An ellipse and a cross can have the
# same box, and still a mask IoU far from 1:

# %%
y, x = torch.meshgrid(torch.arange(120), torch.arange(110), indexing="ij")
inside = (x >= 30) & (x < 70) & (y >= 10) & (y < 90)
ellipse = ((x - 49.5) / 20) ** 2 + ((y - 49.5) / 40) ** 2 <= 1
cross = inside & (((x - 49.5).abs() < 6) | ((y - 49.5).abs() < 12))
masks = (ellipse, cross, ellipse & cross)
shown = [{"boxes": truth, "masks": mask[None]} for mask in masks]
show([paper] * 3, shown, ["ellipse", "cross", "shared"], cell=(2.6, 2.6))
plt.show()
shared, covered = (ellipse & cross).sum(), (ellipse | cross).sum()
print(f"box IoU 1.000, mask IoU {shared} / {covered} = {shared / covered:.3f}")

# %% [markdown]
# So mask AP is a number of its own: a right box says little about the mask in it.
#
# ## AP by hand, on three images
#
# Image 0 has two people, image 1 has one, image 2 is empty. A made-up model gives four detections of one class:

# %%
people = [[[10, 10, 50, 90], [60, 20, 100, 100]], [[30, 30, 70, 110]], []]
detections = [  # image, box, score
    (0, [12, 10, 50, 86], 0.9),
    (1, [30, 30, 57, 110], 0.8),
    (2, [20, 20, 60, 100], 0.7),
    (0, [10, 14, 48, 96], 0.6),
]
targets, predictions = [], []
for image in range(3):
    found = [(box, score) for i, box, score in detections if i == image]
    boxes = torch.tensor(people[image]).float().reshape(-1, 4)
    targets.append({"boxes": boxes, "labels": torch.ones(len(boxes)).long()})
    boxes = torch.tensor([box for box, _ in found]).float().reshape(-1, 4)
    scores = torch.tensor([score for _, score in found])
    labels = torch.ones(len(boxes)).long()
    predictions.append({"boxes": boxes, "labels": labels, "scores": scores})
show([paper] * 6, targets + predictions, ["target"] * 3 + ["detections"] * 3)
plt.show()

# %% [markdown]
# The first step is matching. Take the detections in the order of their scores. Each is matched with the free person
# that it fits best, if the IoU reaches a threshold. The last detection fits a person who is already matched. Such a
# duplicate is an error.


# %%
def match(threshold):
    """For every detection, by falling score, whether it is matched with a person."""
    taken, right = set(), []
    for image, box, _ in detections:  # they are sorted already
        best, best_iou = None, threshold
        for person, person_box in enumerate(people[image]):
            iou = box_iou(torch.tensor([box]), torch.tensor([person_box])).item()
            if (image, person) not in taken and iou >= best_iou:
                best, best_iou = (image, person), iou
        if best is not None:
            taken.add(best)
        right.append(best is not None)
    return right


for threshold in (0.5, 0.75):
    print(f"IoU at least {threshold}: {match(threshold)}")

# %% [markdown]
# The second step is counting. Going down the list, *precision* is the share of the detections so far that are
# right. *Recall* is the share of all people who are detected so far. AP is the mean precision at 101 recalls,
# at 0, 0.01 and so on to 1. At each, take the best precision at this recall **or beyond**. Take 0 where the recall is
# never reached.

# %% tags=["copy-me"]
# Copy me: runs alone
import numpy as np


def average_precision(right, num_objects):
    """right: for every detection, by falling score, whether it is matched."""
    true = np.cumsum(right)
    precision = true / np.arange(1, len(right) + 1)
    recall = true / num_objects
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    points = np.searchsorted(recall, np.linspace(0, 1, 101))
    return np.append(best_from_here, 0)[points].mean()


# One right, one wrong, one right, of two objects: 1 up to recall 0.5, then 2/3.
expected = (51 * 1 + 50 * 2 / 3) / 101
assert abs(average_precision([True, False, True], 2) - expected) < 1e-12

# %% [markdown]
# COCO's AP is the mean over ten IoU thresholds, 0.50, 0.55 … 0.95, and over the classes:

# %%
thresholds = np.linspace(0.5, 0.95, 10)
by_hand = [average_precision(match(t), num_objects=3) for t in thresholds]
for threshold, ap in zip(thresholds, by_hand, strict=True):
    print(f"IoU {threshold:.2f}: {ap:.3f}")
print(f"AP        {np.mean(by_hand):.3f}")

# %% [markdown]
# ## The same from pycocotools
#
# pycocotools is the reference. It wants a dictionary in COCO's format, with boxes as x, y, width, height:

# %%
import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def pycocotools_ap(first_id=1, max_detections=100):
    pairs = [(image, xywh(box)) for image, boxes in enumerate(people) for box in boxes]
    common = {"category_id": 1, "iscrowd": 0}
    coco = COCO()
    coco.dataset = {
        "info": {},  # pycocotools 2.0.9 and 2.0.10 raise KeyError: 'info' without it
        "images": [{"id": image} for image in range(3)],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": k, "image_id": i, "bbox": b, "area": b[2] * b[3], **common}
            for k, (i, b) in enumerate(pairs, start=first_id)
        ],
    }
    found = [
        {"image_id": i, "category_id": 1, "bbox": xywh(box), "score": score}
        for i, box, score in detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        coco.createIndex()
        coco_eval = COCOeval(coco, coco.loadRes(found), "bbox")
        coco_eval.params.maxDets = [1, 10, max_detections]
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return coco_eval.stats[0]


print(f"pycocotools {pycocotools_ap():.3f}, by hand {np.mean(by_hand):.3f}")
assert abs(pycocotools_ap() - np.mean(by_hand)) < 1e-9

# %% [markdown]
# It has two traps that give a wrong number without a message.
#
# - **Annotation id 0.** pycocotools stores the id of the matched person, and reads 0 as "not matched". So a person with
#   the id 0 can never be detected ([vision#1530](https://github.com/pytorch/vision/issues/1530)). Count ids from 1.
# - **Other numbers of detections.** With your own `maxDets`, the summary still looks for 100, does not find
#   it, and gives an AP of -1 ([cocoapi#558](https://github.com/cocodataset/cocoapi/issues/558)).

# %%
print(f"ids from 1:     {pycocotools_ap():6.3f}")
print(f"ids from 0:     {pycocotools_ap(first_id=0):6.3f}")
print(f"maxDets of 300: {pycocotools_ap(max_detections=300):6.3f}")

# %% [markdown]
# ## What `evaluate` does
#
# The function that gave the table above needs no dictionary and no ids. `compare` reduces an image to its IoUs, labels,
# scores and areas. `coco_metrics` matches and counts. Without the progress bar, the error messages and the part
# for several processes, this is all of `evaluate`:

# %%
from tutorial_lib.coco_eval import coco_metrics, compare


@torch.inference_mode()
def evaluate_in_short(model, data_loader):
    model.eval()
    compared = []
    for images, targets in data_loader:
        predictions = model([image.to(device) for image in images])
        for image, target, prediction in zip(images, targets, predictions, strict=True):
            compared.append(compare(prediction, target, image.shape[-2:]))
    return coco_metrics(compared)


toy = zip(predictions, targets, strict=True)
toy = coco_metrics([compare(p, t, (120, 110)) for p, t in toy])
print(f"by hand {np.mean(by_hand):.3f}, coco_metrics {toy.box.AP:.3f}")
print(toy.box)

# %% [markdown]
# There are no small people in the three images (under 32² pixels), so there is no AP for them. pycocotools prints -1 then. Leave
# such a number out of every average. `evaluate` gives None, which no average takes.
#
# These are the twelve numbers of our model on the test images. AR1, AR10 and AR are mean recalls over the IoU
# thresholds. They count at most 1, 10 and 100 detections of an image and class:

# %% tags=["nbval-ignore-output"]
in_short = evaluate_in_short(model, test_loader)
assert np.isclose(in_short.mask.AP, result.mask.AP, atol=1e-3)

areas = np.concatenate([image.target_areas for image in result.images])
small, large = (areas < 32**2).sum(), (areas > 96**2).sum()
print(f"{len(areas)} people: {small} small, {large} large\n\n            box   mask")
names = "AP AP50 AP75 AP_small AP_medium AP_large "
names += "AR1 AR10 AR AR_small AR_medium AR_large"
for name in names.split():
    numbers = (getattr(metrics, name) for metrics in (result.box, result.mask))
    row = ("  none" if number is None else f"{number:.3f}" for number in numbers)
    print(f"{name:10}", *row, sep="  ")

# %% [markdown]
# A number over a handful of objects says little. Look at the counts first.
#
# ## What AP50 and AP75 forgive
#
# AP50 counts a box as right from IoU 0.5, AP75 from 0.75. How far may the box of a person of 40 × 80
# pixels move to the right before each stops counting it?

# %%
shifts = torch.arange(0, 41).float()
shifted = truth + shifts[:, None] * torch.tensor([1.0, 0, 1, 0])
ious = box_iou(truth, shifted)[0]
limits = {t: int(shifts[ious >= t].max()) for t in (0.5, 0.75, 0.95)}
shown = [{"boxes": torch.cat([truth, shifted[i : i + 1]])} for i in limits.values()]
titles = [f"IoU ≥ {t}: {pixels} px" for t, pixels in limits.items()]
show([paper] * 3, shown, titles, cell=(2.6, 2.6))
plt.show()
assert limits == {0.5: 13, 0.75: 5, 0.95: 1}

# %% [markdown]
# AP50 forgives 13 pixels, a third of the person's width. That is enough to count people. AP75 forgives five pixels, an
# eighth of the width. 0.95 is the strictest of the ten thresholds, and forgives one pixel. AP is the mean over all ten.
# So it rises when boxes become tighter, even if no more people are detected.
#
# ## The precision-recall curve
#
# `precision` is an array [10 IoU thresholds, 101 recalls, classes]. The area under a curve is the AP at its threshold:

# %%
recalls = np.linspace(0, 1, 101)
figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
for t in (0, 5, 8):
    curve = result.mask.precision[t, :, 0]
    label = f"IoU {thresholds[t]:.2f}, AP {curve.mean():.2f}"
    axes.plot(recalls, curve, label=label)
axes.set(xlabel="recall", ylabel="precision", title="masks, test images")
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# Where a curve drops to 0 before recall 1, no detection fits the rest of the people well enough. Where it is low at the left,
# some detections with the highest scores are wrong.
#
# ## The score threshold is yours to choose
#
# AP counts all detections, down to the score 0.05. An application shows only those above some
# score, so its user sees one point of the curve. Choose that point by what an error costs. If a false
# positive costs as much as a missed person, take the threshold with the fewest of both together. F1, the harmonic mean of precision
# and recall, is popular, but its best threshold can be another one. A threshold is a choice, so we make it on the
# validation images:


# %%
def errors(matches, threshold):
    """At IoU 0.5: how many detections are right, how many wrong, who is missed."""
    kept = matches.scores >= threshold
    right = (matches.targets[0, kept] >= 0).sum()
    return right, kept.sum() - right, matches.num_objects.sum() - right


val_matches = evaluate(model, val_loader, device, progress=False).mask.matches[1]
candidates = np.linspace(0.05, 0.99, 95)
right, wrong, missed = np.array([errors(val_matches, t) for t in candidates]).T
f1 = 2 * right / np.maximum(2 * right + wrong + missed, 1)
best = candidates[(wrong + missed).argmin()]
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
axes.plot(candidates, wrong, label="false positives")
axes.plot(candidates, missed, label="missed")
axes.plot(candidates, wrong + missed, "k", label="both")
axes.axvline(best, color="grey", linestyle="--", label="fewest of both")
axes.axvline(candidates[f1.argmax()], color="grey", linestyle=":", label="best F1")
axes.set(xlabel="score threshold", title="validation images, masks", ylim=(0, None))
axes.legend()
plt.show()

# %% [markdown]
# What that threshold gives on the test images:

# %% tags=["nbval-ignore-output"]
matches = result.mask.matches[1]
right, wrong, missed = errors(matches, best)
print(f"score at least {best:.2f}: {right} right, {wrong} wrong, {missed} missed")
print(f"precision {right / max(right + wrong, 1):.2f}", end=", ")
print(f"recall {right / (right + missed):.2f}")

# %% [markdown]
# ## Errors, sorted by cause
#
# Every detection is right, or wrong for one reason. The causes follow
# [TIDE](https://arxiv.org/abs/2008.08115), for one class. We add *poor mask*.
#
# | cause | IoU with a person |
# |---|---|
# | right | mask at least 0.5, and matched |
# | duplicate | mask at least 0.5, but the person is matched with another detection |
# | poor mask | box at least 0.5, mask under 0.5 |
# | poorly placed | box from 0.1 to 0.5 |
# | background | box under 0.1 |
#
# `matches` holds the matched pairs, `result.images` the IoUs of every image.


# %%
def cause(k):
    """The cause of the k-th detection, and the person that it should fit."""
    image, detection = matches.images[k], matches.detections[k]
    target = matches.targets[0, k]
    if target >= 0:
        return "right", (image, target)
    ious = result.images[image]
    fit = ious.box_ious[detection].max(initial=0)
    if fit < 0.1:
        return "background", None
    person = (image, int(ious.box_ious[detection].argmax()))
    if ious.mask_ious[detection].max() >= 0.5:
        return "duplicate", person
    return ("poor mask" if fit >= 0.5 else "poorly placed"), person


causes = [cause(k) for k in range(len(matches.scores))]

# %% [markdown]
# Every missed person is missed for one reason, too. There may be a fitting detection **below the threshold**. There may be
# only a **poor fit**, a poor mask or a poorly placed box. Or there is **no detection** near.

# %% tags=["nbval-ignore-output"]
NAMES = ("right", "duplicate", "poor mask", "poorly placed", "background")
above = matches.scores >= best
print(f"detections       score ≥ {best:.2f}   all")
for name in NAMES:
    of_name = np.array([found == name for found, _ in causes])
    print(f"{name:16}{(of_name & above).sum():13}{of_name.sum():6}")

everybody = {(i, p) for i, n in enumerate(matches.num_objects) for p in range(n)}
fitting = {person for found, person in causes if found == "right"}
near = {person for found, person in causes if found.startswith("poor")} - fitting
never = everybody - fitting - near
below = len(fitting) - right
print(f"\n{len(everybody)} people: {right} detected, {missed} missed. Of these:")
print(f"{below} below the threshold, {len(near)} poor fit, {len(never)} no detection")
assert below + len(near) + len(never) == missed

# %% [markdown]
# Counts do not say which cause to work on. A false positive with a high score costs much, one with a low score almost nothing. TIDE's answer is to fix all
# errors of one cause, and compute AP50 again. A duplicate or a detection of background is left out. A poor mask or box becomes right, or
# is left out where its person is detected anyway. A person without any detection is no longer counted.


# %% tags=["nbval-ignore-output"]
def fixed(kind):
    """The mask AP50 when all errors of one kind are put right."""
    flags, taken = [], set(fitting)
    for name, person in causes:
        if name != kind:
            flags.append(name == "right")
        elif name.startswith("poor") and person not in taken:
            taken.add(person)
            flags.append(True)
    people_counted = len(everybody) - (len(never) if kind == "no detection" else 0)
    return average_precision(flags, people_counted)


assert np.isclose(fixed(None), result.mask.AP50)  # nothing is fixed
gains = {kind: fixed(kind) - fixed(None) for kind in (*NAMES[1:], "no detection")}
print(f"mask AP50 {fixed(None):.3f}. Fixing one cause would gain:")
for kind, gain in sorted(gains.items(), key=lambda item: -item[1]):
    print(f"{kind:14} {gain:.3f}")

# %% [markdown]
# The gains do not add up to the distance from 1: one error can hide another. Here is one of each cause, with the highest score of its kind. Blue is the
# detection. Orange is the person that it should fit, where there is one.

# %% tags=["nbval-ignore-output"]
gallery = {}
for k, (name, person) in enumerate(causes):
    if name not in gallery:
        pixels, target = test_set[matches.images[k]]
        prediction = predict(model, [pixels], device, 0)[0]
        boxes = prediction["boxes"][[matches.detections[k]]]
        if person is not None:
            boxes = torch.cat([boxes, target["boxes"][[person[1]]]])
        gallery[name] = pixels, {"boxes": boxes}
if never:  # no blue box: a box of size 0 stands for it
    image, person = min(never)
    pixels, target = test_set[image]
    boxes = torch.cat([torch.zeros(1, 4), target["boxes"][[person]]])
    gallery["no detection"] = pixels, {"boxes": boxes}
show(*zip(*gallery.values(), strict=True), list(gallery))
plt.show()

# %% [markdown]
# What helps depends on the cause.
#
# - **Duplicates**: non-maximum suppression should remove them. Lower `box_nms_thresh`. In a crowd it also removes
#   neighbours who overlap, and there a higher value helps.
# - **Poorly placed**: this is box regression. Train longer, or take anchors of the people's shape (notebook
#   [09](09_anchors_and_backbones.ipynb)).
# - **Poor masks**: train longer, or on larger images.
# - **Background**: look first. It may be a person that nobody annotated. Then add such images to the training.
# - **No detection**: larger images (`min_size`) or other anchors, and more training images of that kind.
# - **Below the threshold**: this is your threshold, not the detector.
#
# ## How sure is AP?
#
# The seed moved it in the first table. The choice of **test images** moves it, too. The
# bootstrap picks as many images as there are test images, at random and with replacement, a thousand times. No image is predicted again:

# %% tags=["nbval-ignore-output"]
from tutorial_lib.coco_eval import bootstrap_interval

for kind in ("box", "mask"):
    metrics = getattr(result, kind)
    low, high = bootstrap_interval(metrics)
    print(f"{kind:4} AP {metrics.AP:.3f}, 95 % of the picks in {low:.3f} to {high:.3f}")

# %% [markdown]
# A gain smaller than half the interval's width may be chance. Images of one place are alike, but the bootstrap treats
# them as independent. So the
# true interval is wider. Two models often do well or badly on the same images. Then the difference of their APs varies
# less than either AP (exercise 3).
#
# ## Three classic mistakes
#
# **Cutting by score before the evaluation.** AP also counts the detections with a low score. Without them the curve
# ends at
# the recall of that score, and AP can only fall:

# %% tags=["nbval-ignore-output"]
score_threshold = model.roi_heads.score_thresh
model.roi_heads.score_thresh = 0.5
cut = evaluate(model, test_loader, device, progress=False)
model.roi_heads.score_thresh = score_threshold
print(f"mask AP {result.mask.AP:.3f}, of detections over 0.5 only {cut.mask.AP:.3f}")

# %% [markdown]
# **Choosing on the test images.** Do not choose the epoch, the threshold or the learning rate by them. Take the three
# seeds in the first table. Their best AP is too high an estimate of what a fourth seed will give. Their mean is an
# honest one.
#
# **Leaving out what is beyond 100.** COCO counts at most 100 detections of an image and class. R-CNN and FCOS models
# give at most 100 for an image, SSD 200, RetinaNet and SSDlite 300. Where an image has more objects, recall cannot
# reach 1. Raise
# `box_detections_per_img` (for the others, `detections_per_img`). `evaluate` still counts 100 of an image and class,
# and prints how many it did not count.

# %% tags=["results", "nbval-ignore-output"]
{"box_AP": round(result.box.AP, 4), "mask_AP": round(result.mask.AP, 4)}

# %% [markdown]
# ## Recap
#
# - **Match** by score, at an IoU threshold. A duplicate is an error.
# - **Read** AP50 for who is detected, and AP75 and AP for how well they fit. Read box AP and mask AP apart.
# - **Choose** the score threshold on validation images, by what each error costs you.
# - **Rank** causes by the AP that fixing them would gain, before you change the model.
# - **Report** a mean and spread over seeds, and an interval over test images.

# %% [markdown]
# ## On your own
#
# 1. Move the third detection of the three images onto the person of image 1. Work out the new AP50 on
#    paper first.
#    <details><summary>Hint</summary>At IoU 0.5 the detection with score 0.8 is matched with that person already, so
#    AP50 stays as it is. The IoU of that detection is 0.675. So from the threshold 0.70 on, the person is
#    free.</details>
# 2. A false positive costs you ten times what a missed person costs. Which threshold do you choose?
#    <details><summary>Hint</summary>Call <code>errors(val_matches, t)</code> for every t in <code>candidates</code> again, and minimise 10 × wrong + missed.</details>
# 3. Bootstrap the *difference* of two seeds' AP, with the same images for both.
#    <details><summary>Hint</summary><code>coco_metrics([r.images[i] for i in chosen]).box.AP</code> gives the AP on chosen images.</details>
#    <details><summary>Solution</summary><pre>rng, n = np.random.default_rng(0), len(test_set)
#    def difference():
#        chosen = rng.integers(n, size=n)
#        a, b = (coco_metrics([r.images[i] for i in chosen]).box.AP for r in results[:2])
#        return a - b
#    print(np.quantile([difference() for _ in range(200)], [0.025, 0.975]))</pre></details>

# %% [markdown]
# ## In practice
#
# - `evaluate` takes any module that maps a list of images to a list of dicts with `boxes`, `labels`,
#   `scores`, and `masks` if it has them. Its numbers equal pycocotools' to 1e-9 on the random cases of the tests.
# - It compares masks only inside their boxes, without run-length code. Notebook [10](10_making_it_fast.ipynb) measures what that saves.
# - The evaluator of torchvision's
#   [reference scripts](https://github.com/pytorch/vision/blob/main/references/detection/coco_utils.py) first reads the
#   whole dataset to build its ground truth. For a `Subset` it reads the whole dataset behind it. Ours reads
#   only the loader's images, once.
# - `target["area"]`, where it is given, decides who is small. With masks it should be the mask's area, not the box's.
# - Crowds (`iscrowd`) are neither objects nor errors in the evaluation: detections on them are ignored. torchvision's models know no
#   `iscrowd` and would train on them as objects. Leave them out of training.
# - Averages over classes hide classes. Look at `per_class`, or at `class_table` in notebook [05](05_your_own_data.ipynb). A class that is
#   absent from training has AP 0. One with few test objects has an AP that jumps.
#
# ## Further reading
#
# - COCO's [definition of the metrics](https://cocodataset.org/#detection-eval), and
#   [pycocotools' source](https://github.com/cocodataset/cocoapi/blob/master/PythonAPI/pycocotools/cocoeval.py).
# - Bolya et al., [TIDE: A General Toolbox for Identifying Object Detection Errors](https://arxiv.org/abs/2008.08115).
# - Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993.
#
# **Next:** [07, fix it when it breaks](07_when_it_breaks.ipynb).
