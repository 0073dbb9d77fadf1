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
# # Train on your own data: from a folder to a detector in use
#
# You have a folder of images and their annotations. Here they become a detector that you can save, run on a
# folder, and run without PyTorch. For your own data, change one cell: the settings.
#
# ## What you'll do
#
# - convert annotations to one COCO file, and check them;
# - choose sizes, split and augmentation from the data;
# - train, and read a table by class;
# - use the detector: on a folder, in a fresh process, and as an ONNX file.
#
# **You need** notebook [01](01_dataset.ipynb), and [02](02_finetuning_a_predictor.ipynb) for the loop. On one CPU core it
# takes about 4 minutes. Nothing is downloaded. It runs on synthetic images, which are written out as a VOC folder first. They
# stand for your folder.

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
# ## Settings: the cell to change
#
# | `FORMAT` | `IMAGES` | `LABELS` |
# |---|---|---|
# | `"voc"` | a folder | the folder of XML files; `MASKS` is `SegmentationObject`, or None |
# | `"yolo"` | `…/images`, with `train`, `val` in it or not | `…/labels`, with the same folders |
# | `"labelme"` | the folder of images and JSON files | the same |
# | `"via"` | a folder | the JSON file |
# | `"instances"` | a folder | a folder of PNG masks: each number is an object |
# | `"semantic"` | a folder | a folder of PNG masks: each number is a class |
# | `"objects"` | a folder | a folder of PNG masks: a file for each object |
# | `"coco"` | a folder | the JSON file; `CATEGORIES` is not read |
#
# - **Categories** are your classes without the background. For YOLO keep the order of `names` in `data.yaml`.
# - **Model.** Take `maskrcnn_…` where your objects have masks or polygons, else `fasterrcnn_…`. The `…_mini_fpn` models train on
#   a CPU. With a GPU take `maskrcnn_resnet50_fpn`, `MIN_SIZE` 800, `MAX_SIZE` 1333, a batch of 2 and a learning rate of 1e-4.
# - **Sizes.** An image is resized to a shorter side of `MIN_SIZE` pixels. `MAX_SIZE` limits the longer side. Choose them so that most
#   objects are wider than 16 pixels after that. A section below plots it. Twice the size costs four times the time.
# - **Epochs.** A few hundred images need 10 to 20. With 50 images take 30 or more. With thousands, 5 may do.
# - **Batch and learning rate** belong together: half the batch, half the rate. If memory is short, halve both. Hundreds of objects
#   in an image take much memory, too.
# - **Memory.** `IN_MEMORY` keeps images and masks decoded. A photograph of 12 megapixels with 8 masks takes 130 MB. So reduce such
#   photographs to twice `MAX_SIZE` before you annotate, or set it to False.

# %%
from pathlib import Path

from tutorial_lib.presets import data_folder

ROOT = data_folder() / "street_voc"  # or Path("/home/me/my_data")
FORMAT = "voc"
IMAGES, LABELS, MASKS = ROOT / "JPEGImages", ROOT / "Annotations", ROOT / "SegmentationObject"
CATEGORIES = ["car", "dog", "sign"]
ONE_BASED = None  # for VOC: True or False where the corners are known

MODEL, WEIGHTS = "maskrcnn_mini_fpn", "DEFAULT"
MIN_SIZE, MAX_SIZE = (256,), 512
EPOCHS, BATCH_SIZE, LEARNING_RATE = 12, 2, 5e-4
IN_MEMORY, FLIP, COLOUR = True, True, True

SHARES, SEED = {"val": 0.15, "test": 0.15}, 0
SPLIT = {}  # or {"train": "train", "val": "val"}: folders in IMAGES, or Path("train.txt"), a list of image names


def group_of(file_name):
    """Images of one group stay in one part. Here each image is a group of its own."""
    return file_name


# %% [markdown]
# `group_of` keeps near-duplicates together. If your names look like `patient7_slice3.png`, return
# `file_name.split("_")[0]`. Then no patient is in two parts.
#
# ## A folder to try it on
#
# With your own folder in `ROOT`, this cell does nothing. Otherwise it writes 100 synthetic street scenes, with three of their classes
# annotated as VOC has them. `JPEGImages` holds the images, `Annotations` an XML file for each, and `SegmentationObject` a mask for each
# object.

# %%
import numpy as np
from PIL import Image

from tutorial_lib.convert import from_masks, to_voc
from tutorial_lib.offline.sample import draw_scene

