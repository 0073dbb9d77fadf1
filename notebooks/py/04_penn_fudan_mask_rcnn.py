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
# You run the whole job once, as for a result that you report. You train a model for masks of pedestrians,
# choose the epoch on validation images, and measure once on test images.

# %% [markdown]
# ## What you'll do
#
# - replace both predictors of a Mask R-CNN, for boxes and for masks;
# - train it, keep the best epoch, and go on after an interruption;
# - look at its masks, good and bad;
# - measure it once, beside zero-shot and a published result;
# - take the whole program with you, in one cell.
#
# **You need** [01](01_dataset.ipynb) and [02](02_finetuning_a_predictor.ipynb).
#
# | preset | model | epochs | time |
# |---|---|---|---|
# | `quick` | `maskrcnn_mini_fpn`, 4.5 M parameters, 192 pixels | 14 | 2 min on one CPU core |
# | `laptop` | the same, 208 to 320 pixels | 10 | 6 min on one CPU core |
# | `full` | `maskrcnn_resnet50_fpn`, 44.4 M, 800 pixels | 10 | a GPU; without one, 3 epochs on smaller images, 21 minutes on two CPU cores |

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
# The next cell turns the preset into plain constants. `full` takes torchvision's Mask R-CNN with a
# ResNet-50. `quick` and `laptop` take a small model with the same parts. Its trunk was trained on ImageNet, the rest
# on other synthetic images. `quick` has synthetic images instead of the photographs. The device is CUDA where there is a GPU.
#
# `RUN` is the folder for the files of a training run. With `None` it is a new temporary folder each time,
# so that no old run goes on by accident. For a long run, name a folder that you keep (on Colab, in your
# Drive).

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
# As in notebook 01: a split by seed, and random flips and colours for the training images only.
# `in_memory=True` keeps the decoded images and masks in memory, about 1 MB for each photograph. A GPU copies batches
# sooner from pinned memory.

# %%
from torch.utils.data import DataLoader

from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

augmented = PennFudanDataset(root, get_transform(train=True), in_memory=True)
plain = PennFudanDataset(root, get_transform(train=False), in_memory=True)
train_set, _, _ = split_dataset(augmented, SPLIT, SEED, block=10)
_, val_set, test_set = split_dataset(plain, SPLIT, SEED, block=10)

pin_memory = device.type == "cuda"
options = {"batch_size": BATCH_SIZE, "collate_fn": collate_fn, "pin_memory": pin_memory}
train_loader = DataLoader(train_set, shuffle=True, drop_last=True, **options)
val_loader = DataLoader(val_set, **options)
test_loader = DataLoader(test_set, **options)

# %% [markdown]
# ## Before training
#
# `get_model` builds a model by its name, here `maskrcnn_resnet50_fpn(weights="DEFAULT", …)`. Its class 1 is
# "person", and so is ours. So we can ask it for people before training (notebook 02). Below are three
# validation images, with all detections that score at least 0.5, of any class:

# %%
import matplotlib.pyplot as plt
from torchvision.models import get_model, get_model_weights

from tutorial_lib.engine import predict
from tutorial_lib.visualization import show

sizes = {"min_size": MIN_SIZE, "max_size": MAX_SIZE}
pretrained = get_model(MODEL, weights=WEIGHTS, **sizes).to(device)
names = get_model_weights(MODEL)[WEIGHTS].meta["categories"]
images = [val_set[i][0] for i in range(3)]
zero_shot = predict(pretrained, images, device, score_threshold=0.5)
show(images, zero_shot, categories=names)
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
# Only the last of these layers depends on the number of classes. The first, a transposed convolution,
# doubles 14 × 14 to 28 × 28, and has learned about outlines. The library keeps it, and replaces only
# the last. As in notebook 02, new classes start as the mean of the old:

# %% tags=["copy-me"]
# Copy me: runs alone
# (tutorial_lib/models.py also checks the model and num_classes.)
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN


@torch.no_grad()
def replace_mask_predictor(model: MaskRCNN, num_classes: int) -> MaskRCNN:
    old = model.roi_heads.mask_predictor.mask_fcn_logits
    new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1).to(old.weight)
    for value, before in zip(new.parameters(), old.parameters(), strict=True):
        means = [before[1:].mean(dim=0)] * (num_classes - 1)
        value.copy_(torch.stack([before[0], *means]))  # 0 is the background
    model.roi_heads.mask_predictor.mask_fcn_logits = new
    return model


# %% [markdown]
# Do not forget this predictor. If every label is below the old number of classes, you see no error. Your
# class 1 then starts from the masks of the old class 1. A larger label raises an `IndexError` on a CPU.
#
# ## Mixed precision, where it does no harm
#
# GPUs since Ampere compute faster in bfloat16 than in float32, and so do CPUs with AVX-512 BF16 or AMX. But
# a bfloat16 number has only 8 significant bits, too few for the corner of a box:

# %%
import torch

print(torch.tensor([333.0, 701.0, 755.0]).to(torch.bfloat16).tolist())

# %% [markdown]
# So the library's `use_bfloat16` changes only the backbone and the heads, where nearly all of the
# arithmetic is. Where bfloat16 is not faster it changes nothing.
#
# One function builds the model, because a saved file has to be loaded into the same model. The file does
# not hold everything. torchvision sets some constants, such as BatchNorm's `eps`, according to the weights
# that you name.

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
# "Person" is now the mean of all classes. Below are the same images before training, with at most ten
# detections each:

# %%
untrained = predict(model, images, device, score_threshold=0.05)
show(images, [{k: v[:10] for k, v in prediction.items()} for prediction in untrained])
plt.show()

# %% [markdown]
# ## Train, and keep the best epoch
#
# Optimizer and learning rate are as in notebook 02. The rate rises during the first epoch, and then
# falls along a half cosine:

# %%
from tutorial_lib.engine import warmup_cosine

parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
steps = len(train_loader)
schedule = warmup_cosine(optimizer, warmup_steps=steps, total_steps=EPOCHS * steps)

# %% [markdown]
# After each epoch the validation images give a loss, a box AP and a mask AP. (torchvision's models give
# losses only in training mode. `validation_loss` uses that mode, and changes nothing in the model.) The
# cell writes two files. It writes `last.pt` after every epoch, with all that is needed to go on. It writes
# the model to `best.pt` when the mask AP is the best so far.
#
# **Interrupted?** Set `RUN` to the folder that the training cell printed, and run the notebook from the top
# in a new kernel. The cell finds `last.pt`, and goes on after the last whole epoch. The file also holds the
# states of the random generators. So on a CPU, with the same number of threads, the weights end up the same
# as without the interruption, to the last bit. (A test of this project checks it.)
#
# A folder is for one run: with other settings, the cell asks for another folder.

# %%
import tempfile

folder = Path(RUN or tempfile.mkdtemp(prefix="run-"))
LAST, BEST = folder / "last.pt", folder / "best.pt"
parts = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
settings = [MODEL, MIN_SIZE, MAX_SIZE, EPOCHS, BATCH_SIZE, LEARNING_RATE, SPLIT, SEED]

# %% tags=["nbval-ignore-output"]
from tutorial_lib.checkpoint import resume, save_checkpoint
from tutorial_lib.engine import evaluate, train_one_epoch, validation_loss

history, best_epoch, start = [], 0, 1
if LAST.exists():  # an interrupted run goes on after its last whole epoch
    state = resume(LAST, **parts)
    assert state["settings"] == settings, "other settings need another RUN"
    history, best_epoch = state["history"], state["best_epoch"]
    start = len(history) + 1
print(f"epochs {start} to {EPOCHS}, in {folder}")

