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
# You start from the classic training loop, see where its time goes, and change one thing after the other.
# The tables below say what that gained on one CPU core.

# %% [markdown]
# ## What you'll do
#
# - time each part of the classic loop, and look into one step with PyTorch's profiler;
# - compute RoIAlign in another way, decode images once, and leave out padding;
# - choose the number of threads, and compute in bfloat16;
# - predict only the masks that somebody looks at.
#
# **You need** notebook [04](04_penn_fudan_mask_rcnn.ipynb), whose loop this one explains. On one CPU core it
# takes about half a minute at `quick` and at `laptop`. `full` is made for a GPU (not measured yet).

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
# `quick` and `laptop` take a small model with the same parts. `quick` has synthetic images instead of the
# photographs. `BATCHES` is what we measure on.

# %% tags=["nbval-ignore-output"]
import os

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler talks about itself otherwise
from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset, fetch_weights, prepare_data, provenance

preset = choose_preset()
MODEL, WEIGHTS = preset.mask_rcnn, preset.weights
MIN_SIZES, MAX_SIZE = preset.min_size, preset.max_size
BATCH_SIZE, SPLIT, SEED, BATCHES = preset.batch_size, preset.split, 0, 4

device, root = pick_device(), prepare_data(preset)
fetch_weights(MODEL, WEIGHTS)
print(provenance(preset, device))
print(f"{MODEL = }\n{WEIGHTS = }\n{MIN_SIZES = }\n{MAX_SIZE = }")
print(f"{BATCH_SIZE = }\n{SPLIT = }\n{SEED = }\n{BATCHES = }")

# %% [markdown]
# ## What it gains
#
# What matters is how long a training takes to a mask AP, so we timed that first. `python -m tools.benchmarks.time_to_ap`
# trained on the photographs in two ways, with three seeds each. Model, starter weights, image sizes and batches of 2
# were the same.
#
# - **Classic** is close to torchvision's reference scripts: new predictors with random weights, float32, SGD with a
#   learning rate of 0.005, images from disk. The rate falls to a tenth twice in 26 epochs. Masks are pasted and encoded
#   for each epoch's evaluation.
# - **Ours** is notebook 04's: new predictors from the mean of the old classes, bfloat16, AdamW, 10 epochs, images in
#   memory, and the library's evaluation.
#
# Ours was chosen on these photographs, from the recipes at the end of this notebook. Classic was not tuned. The clock
# runs from opening the dataset, and evaluation counts. Each line below is a run:

# %%
import json
from importlib.resources import files

import matplotlib.pyplot as plt

results = files("tutorial_lib") / "results"
timed = json.loads((results / "time_to_ap.json").read_text())
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for row in timed["rows"]:
    minutes, mask_aps = zip(*((second / 60, mask) for second, _, mask in row["history"]), strict=True)
    label = row["recipe"] if row["seed"] == 0 else None
    axes.plot(minutes, mask_aps, color={"classic": "C1", "ours": "C0"}[row["recipe"]], alpha=0.8, label=label)
axes.set(xlabel="minutes", ylabel="mask AP, validation")
axes.legend()
axes.grid(alpha=0.3)

# %% [markdown]
# The table has the median seconds until that AP was first reached, and the median of the seeds' ratios. A run that never
# reaches it counts as its full length. Where a classic run did not get there, its time and the ratio are really larger:

# %%
print(f"{'mask AP':9}{'classic':>9}{'ours':>7}{'ratio':>7}{'got there: classic':>21}{'ours':>6}")
for ap, found in timed["summary"].items():
    seconds, arrived = found["median_seconds"], found["arrived"]
    print(f"{ap:9}{seconds['classic']:9.0f}{seconds['ours']:7.0f}{found['median_ratio']:7.1f}", end="")
    print(f"{arrived['classic']:16} of {found['runs']}{arrived['ours']:6}")
for recipe in ("classic", "ours"):
    runs = [row for row in timed["rows"] if row["recipe"] == recipe]
    box, mask = (sum(row[f"test_{kind}_AP"] for row in runs) / len(runs) for kind in ("box", "mask"))
    epoch = sum(row["history"][-1][0] / row["epochs"] for row in runs) / len(runs)
    print(f"{recipe:8} {epoch:.0f} s an epoch, box / mask AP on the test images {box:.3f} / {mask:.3f}, mean of {len(runs)}")
