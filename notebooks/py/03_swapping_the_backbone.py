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
# # Swap the backbone: MobileNetV2 under Faster R-CNN, and train it
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/torchvision-detection-tutorial/blob/main/notebooks/03_swapping_the_backbone.ipynb)
#
# You build a detector around a classification network of your choice, see what happens
# when its parts do not fit, train it, and compare it with the default.

# %% [markdown]
# ## What you'll do
#
# - take the convolutional part of MobileNetV2, its *trunk*, and read off what a detector must know of it;
# - give it anchors and RoIAlign, and learn why the tuples nest and `"0"` is a string;
# - make each of the usual mistakes once, on purpose, to know its message;
# - **train** the result, and measure it beside the default backbone: parameters, speed, AP.
#
# **You need** notebook [02](02_finetuning_a_predictor.ipynb): anchors, proposals, `train_one_epoch`.
#
# | preset | compared with | trunks start from | time |
# |---|---|---|---|
# | `quick` | `fasterrcnn_mini_fpn` | random weights | 2 min on one CPU core |
# | `laptop` | the same | random weights | 21 min on one CPU core |
# | `full` | `fasterrcnn_resnet50_fpn` | ImageNet weights | a GPU; without one, smaller images and fewer epochs (not measured yet) |

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
# The preset, as in notebook 01, and the trunks' weights, where it has any.

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
EPOCHS = 2 if preset.name == "quick" else preset.scratch_epochs
device = pick_device()
root = prepare_data(preset)
if preset.trunk_weights:
    fetch_weights("mobilenet_v2", preset.trunk_weights)
    fetch_weights("resnet50", "IMAGENET1K_V1")
fetch_weights(preset.faster_rcnn, preset.weights)
trunks = "trunks from ImageNet" if preset.trunk_weights else "random weights"
print(provenance(preset, device, weights=trunks))

# %% [markdown]
# ## What a detector wants from a trunk
#
# A classification network ends in a pooling layer and a classifier, which throw away *where*
# things are. What comes before, torchvision's MobileNetV2 keeps in `.features`. At `full` the
# next line is, as you would write it yourself,
#
# ```python
# trunk = torchvision.models.mobilenet_v2(weights="DEFAULT").features
# ```
#
# (`mobilenet_v2(pretrained=True)` of older texts still runs, warns that it "is deprecated since
# 0.13", and loads `IMAGENET1K_V1`, while `DEFAULT` is the better `IMAGENET1K_V2`.)

# %%
from torchvision.models import mobilenet_v2

trunk = mobilenet_v2(weights=preset.trunk_weights).features
picture = torch.rand(1, 3, 192, 256)
features = trunk(picture)
print(f"{picture.shape = }\n{features.shape = }")

# %% [markdown]
# One feature map of 1280 channels, and each of its places stands for 32 × 32 pixels. The
# heads of the detector need the number of channels, and read it from an attribute that
# MobileNetV2 does not have. Leave it out, and this is what you get:

# %%
from torchvision.models.detection import FasterRCNN

try:
    FasterRCNN(trunk, num_classes=2)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# So the number goes there by hand:

# %%
trunk.out_channels = 1280
assert features.shape[1] == trunk.out_channels

# %% [markdown]
# ## Anchors: one tuple for each feature map
#
# At every place of a feature map stand anchors of several sizes (in pixels of the
# resized image) and aspect ratios (height / width). Five sizes and three ratios are 15:

# %%
from torchvision.models.detection.anchor_utils import AnchorGenerator

anchor_generator = AnchorGenerator(
    sizes=((32, 64, 128, 256, 512),), aspect_ratios=((0.5, 1.0, 2.0),)
)
print(anchor_generator.num_anchors_per_location())

# %% [markdown]
# The **outer** tuple goes over the feature maps, the **inner** one over the sizes on that map.
# We have one feature map, so the outer tuples have one element, and the comma in `(…,)` is
# what makes them tuples. An FPN gives five maps and gets `((32,), (64,), (128,), (256,), (512,))`: as
# many sizes, but each on the map whose places are of a fitting size.
#
# Here are the 15 of one place, on an image as the model sees it; the outlines of the largest lie outside the picture:

# %%
import matplotlib.pyplot as plt

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform
from tutorial_lib.visualization import show

