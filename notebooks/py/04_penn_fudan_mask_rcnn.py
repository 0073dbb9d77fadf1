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
# # Train Mask R-CNN on PennFudan, from zero-shot to a saved model
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/torchvision-detection-tutorial/blob/main/notebooks/04_penn_fudan_mask_rcnn.ipynb)
#
# You run the whole job once, as you would for a result that you report: instance masks of
# pedestrians, the best epoch chosen on validation images, one look at the test images.

# %% [markdown]
# ## What you'll do
#
# - replace both predictors of a Mask R-CNN, for boxes and for masks;
# - train with a warm-up, a schedule and, where the device is faster in it, mixed precision;
# - watch loss and AP on validation images, and keep the best epoch;
# - put your numbers beside the zero-shot row and the published ones;
# - save the model, load it again, and try it on a picture of your own.
#
# **You need** notebooks [01](01_dataset.ipynb) and [02](02_finetuning_a_predictor.ipynb).
#
# | preset | model | epochs | time |
# |---|---|---|---|
# | `quick` | `maskrcnn_mini_fpn`, 2.5 M parameters, 192 pixels | 10 | 2.6 min on one CPU core |
# | `laptop` | the same, 208 to 320 pixels | 24 | 26 min on one CPU core |
# | `full` | `maskrcnn_resnet50_fpn`, 44.4 M parameters, 800 pixels | 10 | a GPU; without one, smaller images and fewer epochs (not measured yet) |

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
# The preset, as in notebook 01; the weights are fetched now, before anything is trained.

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
EPOCHS = preset.long_epochs
device = pick_device()
root = prepare_data(preset)
fetch_weights(preset.mask_rcnn, preset.weights)
print(provenance(preset, device))

# %% [markdown]
# ## Data
#
# As in notebook 01: a split by seed, random flips and colours for the training images only. Without more, every
# file would be decoded anew in every epoch; `in_memory=True` keeps what was decoded, about 1 MB for each photograph.

# %%
from torch.utils.data import DataLoader

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

augmented = PennFudanDataset(root, get_transform(train=True), in_memory=True)
plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
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
# ## The model, before training
#
# At `full` the next line is `torchvision.models.detection.maskrcnn_resnet50_fpn(weights="DEFAULT")`.
# As in notebook 02, it knows "person" as number 1, so it can be asked before it is trained. Where the preset has several
# `min_size`, each training image gets a random one of them, and a person is seen at several scales; in evaluation it is the last:

# %% tags=["nbval-ignore-output"]
from torchvision.models import get_model

from tutorial_lib.engine import evaluate

sizes = {"min_size": preset.min_size, "max_size": preset.max_size}
pretrained = get_model(preset.mask_rcnn, weights=preset.weights, **sizes).to(device)
zero_shot = evaluate(pretrained, test_loader, device)
print(zero_shot)

# %% [markdown]
# ## Two predictors to replace
#
# The box predictor goes as in notebook 02. The mask predictor has a transposed convolution
# that doubles 14 × 14 to 28 × 28, and a 1 × 1 convolution with one output *for each class*.
# Forget to replace it, and no error is raised: your class 1 starts from the masks of the old class 1. Here that happens to
# be "person"; with your classes it will not be. Many texts put a
# new `MaskRCNNPredictor` in its place. But only its last layer depends on the number of classes,
# and the transposed convolution can keep what it knows of outlines:

# %% tags=["copy-me"]
# tutorial_lib/models.py
from torch import nn
from torchvision.models.detection import MaskRCNN


def replace_mask_predictor(model: MaskRCNN, num_classes: int) -> MaskRCNN:
    old = model.roi_heads.mask_predictor.mask_fcn_logits
    new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1)
    model.roi_heads.mask_predictor.mask_fcn_logits = new.to(old.weight)
    return model


# %% [markdown]
# The whole model comes from one function, because we build it four times: to train it, and three times to load
# what was saved. (The library's `replace_predictors` replaces both predictors in one call.) Loading into a model that was
# built another way can go wrong unseen: torchvision sets some constants,
# such as BatchNorm's `eps`, by the weights that you ask for, and a state dict does not hold them.