if ROOT.name == "street_voc" and not LABELS.exists():
    IMAGES.mkdir(parents=True, exist_ok=True)
    MASKS.mkdir(exist_ok=True)
    names = []
    for i in range(100):
        scene, ids, found = draw_scene(np.random.default_rng([5, i]), others=(2, 6))
        is_kept = np.isin(["", *found], CATEGORIES)
        scene.save(IMAGES / f"street_{i:03}.jpg", quality=95)
        Image.fromarray((np.cumsum(is_kept) * is_kept).astype(np.uint8)[ids]).save(MASKS / f"street_{i:03}.png")
        names += [name for name in found if name in CATEGORIES]
    example = from_masks(IMAGES, MASKS, "instances")
    example["categories"] = [{"id": i, "name": name} for i, name in enumerate(CATEGORIES, 1)]
    for annotation, name in zip(example["annotations"], names, strict=True):
        annotation["category_id"] = CATEGORIES.index(name) + 1
    to_voc(example, LABELS)

# %% [markdown]
# ## Convert to COCO
#
# Every format becomes a COCO file first. COCO has one list of images, one of annotations and one of categories. Boxes are
# `[x, y, width, height]` in pixels. If something cannot be converted, a warning names it, or an error names the file.
#
# Some formats count pixels from 1, some from 0. The original VOC files count from 1, most tools from 0. `from_voc` looks at the boxes to
# decide, and warns if it had to guess. `ONE_BASED` in the settings overrides it.

# %%
import json

from tutorial_lib import convert

if FORMAT == "coco":
    coco = json.loads(Path(LABELS).read_text(encoding="utf-8-sig"))
elif FORMAT == "voc":
    coco = convert.from_voc(LABELS, IMAGES, CATEGORIES, one_based=ONE_BASED, masks=MASKS)
elif FORMAT == "yolo":
    coco = convert.from_yolo(LABELS, IMAGES, CATEGORIES)
elif FORMAT == "labelme":
    coco = convert.from_labelme(LABELS, CATEGORIES)
elif FORMAT == "via":
    coco = convert.from_via(LABELS, IMAGES, CATEGORIES)
else:  # masks
    coco = convert.from_masks(IMAGES, LABELS, FORMAT, CATEGORIES)

print(len(coco["images"]), "images,", len(coco["annotations"]), "annotations")
print(coco["images"][0])
print({key: value for key, value in coco["annotations"][0].items() if key != "segmentation"})

# %% [markdown]
# ## Read and check
#
# `CocoDataset` reads any COCO file, also those that CVAT, Label Studio or Roboflow export. Its labels are 1 to N, in the order of the
# file's category ids. 0 is the background.

# %%
from tutorial_lib.coco import CocoDataset
from tutorial_lib.transforms import get_transform

with_masks = MODEL.startswith("maskrcnn")
if with_masks and not any(annotation.get("segmentation") for annotation in coco["annotations"]):
    raise ValueError(f"No object has a mask: set MODEL to {MODEL.replace('mask', 'faster')}")

plain = CocoDataset(IMAGES, coco, get_transform(train=False), in_memory=IN_MEMORY, masks=with_masks)
categories = plain.categories
print(categories)
image, target = plain[0]
print(image.shape, {key: getattr(value, "shape", value) for key, value in target.items()})

# %% [markdown]
# `check_dataset` reads every sample, and looks for errors that stop training or spoil it. It also counts the objects of each class.

# %%
from tutorial_lib.checks import check_dataset

check_dataset(plain, num_classes=len(categories), progress=len(plain) > 200).raise_for_errors()

# %% [markdown]
# The check cannot see that a dog is labelled as a car. You can. Look at many images:

# %%
import matplotlib.pyplot as plt

from tutorial_lib.visualization import show

some = [plain[i] for i in range(min(6, len(plain)))]
show([image for image, _ in some], [target for _, target in some], categories=categories, cell=(3, 2.4))
plt.show()

# %% [markdown]
# ## How large are the objects?
#
# What counts is the size in the resized image. The first feature map has a location every 4 pixels. An object under 16 pixels
# covers few of them, and a detector misses many such objects.

# %%
sizes, counts = [], []
for i in range(len(plain)):
    height, width = plain.get_height_and_width(i)
    scale = min(MIN_SIZE[-1] / min(height, width), MAX_SIZE / max(height, width))
    boxes = plain.get_target(i)["boxes"]
    sizes += ((boxes[:, 2:] - boxes[:, :2]).amin(dim=1) * scale).tolist()
    counts.append(len(boxes))

