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
# # Look inside Mask R-CNN: from a picture to its boxes, masks and losses
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/torchvision-detection-tutorial/blob/main/notebooks/08_inside_mask_rcnn.ipynb)
#
# You call the parts of a Mask R-CNN on one picture, one after the other, until you have its boxes, masks and losses.

# %% [markdown]
# ## What you'll do
#
# - resize, normalise and pad a picture by hand;
# - look at feature maps, anchors, proposals, and the features under each proposal;
# - make boxes and masks of them, and check that they are what `model([image])` gives;
# - compute the five training losses by hand, and see where on the picture they come from.
#
# **You need** notebook [02](02_finetuning_a_predictor.ipynb), or to have used one of
# torchvision's detectors. Nothing is trained here.
#
# | preset | model | picture | time |
# |---|---|---|---|
# | `quick` | `maskrcnn_mini_fpn`, 2.5 M parameters | a synthetic image | half a minute or so on one CPU core |
# | `laptop` | the same | a photograph | half a minute or so on one CPU core |
# | `full` | `maskrcnn_resnet50_fpn`, 44.4 M parameters | the same photograph | a GPU; without one, a smaller image (not measured yet) |

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
# The preset, as in notebook 01, and the few settings that it decides here. Of several
# `min_size` we take the last, which is the one of evaluation.

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
MODEL, WEIGHTS = preset.mask_rcnn, preset.weights
MIN_SIZE, MAX_SIZE = preset.min_size[-1], preset.max_size
device = pick_device()
root = prepare_data(preset)
fetch_weights(MODEL, WEIGHTS)
print(provenance(preset, device))

# %% [markdown]
# ## The parts
#
# Mask R-CNN ([He et al. 2017, arXiv 1703.06870](https://arxiv.org/abs/1703.06870)) is a chain
# of modules. These are torchvision's names for them:
#
# ![Mask R-CNN: images go through transform, as one batch, to the backbone. Its feature maps go to the rpn, which gives proposals, and to roi_heads. There box_roi_pool, box_head and box_predictor make boxes, labels and scores of feature maps and proposals. In a second row, mask_roi_pool, mask_head and mask_predictor make masks of the feature maps and of those boxes, in training of the proposals.](images/mask_rcnn.svg)

# %%
from torchvision.models import get_model, get_model_weights

model = get_model(MODEL, weights=WEIGHTS, min_size=MIN_SIZE, max_size=MAX_SIZE)
model = model.to(device).eval().requires_grad_(False)
print("model:    ", [name for name, _ in model.named_children()])
print("roi_heads:", [name for name, _ in model.roi_heads.named_children()])

# %% [markdown]
# The weights know several classes. "person" is number 1, as in our dataset, so the model
# can be used as it is. This is the picture, with its target and with the detections that
# score at least 0.5:

# %%
import matplotlib.pyplot as plt

from tutorial_lib.data import split_dataset
from tutorial_lib.engine import predict
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform
from tutorial_lib.visualization import show

categories = get_model_weights(MODEL)[WEIGHTS].meta["categories"]
num_classes = len(categories)
assert categories.index("person") == 1

dataset = PennFudanDataset(root, get_transform(train=False))
*_, test_set = split_dataset(dataset, preset.split, SEED)
image, target = test_set[6]
prediction = predict(model, [image], device)[0]
show(
    [image, image],
    [target, prediction],
    ["target", "detections"],
    columns=2,
    categories=categories,
    cell=(5.5, 4.5),
)
plt.show()

# %% [markdown]
# The small model of `quick` and `laptop` has seen only synthetic street scenes, so it has
# false positives on photographs, and misses people in the fog of `quick`. PennFudan has no
# masks for people on bicycles. Detecting them counts as an error.
#
# Now the parts, in the order of the diagram. The shapes are checked on the way. At the
# end, the parts called by hand have to give what `model([image])` gives.
#
# ## 1. `transform`: from the picture to a batch
#
# The shorter side becomes `min_size`, unless the longer one would then exceed
# `max_size`. Both are rounded down, and the batch is padded at the right and the
# bottom to multiples of 32, so that the backbone can halve it five times.

# %% tags=["nbval-ignore-output"]
image = image.to(device)
batch, _ = model.transform([image])
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