# %%
from tutorial_lib.models import replace_box_predictor


def build_model():
    model = get_model(preset.mask_rcnn, weights=preset.weights, **sizes)
    return replace_mask_predictor(replace_box_predictor(model, 2), 2).to(device)


torch.manual_seed(SEED)
model = build_model()
old = dict(pretrained.named_parameters())
new = [n for n, p in model.named_parameters() if not torch.equal(p, old[n])]
print("new:", *new, sep="\n  ")
assert model.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 2

# %% [markdown]
# ## Mixed precision, where it does no harm
#
# CUDA GPUs since Ampere multiply faster in bfloat16 than in float32, and so do some CPUs (those with
# AVX-512 BF16 or AMX). Autocast over the *whole* model would round its boxes as well. A
# number in bfloat16 has 8 significant bits:

# %%
print(torch.tensor([333.0, 701.0, 755.0]).to(torch.bfloat16).tolist())

# %% [markdown]
# So the library's `use_bfloat16` puts the backbone and the heads, where nearly all of the arithmetic is, under
# autocast, takes float32 from each of them, and leaves anchors, boxes and losses in float32. On a device that is not faster in
# bfloat16 it does nothing:

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import use_bfloat16

mixed = use_bfloat16(model, device)
print("bfloat16" if mixed else "float32")
assert model.roi_heads.box_predictor.cls_score.weight.dtype == torch.float32

# %% [markdown]
# ## A learning rate that rises and falls
#
# The new layers are random, and their first gradients would shake the trained ones. So the learning
# rate rises linearly during the first epoch, and then falls to zero along a half cosine:

# %% tags=["copy-me"]
# tutorial_lib/engine.py
import math

import torch
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return LambdaLR(optimizer, factor)


# %%
import matplotlib.pyplot as plt

steps = len(train_loader)
demo = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=preset.learning_rate)
demo_schedule = warmup_cosine(demo, warmup_steps=steps, total_steps=EPOCHS * steps)
rates = []
for _ in range(EPOCHS * steps):
    rates.append(demo.param_groups[0]["lr"])
    demo.step()
    demo_schedule.step()
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.plot([i / steps for i in range(len(rates))], rates)
axes.set(xlabel="epoch", ylabel="learning rate", ylim=0)
plt.show()
assert max(rates) <= preset.learning_rate and rates[0] < rates[steps - 1] > rates[-1]

# %% [markdown]
# ## A validation loss
#
# The models give losses only in training mode. To have one for the validation images, without
# training on them, the library's `validation_loss` uses that mode with gradients off and
# BatchNorm as in evaluation, so that nothing in the model changes. It is a mean over images. (Where `min_size` has several
# values, each image gets a random one here too, the same at every call. AP is of the last one.)

# %%
from tutorial_lib.engine import validation_loss

state_before = {k: v.clone() for k, v in model.state_dict().items()}
first = validation_loss(model, val_loader, device)
assert math.isclose(first, validation_loss(model, val_loader, device), rel_tol=1e-3)
assert all(torch.equal(v, state_before[k]) for k, v in model.state_dict().items())

# %% [markdown]
# ## Train, and keep the best epoch
#
# `best.pt` is written whenever the **validation** mask AP is the best so far, `last.pt` after every epoch, with
# all that is needed to go on. Each goes to a temporary name first and is moved when it is whole, so
# that a run that is interrupted leaves the last good one.

# %%
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp())  # in real work, a folder that you keep
torch.manual_seed(SEED)
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=preset.learning_rate, weight_decay=0.01)
schedule = warmup_cosine(optimizer, warmup_steps=steps, total_steps=EPOCHS * steps)

# %% tags=["nbval-ignore-output"]
import time

from tutorial_lib.checkpoint import save_checkpoint
from tutorial_lib.engine import predict, train_one_epoch