print(f"{np.mean(np.array(sizes) < 16):.0%} of the objects are under 16 pixels after resizing")
print(f"objects in an image: {min(counts)} to {max(counts)}, median {np.median(counts):.0f}")

# %%
plt.figure(figsize=(6, 2.6))
plt.hist(sizes, bins=30)
plt.axvline(16, color="black", linestyle="--")
plt.xlabel("shorter side of the object after resizing, in pixels")
plt.ylabel("objects")
plt.show()

# %% [markdown]
# If much lies left of the line, raise `MIN_SIZE` and `MAX_SIZE`. If memory does not allow that, cut the images into tiles.
#
# ## Split
#
# If you have a split already, name its parts in `SPLIT`. A part that is not named is sampled at random, in whole groups. A split that
# tears groups apart, such as the frames of a video, tests on images that the model has nearly seen. Its AP is too high.

# %%
import random

names = plain.file_names


def members(source):
    """The images of a list file, with or without suffix, or of a folder in IMAGES."""
    if not Path(source).is_file():
        return {i for i, name in enumerate(names) if name.startswith(f"{source}/")}
    lines = {line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines()}
    found = {i for i, name in enumerate(names) if {name, str(Path(name).with_suffix("")), Path(name).stem} & lines}
    print(f"{source}: {len(lines - {''})} names, {len(found)} images found")
    return found


parts = {part: members(source) for part, source in SPLIT.items()}
pool = parts.pop("train", set(range(len(names)))) - set().union(*parts.values())
groups = sorted({group_of(names[i]) for i in pool})
random.Random(SEED).shuffle(groups)
sizes = {part: max(1, round(share * len(groups))) for part, share in SHARES.items() if part not in parts}
for part, size in sizes.items():
    chosen, groups = set(groups[:size]), groups[size:]
    parts[part] = {i for i in pool if group_of(names[i]) in chosen}
    pool -= parts[part]

# %%
train, val, test = sorted(pool), sorted(parts["val"]), sorted(parts["test"])
print(len(train), "training,", len(val), "validation and", len(test), "test images; in no part:",
      len(names) - len(train) - len(val) - len(test))
assert val and test and not set(val) & set(test), "SPLIT and SHARES have to fill val and test, with different images"
assert len(train) >= BATCH_SIZE, f"BATCH_SIZE {BATCH_SIZE} is more than the {len(train)} training images"

# %% [markdown]
# ## Augment, with care
#
# An augmentation must not change what an image means. Set `FLIP = False` where left and right matter: text, traffic signs, hands.
# Set `COLOUR = False` where the colour tells the classes apart: ripe and unripe fruit, stained cells.
#
# An `iscrowd` annotation covers a group of objects. The evaluation handles it. torchvision's models would learn it as one object. So
# training leaves it out.

# %%
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from tutorial_lib.data import collate_fn

augment = [v2.RandomHorizontalFlip(p=0.5)] * FLIP + [v2.RandomPhotometricDistort(p=0.5)] * COLOUR
to_model = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
augmented = CocoDataset(
    IMAGES, coco, v2.Compose(augment + to_model), in_memory=IN_MEMORY, masks=with_masks, crowds=False
)
train_loader = DataLoader(Subset(augmented, train), BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=collate_fn)
val_loader = DataLoader(Subset(plain, val), BATCH_SIZE, collate_fn=collate_fn)
test_loader = DataLoader(Subset(plain, test), BATCH_SIZE, collate_fn=collate_fn)

# %% [markdown]
# ## Model
#
# In notebook 02 the pre-trained model could be measured before any training, since COCO has people. Your classes are
# your own. In the new predictors each starts as the mean of the old classes, so there is nothing to measure yet. All the
# rest is trained.

# %%
from torchvision.models import get_model

from tutorial_lib.engine import pick_device, use_bfloat16
from tutorial_lib.models import replace_predictors
from tutorial_lib.presets import fetch_weights

device = pick_device()
torch.manual_seed(SEED)
fetch_weights(MODEL, WEIGHTS)
model = get_model(MODEL, weights=WEIGHTS, min_size=MIN_SIZE, max_size=MAX_SIZE)
replace_predictors(model, len(categories)).to(device)
in_bfloat16 = use_bfloat16(model, device)

