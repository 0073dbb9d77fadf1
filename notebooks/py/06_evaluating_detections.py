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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/torchvision-detection-tutorial/blob/main/notebooks/06_evaluating_detections.ipynb)
#
# You compute COCO's AP by hand, get the same number from pycocotools and from this project's
# `evaluate`, and then take the number apart: by threshold, by cause of error, by size, by chance.

# %% [markdown]
# ## What you'll do
#
# - compute the IoU of two boxes, then of two masks;
# - compute AP by hand on three images, equal to pycocotools;
# - read a precision-recall curve, and choose the score threshold of an application;
# - sort a detector's errors by cause, with counts that add up;
# - say how far AP moves with the seed, and with the choice of the test images.
#
# **You need** notebooks [01](01_dataset.ipynb) and [02](02_finetuning_a_predictor.ipynb), and [04](04_penn_fudan_mask_rcnn.ipynb) for how the model is trained.
#
# | preset | trains | time |
# |---|---|---|
# | `quick` | `maskrcnn_mini_fpn`, 4 epochs for each of three seeds | 2.6 min on one CPU core |
# | `laptop` | the same, on PennFudan | 11 min on one CPU core |
# | `full` | `maskrcnn_resnet50_fpn`, the same | a GPU; without one, smaller images (not measured yet) |

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
# The preset, as in notebook 01. Three seeds, because one number has no spread.

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
SEEDS = (0, 1, 2)
EPOCHS = 4
device = pick_device()
root = prepare_data(preset)
fetch_weights(preset.mask_rcnn, preset.weights)
print(provenance(preset, device))

# %% [markdown]
# ## How well does a box fit?
#
# Intersection over union, IoU: the area that two boxes share, divided by the area that they
# cover together. Two boxes of 40 × 80 pixels, one of them moved by 10 to the right and 20 down:

# %%
import matplotlib.pyplot as plt

from tutorial_lib.visualization import show

truth = torch.tensor([[30.0, 10, 70, 90]])
moved = torch.tensor([[40.0, 30, 80, 110]])
paper = torch.full((3, 120, 110), 0.93)
show([paper], [{"boxes": torch.cat([truth, moved])}], columns=1, cell=(3, 3))
plt.show()

# %% [markdown]
# They share 30 × 60 pixels. What both cover is counted once:

# %%
left, top = max(30, 40), max(10, 30)
right, bottom = min(70, 80), min(90, 110)
shared = (right - left) * (bottom - top)
covered = 40 * 80 + 40 * 80 - shared
print(f"{shared} / {covered} = {shared / covered:.3f}")

# %% [markdown]
# A shift by a quarter of the width and a quarter of the height leaves an IoU under 0.5.
# torchvision's function takes all pairs of two sets of boxes at once:

# %%
from torchvision.ops import box_iou

print(box_iou(truth, moved))
assert torch.isclose(box_iou(truth, moved)[0, 0], torch.tensor(shared / covered))

# %% [markdown]
# ## How well does a mask fit?
#
# The same fraction, over pixels. Two masks can have the same box, and an IoU far from 1: an ellipse
# that fills its box, and a cross in that box.

# %%
y, x = torch.meshgrid(torch.arange(120), torch.arange(110), indexing="ij")
inside = (x >= 30) & (x < 70) & (y >= 10) & (y < 90)
ellipse = ((x - 49.5) / 20) ** 2 + ((y - 49.5) / 40) ** 2 <= 1
cross = inside & (((x - 49.5).abs() < 6) | ((y - 49.5).abs() < 12))
shown = [
    {"boxes": truth, "masks": mask[None]} for mask in (ellipse, cross, ellipse & cross)
]
show([paper] * 3, shown, ["ellipse", "cross", "shared"], cell=(2.6, 2.6))
plt.show()

# %%
from torchvision.ops import masks_to_boxes

shared = (ellipse & cross).sum()
covered = (ellipse | cross).sum()
print(f"{shared} / {covered} = {shared / covered:.3f}")
boxes = masks_to_boxes(torch.stack([ellipse, cross]))
assert torch.equal(boxes[0], boxes[1])  # box IoU is 1

# %% [markdown]
# So mask AP is asked for separately: a right box says little about the mask in it.
#
# ## AP by hand, on three images
#
# Image 0 has two people, image 1 has one, image 2 is empty. Four detections of a made-up model, with
# their scores, all of one class:

# %%
people = [[[10, 10, 50, 90], [60, 20, 100, 100]], [[30, 30, 70, 110]], []]
detections = [  # image, box, score
    (0, [12, 10, 50, 86], 0.9),
    (1, [30, 30, 57, 110], 0.8),
    (2, [20, 20, 60, 100], 0.7),
    (0, [10, 14, 48, 96], 0.6),
]
targets = [
    {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.ones(len(boxes), dtype=torch.int64),
    }
    for boxes in people
]
predictions = [
    {
        "boxes": torch.tensor([box for i, box, _ in detections if i == image]).float(),
        "labels": torch.ones(sum(i == image for i, *_ in detections)).long(),
        "scores": torch.tensor([score for i, _, score in detections if i == image]),
    }
    for image in range(3)
]
show([paper] * 6, targets + predictions, ["target"] * 3 + ["detections"] * 3)
plt.show()

# %% [markdown]
# First, matching: detections in the order of their scores, each takes the free person that it
# fits best, if their IoU reaches a threshold. The last detection finds its person taken: a
# duplicate is a mistake, even if it fits.


# %%
def match(threshold):
    """For every detection, by falling score, whether it found somebody."""
    taken, found = set(), []
    for image, box, _ in detections:  # they are sorted already
        best, best_iou = None, threshold
        for person, person_box in enumerate(people[image]):
            iou = box_iou(torch.tensor([box]), torch.tensor([person_box])).item()
            if (image, person) not in taken and iou >= best_iou:
                best, best_iou = (image, person), iou
        if best is not None:
            taken.add(best)
        found.append(best is not None)
    return found


for threshold in (0.5, 0.75):
    print(f"IoU at least {threshold}: {match(threshold)}")
assert match(0.5) == [True, True, False, False]

# %% [markdown]
# Then counting. Going down the list, *precision* is the share of the detections so far that are
# right, *recall* the share of all people found so far. AP is the mean precision at 101 recalls,
# 0, 0.01 … 1, where precision is taken as the best at this recall **or beyond**, and as 0 at
# recalls that are never reached. This cell can be copied:

# %% tags=["copy-me"]
import numpy as np


def average_precision(found, num_objects):
    """found: for every detection, by falling score, whether it matched an object."""
    true = np.cumsum(found)
    precision = true / np.arange(1, len(found) + 1)
    recall = true / num_objects
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    points = np.searchsorted(recall, np.linspace(0, 1, 101))
    return np.append(best_from_here, 0)[points].mean()


# One right, one wrong, one right, of two objects: 1 up to recall 0.5, then 2/3.
expected = (51 * 1 + 50 * 2 / 3) / 101
assert abs(average_precision([True, False, True], 2) - expected) < 1e-12

# %% [markdown]
# COCO's AP is the mean over ten IoU thresholds, 0.50, 0.55 … 0.95:

# %%
thresholds = np.linspace(0.5, 0.95, 10)
by_hand = [
    average_precision(match(threshold), num_objects=3) for threshold in thresholds
]
for threshold, ap in zip(thresholds, by_hand, strict=True):
    print(f"IoU {threshold:.2f}: {ap:.3f}")
print(f"AP {np.mean(by_hand):.3f}")

# %% [markdown]
# pycocotools, the reference, wants boxes as x, y, width, height, and a dictionary in COCO's format:

# %%
import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


pairs = [(image, box) for image, boxes in enumerate(people) for box in boxes]
annotations = [
    {"id": k, "image_id": image, "category_id": 1, "bbox": xywh(box), "iscrowd": 0}
    | {"area": xywh(box)[2] * xywh(box)[3]}
    for k, (image, box) in enumerate(pairs, start=1)
]
found = [
    {"image_id": image, "category_id": 1, "bbox": xywh(box), "score": score}
    for image, box, score in detections
]
with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
    coco = COCO()
    coco.dataset = {
        "info": {},  # some versions of pycocotools ask for it
        "images": [{"id": i} for i in range(3)],
        "annotations": annotations,
        "categories": [{"id": 1}],
    }
    coco.createIndex()
    coco_eval = COCOeval(coco, coco.loadRes(found), "bbox")
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
print(f"pycocotools: {coco_eval.stats[0]:.3f}")
assert abs(coco_eval.stats[0] - np.mean(by_hand)) < 1e-9

