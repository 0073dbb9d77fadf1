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
# You take a detector that was trained on other pictures, replace its last layer, and train it on 100
# photographs of pedestrians.
#
# ## What you'll do
#
# - look at what a pre-trained detector sees, and measure it;
# - replace its predictor with one for your classes;
# - take one training step by hand, then write the schedule and the loop;
# - compare before and after, and look at a case where it still fails.
#
# **You need** notebook [01](01_dataset.ipynb), or a dataset that gives what it builds.
#
# | preset | download | time |
# |---|---|---|
# | `quick` | none | @QUICK@ on one CPU core |
# | `laptop` | photographs, 51 MB | @LAPTOP@ on one CPU core |
# | `full` | photographs, and weights of 160 MB | made for a GPU (not measured yet) |

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
# The next cell turns the preset into plain constants and downloads what is missing. `full` takes
# torchvision's Faster R-CNN with a ResNet-50. `quick` and `laptop` take a small model with the same
# parts, which a CPU can train in minutes. `quick` has synthetic images instead of the photographs.
#
# The model resizes each image so that its shorter side is `MIN_SIZE`. Of several sizes, each training
# image gets a random one, and evaluation uses the last.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset, fetch_weights, prepare_data, provenance

preset = choose_preset()
MODEL, WEIGHTS = preset.faster_rcnn, preset.weights
MIN_SIZE, MAX_SIZE = preset.min_size, preset.max_size
EPOCHS, BATCH_SIZE, LEARNING_RATE = preset.epochs, preset.batch_size, preset.learning_rate
SPLIT, SEED = preset.split, 0

device, root = pick_device(), prepare_data(preset)
fetch_weights(MODEL, WEIGHTS)
print(provenance(preset, device))
print(f"{MODEL = }\n{WEIGHTS = }\n{MIN_SIZE = }\n{MAX_SIZE = }\n{EPOCHS = }")
print(f"{BATCH_SIZE = }\n{LEARNING_RATE = }\n{SPLIT = }\n{SEED = }")

# %% [markdown]
# ## The parts of a Faster R-CNN
#
# Faster R-CNN ([Ren et al. 2015](https://arxiv.org/abs/1506.01497)) finds objects in two stages. The
# names are torchvision's:
#
# ![Faster R-CNN: images go through transform, as one batch, to the backbone. Its feature maps go to the rpn, which gives proposals, and to roi_heads. There box_roi_pool, box_head and box_predictor make boxes, labels and scores.](images/faster_rcnn.svg)
#
# 1. `transform` resizes and normalises the images, and pads them to one batch.
# 2. `backbone` computes feature maps. It is a classification network without its classifier (the
#    trunk), with a feature pyramid (FPN) that gives maps of several scales.
# 3. `rpn`, the region proposal network, is the first stage. It scores boxes of fixed sizes, the *anchors*, at
#    every location: is there an object or not? It moves them, and the best become *proposals*.
# 4. `roi_heads` is the second stage. It cuts out the features under each proposal. For each
#    class, its `box_predictor` gives a score and a corrected box.
#
# Only `box_predictor` depends on the classes, so only this part has to be replaced. Mask R-CNN
# ([He et al. 2017](https://arxiv.org/abs/1703.06870)) adds a branch for masks. Notebook
# [04](04_penn_fudan_mask_rcnn.ipynb) trains one, and [08](08_inside_mask_rcnn.ipynb) looks inside.

# %% [markdown]
# ## What a pre-trained detector sees
#
# torchvision's detectors come with weights trained on [COCO](https://cocodataset.org), 118,000
# photographs with 80 kinds of things. The classic lines are
#
# ```python
# from torchvision.models.detection import fasterrcnn_resnet50_fpn
# model = fasterrcnn_resnet50_fpn(weights="DEFAULT")
# ```
#
# Older texts write `pretrained=True`. torchvision still accepts it, warns that it is deprecated, and loads
# `COCO_V1`, which is also today's `"DEFAULT"`. Below, `get_model` builds a model from its name:

# %%
from torchvision.models import get_model, get_model_weights

weights = get_model_weights(MODEL)[WEIGHTS]
categories = weights.meta["categories"]
model = get_model(MODEL, weights=weights, min_size=MIN_SIZE, max_size=MAX_SIZE).to(device)
print(categories[:2])
assert categories.index("person") == 1

# %% [markdown]
# In our dataset, too, people have the label 1. So we can ask this model for people before any training.
# The data are split as in notebook 01. Only the training images get random flips and colours.

# %%
from torch.utils.data import DataLoader

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

