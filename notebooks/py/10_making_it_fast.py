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
# # Make it fast: one change at a time, each measured
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/torchvision-detection-tutorial/blob/main/notebooks/10_making_it_fast.ipynb)
#
# You start from the loop that most tutorials use, see where its time goes, and change one thing after
# the other until you arrive at the library's loop.

# %% [markdown]
# ## What you'll do
#
# - put a clock on each part of the classic loop;
# - look into one training step with PyTorch's profiler;
# - compute RoIAlign in another way, decode images once, leave out padding, choose the number of threads, compute
#   in bfloat16, and measure what each is worth;
# - predict only the masks that somebody looks at;
# - add it all up, beside a table that was measured with more patience.
#
# **You need** notebook [04](04_penn_fudan_mask_rcnn.ipynb), whose loop this one explains.
#
# | preset | measures | time |
# |---|---|---|
# | `quick` | `maskrcnn_mini_fpn` on synthetic images | 49 s on one CPU core |
# | `laptop` | the same on photographs | 1.2 min on two CPU cores |
# | `full` | `maskrcnn_resnet50_fpn` on photographs | a GPU; without one, smaller images (not measured yet) |

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
# The preset, as in notebook 01. Times differ from machine to machine, and from minute to minute on a machine
# that does other things too; what counts are ratios of times that were taken side by side.

# %% tags=["nbval-ignore-output"]
import os

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler talks about itself otherwise
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
BATCHES = 4  # to measure on
device = pick_device()
root = prepare_data(preset)
fetch_weights(preset.mask_rcnn, preset.weights)
print(provenance(preset, device))

# %% [markdown]
# ## The classic loop, with clocks
#
# Float32, SGD, images decoded from disk whenever they are asked for, torchvision's RoIAlign, and every loss read after every
# step. A GPU works on while Python goes ahead, so a clock has to wait for it:

# %%
import time


def now():
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


# %%
from torch.utils.data import DataLoader, Subset
from torchvision.models import get_model
from torchvision.ops import MultiScaleRoIAlign

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.models import replace_box_predictor, replace_mask_predictor
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

from_disk = PennFudanDataset(root, get_transform(train=True))
train_set, _, _ = split_dataset(from_disk, preset.split, SEED)
few = Subset(train_set, range(BATCHES * preset.batch_size))
loader = DataLoader(few, preset.batch_size, collate_fn=collate_fn)


LEVELS = ["0", "1", "2", "3"]  # of the FPN


def build_model(roi_align):
    torch.manual_seed(SEED)
    model = get_model(
        preset.mask_rcnn,
        weights=preset.weights,
        min_size=preset.min_size[-1],
        max_size=preset.max_size,
        box_roi_pool=roi_align(LEVELS, output_size=7, sampling_ratio=2),
        mask_roi_pool=roi_align(LEVELS, output_size=14, sampling_ratio=2),
    )
    return replace_mask_predictor(replace_box_predictor(model, 2), 2).to(device)


# %% [markdown]
# Each part of the loop stops its clock before the next one begins:

# %%
from itertools import pairwise

from tutorial_lib.engine import to_device

model = build_model(MultiScaleRoIAlign).train()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
seconds = {"data": 0.0, "forward": 0.0, "backward": 0.0, "update": 0.0}
sum(model(*to_device(*next(iter(loader)), device)).values()).backward()  # slow once
begun = now()
for images, targets in loader:
    decoded = now()
    losses = model(*to_device(images, targets, device))
    loss = sum(losses.values())
    computed = now()
    optimizer.zero_grad()
    loss.backward()
    derived = now()
    optimizer.step()
    logged = {name: value.item() for name, value in losses.items()}
    ended = now()
    times = (begun, decoded, computed, derived, ended)
    for name, (start, end) in zip(seconds, pairwise(times), strict=True):
        seconds[name] += end - start
    begun = ended

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2), layout="constrained")
axes.barh(list(seconds), [value / BATCHES for value in seconds.values()])
axes.set(xlabel="seconds a step, on average")
axes.invert_yaxis()
plt.show()
assert seconds["forward"] + seconds["backward"] > seconds["update"] + seconds["data"]

