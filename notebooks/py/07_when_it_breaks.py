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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/torchvision-detection-tutorial/blob/main/notebooks/07_when_it_breaks.ipynb)
#
# You trigger the errors of torchvision's detection models on purpose, read each message, and fix
# its cause. Among them are mistakes that give no message at all.

# %% [markdown]
# ## What you'll do
#
# - look up a message: most headings below are one, so search this page for yours;
# - see the shortest code that raises it, why it does, and the same code fixed;
# - find the mistakes of a whole dataset with one call, before any training.
#
# **You need** nothing but what the set-up installs; notebook [01](01_dataset.ipynb) says what a
# target should hold. No data are downloaded.
#
# | preset | what runs | time |
# |---|---|---|
# | `quick`, `laptop`, `full` | the same: an untrained small model on the CPU, and made-up images | 11 to 13 s with one thread |

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
# The preset changes nothing here. The device is the CPU even where there is a GPU, because a CPU names
# the faulty line and a GPU often does not, as one of the errors will show.

# %% tags=["nbval-ignore-output"]
import torch
import torchvision

from tutorial_lib.presets import choose_preset

preset = choose_preset()
device = torch.device("cpu")
torch.manual_seed(0)
versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
print(f"preset {preset.name} | made-up images, random weights | {device} | {versions}")

# %% [markdown]
# The subject: a small Faster R-CNN for two classes (background and person), one image with a bright "person" on noise,
# and the person's target. Nothing is wrong yet, so the model gives its losses:

# %%
from torchvision.models import get_model


def new_model(num_classes=2):
    size = {"min_size": 96, "max_size": 128}
    return get_model(
        "fasterrcnn_mini_fpn", weights=None, num_classes=num_classes, **size
    )


image = 0.4 * torch.rand(3, 96, 128)
image[:, 20:80, 40:60] += 0.5
boxes = torch.tensor([[40.0, 20, 60, 80]])
labels = torch.tensor([1])
target = {"boxes": boxes, "labels": labels, "image_id": 7}
model = new_model()
losses = model([image], [target])
print(*losses)
assert all(torch.isfinite(loss) for loss in losses.values())

# %% [markdown]
# And a helper for the rest of this notebook. Code that should break goes into `with expect(...)`, which prints the
# message, and fails if none came. Where wording differs from version to version, only the parts
# that it is given are printed.

# %%
import contextlib
import textwrap


@contextlib.contextmanager
def expect(kind, *parts):
    try:
        yield
    except kind as error:
        message = str(error)
        assert all(part in message for part in parts), message
        shown = " … ".join(parts) if parts else message
        text = f"{type(error).__name__}: {shown}"
        print(textwrap.fill(text, 88, break_on_hyphens=False))
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


with expect(ZeroDivisionError):
    1 / 0

# %% [markdown]
# How to read a traceback: the message begins with the error's name, such as `RuntimeError:`, in the **last line** or a few above it. Then go upwards to the lowest line of a file that **you**
# wrote; what you passed there is what to look at. The lines in between are torchvision's.
#
# ## The installation
#
# ### `RuntimeError: operator torchvision::nms does not exist`
#
# It comes from `import torchvision`, before any line of yours. torchvision's compiled part registers operators such as
# `nms` with PyTorch. If that part was built for another PyTorch it cannot be loaded, and then the Python part asks for an
# operator that nobody registered. We cannot break your installation to show it, so we do what the
# Python part does, with an operator that really does not exist:

# %%
with expect(RuntimeError):
    torch.library.register_fake("torchvision::nms_of_another_build")(
        lambda boxes: boxes
    )

# %% [markdown]
# The usual story: torch was upgraded and torchvision was not, or torch came from PyTorch's CPU index (`2.2.1+cpu`) and
# torchvision did not, as in [pytorch#122494](https://github.com/pytorch/pytorch/issues/122494) and, a year later,
# [vision#9085](https://github.com/pytorch/vision/issues/9085). Install both in **one** command from **one** index, in
# versions that belong together by the table in [torchvision's README](https://github.com/pytorch/vision#installation). On
# Colab leave both as they are. Where `import torchvision` works, as here, these are both versions, what torchvision's
# package asks for (a lower bound, in most of its builds: it does not notice a torch that was upgraded alone), and a call of `nms`. Where it
# does not, the lines down to the second `print` still do, in a new Python:

# %% tags=["nbval-ignore-output"]
from importlib.metadata import requires, version

print({name: version(name) for name in ("torch", "torchvision")})
print([need for need in requires("torchvision") if need.startswith("torch")])

two_alike = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
kept = torchvision.ops.nms(two_alike, torch.tensor([0.9, 0.8]), 0.5)
assert kept.tolist() == [0]

# %% [markdown]
# ## Images, and the loader that batches them
#
# ### `TypeError: Expected input images to be of floating type (in range [0, 1])`
#
# An image as it was decoded: uint8, 0 to 255.