# %% [markdown]
# And this project's functions, which keep of an image its IoUs, labels, scores and areas, and no pixels. There are no small
# people here (under 32² pixels), which pycocotools reports as -1:

# %%
from tutorial_lib.coco_eval import coco_metrics, compare

toy = coco_metrics(
    [compare(p, t, (120, 110)) for p, t in zip(predictions, targets, strict=True)]
)
print(toy)
assert abs(toy.box.AP - np.mean(by_hand)) < 1e-9
assert toy.box.AP_small is None and coco_eval.stats[3] == -1

# %% [markdown]
# ## What AP50 and AP75 forgive
#
# AP50 counts a box as right from IoU 0.5, AP75 from 0.75. How far may the box of a person of 40 × 80
# pixels be moved to the right before each stops counting it?

# %%
shifts = torch.arange(0, 41).float()
shifted = truth + shifts[:, None] * torch.tensor([1.0, 0, 1, 0])
ious = box_iou(truth, shifted)[0]
limits = {t: int(shifts[ious >= t].max()) for t in (0.5, 0.75, 0.95)}
pictures = [{"boxes": torch.cat([truth, shifted[i : i + 1]])} for i in limits.values()]
show(
    [paper] * 3,
    pictures,
    [f"IoU ≥ {t}: {limits[t]} px" for t in limits],
    cell=(2.6, 2.6),
)
plt.show()

# %% [markdown]
# AP50 forgives a third of the person's width: enough to count people. AP75 a seventh (5.7 pixels, so 5 whole ones), and
# 0.95, the strictest of the ten thresholds, one pixel. AP, the mean over all ten, therefore rises when
# boxes become tighter, even if not one person more is found.

# %%
print(limits)
assert limits == {0.5: 13, 0.75: 5, 0.95: 1}

# %% [markdown]
# ## A model to evaluate, three times
#
# As in notebook 04, shorter: 4 epochs from the preset's weights. Everything is the same three
# times but the seed, which decides the new predictors' first weights, the order of the images, their augmentation and which
# proposals are trained on.

# %%
from torch.utils.data import DataLoader

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

augmented = PennFudanDataset(root, get_transform(train=True), in_memory=True)
plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
train_set, _, _ = split_dataset(augmented, preset.split, seed=0)
_, val_set, test_set = split_dataset(plain, preset.split, seed=0)
loader_options = {"batch_size": preset.batch_size, "collate_fn": collate_fn}
val_loader = DataLoader(val_set, **loader_options)
# One image a batch, as in the pictures below.
test_loader = DataLoader(test_set, collate_fn=collate_fn)

# %% [markdown]
# The training of one seed:


# %%
from torchvision.models import get_model

from tutorial_lib.engine import (
    evaluate,
    train_one_epoch,
    use_bfloat16,
    warmup_cosine,
)
from tutorial_lib.models import replace_box_predictor, replace_mask_predictor


def finetuned(seed):
    torch.manual_seed(seed)
    sizes = {"min_size": preset.min_size, "max_size": preset.max_size}
    model = get_model(preset.mask_rcnn, weights=preset.weights, **sizes)
    model = replace_mask_predictor(replace_box_predictor(model, 2), 2).to(device)
    use_bfloat16(model, device)
    loader = DataLoader(train_set, shuffle=True, drop_last=True, **loader_options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.learning_rate)
    schedule = warmup_cosine(optimizer, len(loader), EPOCHS * len(loader))
    for _ in range(EPOCHS):
        train_one_epoch(model, optimizer, loader, device, lr_scheduler=schedule)
    return model


# %% [markdown]
# No epoch is chosen here, so the validation images are free for another choice, that of a score threshold.
# The test images choose nothing here; what follows only looks at their results:

# %% tags=["nbval-ignore-output"]
models = [finetuned(seed) for seed in SEEDS]
results = [evaluate(model, test_loader, device) for model in models]
for seed, result in zip(SEEDS, results, strict=True):
    print(f"seed {seed}: box AP {result.box.AP:.3f}, mask AP {result.mask.AP:.3f}")

# %% [markdown]
# From here on, the first model. All of COCO's numbers, as attributes rather than a printed table:

# %% tags=["nbval-ignore-output"]
model, result = models[0], results[0]
print(result)
assert result.box.AP <= result.box.AP50 and result.mask.AP <= result.mask.AP50

# %% [markdown]
# ## The precision-recall curve
#
# `precision` is an array [10 IoU thresholds, 101 recalls, classes], `scores` the score at each of its
# points. The area under a curve is the AP at its threshold.

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
assert np.isclose(result.mask.precision[0].mean(), result.mask.AP50)

# %% [markdown]
# A curve that drops to 0 before recall 1 says that for some people no detection over score 0.05, the model's own threshold, fits well enough. One
# that is low at the left has mistakes among its detections of highest score. At a stricter IoU a mask has to fit better to count, so the
# whole curve is lower.
#
# ## The score threshold is yours to choose
#
# AP looks at all detections, down to the faintest. An application shows only those above some
# score, and its user meets one point of the curve. Where that point should be depends on which error costs more. If
# both cost the same, take the threshold with the best F1, the harmonic mean of precision and recall. It is a
# choice, so it is made on the validation images.


# %%
def precision_recall(matches, threshold):
    """At IoU 0.5, of the detections that score at least the threshold."""
    kept = matches.scores >= threshold
    right = (matches.targets[0, kept] >= 0).sum()
    return right / max(kept.sum(), 1), right / matches.num_objects.sum()


val_matches = evaluate(model, val_loader, device, progress=False).box.matches[1]
candidates = np.linspace(0.05, 0.95, 91)
points = np.array([precision_recall(val_matches, t) for t in candidates])
f1 = 2 * points.prod(axis=1) / np.maximum(points.sum(axis=1), 1e-9)
best = candidates[f1.argmax()]
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
axes.plot(candidates, points, label=["precision", "recall"])
axes.plot(candidates, f1, "k", label="F1")
axes.axvline(best, color="grey", linestyle="--", label=f"best F1, {best:.2f}")
axes.set(xlabel="score threshold", title="validation images, boxes, IoU 0.5")
axes.legend()
plt.show()

# %% [markdown]
# That threshold, on the test images:

# %% tags=["nbval-ignore-output"]
precision, recall = precision_recall(result.box.matches[1], best)
print(f"score at least {best:.2f}: precision {precision:.2f}, recall {recall:.2f}")

# %% [markdown]
# ## Errors, sorted by cause
#
# Every detection above the threshold is right, or wrong for one reason; every person is found or
# missed. The causes follow [TIDE](https://arxiv.org/abs/2008.08115), for one class, with two changes: *poor mask* is
# added, and everybody without a match is *missed* (TIDE leaves out those near a poorly placed box).
#
# | cause | box IoU with a person |
# |---|---|
# | right | at least 0.5, matched, and mask IoU at least 0.5 |
# | poor mask | at least 0.5 and matched, but mask IoU under 0.5 |
# | duplicate | at least 0.5, but the person is taken |
# | poorly placed | 0.1 to 0.5 |
# | background | under 0.1 |
#
# `matches` holds the pairs that were matched, `images` the IoUs of every image.


# %%
def cause(image, detection, target):
    ious = result.images[image]
    if target >= 0:
        right = ious.mask_ious[detection, target] >= 0.5
        return "right" if right else "poor mask"
    closest = ious.box_ious[detection].max(initial=0)
    if closest >= 0.5:
        return "duplicate"
    return "poorly placed" if closest >= 0.1 else "background"


matches = result.box.matches[1]
above = np.flatnonzero(matches.scores >= best)
sorted_out = {
    name: []
    for name in ("right", "poor mask", "duplicate", "poorly placed", "background")
}
for k in above:
    key = matches.images[k], matches.detections[k], matches.targets[0, k]
    sorted_out[cause(*key)].append(key)
found = {(image, target) for image, _, target in sum(sorted_out.values(), [])}
missed = [
    (image, target)
    for image, ious in enumerate(result.images)
    for target in range(len(ious.target_labels))
    if (image, target) not in found
]

# %% tags=["nbval-ignore-output"]
for name, members in sorted_out.items():
    print(f"{name:14}{len(members):4}")
print(f"{'detections':14}{len(above):4}")
num_people = matches.num_objects.sum()
num_found = len(sorted_out["right"]) + len(sorted_out["poor mask"])
print(f"\n{num_people} people: {num_found} found, {len(missed)} missed")
assert sum(map(len, sorted_out.values())) == len(above)
assert num_found + len(missed) == num_people

