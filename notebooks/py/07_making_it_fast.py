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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/torchvision-detection-tutorial/blob/main/notebooks/07_making_it_fast.ipynb)
#
# You start from the loop that most tutorials use, see where its time goes, and change one thing after
# the other until you arrive at the library's loop.

# %% [markdown]
# ## What you'll do
#
# - put a clock on each part of the classic loop;
# - look into one training step with PyTorch's profiler;
# - keep decoded images, leave out padding, choose the number of threads, compute in bfloat16, and measure what each is
#   worth;
# - paste only the masks that somebody looks at;
# - add it all up, beside a table that was measured with more patience.
#
# **You need** notebook [04](04_penn_fudan_mask_rcnn.ipynb), whose loop this one explains.
#
# | preset | measures | time |
# |---|---|---|
# | `quick` | `maskrcnn_mini_fpn` on drawn scenes | 60 s on one CPU core |
# | `laptop` | the same on photographs | 1.1 min on one CPU core |
# | `full` | `maskrcnn_resnet50_fpn` on photographs | not measured yet: it needs a CUDA card |

# %% [markdown]
# ## Set-up
#
# The notebooks import a small library, `tutorial_lib`. This cell installs it where
# it is missing, as on Colab, and leaves PyTorch as it is.

# %% tags=["set-up"]
import importlib.util

ADDRESS = "https://github.com/YOUR_ACCOUNT/torchvision-detection-tutorial"
if importlib.util.find_spec("tutorial_lib") is None:
    packages = f"tutorial_lib@git+{ADDRESS} pycocotools kornia-rs"
    get_ipython().run_line_magic("pip", f"install -q --no-deps {packages}")

# %% [markdown]
# The preset, as in notebook 01. Times differ from machine to machine, and from minute to minute on a machine
# that does other things too; what counts are ratios, of works that were timed side by side.

# %% tags=["nbval-ignore-output"]
import os

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler talks about itself otherwise
import torch

import tutorial_lib.models  # registers the small models with torchvision
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
# Float32, SGD, images decoded from disk whenever they are asked for, and every loss read after every step.
# A card works on while Python goes ahead, so a clock has to wait for it:

# %%
import time


def now():
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


# %%
from torch.utils.data import DataLoader, Subset
from torchvision.models import get_model

from tutorial_lib.models import replace_box_predictor, replace_mask_predictor
from tutorial_lib.penn_fudan import PennFudanDataset, collate_fn, split_dataset
from tutorial_lib.transforms import get_transform

from_disk = PennFudanDataset(root, get_transform(train=True))
train_set, _, _ = split_dataset(from_disk, preset.split, SEED)
few = Subset(train_set, range(BATCHES * preset.batch_size))
loader = DataLoader(few, preset.batch_size, collate_fn=collate_fn)


def build_model():
    torch.manual_seed(SEED)
    sizes = {"min_size": preset.min_size[-1], "max_size": preset.max_size}
    model = get_model(preset.mask_rcnn, weights=preset.weights, **sizes)
    return replace_mask_predictor(replace_box_predictor(model, 2), 2).to(device)


# %% [markdown]
# Each part of the loop stops its clock before the next one begins:

# %%
from itertools import pairwise

from tutorial_lib.engine import to_device

model = build_model().train()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
seconds = {"data": 0.0, "forward": 0.0, "backward": 0.0, "update": 0.0}
model(*to_device(*next(iter(loader)), device))  # the first round is slower
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
assert seconds["forward"] + seconds["backward"] > seconds["update"]

# %% [markdown]
# Forward and backward are where the time is. What a gain elsewhere is worth can be read here before anything
# is changed: if data are a tenth of a step, no trick with data can save more than a tenth. (On a fast card it is the
# other way round: the step shrinks, decoding does not.)
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


step(model, optimizer, batch)
with profile(activities=activities) as profiler:
    step(model, optimizer, batch)