# %%
decoded = (image * 255).to(torch.uint8)
with expect(TypeError):
    model([decoded], [target])

# %% [markdown]
# Older versions returned NaN instead ([vision#3228](https://github.com/pytorch/vision/issues/3228)); the message is the
# better of the two ([hagrid#80](https://github.com/hukenovs/hagrid/issues/80)). Do not fix it with only `.float()`: the
# type is then right and the range is not, which **no message** tells you. `to_dtype(..., scale=True)`, or `ToDtype` in a
# transform, also divides by 255:

# %%
from torchvision.transforms.v2.functional import to_dtype

unscaled = decoded.float()
losses = model([unscaled], [target])  # no message
scaled = to_dtype(decoded, torch.float32, scale=True)
print(f"largest value: {unscaled.max():.0f} by .float(), {scaled.max():.1f} scaled")
assert model([scaled], [target]) and scaled.max() <= 1

# %% [markdown]
# ### `RuntimeError: The size of tensor a (4) must match the size of tensor b (3)`
#
# A PNG with an alpha channel has four channels, and the model normalises three:

# %%
with expect(RuntimeError):
    model([torch.rand(4, 96, 128)], [target])

# %% [markdown]
# Those who want four channels give the model four means and four deviations, as in
# [vision#1630](https://github.com/pytorch/vision/issues/1630); the first convolution has to take four as well.
# Everybody else converts when reading. Convert grey images, too: one channel is spread over
# three by broadcasting, without a message ([lightning-bolts#770](https://github.com/Lightning-Universe/lightning-bolts/issues/770)).

# %%
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

for mode in ("RGBA", "L"):
    picture = Image.new(mode, (128, 96)).convert("RGB")
    pixels = to_dtype(pil_to_tensor(picture), torch.float32, scale=True)
    assert pixels.shape == (3, 96, 128)
    assert model([pixels], [target])
assert model([torch.rand(1, 96, 128)], [target])  # no message

# %% [markdown]
# ### `ValueError: images is expected to be a list of 3d tensors of shape [C, H, W]`
#
# A single image, and no list around it. The model takes the first dimension for the list, and each channel for an image:

# %%
model.eval()
with expect(ValueError):
    model(image)

# %% [markdown]
# A list of images is what the models take, in training and after it
# ([vision#1688](https://github.com/pytorch/vision/issues/1688)). A batched tensor `[B, 3, H, W]` happens to work, since
# iterating over it gives images; but then all images must have one size, and the list allows them to differ.

# %%
with torch.no_grad():
    assert len(model([image])) == 1
    assert len(model([image, torch.rand(3, 60, 100)])) == 2
    assert len(model(torch.stack([image, image]))) == 2  # happens to work

# %% [markdown]
# ### `RuntimeError: stack expects each tensor to be equal size`
#
# A `DataLoader` wants to stack what it loads into one tensor. Images of different sizes cannot be stacked, and neither can
# boxes of one person and boxes of two:

# %%
from torch.utils.data import DataLoader

two_people = {"boxes": torch.cat([boxes, boxes + 20]), "labels": torch.tensor([1, 1])}
one_person = {"boxes": boxes, "labels": labels}
samples = [(image, one_person), (image, two_people)]
with expect(RuntimeError):
    next(iter(DataLoader(samples, batch_size=2)))

# %% [markdown]
# With targets that are lists instead of tensors, the same mistake is called **`each element in list of batch should be of equal
# size`** ([vision#2624](https://github.com/pytorch/vision/issues/2624)). That a loader should take samples of different sizes was asked for in 2017
# ([pytorch#1512](https://github.com/pytorch/pytorch/issues/1512)). A `collate_fn` that stacks nothing fixes both:

# %%
from tutorial_lib.data import collate_fn

with expect(RuntimeError):
    next(iter(DataLoader([(image, [1]), (image, [1, 2])], batch_size=2)))

images, targets = next(iter(DataLoader(samples, batch_size=2, collate_fn=collate_fn)))
assert len(images) == 2 and [len(t["boxes"]) for t in targets] == [1, 2]

# %% [markdown]
# ### `AttributeError: Can't pickle local object`
#
# It comes with `num_workers` above 0, on Windows and macOS, where workers are started afresh and everything that they need is
# pickled for them; on Linux the same code may run. A function inside a function, or a `lambda`, cannot be pickled. No
# worker is needed to find that out:

# %%
import pickle


def make_collate():
    return lambda batch: tuple(zip(*batch, strict=True))


try:
    pickle.dumps(make_collate())
except (AttributeError, pickle.PicklingError) as error:
    assert "local object" in str(error)
    print("cannot be pickled:", make_collate().__qualname__)
else:
    raise AssertionError("it was pickled")

