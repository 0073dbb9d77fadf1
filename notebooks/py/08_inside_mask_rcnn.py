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
# You call the parts of a Mask R-CNN by hand, one after the other. They give what `model([image])` gives, and the five
# losses too.

# %% [markdown]
# ## What you'll do
#
# - resize, normalise and pad a picture by hand;
# - look at feature maps, anchors, proposals, and the features under each proposal;
# - turn them into boxes and masks;
# - compute the five training losses, and see where on the picture they come from.
#
# **You need** notebook [02](02_finetuning_a_predictor.ipynb), or to have used one of torchvision's detectors.
# Nothing is trained here. On one CPU core it takes less than a minute at `quick` and `laptop`. `full` is made for a
# GPU (not measured yet).

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
# The next cell turns the preset into plain constants. `full` takes torchvision's Mask R-CNN with a ResNet-50.
# `quick` and `laptop` take a small model with the same parts. It has seen only synthetic street scenes, so it has
# many false positives on photographs. `quick` has synthetic images instead of the photographs.
#
# A preset may have several sizes. `MIN_SIZE` is the one that evaluation takes.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset, fetch_weights, prepare_data, provenance

preset = choose_preset()
MODEL, WEIGHTS = preset.mask_rcnn, preset.weights
MIN_SIZE, MAX_SIZE = preset.min_size[-1], preset.max_size
SEED = 0

device, root = pick_device(), prepare_data(preset)
fetch_weights(MODEL, WEIGHTS)
print(provenance(preset, device))
print(f"{MODEL = }\n{WEIGHTS = }\n{MIN_SIZE = }\n{MAX_SIZE = }\n{SEED = }")

# %% [markdown]
# ## What comes out
#
# The weights know several classes. "person" is number 1, as in our dataset, so we can use the model as it is.
# We measure nothing here, so we may choose a picture in which the model does well: the one where a detection that fits
# a person has the highest score.

# %%
import torch
from torchvision.models import get_model, get_model_weights

model = get_model(MODEL, weights=WEIGHTS, min_size=MIN_SIZE, max_size=MAX_SIZE)
model = model.to(device).eval().requires_grad_(False)
categories = get_model_weights(MODEL)[WEIGHTS].meta["categories"]
num_classes = len(categories)
print("person is number", categories.index("person"))

# %%
from torchvision.ops import box_iou

from tutorial_lib.engine import predict
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

dataset = PennFudanDataset(root, get_transform(train=False))


def best_score(index):
    image, target = dataset[index]
    (found,) = predict(model, [image], device)
    fits = (box_iou(found["boxes"], target["boxes"]) >= 0.7).any(dim=1)
    scores = found["scores"][fits & (found["labels"] == 1)]
    return scores.max().item() if len(scores) else 0


chosen = max(range(0, 64, 2), key=best_score)

# %%
import matplotlib.pyplot as plt

from tutorial_lib.visualization import show

image, target = dataset[chosen]
prediction = predict(model, [image], device)[0]
titles = ["target", "detections"]
show([image, image], [target, prediction], titles, categories=categories, cell=(5.5, 4.5))
plt.show()

# %% [markdown]
# How does the model come to that? Mask R-CNN ([He et al. 2017](https://arxiv.org/abs/1703.06870)) is a chain of
# modules. These are torchvision's names for them:
#
# ![Mask R-CNN: images go through transform, as one batch, to the backbone. Its feature maps go to the rpn, which gives proposals, and to roi_heads. There box_roi_pool, box_head and box_predictor make boxes, labels and scores of feature maps and proposals. In a second row, mask_roi_pool, mask_head and mask_predictor make masks of the feature maps and of those boxes, in training of the proposals.](images/mask_rcnn.svg)
#
# ## 1. `transform`: from the picture to a batch
#
# The shorter side becomes `MIN_SIZE`, unless the longer one would then exceed `MAX_SIZE`. Both sides are rounded
# down. Then the batch is padded at the right and at the bottom to multiples of 32, because the backbone halves it
# five times.

# %% tags=["nbval-ignore-output"]
image = image.to(device)
batch, _ = model.transform([image])
height, width = batch.image_sizes[0]
print("the picture:", list(image.shape))
print("resized:    ", [3, height, width])
print("the batch:  ", list(batch.tensors.shape))

