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
# You run the whole job once, as for a result that you report: instance masks of pedestrians, the best
# epoch chosen on validation images, one look at the test images.

# %% [markdown]
# ## What you'll do
#
# - replace both predictors of a Mask R-CNN, for boxes and for masks;
# - train it, keep the best epoch, and go on after an interruption;
# - look at its masks, good and bad;
# - measure it once on the test images, beside zero-shot and a published result;
# - take the whole program with you, in one cell.
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
# The next cell turns the preset into plain constants. `full` takes torchvision's Mask R-CNN with a
# ResNet-50. `quick` and `laptop` take a small model with the same parts, which was trained before on
# synthetic street scenes. `quick` has synthetic images instead of the photographs.
#
# `RUN` is the folder for the files of the training. `None` makes a new temporary folder each time, so
# that no old run goes on by accident. For a long training, name a folder that you keep.

# %% tags=["nbval-ignore-output"]
from pathlib import Path

from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset, fetch_weights, prepare_data, provenance

RUN = None  # or a folder, as in Path("runs/first")
preset = choose_preset()
MODEL, WEIGHTS = preset.mask_rcnn, preset.weights
MIN_SIZE, MAX_SIZE = preset.min_size, preset.max_size
EPOCHS, BATCH_SIZE = preset.long_epochs, preset.batch_size
LEARNING_RATE, SPLIT, SEED = preset.learning_rate, preset.split, 0

device, root = pick_device(), prepare_data(preset)
fetch_weights(MODEL, WEIGHTS)
made_with = provenance(preset, device)
print(made_with)
print(f"{MODEL = }\n{WEIGHTS = }\n{MIN_SIZE = }\n{MAX_SIZE = }\n{EPOCHS = }")
print(f"{BATCH_SIZE = }\n{LEARNING_RATE = }\n{SPLIT = }\n{SEED = }\n{RUN = }")

# %% [markdown]
# ## Data
#
# As in notebook 01: a split by seed, with random flips and colours for the training images only.
# `in_memory=True` keeps every decoded image, about 1 MB for each photograph, so that no file is read twice.

# %%
from torch.utils.data import DataLoader

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

augmented = PennFudanDataset(root, get_transform(train=True), in_memory=True)
plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
train_set, _, _ = split_dataset(augmented, SPLIT, SEED)
_, val_set, test_set = split_dataset(plain, SPLIT, SEED)

options = {"batch_size": BATCH_SIZE, "collate_fn": collate_fn}
train_loader = DataLoader(train_set, shuffle=True, drop_last=True, **options)
val_loader = DataLoader(val_set, **options)
test_loader = DataLoader(test_set, **options)

# %% [markdown]
# ## Before training
#
# `get_model` builds a model by its name, here `maskrcnn_resnet50_fpn(weights="DEFAULT", …)`. COCO's
# class 1 is "person", and so is ours. So we can ask the model before we train it, as in notebook 02.
# Three validation images, with what it detects at a score of at least 0.5:

# %%
import matplotlib.pyplot as plt
from torchvision.models import get_model

from tutorial_lib.engine import predict
from tutorial_lib.visualization import show

sizes = {"min_size": MIN_SIZE, "max_size": MAX_SIZE}
pretrained = get_model(MODEL, weights=WEIGHTS, **sizes).to(device)
images = [val_set[i][0] for i in range(3)]
show(images, predict(pretrained, images, device, score_threshold=0.5))
plt.show()

# %% [markdown]
# ## Two predictors to replace
#
# Two parts of Mask R-CNN know the number of classes.
# [`FastRCNNPredictor`](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/faster_rcnn.py)
# gives scores and boxes, as in notebook 02.
# [`MaskRCNNPredictor`](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/mask_rcnn.py)
# gives a mask of 28 × 28 for each class. Most texts replace both as a whole:

# %%
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

NUM_CLASSES = 2  # background and person
heads = get_model(MODEL, weights=WEIGHTS).roi_heads
in_features = heads.box_predictor.cls_score.in_features
heads.box_predictor = FastRCNNPredictor(in_features, NUM_CLASSES)
in_channels = heads.mask_predictor.conv5_mask.in_channels
heads.mask_predictor = MaskRCNNPredictor(in_channels, 256, NUM_CLASSES)
print(*dict(heads.mask_predictor.named_children()))