print(f"{row['device']}, {row['threads']} thread a run, two at a time, torch {row['torch']}, {row['date']}")

# %% [markdown]
# So our epochs are faster, but most is gained by needing fewer of them. (Ours include a validation loss. The epochs
# below do not, and are evaluated on 50 images, not on 20.)
#
# What makes an epoch faster? `python -m tools.benchmarks.speed` timed the parts. Both ways took turns, so other load on
# the machine hits both. Epochs and the evaluator of 1000 images were timed only once.

# %%
rows = {row["work"]: row for row in json.loads((results / "speed.json").read_text())["rows"]}
names = {
    "sample_from_cache": "an image from disk or memory",
    "train_step_cpu": "a training step",
    "inference_cpu": "an image's masks, score over 0.5",
    "epoch_cpu": "an epoch and its evaluation",
    "evaluator_1000": "evaluator, 1000 images",
}
print(f"{'seconds':31}{'classic':>9}{'ours':>9}{'ratio':>8}")
for work, name in names.items():
    print(f"{name:31}{rows[work]['classic']:9.3g}{rows[work]['ours']:9.3g}{rows[work]['ratio']:8.2f}")
one = rows["train_step_cpu"]
print(f"\n{one['device']}, {one['threads']} thread, torch {one['torch']}, {one['date']}")

# %% [markdown]
# (The evaluator had synthetic images, with 100 detections each. On a GPU nothing has been measured yet.)
#
# Times differ from machine to machine, and from minute to minute on a machine that does other things too. So look at
# ratios of times that were taken side by side.
#
# ## The classic loop, with clocks
#
# The classic loop computes in float32, with SGD and torchvision's RoIAlign. It decodes images from disk whenever they
# are asked
# for, and reads every loss after every step. Python does not wait for a GPU, so the clock has to.

# %%
import time

import torch
from torch.utils.data import DataLoader, Subset
from torchvision.models import get_model
from torchvision.ops import MultiScaleRoIAlign

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.models import replace_predictors
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform


def now():
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


from_disk = PennFudanDataset(root, get_transform(train=True))
train_set, _, _ = split_dataset(from_disk, SPLIT, SEED, block=10)
few = Subset(train_set, range(BATCHES * BATCH_SIZE))
loader = DataLoader(few, BATCH_SIZE, collate_fn=collate_fn)

# %% [markdown]
# torchvision's builders take another RoIAlign as `box_roi_pool` and `mask_roi_pool`:

# %%
LEVELS = ["0", "1", "2", "3"]  # of the FPN


def build_model(roi_align):
    torch.manual_seed(SEED)
    pools = {
        "box_roi_pool": roi_align(LEVELS, output_size=7, sampling_ratio=2),
        "mask_roi_pool": roi_align(LEVELS, output_size=14, sampling_ratio=2),
    }
    model = get_model(MODEL, weights=WEIGHTS, min_size=MIN_SIZES[-1], max_size=MAX_SIZE, **pools)
    return replace_predictors(model, 2).to(device).train()


# %% [markdown]
# Each part of the loop stops its clock before the next one begins:

# %%
from itertools import pairwise

from tutorial_lib.engine import to_device

model = build_model(MultiScaleRoIAlign)
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
    times = (begun, decoded, computed, derived, now())
    for name, (start, end) in zip(seconds, pairwise(times), strict=True):
        seconds[name] += end - start
    begun = times[-1]

# %%
def bars(values, label, fmt="%.0f"):
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    axes.bar_label(axes.barh(list(values), list(values.values())), fmt=fmt, padding=3)
    axes.set(xlabel=label)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    plt.show()


bars({k: 1e3 * v / BATCHES for k, v in seconds.items()}, "milliseconds a step, on average")

# %% [markdown]
# Forward and backward take most of the time. The plot also says what a faster part can save. If data take a tenth of a
# step, no trick with data saves more than a tenth.
#
# ## Inside a step
#
# PyTorch's profiler counts the time of every operation. *Self* time leaves out the operations that it calls:

# %%
from torch.profiler import ProfilerActivity, profile