for epoch in range(start, EPOCHS + 1):
    loss = train_one_epoch(**parts, data_loader=train_loader, device=device)["loss"]
    row = {"loss": loss, "val_loss": validation_loss(model, val_loader, device)}
    val = evaluate(model, val_loader, device)
    history.append({**row, "box AP": val.box.AP, "mask AP": val.mask.AP})
    if not best_epoch or val.mask.AP > history[best_epoch - 1]["mask AP"]:
        best_epoch = epoch
        save_checkpoint(BEST, model=model, epoch=epoch)
    state = {"history": history, "best_epoch": best_epoch, "settings": settings}
    save_checkpoint(LAST, **parts, **state)
    numbers = (f"{name} {value:.3f}" for name, value in history[-1].items())
    print(f"epoch {epoch:2}", *numbers, sep="  ")

# %% [markdown]
# ## Look at the masks
#
# The best epoch goes from its file into a *new* model. On the validation images it must have the same AP
# as in training:

# %%
from tutorial_lib.checkpoint import load_checkpoint

best = build_model()
best.load_state_dict(load_checkpoint(BEST)["model"])
again = evaluate(best, val_loader, device, progress=False).mask.AP
assert abs(again - history[best_epoch - 1]["mask AP"]) < 0.005  # a GPU may round

images = [val_set[i][0] for i in range(6)]
show(images, predict(best, images, device, score_threshold=0.5))
plt.show()

# %% [markdown]
# `load_checkpoint` reads with `weights_only=True`, which blocks pickled code. Even so, load only files that
# you trust.
#
# ## The curves

# %%
from tutorial_lib.visualization import plot_history

curves = {name: [row[name] for row in history] for name in history[0]}
loss_curves = {"training": curves["loss"], "validation": curves["val_loss"]}
ap_curves = {"box": curves["box AP"], "mask": curves["mask AP"]}
labels = ["loss", "AP on validation"]
plot_history([loss_curves, ap_curves], labels, best=best_epoch)
plt.show()

# %% [markdown]
# When the training loss falls and the validation loss rises, the model learns the training images by heart.
# AP and validation loss need not turn at the same epoch. AP asks whether boxes fit and are ranked well. The
# loss also asks how sure the model is.
#
# ## Where it fails
#
# For every person, take the detection whose mask overlaps best. Which image has the lowest mean overlap?
# (The overlap is the IoU of masks, as in mask AP.)


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
predictions = [predict(best, [image], device)[0] for image, _ in samples]
pairs = zip(samples, predictions, strict=True)
overlaps = [mean_mask_iou(target, prediction) for (_, target), prediction in pairs]
worst = overlaps.index(min(overlaps))
image, target = samples[worst]
titles = ["target", "prediction"]
show([image] * 2, [target, predictions[worst]], titles, columns=2, cell=(5.5, 4))
plt.show()

# %% [markdown]
# ## The test images, once
#
# No test image has been looked at so far. Now three models are measured on them: the pre-trained one, the
# best epoch and the last. Nothing is chosen here. The interval says how far mask AP would move with other images of the
# same kind (a bootstrap, notebook [06](06_evaluating_detections.ipynb)):

# %% tags=["nbval-ignore-output"]
from tutorial_lib.coco_eval import bootstrap_interval

models = {"zero-shot": pretrained, f"epoch {best_epoch}, best on validation": best}
models[f"epoch {EPOCHS}, the last"] = model
results = {name: evaluate(each, test_loader, device) for name, each in models.items()}

print(made_with)
print(f"{'':30}{'box AP':>8}{'mask AP':>9}   95 % of mask AP")
for name, (box, mask) in [(n, (r.box, r.mask)) for n, r in results.items()]:
    low, high = bootstrap_interval(mask)
    print(f"{name:30}{box.AP:8.3f}{mask.AP:9.3f}   {low:.3f} to {high:.3f}")