plain = PennFudanDataset(root, get_transform(train=False))
resize = FasterRCNN(
    trunk,
    num_classes=2,
    rpn_anchor_generator=anchor_generator,
    min_size=preset.min_size[-1],
    max_size=preset.max_size,
    image_mean=[0, 0, 0],
    image_std=[1, 1, 1],
).transform
batch, (target,) = resize(*(list(part) for part in collate_fn([plain[0]])))
height, width = batch.tensors.shape[-2:]
all_anchors = anchor_generator(
    batch, [torch.zeros(1, 1280, height // 32, width // 32)]
)[0]
middle = (height // 64) * (width // 32) + width // 64
anchors = all_anchors.reshape(-1, 15, 4)[middle]

image = batch.tensors[0]
show(
    [image, image],
    [{"boxes": target["boxes"]}, {"boxes": anchors}],
    ["what is to be found", "the anchors of one place"],
    columns=2,
    cell=(5.5, 4.5),
)
plt.show()

# %% [markdown]
# Anchors larger than the image reach over its edge, and at small image sizes the largest never
# match anything. Nor do people have a ratio of 0.5. That costs a little time and no
# correctness.
#
# ## RoIAlign: which feature map to cut from
#
# `MultiScaleRoIAlign` cuts a grid of 7 × 7 out of the features for each proposal. Its
# `featmap_names` are the *keys* of the dictionary that the backbone returns. An FPN returns
# `{"0": …, "1": …, …}`; MobileNetV2 returns a bare tensor, which `FasterRCNN` wraps
# as `{"0": tensor}`. So the name is the string `"0"`:

# %%
from torchvision.ops import MultiScaleRoIAlign

roi_pooler = MultiScaleRoIAlign(featmap_names=["0"], output_size=7, sampling_ratio=2)
boxes = [torch.tensor([[0.0, 0.0, 64.0, 128.0], [32.0, 32.0, 96.0, 96.0]])]
pooled = roi_pooler({"0": features}, boxes, image_shapes=[(192, 256)])
print(f"{pooled.shape = }")

# %% [markdown]
# Two boxes of different shapes became two blocks of 1280 × 7 × 7.
# (The `EmbeddingBagRoIAlign` of notebook [10](10_making_it_fast.ipynb) takes the same arguments. On a CPU it gives the
# same numbers faster.)
#
# ## Put together
#
# These are all the parts. `num_classes=2` is background and person:

# %% tags=["copy-me"]
from torchvision.models import mobilenet_v2
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign


def mobilenet_v2_detector(num_classes, trunk_weights=None, **kwargs):
    trunk = mobilenet_v2(weights=trunk_weights).features
    trunk.out_channels = 1280
    return FasterRCNN(
        trunk,
        num_classes=num_classes,
        rpn_anchor_generator=AnchorGenerator(
            sizes=((32, 64, 128, 256, 512),), aspect_ratios=((0.5, 1.0, 2.0),)
        ),
        box_roi_pool=MultiScaleRoIAlign(
            featmap_names=["0"], output_size=7, sampling_ratio=2
        ),
        **kwargs,
    )


# %% [markdown]
# ## When the parts do not fit
#
# Each of these mistakes is made on purpose. All four models can be built, and fail
# only when the first image comes through; this function sends one. Without a mistake it prints `works`:


# %%
def attempt(
    channels=1280,
    sizes=((32, 64, 128),),
    ratios=((0.5, 1.0, 2.0),),
    names=("0",),
):
    trunk = mobilenet_v2(weights=None).features
    trunk.out_channels = channels
    try:
        model = FasterRCNN(
            trunk,
            num_classes=2,
            min_size=128,
            rpn_anchor_generator=AnchorGenerator(sizes=sizes, aspect_ratios=ratios),
            box_roi_pool=MultiScaleRoIAlign(
                list(names), output_size=7, sampling_ratio=2
            ),
        )
        target = {
            "boxes": torch.tensor([[10.0, 10.0, 60.0, 90.0]]),
            "labels": torch.tensor([1]),
        }
        model([torch.rand(3, 128, 128)], [target])
        print("works")
    except (AssertionError, RuntimeError, IndexError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")


attempt()

# %% [markdown]
# **`out_channels` is not what the trunk gives.** The RPN's first convolution says so:

# %%
attempt(channels=960)

# %% [markdown]
# **Sizes for two feature maps, but there is one.** The message says what the tuples mean:

# %%
attempt(sizes=((32,), (64,)), ratios=((0.5, 1.0, 2.0),) * 2)

# %% [markdown]
# **The outer tuple is forgotten.** `(32, 64, 128)` is taken for three feature maps:

# %%
attempt(sizes=(32, 64, 128), ratios=(0.5, 1.0, 2.0))

# %% [markdown]
# **A number in place of the string**, `featmap_names=[0]`, as some old texts have it. The key 0 is
# not in `{"0": …}`, so no feature map is left to cut from, and the message does not help:

# %%
attempt(names=(0,))

# %% [markdown]
# ## Train it
#
# Many tutorials stop here, with a model whose new parts are random: asked for people, it answers
# with noise. So we train it, beside the default, with the **same budget**: the same images, epochs,
# image size, batch, optimizer and seed, and trunks that start alike, from ImageNet weights
# at `full` and from random weights elsewhere. (The package holds no ImageNet weights, and the
# starter weights of notebook 02 would give one side a head start.) Some things still differ. At `quick` and `laptop` the small
# model keeps its own anchors (16 to 256 pixels), a narrower box head and fewer training proposals. At `full`, torchvision freezes the
# first layers and all BatchNorm of the default's backbone, and the trunks' weights are of different recipes (`IMAGENET1K_V2` and `V1`).

# %%
from torch.utils.data import DataLoader

augmented = PennFudanDataset(root, get_transform(train=True))
train_set, _, _ = split_dataset(augmented, preset.split, SEED)
_, val_set, test_set = split_dataset(plain, preset.split, SEED)
train_loader = DataLoader(
    train_set,
    preset.batch_size,
    shuffle=True,
    drop_last=True,
    collate_fn=collate_fn,
)
val_loader = DataLoader(val_set, preset.batch_size, collate_fn=collate_fn)
test_loader = DataLoader(test_set, preset.batch_size, collate_fn=collate_fn)

# %% [markdown]
# Both models, and a copy of their backbones' first weights, to see later what moved:

# %%
from torchvision.models import get_model

same = {"min_size": preset.min_size, "max_size": preset.max_size}
# Fewer proposals for a CPU; torchvision's defaults are 512 and 1000 an image.
if preset.name != "full":
    per_image = 16 if preset.name == "quick" else 32
    same |= {"box_batch_size_per_image": per_image, "rpn_post_nms_top_n_test": 150}
torch.manual_seed(SEED)
models = {
    "MobileNetV2": mobilenet_v2_detector(2, preset.trunk_weights, **same).to(device),
    "default": get_model(preset.faster_rcnn, weights=None, num_classes=2, **same).to(
        device
    ),
}
start = {
    name: [p.detach().clone() for p in model.backbone.parameters()]
    for name, model in models.items()
}

# %% [markdown]
# The loop is that of notebook 02, once for each model:

# %% tags=["nbval-ignore-output"]
import time

from tutorial_lib.engine import evaluate, train_one_epoch, warmup_cosine

history = {name: [] for name in models}
train_seconds = dict.fromkeys(models, 0.0)
for name, model in models.items():
    torch.manual_seed(SEED)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=preset.learning_rate, weight_decay=0.01, fused=True
    )
    steps = len(train_loader)
    schedule = warmup_cosine(optimizer, steps, EPOCHS * steps)
    for epoch in range(1, EPOCHS + 1):
        begun = time.perf_counter()
        losses = train_one_epoch(
            model, optimizer, train_loader, device, lr_scheduler=schedule
        )
        train_seconds[name] += time.perf_counter() - begun
        box = evaluate(model, val_loader, device).box
        history[name].append(losses | {"AP50": box.AP50})
        print(
            f"{name}  epoch {epoch}/{EPOCHS}  loss {losses['loss']:.3f}  val AP50 {box.AP50:.3f}"
        )

# %% [markdown]
# Was the backbone trained, or only what stands on it? Every trainable tensor of it should have moved. And
# the RPN should be surer of what is an object; the sum of the losses says less at first, since with
# better proposals the box head gets more to do:

# %%
for name, model in models.items():
    moved = [
        not torch.equal(before, now)
        for before, now in zip(start[name], model.backbone.parameters(), strict=True)
        if now.requires_grad
    ]
    assert all(moved), name
    first, last = history[name][0], history[name][-1]
    assert last["loss_objectness"] < first["loss_objectness"], name
print("all trainable backbone parameters moved, and both objectness losses fell")

# %% [markdown]
# The two side by side:

# %%
from tutorial_lib.visualization import plot_history

curves = [
    {name: [row[key] for row in rows] for name, rows in history.items()}
    for key in ("loss", "AP50")
]
plot_history(curves, ["training loss", "AP50 on validation"])
plt.show()

# %% [markdown]
# ## Parameters, speed and AP
#
# Inference is timed on the test images, in float32, after a first batch that is not counted. A
# GPU works on while Python goes ahead, so the clock waits for it:


# %%
@torch.inference_mode()
def images_per_second(model, loader):
    model.eval()
    batches = [[image.to(device) for image in images] for images, _ in loader]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    model(batches[0])
    wait()
    begun = time.perf_counter()
    for images in batches:
        model(images)
    wait()
    return sum(len(images) for images in batches) / (time.perf_counter() - begun)


# %% [markdown]
# Parameters, speed and AP on the test images in one table:

# %% tags=["nbval-ignore-output"]
results = {
    name: evaluate(model, test_loader, device).box for name, model in models.items()
}
print(
    f"{'':12} {'parameters':>11} {'train img/s':>12} {'test img/s':>11} {'AP':>6} {'AP50':>6}"
)
for name, model in models.items():
    size = sum(p.numel() for p in model.parameters()) / 1e6
    trained = EPOCHS * len(train_loader) * preset.batch_size / train_seconds[name]
    box = results[name]
    speed = images_per_second(model, test_loader)
    print(
        f"{name:12} {size:9.1f} M {trained:12.1f} {speed:11.1f} {box.AP or 0:6.3f} {box.AP50 or 0:6.3f}"
    )

# %% [markdown]
# Most parameters of the swap are not in MobileNetV2, which has 2.2 M, but in the box head on top:
# its first layer takes 1280 × 7 × 7 values to 1024. An FPN brings the channels down first (to 256
# in torchvision, to 96 in the small model), which is one of its merits. The other is
# resolution: one place for 32 × 32 pixels is coarse for people who are two or three places wide, as at `quick`.

# %%
head = models["MobileNetV2"].roi_heads.box_head
assert head.fc6.weight.shape == (1024, 1280 * 7 * 7)
in_head = sum(p.numel() for p in head.parameters())
assert in_head > 0.7 * sum(p.numel() for p in models["MobileNetV2"].parameters())
print(f"{in_head / 1e6:.1f} M parameters in the box head")

# %% [markdown]
# ## Look at both
#
# Detections with a score of at least 0.3, on test images. At `quick` and `laptop`, short training
# from random weights shows: compare with the pictures of notebook 02, where the detector had been trained
# before. At `quick`, two passes over 40 images are too few to find anyone: expect an AP near 0 there, and
# pictures with little in them.

# %%
from tutorial_lib.engine import predict

images, _ = zip(*(test_set[i] for i in range(3)), strict=True)
detections = [
    p for model in models.values() for p in predict(model, images, device, 0.3)
]
titles = [name for name in models for _ in range(3)]
show([*images, *images], detections, titles)
plt.show()

# %% [markdown]
# ## Recap
#
# - **Cut** a classification network before its pooling, and tell it its `out_channels`.
# - **Give** each feature map a tuple of sizes and one of ratios; one map, one tuple in a tuple.
# - **Name** feature maps by strings, as the backbone's dictionary does.
# - **Train** what you swapped in, with the backbone, and check that it moved.
# - **Compare** at the same budget, and say what the trunks started from.

# %% [markdown]
# ## On your own
#
# 1. Put another trunk in its place: `mobilenet_v3_large`. Which numbers of `mobilenet_v2_detector` change?
#    <details><summary>Hint</summary>Send a picture through <code>mobilenet_v3_large().features</code>, and read off the channels and the stride.</details>
# 2. Give the anchors the shapes of standing people: three ratios from 1 to 3. What else of the detector changes, and what does AP say?
#    <details><summary>Hint</summary><code>aspect_ratios=((1.0, 2.0, 3.0),)</code>. Compare <code>num_anchors_per_location()</code> before and after; then train again with the same seed.</details>
# 3. Freeze the trunk, and train only what stands on it. Why does the check for moved parameters still pass, and how do you fix it?
#    <details><summary>Hint</summary><code>model.backbone.requires_grad_(False)</code> before the optimizer is made. <code>all([])</code> is <code>True</code>.</details>

# %% [markdown]
# ## In practice
#
# - Speed has to be measured where you will run: fewer parameters are not always faster.
# - AP after a short training from random weights compares how fast two detectors *start*. With
#   pre-trained trunks and a full training the order can change.
# - A feature pyramid on this trunk, anchors fitted to your boxes, frozen layers and the image size are measured in
#   notebook [09](09_anchors_and_backbones.ipynb).
#
# ## Further reading
#
# - [MobileNetV2](https://arxiv.org/abs/1801.04381).
# - [torchvision's `FasterRCNN`](https://docs.pytorch.org/vision/stable/models/faster_rcnn.html), whose
#   source documents every argument.
# - [Rethinking ImageNet pre-training](https://arxiv.org/abs/1811.08883): what training from random weights takes.
#
# **Next:** [04, the full run of Mask R-CNN](04_penn_fudan_mask_rcnn.ipynb).
