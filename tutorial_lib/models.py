"""Replacing a detector's predictors, and building its backbone from any classification trunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool


def _predictor(model: nn.Module, name: str, num_classes: int) -> nn.Module:
    """The predictor of this name, or an error that says what to do with another model or number."""
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}: it counts the background too, so give at least 2")
    if (found := getattr(getattr(model, "roi_heads", None), name, None)) is None:
        advice = "give a Faster R-CNN, or for a mask branch a Mask R-CNN; of a (Distributed)DataParallel, its .module"
        if hasattr(getattr(model, "head", None), "classification_head"):
            new = f"get_model(NAME, weights=None, weights_backbone=None, num_classes={num_classes}).head"
            advice = f"before .to(device), with its NAME,\nmodel.head.classification_head = {new}.classification_head"
        raise TypeError(f"a {type(model).__name__} has no roi_heads.{name}: {advice}")
    return found


@torch.no_grad()
def start_from_mean(new: nn.Module, old: nn.Module, rows: int = 1) -> nn.Module:
    """Fill a predictor's layer: background as in the old layer, each other class with the mean of the old classes.

    The old layers can already place a box around most things, so their mean is a better start than random numbers.
    (Of COCO's 90 numbers, ten are of no class, and are in the mean, too.) For a class that the model knows, its own
    rows can be copied: notebook 02's second exercise.

    Args:
        new, old: ``cls_score``, ``bbox_pred`` or ``mask_fcn_logits``, of as many inputs.
        rows: of a class in the weights: 4 in ``bbox_pred``, 1 in the others.

    Returns:
        The new layer.

    Source: notebook 02; what it gains is measured in notebook 10.
    """
    for value, before in zip(new.parameters(), old.parameters(), strict=True):
        background, *classes = before.split(rows)
        mean = torch.stack(classes).mean(dim=0)
        value.copy_(torch.cat([background, *[mean] * (len(value) // rows - 1)]))
    return new


def replace_box_predictor(model: FasterRCNN, num_classes: int) -> FasterRCNN:
    """Give a Faster or Mask R-CNN a classifier and a box regressor for other classes, in place.

    They start as :func:`start_from_mean` says.

    Args:
        model: with torchvision's ``roi_heads.box_predictor``.
        num_classes: with the background, so 2 for people only.

    Returns:
        The model. Its new layers have the device and the dtype of the old ones.

    Raises:
        ValueError, TypeError: as :func:`replace_predictors`.

    Source: notebook 02.
    """
    old = _predictor(model, "box_predictor", num_classes)
    new = FastRCNNPredictor(old.cls_score.in_features, num_classes).to(old.cls_score.weight)
    start_from_mean(new.cls_score, old.cls_score)
    start_from_mean(new.bbox_pred, old.bbox_pred, rows=4)
    model.roi_heads.box_predictor = new
    return model


def replace_mask_predictor(model: MaskRCNN, num_classes: int) -> MaskRCNN:
    """Give a Mask R-CNN the last layer of its masks for other classes, in place.

    It starts as :func:`start_from_mean` says. The transposed convolution before it does not depend on the classes,
    and keeps what it has learned.

    Args:
        model: with torchvision's ``roi_heads.mask_predictor``.
        num_classes: with the background, so 2 for people only.

    Returns:
        The model. The new layer has the device and the dtype of the old one.

    Raises:
        ValueError, TypeError: as :func:`replace_predictors`.

    Source: notebook 04.
    """
    old = _predictor(model, "mask_predictor", num_classes).mask_fcn_logits
    new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1).to(old.weight)
    model.roi_heads.mask_predictor.mask_fcn_logits = start_from_mean(new, old)
    return model


def replace_predictors(model: FasterRCNN, num_classes: int) -> FasterRCNN:
    """Replace every predictor that a Faster or Mask R-CNN has, in place: for boxes, and for masks where it has them.

    Args:
        model: torchvision's Faster R-CNN or Mask R-CNN, of any backbone. Of a Keypoint R-CNN too the predictor for
            boxes is replaced; that for keypoints stays, since it does not depend on the classes.
        num_classes: with the background, so 2 for people only.

    Raises:
        ValueError: ``num_classes`` is under 2.
        TypeError: the model has no such predictor. The message says what the model is, and for a RetinaNet, FCOS, SSD
            or SSDlite the line that replaces its classification head, where NAME is the name that ``get_model`` has
            for it.

    Source: notebooks 02 and 04.
    """
    replace_box_predictor(model, num_classes)
    return replace_mask_predictor(model, num_classes) if model.roi_heads.has_mask() else model


@contextlib.contextmanager
def mode_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into the training or evaluation mode it is in now."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def feature_nodes(trunk: nn.Module) -> dict[int, tuple[str, int, bool]]:
    """Where a classification trunk ends each of its resolutions.

    Args:
        trunk: one that torch.fx can trace, as most of ``torchvision.models`` are.

    Returns:
        For the strides 4, 8, 16 and 32, as far as the trunk has them: the graph node
        (``torchvision.models.feature_extraction``), its channels, and whether they come last in
        its shape, as in Swin.

    Source: notebook 09.
    """
    train, evaluation = get_graph_node_names(trunk)
    blocks = {tuple(name.split(".")[:2]): name for name in evaluation if name in set(train)}  # the last node of each
    with torch.no_grad(), mode_kept(trunk):
        outputs = create_feature_extractor(trunk.eval(), list(blocks.values()))(torch.zeros(1, 3, 256, 256))
    found: dict[int, tuple[str, int, bool]] = {}
    for name, output in outputs.items():
        for stride in (4, 8, 16, 32):
            height_and_width, shape = (256 // stride,) * 2, getattr(output, "shape", ())
            if len(shape) == 4 and height_and_width in (shape[2:], shape[1:3]):
                last = shape[2:] != height_and_width
                found[stride] = name, shape[3 if last else 1], last
    return found


class TrunkWithFPN(nn.Module):
    """A classification trunk under a feature pyramid; :func:`backbone_with_fpn` builds it."""

    def __init__(self, trunk: nn.Module, nodes: dict[int, tuple[str, int, bool]], out_channels: int):
        super().__init__()
        names, channels, self.channels_last = zip(*nodes.values(), strict=True)
        self.body = create_feature_extractor(trunk, {name: str(i) for i, name in enumerate(names)})
        self.fpn = FeaturePyramidNetwork(list(channels), out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = zip(self.body(images).items(), self.channels_last, strict=True)
        return self.fpn({name: map.permute(0, 3, 1, 2) if last else map for (name, map), last in maps})


def backbone_with_fpn(name: str, weights: WeightsEnum | str | None = None, out_channels: int = 256) -> TrunkWithFPN:
    """A backbone for torchvision's detectors from any of its classification trunks that has the four usual strides.

    Args:
        name: as in ``torchvision.models.list_models(module=torchvision.models)``.
        weights: of the trunk; "DEFAULT", a member of its weights enum, or None for random ones.
        out_channels: of every level of the pyramid.

    Returns:
        A module from images float [N, 3, H, W] to a dict of five levels, "0" to "3" at strides 4, 8, 16
        and 32 and "pool" at 64, each [N, out_channels, ...].

    Raises:
        ValueError: the trunk has no features at one of the strides, or cannot be traced; the message
            says which.

    Source: Lin et al., arXiv 1612.03144; notebook 09.
    """
    trunk = get_model(name, weights=weights)
    try:
        nodes = feature_nodes(trunk)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be traced on 256 x 256 pixels ({reason}); take another trunk") from error
    if missing := [stride for stride in (4, 8, 16, 32) if stride not in nodes]:
        raise ValueError(f"{name} has no features at stride {missing}, which a pyramid needs; take another trunk")
    return TrunkWithFPN(trunk, dict(sorted(nodes.items())), out_channels)