# %% [markdown]
# ## Train
#
# The loop is that of notebook 02. After each epoch it measures validation AP, and keeps the best epoch. The checkpoint holds what
# a fresh process needs to build the same model: its name, the categories and the sizes. All that this run writes goes into a new
# folder, `RUN`.

# %%
from datetime import datetime

from tutorial_lib.checkpoint import save_checkpoint
from tutorial_lib.engine import evaluate, train_one_epoch, warmup_cosine

parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
schedule = warmup_cosine(optimizer, len(train_loader), EPOCHS * len(train_loader))
RUN = ROOT.parent / "runs" / datetime.now().strftime("own-%Y%m%d-%H%M%S")
about = {"name": MODEL, "categories": categories, "min_size": MIN_SIZE, "max_size": MAX_SIZE}

# %% tags=["nbval-ignore-output"]
losses, aps = [], []
for epoch in range(1, EPOCHS + 1):
    loss = train_one_epoch(model, optimizer, train_loader, device, lr_scheduler=schedule, progress=False)["loss"]
    results = evaluate(model, val_loader, device, progress=False)
    ap = (results.mask or results.box).AP or 0.0
    if ap >= max(aps, default=0):
        best_epoch = epoch
        save_checkpoint(RUN / "best.pt", model=model, epoch=epoch, **about)
    losses.append(loss)
    aps.append(ap)
    print(f"epoch {epoch}/{EPOCHS}  loss {loss:.3f}  validation AP {ap:.3f}")

# %%
from tutorial_lib.visualization import plot_history

plot_history([{"training": losses}, {"validation": aps}], ["loss", "AP"], best=best_epoch)
plt.show()

# %% [markdown]
# ## Which class works?
#
# The mean over classes hides the class that fails. The table has a row for each. `threshold` is the score threshold with the best F1 on
# these images. Take it as a start, until you know what each kind of error costs you (notebook [06](06_evaluating_detections.ipynb)).
# The table is of the validation images: a threshold that was chosen on the test images would flatter the test result.

# %%
from tutorial_lib.predict import load_detector

best, categories = load_detector(RUN / "best.pt", device)
val_results = evaluate(best, val_loader, device, progress=False)
test_results = evaluate(best, test_loader, device, progress=False)

# %% tags=["nbval-ignore-output"]
from IPython.display import Markdown

from tutorial_lib.coco_eval import class_table


