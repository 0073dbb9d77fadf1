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
# # Fix it when it breaks: the errors that people search for
#
# Look up your message in the index. Each entry gives the fix, the cause, and the shortest code that raises the
# message. Mistakes without a message have a second index. [`check_dataset`](#check) finds most mistakes of a dataset
# before training.
#
# ## What you'll do
#
# - find a message, its fix and its cause;
# - run the code that raises it, and the same code fixed;
# - check a whole dataset with one call.
#
# **You need** only what the set-up installs, and no data. All presets run the same small untrained model on synthetic
# images. It takes less than a minute on one CPU core.

# %% [markdown]
# ## The messages
#
# | message | entry |
# |---|---|
# | `operator torchvision::nms does not exist` | [installation](#nms) |
# | `Could not run 'torchvision::nms' with arguments from the 'CUDA' backend` | [installation](#nms) |
# | `Expected input images to be of floating type (in range [0, 1])` | [images](#floating) |
# | `The size of tensor a (4) must match the size of tensor b (3)` | [images](#channels) |
# | `images is expected to be a list of 3d tensors of shape [C, H, W]` | [images](#list) |
# | `stack expects each tensor to be equal size` | [loader](#stack) |
# | `each element in list of batch should be of equal size` | [loader](#stack) |
# | `Can't pickle local object`, `Can't get local object` | [workers](#workers) |
# | `Can't get attribute … on <module '__main__' (built-in)>` | [workers](#workers) |
# | `An attempt has been made to start a new process before the current process has finished its bootstrapping phase` | [workers](#workers) |
# | `DataLoader worker … is killed by signal: Bus error` | [workers](#workers) |
# | `Expected target boxes to be a tensor of shape [N, 4], got torch.Size([0])` | [no objects](#empty) |
# | `Dimension out of range (expected to be in range of [-1, 0], but got 1)` | [no objects](#empty) |
# | `KeyError: 'boxes'` | [no objects](#empty) |
# | `Expected target boxes to be of type Tensor, got <class 'list'>` | [targets](#type) |
# | `target labels must of int64 type, instead got torch.float32` | [targets](#type) |
# | `All bounding boxes should have positive height and width` | [box format](#positive); boxes from masks: [thin masks](#thin) |
# | `min(): Expected reduction dim to be specified for input.numel() == 0` | [empty masks](#thin) |
# | `index 2 is out of bounds for dimension 1 with size 2` | Keypoint R-CNN: [keypoints](#keypoints); Mask R-CNN: [predictors](#bounds) |
# | `Target 2 is out of bounds` | [labels](#bounds) |
# | `Target -1 is out of bounds` | [labels](#zero) |
# | `CUDA error: device-side assert triggered` | [labels](#bounds) |
# | `targets should not be none when in training mode` | [mode](#mode) |
# | `'list' object has no attribute 'values'` | [mode](#mode) |
# | `The parameter 'num_classes' expected value 91 but got 2 instead` | [model](#classes) |
# | `num_classes should be None when box_predictor is specified` | [model](#classes) |
# | `'RetinaNet' object has no attribute 'roi_heads'`, also `'SSD'`, `'FCOS'`, `'DataParallel'` | [model](#family) |
# | `backbone should contain an attribute out_channels` | [model](#channels-out) |
# | `There needs to be a match between the number of feature maps passed and the number of sizes / aspect ratios specified` | [model](#anchors) |
# | `Loss is nan, stopping training` | [training](#nan) |
# | `CUDA out of memory` | [training](#memory) |
# | `Results do not correspond to current coco set` | [pycocotools](#ids) |
# | `Average Precision … = -1.000` | [pycocotools](#minus-one) |
# | `size mismatch for roi_heads.box_predictor.cls_score.weight` | [loading](#mismatch) |
# | `Weights only load failed` | [loading](#weights-only) |
# | `Could not guard on data-dependent expression` | [export](#export) |
# | `Failed to export the model with torch.export` | [export](#export) |
# | `No module named 'onnxscript'`, `Module onnx is not installed!` | [export](#export) |
#
# Without a message:
#
# | what you see | entry |
# |---|---|
# | it learns nothing, or detects nothing | [labels from 0, or `num_classes=1`](#zero); [boxes in another format](#format); [pixels of 0 to 255](#floating) |
# | the images are white, or black | [pixel values](#white) |
# | the boxes stay where they were when the image is cropped, flipped or resized | [transforms](#apart) |
# | a class is never detected, or `num_classes` is far too high | [gaps, absent and rare classes](#absent) |
# | one box over several objects, a box as large as the image, or hundreds of boxes | [masks that are no instances](#instances) |
# | `loss_keypoint` is 0 | [keypoints](#keypoints) |
# | the loss was fine, and the weights are NaN | [gradients](#nan) |
# | a whole dataset to check | [check_dataset](#check) |
#
# ## Messages with a short answer
#
# One line is enough for each of these.
#
# | message | fix and cause | thread |
# |---|---|---|
# | `Expected all tensors to be on the same device` | Move the images and every tensor of the targets with `.to(device)`. A predictor that you replace after `model.to(device)` stays on the CPU: replace first, or move again. | [pytorch#61704](https://github.com/pytorch/pytorch/issues/61704) |
# | `Every element of targets should have a masks key` | Mask R-CNN trains on `masks` uint8 [N, H, W]. For boxes only, use Faster R-CNN. | |
# | `list indices must be integers or slices, not str` | Make one dict for each image. The target is still a list of annotations, as `CocoDetection` gives it. | [vision#1701](https://github.com/pytorch/vision/issues/1701) |
# | `Argument 'bb' has incorrect type (expected numpy.ndarray, got list)` | Remove polygons of two points from the file: pycocotools takes their four numbers for a box. `CocoDataset` names the annotations, and with `masks=False` reads only the boxes. | [cocoapi#139](https://github.com/cocodataset/cocoapi/issues/139), [#159](https://github.com/cocodataset/cocoapi/issues/159) |
# | `list index out of range` in `frPyObjects` | The file has `"segmentation": []`, as exporters write it for boxes only. Leave `"masks"` out of `target_keys`, or read it with `CocoDataset`. | [roboflow-python#161](https://github.com/roboflow/roboflow-python/issues/161) |
# | `Expected x_max for bbox … to be in the range [0.0, 1.0]` | albumentations: clip the boxes to the image first. One leaves it, often by rounding. | [albumentations#459](https://github.com/albumentations-team/albumentations/issues/459) |
# | `Expected to have finished reduction in the prior iteration` | Several processes: some parameters had no part in the loss. Freeze them with `requires_grad_(False)` before you wrap the model, or set `find_unused_parameters=True`. | [mmdetection#2153](https://github.com/open-mmlab/mmdetection/issues/2153) |
# | `No module named 'coco_utils'` | torchvision's `engine.py` was copied alone. Copy `coco_utils.py`, `coco_eval.py`, `utils.py` and `transforms.py`, too. | [vision#3630](https://github.com/pytorch/vision/issues/3630) |
# | `No module named 'torch._six'` | Your copy of `coco_eval.py` is older than your PyTorch. Copy the files again, from torchvision's tag of your version. | [pytorch#102410](https://github.com/pytorch/pytorch/issues/102410) |
# | `'numpy.float64' … cannot be safely interpreted as an integer` | Upgrade pycocotools: yours is too old for NumPy 1.18 or later. | [cocoapi#356](https://github.com/cocodataset/cocoapi/issues/356), [vision#1700](https://github.com/pytorch/vision/issues/1700) |
# | `KeyError: 'info'` | Add `"info": {}` to the ground truth, or upgrade pycocotools. 2.0.9 and 2.0.10 require that key, 2.0.11 does not. | [vision#9092](https://github.com/pytorch/vision/issues/9092) |
# | no message, AP 0 for a perfect detection | Count annotation ids from 1: pycocotools takes id 0 for "not matched" (notebook [06](06_evaluating_detections.ipynb)). | [vision#1530](https://github.com/pytorch/vision/issues/1530) |

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
# The device is the CPU, even where there is a GPU. A traceback from the CPU names the faulty line, and one from a GPU
# often does not.