# %% [markdown]
# Of these layers, only the last depends on the number of classes. The first, a transposed convolution,
# doubles 14 × 14 to 28 × 28, and has learned about outlines. The library keeps it, and replaces only
# the last layer:

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
# Do not forget this predictor. As long as every label is below the old number of classes, training runs
# without an error, and your class 1 starts from the masks of the old class 1. A larger label stops it
# with an `IndexError`.
#
# ## Mixed precision, where it does no harm
#
# GPUs since Ampere compute faster in bfloat16 than in float32. So do some CPUs, those with AVX-512 BF16
# or AMX. But a bfloat16 number has only 8 significant bits, too few for the corner of a box:

# %%
import torch

print(torch.tensor([333.0, 701.0, 755.0]).to(torch.bfloat16).tolist())

# %% [markdown]
# So the library's `use_bfloat16` changes only the backbone and the heads, which do nearly all of the
# arithmetic. Boxes and losses stay in float32. On a device that is not faster in bfloat16 it does nothing.
#
# One function builds the model, because we need the same model again when we load a file. A state dict
# does not hold everything: torchvision sets some constants, such as BatchNorm's `eps`, by the weights
# that you ask for.

# %%
from tutorial_lib.engine import use_bfloat16
from tutorial_lib.models import replace_box_predictor


def build_model():
    model = get_model(MODEL, weights=WEIGHTS, **sizes)
    replace_box_predictor(model, NUM_CLASSES)
    replace_mask_predictor(model, NUM_CLASSES).to(device)
    use_bfloat16(model, device)
    return model


torch.manual_seed(SEED)
model = build_model()
old = dict(pretrained.named_parameters())
new = [n for n, p in model.named_parameters() if not torch.equal(p, old[n])]
print("new:", *new, sep="\n  ")

# %% [markdown]
# These layers are random now. The same images again, with the ten detections of the highest score:

# %%
found = predict(model, images, device, score_threshold=0.05)
show(images, [{name: value[:10] for name, value in p.items()} for p in found])
plt.show()

# %% [markdown]
# ## Train, and keep the best epoch
#
# The optimizer and the learning rate are as in notebook 02. The rate rises during the first epoch, and
# then falls along a half cosine:

# %%
from tutorial_lib.engine import warmup_cosine

parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
steps = len(train_loader)
schedule = warmup_cosine(optimizer, warmup_steps=steps, total_steps=EPOCHS * steps)

# %% [markdown]
# After each epoch the validation images give a loss, a box AP and a mask AP. Two files are written:
#
# - `last.pt` after every epoch, with all that is needed to go on;
# - `best.pt` when the validation mask AP is the best so far, with the model.
#
# **Interrupted?** Set `RUN` to the folder that the next cell printed, restart the kernel, and run the
# notebook from the top. The loop finds `last.pt` and goes on after the last whole epoch. The file also
# holds the states of the random generators. So on a CPU with the same number of threads the weights at
# the end are the same, to the last bit, as without the interruption. A test of this project kills such
# a run to check it.
#
# A folder is for one run. With other settings, the cell stops and asks for another folder.

# %%
import tempfile

folder = Path(RUN or tempfile.mkdtemp(prefix="run-"))
LAST, BEST = folder / "last.pt", folder / "best.pt"
settings = [MODEL, MIN_SIZE, MAX_SIZE, EPOCHS, BATCH_SIZE, LEARNING_RATE, SPLIT, SEED]

# %% tags=["nbval-ignore-output"]
from tutorial_lib.checkpoint import resume, save_checkpoint
from tutorial_lib.engine import evaluate, train_one_epoch, validation_loss

history, best_epoch, start = [], 0, 1
if LAST.exists():  # a run that was interrupted: go on
    state = resume(LAST, model=model, optimizer=optimizer, lr_scheduler=schedule)
    assert state["settings"] == settings, f"{folder} has other settings: change RUN"
    history, best_epoch, start = (
        state["history"],
        state["best_epoch"],
        state["epoch"] + 1,
    )
print(f"epochs {start} to {EPOCHS}, in {folder}")

