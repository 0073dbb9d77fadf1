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
# You take a detector that was trained on other pictures, replace its last layer, and train it on 100
# photographs of pedestrians.
#
# ## What you'll do
#
# - look at what a pre-trained detector sees, and measure it;
# - replace its predictor;
# - take one training step by hand, then write the loop;
# - compare before and after, and look at a failure.
#
# **You need** notebook [01](01_dataset.ipynb). On one CPU core it takes about 1 minute at `quick` and
# about 5 minutes at `laptop`, which downloads 51 MB of photographs. `full` also downloads 160 MB of weights, and is
# made for a GPU.

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
# `quick` and `laptop` take a small model with the same parts. `quick` has synthetic images, not photographs.
#
# The model resizes images to a shorter side of `MIN_SIZE` and a longer side of at most `MAX_SIZE`. If `MIN_SIZE` has
# several sizes, each training image gets a random one. Evaluation uses the last.

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
# ![Images go through transform, backbone, rpn and roi_heads, and come out as boxes, labels and scores.](images/faster_rcnn.svg)
#
# 1. `transform` resizes and normalises the images, and pads them to one size.
# 2. `backbone` computes feature maps at several scales. It consists of a classification network without
#    its classifier (the trunk) and a feature pyramid (FPN).
# 3. `rpn`, the region proposal network, is the first stage. It has boxes of fixed sizes, the *anchors*, at every
#    location. It scores and moves them, and the best become *proposals*.
# 4. `roi_heads` is the second stage. It cuts out the features under each proposal. Its `box_predictor`
#    gives a score and a corrected box for each class.
#
# Only `box_predictor` depends on the classes, so only it is replaced. Mask R-CNN
# ([He et al. 2017](https://arxiv.org/abs/1703.06870)) adds a branch for masks (notebooks
# [04](04_penn_fudan_mask_rcnn.ipynb) and [08](08_inside_mask_rcnn.ipynb)).

# %% [markdown]
# ## What a pre-trained detector sees
#
# torchvision's detectors come with weights trained on [COCO](https://cocodataset.org), 118,000
# photographs with 80 kinds of things. The usual lines are
#
# ```python
# from torchvision.models.detection import fasterrcnn_resnet50_fpn
# model = fasterrcnn_resnet50_fpn(weights="DEFAULT")
# ```
#
# Older texts write `pretrained=True`. torchvision still accepts it with a warning, and loads
# `COCO_V1`, which is also today's `"DEFAULT"`. Here `get_model` builds a model from its name:

# %%
from torchvision.models import get_model, get_model_weights

weights = get_model_weights(MODEL)[WEIGHTS]
categories = weights.meta["categories"]
model = get_model(MODEL, weights=weights, min_size=MIN_SIZE, max_size=MAX_SIZE).to(device)
print(categories[:2])
assert categories.index("person") == 1

# %% [markdown]
# Our dataset, too, gives people the label 1. So we can ask this model for people before any training. The data
# are split as in notebook 01, and the picture shows three validation images.

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

# %%
import matplotlib.pyplot as plt

from tutorial_lib.engine import predict
from tutorial_lib.visualization import show

pictures = [val_set[i][0] for i in range(3)]
before = predict(model, pictures, device, score_threshold=0.5)
show(pictures, before, categories=categories)
plt.show()

# %% [markdown]
# ## IoU, precision, recall and AP
#
# **IoU**, *intersection over union*, says how well two boxes fit. It is the area that they share, divided by the area
# that they cover together.

# %%
import torch
from torchvision.ops import box_iou

person = torch.tensor([[10.0, 10.0, 50.0, 90.0]])  # 40 × 80 pixels
detection = torch.tensor([[20.0, 10.0, 60.0, 90.0]])  # the same size, 10 pixels further right
shared = 30 * 80
covered = 40 * 80 + 40 * 80 - shared
print(f"IoU = {shared} / {covered} = {shared / covered}")
assert torch.isclose(box_iou(person, detection), torch.tensor(shared / covered))

both = {"boxes": torch.cat([person, detection])}
show([torch.ones(3, 100, 70)], [both], ["IoU 0.6"], cell=(2, 2.6))
plt.show()