def as_markdown(rows):
    lines = [rows[0].keys(), ["---"] * len(rows[0])]
    lines += [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


as_markdown(class_table(val_results.mask or val_results.box, categories))

# %% [markdown]
# AP of a class with few objects is shaky. More images of the worst class help more than more epochs.
#
# The test AP is measured once, for the report:

# %% tags=["nbval-ignore-output", "results"]
numbers = {"box_AP": test_results.box.AP, "box_AP50": test_results.box.AP50}
if test_results.mask:
    numbers |= {"mask_AP": test_results.mask.AP, "mask_AP50": test_results.mask.AP50}
numbers

# %%
from tutorial_lib.engine import predict

pictures = [plain[i][0] for i in test[:3]]
show(pictures, predict(best, pictures, device, score_threshold=0.5), categories=categories, cell=(3, 2.4))
plt.show()

# %% [markdown]
# ## Predict a folder
#
# Six test images stand for new ones. `predict_folder` writes `predictions.json` as COCO's tools read it, `predictions.csv` for a
# spreadsheet, and a picture of each image. It keeps detections from 0.5. For a threshold by class, set it to the lowest and filter the
# table.

# %% tags=["nbval-ignore-output"]
import shutil

from tutorial_lib.predict import predict_folder

new_images = RUN / "new_images"
new_images.mkdir()
for i in test[:6]:
    shutil.copy(IMAGES / names[i], new_images)
predict_folder(best, categories, new_images, RUN / "predictions", device=device, progress=False)
print(*(RUN / "predictions" / "predictions.csv").read_text(encoding="utf-8").splitlines()[:6], sep="\n")

# %% [markdown]
# ## In a fresh process
#
# The same from a terminal. The checkpoint is all that the command needs.

# %%
import subprocess
import sys

command = [sys.executable, "-m", "tutorial_lib.predict", RUN / "best.pt", "--images", new_images, "--out", RUN / "again"]
subprocess.run(command, check=True, timeout=600, capture_output=True)
again, before = (json.loads((RUN / name / "predictions.json").read_text()) for name in ("again", "predictions"))
assert len(again) == len(before)
print("the fresh process detects the same number of objects")

# %% [markdown]
# ## Out of PyTorch: ONNX
#
# `export_onnx` writes the model with its resizing and its NMS, for images of any size. Then it runs the file with
# `onnxruntime`, and compares. The numbers are the largest differences: of boxes in pixels, of scores, and of masks at a single pixel.

# %% tags=["nbval-ignore-output"]
if importlib.util.find_spec("onnxruntime") is None:
    get_ipython().run_line_magic("pip", "install -q onnx==1.22.* onnxruntime")  # a newer onnx changes Colab's protobuf

from tutorial_lib.export import export_onnx

export_onnx(best, RUN / "model.onnx", pictures, categories=categories)

# %% [markdown]
# Beside the file lies a script that runs it without PyTorch. It needs `onnxruntime`, `numpy` and `pillow`. This is all of it:

# %%
script = RUN / "model_run.py"
print(script.read_text(encoding="utf-8"))

# %% tags=["nbval-ignore-output"]
photo = sorted(new_images.iterdir())[0]
ran = subprocess.run([sys.executable, script, photo], check=True, timeout=600, capture_output=True, text=True)
print(ran.stdout)

# %% [markdown]
# ## As a script
#
# For a long training, leave the notebook. The command below does the same with the same parts and settings. It goes on after an
# interruption if you add `--resume`. It also writes the log of all epochs and the table by class.

# %% tags=["nbval-ignore-output"]
import os
import shlex

for part, indices in {"train": train, "val": val, "test": test}.items():
    ids = {coco["images"][i]["id"] for i in indices}
    images = [coco["images"][i] for i in indices]
    annotations = [annotation for annotation in coco["annotations"] if annotation["image_id"] in ids]
    (RUN / f"{part}.json").write_text(json.dumps({**coco, "images": images, "annotations": annotations}))

options = f"--model {MODEL} --max-size {MAX_SIZE} --epochs {EPOCHS} --batch-size {BATCH_SIZE} --learning-rate {LEARNING_RATE}"
options += f" --min-size {' '.join(map(str, MIN_SIZE))}" + " --no-flip" * (not FLIP) + " --no-colour" * (not COLOUR)
images, *files = [os.path.relpath(path) for path in (IMAGES, RUN / "train.json", RUN / "val.json", RUN / "test.json")]
print(shlex.join(["python", "-m", "tutorial_lib.train", "--images", images, "--annotations", *files]))
print(f"    {options} --export --out runs/first")
print("This run has left:", *sorted(path.name for path in RUN.iterdir()))

# %% [markdown]
# ## Recap
#
# - **Convert** to COCO first, and read what is said to be left out.
# - **Check**, and look at many images.
# - **Choose** sizes by the objects in the resized image.
# - **Split** so that near-duplicates stay together.
# - **Read** AP by class, and take the score threshold from validation.
# - **Compare** the ONNX file with PyTorch.

# %% [markdown]
# ## On your own
#
# 1. Put your own folder into the settings, and run all cells.
#    <details><summary>Hint</summary>Begin with 2 epochs. If the table by class shows anything over 0, your data are read correctly.</details>
# 2. Train on boxes only. How much faster is an epoch, and what happens to box AP?
#    <details><summary>Hint</summary><code>MODEL = "fasterrcnn_mini_fpn"</code> and <code>MASKS = None</code>.</details>
# 3. Halve the training images. Which class loses most?
#    <details><summary>Hint</summary><code>train = train[::2]</code> after the split.</details>
#    <details><summary>Solution</summary>Run from the split on, and compare the tables by class. Do it with three seeds before you believe the order.</details>

# %% [markdown]
# ## In practice
#
# - With 15 images in a part, AP is noisy: here validation and test are far apart. Notebook 06 measures such intervals.
# - Images without objects are worth having, if your detector will see such images. They teach what is no object.
# - A mask with a pixel value for each class (not each object) is `FORMAT = "semantic"`. It is cut into connected pieces, so objects that
#   touch become one.
# - Several classes of which one is very rare: report its AP with its number of objects. With three objects, AP is an anecdote.
# - The heads of the mini models were trained on synthetic street scenes, like this example. So its AP says nothing about your data.
#
# ## Further reading
#
# - COCO's [data format](https://cocodataset.org/#format-data).
# - [The PASCAL VOC development kit](http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html), for its annotations.
# - [ONNX Runtime in Python](https://onnxruntime.ai/docs/get-started/with-python.html).
#
# **Next:** [06, evaluate detections](06_evaluating_detections.ipynb).