# %% [markdown]
# One of each, with the highest score of its kind; of the missed, who have no detection, the first. Blue is the detection. Orange is the
# person that it should fit, where there is one.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import predict


def picture(image, detection=None, target=None):
    """The test image with a detection (blue) and the person that is closest (orange)."""
    pixels, truth = test_set[image]
    ious = result.images[image].box_ious
    boxes = torch.zeros(0, 4)
    if detection is not None:
        boxes = predict(model, [pixels], device, 0)[0]["boxes"][[detection]]
        target = int(ious[detection].argmax()) if ious[detection].any() else None
    persons = truth["boxes"][[] if target is None else [target]]
    colour_only = torch.zeros(int(detection is None), 4)  # orange is the second colour
    return pixels, {"boxes": torch.cat([boxes, colour_only, persons])}


gallery = {
    name: picture(*members[0]) for name, members in sorted_out.items() if members
}
if missed:
    gallery["missed"] = picture(missed[0][0], target=missed[0][1])
show(*zip(*gallery.values(), strict=True), list(gallery))
plt.show()

# %% [markdown]
# Duplicates are for non-maximum suppression to remove (`box_nms_thresh`); many missed people ask for more
# training, larger images (`min_size`) or other anchors (notebook [09](09_anchors_and_backbones.ipynb)); background and poorly placed boxes for
# more varied training images, once you have looked at them: a detection on "background" may be a person that nobody labelled, a rider for instance.
#
# ## Small, medium, large
#
# COCO calls an object small under 32² = 1024 pixels, large over 96² = 9216, as counted in its mask. How
# many of each are in the test images?

# %% tags=["nbval-ignore-output"]
areas = np.concatenate([image.target_areas for image in result.images])
bounds = {"small": (0, 1024), "medium": (1024, 9216), "large": (9216, 1e10)}
for name, (low, high) in bounds.items():
    count = ((areas >= low) & (areas <= high)).sum()
    ap = getattr(result.mask, f"AP_{name}")
    print(
        f"{name:7}{count:4} people   mask AP",
        "no such objects" if ap is None else f"{ap:.3f}",
    )

# %% [markdown]
# A number over a handful of objects is hardly a number, and where there are none, there is none.
# pycocotools prints -1 then, which an average over classes or runs should not contain.
#
# ## How sure is AP?
#
# Two things can move it that are no merit of the model. The first is the **seed**. Here are the mean and the sample standard
# deviation of the three runs:

# %% tags=["nbval-ignore-output"]
import statistics

for kind in ("box", "mask"):
    values = [getattr(r, kind).AP for r in results]
    mean, spread = statistics.mean(values), statistics.stdev(values)
    print(f"{kind} AP {mean:.3f} ± {spread:.3f} over {len(values)} seeds")

# %% [markdown]
# The second is the choice of **test images**. Other photographs of the same streets (at `quick`, other scenes) would give another AP. The
# bootstrap picks, a thousand times, at random and with replacement, as many images as there are test images, and
# looks at how far AP moves. No image is predicted again:

# %% tags=["nbval-ignore-output"]
from tutorial_lib.coco_eval import bootstrap_interval

intervals = {}
for kind in ("box", "mask"):
    metrics = getattr(result, kind)
    low, high = intervals[kind] = bootstrap_interval(metrics)
    print(
        f"{kind} AP {metrics.AP:.3f}, 95 % of the draws between {low:.3f} and {high:.3f}"
    )
assert intervals["box"][0] < intervals["box"][1]

# %% [markdown]
# A gain smaller than half the interval may be chance. But two models tested on the same images do well or badly on the same
# ones, so their difference varies less than either AP: draw the images once for both, and look at the interval of the difference
# (exercise 3).
#
# ## Three classic mistakes
#
# **Cutting by score before the evaluation.** AP wants the faint detections too. With only the detections
# over 0.5, the curve ends early:

# %% tags=["nbval-ignore-output"]
score_threshold = model.roi_heads.score_thresh
model.roi_heads.score_thresh = 0.5
cut = evaluate(model, test_loader, device)
model.roi_heads.score_thresh = score_threshold
print(f"mask AP {result.mask.AP:.3f}, of detections over 0.5 only {cut.mask.AP:.3f}")
assert cut.mask.AP <= result.mask.AP + 1e-3

