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
# # Choose anchors and a backbone by measuring them
#
# At one budget, six backbones end at very different APs. Before any training you can see which of your boxes the
# anchors fit.

# %% [markdown]
# ## What you'll do
#
# - compare six backbones in one table, and put a feature pyramid on MobileNetV2;
# - measure which of your boxes the anchors fit, and what the RPN then detects;
# - freeze BatchNorm, freeze layers, change the image size, and measure what that does.
#
# **You need** notebook [03](03_swapping_the_backbone.ipynb). It explains trunks, `out_channels`, and why the anchors'
# tuples are nested. On one CPU core it takes about 2 minutes at `quick` and about 6 at `laptop`. `full` is made for a
# GPU (not
# measured yet).

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
# The next cell turns the preset into plain constants. `full` takes torchvision's Faster R-CNN with a ResNet-50.
# `quick` and `laptop` take a small model with the same parts. `quick` has synthetic images instead of the
# photographs.
#
# The questions about freezing and image size need several trainings. So every preset takes the small model for them, at
# `SMALL_SIZES`.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset, fetch_weights, prepare_data, provenance

preset = choose_preset()
MODEL, WEIGHTS = preset.faster_rcnn, preset.weights
MIN_SIZE, MAX_SIZE = preset.min_size, preset.max_size
SMALL_SIZES = {"min_size": min(MIN_SIZE[-1], 256), "max_size": min(MAX_SIZE, 448)}
BATCH_SIZE, SPLIT, SEED = preset.batch_size, preset.split, 0
RPN_EPOCHS, EPOCHS = 4, 1 if preset.name == "quick" else 2

device, root = pick_device(), prepare_data(preset)
fetch_weights(MODEL, WEIGHTS)
print(provenance(preset, device))
print(f"{MODEL = }\n{WEIGHTS = }\n{MIN_SIZE = }\n{MAX_SIZE = }\n{SMALL_SIZES = }")
print(f"{BATCH_SIZE = }\n{SPLIT = }\n{RPN_EPOCHS = }\n{EPOCHS = }\n{SEED = }")

# %% [markdown]
# ## Six backbones at one budget
#
# Training six detectors takes longer than a notebook should, so the library holds what was measured. All six had the
# same photographs, epochs, image size, batch, optimizer and seed, and all started from random weights. The split into
# training and test images was random. (In a clone, `python -m tools.benchmarks.backbones laptop` measures the table
# again. With `full` instead of `laptop`, it does so on a GPU with ImageNet weights.)

# %%
import json
from importlib.resources import files

measured = files("tutorial_lib") / "results" / "backbones.json"
rows = [row for row in json.loads(measured.read_text())["rows"] if row["preset"] == "laptop"]
one = rows[0]
each_epoch = one["images_trained_on"] // one["epochs"]
print(f"measured on {one['device']}, threads: {one['threads']}, torch {one['torch']}, {one['date']}")
print(f"{one['epochs']} epochs of {each_epoch} photographs, {one['min_size']} pixels, batch {one['batch_size']}\n")
print(f"{'':23}M param.   MiB  train/s  test/s     AP   AP50")
for row in rows:
    print(f"{row['backbone']:23}{row['parameters'] / 1e6:8.1f}{row['memory']:6}", end="")
    print(f"{row['train_images_per_second']:9.1f}{row['inference_images_per_second']:8.1f}", end="")
    print(f"{row['box_AP']:7.3f}{row['box_AP50']:7.3f}")

# %% [markdown]
# `MiB` is the peak memory of the training process, PyTorch's libraries included. `train/s` and `test/s` are images
# per second. AP is of the test images. It is only shown: nothing is chosen by it.
#
# In the plot, right is faster and up is better. The area of a disc grows with the number of parameters.

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for row in rows:
    x, y = row["inference_images_per_second"], row["box_AP"]
    axes.scatter(x, y, s=row["parameters"] / 4e5, alpha=0.6)
    name = {"text": row["backbone"], "xytext": (0, 9), "textcoords": "offset points"}
    axes.annotate(**name, xy=(x, y), fontsize=8, ha="center")