# %% [markdown]
# The same by hand. Normalising subtracts ImageNet's mean of each channel and divides by its standard deviation. It
# comes before the padding, so the padding's zeros are the mean colour, not black.

# %%
import math

from torch.nn import functional as F

scale = min(MIN_SIZE / min(image.shape[1:]), MAX_SIZE / max(image.shape[1:]))
height, width = (int(side * scale) for side in image.shape[1:])
padded = [math.ceil(side / 32) * 32 for side in (height, width)]

mean = torch.tensor(model.transform.image_mean, device=device)[:, None, None]
std = torch.tensor(model.transform.image_std, device=device)[:, None, None]
normalised = ((image - mean) / std)[None]
by_hand = torch.zeros(1, 3, *padded, device=device)
by_hand[..., :height, :width] = F.interpolate(normalised, size=(height, width), mode="bilinear")
torch.testing.assert_close(batch.tensors, by_hand)

# %% [markdown]
# The three panels on the left are at one scale. They show the picture, and a batch of it and another one. (The
# normalisation is undone for the plot.) The two on the right show the top of a person, 40 pixels wide, before and
# after:

# %%
other, _ = dataset[(chosen + 1) % len(dataset)]
both, _ = model.transform([image, other.to(device)])
pictures = [image, *(both.tensors * std + mean)]
pictures = [p.clamp(0, 1).permute(1, 2, 0).cpu() for p in pictures]
x1, top, x2, _ = target["boxes"][0].tolist()
left = (x1 + x2) / 2 - 20
figure, panels = plt.subplots(1, 5, figsize=(12, 2.5), width_ratios=[4, 4, 4, 3, 3], layout="constrained")
titles = ["the picture", "in a batch of two", "the other one", "40 pixels", "resized"]
for axes, i, title in zip(panels, (0, 1, 2, 0, 1), titles, strict=True):
    axes.imshow(pictures[i], interpolation="nearest")
    axes.set_title(title)
for axes in panels[:3]:
    axes.set_xlim(0, max(p.shape[1] for p in pictures))
    axes.set_ylim(max(p.shape[0] for p in pictures), 0)
for axes, factor in zip(panels[3:], (1, scale), strict=True):
    axes.set_xlim(left * factor, (left + 40) * factor)
    axes.set_ylim((top + 40) * factor, top * factor)
plt.show()

# %% [markdown]
# ## 2. `backbone`: five maps of the same picture
#
# Each level of the pyramid has the same number of channels. A location of level `"0"` stands for 4 × 4 pixels of the
# batch, one of `"pool"` for 64 × 64.
#
# The plot shows the length of each location's vector of channels. The fine levels follow outlines. The coarse ones
# know only roughly where things are. A bright location at the edge may show nothing: a convolution sees zeros beyond
# the edge.

# %% tags=["nbval-ignore-output"]
features = model.backbone(batch.tensors)
maps = list(features.values())
strides = (4, 8, 16, 32, 64)
for (level, feature), stride in zip(features.items(), strides, strict=True):
    print(f"level {level:4}  stride {stride:2}  {list(feature.shape)}")

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
# `rpn.head` goes over every level with the same weights. Each location has three anchors. For each of them the head
# gives one logit, the *objectness*, and four numbers that move the anchor.
#
# In the plot, the first panel has the anchors of one location in the middle of each level. The others show the best
# objectness of each location's three anchors, as a probability. A person lights up on the levels whose anchors are
# about as large as the person.

# %% tags=["nbval-ignore-output"]
objectness, deltas = model.rpn.head(maps)
anchors = model.rpn.anchor_generator(batch, maps)
per_level = [logits.numel() for logits in objectness]
for logits, delta in zip(objectness, deltas, strict=True):
    print("objectness", list(logits.shape), " moves", list(delta.shape))
print("anchors:", list(anchors[0].shape), "and", sum(per_level), "logits")


# %%
def outline(axes, boxes, colour, **line):
    """Boxes as lines, which may be thinner than a pixel."""
    for x1, y1, x2, y2 in boxes.tolist():
        axes.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, **line))