# %% tags=["nbval-ignore-output"]
import torch
import torchvision

from tutorial_lib.presets import choose_preset

device = torch.device("cpu")
MODEL, MIN_SIZE, MAX_SIZE, SEED = "fasterrcnn_mini_fpn", 96, 128, 0
torch.manual_seed(SEED)
versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
print(f"preset {choose_preset().name} | synthetic images | {device} | {versions}")
print(f"{MODEL = }\n{MIN_SIZE = }\n{MAX_SIZE = }\n{SEED = }")

# %% [markdown]
# The model is a small Faster R-CNN for two classes, background and person. The image is noise with one bright
# rectangle, the "person". Nothing is wrong yet, so the model returns losses.
#
# Code that should fail stands in `with expect(...)`. It prints the message, and fails if there is none. Where the
# wording varies, it prints only the parts that we give it. Under `# Fixed` is the code to copy.
#
# Read a traceback from the bottom: first the message, then the lowest line in a file that **you** wrote. Look at what
# you passed there.

# %%
import contextlib
import textwrap

from torchvision.models import get_model


def new_model(num_classes=2):
    sizes = {"min_size": MIN_SIZE, "max_size": MAX_SIZE}
    return get_model(MODEL, weights=None, num_classes=num_classes, **sizes)


@contextlib.contextmanager
def expect(kind, *parts):
    try:
        yield
    except kind as error:
        message = " … ".join(parts) or str(error)
        assert all(part in str(error) for part in parts), error
        text = f"{type(error).__name__}: {message}"
        print(textwrap.fill(text, 88, break_on_hyphens=False))
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


image = 0.4 * torch.rand(3, 96, 128)
image[:, 20:80, 40:60] += 0.5
boxes, labels = torch.tensor([[40.0, 20, 60, 80]]), torch.tensor([1])
target = {"boxes": boxes, "labels": labels, "image_id": 7}
model = new_model()
print(*model([image], [target]))

# %%
# Four of the messages with a short answer.
from pycocotools.mask import frPyObjects

for copied in ("coco_utils", "torch._six"):
    with expect(ModuleNotFoundError):
        importlib.import_module(copied)
with expect(TypeError):
    frPyObjects([[40.0, 20, 60, 80]], 96, 128)
with expect(IndexError):
    frPyObjects([], 96, 128)

# %% [markdown]
# ## The installation
#
# <a id="nms"></a>
#
# ### `RuntimeError: operator torchvision::nms does not exist`, `Could not run 'torchvision::nms' with arguments from the 'CUDA' backend`
#
# **Fix.** Install both again with **one** command and from **one** index: `pip install --force-reinstall torch
# torchvision`. For older versions, follow the table in [torchvision's
# README](https://github.com/pytorch/vision#installation). On Colab, leave both as they are. `pip list` shows the
# versions even where `import torchvision` fails.
#
# **Cause.** torchvision's compiled part was built for another PyTorch. *First message:* it could not be loaded, so its
# operators are missing. Often torch was upgraded alone, or torch is `+cpu` and torchvision is not
# ([pytorch#122494](https://github.com/pytorch/pytorch/issues/122494),
# [vision#9085](https://github.com/pytorch/vision/issues/9085)). *Second message:* torch was built with CUDA, and
# torchvision without ([vision#3058](https://github.com/pytorch/vision/issues/3058)).
#
# The cell does what torchvision does at import, with an operator that does not exist.

# %%
with expect(RuntimeError):
    torch.library.register_fake("torchvision::nms_of_another_build")(lambda boxes: boxes)

two_alike = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
kept = torchvision.ops.nms(two_alike, torch.tensor([0.9, 0.8]), 0.5)
print("nms of this installation keeps", kept.tolist())

# %% [markdown]
# ## Images, and the loader that batches them
#
# <a id="floating"></a>
#
# ### `TypeError: Expected input images to be of floating type (in range [0, 1])`
#
# **Fix.** Use `to_dtype(image, torch.float32, scale=True)`, or `v2.ToDtype(torch.float32, scale=True)` in a transform.
# Both also divide by 255. `.float()` alone keeps 0 to 255, and **no message** says so.
#
# **Cause.** The image is still uint8, 0 to 255, as it was decoded
# ([hagrid#80](https://github.com/hukenovs/hagrid/issues/80)). Older versions gave NaN
# ([vision#3228](https://github.com/pytorch/vision/issues/3228)).
#
# <a id="white"></a>
#
# ### No message: images that are white, or black
#
# **Fix.** Scale the pixels to [0, 1] yourself. `read_image(path, "RGB")` of `tutorial_lib.data` scales such an image
# by its own minimum and maximum. If brightness means something in your data, divide all images by one number instead.
#
# **White.** The file has 16 bits a pixel, as from microscopes and X-ray. Pillow's `convert("RGB")` makes every value
# over 255 white ([Pillow#3011](https://github.com/python-pillow/Pillow/issues/3011),
# [pytorch#20524](https://github.com/pytorch/pytorch/issues/20524)).
#
# **Black.** `to_dtype(..., scale=True)` divides by the largest value of the *type*, for int32 two billion. Or the
# image was divided by 255 twice.

# %%
import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

from tutorial_lib.checks import check_dataset

decoded = (image * 255).to(torch.uint8)
with expect(TypeError):
    model([decoded], [target])
unscaled = decoded.float()
losses = model([unscaled], [target])  # no message
# Fixed
scaled = to_dtype(decoded, torch.float32, scale=True)
losses = model([scaled], [target])
print(f"largest value: {unscaled.max():.0f} by .float(), {scaled.max():.1f} scaled")

sixteen_bits = 300 + 2500 * image[0].numpy()
picture = Image.fromarray(sixteen_bits.astype(np.uint16))
white = to_dtype(pil_to_tensor(picture.convert("RGB")), torch.float32, scale=True)
values = torch.from_numpy(np.array(picture).astype(np.int32)).expand(3, -1, -1)
black = to_dtype(values, torch.float32, scale=True)
# Fixed
right = (values - values.min()) / (values.max() - values.min())
for name, pixels in {"white": white, "black": black, "right": right}.items():
    report = check_dataset([(pixels, target)], num_classes=2, progress=False)
    kinds = [finding.kind for finding in report.findings]
    print(f"{name}: {pixels.min():.6f} to {pixels.max():.6f}, {kinds}")

# %% [markdown]
# <a id="channels"></a>
#
# ### `RuntimeError: The size of tensor a (4) must match the size of tensor b (3)`
#
# **Fix.** Convert to RGB when you read: `Image.open(path).convert("RGB")`. To train on four channels, pass four values
# as `image_mean` and `image_std` ([vision#1630](https://github.com/pytorch/vision/issues/1630)), and replace the first
# convolution.
#
# **Cause.** A PNG with an alpha channel has four channels, and the model normalises three. A grey image raises **no
# message**: its one channel is copied to all three
# ([lightning-bolts#770](https://github.com/Lightning-Universe/lightning-bolts/issues/770)). Convert it as well, since
# other code expects three.
#
# <a id="list"></a>
#
# ### `ValueError: images is expected to be a list of 3d tensors of shape [C, H, W]`
#
# **Fix.** Pass a list of `[3, H, W]` images, to train and to predict
# ([vision#1688](https://github.com/pytorch/vision/issues/1688)). They may differ in size.
#
# **Cause.** The model got one image without a list, or a list of batches. A classifier wants the batch `[1, 3, H, W]`
# that `unsqueeze(0)` makes, and a detector does not.

