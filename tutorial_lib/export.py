"""Out of the notebook: a trained detector as an ONNX file, and a script that runs it without torch (notebook 05)."""

import copy
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

_SCRIPT = '''"""Run NAME.onnx: python NAME_run.py PHOTO ...   It needs onnxruntime, numpy and pillow, and no torch.
For each detection: label, score, box (x1 y1 x2 y2 in pixels). Beside each photo it writes PHOTO_detections.png."""
import os, sys, numpy, onnxruntime
from PIL import Image, ImageDraw, ImageOps
categories = CATEGORIES
model = onnxruntime.InferenceSession(__file__.removesuffix("_run.py") + ".onnx", providers=["CPUExecutionProvider"])
for path in sys.argv[1:]:
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":  # 16 bits or more: scaled, as in training
        image = Image.fromarray(numpy.interp(image, image.getextrema(), (0, 255)).round().astype(numpy.uint8))
    image = image.convert("RGB")
    values = numpy.array(image, dtype=numpy.float32).transpose(2, 0, 1) / 255
    for box, label, score, *masks in zip(*model.run(None, {"image": values})):
        if score >= 0.5:
            print(categories[label], f"{score:.3f}", *(f"{edge:.1f}" for edge in box))
            for mask in masks:  # one from Mask R-CNN, [1, H, W] in [0, 1]
                image.paste((0, 160, 0), mask=Image.fromarray((mask[0] > 0.5).astype(numpy.uint8) * 100))
            ImageDraw.Draw(image).rectangle(box.tolist(), outline="red", width=2)
    image.save(os.path.splitext(path)[0] + "_detections.png")
'''


def _resize(transform, image: Tensor) -> Tensor:
    """``transform.resize`` in a trace, with the size that it has outside: torchvision's goes over to float32."""
    size = torch.stack(image.shape[-2:]).double()
    scale = (torch.tensor([transform.min_size[-1], transform.max_size]) / size.sort().values).min()
    size = (size * scale).floor().long().unbind()
    return torch.nn.functional.interpolate(image[None], size=size, mode="bilinear")[0]