train_set, _, _ = split_dataset(PennFudanDataset(root, get_transform(train=True)), SPLIT, SEED)
_, val_set, test_set = split_dataset(PennFudanDataset(root, get_transform(train=False)), SPLIT, SEED)

train_loader = DataLoader(train_set, BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=collate_fn)
val_loader = DataLoader(val_set, BATCH_SIZE, collate_fn=collate_fn)
test_loader = DataLoader(test_set, BATCH_SIZE, collate_fn=collate_fn)

# %% [markdown]
# These are three validation images, with all detections that score at least 0.5:

# %%
import matplotlib.pyplot as plt

from tutorial_lib.engine import predict
from tutorial_lib.visualization import show

pictures = [val_set[i][0] for i in range(3)]
before = predict(model, pictures, device, score_threshold=0.5)
show(pictures, before, categories=categories)
plt.show()

# %% [markdown]
# ## How good is that? IoU, precision, recall and AP
#
# A detection need not fit exactly. **IoU**, *intersection over union*, says how well two boxes fit: the area that
# they share, divided by the area that they cover together.

# %%
import torch
from torchvision.ops import box_iou

person = torch.tensor([[10.0, 10.0, 50.0, 90.0]])  # 40 × 80 pixels
detection = torch.tensor([[20.0, 10.0, 60.0, 90.0]])  # the same size, 10 pixels further right
shared = 30 * 80
covered = 40 * 80 + 40 * 80 - shared
print(f"IoU = {shared} / {covered} = {shared / covered}")
assert torch.isclose(box_iou(person, detection), torch.tensor(shared / covered))

show([torch.ones(3, 100, 70)], [{"boxes": torch.cat([person, detection])}], cell=(2, 2.6))
plt.show()

# %% [markdown]
# A detection is right if its IoU with a person is at least a threshold, say 0.5. Each person counts
# once, for the detection with the best score. Then
#
# - **precision** is the share of detections that are right;
# - **recall** is the share of people that are detected.
#
# Both change with the score from which on you accept detections. A lower score raises recall, and mostly
# lowers precision. **AP**, *average precision*, is the area under the curve of precision over recall. It is
# between 0 and 1.
#
# COCO's AP is a mean over ten IoU thresholds, 0.50, 0.55 … 0.95, and over all classes that have objects in
# these images. The model also detects cars, say. Those boxes do not lower AP, because our targets hold only
# people. AP50 and AP75 use one threshold. A small object has an area below 32² pixels, a large one over
# 96². AR is the highest recall, averaged over the thresholds. At most 100 detections count for each image
# and class. Notebook [06](06_evaluating_detections.ipynb) computes all of this by hand.
#
# ## Measure before you train
#
# We call this row *zero-shot*: the model knows the class, but has seen none of our images.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import evaluate


def print_table(rows):
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR")
    print(f"{'':22}" + "".join(f"{name:>10}" for name in names))
    for row, metrics in rows.items():
        values = [getattr(metrics, name) for name in names]
        print(f"{row:22}" + "".join(f"{'-':>10}" if v is None else f"{v:10.3f}" for v in values))


zero_shot = evaluate(model, val_loader, device).box
print_table({"zero-shot, validation": zero_shot})

# %% [markdown]
# (A dash means that there are no such objects.)
#
# ## Replace the predictor
#
# `box_predictor` has two linear layers with the same input. `cls_score` gives a score for each class
# that the model was trained on, and `bbox_pred` four corrections of the box for each:

# %% tags=["nbval-ignore-output"]
print(model.roi_heads.box_predictor)

# %% [markdown]
# We have two classes: background, always number 0, and person. The new predictor has the same input and two
# outputs. (`replace_box_predictor` in `tutorial_lib/models.py` does the same.)

# %%
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

old_parameters = dict(model.named_parameters())
torch.manual_seed(SEED)
num_classes = 2  # background and person
in_features = model.roi_heads.box_predictor.cls_score.in_features
model.roi_heads.box_predictor = FastRCNNPredictor(in_features, num_classes).to(device)

# %% [markdown]
# Which parameters are new? Those that are not the same object as before:

# %%
new = [name for name, p in model.named_parameters() if p is not old_parameters.get(name)]
print("new:", *new, sep="\n  ")
assert all(name.startswith("roi_heads.box_predictor.") for name in new)

# %% [markdown]
# Four tensors are new and random. All others are kept, and with them what the model knows about
# pictures. That is why 100 photographs are enough.
#
# ## One step by hand
#
# In **training** mode the model wants targets and returns losses. In **evaluation** mode it wants only images
# and returns detections. We try both on a copy, so the model itself stays as it is.