# %%
events = [  # of operations; on a card their kernels are listed, too
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
# Names that end in `_backward` belong to the backward pass. Convolutions and their gradients are the most of it on a CPU,
# and RoIAlign's gradient follows. The first are what processors have special instructions for.

# %%
names = [event.key for event in largest]
assert device.type != "cpu" or any("conv" in name for name in names)

# %% [markdown]
# ## Data: decode once
#
# A PNG file is decompressed and its mask taken apart in every epoch. With `in_memory=True` the data set keeps what it
# has decoded, as uint8; conversion to float and augmentation still happen every time, since they
# should differ from epoch to epoch.

# %%
in_memory = PennFudanDataset(root, get_transform(train=True), in_memory=True)
indices = range(8)
per_sample = {}
for name, dataset in {"from disk": from_disk, "in memory": in_memory}.items():
    rounds = []
    for _ in range(4):
        torch.manual_seed(SEED)
        begun = now()
        [dataset[index] for index in indices]
        rounds.append((now() - begun) / len(indices))
    per_sample[name] = min(rounds[1:])
figure, axes = plt.subplots(figsize=(6, 1.4), layout="constrained")
bars = axes.barh(list(per_sample), [1e3 * value for value in per_sample.values()])
axes.bar_label(bars, fmt="%.1f", padding=3)
axes.set(xlabel="milliseconds a sample")
axes.margins(x=0.15)
axes.invert_yaxis()
plt.show()
assert per_sample["in memory"] < per_sample["from disk"]

# %% [markdown]
# It fits for data sets of a few thousand images. For more, `num_workers` of the `DataLoader` decode while the model
# computes; that helps where there are cores to spare, so with a card.
#
# ## Padding: images of one shape in a batch
#
# The images of a batch become one tensor: the model scales each until its shorter side is `min_size`, and pads all of them to
# the widest and the tallest. It computes on the padding as on the rest. How much of the batches is that?

# %%
plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
plain_train, _, _ = split_dataset(plain, preset.split, SEED)
shapes = [plain.get_height_and_width(index) for index in plain_train.indices]
ratios = [width / height for height, width in shapes]


def share_of_padding(sampler):
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
# padding, but nearly the same images meet in every epoch:

# %%
from tutorial_lib.penn_fudan import AspectRatioBatchSampler

torch.manual_seed(SEED)
padding = {}
for num_windows in (len(ratios) // preset.batch_size, 5, 1):
    sampler = AspectRatioBatchSampler(ratios, preset.batch_size, num_windows)
    padding[f"{num_windows} window(s)"] = share_of_padding(sampler)
figure, axes = plt.subplots(figsize=(6, 1.7), layout="constrained")
bars = axes.barh(list(padding), [100 * share for share in padding.values()])
axes.bar_label(bars, fmt="%.0f %%", padding=3)
axes.set(xlabel="padding, in percent of the pixels that are computed")
axes.margins(x=0.15)
axes.invert_yaxis()
plt.show()
most, *_, least = padding.values()
assert least < most

# %% [markdown]
# Whether AP stays is a question for whole trainings. `python -m tests.benchmarks.windows` asked it in a clone of this project:
# notebook 04's finetuning with three seeds each, on drawn scenes (`quick`: 10 batches an epoch, 10 epochs) and on photographs
# (`laptop`: 25 batches an epoch, 4 epochs), on a CPU:

# %%
import json
from itertools import groupby
from pathlib import Path

from tutorial_lib.coco_eval import mean_and_spread

results = Path("../tests/benchmarks/results")
in_clone = (results / "windows.json").exists()
rows = json.loads((results / "windows.json").read_text())["rows"] if in_clone else []
if not rows:
    print("the table is in the project's repository: clone it to see it here")
print(f"{'preset':8}{'windows':>8}{'box AP':>16}{'mask AP':>16}")
for key, group in groupby(rows, lambda row: (row["preset"], row["num_windows"])):
    runs = list(group)
    print(f"{key[0]:8}{key[1]:8}", end="")
    for name in ("box_AP", "mask_AP"):
        mean, spread = mean_and_spread([run[name] for run in runs])
        print(f"{mean:8.3f} ± {spread:.3f}", end="")
    print()

# %% [markdown]
# In these rows, five windows leave both APs on photographs within the spread of the seeds. On the drawn scenes, a single window, so nearly
# the same ten batches in every epoch, costs 0.07 mask AP, and five windows 0.03. The library's default is five, and
# `tutorial_lib.train` uses it; notebook 04 shuffles plainly.
#
# ## Threads: not always more
#
# On a CPU, PyTorch shares each operation out among threads, one for each core. They wait for each
# other at the end of every operation; if another program uses one of the cores, all wait for it. So
# the library's `pick_num_threads` does not guess: it times the work that you give it and sets the best number.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import pick_num_threads

by_threads = pick_num_threads(lambda: step(model, optimizer, batch))
for number, value in by_threads.items():
    print(f"{number} thread(s): {value:.2f} s a step")
assert torch.get_num_threads() == min(by_threads, key=by_threads.get)

# %% [markdown]
# ## bfloat16, where the processor has it
#
# Notebook 04's `use_bfloat16` puts the backbone and the heads under autocast. To compare, both models take the same
# steps, one after the other, so that whatever else the machine does disturbs both:

# %% tags=["nbval-ignore-output"]
import statistics

from tutorial_lib.engine import use_bfloat16

fast_model = build_model().train()
changed = use_bfloat16(fast_model, device)
models = {"float32": (model, optimizer)}
models["bfloat16"] = (
    fast_model,
    torch.optim.SGD(fast_model.parameters(), lr=1e-4, momentum=0.9),
)
step_times = {name: [] for name in models}
for _ in range(5):
    for name, pair in models.items():
        begun = now()
        step(*pair, batch)
        step_times[name].append(now() - begun)
per_step = {name: statistics.median(times[1:]) for name, times in step_times.items()}
print("bfloat16" if changed else "no fast bfloat16 here: the same work twice")
print({name: f"{value:.2f} s a step" for name, value in per_step.items()})

# %% [markdown]
# What does it cost? The losses of the same batch, from the same weights and the same seed (with rounded scores,
# other proposals may be drawn):

# %% tags=["nbval-ignore-output"]
exact, rounded = build_model().train(), build_model().train()
use_bfloat16(rounded, device)
compared = {}
for name, candidate in {"float32": exact, "bfloat16": rounded}.items():
    torch.manual_seed(SEED)
    with torch.no_grad():
        losses = candidate(*to_device(*batch, device))
    compared[name] = sum(losses.values()).item()
    print(f"{name}: loss {compared[name]:.4f}")
assert abs(compared["bfloat16"] / compared["float32"] - 1) < 0.1

# %% [markdown]
# Where the device has bfloat16 the two differ in some digit, and elsewhere they are the same. Whether AP suffers is a question for whole trainings and several
# seeds; the spread that notebook 05 found is the yardstick.
#
# ## Inference: masks of what somebody looks at
#
# Mask R-CNN predicts a mask for each of up to 100 detections and pastes it into a picture of full size, and most of these
# detections have a score so low that nobody wants them. The model's own threshold, `roi_heads.score_thresh`, is 0.05, which
# evaluation needs. `predict` raises it to the one asked for while it predicts, so the mask branch sees fewer boxes. What is above the
# threshold is the same:

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
torch.testing.assert_close(whole["masks"][keep].cpu(), cut["masks"], rtol=0, atol=1e-3)

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
# The same thought makes evaluation fast. `evaluate` compares the 28 × 28 masks inside their boxes, without pasting and without
# run-length encoding, and keeps the IoUs alone (notebook 05).
#
# ## All together
#
# An epoch of a few batches, as it was and as it is now, one after the other: classic data and step, then the
# library's `train_one_epoch` on samples in memory, in batches of similar shapes (of so few images all are sorted). With small
# images on a processor without bfloat16 there is little to gain here, and chance may even turn the order.

# %% tags=["nbval-ignore-output"]
from tutorial_lib.engine import train_one_epoch

fast_set, _, _ = split_dataset(in_memory, preset.split, SEED)
fast_few = Subset(fast_set, range(BATCHES * preset.batch_size))
similar = AspectRatioBatchSampler(ratios[: len(fast_few)], preset.batch_size, 1)
fast_loader = DataLoader(fast_few, batch_sampler=similar, collate_fn=collate_fn)
[fast_few[index] for index in range(len(fast_few))]  # decoded once
fast_optimizer = torch.optim.AdamW(fast_model.parameters(), lr=1e-4, fused=True)
begun = now()
for batch in loader:
    step(model, optimizer, batch)
middle = now()
train_one_epoch(fast_model, fast_optimizer, fast_loader, device, progress=False)
whole_epoch = {"classic": middle - begun, "ours": now() - middle}
print({name: f"{value:.1f} s" for name, value in whole_epoch.items()})

# %% [markdown]
# ## Measured with patience
#
# A few batches give a noisy answer. The project's benchmark times samples, steps and predictions many times, the classic way and
# ours in turn, and long works (an epoch, an evaluation) once, and `tests/benchmarks/results/speed.json` keeps what it found and on what.
# In a clone, `python -m tests.benchmarks.speed` makes it anew; with a card, also the works on CUDA.

# %%
in_clone = (results / "speed.json").exists()
rows = json.loads((results / "speed.json").read_text())["rows"] if in_clone else []
if not rows:
    print("the table is in the project's repository: clone it to see it here")
print(f"{'work':24}{'preset':8}{'classic':>10}{'ours':>10}{'ratio':>7}")
for row in rows:
    print(
        f"{row['work']:24}{row.get('preset', ''):8}{row['classic']:8.4f} s"
        f"{row['ours']:8.4f} s{row['ratio']:7.2f}"
    )

# %% [markdown]
# `sample_…` is one image with its target; `train_step_…` and `inference_…` are those of this notebook, with the whole
# preset's images. `epoch_…` is an epoch of training and the evaluation of the test images, data included. `training_cpu` is two
# epochs of training, the mean of two rounds: the classic loop beside `tutorial_lib.train` with a process for each core, four images a step both.
# `evaluator_N` is N images with 100 detections each; `_pasted` gives both evaluators full-size masks.
#
# The others put a single change beside the library's loop without it: `aspect_ratio_…` batches of similar shapes, `channels_last_…`
# that memory format, `large_pages_…` large pages of memory (below, under "In practice"), and `two_processes_…` two
# processes of one thread in place of one with two. Where the ratio is under 1 the change made it slower, and the library leaves it out.
#
# Only what was timed in turn, samples, steps and predictions, is sure to a few percent. Epochs and the trainings of `two_processes_…` and `large_pages_…` were
# timed once, one way after the other, and the machine was not equally fast all the time: the library's own step took 0.99 s in the row `train_step_cpu` and 1.44 s in
# `channels_last_cpu`, within half an hour.

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
bars = axes.barh([row["work"] for row in rows], [row["ratio"] for row in rows])
axes.bar_label(bars, fmt="%.1f", padding=3)
axes.axvline(1, color="black", linewidth=1)
axes.set(xscale="log", xlabel="how many times as fast as the classic way", xticks=[])
axes.minorticks_off()
axes.margins(x=0.1)
axes.invert_yaxis()
plt.show()
print(*sorted({f"{row['device']}, torch {row['torch']}" for row in rows}), sep="\n")

# %% tags=["results", "nbval-ignore-output"]
{"train_step_ratio": round(per_step["float32"] / per_step["bfloat16"], 2)}

# %% [markdown]
# ## Recap
#
# - **Measure** before you change anything, and side by side.
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
# - Reading a number from a card makes Python wait for it. The library's loop reads one a step, whether the loss is finite, and
#   keeps the losses on the device until the epoch ends. Detection models ask for numbers of their own in every step (how
#   many proposals are left?), so this is one among many.
# - Several processes with one thread each can be faster than one process with several threads, on a CPU too:
#   `python -m torch.distributed.run --nproc-per-node 2 -m tutorial_lib.train` (notebook 04).
# - A training on the CPU takes memory for large tensors and gives it back in every step, in small pages (4 kB on most machines). On Linux, where
#   `/sys/kernel/mm/transparent_hugepage/enabled` says `[madvise]`, the environment variable `THP_MEM_ALLOC_ENABLE=1`
#   lets [PyTorch take large tensors in pages of 2 MB](https://github.com/pytorch/pytorch/pull/107697). PyTorch reads it at its first
#   tensor; `import tutorial_lib` sets it, unless you have set it yourself. `large_pages_cpu` in the table is what it is worth on the machine there.
# - A smaller `min_size` often gains more than all of the above; notebook 03 measures what it costs in AP.
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