axes.set(xlabel="images per second, inference", ylabel="AP on test images")
axes.margins(0.2)
plt.show()

# %% [markdown]
# Here AP says how far a backbone gets from random weights with 100 images. In
# [Rethinking ImageNet pre-training](https://arxiv.org/abs/1811.08883) random weights catch up with trained ones, given
# all of COCO and a longer training. With 1000 images they stay far behind. Notebook
# [03](03_swapping_the_backbone.ipynb) starts from
# trained features.
#
# **What an AP near 0 means.** After few epochs it does not say that a backbone is bad. Most often the detector
# has not been trained for long enough. Its loss, which `backbones.json` also holds, may look fine: that of
# `mobilenet_v3_large_fpn` is like the others'. The BatchNorm of this backbone moves its statistics by a hundredth in
# each step (`momentum=0.01`). After 150 steps, 0.99
# to the power of 150, or 22 %, of their first values is still in them. Evaluation normalises with those. The
# small models of this project use 0.1.
#
# ## A feature pyramid on another trunk
#
# A plain MobileNetV2 gives one map of 1280 channels, in which each location stands for 32 × 32 pixels. With a feature
# pyramid (FPN) a detector gets finer maps of fewer channels. The table has both, as `mobilenet_v2` and
# `mobilenet_v2_fpn`.
#
# The pyramid needs the trunk's last features at each of four resolutions. `create_feature_extractor` takes them from
# inside the trunk. What does each block give for a picture of 256 × 256 pixels?

# %%
import torch
from torchvision.models import mobilenet_v2
from torchvision.models.feature_extraction import create_feature_extractor

blocks = [f"features.{i}" for i in range(19)]
extractor = create_feature_extractor(mobilenet_v2().eval(), blocks)
with torch.no_grad():
    outputs = extractor(torch.zeros(1, 3, 256, 256))
ends = {256 // output.shape[-1]: name for name, output in outputs.items()}
del ends[2]  # half the image's size: not used, as in ResNet's pyramid
channels = [outputs[name].shape[1] for name in ends.values()]
for (stride, name), count in zip(ends.items(), channels, strict=True):
    print(f"stride {stride:2}  {name:11}  {count:4} channels")

# %% [markdown]
# The dictionary keeps the *last* block of each stride. (`get_graph_node_names` lists all names that can be asked
# for.) An FPN brings the channels to one number and adds the coarse maps onto the finer ones. `LastLevelMaxPool`
# makes a fifth map from the last:

# %%
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

torch.manual_seed(SEED)
body = create_feature_extractor(mobilenet_v2(), {name: str(i) for i, name in enumerate(ends.values())})
fpn = FeaturePyramidNetwork(channels, 256, LastLevelMaxPool())
picture = torch.rand(1, 3, 192, 256)
with torch.no_grad():
    by_hand = fpn(body.eval()(picture))
for name, feature in by_hand.items():
    print(f"{name:5}{tuple(feature.shape)}")

# %% [markdown]
# torchvision's `BackboneWithFPN` does the same for the children of a module. The library's `backbone_with_fpn` also
# finds the nodes. It takes any trunk that can be traced and has features at strides 4, 8, 16 and 32. With the same
# seed all three are the same network:

# %%
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from tutorial_lib.models import backbone_with_fpn

torch.manual_seed(SEED)
children = {name.removeprefix("features."): str(i) for i, name in enumerate(ends.values())}
theirs = BackboneWithFPN(mobilenet_v2().features, children, channels, 256)
torch.manual_seed(SEED)
ours = backbone_with_fpn("mobilenet_v2")
with torch.no_grad():
    for other in (theirs.eval()(picture), ours.eval()(picture)):
        assert all(torch.equal(other[name], by_hand[name]) for name in by_hand)
print("by hand, torchvision's and the library's: equal")

# %% [markdown]
# Now we build both detectors. One map needs one tuple of sizes, and five maps need five. The default RoIAlign takes the
# maps "0" to "3" of a pyramid, so the one map needs its own. Nothing is trained here, so the weights are random:

# %%
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

trunk = mobilenet_v2().features
trunk.out_channels = 1280
map_anchors = AnchorGenerator(((32, 64, 128, 256, 512),), aspect_ratios=((0.5, 1.0, 2.0),))
fpn_anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), aspect_ratios=((0.5, 1.0, 2.0),) * 5)
pooler = MultiScaleRoIAlign(featmap_names=["0"], output_size=7, sampling_ratio=2)
sizes = {"min_size": MIN_SIZE, "max_size": MAX_SIZE}
one_map = FasterRCNN(trunk, 2, rpn_anchor_generator=map_anchors, box_roi_pool=pooler, **sizes)
with_fpn = FasterRCNN(ours, 2, rpn_anchor_generator=fpn_anchors, **sizes)
for name, model in {"one map": one_map, "with FPN": with_fpn}.items():
    print(f"{name:9}{sum(p.numel() for p in model.parameters()) / 1e6:5.1f} M parameters")