history, best_epoch, begun = [], 0, time.perf_counter()
for epoch in range(1, EPOCHS + 1):
    losses = train_one_epoch(
        model, optimizer, train_loader, device, lr_scheduler=schedule
    )
    val_loss = validation_loss(model, val_loader, device)
    val = evaluate(model, val_loader, device)
    history.append(
        {
            **losses,
            "val_loss": val_loss,
            "box": val.box.AP,
            "mask": val.mask.AP,
        }
    )
    if not best_epoch or val.mask.AP > history[best_epoch - 1]["mask"]:
        best_epoch = epoch
        save_checkpoint(
            folder / "best.pt", model=model, epoch=epoch, preset=preset.name
        )
        at_best = predict(
            model, [val_set[0][0]], device
        )  # to compare with what is loaded
    save_checkpoint(
        folder / "last.pt",
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        epoch=epoch,
        history=history,
        best_epoch=best_epoch,
    )
    print(
        f"epoch {epoch:2}/{EPOCHS}  loss {losses['loss']:.3f}  validation: loss {val_loss:.3f}"
        f"  box AP {val.box.AP:.3f}  mask AP {val.mask.AP:.3f}{'  best' if best_epoch == epoch else ''}"
    )
print(f"{(time.perf_counter() - begun) / 60:.1f} minutes; best epoch {best_epoch}")

# %%
from tutorial_lib.visualization import plot_history

curves = {key: [row[key] for row in history] for key in history[0]}
plot_history(
    [
        {"training": curves["loss"], "validation": curves["val_loss"]},
        {"box": curves["box"], "mask": curves["mask"]},
    ],
    ["loss", "AP on validation"],
    best=best_epoch,
)
plt.show()
assert curves["loss"][-1] < curves["loss"][0]

# %% [markdown]
# If the training loss goes on falling while the validation loss turns upwards, the model has begun to learn the
# training images by heart. AP and validation loss need not turn at the same epoch: AP asks
# whether a box fits and is ranked well, the loss how sure the model is.
#
# ## The test images, once
#
# The best epoch is loaded into a *new* model. It was chosen without the test images, so their
# AP is an honest estimate:

# %% tags=["nbval-ignore-output"]
from tutorial_lib.checkpoint import load_checkpoint

checkpoint = load_checkpoint(folder / "best.pt")
best = build_model()
use_bfloat16(best, device)
best.load_state_dict(checkpoint["model"])
finetuned = evaluate(best, test_loader, device)
print(finetuned)

# %% [markdown]
# Beside them, what torchvision's own tutorial shows on Colab for `maskrcnn_resnet50_fpn` with COCO weights, 10
# epochs of batch 2, SGD at 0.005, 120 photographs to train and 50 to test. At `full` on a GPU the model and the number of epochs are the same.
# What differs: optimizer and schedule, colour augmentation, bfloat16, the mask predictor (only its last layer is new here), 20
# photographs fewer to train on, and an epoch chosen on validation images, where they look at the test images while training.

# %% tags=["nbval-ignore-output"]
rows = [
    ("zero-shot, this run", zero_shot.box.AP, zero_shot.mask.AP),
    ("finetuned, this run", finetuned.box.AP, finetuned.mask.AP),
    ("torchvision's tutorial on Colab", 0.833, 0.767),
]
print(f"{'':44}{'box AP':>8}{'mask AP':>9}")
for name, box_ap, mask_ap in rows:
    print(f"{name:44}{box_ap or 0:8.3f}{mask_ap or 0:9.3f}")
print(provenance(preset, device))

# %% [markdown]
# How far would these numbers move on other test images? A bootstrap over the images says it (notebook
# [06](06_evaluating_detections.ipynb)):

# %% tags=["nbval-ignore-output"]
from tutorial_lib.coco_eval import bootstrap_interval

for kind in ("box", "mask"):
    low, high = bootstrap_interval(getattr(finetuned, kind))
    print(f"{kind} AP, 95 % of the resamples: {low:.3f} to {high:.3f}")