batch = next(iter(loader))
activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")


def step(model, optimizer, batch):
    losses = model(*to_device(*batch, device))
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    return {name: value.item() for name, value in losses.items()}


step(model, optimizer, batch)
with profile(activities=activities, acc_events=True) as profiler:
    step(model, optimizer, batch)

# %%
kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
on_cpu = torch.autograd.DeviceType.CPU  # of operations; on a GPU their kernels are listed, too
events = [event for event in profiler.key_averages() if event.device_type == on_cpu]
events.sort(key=lambda event: -getattr(event, kind))
bars({event.key[:45]: getattr(event, kind) / 1e3 for event in events[:8]}, "milliseconds of one step")

# %% [markdown]
# Names that end in `_backward` belong to the backward pass. On a CPU, convolutions and their gradients take most of the
# time. Processors have special instructions for them, so the way to save there is to compute less. RoIAlign's gradient
# comes next.
#
# ## RoIAlign: sums of weighted rows of a table
#
# RoIAlign ([08](08_inside_mask_rcnn.ipynb)) cuts 7 × 7 values out of a feature map for each box. Every value is a
# mean of four samples, and every sample is interpolated from four pixels. So a value is a weighted sum of 16
# pixels, with the same weights in each channel. On a CPU, torchvision's gradient goes through these numbers one
# by one, with one thread.
#
# Bag-of-words and recommender models also need weighted sums, of rows of a table. PyTorch has a fast function for them,
# `torch.nn.functional.embedding_bag`. This project's `EmbeddingBagRoIAlign` takes a feature map as a table
# with a row for each pixel. Otherwise it is torchvision's `MultiScaleRoIAlign`. (On a GPU it *is* torchvision's,
# which has a kernel of its own there.) These are features and boxes to compare the two on:

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
# The values and the gradients must agree. The plot has the best time of three:

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
best = {name: 1e3 * min(times[1:]) for name, times in rounds.items()}
bars(best, "milliseconds for the boxes of a batch, with the gradient")

# %% [markdown]
# The numbers are the same up to rounding. (Two trainings that differ only in rounding still drift apart, and end with
# other APs.) The library's small models have `EmbeddingBagRoIAlign` built in. The models below have it, too.
#
# ## Data: decode once
#
# An image file is decompressed in every epoch. With `in_memory=True` the dataset keeps what it has decoded, as uint8.
# Conversion to float and augmentation still happen every time, since they should differ from epoch to epoch.

# %%
kept = PennFudanDataset(root, get_transform(train=True), in_memory=True)
per_sample = {}
for name, dataset in {"from disk": from_disk, "in memory": kept}.items():
    rounds = []
    for _ in range(4):
        torch.manual_seed(SEED)
        begun = now()
        [dataset[index] for index in range(8)]
        rounds.append(1e3 * (now() - begun) / 8)
    per_sample[name] = min(rounds[1:])
bars(per_sample, "milliseconds for an augmented image with its target", fmt="%.1f")

# %% [markdown]
# PennFudan's images and masks take about 1 MB each. If a dataset does not fit into memory, a `DataLoader` with
# `num_workers` can decode while the model computes. That needs cores to spare. Each worker has its own copy of the
# dataset. What a copy has kept is lost when the epoch ends, unless the loader has `persistent_workers=True`.
#
# ## Padding: images of one shape in a batch
#
# The images of a batch become one tensor. The model scales each until its shorter side is `min_size`, or its longer
# side `max_size` if it gets there first. Then it pads all of them to the widest and the tallest, rounded up to a
# multiple of 32. It computes on the padding as on the rest. How much of the batches is padding?

# %%
plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
plain_train, _, _ = split_dataset(plain, SPLIT, SEED, block=10)
shapes = [plain.get_height_and_width(index) for index in plain_train.indices]
ratios = [width / height for height, width in shapes]


def share_of_padding(sampler, min_sizes):
    model.transform.min_size = min_sizes
    real = whole = 0
    for images, _ in DataLoader(plain_train, batch_sampler=sampler, collate_fn=collate_fn):
        padded, _ = model.transform([image.to(device) for image in images])
        real += sum(height * width for height, width in padded.image_sizes)
        whole += padded.tensors[:, 0].numel()
    return 1 - real / whole