# %% [markdown]
# Older Pythons, 3.11 among them, say `Can't pickle local object`, and 3.13 `Can't get local object`
# ([cartridges#20](https://github.com/HazyResearch/cartridges/issues/20)). The same happened to CLIP's transform
# ([CLIP#151](https://github.com/openai/CLIP/pull/151)) and on
# [PyTorch's forum](https://discuss.pytorch.org/t/cant-pickle-local-object-dataloader-init-locals-lambda/31857). Write functions
# and dataset classes at the top level of a module. (The top level of a notebook is not enough on Windows and macOS: their workers
# cannot import what a notebook defined.) Or keep `num_workers=0`.

# %%
assert pickle.loads(pickle.dumps(collate_fn)) is collate_fn

# %% [markdown]
# ## Targets: boxes
#
# ### `AssertionError: Expected target boxes to be a tensor of shape [N, 4], got torch.Size([0]).`
#
# An image without objects. An empty list becomes a tensor of one dimension:

# %%
model.train()
nobody = torch.tensor([])
with expect(AssertionError):
    model([image], [{"boxes": nobody, "labels": torch.tensor([])}])

# %% [markdown]
# Images without objects are welcome since [vision#1911](https://github.com/pytorch/vision/pull/1911), and teach what is *not* a
# person. Before, one had to filter them out ([vision#1598](https://github.com/pytorch/vision/issues/1598)), and much advice still
# says so, or invents a box of `[0, 0, 0, 0]` with the label 0, which gives the error after next
# ([vision#5098](https://github.com/pytorch/vision/issues/5098)). N may be 0, but the 4 has to stay:

# %%
empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
losses = model([image], [empty])
assert losses["loss_box_reg"] == 0 and torch.isfinite(losses["loss_classifier"])
assert nobody.reshape(-1, 4).shape == (0, 4)  # the short way, for any number of boxes

# %% [markdown]
# ### `AssertionError: Expected target boxes to be of type Tensor, got <class 'list'>.`
#
# Boxes as they come from a JSON or CSV file; with NumPy it is `<class 'numpy.ndarray'>`.

# %%
from_file = [[40, 20, 60, 80]]
with expect(AssertionError):
    model([image], [{"boxes": from_file, "labels": labels}])

# %% [markdown]
# We know of no public thread for this one, perhaps because it says all. The `reshape` is for the image that has no boxes:

# %%
as_tensor = torch.tensor(from_file, dtype=torch.float32).reshape(-1, 4)
assert model([image], [{"boxes": as_tensor, "labels": labels}])

# %% [markdown]
# ### `AssertionError: All bounding boxes should have positive height and width.`
#
# Two causes. The first: boxes as `x, y, width, height`, which is how COCO's files have them. The models read the last two
# numbers as the lower right corner:

# %%
from_coco = torch.tensor([[70.0, 20, 30, 60]])
with expect(AssertionError):
    model([image], [{"boxes": from_coco, "labels": labels}])

# %% [markdown]
# `Found invalid box` shows the box in pixels of the image as the model resized it, so it may not be in your file as
# it stands (here nothing was resized). A third number that is smaller than the first, as in the title of
# [vision#2740](https://github.com/pytorch/vision/issues/2740), points to this format. In
# [vision#1120](https://github.com/pytorch/vision/issues/1120), of 2019, boxes like `[1324.5, 275.8, 699.7, 19.5]` gave no message, but
# a loss of NaN.

# %%
from torchvision.ops import box_convert

converted = box_convert(from_coco, in_fmt="xywh", out_fmt="xyxy")
print(from_coco.tolist(), "->", converted.tolist())
assert converted.tolist() == [[70, 20, 100, 80]]
assert model([image], [{"boxes": converted, "labels": labels}])

# %% [markdown]
# ### The same message, from `masks_to_boxes`
#
# The second cause: an object one pixel wide. `masks_to_boxes` gives the first and the *last* pixel, and the
# width is computed as `x2 - x1`:

# %%
from torchvision.ops import masks_to_boxes

thin = torch.zeros(1, 96, 128, dtype=torch.uint8)
thin[0, 20:80, 50] = 1
with expect(AssertionError):
    model([image], [{"boxes": masks_to_boxes(thin), "labels": labels}])

# %% [markdown]
# Its documentation promised `x1 < x2`, which led to [vision#8793](https://github.com/pytorch/vision/issues/8793); that
# `box_area` of its boxes is too small is [vision#4745](https://github.com/pytorch/vision/issues/4745). Add the pixel, as notebook
# 01 does. Drop only objects without a single pixel, and look for them in the mask, `(masks != 0).flatten(1).any(dim=1)`: the
# box of an empty mask comes out as [0, 0, 1, 1]. Before torchvision 0.26, `masks_to_boxes` raises an error for it.

# %%
from tutorial_lib.data import boxes_from_masks

fixed = boxes_from_masks(thin)
print(masks_to_boxes(thin).tolist(), "->", fixed.tolist())
assert (fixed[:, 2:] > fixed[:, :2]).all()
assert model([image], [{"boxes": fixed, "labels": labels}])