scale = min(MIN_SIZE / min(image.shape[1:]), MAX_SIZE / max(image.shape[1:]))
assert [height, width] == [int(side * scale) for side in image.shape[1:]]
padded = [math.ceil(side / 32) * 32 for side in (height, width)]
assert list(batch.tensors.shape) == [1, 3, *padded]

mean = torch.tensor(model.transform.image_mean, device=device)[:, None, None]
std = torch.tensor(model.transform.image_std, device=device)[:, None, None]
resized = torch.nn.functional.interpolate(
    ((image - mean) / std)[None], size=(height, width), mode="bilinear"
)
by_hand = torch.zeros_like(batch.tensors)
by_hand[..., :height, :width] = resized
torch.testing.assert_close(batch.tensors, by_hand)

# %% [markdown]
# On the left, at one scale: the picture, and how it lies in a batch together with
# another one. (The normalisation is undone for the plot.) On the right the top of
# the person, 40 pixels wide, before and after: what the model gets to see.

# %%
other, _ = test_set[5]
both, _ = model.transform([image, other.to(device)])
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
# ## 2. `backbone`: five maps of the same picture
#
# Each level of the pyramid has the same number of channels. A cell of level `"0"`
# stands for 4 × 4 pixels of the batch, one of `"pool"` for 64 × 64:

# %% tags=["nbval-ignore-output"]
features = model.backbone(batch.tensors)
strides = (4, 8, 16, 32, 64)
for (level, feature), stride in zip(features.items(), strides, strict=True):
    print(f"level {level:4}  stride {stride:2}  {list(feature.shape)}")
    cells = [math.ceil(side / stride) for side in padded]
    assert list(feature.shape) == [1, model.backbone.out_channels, *cells]

# %% [markdown]
# For each cell, the length of its vector of channels. The fine levels follow
# outlines, the coarse ones know only roughly where. (Bright cells at the edge need not be
# a thing: a convolution sees zeros beyond the edge of its input.)

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
# ## 3. `rpn`: anchors, objectness, proposals
#
# `rpn.head` goes over every level with the same weights. For each of three anchors in
# a cell it gives one logit, the *objectness*, and four numbers that move the anchor.

# %% tags=["nbval-ignore-output"]
maps = list(features.values())
objectness, deltas = model.rpn.head(maps)
anchors = model.rpn.anchor_generator(batch, maps)
per_level = [logits.numel() for logits in objectness]
for feature, logits, delta in zip(maps, objectness, deltas, strict=True):
    print(list(logits.shape), list(delta.shape))
    assert list(logits.shape) == [1, 3, *feature.shape[2:]]
    assert list(delta.shape) == [1, 3 * 4, *feature.shape[2:]]
print("anchors:", list(anchors[0].shape))
assert list(anchors[0].shape) == [sum(per_level), 4]

# %% [markdown]
# The anchors of one cell in the middle of each level. And for every cell, the
# sigmoid of the best objectness of its three anchors. A person lights up on the levels whose
# anchors have about their size:


# %%
def outline(axes, boxes, colour, **line):
    """Boxes as lines, which may be thinner than a pixel."""
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
    shown = axes.imshow(heat, cmap="magma", vmin=0, vmax=1, extent=extent)
    axes.set_title(f'objectness, level "{level}"')
figure.colorbar(shown, ax=panels[:, -1], shrink=0.8)
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
moved = model.rpn.box_coder.decode(moves, anchors).view(1, -1, 4)
filtered = model.rpn.filter_proposals(moved, logits, batch.image_sizes, per_level)
proposals, proposal_scores = filtered
print(f"{len(moved[0])} moved anchors, {len(proposals[0])} proposals")
assert len(proposals[0]) <= model.rpn.post_nms_top_n()
assert model.rpn.nms_thresh == 0.7

best = logits.flatten().topk(30).indices
centre, size = box_convert(anchors[0][best], "xyxy", "cxcywh").split(2, dim=1)
centre, size = centre + moves[best, :2] * size, size * moves[best, 2:].exp()
by_hand = box_convert(torch.cat([centre, size], dim=1), "cxcywh", "xyxy")
torch.testing.assert_close(moved[0, best], by_hand, rtol=0, atol=0.01)

# %% [markdown]
# The 30 anchors with the highest objectness, where they are moved to, and the 30 best
# that are left after NMS:

# %%
figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
titles = ["the 30 best anchors", "moved", "the 30 best after NMS"]
three = [anchors[0][best], moved[0, best], proposals[0][:30]]
for axes, title, boxes in zip(panels, titles, three, strict=True):
    axes.imshow(view, extent=extent)
    axes.axis("off")
    axes.set_title(title)
    outline(axes, boxes, "yellow", lw=0.8)
plt.show()

# %% [markdown]
# NMS leaves fewer boxes for each object, and so room for others among the 30. There
# can still be several for each: boxes from two levels are never compared, and 0.7 is lenient,
# so that of two people who stand close together neither is dropped. Of all levels together
# at most `post_nms_top_n` are kept.
#
# ## 4. `box_roi_pool`: the features under each proposal
#
# RoIAlign lays a grid of 7 × 7 over each proposal, whatever its size, and takes for each cell the mean
# of 2 × 2 points (`sampling_ratio=2`), read from the features by bilinear interpolation. A large proposal is read from a
# coarse level, a small one from a fine level: from `"0"` where the root of its area
# is below 112 pixels, from `"1"` below 224, `"2"` below 448.

# %% tags=["nbval-ignore-output"]
from torchvision.ops import box_area, nms, roi_align

pooled = model.roi_heads.box_roi_pool(features, proposals, batch.image_sizes)
levels = model.roi_heads.box_roi_pool.map_levels(proposals)
print(list(pooled.shape))
channels = model.backbone.out_channels
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
# feature map, which the head gets. Of the channels, the plot shows only the length of
# their vector:

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
# ## 5. `box_head` and `box_predictor`: what it is, and where exactly
#
# The crop becomes a vector, and the vector a score and a box for each class. (The
# background's box is never used.) `postprocess_detections` moves the
# proposals, drops those that score at most 0.05, and runs NMS again, now within each
# class and at an IoU of 0.5:

# %% tags=["nbval-ignore-output"]
vectors = model.roi_heads.box_head(pooled)
class_logits, box_regression = model.roi_heads.box_predictor(vectors)
print(*(list(t.shape) for t in (vectors, class_logits, box_regression)))
in_features = model.roi_heads.box_predictor.cls_score.in_features
assert list(vectors.shape) == [len(proposals[0]), in_features]
assert list(class_logits.shape) == [len(proposals[0]), num_classes]
assert list(box_regression.shape) == [len(proposals[0]), num_classes * 4]

boxes, scores, labels = model.roi_heads.postprocess_detections(
    class_logits, box_regression, proposals, batch.image_sizes
)
assert model.roi_heads.score_thresh == 0.05 and model.roi_heads.nms_thresh == 0.5

# %% [markdown]
# The 20 proposals that look most like a person, how the second stage corrects them,
# and the people that are left with a score over 0.5:

# %%
likely = class_logits.softmax(dim=1)[:, 1].topk(20).indices
corrected = model.roi_heads.box_coder.decode(box_regression, proposals)[:, 1]
figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
titles = ["the 20 likeliest proposals", "corrected", "after NMS, score over 0.5"]
people = (labels[0] == 1) & (scores[0] > 0.5)
three = [proposals[0][likely], corrected[likely], boxes[0][people]]
for axes, title, chosen in zip(panels, titles, three, strict=True):
    axes.imshow(view, extent=extent)
    axes.axis("off")
    axes.set_title(title)
    outline(axes, chosen, "yellow", lw=1)
plt.show()

# %% [markdown]
# ## 6. The mask branch: 28 × 28, pasted
#
# For each detection the features are pooled again, to 14 × 14, and become 28 × 28
# logits for each class the branch knows. The label says which of them counts:

# %% tags=["nbval-ignore-output"]
from torchvision.models.detection.roi_heads import maskrcnn_inference

mask_features = model.roi_heads.mask_roi_pool(features, boxes, batch.image_sizes)
mask_logits = model.roi_heads.mask_predictor(model.roi_heads.mask_head(mask_features))
masks = maskrcnn_inference(mask_logits, labels)
print(*(list(t.shape) for t in (mask_features, mask_logits, masks[0])))
num_detections = len(boxes[0])
assert list(mask_features.shape) == [num_detections, channels, 14, 14]
assert list(mask_logits.shape) == [num_detections, num_classes, 28, 28]
assert list(masks[0].shape) == [num_detections, 1, 28, 28]

# %% [markdown]
# `transform.postprocess` brings everything back to the pixels of the picture, and
# pastes each mask into its box, stretched to its size. That was the last step. The
# parts by hand give what the model gives:

# %%
result = {
    "boxes": boxes[0],
    "labels": labels[0],
    "scores": scores[0],
    "masks": masks[0],
}
detections = model.transform.postprocess(
    [result.copy()], batch.image_sizes, [image.shape[1:]]
)[0]
expected = model([image])[0]
assert set(detections) == set(expected)
for name in expected:
    torch.testing.assert_close(detections[name], expected[name], rtol=1e-3, atol=1e-2)

# %% [markdown]
# The two best detections: the mask as predicted, pasted into the picture, and cut at
# 0.5. The axes count cells on the left, pixels of the picture elsewhere. An outline
# cannot be finer than the 28 cells across its box, however large the picture:

# %%
figure, panels = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
for i, (left, middle, right) in enumerate(panels[:num_detections]):
    left.imshow(masks[0][i, 0].cpu(), cmap="magma", vmin=0, vmax=1)
    left.set_title(f"{categories[labels[0][i]]}: 28 × 28, as predicted")
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
# ## 7. Where the losses come from
#
# In training mode the same parts run, and their answers are compared with the target.
# First the anchors. One is *positive* if its IoU with a person is at least 0.7, or if
# no other fits that person better; *negative* if its IoU with everybody is below 0.3;
# what lies between is ignored. There are far too many negatives, so at most 256
# anchors are sampled at random, at most half of them positive.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import to_device

model.train()
model.backbone.eval()  # BatchNorm as in evaluation
torch.manual_seed(SEED)
_, on_device = to_device([], [target], device)
_, targets = model.transform([image], on_device)
anchor_labels, matched = model.rpn.assign_targets_to_anchors(anchors, targets)
sampled_positive, sampled_negative = model.rpn.fg_bg_sampler(anchor_labels)
positive, negative = sampled_positive[0].bool(), sampled_negative[0].bool()
for name, value in (("positive", 1), ("negative", 0), ("ignored", -1)):
    kind = anchor_labels[0] == value
    used = kind & (positive | negative)
    print(f"{name:8} {kind.sum().item():6}, sampled {used.sum().item():3}")
assert positive.sum() + negative.sum() == 256 and positive.sum() <= 128
assert (anchor_labels[0] == 1).sum() < (anchor_labels[0] == 0).sum() / 10
matcher = model.rpn.proposal_matcher
assert (matcher.low_threshold, matcher.high_threshold) == (0.3, 0.7)

# %% [markdown]
# The boxes of the target are dashed. Positive anchors are few, and need not fit well:
# that is what the four numbers are for.

# %%
figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
titles = ["positive, sampled", "30 of those ignored", "negative, sampled"]
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
# `loss_objectness` is the mean cross-entropy over all sampled anchors.
# `loss_rpn_box_reg` looks at the positive ones only: how far are the four numbers
# from those that would have moved the anchor onto its person? The sum is divided by the
# number of all sampled anchors, negatives included.

# %%
from torch.nn import functional as F

sampled = positive | negative
objectness_terms = F.binary_cross_entropy_with_logits(
    logits.flatten(), anchor_labels[0], reduction="none"
)
wanted = model.rpn.box_coder.encode(matched, anchors)[0]
move_terms = F.smooth_l1_loss(moves, wanted, beta=1 / 9, reduction="none").sum(dim=1)
by_hand = {
    "loss_objectness": objectness_terms[sampled].mean(),
    "loss_rpn_box_reg": move_terms[positive].sum() / sampled.sum(),
}

# %% [markdown]
# The second stage does the same with proposals. `select_training_samples` adds the
# target's own boxes to them. It calls a proposal a person if its IoU with one is at
# least 0.5, and background if not. Then it samples a fixed number of them at random, at most
# a quarter of them people. `loss_classifier` is the mean over all that were sampled.
# `loss_box_reg` sums over the people among them, and divides by the number of all:

# %%
filtered = model.rpn.filter_proposals(moved, logits, batch.image_sizes, per_level)
rois, matched, roi_labels, wanted = model.roi_heads.select_training_samples(
    filtered[0], targets
)
person = roi_labels[0] == 1
assert person.sum() <= model.roi_heads.fg_bg_sampler.batch_size_per_image / 4
assert model.roi_heads.proposal_matcher.high_threshold == 0.5
pooled = model.roi_heads.box_roi_pool(features, rois, batch.image_sizes)
class_logits, box_regression = model.roi_heads.box_predictor(
    model.roi_heads.box_head(pooled)
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
mask_features = model.roi_heads.mask_roi_pool(features, [people], batch.image_sizes)
mask_logits = model.roi_heads.mask_predictor(model.roi_heads.mask_head(mask_features))
mask_logits = mask_logits[:, 1]
mask_terms = F.binary_cross_entropy_with_logits(
    mask_logits, mask_targets, reduction="none"
)
assert mask_terms.shape == mask_targets.shape == (len(people), 28, 28)
by_hand["loss_mask"] = mask_terms.mean()

# %% [markdown]
# With the same seed the model samples the same anchors and proposals, so all five must
# agree:

# %% tags=["nbval-ignore-output"]
torch.manual_seed(SEED)
losses = model([image], on_device)
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
# ## The whole way
#
# The diagram at the top of this notebook, with the same picture at every stage, and
# its width and height there:

# %%
heat = features["1"][0].norm(dim=0).cpu()
heat = torch.tensor(plt.cm.magma(plt.Normalize()(heat)))[..., :3].permute(2, 0, 1)
likely = {k: v[detections["scores"] > 0.5] for k, v in detections.items()}
without_masks = {"boxes": likely["boxes"], "scores": likely["scores"]}
stages = {
    "images": (image, None),
    "transform": (pixels[0], None),
    'backbone, level "1"': (heat, None),
    "rpn, the 15 best proposals": (pixels[0], {"boxes": proposals[0][:15]}),
    "roi_heads, boxes that score over 0.5": (image, without_masks),
    "roi_heads, their masks": (image, likely),
}
sizes = [" × ".join(map(str, picture.shape[:0:-1])) for picture, _ in stages.values()]
titles = [f"{name} ({size})" for name, size in zip(stages, sizes, strict=True)]
show(*zip(*stages.values(), strict=True), titles, cell=(4.2, 3.2))
plt.show()

# %% [markdown]
# ## Recap
#
# - **Call** a part by itself: each takes tensors and gives tensors whose shapes you can print.
# - **Compare** by hand with what the model gives, and you know that you have understood it.
# - **Look** inside when an answer surprises you, and plot what each part gives.
# - **Plot** the largest terms of a loss: they show what the model, or the target, gets wrong.

# %% [markdown]
# ## On your own
#
# 1. Take a person that the model misses through the parts. Which part is at fault: is there no proposal
#    with an IoU of at least 0.5, is its score low, or does the last NMS drop it?
#    <details><summary>Hint</summary>Take another <code>test_set[i]</code>; scale the target's boxes to the batch, and compare them with <code>box_iou</code> after each stage.</details>
# 2. Double `MIN_SIZE` and `MAX_SIZE`. From which levels are the proposals read now, and what do the scores do?
#    <details><summary>Hint</summary><code>levels.bincount()</code> counts them, before and after.</details>
# 3. Get the 7 × 7 crops without calling any part by hand.
#    <details><summary>Hint</summary><code>model.roi_heads.box_roi_pool.register_forward_hook</code> takes a function of (module, inputs, output); keep the output, and call <code>model([image])</code>.</details>

# %% [markdown]
# ## In practice
#
# - In training mode torchvision keeps more proposals than in evaluation (2000 and 1000, unless the model says
#   otherwise), and adds the target's boxes to them. So a loss by hand needs `model.train()`.
# - The losses depend on which anchors and proposals are sampled. Set the seed before you compare two of them.
# - Methods such as `filter_proposals` and `postprocess_detections` are not documented, and may change with a version.
#   Forward hooks on the modules do not depend on them.
# - With a model that was trained on your classes, as in notebook [04](04_penn_fudan_mask_rcnn.ipynb), every cell works
#   the same: load it in place of `get_model`, and set `categories` to your own.
#
# ## Further reading
#
# - [Faster R-CNN](https://arxiv.org/abs/1506.01497), [Feature Pyramid
#   Networks](https://arxiv.org/abs/1612.03144), [Mask R-CNN](https://arxiv.org/abs/1703.06870).
# - torchvision's source: [generalized_rcnn.py](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/generalized_rcnn.py),
#   [rpn.py](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/rpn.py) and
#   [roi_heads.py](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/roi_heads.py).
#
# **Next:** [09, anchors and backbones](09_anchors_and_backbones.ipynb).