# %% [markdown]
# Forward and backward are where the time is. What a gain elsewhere is worth can be read here before anything
# is changed: if data are a tenth of a step, no trick with data can save more than a tenth.
#
# ## Inside a step
#
# PyTorch's profiler counts the time of every operation. *Self* time leaves out the operations that one calls:

# %%
from torch.profiler import ProfilerActivity, profile

batch = next(iter(loader))
activities = [ProfilerActivity.CPU]
if device.type == "cuda":
    activities.append(ProfilerActivity.CUDA)


def step(model, optimizer, batch):
    losses = model(*to_device(*batch, device))
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    return {name: value.item() for name, value in losses.items()}


step(model, optimizer, batch)
with profile(activities=activities) as profiler:
    step(model, optimizer, batch)

# %%
events = [  # of operations; on a GPU their kernels are listed, too
    event
    for event in profiler.key_averages()
    if event.device_type == torch.autograd.DeviceType.CPU
]
kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
largest = sorted(events, key=lambda event: -getattr(event, kind))[:8]
figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
axes.barh(
    [event.key[:45] for event in largest],
    [getattr(event, kind) / 1e3 for event in largest],
)
axes.set(xlabel="milliseconds of one step")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# Names that end in `_backward` belong to the backward pass. On a CPU convolutions and their gradients are the most of it.
# Processors have special instructions for them, so there is little to win but by computing less. But then comes RoIAlign's gradient:

# %%
names = [event.key for event in largest]
if device.type == "cpu":
    assert any("conv" in name for name in names)
    assert any("roi_align_backward" in name for name in names)

# %% [markdown]
# ## RoIAlign: sums of weighted rows of a table
#
# RoIAlign (notebook 03) cuts 7 × 7 values out of a feature map for each box. Every value is a mean of four samples, and
# every sample lies between four pixels, so it is a weighted mean of 16 pixels, in each channel with the same weights. On a CPU
# torchvision's gradient goes through these numbers one by one, with one thread. Language models need such sums, too, of rows
# of a table of words, and PyTorch has a fast function for them, `torch.nn.functional.embedding_bag`. This project's `EmbeddingBagRoIAlign` takes a feature map
# as a table with a row for each pixel, and is otherwise torchvision's `MultiScaleRoIAlign`. (On a GPU it *is* torchvision's, which has
# a kernel of its own there.) Features and boxes to compare the two on:

# %%
with torch.no_grad():
    prepared, _ = model.transform(*to_device(*batch, device))
    features = model.backbone(prepared.tensors)
    model.rpn.eval()
    proposals, _ = model.rpn(prepared, features)
    model.rpn.train()
maps = [features[name].requires_grad_() for name in LEVELS]
boxes = [of_image[:64] for of_image in proposals]

# %% [markdown]
# Values and gradients, and the best time of three:

# %%
from tutorial_lib.offline.roi_align import EmbeddingBagRoIAlign

computed, rounds = {}, {"MultiScaleRoIAlign": [], "EmbeddingBagRoIAlign": []}
for _ in range(4):
    for roi_align in (MultiScaleRoIAlign, EmbeddingBagRoIAlign):
        pool = roi_align(LEVELS, output_size=7, sampling_ratio=2)
        begun = now()
        values = pool(features, boxes, prepared.image_sizes)
        gradients = torch.autograd.grad(values.square().sum(), maps)
        rounds[roi_align.__name__].append(now() - begun)
        computed[roi_align.__name__] = [values, *gradients]
torch.testing.assert_close(*computed.values(), rtol=1e-3, atol=1e-3)
roi_times = {name: min(times[1:]) for name, times in rounds.items()}
if device.type == "cpu":
    assert roi_times["EmbeddingBagRoIAlign"] < roi_times["MultiScaleRoIAlign"]