# %% [markdown]
# **Choosing on the test images**: the epoch, the threshold, the learning rate. Of the three seeds above, the
# best one is no honest estimate of what a fourth will give:

# %% tags=["nbval-ignore-output"]
values = [r.mask.AP for r in results]
print(f"mask AP: best of three {max(values):.3f}, mean of three {np.mean(values):.3f}")

# %% [markdown]
# **More than 100 objects.** COCO counts 100 detections of an image and class, and torchvision's models
# give no more than 100 of an image (`box_detections_per_img`). In a crowd of 150 people, recall
# cannot pass 2/3. `evaluate` says how many detections it left out:

# %%
grid = torch.arange(150).float()
corner = torch.stack([grid % 15 * 20, grid // 15 * 20], dim=1)
crowd = {"boxes": torch.cat([corner, corner + 10], 1), "labels": torch.ones(150).long()}
perfect = {**crowd, "scores": torch.ones(150)}
counted = coco_metrics([compare(perfect, crowd, (200, 300))]).box
print(f"AR {counted.AR:.3f}, {counted.num_dropped} detections not counted")
assert abs(counted.AR - 2 / 3) < 1e-9

# %% tags=["results", "nbval-ignore-output"]
{"box_AP": round(result.box.AP, 4), "mask_AP": round(result.mask.AP, 4)}

# %% [markdown]
# ## Recap
#
# - **Match** by score, at an IoU threshold; a duplicate is a mistake.
# - **Read** AP50 for finding, AP75 and AP for fitting, boxes and masks apart.
# - **Choose** the score threshold on validation images, for the error that costs you more.
# - **Sort** errors by cause before you change the model.
# - **Report** a mean and spread over seeds, and an interval over test images.

# %% [markdown]
# ## On your own
#
# 1. Move the third detection of the three images onto the person of image 1. Work out the new AP50 on
#    paper first.
#    <details><summary>Hint</summary>At IoU 0.5 the detection with score 0.8 has taken that person already, so AP50 stays as it is. Its IoU is 0.675: from 0.70 on the person is free.</details>
# 2. A false alarm costs you ten times what a missed person costs. Which threshold do you choose?
#    <details><summary>Hint</summary>Minimise 10 × false alarms + misses over <code>candidates</code>, from <code>val_matches</code>.</details>
# 3. Bootstrap the *difference* of two seeds' AP, with the same images for both.
#    <details><summary>Hint</summary><code>coco_metrics([r.images[i] for i in chosen]).box.AP</code> for both results, with the same <code>chosen = rng.integers(n, size=n)</code>; 200 rounds will do.</details>

# %% [markdown]
# ## In practice
#
# - `evaluate` takes any module that maps a list of images to a list of dicts with `boxes`, `labels`,
#   `scores`, and `masks` if it has them. Its numbers equal pycocotools' to 1e-9 on the random cases of the tests.
# - It never turns a mask into run-length code, as pycocotools needs it. It compares masks only inside their boxes. What that saves
#   is in the table of notebook [10](10_making_it_fast.ipynb), in the rows `evaluator_50` and
#   `evaluator_1000`: so many images, with 100 detections each.
# - The evaluator of many tutorials, from torchvision's
#   [reference scripts](https://github.com/pytorch/vision/blob/main/references/detection/coco_utils.py), first reads the whole
#   dataset once more to build its ground truth, and of a `Subset` it takes the whole dataset behind it. Ours looks
#   only at the loader's images, as they pass by.
# - `target["area"]`, where it is given, decides who is small. With masks that should be the mask's area, not the box's.
# - Crowds (`iscrowd`) are neither objects nor mistakes: detections on them are ignored.
# - Averages over classes hide classes. Look at `per_class`.
#
# ## Further reading
#
# - COCO's [definition of the metrics](https://cocodataset.org/#detection-eval), and
#   [pycocotools' source](https://github.com/cocodataset/cocoapi/blob/master/PythonAPI/pycocotools/cocoeval.py).
# - Bolya et al., [TIDE: A General Toolbox for Identifying Object Detection Errors](https://arxiv.org/abs/2008.08115).
# - Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993.
#
# **Next:** [07, fix it when it breaks](07_when_it_breaks.ipynb).