# %% [markdown]
# Compare the test AP with the validation AP of the same epoch. The validation AP is too good, because it
# chose the epoch. But 20 photographs are few, so chance can hide this. The split keeps neighbours in file
# order in one part (notebook 01). On other streets the model may do worse.
#
# torchvision's own tutorial has box AP .828 and mask AP .768, as
# [stored at commit e17510c](https://github.com/pytorch/vision/blob/e17510c0686f74b34511425076ece59a95b4ebe4/tutorials/torchvision_finetuning_instance_segmentation.ipynb).
# (Its output breaks off in the sixth of ten epochs, so we quote the fifth.) At `full` the model and its
# weights are the same. These things differ:
#
# - **Test photographs:** theirs are 50 too, but only 16 are the same. Many of theirs have a neighbour in
#   training.
# - **Boxes:** theirs end a pixel too early, at the right and at the bottom.
# - **Training photographs:** theirs are 120. Ours are 100, and 20 for validation.
# - **Epoch:** they measure every epoch on the test photographs.
# - **Training:** theirs uses SGD in float32. The rate starts at 0.005, and is divided by ten after every
#   three epochs. They flip images, but do not distort colours. Their new predictors
#   are random, and replace the whole mask predictor.

# %% tags=["results", "nbval-ignore-output"]
finetuned = results[f"epoch {best_epoch}, best on validation"]
{"box_AP": round(finetuned.box.AP, 4), "mask_AP": round(finetuned.mask.AP, 4)}

# %% [markdown]
# ## A picture of your own
#
# Put a photograph beside this notebook, and write its name here. Until then you see a validation image.

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
# `PennFudanPed`, and run it. Without that folder it only defines `main`. To stay short, it splits image by
# image, and chooses the epoch by the validation loss. It has no test images and no `last.pt`.

# %% tags=["copy-me"]
# Copy me: runs alone
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import ops, tv_tensors, utils
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.transforms import v2
from tqdm import tqdm

NUM_CLASSES = 2  # your classes and the background


class Pedestrians(Dataset):
    def __init__(self, root, train):
        self.paths = sorted(Path(root, "PNGImages").glob("*.png"))
        flip = [v2.RandomHorizontalFlip()] if train else []
        convert = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        self.transforms = v2.Compose(flip + convert)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        image = tv_tensors.Image(Image.open(path).convert("RGB"))
        mask_path = path.parents[1] / "PedMasks" / f"{path.stem}_mask.png"
        mask = v2.functional.pil_to_tensor(Image.open(mask_path))
        ids = mask.unique()  # 0 is the background, k the pixels of person k
        masks = (mask == ids[ids > 0][:, None, None]).to(torch.uint8)
        image, masks = self.transforms(image, tv_tensors.Mask(masks))
        boxes = ops.masks_to_boxes(masks)
        boxes[:, 2:] += 1  # masks_to_boxes gives the last pixel, not the edge after it
        labels = torch.ones(len(masks), dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "masks": masks}


def get_mask_rcnn():
    model = maskrcnn_resnet50_fpn(weights="DEFAULT")
    heads = model.roi_heads
    in_features = heads.box_predictor.cls_score.in_features
    heads.box_predictor = FastRCNNPredictor(in_features, NUM_CLASSES)
    in_channels = heads.mask_predictor.conv5_mask.in_channels
    heads.mask_predictor = MaskRCNNPredictor(in_channels, 256, NUM_CLASSES)
    return model


def collate(batch):
    return tuple(zip(*batch, strict=True))


def loss_of(model, images, targets, device):
    images = [image.to(device) for image in images]
    targets = [{k: v.to(device) for k, v in target.items()} for target in targets]
    return sum(model(images, targets).values())


@torch.no_grad()
def mean_loss(model, dataset, device):
    model.train()  # the mode that gives losses; this model's BatchNorm is frozen
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)  # the same random proposals each time
        losses = [loss_of(model, *collate([pair]), device).item() for pair in dataset]
    return sum(losses) / len(losses)