# %% [markdown]
# At `laptop`, finetuning turns boxes that are roughly right, and masks that are hardly usable, into a detector of photographs,
# which the starter weights had never seen. The synthetic images of
# `quick` are new to them as well: fog leaves an eighth of the contrast.

# %%
if preset.name != "full":  # COCO's weights know photographs of people
    assert finetuned.box.AP > zero_shot.box.AP + 0.08
    assert finetuned.mask.AP > zero_shot.mask.AP + 0.08
    assert finetuned.box.AP50 > 0.4

# %% [markdown]
# The [tutorial on Colab](https://colab.research.google.com/github/pytorch/vision/blob/temp-tutorial/tutorials/torchvision_finetuning_instance_segmentation.ipynb)
# is where the third row can be seen. A run at `laptop` is no rival to them: its model has an
# eighteenth of the parameters, sees two fifths of the pixels in each direction, and has not seen
# COCO. A run at `quick` is on synthetic images and cannot be compared at all.
#
# ## Look at the masks
#
# Test images with the detections that score at least 0.5:

# %%
from tutorial_lib.visualization import show

images, targets = zip(*(test_set[i] for i in range(6)), strict=True)
predictions = predict(best, images, device, score_threshold=0.5)
show(images, predictions)
plt.show()

# %% [markdown]
# The threshold is yours to choose: a low one gives more detections of people, and more false positives. The same
# image at three thresholds:

# %%
thresholds = (0.1, 0.5, 0.9)
at_each = [predict(best, images[:1], device, t)[0] for t in thresholds]
show([images[0]] * 3, at_each, [f"score at least {t}" for t in thresholds])
plt.show()
counts = [len(prediction["scores"]) for prediction in at_each]
assert counts == sorted(counts, reverse=True)

# %% [markdown]
# And where it fails. Of every person, take the detection whose mask overlaps best, and show the test image
# in which these overlaps are lowest on average. Mask AP is computed from the same IoU.


# %%
def mean_mask_iou(target, prediction):
    masks, found = (
        target["masks"].flatten(1).float(),
        prediction["masks"].flatten(1) > 0.5,
    )
    if not len(found):
        return 0.0
    both = masks @ found.float().T
    either = masks.sum(1, keepdim=True) + found.sum(1) - both
    return (both / either).max(dim=1).values.mean().item()


samples = [test_set[i] for i in range(len(test_set))]
found = [predict(best, [image], device)[0] for image, _ in samples]
overlaps = [
    mean_mask_iou(target, p) for (_, target), p in zip(samples, found, strict=True)
]
worst = min(range(len(samples)), key=overlaps.__getitem__)
image, target = samples[worst]
show(
    [image, image],
    [target, found[worst]],
    ["target", "prediction"],
    columns=2,
    cell=(5.5, 4),
)
plt.show()

# %% [markdown]
# ## Saved, loaded, the same
#
# A checkpoint is only good if it gives the same detections again as the model did when it was
# written, which the training loop kept for one image. The file is read with
# `weights_only=True`, which keeps a stranger's file from running code.

# %%
again = build_model()
use_bfloat16(again, device)
again.load_state_dict(load_checkpoint(folder / "best.pt")["model"])
(loaded,) = predict(again, [val_set[0][0]], device)
for key in loaded:  # a GPU may differ in the last digits
    torch.testing.assert_close(at_best[0][key], loaded[key], rtol=0, atol=1e-3)
print(f"the same detections; checkpoint keys: {sorted(checkpoint)}")

# %% [markdown]
# ## Interrupted, and on again
#
# If the kernel dies in epoch 7: set `folder` to the folder of the dead run (so let it not be a temporary one), run the cells above
# the loop, then this one. Take `history` and `best_epoch` from what `resume` returns, and begin the loop at the epoch after. `last.pt`
# also holds the states of the random generators, so that on a CPU with the same number of threads the finished run is the same to the
# last bit as one that was never interrupted.

# %%
from tutorial_lib.checkpoint import resume