# %% [markdown]
# A detection is right if its IoU with a person is at least a threshold, say 0.5. If several fit the same
# person, only the one with the highest score is right. Then
#
# - **precision** is the share of detections that are right;
# - **recall** is the share of people that are detected.
#
# Both depend on the lowest score that you accept. A lower one raises recall and mostly lowers
# precision. **AP**, *average precision*, is the area under the curve of precision over recall.
#
# COCO's AP is a mean over ten IoU thresholds: 0.50, 0.55 … 0.95. It is also a mean over the classes that have objects
# in these images. A box around a car does not lower it, because our targets hold only people. AP50 and AP75 use one
# threshold. Small objects have an area below 32² pixels, large ones over 96².
#
# AR is the highest recall, averaged over the thresholds. At most 100 detections count for each image and
# class.
#
# ## Measure before you train
#
# The row below is *zero-shot*: the model knows the class, but has seen none of our images.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import evaluate


def print_table(rows):
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR")
    print(f"{'':22}" + "".join(f"{name:>10}" for name in names))
    for row, metrics in rows.items():
        values = [getattr(metrics, name) for name in names]  # None where there are no such objects
        print(f"{row:22}" + "".join(f"{'none':>10}" if v is None else f"{v:10.3f}" for v in values))


zero_shot = evaluate(model, val_loader, device).box
print_table({"zero-shot, validation": zero_shot})

# %% [markdown]
# ## Replace the predictor
#
# `box_predictor` has two linear layers with the same input. For each class, `cls_score` gives a score, and
# `bbox_pred` four corrections of the box. We have two classes: background, always number 0, and person.
#
# `FastRCNNPredictor` has random weights. But the old layers can already place a box around most things. So let each
# new class start as the mean of the old classes. The background keeps its weights:

# %% tags=["copy-me"]
# tutorial_lib/models.py
import torch
from torch import nn