# %%
with expect(RuntimeError):
    model([torch.rand(4, 96, 128)], [target])
losses = model([torch.rand(1, 96, 128)], [target])  # no message

# Fixed
for mode in ("RGBA", "L"):
    picture = Image.new(mode, (128, 96)).convert("RGB")
    pixels = to_dtype(pil_to_tensor(picture), torch.float32, scale=True)
    print(f"{mode:4} converted: {list(pixels.shape)}")

model.eval()
with expect(ValueError):
    model([image.unsqueeze(0)])
with expect(ValueError):
    model(image)
# Fixed
with torch.no_grad():
    print(len(model([image, torch.rand(3, 60, 100)])), "predictions for two images")

# %% [markdown]
# <a id="stack"></a>
#
# ### `RuntimeError: stack expects each tensor to be equal size`, `each element in list of batch should be of equal size`
#
# **Fix.** Give the loader a `collate_fn` that stacks nothing: a function that returns `tuple(zip(*batch))`.
#
# **Cause.** By default, a `DataLoader` stacks what it loads. It cannot stack images of different sizes, nor the boxes
# of one person and of two ([pytorch#1512](https://github.com/pytorch/pytorch/issues/1512)). The second message comes
# from targets that are lists ([vision#2624](https://github.com/pytorch/vision/issues/2624)).

# %%
from torch.utils.data import DataLoader

from tutorial_lib.data import collate_fn

two = {"boxes": torch.cat([boxes, boxes + 20]), "labels": torch.tensor([1, 1])}
samples = [(image, {"boxes": boxes, "labels": labels}), (image, two)]
with expect(RuntimeError):
    next(iter(DataLoader(samples, batch_size=2)))
with expect(RuntimeError):
    next(iter(DataLoader([(image, [1]), (image, [1, 2])], batch_size=2)))

# Fixed
images, targets = next(iter(DataLoader(samples, batch_size=2, collate_fn=collate_fn)))
print([len(target["boxes"]) for target in targets], "boxes")

# %% [markdown]
# <a id="workers"></a>
#
# ### With `num_workers` above 0: `AttributeError: Can't pickle local object`, `An attempt has been made to start a new process …`, `Bus error`
#
# **`Can't pickle local object`**, in Python 3.13 **`Can't get local object`**. Replace the `lambda`, or the function
# inside a function, by one at the top level of a module. Or set `num_workers=0`. Windows, macOS, and Linux from Python
# 3.14 on pickle what a worker needs, and such functions cannot be pickled
# ([cartridges#20](https://github.com/HazyResearch/cartridges/issues/20),
# [CLIP#151](https://github.com/openai/CLIP/pull/151), [PyTorch's
# forum](https://discuss.pytorch.org/t/cant-pickle-local-object-dataloader-init-locals-lambda/31857)).
#
# **`Can't get attribute … on <module '__main__' (built-in)>`.** Move the dataset class from the notebook into a `.py`
# file and import it, or set `num_workers=0`. A new process cannot see the notebook's cells
# ([dl-for-micro#20](https://github.com/computational-cell-analytics/dl-for-micro/issues/20)).
#
# **`An attempt has been made to start a new process`.** Put all code that runs under `if __name__ == "__main__":`.
# Each worker imports your script, and would start workers again
# ([tutorials#1661](https://github.com/pytorch/tutorials/issues/1661)).
#
# **`Bus error`.** Start the container with `--shm-size=8g` or `--ipc=host`, or lower `num_workers`. Workers pass
# tensors through shared memory, and it is full, mostly in Docker
# ([pytorch#5040](https://github.com/pytorch/pytorch/issues/5040)).

# %%
import pickle


def make_collate():
    return lambda batch: tuple(zip(*batch, strict=True))


try:
    pickle.dumps(make_collate())
except (AttributeError, pickle.PicklingError) as error:
    assert "local object" in str(error)
    print("cannot be pickled:", make_collate().__qualname__)

# Fixed
print("can be pickled:", pickle.loads(pickle.dumps(collate_fn)).__name__)

# %% [markdown]
# <a id="apart"></a>
#
# ### No message: the image is cropped, flipped or resized, and its boxes are not
#
# **Fix.** Pass image and target to **one** v2 transform, boxes as `tv_tensors.BoundingBoxes`, masks as
# `tv_tensors.Mask`. To a torchvision dataset, pass it as `transforms=`.
#
# **Cause.** A v2 transform moves boxes and masks only if they are of these types. Or the dataset got `transform=`,
# which is given the image only ([vision#8720](https://github.com/pytorch/vision/issues/8720)).
#
# `check_dataset` reports `BoundingBoxes` whose `canvas_size` is not the image's size. Plain tensors hold no size: look
# at pictures.

# %%
from torchvision import tv_tensors
from torchvision.transforms import v2

xyxy = {"format": "XYXY", "canvas_size": (96, 128)}
wrapped = tv_tensors.BoundingBoxes(boxes, **xyxy)
flip = v2.RandomHorizontalFlip(p=1)
for value in (boxes, wrapped):
    _, moved = flip(tv_tensors.Image(image), {"boxes": value})
    print(f"{type(value).__name__:13} {value.tolist()} -> {moved['boxes'].tolist()}")

larger = v2.Resize((192, 256))(tv_tensors.Image(image))  # the image only
report = check_dataset([(larger, {**target, "boxes": wrapped})], progress=False)
print([finding.kind for finding in report.findings])
# Fixed
larger, moved = v2.Resize((192, 256))(tv_tensors.Image(image), {"boxes": wrapped})
print("resized together:", moved["boxes"].tolist())

# %% [markdown]
# ## Targets
#
# <a id="empty"></a>
#
# ### An image without objects: `Expected target boxes to be a tensor of shape [N, 4], got torch.Size([0])`, `Dimension out of range`, `KeyError: 'boxes'`
#
# **Fix.** N may be 0, but the 4 has to stay: `torch.zeros((0, 4))`. Labels are `torch.zeros(0, dtype=torch.int64)`,
# and masks `torch.zeros((0, H, W), dtype=torch.uint8)`. `boxes.reshape(-1, 4)` is right for any number of boxes, also
# for a single one of shape [4]. `CocoDataset` of `tutorial_lib.coco` gives such targets.
#
# **Cause.** An empty list becomes a tensor of one dimension. The first message comes in training. The second comes in
# evaluation with targets, and in older versions ([vision#2192](https://github.com/pytorch/vision/issues/2192)). The
# third comes from a target without that key. `CocoDetection`, wrapped for the v2 transforms, gives one for an image
# without annotations ([vision#9162](https://github.com/pytorch/vision/issues/9162)). `train_one_epoch` names the image
# and the missing key.
#
# Keep such images: they teach the background, and torchvision trains on them since
# [vision#1911](https://github.com/pytorch/vision/pull/1911). Older advice filters them out
# ([vision#1598](https://github.com/pytorch/vision/issues/1598)), or invents a box of zeros
# ([vision#5098](https://github.com/pytorch/vision/issues/5098)).
#
# <a id="type"></a>
#
# ### `AssertionError: Expected target boxes to be of type Tensor, got <class 'list'>`, `TypeError: target labels must of int64 type, instead got torch.float32`
#
# **Fix.** Convert: `torch.as_tensor(boxes, dtype=torch.float32)`, `torch.as_tensor(labels, dtype=torch.int64)`.
#
# **Cause.** The boxes are still a list or a NumPy array. The labels are a column of the boxes' float tensor, or int32
# ([vision#1091](https://github.com/pytorch/vision/pull/1091), [an
# example](https://github.com/prajjwal1/autonomous-object-detection/issues/7)).