# %% [markdown]
# ## Anchors against your boxes
#
# The RPN can learn to detect an object only if some anchor comes near it. An anchor counts as an object if its IoU with
# a box is at least 0.7. It counts as background if its IoU with every box is under 0.3. If no anchor reaches 0.7 with a
# box, the box still gets its best one, however poor (`allow_low_quality_matches`). The regression then has to do the
# rest.
#
# So look at that best IoU for every box, before training. (The function leaves each module in training or
# evaluation mode, whichever it was in.)

# %% tags=["copy-me"]
# Copy me: runs alone
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.ops import box_iou


@torch.no_grad()
def best_anchor_ious(model: FasterRCNN, images: Sequence[Tensor], targets: Sequence[dict]) -> Tensor:
    """For every ground-truth box its IoU with the closest anchor, in the resized image."""
    if not images or len(images) != len(targets):
        raise ValueError(f"{len(images)} images and {len(targets)} targets: give one target for each image")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        batch, resized = model.transform(list(images), [{"boxes": target["boxes"]} for target in targets])
        features = model.backbone(batch.tensors)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        anchors = model.rpn.anchor_generator(batch, maps)
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat([box_iou(t["boxes"], a).amax(dim=1) for t, a in zip(resized, anchors, strict=True)])


# %% [markdown]
# First a toy, by hand. Anchors of 32 × 32 pixels are centred on (0, 0), (0, 32) … A box of that size lies right between
# four of them. It shares a quarter of its area with each, which is 256 pixels. So the IoU is
# 256 / (1024 + 1024 - 256):

# %%
toy_anchors = AnchorGenerator(sizes=((32,),), aspect_ratios=((1.0,),))
toy = FasterRCNN(trunk, 2, rpn_anchor_generator=toy_anchors, min_size=192, max_size=256)
box = {"boxes": torch.tensor([[32.0, 32, 64, 64]])}
iou = best_anchor_ious(toy, [picture[0]], [box])
print(f"IoU {iou.item():.4f}")
assert torch.isclose(iou, torch.tensor(256 / (1024 + 1024 - 256)))

# The model enlarges an image of half the size, and its boxes.
small = best_anchor_ious(toy, [picture[0, :, ::2, ::2]], [{"boxes": box["boxes"] / 2}])
assert torch.isclose(small, iou) and toy.training

# %% [markdown]
# Now take the real boxes of the **training** images, as the model sees them in evaluation:

# %%
from torch.utils.data import DataLoader
from torchvision.models import get_model

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