figure, panels = plt.subplots(2, 3, figsize=(13, 6), layout="constrained")
for axes in panels.flat:
    axes.axis("off")
panels[0, 0].imshow(view, extent=extent)
panels[0, 0].set_title("anchors of one location of each level")
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
# `box_coder.decode` moves all anchors. The first two numbers shift the centre, in widths and heights of the anchor.
# The other two are logarithms of the factors for its width and height. Here is the same by hand, for the 30 anchors
# with the highest objectness:

# %%
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import box_convert

logits, moves = concat_box_prediction_layers(objectness, deltas)
moved = model.rpn.box_coder.decode(moves, anchors).view(1, -1, 4)

best = logits.flatten().topk(30).indices
centre, size = box_convert(anchors[0][best], "xyxy", "cxcywh").split(2, dim=1)
centre, size = centre + moves[best, :2] * size, size * moves[best, 2:].exp()
by_hand = box_convert(torch.cat([centre, size], dim=1), "cxcywh", "xyxy")
torch.testing.assert_close(moved[0, best], by_hand, rtol=0, atol=0.01)

# %% [markdown]
# `filter_proposals` takes the best of each level. Of these, non-maximum suppression (NMS) drops every box that
# overlaps a better one of the same level by an IoU over 0.7. At most `post_nms_top_n` of all levels are kept.

# %% tags=["nbval-ignore-output"]
filtered = model.rpn.filter_proposals(moved, logits, batch.image_sizes, per_level)
proposals, proposal_scores = filtered
print(f"{len(moved[0])} moved anchors, {len(proposals[0])} proposals")

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
# After NMS an object has fewer boxes, so boxes of other objects come among the best 30. An object can still have
# several, for two reasons. Boxes of two levels are never compared. And the threshold of 0.7 is lenient. It should keep
# both of two people who stand close together.
#
# ## 4. `box_roi_pool`: the features under each proposal
#
# RoIAlign lays a grid of 7 × 7 over each proposal, whatever its size. For each cell it takes the mean of 2 × 2
# points (`sampling_ratio=2`), read from the features by bilinear interpolation.
#
# A large proposal is read from a coarse level. The level is `"0"` where the root of the area is below 112 pixels,
# `"1"` below 224, `"2"` below 448, and `"3"` from there on.

# %% tags=["nbval-ignore-output"]
from torchvision.ops import box_area, nms, roi_align

pooled = model.roi_heads.box_roi_pool(features, proposals, batch.image_sizes)
print(list(pooled.shape))

edges = torch.tensor([112.0, 224, 448], device=device)
levels = torch.bucketize(box_area(proposals[0]).sqrt(), edges, right=True)
print("proposals by level:", levels.bincount(minlength=4).tolist())

first = levels[0].item()
by_hand = roi_align(maps[first], [proposals[0][:1]], 7, 1 / strides[first], sampling_ratio=2)
torch.testing.assert_close(pooled[:1], by_hand, rtol=1e-3, atol=1e-3)

# %% [markdown]
# These are four proposals that lie apart. The top row shows the picture under them. The middle row shows RoIAlign of
# its pixels, and how coarse 7 × 7 is. The bottom row shows what the head gets, the crop of the feature map. Of each
# cell it shows only the length of the vector of channels:

# %%
apart = nms(proposals[0], proposal_scores[0], 0.2)[:4]
pixels = view.permute(2, 0, 1)[None]
small = roi_align(pixels, [proposals[0][apart].cpu()], 7, sampling_ratio=2)
figure, panels = plt.subplots(3, 4, figsize=(10, 7.5), layout="constrained")
for axes in panels.flat:
    axes.axis("off")
for (above, middle, below), i, crop in zip(panels.T, apart, small, strict=False):
    x1, y1, x2, y2 = proposals[0][i].round().int().tolist()
    above.imshow(view[y1:y2, x1:x2])
    above.set_title(f'{x2 - x1} × {y2 - y1} pixels, level "{levels[i]}"', fontsize=10)
    middle.imshow(crop.permute(1, 2, 0))
    below.imshow(pooled[i].norm(dim=0).cpu(), cmap="magma")
plt.show()