# %%
nobody = {"boxes": torch.tensor([]), "labels": torch.zeros(0, dtype=torch.int64)}
with expect(IndexError):
    model([image], [nobody])
model.train()
with expect(AssertionError):
    model([image], [nobody])
with expect(KeyError):
    model([image], [{"image_id": 7}])

# Fixed
losses = model([image], [{**nobody, "boxes": torch.zeros((0, 4))}])
print(f"loss_box_reg {losses['loss_box_reg'].item():.0f}: there is no box to fit\n")

from_file = [[40, 20, 60, 80, 1]]  # box and label
with expect(AssertionError):
    model([image], [{"boxes": from_file, "labels": labels}])
rows = torch.tensor(from_file, dtype=torch.float32).reshape(-1, 5)
with expect(TypeError):
    model([image], [{"boxes": rows[:, :4], "labels": rows[:, 4]}])
# Fixed
losses = model([image], [{"boxes": rows[:, :4], "labels": rows[:, 4].long()}])

# %% [markdown]
# <a id="positive"></a>
#
# ### `AssertionError: All bounding boxes should have positive height and width.`
#
# **Fix.** Convert COCO's boxes with `box_convert(boxes, "xywh", "xyxy")`. Sort swapped corners. If the boxes are from
# masks, see [thin masks](#thin).
#
# **Cause.** The models read the last two numbers as the lower right corner. COCO's files have `x, y, width, height`,
# and the width may be smaller than `x` ([vision#2740](https://github.com/pytorch/vision/issues/2740)). Or the corners
# are swapped: x2, y2, x1, y1 ([vision#1120](https://github.com/pytorch/vision/issues/1120), where an older version
# gave a loss of NaN). The box in the message is in pixels of the resized image.
#
# <a id="format"></a>
#
# ### No message: boxes in another format
#
# **Fix.** **Look** at some images with their boxes before training. State the format once, where boxes are read:
# `BoundingBoxes(boxes, format="XYWH", canvas_size=(H, W))`. `v2.ConvertBoundingBoxFormat("XYXY")` converts them.
#
# **Cause.** Near the upper left corner, `x, y, width, height` may *also* be a valid `x1, y1, x2, y2`. That is another
# box, and the model learns it.

# %%
import matplotlib.pyplot as plt
from torchvision.ops import box_convert

from tutorial_lib.visualization import show

from_coco = torch.tensor([[70.0, 20, 30, 60]])  # x, y, width, height
with expect(AssertionError):
    model([image], [{"boxes": from_coco, "labels": labels}])
# Fixed
converted = box_convert(from_coco, in_fmt="xywh", out_fmt="xyxy")
print(from_coco.tolist(), "->", converted.tolist())
swapped = torch.tensor([[60.0, 80, 40, 20]])  # x2, y2, x1, y1
in_order = swapped.reshape(-1, 2, 2).sort(dim=1).values.flatten(1)
print(swapped.tolist(), "->", in_order.tolist())

near_corner = 0.4 * torch.rand(3, 96, 128)
near_corner[:, 15:75, 10:30] += 0.5
in_file = torch.tensor([[10.0, 15, 20, 60]])
losses = model([near_corner], [{"boxes": in_file, "labels": labels}])  # no message
# Fixed
meant = box_convert(in_file, in_fmt="xywh", out_fmt="xyxy")
pictures = [{"boxes": in_file}, {"boxes": meant}]
show([near_corner] * 2, pictures, ["as x1, y1, x2, y2", "as x, y, w, h"], columns=2)
plt.show()

# %% [markdown]
# <a id="thin"></a>
#
# ### `All bounding boxes should have positive height and width` after `masks_to_boxes`, and `RuntimeError: min(): Expected reduction dim to be specified for input.numel() == 0`
#
# **Fix.** Add 1 to x2 and y2, as `boxes_from_masks` does. Leave out objects whose mask has no pixel. Also leave out a
# box without size that is *not* from a mask.
#
# **Cause.** `masks_to_boxes` gives the first and the *last* pixel. So an object one pixel wide has a width of 0
# ([vision#8793](https://github.com/pytorch/vision/issues/8793)), and every box is one pixel short
# ([vision#4745](https://github.com/pytorch/vision/issues/4745)). Before torchvision 0.26, a mask without pixels raises
# the second message ([vision#9346](https://github.com/pytorch/vision/issues/9346)). From 0.26 on, its box is [0, 0, 0,
# 0]. With the 1 added it trains as [0, 0, 1, 1], without a message.

# %%
from torchvision.ops import masks_to_boxes

from tutorial_lib.data import boxes_from_masks

thin = torch.zeros(1, 96, 128, dtype=torch.uint8)
thin[0, 20:80, 50] = 1
with expect(AssertionError):
    model([image], [{"boxes": masks_to_boxes(thin), "labels": labels}])
# Fixed
print(masks_to_boxes(thin).tolist(), "->", boxes_from_masks(thin).tolist())
losses = model([image], [{"boxes": boxes_from_masks(thin), "labels": labels}])

masks = torch.cat([thin, torch.zeros_like(thin)])
rows, columns = torch.where(masks[1] != 0)
with expect(RuntimeError, "min(): Expected reduction dim to be specified"):
    columns.min()  # what masks_to_boxes did before 0.26
# Fixed
has_pixels = (masks != 0).flatten(1).any(dim=1)
print("masks with pixels:", has_pixels.tolist())
boxes_of_masks = boxes_from_masks(masks[has_pixels])

# %% [markdown]
# <a id="instances"></a>
#
# ### No message: masks that are no instances
#
# **Fix.** Split masks of classes, or of 0 and 255, into objects: `from_masks(images, masks, kind="semantic")` of
# `tutorial_lib.convert` (notebook [05](05_your_own_data.ipynb)). Objects that touch stay one. Resize masks with
# nearest-neighbour interpolation, and save them as PNG.
#
# **Cause.** In an instance mask, each pixel holds the number of its object. Other masks look alike, and train
# silently:
#
# - **0 and 255**: one value for all objects gives one box over all of them
#   ([Mask_RCNN#2747](https://github.com/matterport/Mask_RCNN/issues/2747));
# - **class maps**: the pixel holds the class, so all objects of a class become one
#   ([tutorials#960](https://github.com/pytorch/tutorials/issues/960));
# - **soft edges**: smooth resizing or JPEG adds new values at the edges, and each becomes an object;
# - **inverted**: the background is 255, and its box is the image.

# %%
import tempfile
from pathlib import Path

from tutorial_lib.convert import from_masks


def objects_of(mask):
    # As for an instance mask: each value but 0 is one object.
    masks = mask == mask.unique()[1:, None, None]
    return masks.to(torch.uint8), boxes_from_masks(masks)