# %% [markdown]
# The library's `AspectRatioBatchSampler` shuffles the images and cuts them into windows. It sorts each window by
# aspect ratio, cuts it into batches, and shuffles the batches. With one window for each batch, sorting changes nothing.
# A single window has the least padding, but then nearly the same images share a batch in every epoch.
#
# If every image gets a random one of several `min_size`, there is more padding. So we measure both ways:

# %%
from tutorial_lib.data import AspectRatioBatchSampler

torch.manual_seed(SEED)
padding = {}
for min_sizes in sorted({MIN_SIZES[-1:], MIN_SIZES}, key=len):
    for num_windows in (len(ratios) // BATCH_SIZE, 5, 1):
        sampler = AspectRatioBatchSampler(ratios, BATCH_SIZE, num_windows)
        name = f"windows: {num_windows}, sizes: {len(min_sizes)}"
        padding[name] = 100 * share_of_padding(sampler, min_sizes)
model.transform.min_size = MIN_SIZES[-1:]
bars(padding, "padding, in percent of the pixels that are computed")

# %% [markdown]
# Sorting makes batches less random, and with a single window that can cost AP. The library's default is five windows,
# and `tutorial_lib.train` uses it. Notebook 04 shuffles plainly.
#
# ## Threads: not always more
#
# On a CPU, PyTorch divides each operation among threads, one for each core. They wait for each other at the end of
# every operation. If another program uses one of the cores, all wait for it. So time a step with one thread and with
# all, and keep what is faster:

# %% tags=["nbval-ignore-output"]
model = build_model(EmbeddingBagRoIAlign)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
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
# bfloat16 has the range of float32, and 8 significant bits instead of 24. CPUs with AVX-512 BF16 or AMX compute faster
# in it, and so do NVIDIA's GPUs since Ampere. (On those GPUs, float32 convolutions use TF32 by default, with 11
# significant bits.) `use_bfloat16` lets the backbone and the heads compute in it, and
# keeps boxes in float32. Where the device has no fast bfloat16, it leaves the model as it is.
#
# Both models take the same steps in turn. The first one is not counted:

# %% tags=["nbval-ignore-output"]
import statistics
from tutorial_lib.engine import has_fast_bfloat16, use_bfloat16

fast_model = build_model(EmbeddingBagRoIAlign)
use_bfloat16(fast_model, device)
models = {"float32": build_model(EmbeddingBagRoIAlign), "bfloat16": fast_model}
print("this device has fast bfloat16:", has_fast_bfloat16(device))
step_times, first_loss = {name: [] for name in models}, {}
for _ in range(5):
    for name, candidate in models.items():
        sgd = torch.optim.SGD(candidate.parameters(), lr=1e-4)
        torch.manual_seed(SEED)
        begun = now()
        losses = step(candidate, sgd, batch)
        step_times[name].append(now() - begun)
        first_loss.setdefault(name, sum(losses.values()))
for name, times in step_times.items():
    print(f"{name:9}{statistics.median(times[1:]):6.2f} s a step, first loss {first_loss[name]:.4f}")

# %% [markdown]
# The first losses come from the same batch, the same weights and the same seed. With fast bfloat16 they differ by
# rounding. Rounded scores may also lead to other proposals. Without fast bfloat16, both rows are the same model.
# Whether AP suffers is a question for whole trainings and several seeds. The spread that notebook
# [06](06_evaluating_detections.ipynb) measures is the yardstick.
#
# ## Inference: masks of what somebody looks at
#
# Mask R-CNN predicts a mask for each of up to 100 detections, and pastes it into a picture of full size. Most of
# these detections have a score so low that nobody wants them. The model's own threshold,
# `roi_heads.score_thresh`, is 0.05, and evaluation needs it. While it predicts, `predict` raises it to the threshold
# that you ask for. So the mask branch sees fewer boxes. The plot has medians of four:

# %%
from tutorial_lib.engine import predict

picture = plain[0][0].to(device)
pretrained = get_model(MODEL, weights=WEIGHTS, min_size=MIN_SIZES[-1], max_size=MAX_SIZE)
pretrained.to(device).eval()
ways = {"all masks": 0.05, "masks over 0.5": 0.5}
predicted, inference_times = {}, {name: [] for name in ways}
for _ in range(5):
    for name, threshold in ways.items():
        begun = now()
        (predicted[name],) = predict(pretrained, [picture], device, score_threshold=threshold)
        inference_times[name].append(1e3 * (now() - begun))
bars({k: statistics.median(v[1:]) for k, v in inference_times.items()}, "milliseconds for an image")

# %% [markdown]
# The detections above the threshold are the same, up to rounding: the convolutions get fewer boxes at a time.

# %% tags=["nbval-ignore-output"]
every, cut = predicted.values()
keep = every["scores"] >= 0.5
print(f"{keep.sum()} of {len(keep)} detections score 0.5 or more")
atol = 1e-3 if device.type == "cpu" else 2e-2  # TF32 on a GPU
torch.testing.assert_close(every["masks"][keep], cut["masks"], rtol=0, atol=atol)

# %% [markdown]
# Evaluation needs all of them, pasted. `evaluate` compares masks only inside their boxes, without run-length encoding
# (notebook [06](06_evaluating_detections.ipynb)). Most of the time that is left is the model's.
#
# ## All together
#
# This function makes a loader with the library's sampler. Its `part` is what `split_dataset` or `Subset` has cut out of
# a `PennFudanDataset`:

# %%
def grouped_loader(part, batch_size, num_windows=5):
    sizes = [part.dataset.get_height_and_width(index) for index in part.indices]
    ratios = [width / height for height, width in sizes]
    sampler = AspectRatioBatchSampler(ratios, batch_size, num_windows)
    pin = torch.cuda.is_available()
    return DataLoader(part, batch_sampler=sampler, collate_fn=collate_fn, pin_memory=pin)


# %% [markdown]
# The loop around it is notebook 02's `train_one_epoch`, which reads the losses once an epoch. AdamW in its
# `fused` form is one call for all parameters. We time an epoch of a few batches, first with the classic loop, then with
# ours. (So few batches make one window.)

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import train_one_epoch

classic_model = build_model(MultiScaleRoIAlign)
classic_sgd = torch.optim.SGD(classic_model.parameters(), lr=1e-4, momentum=0.9)
fast_few = Subset(kept, train_set.indices[: len(few)])
fast_loader = grouped_loader(fast_few, BATCH_SIZE, num_windows=1)
fast_adamw = torch.optim.AdamW(fast_model.parameters(), lr=1e-4, fused=True)
[fast_few[index] for index in range(len(fast_few))]  # decoded once
step(classic_model, classic_sgd, batch)  # a warm-up
step(fast_model, fast_adamw, batch)
begun = now()
for batch in loader:
    step(classic_model, classic_sgd, batch)
middle = now()
train_one_epoch(fast_model, fast_adamw, fast_loader, device, progress=False)
whole_epoch = {"classic": middle - begun, "ours": now() - middle}
print({name: f"{value:.1f} s" for name, value in whole_epoch.items()})

# %% [markdown]
# A few batches give a noisy answer. The benchmark took 100 steps of each line in turn, on batches that were in
# memory. Each line has the changes of those above it:

# %%
print(f"{'a training step':32}{'seconds':>8}{'times as fast':>15}")
for name, value in one["steps"].items():
    print(f"{name:32}{value:8.3f}{one['classic'] / value:15.2f}")
print(f"\n{one['device']}, {one['threads']} thread, torch {one['torch']}, {one['date']}")

# %% [markdown]
# Not every change helps. The loop with fused AdamW also checks that gradients are finite, and is slower than classic's
# with SGD. The memory format `channels_last` was timed against the library's loop:

# %%
row = rows["channels_last_cpu"]
print(f"{row['classic']:.3f} s without, {row['ours']:.3f} s with channels_last: {row['ratio']:.2f} times as fast")

# %% [markdown]
# ## More images, more objects
#
# Does the time grow faster than the data? `python -m tools.benchmarks.growth` measured it on small synthetic images. MB
# are memory on top of what Python and PyTorch need. An exponent of 1 is linear, 2 would be quadratic, and 0 does not grow:

# %%
from itertools import groupby

growth = json.loads((results / "growth.json").read_text())
print(f"{'':26}{'number':>8}{'seconds':>10}{'MB':>8}")
for name, group in groupby(growth["rows"], lambda row: row["series"]):
    for row in group:
        print(f"{name:26}{row['number']:8}{row['seconds']:10.2f}{row['bytes'] / 1e6:8.0f}")
    slopes = growth["exponents"][name]
    print(f"{'  exponent':34}{slopes['seconds']:10.2f}{slopes['bytes']:8.2f}")
print(f"\n{row['device']}, {row['threads']} thread, torch {row['torch']}, {row['date']}")

# %% [markdown]
# ## What helped AP
#
# Speed buys more epochs. What else moves AP? `python -m tools.benchmarks.recipes` trains as notebook 04 does at `laptop`,
# and again with one thing changed, with three seeds each. Validation AP is the mean of the last three epochs. Test AP is
# that of the epoch with the best validation mask AP. The pairs are box and mask AP:


# %%
def print_recipes(rows):
    print(f"{'':49}{'seeds':>7}{'epochs':>8}{'val':>13}{'test':>14}{'min':>6}")
    for row in rows:
        val, test = (f"{row[f'{part}_box_AP']:.3f} / {row[f'{part}_mask_AP']:.3f}" for part in ("val", "test"))
        seeds, minutes = ", ".join(map(str, row["seeds"])), row["seconds"] / 60
        print(f"{row['change']:49}{seeds:>7}{row['epochs']:8}{val:>15}{test:>15}{minutes:5.1f}")
    print(f"\n{row['device']}, {row['threads']} thread, torch {row['torch']}, {row['date']}, beside other work")


recipes = json.loads((results / "recipes.json").read_text())["rows"]
print_recipes([row for row in recipes if "older" not in row])

# %% [markdown]
# The classic recipe differs in many things, the other lines in one. Starting from the mean gained more box AP than batches
# of 2. Person is one of the weights' seven classes, but leaving it out of the mean lost nothing. (The backbone had seen
# people all the same.) Batches of 4 keep the learning rate, and take half as many steps.
#
# The lines below are how we got there. They are older, and most have one seed. All have random new predictors, and most
# change one thing of a line above. The learning rate is 1e-3 unless the line says 5e-4, and 1.5e-3 with Copy-Paste:

# %%
print_recipes([row for row in recipes if "older" in row])

# %% [markdown]
# Pre-trained heads gained the most. Larger images, another rate for the trunk, trainable BatchNorm, and zooming and
# cropping showed no clear gain. Test box AP of the classic runs above differs by 0.08 between seeds. So read only large
# differences.

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
# - Reading a number from a GPU makes Python wait for it. The library's loop reads one number in each step: whether the
#   loss is finite. It keeps the losses on the device until the epoch ends. Detection models read numbers of their own
#   in every step, so this is one among many.
# - A clock in a notebook also counts what PyTorch does once: choosing kernels, reserving memory. Leave the first
#   round out.
# - Several single-threaded processes:
#   `python -m torch.distributed.run --nproc-per-node 2 -m tutorial_lib.train` (notebook 04).
# - A training on the CPU takes and returns memory for large tensors in every step. On Linux, where
#   `/sys/kernel/mm/transparent_hugepage/enabled` says `[madvise]`, `THP_MEM_ALLOC_ENABLE=1` lets [PyTorch take it
#   in pages of 2 MB](https://github.com/pytorch/pytorch/pull/107697) instead of 4 kB. Set it in the environment
#   before Python starts. The line "large pages" above is what it gained there.
# - A smaller `min_size` means fewer pixels everywhere. Notebook [09](09_anchors_and_backbones.ipynb) measures what it
#   gains, and what it costs in AP.
#
# ## Further reading
#
# - PyTorch's [performance tuning guide](https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html)
#   and [profiler recipe](https://docs.pytorch.org/tutorials/recipes/recipes/profiler_recipe.html).
# - [Automatic mixed precision](https://docs.pytorch.org/docs/stable/amp.html).
#
# **Next:** back to your own data, with notebook [01](01_dataset.ipynb) for what a target has to hold, and
# [04](04_penn_fudan_mask_rcnn.ipynb) for the whole run.