for epoch in range(start, EPOCHS + 1):
    losses = train_one_epoch(
        model, optimizer, train_loader, device, lr_scheduler=schedule
    )
    row = {
        "loss": losses["loss"],
        "val_loss": validation_loss(model, val_loader, device),
    }
    val = evaluate(model, val_loader, device)
    history.append({**row, "box AP": val.box.AP, "mask AP": val.mask.AP})
    if not best_epoch or val.mask.AP > history[best_epoch - 1]["mask AP"]:
        best_epoch = epoch
        save_checkpoint(BEST, model=model, epoch=epoch)
    kept = {
        "epoch": epoch,
        "history": history,
        "best_epoch": best_epoch,
        "settings": settings,
    }
    save_checkpoint(
        LAST, model=model, optimizer=optimizer, lr_scheduler=schedule, **kept
    )
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in history[-1].items())
    print(f"epoch {epoch:2}/{EPOCHS}  {numbers}{'  best' * (epoch == best_epoch)}")

# %% [markdown]
# ## Look at the masks
#
# The best epoch goes from its file into a *new* model. A file is good if it gives again what the model
# gave in training:

# %%
from tutorial_lib.checkpoint import load_checkpoint

best = build_model()
best.load_state_dict(load_checkpoint(BEST)["model"])
again = evaluate(best, val_loader, device).mask.AP
assert abs(again - history[best_epoch - 1]["mask AP"]) < 0.005  # a GPU may round

images = [val_set[i][0] for i in range(6)]
show(images, predict(best, images, device, score_threshold=0.5))
plt.show()

# %% [markdown]
# `load_checkpoint` reads with `weights_only=True`, which blocks pickled code. Still, load only files
# that you trust.
#
# ## The curves

# %%
from tutorial_lib.visualization import plot_history

curves = {name: [row[name] for row in history] for name in history[0]}
losses = {"training": curves["loss"], "validation": curves["val_loss"]}
aps = {"box": curves["box AP"], "mask": curves["mask AP"]}
plot_history([losses, aps], ["loss", "AP on validation"], best=best_epoch)
plt.show()

# %% [markdown]
# If the training loss goes on falling and the validation loss rises, the model has begun to learn the
# training images by heart. AP and validation loss need not turn at the same epoch. AP asks whether
# boxes fit and are ranked well, the loss how sure the model is.
#
# ## Where it fails
#
# Of every person, take the detection whose mask overlaps best. Which image has the lowest overlaps, on
# average? Mask AP is computed from the same IoU.


# %%
def mean_mask_iou(target, prediction):
    masks = target["masks"].flatten(1).float()
    found = (prediction["masks"].flatten(1) > 0.5).float()
    if not len(found):
        return 0.0
    both = masks @ found.T
    either = masks.sum(1, keepdim=True) + found.sum(1) - both
    return (both / either).amax(dim=1).mean().item()


# %%
samples = [val_set[i] for i in range(len(val_set))]
found = [predict(best, [image], device)[0] for image, _ in samples]
overlaps = [mean_mask_iou(t, p) for (_, t), p in zip(samples, found, strict=True)]
worst = overlaps.index(min(overlaps))
image, target = samples[worst]
titles = ["target", "prediction"]
show([image] * 2, [target, found[worst]], titles, columns=2, cell=(5.5, 4))
plt.show()

# %% [markdown]
# ## The test images, once
#
# No test image has been looked at so far. Now three models meet them: the pre-trained one, the best epoch
# and the last epoch. Nothing is chosen by this table. The interval says how far mask AP would move with
# other test images of the same kind (a bootstrap, notebook [06](06_evaluating_detections.ipynb)):

# %% tags=["nbval-ignore-output"]
from tutorial_lib.coco_eval import bootstrap_interval

models = {"zero-shot": pretrained, f"epoch {best_epoch}, best on validation": best}
models[f"epoch {EPOCHS}, the last"] = model
print(made_with)
print(f"{'':30}{'box AP':>8}{'mask AP':>9}   95 % of mask AP")
for name, tested in models.items():
    results = evaluate(tested, test_loader, device)
    low, high = bootstrap_interval(results.mask)
    print(
        f"{name:30}{results.box.AP:8.3f}{results.mask.AP:9.3f}   {low:.3f} to {high:.3f}"
    )
    if tested is best:
        finetuned = results
print(f"{'torchvision, see below':30}{0.828:8.3f}{0.768:9.3f}")