both = torch.zeros(96, 128, dtype=torch.uint8)
both[20:80, 10:30], both[20:80, 90:110] = 255, 255
soft = v2.functional.resize(both[None], [48, 64], antialias=True)[0]
for name, mask in {"0 and 255": both, "inverted": 255 - both, "soft edges": soft}.items():
    its_masks, its_boxes = objects_of(mask)
    ones = torch.ones(len(its_boxes), dtype=torch.int64)
    its_target = {"boxes": its_boxes, "labels": ones, "masks": its_masks}
    report = check_dataset([(torch.rand(3, *mask.shape), its_target)], progress=False)
    print(f"{name}: objects: {len(ones)}, the first {its_boxes[0].tolist()}")
    print("   check_dataset:", *sorted({finding.kind for finding in report.findings}))

# Fixed
with tempfile.TemporaryDirectory() as folder:
    for name in ("images", "masks"):
        (Path(folder) / name).mkdir()
        Image.fromarray(both.numpy()).save(Path(folder) / name / "street.png")
    found = from_masks(Path(folder) / "images", Path(folder) / "masks", "semantic")
print("split, x, y, w, h:", [annotation["bbox"] for annotation in found["annotations"]])

# %% [markdown]
# <a id="keypoints"></a>
#
# ### Keypoint R-CNN: `IndexError: index 2 is out of bounds for dimension 1 with size 2`, or `loss_keypoint` is 0
#
# **Fix.** Give `keypoints` as float32 [N, K, 3]: for each object K points of x, y and visibility. x and y are in
# pixels, like the boxes. Visibility is 1 or 2 where a point is annotated. K is the model's `num_keypoints`.
# `check_dataset` checks all but K.
#
# **Cause.** The message: `tv_tensors.KeyPoints` hold x and y only
# ([vision#9281](https://github.com/pytorch/vision/issues/9281)). A loss of 0: every visibility is 0, or the
# coordinates are in [0, 1] ([vision#2125](https://github.com/pytorch/vision/issues/2125)). Without the dimension of
# objects, `[K, 3]` trains on nonsense, or raises an `IndexError` with other numbers
# ([vision#7750](https://github.com/pytorch/vision/issues/7750)).

# %%
from torchvision.models.detection import KeypointRCNN

sizes = {"min_size": MIN_SIZE, "max_size": MAX_SIZE}
parts = {"rpn_anchor_generator": model.rpn.anchor_generator, **sizes}
keypoint_model = KeypointRCNN(model.backbone, 2, num_keypoints=4, **parts)
corners = [[45.0, 30, 1], [55, 30, 1], [45, 70, 1], [55, 70, 1]]
right = torch.tensor([corners])  # [1, 4, 3]
with expect(IndexError):
    keypoint_model([image], [{**target, "keypoints": right[:, :, :2]}])

in_unit = right / torch.tensor([128, 96, 1])
wrong = {"[4, 3]": right[0], "in [0, 1]": in_unit, "invisible": right * torch.tensor([1, 1, 0])}
for name, points in {"right": right, **wrong}.items():
    its_target = {**target, "keypoints": points}
    loss = keypoint_model([image], [its_target])["loss_keypoint"].item()
    report = check_dataset([(image, its_target)], num_classes=2, progress=False)
    print(f"{name:9} loss is 0: {loss == 0!s:5} {[found.kind for found in report.findings]}")

# %% [markdown]
# ## Labels and classes
#
# <a id="bounds"></a>
#
# ### `IndexError: Target 2 is out of bounds.`, `CUDA error: device-side assert triggered`; Mask R-CNN: `index 2 is out of bounds for dimension 1 with size 2`
#
# **Fix.** Set `num_classes` to the highest label plus one: it counts the background. After a message from CUDA,
# restart Python and run **one batch on the CPU**. If it fails on the GPU only, set `CUDA_LAUNCH_BLOCKING=1` before
# Python starts. Then the traceback names the faulty line. Remove it afterwards: it is slow ([PyTorch's
# forum](https://discuss.pytorch.org/t/cuda-launch-blocking-1-reduces-the-training-speed/160924)).
#
# *Third message:* give the box and the mask predictor the **same** number, with `replace_predictors(model,
# num_classes)`. The mask predictor has fewer classes.
#
# **Cause.** A label is not below `num_classes`. A CPU raises the `IndexError`, a CUDA GPU the second message
# ([pytorch#61329](https://github.com/pytorch/pytorch/issues/61329) has both). It often names a later, innocent line,
# because Python does not wait for the GPU. Every use of the GPU then fails until Python is restarted.
#
# <a id="zero"></a>
#
# ### No message: label 0, a negative label, or `num_classes=1`
#
# **Fix.** Count classes from 1, and assert it. One class is `num_classes=2`.
#
# **Cause.** For Faster R-CNN, Mask R-CNN and SSD, class 0 is the background. A box with label 0 says *nothing here*,
# and the model detects nothing ([vision#1952](https://github.com/pytorch/vision/issues/1952)). `num_classes=1` leaves
# room for the background only ([vision#1360](https://github.com/pytorch/vision/issues/1360)). In Faster and Mask
# R-CNN, `loss_box_reg` is then 0: there is no box to regress. They ignore objects with a negative label, where SSD
# raises `Target -1 is out of bounds`. RetinaNet and FCOS do train a class 0.

# %%
from tutorial_lib.models import replace_mask_predictor, replace_predictors

second_class = {"boxes": boxes, "labels": torch.tensor([2])}
with expect(IndexError):
    model([image], [second_class])
# Fixed
num_classes = int(second_class["labels"].max()) + 1
losses = new_model(num_classes)([image], [second_class])
print(f"{num_classes = }\n")

for label in (0, -1, 1):
    losses = model([image], [{"boxes": boxes, "labels": torch.tensor([label])}])
    print(f"label {label:2}: loss_box_reg is 0: {bool(losses['loss_box_reg'] == 0)}")
losses = new_model(num_classes=1)([image], [{"boxes": boxes, "labels": labels - 1}])
print(f"num_classes=1: loss_box_reg is 0: {bool(losses['loss_box_reg'] == 0)}")
with expect(ValueError):
    replace_predictors(new_model(), num_classes=1)

mask_rcnn = get_model("maskrcnn_mini_fpn", weights=None, num_classes=3)
replace_mask_predictor(mask_rcnn, num_classes=2)  # not the same number
with expect(IndexError):
    mask_rcnn([image], [{**second_class, "masks": torch.ones(1, 96, 128)}])
# Fixed
replace_predictors(mask_rcnn, num_classes=3)

# Fixed
counted_from_zero = torch.tensor([0, 1, 1])
class_labels = counted_from_zero + 1
assert class_labels.min() >= 1 and class_labels.max() < num_classes

# %% [markdown]
# <a id="absent"></a>
#
# ### No message: a class is never detected, or `num_classes` is far too high
#
# `check_dataset` warns of all three causes. Notebook [05](05_your_own_data.ipynb) has a table by class, of objects in
# training and of AP.
#
# **Gaps.** Renumber category ids from 1 without gaps, and keep the way back for results. `CocoDataset` does:
# `category_ids[label]` is the file's id. COCO's own 80 classes have ids up to 90
# ([vision#1141](https://github.com/pytorch/vision/issues/1141)).
#
# **Absent.** Split the images again: a class of the test images needs training images, else its AP is 0.
#
# **Rare.** Collect more of it, show its images more often (`WeightedRandomSampler`), or merge it with a similar class.
# A model learns little from a few objects, and the mean AP counts the class like any other. torchvision has no class
# weights ([vision#7167](https://github.com/pytorch/vision/issues/7167)).

# %%
three_boxes = torch.tensor([[4.0, 20, 24, 60], [34, 20, 54, 60], [64, 20, 84, 60]])