# %%
import copy

images, targets = next(iter(train_loader))
images = [image.to(device) for image in images]
targets = [{k: v.to(device) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]

trial = copy.deepcopy(model)
losses = trial.train()(images, targets)
print("training:  ", sorted(losses))
with torch.inference_mode():
    detections = trial.eval()(images)
print("evaluation:", sorted(detections[0]))

# %% [markdown]
# Each stage has two losses:
#
# | loss | asks |
# |---|---|
# | `loss_objectness` | does the RPN tell anchors with an object from those without? |
# | `loss_rpn_box_reg` | does it move those anchors onto the object? |
# | `loss_classifier` | does `box_predictor` give proposals the right class? |
# | `loss_box_reg` | does it correct their boxes? |
#
# (Mask R-CNN has a fifth, `loss_mask`.) Training minimises their sum. A step is the same as for any classifier:

# %% tags=["nbval-ignore-output"]
optimizer = torch.optim.AdamW([p for p in trial.parameters() if p.requires_grad], lr=LEARNING_RATE)

losses = trial.train()(images, targets)
loss = sum(losses.values())
optimizer.zero_grad()
loss.backward()
optimizer.step()
print(f"loss {loss.item():.3f} =", " + ".join(f"{v.item():.3f}" for v in losses.values()))

# %% [markdown]
# `requires_grad` matters. torchvision freezes the first two of a pre-trained ResNet-50's five stages, and a
# frozen layer has nothing to learn.
#
# ## A learning rate that rises and falls
#
# The new layers are random, so their first gradients are large and would shake the trained layers. The learning
# rate therefore rises during the first epoch, the *warm-up*. Then it falls to zero along a
# [cosine](https://arxiv.org/abs/1608.03983), so that the last steps are small.

# %% tags=["copy-me"]
# tutorial_lib/engine.py
import math

import torch
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return LambdaLR(optimizer, factor)


# %%
torch.manual_seed(SEED)
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
steps = len(train_loader)
schedule = warmup_cosine(optimizer, warmup_steps=steps, total_steps=EPOCHS * steps)

factor = schedule.lr_lambdas[0]
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.plot([i / steps for i in range(EPOCHS * steps)], [LEARNING_RATE * factor(i) for i in range(EPOCHS * steps)])
axes.set(xlabel="epoch", ylabel="learning rate", ylim=0)
plt.show()

# %% [markdown]
# The classic text has SGD with a rate of 0.005 and batches of 2. @OPT@
#
# ## The loop
#
# `train_one_epoch` takes the step above for each batch, and moves the schedule on. It stops when the loss
# is no longer finite, because one such step spoils every weight.

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


def to_device(images: Iterable[Tensor], targets: Iterable[dict], device: torch.device) -> tuple[list, list]:
    to = partial(Tensor.to, device=device, non_blocking=device.type == "cuda")  # MPS would copy from freed memory
    images = [to(image) for image in images]
    targets = [{k: to(v) if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets]
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
    for images, targets in tqdm(data_loader, file=sys.stdout, leave=False, disable=not progress):
        images, targets = to_device(images, targets, device)
        losses = model(images, targets)
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
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
        raise ValueError("data_loader gives no batches: it is empty, or drop_last leaves nothing of it")
    means = torch.stack(history).mean(dim=0).tolist()
    return dict(zip(["loss", *losses], means, strict=True))


# %% [markdown]
# After every epoch we look at the validation images. The test images wait until the end.

# %% tags=["nbval-ignore-output"]
history = []
for epoch in range(1, EPOCHS + 1):
    losses = train_one_epoch(model, optimizer, train_loader, device, lr_scheduler=schedule)
    finetuned = evaluate(model, val_loader, device).box
    history.append({**losses, "AP": finetuned.AP, "AP50": finetuned.AP50})
    print(f"epoch {epoch}/{EPOCHS}  loss {losses['loss']:.3f}  validation AP {finetuned.AP:.3f}")

# %%
from tutorial_lib.visualization import plot_history

curves = {name: [row[name] for row in history] for name in history[0]}
of_loss = {name: values for name, values in curves.items() if name.startswith("loss")}
plot_history([of_loss, {name: curves[name] for name in ("AP", "AP50")}], ["loss", "on validation"])
plt.show()
assert curves["loss"][-1] < curves["loss"][0]

# %% [markdown]
# ## Before and after
#
# The three pictures from above, before training (upper row) and after (lower row):

# %%
after = predict(model, pictures, device, score_threshold=0.5)
show(pictures * 2, before + after, titles=["before"] * 3 + ["after"] * 3)
plt.show()

# %% [markdown]
# And in numbers, with the test images for the first and only time:

# %% tags=["nbval-ignore-output"]
test = evaluate(model, test_loader, device).box
rows = {"zero-shot, validation": zero_shot, "finetuned, validation": finetuned, "finetuned, test": test}
print_table(rows)

# %% tags=["results", "nbval-ignore-output"]
{"box_AP": round(test.AP, 4)}

# %% [markdown]
# The curve behind AP50 shows what training changed. The area under each curve is its AP50:

# %%
from tutorial_lib.coco_eval import RECALLS

figure, axes = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
for name, metrics in rows.items():
    person_class = list(metrics.per_class).index(1)
    axes.plot(RECALLS, metrics.precision[0, :, person_class], label=name)
axes.set(xlabel="recall", ylabel="precision at IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Why validation and test differ
#
# A small part of a dataset is easier or harder than another by chance. Count the people by size:

# %%
for name, part in (("validation", val_set), ("test", test_set)):
    area = torch.cat([target["area"] for _, target in part])
    small, large = int((area < 32**2).sum()), int((area > 96**2).sum())
    print(f"{name:10} {len(part):3} images, {len(area):3} people: {small} small, {large} large")

# %% [markdown]
# @DIFFER@
#
# ## Where it fails
#
# This is the test image with the most *missed* people: no detection that scores at least 0.5 has an
# IoU of 0.5 with them. Their boxes are on the left, all detections on the right.

# %%
samples = [test_set[i] for i in range(len(test_set))]
detected = [predict(model, [image], device, score_threshold=0.5)[0] for image, _ in samples]
missed = []
for (_, target), found in zip(samples, detected, strict=True):
    missed.append((box_iou(target["boxes"], found["boxes"]) < 0.5).all(dim=1))

worst = max(range(len(missed)), key=lambda i: missed[i].sum())
image, target = samples[worst]
targets = [{"boxes": target["boxes"][missed[worst]]}, detected[worst]]
show([image, image], targets, ["missed", "detections"], columns=2, cell=(5.5, 4))
plt.show()

# %% [markdown]
# ## Recap
#
# - **Measure** the model before you train it; that costs one pass over the validation images.
# - **Replace** `roi_heads.box_predictor` with one for your classes, background included.
# - **Raise** the learning rate slowly, then let it fall.
# - **Sum** the losses, step, and stop if the sum is not finite.
# - **Look** at the validation images during training, and at the test images once.

# %% [markdown]
# ## On your own
#
# 1. Train only the new predictor. What does AP lose, and how much faster is an epoch?
#    <details><summary>Hint</summary>Freeze everything else before you build the optimizer.</details>
#    <details><summary>Solution</summary><code>model.requires_grad_(False)</code>, then
#    <code>model.roi_heads.box_predictor.requires_grad_(True)</code>.</details>
# 2. Keep "person" instead of starting at random: copy the old layers' rows of classes 0 and 1 into the new
#    layers. Is AP good before any training?
#    <details><summary>Hint</summary><code>bbox_pred</code> has four rows for each class, so these are rows 0 to 7.</details>
#    <details><summary>Solution</summary>For each of <code>cls_score.weight</code> and <code>.bias</code>
#    <code>new.data.copy_(old[:2])</code>, and for those of <code>bbox_pred</code> <code>old[:8]</code>. The old
#    ones are in <code>old_parameters</code>.</details>
# 3. Train with three seeds on the same split. How far apart are the APs?
#    <details><summary>Hint</summary>Change the seed of the predictor and of the training, and not that of the split.</details>

# %% [markdown]
# ## In practice
#
# - `num_classes` counts the background. With ten kinds of things it is 11, and their labels are 1 to
#   10. This model takes a label of 0 for background, in silence. A label that is too large raises
#   `IndexError: Target 11 is out of bounds` on the CPU, and a device-side assert on CUDA.
# - Build the optimizer *after* you replace the predictor, or it trains the old one.
# - A new predictor forgets your class. If "person" is all you need, the zero-shot model may do.
# @NOISE@
# @WEIGHTS@
#
# ## Further reading
#
# - [Feature Pyramid Networks](https://arxiv.org/abs/1612.03144), the FPN of these models.
# - [torchvision's detection models](https://docs.pytorch.org/vision/stable/models.html#object-detection-instance-segmentation-and-person-keypoint-detection).
# - [COCO's metrics](https://cocodataset.org/#detection-eval).
#
# **Next:** [03, swap the backbone](03_swapping_the_backbone.ipynb).