# %% [markdown]
# Expect the test AP to be lower than validation AP. The epoch is the best of many on the validation
# photographs, and these are easier. None of their 50 people is small (a mask under 32² pixels), but 8 of
# the 133 test people are. And 40 of the 50 test photographs have a neighbour in file order among the
# training photographs, perhaps of the same scene. In streets of its own, the model will do worse.
#
# The last row is from torchvision's tutorial, as
# [stored at commit e17510c](https://github.com/pytorch/vision/blob/e17510c0686f74b34511425076ece59a95b4ebe4/tutorials/torchvision_finetuning_instance_segmentation.ipynb).
# Its output breaks off in the sixth of ten epochs; this is the fifth. At `full` the model and its weights
# are the same. All this is not:
#
# | | here | there |
# |---|---|---|
# | test photographs | 50 with 133 people | 50 with 119 people, one of them small; 15 are the same |
# | boxes | as wide as the mask | one pixel short at the right and at the bottom |
# | training | 100 photographs, 20 for validation | 120 photographs |
# | epoch | chosen on validation | each is measured on the test photographs |
# | augmentation | flips and colours | flips |
# | optimizer | AdamW, warm-up and cosine | SGD at 0.005, a tenth after every 3 epochs |
# | mask predictor | last layer new | new as a whole |
# | precision | bfloat16 where it is faster | float32 |

# %% tags=["results", "nbval-ignore-output"]
{"box_AP": round(finetuned.box.AP, 4), "mask_AP": round(finetuned.mask.AP, 4)}

# %% [markdown]
# ## A picture of your own
#
# Put a photograph beside this notebook, write its name here, and run the cell. Until then it
# takes a validation image.

# %%
from torchvision.transforms.v2.functional import to_dtype

from tutorial_lib.data import read_image

path = Path("my_photo.jpg")
if not path.exists():
    path = root / "PNGImages" / plain.file_names[val_set.indices[0]]
picture = to_dtype(read_image(path, "RGB"), torch.float32, scale=True)
show([picture], predict(best, [picture], device), columns=1, cell=(6, 5))
plt.show()

# %% [markdown]
# ## The whole program
#
# This cell needs PyTorch, torchvision and tqdm, and nothing of ours. Save it as a file beside the folder
# `PennFudanPed`, and run it. Without that folder, as here, it only defines `main`. To keep it short, it
# chooses the epoch by the validation loss and not by AP, has no test images, and cannot be resumed.

# %% tags=["copy-me"]
# Copy me: runs alone
import math
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

NUM_CLASSES = 2  # your classes and the background


class Pedestrians(Dataset):
    def __init__(self, root, train):
        self.paths = sorted(Path(root, "PNGImages").glob("*.png"))
        steps = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        self.transforms = v2.Compose(
            [v2.RandomHorizontalFlip(), *steps] if train else steps
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        image = tv_tensors.Image(Image.open(path).convert("RGB"))
        mask_path = path.parents[1] / "PedMasks" / f"{path.stem}_mask.png"
        mask = v2.functional.pil_to_tensor(Image.open(mask_path))
        ids = mask.unique()  # 0 is the background, k the pixels of person k
        masks = (mask == ids[ids > 0][:, None, None]).to(torch.uint8)
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1  # masks_to_boxes gives the last pixel, not the edge after it
        size = mask.shape[-2:]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.ones(len(masks), dtype=torch.int64),
            "masks": tv_tensors.Mask(masks),
        }
        return self.transforms(image, target)


def get_mask_rcnn():
    model = maskrcnn_resnet50_fpn(weights="DEFAULT")
    heads = model.roi_heads
    in_features = heads.box_predictor.cls_score.in_features
    heads.box_predictor = FastRCNNPredictor(in_features, NUM_CLASSES)
    in_channels = heads.mask_predictor.conv5_mask.in_channels
    heads.mask_predictor = MaskRCNNPredictor(in_channels, 256, NUM_CLASSES)
    return model


def loss_of(model, images, targets, device):
    images = [image.to(device) for image in images]
    targets = [{k: v.to(device) for k, v in target.items()} for target in targets]
    return sum(model(images, targets).values())


@torch.no_grad()
def mean_loss(model, loader, device):
    model.train()  # the mode that gives losses; this model's BatchNorm is frozen
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)  # the same random proposals each time
        return sum(loss_of(model, *batch, device).item() for batch in loader) / len(
            loader
        )