def sample_with(image_id, labels):
    its_target = {"boxes": three_boxes, "labels": torch.tensor(labels), "image_id": image_id}
    return torch.rand(3, 96, 128), its_target


file_ids = [1, 2, 90]
# Fixed
label_of = {category_id: label for label, category_id in enumerate(sorted(file_ids), 1)}
print(label_of, "num_classes:", max(file_ids) + 1, "->", len(label_of) + 1)

train_images = [sample_with(i, [1, 1, 2 if i == 0 else 1]) for i in range(20)]
test_images = [sample_with(i, [1, 2, 3]) for i in range(5)]
report = check_dataset(train_images, num_classes=5, other=test_images, progress=False)
print(report)

# %% [markdown]
# ## Calling the model
#
# <a id="mode"></a>
#
# ### `AssertionError: targets should not be none when in training mode`, `AttributeError: 'list' object has no attribute 'values'`
#
# **Fix.** To predict, call `model.eval()` first. To train, call `model.train()` at the start of every epoch, and pass
# targets ([torchstudio#43](https://github.com/TorchStudio/torchstudio/issues/43)). For a loss on validation images,
# call `validation_loss` (notebook [04](04_penn_fudan_mask_rcnn.ipynb)). It uses training mode without gradients, and
# BatchNorm as in evaluation ([vision#1350](https://github.com/pytorch/vision/issues/1350),
# [vision#1605](https://github.com/pytorch/vision/pull/1605)).
#
# **Cause.** The model is in the wrong mode. In training mode it wants targets, and returns a dict of losses. In
# evaluation mode it returns a list of predictions, with or without targets. A new model is in training mode.
# torchvision's reference `evaluate` leaves it in evaluation mode.

# %%
from tutorial_lib.engine import validation_loss

model.train()
with expect(AssertionError):
    model([image])
model.eval()
with expect(AttributeError):
    sum(model([image], [target]).values())

# Fixed
with torch.no_grad():
    print("predicted:", sorted(model([image])[0]))
loader = DataLoader([(image, target)], collate_fn=collate_fn)
assert validation_loss(model, loader, device) > 0 and not model.training  # as it was

# %% [markdown]
# ## Building a model
#
# <a id="classes"></a>
#
# ### `ValueError: The parameter 'num_classes' expected value 91 but got 2 instead.`, `num_classes should be None when box_predictor is specified`
#
# **Fix.** Load the model with all its classes, then replace its predictor, as in notebook
# [02](02_finetuning_a_predictor.ipynb). With a predictor of your own, leave `num_classes` out. (With neither, it is
# `num_classes should not be None when box_predictor is not specified`.)
#
# **Cause.** The number of classes is given twice. COCO's weights hold a classifier for 91 classes, and a predictor of
# your own has its number, too. Older versions gave a `size mismatch` here
# ([vision#4263](https://github.com/pytorch/vision/issues/4263),
# [vision#2555](https://github.com/pytorch/vision/issues/2555)).

# %%
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from tutorial_lib.models import replace_box_predictor

with expect(ValueError):  # stops before anything is downloaded
    fasterrcnn_resnet50_fpn(weights="DEFAULT", num_classes=2)
coco_model = new_model(num_classes=91)  # the small model has no COCO weights
# Fixed
finetuned = replace_box_predictor(coco_model, num_classes=2)
print(finetuned.roi_heads.box_predictor.cls_score.out_features, "classes")

predictor = FastRCNNPredictor(in_channels=1024, num_classes=2)
with expect(ValueError):
    FasterRCNN(coco_model.backbone, num_classes=2, box_predictor=predictor)
# Fixed
own = FasterRCNN(coco_model.backbone, box_predictor=predictor)

# %% [markdown]
# <a id="family"></a>
#
# ### `AttributeError: 'RetinaNet' object has no attribute 'roi_heads'`; the same for `SSD`, `FCOS`, `DataParallel`
#
# **Fix.** Replace the classification head of that family
# ([vision#3442](https://github.com/pytorch/vision/issues/3442)). The error of `replace_predictors` gives the line.
# Replace before you wrap a model for several GPUs. Wrap it in `DistributedDataParallel`: `DataParallel` splits each
# image by its channels, and not the list ([pytorch#25627](https://github.com/pytorch/pytorch/issues/25627)).
#
# **Cause.** Only Faster, Mask and Keypoint R-CNN have `roi_heads.box_predictor`. RetinaNet, SSD and FCOS have one
# stage and other heads. `DataParallel` and `DistributedDataParallel` hold the model as `.module`.

# %%
untrained = {"weights": None, "weights_backbone": None}
retinanet = get_model("retinanet_resnet50_fpn", num_classes=91, **untrained, **sizes)
with expect(AttributeError):
    print(retinanet.roi_heads)
with expect(TypeError):
    replace_predictors(retinanet, num_classes=2)
with expect(TypeError):
    replace_predictors(torch.nn.DataParallel(new_model()), num_classes=2)

# Fixed
fresh = get_model("retinanet_resnet50_fpn", num_classes=2, **untrained)
retinanet.head.classification_head = fresh.head.classification_head
print("RetinaNet:", *retinanet([image], [target]))

# %% [markdown]
# <a id="channels-out"></a>
#
# ### `ValueError: backbone should contain an attribute out_channels`
#
# **Fix.** Set the attribute. Run the backbone once to get the number.
#
# **Cause.** The backbone is a classifier's features. The heads have to know how many channels it gives
# ([pytorch#159203](https://github.com/pytorch/pytorch/issues/159203)).
#
# <a id="anchors"></a>
#
# ### `AssertionError: Anchors should be Tuple[Tuple[int]] […] There needs to be a match between the number of feature maps passed and the number of sizes / aspect ratios specified.`
#
# **Fix.** Give an `AnchorGenerator` with one inner tuple for each feature map. Mind the comma: `((32, 64, 128),)` is
# one map with three sizes, `((32,), (64,), (128,))` is three maps with one size each.
#
# **Cause.** The default has sizes for the five maps of an FPN, and this backbone gives one map. The first image raises
# the error ([vision#3246](https://github.com/pytorch/vision/issues/3246),
# [vision#2947](https://github.com/pytorch/vision/issues/2947)).

# %%
from torchvision.models.detection.anchor_utils import AnchorGenerator

trunk = torchvision.models.mobilenet_v3_small(weights=None).features
with expect(ValueError):
    FasterRCNN(trunk, num_classes=2)
# Fixed
with torch.no_grad():
    trunk.out_channels = trunk(torch.rand(1, 3, 96, 128)).shape[1]
print(f"{trunk.out_channels = }\n")

with expect(AssertionError):
    FasterRCNN(trunk, num_classes=2, **sizes)([image], [target])
# Fixed
anchors = AnchorGenerator(sizes=((32, 64, 128),), aspect_ratios=((0.5, 1.0, 2.0),))
one_map = FasterRCNN(trunk, num_classes=2, rpn_anchor_generator=anchors, **sizes)
losses = one_map([image], [target])
print(f"maps: {len(anchors.sizes)}, anchors: {anchors.num_anchors_per_location()}")