augmented = PennFudanDataset(root, get_transform(train=True), in_memory=True)
plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
train_set, _, _ = split_dataset(augmented, SPLIT, SEED, block=10)
plain_train, val_set, _ = split_dataset(plain, SPLIT, SEED, block=10)
train_loader = DataLoader(train_set, BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=collate_fn)
fit_loader = DataLoader(plain_train, BATCH_SIZE, collate_fn=collate_fn)
val_loader = DataLoader(val_set, BATCH_SIZE, collate_fn=collate_fn)

detector = get_model(MODEL, weights=WEIGHTS, **sizes).to(device).eval()
resized = []
for images, targets in fit_loader:
    resized += detector.transform(list(images), list(targets))[1]
width, height = torch.cat([t["boxes"][:, 2:] - t["boxes"][:, :2] for t in resized]).T

# %% [markdown]
# An anchor of size $s$ and ratio $r$ has the area $s^2$ and the height / width $r$. So we fit a layout to the boxes.
# Its sizes are five quantiles of $\sqrt{\text{width} \cdot \text{height}}$, one for each map. Its ratios
# are three quantiles of height / width. It has as many anchors as torchvision's default. The default's sizes are 32 to
# 512 pixels, made for images of 800.

# %% tags=["nbval-ignore-output"]
ratios = (height / width).quantile(torch.tensor([0.1, 0.5, 0.9]))
ratios = tuple(round(ratio, 1) for ratio in ratios.tolist())
fitted_sizes = (width * height).sqrt().quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
fitted_sizes = tuple((round(size),) for size in fitted_sizes.tolist())
fitted_anchors = AnchorGenerator(fitted_sizes, aspect_ratios=(ratios,) * 5)
print(f"{len(width)} boxes\nfitted sizes {fitted_sizes}\nfitted ratios {ratios}")

# %% [markdown]
# How well a layout fits depends only on the shapes of the feature maps, and on nothing that is trained. So to try
# one, we put it into a detector:

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import to_device


def fit_of(model, anchors):
    model.rpn.anchor_generator = anchors
    batches = [to_device(images, targets, device) for images, targets in fit_loader]
    return torch.cat([best_anchor_ious(model, *batch) for batch in batches]).cpu()


fits = {
    "one map": fit_of(one_map.to(device), map_anchors),
    "FPN default": fit_of(detector, fpn_anchors),
    "fitted": fit_of(detector, fitted_anchors),
}
print(f"{'':12}{'mean IoU':>9}{'≥ 0.5':>8}{'≥ 0.7':>8}")
for name, fit in fits.items():
    print(f"{name:12}{fit.mean():9.3f}", *(f"{(fit >= t).float().mean():7.0%}" for t in (0.5, 0.7)))

# %% [markdown]
# Each dot is a box of the training images. Its colour says how near an anchor comes:

# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), sharex=True, sharey=True, layout="constrained")
for axes, (name, fit) in zip(panels, fits.items(), strict=True):
    dots = axes.scatter(width, height, c=fit, vmin=0.3, vmax=1, s=14, cmap="viridis")
    share = (fit >= 0.7).float().mean()
    axes.set(title=f"{name}: {share:.0%} reach 0.7", xlabel="width, pixels")
panels[0].set_ylabel("height, pixels")
figure.colorbar(dots, ax=panels, label="IoU with the best anchor")
plt.show()

# %% [markdown]
# The one map and the FPN's default have anchors of the *same* shapes. They differ in where these stand: every 32
# pixels, or every 4 for the smallest. That matters where people are small against the step. Fitting the shapes
# brings most boxes closer still. But five quantiles leave out the smallest people. A layout with smaller
# anchors fits them better.
#
# ## What the RPN makes of it
#
# Does a better layout let the RPN detect more? We train three RPNs, one for each layout, on the same features:
# those of a trained detector, frozen. So they differ only in the anchors, and in the maps that these stand on. The one
# map is
# the pyramid's map of stride 32.