# %% [markdown]
# ### No message: boxes in another format
#
# The dangerous half of the first cause. Near the upper left corner, `x, y, width, height` may *also* be a valid
# `x1, y1, x2, y2`, only of other pixels. Nothing complains, and the model learns them:

# %%
near_corner = 0.4 * torch.rand(3, 96, 128)
near_corner[:, 15:75, 10:30] += 0.5
as_in_file = torch.tensor([[10.0, 15, 20, 60]])  # x, y, width, height
losses = model([near_corner], [{"boxes": as_in_file, "labels": labels}])
assert all(torch.isfinite(loss) for loss in losses.values())

# %% [markdown]
# What finds it is to **look** at some images with their boxes before training. What prevents it is to say the format where the boxes are
# read, once; `BoundingBoxes` carries it along, and a transform converts:

# %%
import matplotlib.pyplot as plt
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from tutorial_lib.visualization import show

read = BoundingBoxes(as_in_file, format="XYWH", canvas_size=(96, 128))
meant = v2.ConvertBoundingBoxFormat("XYXY")(read)
pictures = [{"boxes": as_in_file}, {"boxes": meant}]
show([near_corner] * 2, pictures, ["as x1, y1, x2, y2", "as x, y, w, h"], columns=2)
plt.show()
overlap = torchvision.ops.box_iou(as_in_file, meant).item()
print(f"IoU of the two: {overlap:.3f}")
assert meant.tolist() == [[10, 15, 30, 75]] and overlap < 0.5

# %% [markdown]
# ## Targets: labels
#
# ### `IndexError: Target 2 is out of bounds.` and `CUDA error: device-side assert triggered`
#
# One mistake, two messages: a label that is not below `num_classes`. Two kinds of objects, 1 and 2, in a model with
# `num_classes=2`:

# %%
second_class = {"boxes": boxes, "labels": torch.tensor([2])}
with expect(IndexError):
    model([image], [second_class])

# %% [markdown]
# That is the CPU. On a CUDA GPU the same line gives `device-side assert triggered`, usually from some later, innocent line, because
# the GPU works behind Python's back; and after it every use of the GPU fails until Python is restarted. (It is
# not triggered here: the notebook would end.) Run **one batch on the CPU first**: set `device = torch.device("cpu")`. If it breaks only on
# the GPU, set `CUDA_LAUNCH_BLOCKING=1` before Python starts, so that the line named is the line at fault
# ([PyTorch's forum](https://discuss.pytorch.org/t/cuda-launch-blocking-1-reduces-the-training-speed/160924)).
# In [pytorch#61329](https://github.com/pytorch/pytorch/issues/61329) a Faster R-CNN met both messages.
#
# `num_classes` counts the background, so it is the highest label plus one:

# %%
num_classes = int(second_class["labels"].max()) + 1
assert num_classes == 3
assert new_model(num_classes)([image], [second_class])

# %% [markdown]
# ### `TypeError: target labels must of int64 type, instead got torch.float32`
#
# Labels that were cut out of one tensor with the boxes are floats. (int32 is refused as well.)

# %%
row = torch.tensor([[40.0, 20, 60, 80, 1]])  # box and label
with expect(TypeError):
    model([image], [{"boxes": row[:, :4], "labels": row[:, 4]}])

# %% [markdown]
# The check came with [vision#1091](https://github.com/pytorch/vision/pull/1091), and was soon
# [met](https://github.com/prajjwal1/autonomous-object-detection/issues/7). For the loss a class is an index, not a quantity:

# %%
assert model([image], [{"boxes": row[:, :4], "labels": row[:, 4].to(torch.int64)}])

# %% [markdown]
# ### No message: the label 0
#
# Classes counted from 0, as most classifiers do. To a detector 0 is the background, so every box tells it: *nothing here*.
# It trains without complaint, to find nothing. The losses do show it, if you know where to look:

# %%
with_zero = model([image], [{"boxes": boxes, "labels": torch.tensor([0])}])
with_one = model([image], [{"boxes": boxes, "labels": torch.tensor([1])}])
for label, losses in ((0, with_zero), (1, with_one)):
    print(f"label {label}: loss_box_reg is 0: {bool(losses['loss_box_reg'] == 0)}")
assert with_zero["loss_box_reg"] == 0 < with_one["loss_box_reg"]

# %% [markdown]
# Without one box that counts as an object, there is none to regress. In [vision#1952](https://github.com/pytorch/vision/issues/1952) the
# symptom was a model that predicts nothing in evaluation. Count from 1, and have an `assert` for it:

# %%
counted_from_zero = torch.tensor([0, 1, 1])
class_labels = counted_from_zero + 1
assert class_labels.min() >= 1 and class_labels.max() < num_classes

# %% [markdown]
# ## Calling the model
#
# ### `AssertionError: targets should not be none when in training mode`
#
# Met when predicting: a model is in training mode when it is built, and after every epoch of training.

# %%
model.train()
with expect(AssertionError):
    model([image])