# %% [markdown]
# ## Training
#
# <a id="nan"></a>
#
# ### `Loss is nan, stopping training`; or weights that turn NaN without a message
#
# **Fix.** Check in this order, then go on from a checkpoint, since BatchNorm has seen the bad batch.
#
# 1. The **pixels** of the batch: are they finite, and in [0, 1]?
# 2. Its **boxes**: do they have a size? Newer versions refuse those without
#    ([vision#997](https://github.com/pytorch/vision/issues/997)).
# 3. The **learning rate**: divide it by 10, or lengthen the warm-up
#    ([maskrcnn-benchmark#721](https://github.com/facebookresearch/maskrcnn-benchmark/issues/721)).
#
# torchvision's reference script names no image. `train_one_epoch` of this project does. It says what is not finite:
# the loss, the gradient, or weights that were bad before.
#
# **NaN weights.** A loss can be finite and its **gradient** NaN. Then the step writes NaN into the weights, and the
# *next* batch is blamed. Train in float32, or compare with the CPU. Causes are float16 without a scaler, and a square
# root or a division at 0 in your own loss. On Apple's MPS, upgrade torchvision to 0.29 or later
# ([pytorch#190632](https://github.com/pytorch/pytorch/issues/190632),
# [vision#9510](https://github.com/pytorch/vision/pull/9510)). `save_checkpoint` refuses weights that are not finite.

# %%
from tutorial_lib.engine import train_one_epoch


def train(pixels, of_gradient=None, of_weights=None):
    loader = DataLoader([(pixels, target)], collate_fn=collate_fn)
    trained = new_model()
    weight = trained.roi_heads.box_predictor.cls_score.weight
    if of_gradient is not None:
        weight.register_hook(lambda gradient: gradient * of_gradient)
    if of_weights is not None:
        weight.data *= of_weights
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.005)
    train_one_epoch(trained, optimizer, loader, device, progress=False)


broken, nan = image.clone(), float("nan")
broken[0, 0, 0] = nan
with expect(FloatingPointError, "images with image_id [7]", "the loss is not finite"):
    train(broken)
with expect(FloatingPointError, "the loss is finite", "the gradient of", "is not"):
    train(image, of_gradient=nan)
with expect(FloatingPointError, "the weights are already not finite"):
    train(image, of_weights=nan)
# Fixed
train(broken.nan_to_num(0))
print("pixels that are not finite:", int((~torch.isfinite(broken)).sum()))

# %% [markdown]
# <a id="memory"></a>
#
# ### `torch.OutOfMemoryError: CUDA out of memory.`
#
# **Fix.** In a notebook, first restart the kernel: the traceback holds the failed step's memory. If one small image is
# too much, `nvidia-smi` shows whether another notebook fills the GPU. Then, in this order:
#
# - lower the batch size. To keep its effect, add up the gradients of several small batches before each
#   `optimizer.step()`;
# - compute the backbone in bfloat16 (notebook [10](10_making_it_fast.ipynb));
# - freeze the backbone's first stages with `trainable_backbone_layers`. Frozen layers keep nothing;
# - lower `min_size` **and** `max_size`. Small objects suffer;
# - cut images with hundreds of objects into tiles;
# - evaluate under `torch.no_grad()`, and sum up losses with `.item()`.
#
# **Cause.** Every layer keeps what it computed for the backward pass, and these models have large images
# ([vision#1867](https://github.com/pytorch/vision/issues/1867),
# [pytorch#40863](https://github.com/pytorch/pytorch/issues/40863)).
#
# **After a while, at `_box_inter_union`.** One image has very many **objects**, and each is compared with every anchor
# ([vision#7959](https://github.com/pytorch/vision/issues/7959)). One training step of the small Faster R-CNN on 600 ×
# 600 pixels took at most 0.9 GiB with 10 boxes. With 1000 boxes it took 4.0 GiB (CPU, torchvision 0.29.1). **Masks**
# are N × H × W bytes: 1000 objects in 1000 × 1000 pixels are 0.9 GiB. `check_dataset` prints the objects per image.