# %% [markdown]
# ## 5. `box_head` and `box_predictor`: what it is, and where exactly
#
# The crop becomes a vector. The vector becomes a score and a box for each class. (The background's box is never
# used.) `postprocess_detections` moves the proposals and drops those that score at most 0.05. Then NMS runs again,
# now within each class and at an IoU of 0.5.

# %% tags=["nbval-ignore-output"]
vectors = model.roi_heads.box_head(pooled)
class_logits, box_regression = model.roi_heads.box_predictor(vectors)
for name in ("vectors", "class_logits", "box_regression"):
    print(f"{name:15}{list(globals()[name].shape)}")

boxes, scores, labels = model.roi_heads.postprocess_detections(
    class_logits, box_regression, proposals, batch.image_sizes
)
print(len(boxes[0]), "detections")

# %%
likely = class_logits.softmax(dim=1)[:, 1].topk(20).indices
corrected = model.roi_heads.box_coder.decode(box_regression, proposals)[:, 1]
figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
titles = ["the 20 likeliest proposals", "corrected", "after NMS, score over 0.5"]
people = (labels[0] == 1) & (scores[0] > 0.5)
three = [proposals[0][likely], corrected[likely], boxes[0][people]]
for axes, title, some in zip(panels, titles, three, strict=True):
    axes.imshow(view, extent=extent)
    axes.axis("off")
    axes.set_title(title)
    outline(axes, some, "yellow", lw=1)
plt.show()

# %% [markdown]
# ## 6. The mask branch: 28 × 28, pasted
#
# For each detection the features are pooled again, to 14 × 14. They become 28 × 28 logits for each class that the
# branch knows. The label says which class counts:

# %% tags=["nbval-ignore-output"]
from torchvision.models.detection.roi_heads import maskrcnn_inference

mask_features = model.roi_heads.mask_roi_pool(features, boxes, batch.image_sizes)
mask_logits = model.roi_heads.mask_predictor(model.roi_heads.mask_head(mask_features))
masks = maskrcnn_inference(mask_logits, labels)
print("pooled ", list(mask_features.shape))
print("logits ", list(mask_logits.shape))
print("masks  ", list(masks[0].shape))

# %% [markdown]
# `transform.postprocess` is the last step. It brings everything back to the pixels of the picture, and stretches each
# mask to the size of its box. **The parts by hand give what the model gives:**

# %%
result = {"boxes": boxes[0], "labels": labels[0], "scores": scores[0], "masks": masks[0]}
sizes = [image.shape[1:]]
(detections,) = model.transform.postprocess([result.copy()], batch.image_sizes, sizes)
(expected,) = model([image])
for name in expected:
    torch.testing.assert_close(detections[name], expected[name], rtol=1e-3, atol=1e-2)
print("equal:", *sorted(expected))

# %% [markdown]
# These are the two best detections. Each row shows a mask as predicted, pasted into the picture, and cut at 0.5. An
# outline cannot be finer
# than the 28 cells across its box, however large the picture:

# %%
figure, panels = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
for i, (left, middle, right) in enumerate(panels[: len(boxes[0])]):
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
# ## The whole way
#
# This is the diagram again. It shows the picture at every stage, with its width and height there:

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
# ## 7. Where the losses come from
#
# In training mode the same parts run, and their answers are compared with the target. First the anchors:
#
# - *positive* are those whose IoU with a person is at least 0.7, and those with the highest IoU of each person;
# - *negative* are those whose IoU with everybody is below 0.3;
# - the others are ignored.
#
# There are far too many negatives. So 256 anchors are sampled at random, at most half of them positive. In the
# plot, the target's boxes are dashed. Positive anchors are few, and need not fit well: the four numbers correct them.

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
sampled = positive | negative
for name, value in (("positive", 1), ("negative", 0), ("ignored", -1)):
    kind = anchor_labels[0] == value
    print(f"{name:8} {kind.sum().item():6}, sampled {(kind & sampled).sum().item():3}")