# %%
figure, axes = plt.subplots(figsize=(6, 1.4), layout="constrained")
bars = axes.barh(list(roi_times), [1e3 * value for value in roi_times.values()])
axes.bar_label(bars, fmt="%.0f", padding=3)
axes.set(xlabel=f"milliseconds for {sum(map(len, boxes))} boxes, with the gradient")
axes.margins(x=0.15)
axes.invert_yaxis()
plt.show()

# %% [markdown]
# The numbers are the same up to rounding. (Two trainings that differ only in rounding still drift apart, and end with
# other APs.) The library's small models have it built in, and other models take it as torchvision's own arguments, `box_roi_pool` and `mask_roi_pool`. From here on the model has it:

# %%
model = build_model(EmbeddingBagRoIAlign).train()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

# %% [markdown]
# ## Data: decode once
#
# An image file is decompressed in every epoch. With `in_memory=True` the dataset keeps what it has decoded, as uint8, and the masks
# that it has taken apart. Conversion to float and augmentation still happen every time, since they
# should differ from epoch to epoch.

# %%
kept = PennFudanDataset(root, get_transform(train=True), in_memory=True)
indices = range(8)
per_sample = {}
for name, dataset in {"from disk": from_disk, "in memory": kept}.items():
    rounds = []
    for _ in range(4):
        torch.manual_seed(SEED)
        begun = now()
        [dataset[index] for index in indices]
        rounds.append((now() - begun) / len(indices))
    per_sample[name] = min(rounds[1:])
assert per_sample["in memory"] < per_sample["from disk"]

# %%
figure, axes = plt.subplots(figsize=(6, 1.4), layout="constrained")
bars = axes.barh(list(per_sample), [1e3 * value for value in per_sample.values()])
axes.bar_label(bars, fmt="%.1f", padding=3)
axes.set(xlabel="milliseconds for an augmented image with its target")
axes.margins(x=0.15)
axes.invert_yaxis()
plt.show()

# %% [markdown]
# PennFudan's images and masks take about 1 MB each. What does not fit into memory, the `num_workers` of a `DataLoader` can decode while the model
# computes, where there are cores to spare. Each worker has its own copy of the dataset, and what that has kept is lost when the epoch
# ends, unless the loader has `persistent_workers=True`.
#
# ## Padding: images of one shape in a batch
#
# The images of a batch become one tensor: the model scales each until its shorter side is `min_size`, and pads all of them to
# the widest and the tallest, rounded up to a multiple of 32. It computes on the padding as on the rest. How much of the batches is that?
# `laptop` has five `min_size`, of which every image gets a random one, which makes more of it:

# %%
plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
plain_train, _, _ = split_dataset(plain, preset.split, SEED)
shapes = [plain.get_height_and_width(index) for index in plain_train.indices]
ratios = [width / height for height, width in shapes]


def share_of_padding(sampler, min_size):
    model.transform.min_size = min_size
    real = whole = 0
    for images, _ in DataLoader(
        plain_train, batch_sampler=sampler, collate_fn=collate_fn
    ):
        batch, _ = model.transform([image.to(device) for image in images])
        real += sum(height * width for height, width in batch.image_sizes)
        whole += batch.tensors[:, 0].numel()
    return 1 - real / whole


# %% [markdown]
# The library's `AspectRatioBatchSampler` shuffles the images, cuts them into windows, sorts each window by aspect ratio, cuts it
# into batches, and shuffles the batches. With a window for each batch nothing is sorted. With a single window there is least
# padding, but nearly the same images meet in every epoch, and exactly the same where the batches leave no image out:

# %%
from tutorial_lib.data import AspectRatioBatchSampler

torch.manual_seed(SEED)
padding = {}
sizes_of = {"": preset.min_size[-1:]}
if len(preset.min_size) > 1:
    sizes_of = {"one min_size, ": preset.min_size[-1:], "five, ": preset.min_size}