def main(root, epochs=10, batch_size=2, learning_rate=1e-4):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    train_set, val_set = Pedestrians(root, train=True), Pedestrians(root, train=False)
    order = torch.randperm(len(train_set)).tolist()
    held_out = max(1, len(order) // 5)
    train_set, val_set = (
        Subset(train_set, order[held_out:]),
        Subset(val_set, order[:held_out]),
    )
    collate = {"collate_fn": lambda batch: tuple(zip(*batch, strict=True))}
    train_loader = DataLoader(train_set, batch_size, shuffle=True, **collate)
    val_loader = DataLoader(val_set, **collate)

    model = get_mask_rcnn().to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    warmup, total = len(train_loader), epochs * len(train_loader)

    def factor(step):  # up during the first epoch, then down along a cosine
        return min((step + 1) / warmup, (1 + math.cos(math.pi * step / total)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    best = math.inf
    for epoch in range(1, epochs + 1):
        model.train()
        for images, targets in tqdm(train_loader, f"epoch {epoch}/{epochs}"):
            loss = loss_of(model, images, targets, device)
            if not loss.isfinite():
                raise FloatingPointError(
                    "lower the learning rate, or look at the boxes"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        val_loss = mean_loss(model, val_loader, device)
        print(f"epoch {epoch}/{epochs}  validation loss {val_loss:.3f}")
        if val_loss < best:
            best = val_loss
            torch.save(model.state_dict(), "best.pt")

    model = get_mask_rcnn().to(device).eval()
    model.load_state_dict(torch.load("best.pt", map_location=device, weights_only=True))
    image = val_set[0][0]
    with torch.inference_mode():
        (found,) = model([image.to(device)])
    masks = found["masks"][found["scores"] >= 0.5, 0].cpu() > 0.5
    v2.functional.to_pil_image(draw_segmentation_masks(image, masks)).save("masks.png")


if __name__ == "__main__" and Path("PennFudanPed").is_dir():
    main("PennFudanPed")

# %% [markdown]
# ## Recap
#
# - **Replace** both predictors, and see which parameters are new.
# - **Save** after every epoch, so that an interruption costs one epoch.
# - **Choose** the epoch on the validation images, and look at the masks.
# - **Load** what you saved into a new model before you trust it.
# - **Measure** on the test images once, and say all that differs when you compare.

# %% [markdown]
# ## On your own
#
# 1. Show one image at the score thresholds 0.1, 0.5 and 0.9. What does each gain and lose?
#    <details><summary>Hint</summary><code>predict</code> takes <code>score_threshold</code>.</details>
#    <details><summary>Solution</summary><code>at = [predict(best, images[:1], device, t)[0] for t in (0.1, 0.5, 0.9)]</code>, then <code>show([images[0]] * 3, at)</code>. A low threshold misses fewer people and has more false positives.</details>
# 2. Interrupt the training in its third epoch, and let it go on. Then do it without `RUN`.
#    <details><summary>Hint</summary>The training cell prints the folder, also of a temporary one.</details>
# 3. Double `MIN_SIZE` and `MAX_SIZE`. What do mask AP and the time of an epoch do?
#    <details><summary>Hint</summary>In the settings cell, below the preset's: <code>MIN_SIZE = tuple(2 * s for s in MIN_SIZE)</code>. It is another run, so it needs another folder.</details>

# %% [markdown]
# ## In practice
#
# - This is one seed, and few test images. Notebook 06 measures the spread over seeds.
# - bfloat16 needs no loss scaling. GPUs before Ampere have only float16, which does need it
#   (`torch.amp.GradScaler`). On those the notebook runs in float32.
# - A mask is predicted as 28 × 28 and stretched to its box. In a large box, thin parts such as a stick are
#   missing, whatever the training.
# - `tutorial_lib/train.py` is this run as a script, for one GPU or several. PyTorch's launcher starts one
#   process for each. Two processes make half as many steps, each on twice the images, so the numbers
#   are not those of one process:
#   `python -m torch.distributed.run --standalone --nproc-per-node 2 -m tutorial_lib.train --out runs/two`
#
# ## Further reading
#
# - [Mask R-CNN](https://arxiv.org/abs/1703.06870).
# - [torchvision's reference scripts for detection](https://github.com/pytorch/vision/tree/main/references/detection).
# - [Automatic mixed precision in PyTorch](https://docs.pytorch.org/docs/stable/amp.html).
#
# **Next:** [06, evaluate detections](06_evaluating_detections.ipynb), to know what these numbers forgive.