# %% [markdown]
# As in [torchstudio#43](https://github.com/TorchStudio/torchstudio/issues/43), the targets are not what is missing; `model.eval()` is.
# (The library's `predict` sets it, and puts the model back into the mode that it was in.)

# %%
model.eval()
with torch.no_grad():
    (prediction,) = model([image])
print(sorted(prediction))
assert {"boxes", "labels", "scores"} <= prediction.keys()

# %% [markdown]
# ### `AttributeError: 'list' object has no attribute 'values'`
#
# The reverse: a loss is wanted, and the model is in evaluation mode. Then it ignores the targets and returns predictions, in a list:

# %%
with expect(AttributeError):
    sum(model([image], [target]).values())

# %% [markdown]
# In a training loop, `model.train()` belongs at the start of every epoch, since evaluation has left the model in the
# other mode. Those who wanted a loss on validation images met this too
# ([vision#1350](https://github.com/pytorch/vision/issues/1350), [vision#1605](https://github.com/pytorch/vision/pull/1605)): use
# training mode without gradients, and BatchNorm kept as in evaluation, which is what `validation_loss` does (notebook
# [04](04_penn_fudan_mask_rcnn.ipynb)).

# %%
from tutorial_lib.engine import validation_loss

loader = DataLoader([(image, target)], collate_fn=collate_fn)
assert validation_loss(model, loader, device) > 0
assert not model.training  # as it was

# %% [markdown]
# ## Building a model
#
# ### `ValueError: The parameter 'num_classes' expected value 91 but got 2 instead.`
#
# COCO weights and two classes, asked for at once. (It stops before anything is downloaded.)

# %%
from torchvision.models.detection import fasterrcnn_resnet50_fpn

with expect(ValueError):
    fasterrcnn_resnet50_fpn(weights="DEFAULT", num_classes=2)

# %% [markdown]
# The weights hold a classifier for 91 classes. Before torchvision checked it, this was a `size mismatch` while loading
# ([vision#4263](https://github.com/pytorch/vision/issues/4263), [vision#2555](https://github.com/pytorch/vision/issues/2555)). Load the
# whole model first, then replace its predictor, as in notebook [02](02_finetuning_a_predictor.ipynb). Here with the small model, which has
# no COCO weights:

# %%
from tutorial_lib.models import replace_box_predictor

finetuned = replace_box_predictor(new_model(num_classes=91), num_classes=2)
assert finetuned.roi_heads.box_predictor.cls_score.out_features == 2
assert finetuned([image], [target])

# %% [markdown]
# ### `ValueError: backbone should contain an attribute out_channels`
#
# The features of a classifier, put where a backbone is wanted:

# %%
from torchvision.models.detection import FasterRCNN

trunk = torchvision.models.mobilenet_v3_small(weights=None).features
with expect(ValueError):
    FasterRCNN(trunk, num_classes=2)

# %% [markdown]
# The heads have to know how many channels come out ([pytorch#159203](https://github.com/pytorch/pytorch/issues/159203)). Rather
# than to look the number up, ask the trunk:

# %%
with torch.no_grad():
    features = trunk(torch.rand(1, 3, 96, 128))
trunk.out_channels = features.shape[1]
print(tuple(features.shape))
assert FasterRCNN(trunk, num_classes=2).backbone is trunk

# %% [markdown]
# ### `ValueError: num_classes should be None when box_predictor is specified`
#
# A predictor of your own knows its number of classes, and a second number could contradict it:

# %%
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

predictor = FastRCNNPredictor(in_channels=1024, num_classes=2)
with expect(ValueError):
    FasterRCNN(trunk, num_classes=2, box_predictor=predictor)

# %% [markdown]
# Give one of the two. (Give neither, and it says `num_classes should not be None when box_predictor is not specified`.)

# %%
own = FasterRCNN(trunk, box_predictor=predictor)
assert own.roi_heads.box_predictor is predictor

# %% [markdown]
# ### `AssertionError: Anchors should be Tuple[Tuple[int]] […] There needs to be a match between the number of feature maps passed and the number of sizes / aspect ratios specified.`
#
# Every feature map needs anchors of its own. The default has five tuples of sizes, for the five maps of an FPN, and this trunk
# gives a single map. It is noticed only when an image comes:

# %%
size = {"min_size": 96, "max_size": 128}
single_map = FasterRCNN(trunk, num_classes=2, **size)
with expect(AssertionError):
    single_map([image], [target])

# %% [markdown]
# [vision#3246](https://github.com/pytorch/vision/issues/3246) and [vision#2947](https://github.com/pytorch/vision/issues/2947) are
# about this message and its history. Count the maps; give as many inner tuples of sizes, and of aspect ratios. Mind the comma:
# `((32, 64, 128),)` is one map with three sizes, `((32,), (64,), (128,))` is three maps with one.

# %%
from torchvision.models.detection.anchor_utils import AnchorGenerator