def main(root, epochs=10, batch_size=2, learning_rate=1e-4):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    order = torch.randperm(len(Pedestrians(root, train=False))).tolist()
    train_set = Subset(Pedestrians(root, train=True), order[len(order) // 5 :])
    val_set = Subset(Pedestrians(root, train=False), order[: len(order) // 5])
    train_loader = DataLoader(train_set, batch_size, shuffle=True, collate_fn=collate)
    model = get_mask_rcnn().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    steps, best = len(train_loader), float("inf")
    schedule = torch.optim.lr_scheduler.LambdaLR(  # up in the first epoch, then down
        optimizer, lambda i: min((i + 1) / steps, 1 - i / (epochs * steps))
    )
    for epoch in range(1, epochs + 1):
        model.train()
        for images, targets in tqdm(train_loader, f"epoch {epoch}/{epochs}"):
            loss = loss_of(model, images, targets, device)
            assert loss.isfinite(), "lower the learning rate, or look at the boxes"
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        val_loss = mean_loss(model, val_set, device)
        print(f"epoch {epoch}/{epochs}  validation loss {val_loss:.3f}")
        if val_loss < best:
            best = val_loss
            torch.save(model.state_dict(), "best.pt")

    model = get_mask_rcnn().to(device).eval().requires_grad_(False)
    model.load_state_dict(torch.load("best.pt", map_location=device, weights_only=True))
    image, _ = val_set[0]
    (found,) = model([image.to(device)])
    masks = found["masks"][found["scores"] >= 0.5, 0].cpu() > 0.5
    masks &= masks.cumsum(0) == 1  # each pixel to the best mask that has it
    colors = ["red", "lime", "blue", "yellow", "magenta", "cyan"] * len(masks)
    picture = utils.draw_segmentation_masks(image, masks, 0.5, colors)
    utils.save_image(picture, "masks.png")


if __name__ == "__main__" and Path("PennFudanPed").is_dir():
    main("PennFudanPed")

# %% [markdown]
# ## Recap
#
# - **Replace** both predictors, and see which parameters are new.
# - **Save** after every epoch, so that an interruption costs one at most.
# - **Choose** the epoch on validation images, and look at the masks.
# - **Load** what you saved before you trust it.
# - **Measure** on the test images once, and say all that differs.

# %% [markdown]
# ## On your own
#
# 1. Show one image at the score thresholds 0.1, 0.5 and 0.9. What does each gain and lose?
#    <details><summary>Hint</summary><code>predict</code> takes <code>score_threshold</code>.</details>
#    <details><summary>Solution</summary><code>at = [predict(best, images[:1], device, t)[0] for t in (0.1, 0.5, 0.9)]</code>, then <code>show(images[:1] * 3, at)</code></details>
# 2. Interrupt the training in its third epoch, and go on.
#    <details><summary>Hint</summary>In the same kernel, run the training cell again. In a new one, set <code>RUN</code>.</details>
# 3. Double `MIN_SIZE` and `MAX_SIZE`. How do mask AP and the time of an epoch change?
#    <details><summary>Hint</summary>In the settings cell: <code>MIN_SIZE = tuple(2 * size for size in MIN_SIZE)</code>.</details>

# %% [markdown]
# ## In practice
#
# - This is one seed, and few test images. Notebook 06 measures the spread over seeds.
# - bfloat16 needs no loss scaling. The float16 of older GPUs does (`torch.amp.GradScaler`).
# - `tutorial_lib/train.py` is this run as a script, with a process for each GPU. With two processes, there
#   are half as many steps, each on twice as many images. So the numbers differ from those of one process:
#   `python -m torch.distributed.run --standalone --nproc-per-node 2 -m tutorial_lib.train --out runs/two`
#
# ## Further reading
#
# - [Mask R-CNN](https://arxiv.org/abs/1703.06870).
# - [torchvision's reference scripts for detection](https://github.com/pytorch/vision/tree/main/references/detection).
#
# **Next:** [05, train on your own data](05_your_own_data.ipynb), or [06, evaluate detections](06_evaluating_detections.ipynb), to
# see what these numbers do not show.