# %%
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead


def new_rpn(anchors):
    torch.manual_seed(SEED)
    head = RPNHead(detector.backbone.out_channels, anchors.num_anchors_per_location()[0])
    before_nms, after_nms = {"training": 600, "testing": 600}, {"training": 100, "testing": 100}
    # IoU of an object and of background, anchors sampled and the share of objects, then proposals and NMS
    return RegionProposalNetwork(anchors, head, 0.7, 0.3, 256, 0.5, before_nms, after_nms, 0.7).to(device)


all_maps = ["0", "1", "2", "3", "pool"]
maps = {"one map": ["3"], "FPN default": all_maps, "fitted": all_maps}
layouts = (map_anchors, fpn_anchors, fitted_anchors)
rpns = {name: new_rpn(anchors) for name, anchors in zip(maps, layouts, strict=True)}

# %% [markdown]
# One pass through the frozen backbone serves all three. So does one optimizer: AdamW treats every parameter by
# itself, and the RPNs share none.


# %%
@torch.no_grad()
def frozen_features(images, targets):
    batch, resized = detector.transform(*to_device(images, targets, device))
    return batch, detector.backbone(batch.tensors), resized


optimizer = torch.optim.AdamW([p for rpn in rpns.values() for p in rpn.parameters()], lr=1e-3)
for _ in range(RPN_EPOCHS):
    for images, targets in train_loader:
        batch, features, resized = frozen_features(images, targets)
        loss = 0
        for name, rpn in rpns.items():
            chosen = {key: features[key] for key in maps[name]}
            loss += sum(rpn(batch, chosen, resized)[1].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# %% [markdown]
# Here *recall* is the share of people that a proposal covers with an IoU of at least 0.5. We look at the first 10
# proposals of an image, and at 100. Which layout to take is a choice, so we measure on the validation images:

# %% tags=["nbval-ignore-output"]
@torch.no_grad()
def recall(rpn, keys, first):
    covered = []
    for images, targets in val_loader:
        batch, features, resized = frozen_features(images, targets)
        proposals, _ = rpn.eval()(batch, {key: features[key] for key in keys})
        for target, boxes in zip(resized, proposals, strict=True):
            covered.append(box_iou(target["boxes"], boxes[:first]).amax(dim=1) >= 0.5)
    return torch.cat(covered).float().mean().item()


print(f"{'recall of':12}{'10 proposals':>13}{'100 proposals':>15}")
for name, rpn in rpns.items():
    few, many = (recall(rpn, maps[name], first) for first in (10, 100))
    print(f"{name:12}{few:13.2f}{many:15.2f}")

# %% [markdown]
# These are one run's numbers, on the people of a few images. The detector cannot detect a person that no proposal
# is close to. So the right column says roughly how many people the second stage has a chance to detect.
#
# Compare the left column with the fit of the anchors above. A better fit need not give better proposals, because
# the RPN still has to tell good anchors from the rest. One possible reason: the fitted layout puts large anchors
# on the finest maps, whose features see the least of what is around them.
#
# ## BatchNorm: trainable or frozen?
#
# In training, BatchNorm normalises with the statistics of the *batch*. So what the network sees in one image
# depends on the images beside it. `FrozenBatchNorm2d` always uses the statistics that it was given. Its scale and
# shift are fixed, too. This cell puts it in place of every `BatchNorm2d`:

# %% tags=["copy-me"]
# Copy me: runs alone
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


def freeze_batch_norm(module):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.to(child.weight.device).load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)


# %% [markdown]
# We compute the features of an image in training mode, alone and beside another image, with both kinds of BatchNorm:

# %%
two = torch.rand(2, 3, 128, 128)
trunk = mobilenet_v2().features.train()
for frozen in (False, True):
    if frozen:
        freeze_batch_norm(trunk)
    with torch.no_grad():
        alone, beside = trunk(two[:1]), trunk(two)[:1]
    same_features = torch.allclose(alone, beside, atol=1e-4)
    print(f"frozen {frozen}: features the same beside another image: {same_features}")