def export_onnx(model: FasterRCNN, path: str | Path, images: list[Tensor], categories: list[str] | None = None) -> dict:
    """Write a Faster or Mask R-CNN as an ONNX file that takes an image of any size, and a script that runs it.

    Resizing, normalization and NMS are inside. The file's input ``image`` is float32 [3, H, W] in [0, 1]; its outputs
    are ``boxes`` float32 [N, 4] XYXY in the image's pixels, ``labels`` int64 [N], ``scores`` float32 [N], highest
    first, and of Mask R-CNN ``masks`` float32 [N, 1, H, W] in [0, 1]. ``score_thresh``, ``nms_thresh`` and
    ``detections_per_img`` of ``model.roi_heads``, and ``min_size`` and ``max_size``, are fixed in it: set them before.
    ``python NAME_run.py PHOTO ...``, beside ``NAME.onnx``, prints the detections and draws them, with numpy, Pillow
    and onnxruntime only.

    Both files appear when the ONNX file has been run on all images and agrees with PyTorch: each detection is in both,
    with the same label and with its box within 0.1 pixels (what 2 of 255 grey levels do). Left out are those whose
    score is within .001 of the threshold, or of the last one where ``detections_per_img`` are reached: rounding can
    take them away, as it can change the order of equal scores. Rarely two boxes are as close to ``nms_thresh``; then
    leave that image out. Measured with the mini models on 150 synthetic images of as many sizes and 100 photographs,
    with thresholds from .01 to .05, 20,000 detections: all were in both, boxes within .003 pixels, scores within 3e-5.
    Masks can differ more, .44 at a single pixel was seen: they are pasted at whole pixels, and where an enlarged box
    ends at a whole number, the smallest difference makes the mask a pixel wider. So that is given back, and is no
    error.

    This is the older exporter, ``torch.onnx.export(..., dynamo=False)``, which traces the model. In torch 2.10 and
    2.14 the default one fails, since ``torch.export`` does: ``torchvision.ops.batched_nms`` chooses its algorithm by
    the number of boxes ("Could not guard on data-dependent expression 4*u1 > 4000"). See pytorch/vision#9321 and
    #9462, pytorch/pytorch#146152. And in a trace torchvision computes the size to resize to in float32; for one image
    size in 7 to 20 it is then another, and so are the detections. Here it is in float64, as outside of a trace.

    Args:
        model: of torchvision or of this library, on any device, in any mode; it is left as it is. What is exported
            is a float32 copy on the CPU in evaluation mode, without :func:`tutorial_lib.engine.use_bfloat16`.
        path: of the ONNX file, NAME.onnx in a folder that exists.
        images: float32 [3, H, W] in [0, 1] on the CPU, of several sizes; something has to be detected in one.
        categories: the names that the script prints, the background first; without them it prints numbers.

    Returns:
        The largest differences over all images: of ``boxes`` in pixels, of ``scores``, and of ``masks``.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        TypeError: the model is no Faster or Mask R-CNN. (RetinaNet, SSD and FCOS are not supported.)
        ValueError: the ONNX file does not agree with PyTorch, an image has another shape or type (the message says
            which), nothing is detected, the path ends otherwise, or there are more or fewer categories than the
            model has. Nothing is written.

    Source: notebook 05.
    """
    try:
        import onnx, onnxruntime  # noqa: E401, F401, I001  torch.onnx.export needs the first
    except ImportError as error:
        raise ImportError(f'{error}; to write ONNX files: pip install "tutorial-lib[export]"') from error
    if not isinstance(model, FasterRCNN) or model.roi_heads.has_keypoint():
        raise TypeError(f"a {type(model).__name__} cannot be exported: give a Faster or Mask R-CNN, unwrapped")
    path, known = Path(path), range(model.roi_heads.box_predictor.cls_score.out_features)
    if path.suffix != ".onnx" or len(categories or known) != len(known):
        raise ValueError(f"{path} has to end in .onnx, and there have to be {len(known)} categories")
    for i, image in enumerate(images):
        if image.dtype != torch.float32 or image.ndim != 3 or len(image) != 3:
            raise ValueError(f"image {i} is {image.dtype} {list(image.shape)}; it has to be float32 [3, H, W]")
    model = copy.deepcopy(model).float().cpu().eval()
    for module in model.modules():
        vars(module).pop("forward", None)  # use_bfloat16 has put it there
    with torch.no_grad():
        predictions = [model([image])[0] for image in images]
    if not sum(len(wanted["labels"]) for wanted in predictions):
        raise ValueError(f"nothing is detected in {len(images)} images, so nothing can be compared: give others")
    model.transform.resize = lambda image, target: (_resize(model.transform, image), target)
    names, heads = list(predictions[0]), model.roi_heads
    largest = {name: 0.0 for name in names if name != "labels"}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        warnings.filterwarnings("ignore", module="torch|tutorial_lib")  # that it is old, and what a trace fixes
        file, script = Path(folder, path.name), Path(folder, f"{path.stem}_run.py")
        torch.onnx.export(
            model, ([images[0]],), file, dynamo=False, opset_version=17, input_names=["image"], output_names=names,
            dynamic_axes={"image": {1: "height", 2: "width"}},
        )  # fmt: skip
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for i, (image, wanted) in enumerate(zip(images, predictions, strict=True)):
            found = dict(zip(names, map(torch.from_numpy, session.run(None, {"image": image.numpy()})), strict=True))
            near = torch.cdist(found["boxes"], wanted["boxes"], p=torch.inf) <= 0.1
            near &= found["labels"][:, None] == wanted["labels"]
            alone = torch.cat([found["scores"][~near.any(dim=1)], wanted["scores"][~near.any(dim=0)]])
            least = max([heads.score_thresh, *wanted["scores"][heads.detections_per_img - 1 :].tolist()])
            if (alone > least + 1e-3).any():
                only = f"{len(alone)} detections, of scores up to {alone.max():.3f}, are of one of the two only"
                raise ValueError(f"image {i}: the ONNX file does not agree with PyTorch: {only}; nothing is written")
            first, second = near.nonzero(as_tuple=True)
            for name in largest if len(first) else ():
                largest[name] = max(largest[name], (found[name][first] - wanted[name][second]).abs().max().item())
        script.write_text(_SCRIPT.replace("CATEGORIES", repr(list(categories or known))), encoding="utf-8")
        file.replace(path)
        script.replace(path.with_name(script.name))
    return largest