@torch.no_grad()
def start_from_mean(new: nn.Module, old: nn.Module, rows: int = 1) -> nn.Module:
    for value, before in zip(new.parameters(), old.parameters(), strict=True):
        background, *classes = before.split(rows)
        mean = torch.stack(classes).mean(dim=0)
        value.copy_(torch.cat([background, *[mean] * (len(value) // rows - 1)]))
    return new


# %% tags=["nbval-ignore-output"]
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

num_classes = 2  # background and person
old_parameters = dict(model.named_parameters())
old = model.roi_heads.box_predictor
predictor = FastRCNNPredictor(old.cls_score.in_features, num_classes).to(device)
start_from_mean(predictor.cls_score, old.cls_score)
start_from_mean(predictor.bbox_pred, old.bbox_pred, rows=4)  # four numbers for a class
model.roi_heads.box_predictor = predictor
print(old, predictor, sep="\n")

new = [name for name, p in model.named_parameters() if p is not old_parameters.get(name)]
print("new parameters:", *new, sep="\n  ")
assert all(name.startswith("roi_heads.box_predictor.") for name in new)

# %% [markdown]
# Four tensors are new. All others keep what the model has learned about pictures. (The library's
# `replace_box_predictor` does the same. Notebook [10](10_making_it_fast.ipynb) measures what the mean gains.)
#
# ## One step by hand
#
# In **training** mode the model takes images and targets, and returns losses. In **evaluation** mode it takes
# images and returns detections. We try both on a copy, so that the model itself stays as it is.

# %%
import copy

images, targets = next(iter(train_loader))
images = [image.to(device) for image in images]
targets = [{k: v.to(device) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]

trial = copy.deepcopy(model).train()
losses = trial(images, targets)
print("training:  ", sorted(losses))

trial.eval()
with torch.inference_mode():
    detections = trial(images)
print("evaluation:", sorted(detections[0]))

# %% [markdown]
# Each stage has two losses, for *what* and for *where*. In `rpn` they are `loss_objectness` (does
# this anchor hold an object?) and `loss_rpn_box_reg`. In `roi_heads` they are `loss_classifier` (which
# class is this proposal?) and `loss_box_reg`. Mask R-CNN adds `loss_mask`. Training minimises their sum:

# %% tags=["nbval-ignore-output"]
optimizer = torch.optim.AdamW([p for p in trial.parameters() if p.requires_grad], lr=LEARNING_RATE)

trial.train()
losses = trial(images, targets)
loss = sum(losses.values())
optimizer.zero_grad()
loss.backward()
optimizer.step()
print(f"loss {loss.item():.3f} =", " + ".join(f"{v.item():.3f}" for v in losses.values()))

# %% [markdown]
# The optimizer gets only the parameters that can learn. In a pre-trained ResNet-50, torchvision freezes the first two
# of five stages.
#
# ## A learning rate that rises and falls
#
# AdamW's first steps are as large as later ones, and would damage the trained layers. The learning rate
# therefore rises during the first epoch, the *warm-up*. Then it falls to zero along a
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
rates = [LEARNING_RATE * factor(step) for step in range(EPOCHS * steps)]
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.plot([step / steps for step in range(EPOCHS * steps)], rates)
axes.set(xlabel="epoch", ylabel="learning rate", ylim=0)
plt.show()

# %% [markdown]
# torchvision's own tutorial has SGD at 0.005 with batches of 2. We take AdamW. It
# divides the step of each weight by the recent size of its gradients, so new and trained layers can share one
# rate. Its rates are lower: about 0.001 for a small model, 0.0001 for a pre-trained ResNet-50. For a batch twice as
# large, double SGD's rate ([Goyal et al. 2017](https://arxiv.org/abs/1706.02677)), and multiply AdamW's by 1.4
# ([Malladi et al. 2022](https://arxiv.org/abs/2205.10287)).
#
# ## The loop
#
# `train_one_epoch` takes the step above for each batch, and then a step of the schedule. It stops when the loss
# or its gradient is not finite, because one such step spoils every weight.

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
        check_targets(model, targets)
        losses = model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not torch.isfinite(loss + norm):
            where = f"step {len(history) + 1}, images with image_id {[target.get('image_id') for target in targets]}"
            raise FloatingPointError(f"{where}: {why_not_finite(model, losses)}")
        optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()
        history.append(torch.stack([loss, *losses.values()]).detach())
    if not history:
        raise ValueError("data_loader gives no batches: it is empty, or drop_last leaves nothing of it")
    means = torch.stack(history).mean(dim=0).tolist()
    return dict(zip(["loss", *losses], means, strict=True))


# The two checks of the loop:
def check_targets(model: nn.Module, targets: Iterable[dict]) -> None:
    layers = ("box_predictor.cls_score.bias", "mask_predictor.mask_fcn_logits.bias")
    classes = [len(bias) for name, bias in model.named_parameters() if name.endswith(layers)]
    if len(set(classes)) > 1:
        raise ValueError(f"box and mask predictors have {classes} classes: replace_predictors gives both one number")
    needed = {"boxes", "labels", "masks"} if len(classes) == 2 else {"boxes", "labels"}
    for target in targets:
        if missing := needed - target.keys():
            lacks = f"the target with image_id {target.get('image_id')} lacks {', '.join(sorted(missing))}"
            raise ValueError(f"{lacks}; without objects, boxes are [0, 4], labels [0] and masks [0, H, W]")


def why_not_finite(model: nn.Module, losses: dict[str, Tensor]) -> str:
    values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        return f"the weights are already not finite ({bad[0]}), whatever the images: go on from an earlier checkpoint"
    if not all(value.isfinite() for value in losses.values()):
        return f"the loss is not finite ({values}): see check_dataset on pixels and boxes, then lower the learning rate"
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the loss is finite, the gradient of {bad[:2]} is not: try this step on a CPU; see all processes' images"


# %% [markdown]
# After every epoch we measure on the validation images.

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
# The three pictures again, before training (top) and after (bottom):

# %%
after = predict(model, pictures, device, score_threshold=0.5)
titles = ["before"] * 3 + ["after"] * 3
show(pictures * 2, before + after, titles, categories=categories)
plt.show()

# %% [markdown]
# And in numbers. The test images are used for the first time, and nothing is chosen by them:

# %% tags=["results", "nbval-ignore-output"]
test = evaluate(model, test_loader, device).box
rows = {"zero-shot, validation": zero_shot, "finetuned, validation": finetuned, "finetuned, test": test}
print_table(rows)
{"box_AP": round(test.AP, 4)}  # for the summary of `make run`

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
# ## Where it fails
#
# Take the detections that score at least 0.5. A person is *missed* if none of these has an IoU of at least 0.5 with
# that person. Below is the test image with the most missed people. They are on the left, and all the detections are
# on the right.

# %%
samples = [test_set[i] for i in range(len(test_set))]
detected = [predict(model, [image], device, score_threshold=0.5)[0] for image, _ in samples]
missed = []
for (_, target), found in zip(samples, detected, strict=True):
    missed.append((box_iou(target["boxes"], found["boxes"]) < 0.5).all(dim=1))

worst = max(range(len(missed)), key=lambda i: missed[i].sum())
image, target = samples[worst]
panels = [{"boxes": target["boxes"][missed[worst]]}, detected[worst]]
show([image, image], panels, ["missed", "detections"], columns=2, cell=(5.5, 4))
plt.show()

# %% [markdown]
# ## Why validation and test differ
#
# Count the people of the two parts by size:

# %% tags=["nbval-ignore-output"]
for name, part in (("validation", val_set), ("test", test_set)):
    area = torch.cat([target["area"] for _, target in part])
    small, large = int((area < 32**2).sum()), int((area > 96**2).sum())
    print(f"{name:10} {len(part):3} images, {len(area):3} people: {small} small, {large} large")

# %% [markdown]
# With so few images, the parts cannot be equally hard. People who are small or half hidden are missed first, and each
# part has a different share of them. So look at what a part holds before you compare two numbers.
#
# All parts also show the same streets and campuses. In a new place, expect less.
#
# ## Recap
#
# - **Measure** the model before you train it.
# - **Replace** `roi_heads.box_predictor` with one for your classes, background included.
# - **Raise** the learning rate slowly, then let it fall.
# - **Look** at validation during training, and at test at the end.
#
# ## On your own
#
# 1. Train only the new predictor. What does AP lose, and how much faster is an epoch?
#    <details><summary>Hint</summary>Freeze all other parameters before you build the optimizer.</details>
#    <details><summary>Solution</summary><code>model.requires_grad_(False)</code>, then
#    <code>model.roi_heads.box_predictor.requires_grad_(True)</code>.</details>
# 2. Keep "person": copy the old rows of classes 0 and 1 into the new layers. What is AP before training?
#    <details><summary>Hint</summary><code>old_parameters</code> has them. <code>bbox_pred</code> has four rows for each class.</details>
#    <details><summary>Solution</summary><code>for name in new: model.get_parameter(name).data =
#    old_parameters[name].data[: 2 if "cls_score" in name else 8].clone()</code></details>

# %% [markdown]
# ## In practice
#
# - `num_classes` counts the background: for ten kinds of things it is 11, and the labels are 1 to 10. Label 0
#   raises no error, but means background. Label 11 raises an `IndexError`, and on CUDA a device-side
#   assert (notebook [07](07_when_it_breaks.ipynb)).
# - Build the optimizer *after* you replace the predictor, or it trains the old one.
# - If all you need is "person", the zero-shot model may do.
# - Another 50 test photographs would move AP by .05 or so (bootstrap, notebook
#   [06](06_evaluating_detections.ipynb)). So even the second decimal is noise.
# - The small model's weights come with this project. Its trunk has the ImageNet weights of EfficientNet-Lite0, and
#   `tools/pretrain.py` trained the rest on synthetic images. Notebook [10](10_making_it_fast.ipynb) says what
#   that is worth.
#
# ## Further reading
#
# - [Feature Pyramid Networks](https://arxiv.org/abs/1612.03144).
# - [torchvision's detection models](https://docs.pytorch.org/vision/stable/models.html#object-detection-instance-segmentation-and-person-keypoint-detection).
#
# **Next:** [03, swap the backbone](03_swapping_the_backbone.ipynb).