# %%
def kept_bytes(batch_size, size):
    """What the backbone keeps for the backward pass, its parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _ = model.backbone(torch.rand(batch_size, 3, size, size * 4 // 3))
        return sum(kept.values())


model.train()
base = kept_bytes(batch_size=1, size=192)
for batch_size, size in ((1, 192), (2, 192), (1, 384)):
    times = kept_bytes(batch_size, size) / base
    print(f"batch size {batch_size}, image size {size}: {times:.1f} times the memory")
with torch.no_grad():
    print(f"without gradients: {kept_bytes(1, 192)} bytes")

# %% [markdown]
# ## Evaluation with pycocotools
#
# This project's `evaluate` does not use pycocotools, so neither message comes from it (notebook
# [06](06_evaluating_detections.ipynb)).
#
# <a id="ids"></a>
#
# ### `AssertionError: Results do not correspond to current coco set`
#
# **Fix.** Carry `image_id` along in the target, write it into the results, and compare the two sets of ids before
# `loadRes`.
#
# **Cause.** A result belongs to an image that is not in the ground truth. Its `image_id` is the position in the
# loader, the file's name, or `"7"` where the ground truth has `7`. Or it is from another split
# ([cocoapi#497](https://github.com/cocodataset/cocoapi/issues/497),
# [ultralytics#22168](https://github.com/ultralytics/ultralytics/issues/22168)).

# %%
import io

from pycocotools.coco import COCO


def coco_set(image_ids, annotations):
    coco = COCO()
    coco.dataset = {
        "info": {},  # pycocotools 2.0.9 and 2.0.10 raise KeyError: 'info' without it
        "images": [{"id": i} for i in image_ids],
        "annotations": annotations,
        "categories": [{"id": 1}],
    }
    coco.createIndex()
    return coco


box = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [40, 20, 20, 60]}
with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
    truth = coco_set([7], [{**box, "area": 1200, "iscrowd": 0}])
with expect(AssertionError), contextlib.redirect_stdout(io.StringIO()):
    truth.loadRes([{**box, "image_id": 0, "score": 0.9}])

# Fixed
results = [{**box, "image_id": target["image_id"], "score": 0.9}]
strangers = {result["image_id"] for result in results} - set(truth.getImgIds())
print("ids that the ground truth lacks:", strangers or "none")

# %% [markdown]
# <a id="minus-one"></a>
#
# ### `Average Precision (AP) @[ IoU=0.50:0.95 | area= all | maxDets=100 ] = -1.000`
#
# **There was nothing to measure on** ([cocoapi#594](https://github.com/cocodataset/cocoapi/issues/594)). A wrong box
# gives 0, not -1. Which rows are -1?
#
# - *All:* look at the ground truth. It has no annotations, or their ids are not those of its images and categories.
# - *Some:* there are no objects of that size, and nothing is wrong.
# - *Only the first:* keep 100 as the last of `params.maxDets`. The summary looks for it
#   ([cocoapi#558](https://github.com/cocodataset/cocoapi/issues/558)).
#
# Leave every -1 out of averages. `evaluate` gives `None` instead, which cannot be averaged by mistake.

# %%
from pycocotools.cocoeval import COCOeval


def aps(truth, results, max_detections=100):
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(truth, truth.loadRes(results), "bbox")
        coco_eval.params.maxDets = [1, 10, max_detections]
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return [round(float(number), 3) for number in coco_eval.stats[:6]]


with contextlib.redirect_stdout(io.StringIO()):
    empty = coco_set([7], [])
print("                 AP, AP50, AP75, small, medium, large")
print("no objects:     ", aps(empty, results))
print("one, of 1200 px:", aps(truth, results))
print("maxDets of 300: ", aps(truth, results, max_detections=300))
print("a wrong box:    ", aps(truth, [{**results[0], "bbox": [0, 0, 20, 60]}]))

# %% [markdown]
# ## Saving and loading
#
# <a id="mismatch"></a>
#
# ### `RuntimeError: size mismatch for roi_heads.box_predictor.cls_score.weight`
#
# **Fix.** Build the model with the checkpoint's number of classes, the length of that weight. For other classes, load
# all but the predictor, and check what is missing. `strict=False` alone does not help: it allows missing tensors, not
# tensors of another shape.
#
# **Cause.** The checkpoint has another number of classes, often one more: the background
# ([smd#8](https://github.com/akarazniewicz/smd/issues/8)). If the message also names `rpn` or `backbone`, the
# architecture is another one ([detecto#50](https://github.com/alankbi/detecto/issues/50)).

# %%
three = new_model(num_classes=3).state_dict()
name = "roi_heads.box_predictor.cls_score.weight"
with expect(RuntimeError, f"size mismatch for {name}", "torch.Size([3, 192])"):
    model.load_state_dict(three, strict=False)

# Fixed
print(new_model(num_classes=len(three[name])).load_state_dict(three))

# Fixed, for other classes
rest = {k: v for k, v in three.items() if ".box_predictor." not in k}
loaded = new_model(num_classes=2).load_state_dict(rest, strict=False)
print("missing:", *loaded.missing_keys, sep="\n  ")
assert not loaded.unexpected_keys

# %% [markdown]
# <a id="weights-only"></a>
#
# ### `UnpicklingError: Weights only load failed.`
#
# **Fix.** If **you** wrote the file, load it once with `weights_only=False`, and save the state dict. Never do that
# with a file of someone else: loading it runs the code inside.
#
# **Cause.** The file holds a whole model, and not its state dict. Since PyTorch 2.6, `torch.load` accepts only tensors
# and plain containers ([torch.load](https://docs.pytorch.org/docs/stable/generated/torch.load.html),
# [audio#3911](https://github.com/pytorch/audio/issues/3911)).

# %%
file = io.BytesIO()
torch.save(model, file)
file.seek(0)
parts = ("Weights only load failed", "Unsupported global", "faster_rcnn.FasterRCNN")
with expect(pickle.UnpicklingError, *parts):
    torch.load(file)

# Fixed
file.seek(0)
mine = torch.load(file, weights_only=False)  # we wrote it ourselves
file = io.BytesIO()
torch.save(mine.state_dict(), file)
file.seek(0)
print(model.load_state_dict(torch.load(file)))

# %% [markdown]
# ## Taking the model out of Python
#
# <a id="export"></a>
#
# ### `Could not guard on data-dependent expression Eq(4*u1, 0)`, `Failed to export the model with torch.export`, `No module named 'onnxscript'`
#
# **Fix.** Use the older exporter, as [vision#9462](https://github.com/pytorch/vision/issues/9462) does:
# `torch.onnx.export(model.eval(), ([image],), "model.onnx", dynamo=False)`. It needs the package `onnx`, else it says
# `Module onnx is not installed!`. The file then fits that image size only. `export_onnx` of `tutorial_lib.export` does
# this for Faster and Mask R-CNN and any image size, and compares the file with PyTorch (notebook
# [05](05_your_own_data.ipynb)).
#
# **Cause.** `torch.export` follows a model without values. `batched_nms` needs to know how many boxes are left, and
# that depends on values ([vision#9321](https://github.com/pytorch/vision/issues/9321),
# [pytorch#118884](https://github.com/pytorch/pytorch/issues/118884),
# [pytorch#146152](https://github.com/pytorch/pytorch/issues/146152)). By default `torch.onnx.export` uses
# `torch.export`, and raises the second message. Without the package `onnxscript` it raises the third, and installing
# it leads to the second.

# %%
parts = ("Could not guard on data-dependent expression", "torchvision/ops/boxes.py")
graph = io.StringIO()  # it also prints its whole graph
with expect(RuntimeError, *parts), contextlib.redirect_stderr(graph):
    torch.export.export(new_model().eval(), ([image],), strict=False)

# %% [markdown]
# ## Find them all before training
#
# <a id="check"></a>
# Errors come one at a time, and some mistakes give no message. `check_dataset` reads every sample. It says in plain
# English what would fail or be learned wrongly, and what to do. The list below has five of the mistakes above, after
# one sample that is in order.
#
# In a script, `raise_for_errors` stops the run before the first step. `check_dataset` cannot know what you meant. The
# last sample has a box in the wrong format that is also a valid box. Only a mask beside it shows the mistake, so look
# at pictures as well.

# %%
mistakes = [
    (decoded, boxes, 1),
    (image, from_coco, 1),
    (image, masks_to_boxes(thin), 1),
    (image, boxes, 0),
    (image, boxes, 2),
]
samples = [(image, {"boxes": boxes, "labels": torch.tensor([1]), "image_id": 0})]
for image_id, (pixels, its_boxes, label) in enumerate(mistakes, start=1):
    its_target = {"boxes": its_boxes, "labels": torch.tensor([label])}
    samples.append((pixels, {**its_target, "image_id": image_id}))
report = check_dataset(samples, num_classes=2, progress=False)
print(report, "\n")
assert {error.index for error in report.errors} == {1, 2, 3, 4, 5}
with expect(ValueError, "sample 1", "sample 2", "sample 3"):
    report.raise_for_errors()

person = torch.zeros(1, 96, 128, dtype=torch.uint8)
person[0, 15:75, 10:30] = 1
for masks in ({}, {"masks": person}):
    sample = (near_corner, {"boxes": in_file, "labels": labels, **masks})
    report = check_dataset([sample], num_classes=2, progress=False)
    print("with" if masks else "without", "a mask:", [e.kind for e in report.errors])

# %% [markdown]
# ## Recap
#
# - **Read** a traceback from the bottom.
# - **Run** one batch on the CPU before the GPU sees it.
# - **Look** at images with their boxes.
# - **Count** classes from 1, and the background in `num_classes`.
# - **Check** the whole dataset once, in the script, before training.
#
# ## On your own
#
# 1. Fix the five samples until `check_dataset` with `num_classes=3` raises nothing.
#    <details><summary>Hint</summary><code>to_dtype</code>, <code>box_convert</code>, <code>boxes_from_masks</code>, and
#    add 1 to the label 0. The label 2 is right with three classes.</details>
# 2. Load an empty list of results with pycocotools: `truth.loadRes([])`. When would a model give you that, and what
#    should AP be?
#    <details><summary>Hint</summary>After its first steps, if it detects nothing yet. AP is 0; you meet an <code>IndexError</code> instead. Compare what
#    <code>evaluate</code> says.</details>
# 3. Give a Mask R-CNN (`maskrcnn_mini_fpn`) a target with masks of another size than the image. Does it complain?
#    <details><summary>Hint</summary>No. Check it yourself: <code>masks.shape[-2:] == image.shape[-2:]</code>. <code>check_dataset</code> does.</details>
#
# ## In practice
#
# - Every message that a cell prints was raised by that cell, with torch 2.14 and torchvision 0.29. Older versions word
#   some differently.
# - torchvision's models train on objects marked `iscrowd` as on all others. Leave them out of training.
# - When you ask for help, give the whole traceback, the output of `python -m torch.utils.collect_env`, and the shapes
#   and types of **one** sample.
#
# ## Further reading
#
# - torchvision's [issues](https://github.com/pytorch/vision/issues): search for the message in quotation marks, with
#   closed issues included.
# -
#   [generalized_rcnn.py](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/generalized_rcnn.py),
#   where boxes are checked.
# - [Serialization semantics](https://pytorch.org/docs/stable/notes/serialization), on what a checkpoint is.
#
# **Next:** [08, look inside Mask R-CNN](08_inside_mask_rcnn.ipynb).