# %%
ignored = (anchor_labels[0] == -1).nonzero().flatten()
ignored = ignored[torch.linspace(0, len(ignored) - 1, 30).long()]
which = {"positive, sampled": positive, "30 of those ignored": ignored, "negative, sampled": negative}
figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
for axes, (title, some), colour in zip(panels, which.items(), ("C2", "C1", "C3"), strict=True):
    axes.imshow(view, extent=extent)
    axes.set(xlim=extent[:2], ylim=extent[2:], title=title)
    axes.axis("off")
    outline(axes, anchors[0][some], colour, lw=1.5 if some is positive else 0.7)
    outline(axes, targets[0]["boxes"], "white", lw=1.5, ls="--")
plt.show()

# %% [markdown]
# `loss_objectness` is the mean cross-entropy over all sampled anchors. `loss_rpn_box_reg` looks only at the positive
# ones. It sums how far their four numbers are from those that move the anchor onto its person. The sum is divided by
# the
# number of all sampled anchors, negatives included.

# %%
cross_entropy = F.binary_cross_entropy_with_logits
objectness_terms = cross_entropy(logits.flatten(), anchor_labels[0], reduction="none")
wanted = model.rpn.box_coder.encode(matched, anchors)[0]
move_terms = F.smooth_l1_loss(moves, wanted, beta=1 / 9, reduction="none").sum(dim=1)
by_hand = {
    "loss_objectness": objectness_terms[sampled].mean(),
    "loss_rpn_box_reg": move_terms[positive].sum() / sampled.sum(),
}

# %% [markdown]
# The second stage does the same with proposals. `select_training_samples` adds the target's own boxes to them. A
# proposal is a person if its IoU with one is at least 0.5, else background. A fixed number is sampled at random, at
# most a quarter of them people. `loss_classifier` is the mean over all that are sampled. `loss_box_reg` sums over the
# people among them, and divides by the number of all:

# %%
filtered = model.rpn.filter_proposals(moved, logits, batch.image_sizes, per_level)
rois, matched, roi_labels, wanted = model.roi_heads.select_training_samples(filtered[0], targets)
person = roi_labels[0] == 1
people = rois[0][person]
pooled = model.roi_heads.box_roi_pool(features, rois, batch.image_sizes)
class_logits, box_regression = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
class_terms = F.cross_entropy(class_logits, roi_labels[0], reduction="none")
of_person = box_regression.view(-1, num_classes, 4)[:, 1]
box_terms = F.smooth_l1_loss(of_person, wanted[0], beta=1 / 9, reduction="none").sum(1)
by_hand["loss_classifier"] = class_terms.mean()
by_hand["loss_box_reg"] = box_terms[person].sum() / len(person)

# %% [markdown]
# Last come the masks. For each proposal that is a person, `project_masks_on_boxes` cuts the part under it out of that
# person's target mask. RoIAlign makes it 28 × 28. `loss_mask` is the mean cross-entropy of all these cells, in the
# logits of the person's class:

# %%
from torchvision.models.detection.roi_heads import project_masks_on_boxes

mask_targets = project_masks_on_boxes(targets[0]["masks"], people, matched[0][person], 28)
mask_features = model.roi_heads.mask_roi_pool(features, [people], batch.image_sizes)
mask_logits = model.roi_heads.mask_predictor(model.roi_heads.mask_head(mask_features))
mask_logits = mask_logits[:, 1]
mask_terms = cross_entropy(mask_logits, mask_targets, reduction="none")
by_hand["loss_mask"] = mask_terms.mean()

# %% [markdown]
# With the same seed the model samples the same anchors and proposals. So all five must agree:

# %% tags=["nbval-ignore-output"]
torch.manual_seed(SEED)
losses = model([image], on_device)
print(f"{'':18}{'model':>8}{'by hand':>10}")
for name, value in losses.items():
    print(f"{name:18}{value.item():8.4f}{by_hand[name].item():10.4f}")
    torch.testing.assert_close(value, by_hand[name], rtol=1e-4, atol=1e-5)

# %% [markdown]
# Where on the picture do the losses come from? For each loss of the boxes, these are the anchors or proposals with the
# ten
# largest terms, the largest in yellow:

# %%
sources = {
    "loss_objectness": (anchors[0][sampled], objectness_terms[sampled]),
    "loss_rpn_box_reg": (anchors[0][positive], move_terms[positive]),
    "loss_classifier": (rois[0], class_terms),
    "loss_box_reg": (people, box_terms[person]),
}
figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
for axes, (name, (some, terms)) in zip(panels.flat, sources.items(), strict=True):
    axes.imshow(view, extent=extent, alpha=0.6)
    axes.set(xlim=extent[:2], ylim=extent[2:], title=name)
    axes.axis("off")
    for i in terms.argsort()[-10:]:
        colour = plt.cm.plasma((terms[i] / terms.max()).item())
        outline(axes, some[i : i + 1], colour, lw=1.8)
plt.show()

# %% [markdown]
# For `loss_mask`, these are the proposals with the smallest and the largest mean. The last panel of each row has the
# terms. They show what the prediction gets wrong:

# %%
order = mask_terms.mean(dim=(1, 2)).argsort()
figure, panels = plt.subplots(2, 4, figsize=(11, 6), layout="constrained")
for row, i in zip(panels, (order[0], order[-1]), strict=True):
    x1, y1, x2, y2 = people[i].round().int().tolist()
    row[0].imshow(view[y1:y2, x1:x2])
    row[0].set_title("the proposal")
    cells = {
        "target": mask_targets[i],
        "prediction": mask_logits[i].sigmoid(),
        "terms of loss_mask": mask_terms[i],
    }
    for axes, (title, values) in zip(row[1:], cells.items(), strict=True):
        axes.imshow(values.cpu(), cmap="magma", vmin=0)
        axes.set_title(title)
for axes in panels.flat:
    axes.axis("off")
plt.show()

# %% [markdown]
# ## Recap
#
# - **Call** a part by itself: it takes tensors and gives tensors whose shapes you can print.
# - **Compare** what you compute by hand with what the model gives: if the two agree, you have understood it.
# - **Look** inside when an answer surprises you, and plot what each part gives.
# - **Plot** the largest terms of a loss: they show what the model, or the target, gets wrong.

# %% [markdown]
# ## On your own
#
# 1. Find a person that the model misses, and follow them through the parts. Which part is at fault? Is there no
#    proposal
#    with an IoU of at least 0.5, is its score low, or does the last NMS drop it?
#    <details><summary>Hint</summary>Take another <code>dataset[i]</code>, scale the target's boxes to the batch, and compare them with <code>box_iou</code> after each stage.</details>
# 2. Double `MIN_SIZE` and `MAX_SIZE`. From which levels are the proposals read now, and what do the scores do?
#    <details><summary>Hint</summary>Section 4 prints the proposals by level, before and after.</details>
# 3. Get the 7 × 7 crops without calling any part by hand.
#    <details><summary>Hint</summary><code>model.roi_heads.box_roi_pool.register_forward_hook</code> takes a function of (module, inputs, output). Keep the output, and call <code>model([image])</code>.</details>
#    <details><summary>Solution</summary><code>kept = []; model.roi_heads.box_roi_pool.register_forward_hook(lambda module, inputs, output: kept.append(output)); model.eval()([image])</code></details>

# %% [markdown]
# ## In practice
#
# - In training mode torchvision keeps more proposals than in evaluation: 2000 and 1000, unless the model says
#   otherwise. So call `model.train()` before you compute a loss by hand.
# - The losses depend on which anchors and proposals are sampled. Set the seed before you compare two of them.
# - Methods such as `filter_proposals` and `postprocess_detections` are not documented, and may change with a version.
#   Forward hooks on the modules do not depend on them.
# - A model that was trained on your classes, as in notebook [04](04_penn_fudan_mask_rcnn.ipynb), works the same. Load
#   it in place of `get_model`, and set `categories` to your own.
#
# ## Further reading
#
# - [Faster R-CNN](https://arxiv.org/abs/1506.01497), [Feature Pyramid
#   Networks](https://arxiv.org/abs/1612.03144), [Mask R-CNN](https://arxiv.org/abs/1703.06870).
# - torchvision's source:
#   [generalized_rcnn.py](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/generalized_rcnn.py),
#   [rpn.py](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/rpn.py) and
#   [roi_heads.py](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/roi_heads.py).
#
# **Next:** [09, anchors and backbones](09_anchors_and_backbones.ipynb).