anchors = AnchorGenerator(sizes=((32, 64, 128),), aspect_ratios=((0.5, 1.0, 2.0),))
single_map = FasterRCNN(trunk, num_classes=2, rpn_anchor_generator=anchors, **size)
assert len(anchors.sizes) == 1  # the number of maps
assert single_map([image], [target])

# %% [markdown]
# ## Training
#
# ### `Loss is nan, stopping training`
#
# With these words torchvision's reference script ends, and does not say which image it was. `train_one_epoch` of this project does.
# Here image 7 holds a NaN, as from a division by a standard deviation of 0:

# %%
from tutorial_lib.engine import train_one_epoch

broken = image.clone()
broken[0, 0, 0] = float("nan")
loader = DataLoader([(broken, target)], collate_fn=collate_fn)
victim = new_model()
optimizer = torch.optim.SGD(victim.parameters(), lr=0.005)
with expect(FloatingPointError, "the loss is not finite", "image_id [7]"):
    train_one_epoch(victim, optimizer, loader, device, progress=False)

# %% [markdown]
# Look for the cause in this order. The **pixels** of the images named: are they finite, and in [0, 1]? Their **boxes**: inside the image,
# and not degenerate ([vision#1120](https://github.com/pytorch/vision/issues/1120))? Only then the **learning rate**: divide it by
# 10, or lengthen the warm-up ([vision#997](https://github.com/pytorch/vision/issues/997)). And do not go on with that model:
# BatchNorm has put the NaN into its running averages.

# %%
assert not torch.isfinite(broken).all()  # the pixels it was
assert not all(torch.isfinite(b).all() for b in victim.buffers())
loader = DataLoader([(broken.nan_to_num(0), target)], collate_fn=collate_fn)
fresh = new_model()
optimizer = torch.optim.SGD(fresh.parameters(), lr=0.005)
means = train_one_epoch(fresh, optimizer, loader, device, progress=False)
assert means["loss"] > 0

# %% [markdown]
# ### `torch.OutOfMemoryError: CUDA out of memory.`
#
# Not triggered here: it takes a GPU whose memory is full. What can be had on a CPU is the reason. For the backward pass every layer
# keeps what it computed, and these bytes can be counted:


# %%
def kept_bytes(batch_size, min_size):
    """What the backbone keeps for the backward pass, its parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _ = model.backbone(torch.rand(batch_size, 3, min_size, min_size * 4 // 3))
        return sum(kept.values())


model.train()
base = kept_bytes(batch_size=1, min_size=192)
for batch_size, min_size in ((1, 192), (2, 192), (1, 384)):
    times = kept_bytes(batch_size, min_size) / base
    print(f"batch size {batch_size}, min_size {min_size}: {times:.1f} times the memory")

# %% [markdown]
# These models need much memory for training, as a maintainer says in [vision#1867](https://github.com/pytorch/vision/issues/1867)
# ([pytorch#40863](https://github.com/pytorch/pytorch/issues/40863) is another such report). So:
#
# - lower `batch_size` first. Then lower `min_size` **and** `max_size`, which small objects suffer from. In this project all three are fields
#   of the preset, as the next cell shows. In your own code the first is the `DataLoader`'s, the others are arguments of the model's builder;
# - in a notebook, restart the kernel before you try again. While the error is shown, what the step has taken is not given back;
# - compute the backbone in bfloat16 (notebook [04](04_penn_fudan_mask_rcnn.ipynb));
# - evaluate under `torch.no_grad()`: nothing is kept. Sum up losses with `.item()`, or every step's graph stays alive;
# - if one small image is too much, something else has filled the GPU's memory: `nvidia-smi` says whether another notebook did.

# %%
import dataclasses

smaller = dataclasses.replace(
    preset,
    batch_size=1,
    min_size=tuple(size // 2 for size in preset.min_size),
    max_size=preset.max_size // 2,
)
assert smaller.max_size < preset.max_size
assert abs(kept_bytes(2, 192) / base - 2) < 0.1
assert abs(kept_bytes(1, 384) / base - 4) < 0.2
with torch.no_grad():
    assert kept_bytes(1, 192) == 0

# %% [markdown]
# ## Evaluation with pycocotools
#
# This project's `evaluate` needs neither ids nor a dictionary in COCO's format (notebook
# [06](06_evaluating_detections.ipynb)), so the next two cannot happen to it. Whoever uses pycocotools meets them.
#
# ### `AssertionError: Results do not correspond to current coco set`
#
# A result for an image that is not in the ground truth:

# %%
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def coco_set(image_ids, annotations):
    coco = COCO()
    coco.dataset = {
        "info": {},  # some versions of pycocotools ask for it
        "images": [{"id": i} for i in image_ids],
        "annotations": annotations,
        "categories": [{"id": 1}],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        coco.createIndex()
    return coco


box = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [40, 20, 20, 60]}
truth = coco_set([7], [{**box, "area": 1200, "iscrowd": 0}])
numbered_anew = [{**box, "image_id": 0, "score": 0.9}]
with expect(AssertionError), contextlib.redirect_stdout(io.StringIO()):
    truth.loadRes(numbered_anew)

# %% [markdown]
# The `image_id` of a result has to be one of the ground truth's: not its position in the loader, not the file's name, not `"7"` where the
# ground truth has `7`, and of the same split
# ([cocoapi#497](https://github.com/cocodataset/cocoapi/issues/497), [ultralytics#22168](https://github.com/ultralytics/ultralytics/issues/22168)). Carry the id along
# in the target, and compare before you load:

# %%
results = [{**box, "image_id": target["image_id"], "score": 0.9}]
assert {result["image_id"] for result in results} <= set(truth.getImgIds())
with contextlib.redirect_stdout(io.StringIO()):
    found = truth.loadRes(results)
assert len(found.getAnnIds()) == 1

# %% [markdown]
# ### `Average Precision (AP) @[ IoU=0.50:0.95 | area= all | maxDets=100 ] = -1.000`
#
# No error, but a number that no AP can be. Here the ground truth has the image and no objects:


# %%
def summary(truth, results):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        coco_eval = COCOeval(truth, truth.loadRes(results), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    lines = printed.getvalue().splitlines()
    return coco_eval.stats, [line for line in lines if "Average Precision" in line]


stats, lines = summary(coco_set([7], []), results)
print(*lines, sep="\n")
assert stats.max() == -1

# %% [markdown]
# -1 says that **there was nothing to measure on** ([cocoapi#594](https://github.com/cocodataset/cocoapi/issues/594)). In *all* rows: the
# ground truth has no objects of the classes evaluated; it is a test set without annotations, or its ids do not fit. In some
# rows: there are no objects of that size, which is in order. A wrong box gives 0, not -1. With its object back, only the
# rows for small and large objects stay at -1, for the person has an area of 1200 pixels, between 32² and 96²:

# %%
stats, lines = summary(truth, results)
print(*lines, sep="\n")
assert abs(stats[0] - 1) < 1e-9 and stats[4] == stats[0]
assert stats[3] == stats[5] == -1
wrong_place = [{**results[0], "bbox": [0, 0, 20, 60]}]
assert summary(truth, wrong_place)[0][0] == 0

# %% [markdown]
# Never average over rows that hold a -1. In the results of `evaluate` such a number is `None`, and adding it raises an error.
#
# ## Saving and loading
#
# ### `RuntimeError: size mismatch for roi_heads.box_predictor.cls_score.weight`
#
# A checkpoint of a model with three classes, for a model with two. Its message has a line for each of the four tensors whose shapes differ; of
# the first, the cell prints the name and a shape:

# %%
three = new_model(num_classes=3).state_dict()
name = "roi_heads.box_predictor.cls_score.weight"
with expect(RuntimeError, f"size mismatch for {name}", "torch.Size([3, 192])"):
    model.load_state_dict(three)

# %% [markdown]
# The shapes tell the number of classes of the checkpoint: 3. Build the model with that number, and it loads; see
# [detecto#50](https://github.com/alankbi/detecto/issues/50) for someone with 91 and 3. `strict=False` does not help: it forgives tensors
# that are missing, not those of another shape:

# %%
with expect(RuntimeError, f"size mismatch for {name}"):
    model.load_state_dict(three, strict=False)

in_checkpoint = len(three[name])
same = new_model(num_classes=in_checkpoint)
assert str(same.load_state_dict(three)) == "<All keys matched successfully>"

# %% [markdown]
# If you want the rest of such a checkpoint for a task with other classes, leave the predictor out, and check that nothing
# else is missing:

# %%
rest = {k: v for k, v in three.items() if ".box_predictor." not in k}
loaded = new_model(num_classes=2).load_state_dict(rest, strict=False)
print(*loaded.missing_keys, sep="\n")
assert not loaded.unexpected_keys
assert all(".box_predictor." in key for key in loaded.missing_keys)

# %% [markdown]
# ### `UnpicklingError: Weights only load failed.`
#
# Somebody saved the whole model, `torch.save(model, …)`, and not its state dict:

# %%
file = io.BytesIO()
torch.save(model, file)
file.seek(0)
parts = ("Weights only load failed", "Unsupported global", "faster_rcnn.FasterRCNN")
with expect(pickle.UnpicklingError, *parts):
    torch.load(file)

# %% [markdown]
# Such a file is a program: loading it runs what its author put in. Since PyTorch 2.6 `torch.load` therefore takes only tensors and plain
# containers ([torch.load](https://docs.pytorch.org/docs/stable/generated/torch.load.md)), and files that loaded before do so no more
# ([audio#3911](https://github.com/pytorch/audio/issues/3911)). `weights_only=False` is what threads often advise; it is right for a
# file that you wrote yourself and for no other. Use it once, then save the state dict, which loads everywhere:

# %%
file.seek(0)
mine = torch.load(file, weights_only=False)  # we wrote it ourselves
file = io.BytesIO()
torch.save(mine.state_dict(), file)
file.seek(0)
state = torch.load(file)
model.load_state_dict(state)
assert all(torch.equal(v, state[k]) for k, v in mine.state_dict().items())

# %% [markdown]
# ## Find them all before training
#
# Errors come one at a time, and the silent ones never. `check_dataset` reads every sample of a dataset, and says in plain English what would
# fail or be learned wrongly. A dataset can be a plain list; this one has five of the mistakes above, and one sample that is in order:

# %%
from tutorial_lib.checks import check_dataset

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
print(report)
assert {error.index for error in report.errors} == {1, 2, 3, 4, 5}

# %% [markdown]
# In a script, let it stop the run before the first step:

# %%
with expect(ValueError, "sample 1", "sample 2", "sample 3"):
    report.raise_for_errors()

# %% [markdown]
# All fixed, with what stands above. The last sample keeps its label 2, and the model gets a third class; the one with 0
# is taken to have been counted from 0:

# %%
fixed_samples = [
    samples[0],
    (to_dtype(decoded, torch.float32, scale=True), samples[1][1]),
    (image, {**samples[2][1], "boxes": box_convert(from_coco, "xywh", "xyxy")}),
    (image, {**samples[3][1], "boxes": boxes_from_masks(thin)}),
    (image, {**samples[4][1], "labels": samples[4][1]["labels"] + 1}),
    samples[5],
]
check_dataset(fixed_samples, num_classes=3, progress=False).raise_for_errors()
images, targets = zip(*fixed_samples, strict=True)
losses = new_model(num_classes=3)(list(images), list(targets))
assert all(torch.isfinite(loss) for loss in losses.values())

# %% [markdown]
# It cannot know what you meant. The box near the corner, read in the wrong format, is a box like any other; only a mask beside
# it gives it away. So look at pictures as well:

# %%
person = torch.zeros(1, 96, 128, dtype=torch.uint8)
person[0, 15:75, 10:30] = 1
for masks in ({}, {"masks": person}):
    sample = (near_corner, {"boxes": as_in_file, "labels": labels, **masks})
    report = check_dataset([sample], num_classes=2, progress=False)
    print("with" if masks else "without", "a mask:", [e.kind for e in report.errors])
    assert bool(report.errors) == bool(masks)

# %% [markdown]
# ## Recap
#
# - **Read** a traceback from below: the message, then the lowest line of your own.
# - **Run** one batch on the CPU before a GPU sees it.
# - **Look** at images with their boxes, for what gives no message.
# - **Count** classes from 1, and `num_classes` with the background.
# - **Check** the whole dataset once, in the script, before training.

# %% [markdown]
# ## On your own
#
# 1. Give a Mask R-CNN (`maskrcnn_mini_fpn`) a target without `masks`, then one with masks of another size than the image. Which of
#    the two complains?
#    <details><summary>Hint</summary>Only the first: <code>Every element of targets should have a masks key</code>. Check the second yourself:
#    <code>masks.shape[-2:] == image.shape[-2:]</code>.</details>
# 2. Load a list of no results with pycocotools: `truth.loadRes([])`. When would a model give you that, and what should AP be?
#    <details><summary>Hint</summary>After its first steps, if it finds nothing yet. AP is 0; you meet an <code>IndexError</code> instead. Compare what
#    <code>evaluate</code> says.</details>
# 3. Add a seventh sample with a mistake of your own to the list, and see whether `check_dataset` finds it.
#    <details><summary>Hint</summary>Two boxes and one label; boxes in [0, 1]; a box that leaves the image; an image that was normalised already.</details>

# %% [markdown]
# ## In practice
#
# - The messages are those of torch 2.14 and torchvision 0.29; every one that a cell prints was raised by that cell. Older versions say some of them in other
#   words, or not at all.
# - Three were not raised: `device-side assert triggered` and `CUDA out of memory` need a GPU, and the first of them ends the session;
#   `Loss is nan` is printed by torchvision's reference script, and this project has an error of its own instead. The `nms` error was raised for an
#   operator that we made up.
# - When you ask for help, give the whole traceback, the output of `python -m torch.utils.collect_env`, and the shapes and types of **one** sample.
# - Remove `CUDA_LAUNCH_BLOCKING=1` afterwards: it makes training slow.
#
# ## Further reading
#
# - torchvision's [issues](https://github.com/pytorch/vision/issues): search for the message in quotation marks, with closed issues included.
# - Where the checks of boxes stand:
#   [generalized_rcnn.py](https://github.com/pytorch/vision/blob/main/torchvision/models/detection/generalized_rcnn.py), 130 lines that are worth reading.
# - [Serialization semantics](https://pytorch.org/docs/stable/notes/serialization), on what a checkpoint is.
#
# **Next:** [08, look inside Mask R-CNN](08_inside_mask_rcnn.ipynb).