# %% [markdown]
# A detector's batches are small, so their statistics are poor. A trunk that was trained on ImageNet has good ones.
# That is why torchvision's pre-trained ResNet-50 detectors freeze them, and so does the small detector.
#
# ## `trainable_backbone_layers`
#
# torchvision's builders can freeze the trunk, from its entrance on. With pre-trained weights the default of a
# ResNet is `trainable_backbone_layers=3`, which leaves `layer4`, `layer3` and `layer2` trainable. With 5, everything is
# trainable. (Without any weights the argument is ignored, with a warning: a random trunk must not be frozen.)
# What does each number leave trainable?

# %%
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

for layers in range(6):
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=layers)
    left = sum(p.numel() for p in backbone.body.parameters() if p.requires_grad)
    print(f"{layers}: {left / 1e6:5.2f} M trainable parameters in the trunk")

# %% [markdown]
# Nearly all of them are in the last two stages. So freezing the first three saves time and memory rather than
# parameters. The small detector has no such argument. Its trunk has 8 stages, and a loop freezes those that we choose.
# We finetune with all, with the last 4 and with none of them trainable. We measure on the validation images, since
# freezing is a choice too:


# %%
import time

from tutorial_lib.engine import evaluate, train_one_epoch, warmup_cosine
from tutorial_lib.models import replace_box_predictor


def small_detector(trainable=4):
    torch.manual_seed(SEED)
    model = get_model("fasterrcnn_mini_fpn", weights="DEFAULT", **SMALL_SIZES)
    for name, stage in model.backbone.body.named_children():
        stage.requires_grad_(int(name) >= 8 - trainable)
    return replace_box_predictor(model, 2).to(device)


def finetuned(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.01)
    steps = len(train_loader)
    schedule = warmup_cosine(optimizer, steps // 2, EPOCHS * steps)
    torch.manual_seed(SEED)
    begun = time.perf_counter()
    for _ in range(EPOCHS):
        train_one_epoch(model, optimizer, train_loader, device, lr_scheduler=schedule)
    return time.perf_counter() - begun


# %% tags=["nbval-ignore-output"]
by_stages = {}
for trainable in (8, 4, 0):
    by_stages[trainable] = model = small_detector(trainable)
    seconds = finetuned(model)
    AP = evaluate(model, val_loader, device).box.AP
    count = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"{trainable} stages trainable: {count:.2f} M parameters, {seconds:5.1f} s, val AP {AP:.3f}")

# %% [markdown]
# The fewer layers are trained, the fewer a step has to go back through. The first stages have the largest maps, so
# freezing them saves the most. What that costs or gains in AP depends on how similar the trunk's first training images
# are to yours.
#
# ## `min_size` and `max_size`
#
# The shorter side of an image becomes `min_size`, unless the longer one would then exceed `max_size`. Then `max_size`
# decides. A wide picture shows it:

# %%
from torchvision.models.detection.transform import GeneralizedRCNNTransform

wide = torch.rand(3, 300, 1000)
for min_size, max_size in ((192, 384), (192, 640), (192, 1333), (800, 1333)):
    transform = GeneralizedRCNNTransform(min_size, max_size, [0] * 3, [1] * 3).eval()
    resized_wide = transform([wide])[0].image_sizes[0]
    print(f"min_size {min_size}, max_size {max_size:4}: {resized_wide}")

# %% [markdown]
# With a `max_size` of 384 this picture's shorter side stays below the 192 that were asked for. So raise both
# together.
#
# To measure speed, we do not count a first batch. The clock waits until the device has finished:


# %%
def now():
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def images_per_second(model, loader):
    model.eval()
    batches = [[image.to(device) for image in images] for images, _ in loader]
    model(batches[0])
    begun = now()
    for images in batches:
        model(images)
    return sum(len(images) for images in batches) / (now() - begun)


# %% [markdown]
# Now we measure the detector with 4 trained stages at four sizes, without further training. (`max_size` is twice
# `min_size` here, so very wide photographs come out larger than above.)

# %% tags=["nbval-ignore-output"]
baseline = by_stages[4]
print(f"{'min_size':>8}{'images/s':>10}{'val AP':>8}{'best anchor IoU':>17}")
for factor in (0.5, 1, 1.5, 2):
    size = round(SMALL_SIZES["min_size"] * factor)
    baseline.transform.min_size, baseline.transform.max_size = (size,), 2 * size
    batches = [to_device(images, targets, device) for images, targets in val_loader]
    fit = torch.cat([best_anchor_ious(baseline, *batch) for batch in batches]).mean()
    speed = images_per_second(baseline, val_loader)
    AP = evaluate(baseline, val_loader, device).box.AP
    print(f"{size:8}{speed:10.1f}{AP:8.3f}{fit:17.3f}")

# %% [markdown]
# Twice the side is four times the pixels. The anchors still fit, because their sizes double from map to map. People
# twice as large meet the anchors of the next map, as long as there is one. The weights may fit less well, because this
# detector was finetuned at one size.
#
# With so few validation images, a few hundredths of AP are chance. Notebook [06](06_evaluating_detections.ipynb)
# says how to tell. Choose a size on more images, and train at the one you choose.

# %% [markdown]
# ## Recap
#
# - **Compare** backbones at the same budget, and say what they started from.
# - **Put** an FPN on a trunk: fewer channels, finer maps, and one tuple of sizes for each of its five maps.
# - **Look** at the best anchor of every box before you train.
# - **Ask** the RPN too: a better fit need not give better proposals.
# - **Measure** what you freeze, and the image size, on validation images.

# %% [markdown]
# ## On your own
#
# 1. Put the FPN on `swin_t`, and look at `feature_nodes` of it. What is the `True` in each entry?
#    <details><summary>Hint</summary><code>from tutorial_lib.models import feature_nodes</code></details>
#    <details><summary>Solution</summary>Swin's features are [N, H, W, C]: their channels come last, and a convolution wants them second.</details>
# 2. Give the fitted layout two sizes on each map. How far does the mean of the best IoUs rise, and how many more
#    anchors does it take?
#    <details><summary>Hint</summary><code>tuple((s, round(s * 1.2)) for (s,) in fitted_sizes)</code>; then <code>fit_of(detector, …)</code>.</details>
# 3. Train with batches of one image, BatchNorm trainable and frozen. Which loses more AP?
#    <details><summary>Hint</summary>Make <code>train_loader</code> a <code>DataLoader</code> with <code>batch_size=1</code>, and halve the learning rate twice, for both.</details>

# %% [markdown]
# ## In practice
#
# - With pre-trained weights, the builders named `…_resnet50_fpn` freeze BatchNorm, since batches are small. Those
#   named `_v2` do not, and neither does `ssdlite320_mobilenet_v3_large`. To freeze it in MobileNetV2, build
#   `mobilenet_v2(weights="DEFAULT", norm_layer=FrozenBatchNorm2d)`. From random weights BatchNorm must stay
#   trainable.
# - `rpn_anchor_generator` decides the shape of the RPN's head. Another number of anchors at a location means a new
#   head, and weights of the old one no longer fit.
#
# ## Further reading
#
# - [Feature Pyramid Networks](https://arxiv.org/abs/1612.03144).
# - [Rethinking ImageNet pre-training](https://arxiv.org/abs/1811.08883): what training from random weights takes.
# - [torchvision's backbones with an
#   FPN](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/backbone_utils.py).
#
# **Next:** [10, make it fast](10_making_it_fast.ipynb).