again = build_model()
use_bfloat16(again, device)
parameters = [p for p in again.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=preset.learning_rate)
schedule = warmup_cosine(optimizer, warmup_steps=steps, total_steps=EPOCHS * steps)
parts = {"model": again, "optimizer": optimizer, "lr_scheduler": schedule}
kept = resume(folder / "last.pt", **parts)
assert kept["epoch"] == EPOCHS and schedule.last_epoch == EPOCHS * steps
assert kept["history"] == history and kept["best_epoch"] == best_epoch

# %% [markdown]
# ## A picture of your own
#
# Put a photograph beside this notebook, write its name here, and run the cell. Until then it
# takes a test image.

# %%
from torchvision.transforms.v2.functional import to_dtype

from tutorial_lib.data import read_image

my_photo = Path("my_photo.jpg")
path = (
    my_photo
    if my_photo.exists()
    else root / "PNGImages" / plain.file_names[test_set.indices[0]]
)
picture = to_dtype(read_image(path, "RGB"), torch.float32, scale=True)
show([picture], predict(best, [picture], device), columns=1, cell=(6, 5))
plt.show()

# %% tags=["results", "nbval-ignore-output"]
{"box_AP": round(finetuned.box.AP, 4), "mask_AP": round(finetuned.mask.AP, 4)}

# %% [markdown]
# ## The same on several GPUs
#
# This notebook is one process, and a process uses one GPU. `tutorial_lib/train.py` is this run as a script, without the curves and
# `last.pt`. PyTorch's launcher starts as many processes of it as you say, at most one for each GPU, or for each core of a CPU:
#
# ```
# python -m torch.distributed.run --standalone --nproc-per-node 2 -m tutorial_lib.train --out runs/first
# ```
#
# Each process takes its own images, and the gradients are averaged. Two processes make half as many steps, each on twice the
# images (`--batch-size` changes that), so the numbers are not those of one process. Images of similar shape go into a batch together,
# which saves time (notebook [10](10_making_it_fast.ipynb)). `evaluate` gathers what the processes have compared, so that
# each image counts once, whatever their number.

# %% [markdown]
# ## Recap
#
# - **Replace** both predictors, and see which parameters are new.
# - **Warm up** the learning rate, then let it fall.
# - **Watch** the validation images, and **keep** the epoch that is best on them.
# - **Report** the test images once, beside the zero-shot row.
# - **Load** what you saved before you trust it.

# %% [markdown]
# ## On your own
#
# 1. Choose the epoch on the test images instead. How much higher is the number? That is the size of the mistake.
#    <details><summary>Hint</summary>Evaluate on <code>test_loader</code> in the loop, and compare its maximum with the row above.</details>
# 2. Train without the warm-up.
#    <details><summary>Hint</summary><code>warmup_steps=0</code>; look at the first epoch's loss.</details>
# 3. Let the model see larger images: double `min_size` and `max_size`. What do mask AP and the time of an epoch do?
#    <details><summary>Hint</summary><code>sizes = {"min_size": tuple(2 * s for s in preset.min_size), "max_size": 2 * preset.max_size}</code>, and build the model anew.</details>

# %% [markdown]
# ## In practice
#
# - This is one seed, and few test images. Notebook 06 measures the spread over seeds; a difference between two settings that is
#   smaller than that says nothing.
# - bfloat16 needs no loss scaling. GPUs before Ampere have only float16, which does need it
#   (`torch.amp.GradScaler`); on those the notebook runs in float32.
# - A mask is predicted as 28 × 28 and stretched to its box: in a box much larger than that, thin parts, like a stick, are missing
#   whatever the training.
# - PennFudan's terms: use it for your own work, do not repost it.
#
# ## Further reading
#
# - [Mask R-CNN](https://arxiv.org/abs/1703.06870).
# - [torchvision's reference scripts for detection](https://github.com/pytorch/vision/tree/main/references/detection).
# - [Automatic mixed precision in PyTorch](https://docs.pytorch.org/docs/stable/amp.html).
#
# **Next:** [06, evaluate detections](06_evaluating_detections.ipynb), to know what these numbers forgive.