for which, min_size in sizes_of.items():
    for num_windows in (len(ratios) // preset.batch_size, 5, 1):
        sampler = AspectRatioBatchSampler(ratios, preset.batch_size, num_windows)
        share = share_of_padding(sampler, min_size)
        padding[f"{which}{num_windows} window(s)"] = share
model.transform.min_size = preset.min_size[-1:]

# %%
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
bars = axes.barh(list(padding), [100 * share for share in padding.values()])
axes.bar_label(bars, fmt="%.0f %%", padding=3)
axes.set(xlabel="padding, in percent of the pixels that are computed")
axes.margins(x=0.15)
axes.invert_yaxis()
plt.show()
most, *_, least = list(padding.values())[-3:]
assert least < most

# %% [markdown]
# Whether AP stays is a question for whole trainings. In a clone, `python -m tools.benchmarks.windows` asks it. It repeats
# notebook 04's finetuning with three seeds each, on synthetic images (`quick`: 10 batches an epoch, 10 epochs) and on photographs
# (`laptop`: 25 batches an epoch, 4 epochs), on a CPU, with torchvision's RoIAlign. The library holds what came of it:

# %%
import json
import statistics
from importlib.resources import files
from itertools import groupby

results = files("tutorial_lib") / "results"
rows = json.loads((results / "windows.json").read_text())["rows"]
print(f"{'preset':8}{'windows':>8}{'box AP':>16}{'mask AP':>16}")
for key, group in groupby(rows, lambda row: (row["preset"], row["num_windows"])):
    runs = list(group)
    print(f"{key[0]:8}{key[1]:8}", end="")
    for name in ("box_AP", "mask_AP"):
        values = [run[name] for run in runs]
        mean, spread = statistics.mean(values), statistics.stdev(values)
        print(f"{mean:8.3f} ± {spread:.3f}", end="")
    print()

# %% [markdown]
# In these rows, five windows leave both APs on photographs within the spread of the seeds. On the synthetic images, a single window, so
# the same ten batches in every epoch, costs both APs about 0.07; with five, mask AP is 0.03 lower and box AP 0.02 higher. The library's
# default is five, and `tutorial_lib.train` uses it; notebook 04 shuffles plainly.
#
# ## Threads: not always more
#
# On a CPU, PyTorch shares each operation out among threads, one for each core. They wait for each
# other at the end of every operation; if another program uses one of the cores, all wait for it. So
# time a step with one thread, time it with all, and keep what is faster:

# %% tags=["nbval-ignore-output"]
by_threads = {}
for number in sorted({1, torch.get_num_threads()}):
    torch.set_num_threads(number)
    rounds = []
    for _ in range(3):
        begun = now()
        step(model, optimizer, batch)
        rounds.append(now() - begun)
    by_threads[number] = min(rounds[1:])
    print(f"{number} thread(s): {by_threads[number]:.2f} s a step")
torch.set_num_threads(min(by_threads, key=by_threads.get))

# %% [markdown]
# ## bfloat16, where the processor has it
#
# Notebook 04's `use_bfloat16` lets PyTorch compute the layers of the backbone and the heads in bfloat16. It asks first whether the
# device is faster in it, and leaves the model as it is where not. To compare, both models take the same
# steps, one after the other, so that whatever else the machine does disturbs both:

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import use_bfloat16

fast_model = build_model(EmbeddingBagRoIAlign).train()
changed = use_bfloat16(fast_model, device)
models = {"float32": build_model(EmbeddingBagRoIAlign).train()}
if changed:
    models["bfloat16"] = fast_model
else:
    print("this device has no fast bfloat16")
step_times = {name: [] for name in models}
for _ in range(5):
    for name, candidate in models.items():
        sgd = torch.optim.SGD(candidate.parameters(), lr=1e-4, momentum=0.9)
        begun = now()
        step(candidate, sgd, batch)
        step_times[name].append(now() - begun)
per_step = {name: statistics.median(times[1:]) for name, times in step_times.items()}
print({name: f"{value:.2f} s a step" for name, value in per_step.items()})

# %% [markdown]
# What does it cost? The losses of the same batch, from the same weights and the same seed (with rounded scores,
# other proposals may be sampled):

# %% tags=["nbval-ignore-output"]
compared = {}
for name in ("float32", "bfloat16"):
    candidate = build_model(EmbeddingBagRoIAlign).train()
    if name == "bfloat16":
        use_bfloat16(candidate, device)
    torch.manual_seed(SEED)
    with torch.no_grad():
        losses = candidate(*to_device(*batch, device))
    compared[name] = sum(losses.values()).item()
    print(f"{name}: loss {compared[name]:.4f}")
assert abs(compared["bfloat16"] / compared["float32"] - 1) < 0.1

# %% [markdown]
# Where the device has bfloat16 the two differ in some digit, and elsewhere they are the same. Whether AP suffers is a question for whole trainings and several
# seeds; the spread that notebook 06 found is the yardstick.
#
# ## Inference: masks of what somebody looks at
#
# Mask R-CNN predicts a mask for each of up to 100 detections and pastes it into a picture of full size, and most of these
# detections have a score so low that nobody wants them. The model's own threshold, `roi_heads.score_thresh`, is 0.05, which
# evaluation needs. `predict` raises it to the one asked for while it predicts, so the mask branch sees fewer boxes. What is above the
# threshold is the same, up to the rounding of convolutions that get fewer boxes at a time:

# %%
from tutorial_lib.engine import predict

picture = plain[0][0].to(device)
sizes = {"min_size": preset.min_size[-1], "max_size": preset.max_size}
pretrained = get_model(preset.mask_rcnn, weights=preset.weights, **sizes)
pretrained.to(device).eval()
inference_times = {"all masks": [], "masks over 0.5": []}
for _ in range(5):
    begun = now()
    with torch.inference_mode():
        (whole,) = pretrained([picture])
    whole_done = now()
    (cut,) = predict(pretrained, [picture], device, score_threshold=0.5)
    inference_times["all masks"].append(whole_done - begun)
    inference_times["masks over 0.5"].append(now() - whole_done)
keep = whole["scores"] >= 0.5
atol = 1e-3 if device.type == "cpu" else 2e-2  # TensorFloat-32 has 11 significant bits
torch.testing.assert_close(whole["masks"][keep].cpu(), cut["masks"], rtol=0, atol=atol)

# %% [markdown]
# The medians of four:

# %%
medians = {k: 1e3 * statistics.median(v[1:]) for k, v in inference_times.items()}
figure, axes = plt.subplots(figsize=(6, 1.4), layout="constrained")
axes.bar_label(axes.barh(list(medians), list(medians.values())), fmt="%.0f", padding=3)
axes.margins(x=0.15)
axes.set(xlabel=f"milliseconds; {keep.sum()} of {len(keep)} detections are over 0.5")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# Evaluation needs all of them, pasted. `evaluate` compares them only inside their boxes, without run-length encoding, and keeps only the IoUs
# (notebook 06). Most of the time that is left is the model's, with its pasting.
#
# ## All together
#
# A loader with the library's sampler. It takes a part that `split_dataset` or `Subset` has cut out of a `PennFudanDataset`:

# %%
import torch
from torch.utils.data import DataLoader

from tutorial_lib.data import AspectRatioBatchSampler, collate_fn


def grouped_loader(part, batch_size, num_windows=5):
    sizes = [part.dataset.get_height_and_width(index) for index in part.indices]
    ratios = [width / height for height, width in sizes]
    return DataLoader(
        part,
        batch_sampler=AspectRatioBatchSampler(ratios, batch_size, num_windows),
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
    )


# %% [markdown]
# The loop around it is notebook 02's `train_one_epoch`, which reads the losses once an epoch, with AdamW in its `fused` form: one call for all
# parameters. An epoch of a few batches, as it was and as it is now, one after the other. (So few batches are one window; at five, and of all images,
# the table further down has an epoch.)

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import train_one_epoch

classic_model = build_model(MultiScaleRoIAlign).train()
classic_sgd = torch.optim.SGD(classic_model.parameters(), lr=1e-4, momentum=0.9)
fast_few = Subset(kept, train_set.indices[: len(few)])
fast_loader = grouped_loader(fast_few, preset.batch_size, num_windows=1)
fast_adamw = torch.optim.AdamW(fast_model.parameters(), lr=1e-4, fused=True)
[fast_few[index] for index in range(len(fast_few))]  # decoded once
for candidate, sgd in ((classic_model, classic_sgd), (fast_model, fast_adamw)):
    step(candidate, sgd, batch)  # a warm-up
begun = now()
for batch in loader:
    step(classic_model, classic_sgd, batch)
middle = now()
train_one_epoch(fast_model, fast_adamw, fast_loader, device, progress=False)
whole_epoch = {"classic": middle - begun, "ours": now() - middle}
print({name: f"{value:.1f} s" for name, value in whole_epoch.items()})

# %% [markdown]
# ## Measured with patience
#
# A few batches give a noisy answer. The project's benchmark takes whole epochs, and times a step of one loop, a step of the next, and so on, each loop in
# a process of its own. `tutorial_lib/results/speed.json` keeps what it measured and on what. In a clone, `python -m tools.benchmarks.speed` makes it anew.
# From the classic loop to the library's, each line with the changes of those above it, on batches that are in memory:

# %%
rows = json.loads((results / "speed.json").read_text())["rows"]
by_work = {row["work"]: row for row in rows}
for row in rows:
    if "steps" in row and row["work"].startswith("train_step"):
        print(f"{row['work']}, {row['preset']}, {row['device']}, {row['date']}")
        for name, value in row["steps"].items():
            ratio = row["classic"] / value
            print(f"  {name:42}{value:7.3f} s a step {ratio:6.2f} times as fast")
if "train_step_cuda" not in by_work:
    print("No GPU has been measured yet. With one, and PENN_FUDAN_ROOT:")
    works = "train_step_cuda inference_cuda epoch_cuda"
    print(f"  python -m tools.benchmarks.speed {works}")

# %% [markdown]
# All that was timed the classic way and ours, in seconds. In brackets: the ratios between which the middle half of the pairs lay, or
# those of each round:

# %%
print(f"{'':24}{'preset':8}{'classic':>9}{'ours':>9}{'ratio':>7}")
for row in rows:
    spread = row.get("ratio_quartiles", [])
    if "rounds" in row:
        pairs = zip(*row["rounds"].values(), strict=True)
        spread = [round(classic / ours, 2) for classic, ours in pairs]
    numbers = f"{row['classic']:9.4f}{row['ours']:9.4f}{row['ratio']:7.2f}"
    print(
        f"{row['work']:24}{row.get('preset', ''):8}{numbers}",
        *([spread] * bool(spread)),
    )

# %% [markdown]
# Of the epochs, the parts (`classic` first) and the peak of memory in training:

# %%
import math

print(
    f"{'':13}{'preset':8}{'training [s]':>15}{'evaluation [s]':>17}{'memory [GB]':>15}"
)
for row in rows:
    if row["work"].startswith("epoch"):
        print(f"{row['work']:13}{row['preset']:8}", end="")
        for kind, unit in {"training": 1, "evaluation": 1, "peak_bytes": 1e9}.items():
            pair = [row[f"{way}_{kind}"] or math.nan for way in ("classic", "ours")]
            print(*(f"{value / unit:7.2f}" for value in pair), end="  ")
        print()

# %% [markdown]
# `sample_from_cache` is one image with its target, without augmentation: decoded the classic way, and taken from memory ours. `train_step_…` is the last line of the table above beside its first, on all training images.
# `inference_…` predicts the masks over 0.5 of 30 images, one by one. `epoch_…` is the second epoch of training, data included, and an evaluation of the test images with 100 detections each. `training_cpu` is two
# epochs of training, the mean of two rounds: the classic loop beside `tutorial_lib.train` with several processes of one thread, four images a step both.
# `evaluator_N` is only the evaluator, on N images with 100 detections each, whose masks are pasted to full size before.
#
# Two rows put a single change beside the library's loop without it: `several_processes_…` several processes of one thread in place of one with as many threads, and
# `channels_last_…` that memory format. Where the ratio is under 1 the change made it slower, and the library leaves it out.
#
# Samples, steps and predictions were timed in turn, which a machine that is not equally fast all the time disturbs least. Epochs, the trainings of
# `several_processes_…` and `evaluator_1000…` were timed once, one way after the other; how far two rounds of such a time can differ, `training_cpu` shows.

# %%
compared_ways = {
    row["work"]: row["ratio"]
    for row in rows
    if not row["work"].startswith(("several", "channels"))
}
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
gains = [ratio - 1 for ratio in compared_ways.values()]
bars = axes.barh(list(compared_ways), gains, left=1)
labels = [f"{ratio:.2f}" for ratio in compared_ways.values()]
axes.bar_label(bars, labels, padding=3)
ticks = [1, 2, 5, 10, 20]
axes.set_xscale("log")
axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
axes.minorticks_off()
axes.set_xlim(0.9, 1.5 * max(compared_ways.values()))
axes.set_xlabel("how many times as fast as the classic way")
axes.invert_yaxis()
plt.show()
measured_on = {
    f"{row['device']}, {row['threads']} threads, torch {row['torch']}" for row in rows
}
print(*sorted(measured_on), sep="\n")

# %% tags=["results", "nbval-ignore-output"]
{"epoch_ratio": round(whole_epoch["classic"] / whole_epoch["ours"], 2)}

# %% [markdown]
# ## Recap
#
# - **Measure** before you change anything, and side by side.
# - **Replace** what the profiler shows by something that gives the same numbers sooner.
# - **Keep** decoded images where they fit into memory.
# - **Group** images of similar shape, and look at AP.
# - **Try** the number of threads on a CPU; the most is not always the best.
# - **Compute** convolutions in bfloat16 where the processor is faster in it, and boxes in float32.
# - **Leave out** work whose result nobody reads.

# %% [markdown]
# ## On your own
#
# 1. Convert the model to `memory_format=torch.channels_last`. Is it faster on your machine?
#    <details><summary>Hint</summary><code>model.to(memory_format=torch.channels_last)</code>, and time it beside the other, as above.</details>
# 2. Compile the backbone with `torch.compile`. After how many steps has it earned what compiling took?
#    <details><summary>Hint</summary>Images differ in size, so use <code>dynamic=True</code>, and time the first call apart from the others.</details>
# 3. Halve `box_batch_size_per_image`. What does a step take, and what does AP say after a whole training?
#    <details><summary>Hint</summary><code>model.roi_heads.fg_bg_sampler.batch_size_per_image</code>.</details>

# %% [markdown]
# ## In practice
#
# - Reading a number from a GPU makes Python wait for it. The library's loop reads one a step, whether the loss is finite, and
#   keeps the losses on the device until the epoch ends. Detection models ask for numbers of their own in every step (how
#   many proposals are left?), so this is one among many.
# - Several processes with one thread each can be faster than one process with several threads, on a CPU too:
#   `python -m torch.distributed.run --nproc-per-node 2 -m tutorial_lib.train` (notebook 04).
# - A training on the CPU takes memory for large tensors and gives it back in every step, in small pages (4 kB on most machines). On Linux, where
#   `/sys/kernel/mm/transparent_hugepage/enabled` says `[madvise]`, the environment variable `THP_MEM_ALLOC_ENABLE=1`
#   lets [PyTorch take large tensors in pages of 2 MB](https://github.com/pytorch/pytorch/pull/107697). PyTorch reads it at its first
#   tensor, so set it before Python starts. The line "large pages" above is what it is worth on the machine there.
# - A smaller `min_size` means fewer pixels everywhere; notebook [09](09_anchors_and_backbones.ipynb) measures what it gains and what it costs in AP.
# - The clock of a notebook's cell includes what PyTorch does once: choosing kernels, reserving memory. Leave the first
#   round out.
#
# ## Further reading
#
# - PyTorch's [performance tuning guide](https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html)
#   and [profiler recipe](https://docs.pytorch.org/tutorials/recipes/recipes/profiler_recipe.html).
# - [Automatic mixed precision](https://docs.pytorch.org/docs/stable/amp.html).
#
# **Next:** back to your own data, with notebook [01](01_dataset.ipynb) for what a target has to hold, and
# [04](04_penn_fudan_mask_rcnn.ipynb) for the whole run.
