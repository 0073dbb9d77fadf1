"""Replacing a detector's predictors, and building its backbone from any classification trunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from os.path import commonprefix

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool


def replace_box_predictor(model: FasterRCNN, num_classes: int) -> FasterRCNN:
    """Give a Faster or Mask R-CNN a new, untrained classifier and box regressor, in place.

    Args:
        model: with torchvision's ``roi_heads.box_predictor``.
        num_classes: with the background, so 2 for people only.

    Returns:
        The model. The new layers have the device and the dtype of the old ones.

    Source: notebook 02.
    """
    old = model.roi_heads.box_predictor.cls_score
    new = FastRCNNPredictor(old.in_features, num_classes)
    model.roi_heads.box_predictor = new.to(old.weight)
    return model


def replace_mask_predictor(model: MaskRCNN, num_classes: int) -> MaskRCNN:
    """Give a Mask R-CNN a new, untrained last layer for its masks, in place.

    The transposed convolution before it does not depend on the classes, and keeps what it has learned.

    Args:
        model: with torchvision's ``roi_heads.mask_predictor``.
        num_classes: with the background, so 2 for people only.

    Returns:
        The model. The new layer has the device and the dtype of the old one.

    Source: notebook 04.
    """
    old = model.roi_heads.mask_predictor.mask_fcn_logits
    new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1)
    model.roi_heads.mask_predictor.mask_fcn_logits = new.to(old.weight)
    return model


def replace_predictors(model: FasterRCNN, num_classes: int) -> FasterRCNN:
    """Replace every predictor that a Faster or Mask R-CNN has, in place: for boxes, and for masks where it has them.

    Args:
        model: torchvision's Faster R-CNN or Mask R-CNN, of any backbone.
        num_classes: with the background, so 2 for people only.

    Raises:
        TypeError: the model has no ``roi_heads.box_predictor``; the message says what it is.

    Source: notebooks 02 and 04.
    """
    if not hasattr(getattr(model, "roi_heads", None), "box_predictor"):
        need = "give a Faster or Mask R-CNN (of a DataParallel or DistributedDataParallel, its .module)"
        raise TypeError(f"a {type(model).__name__} has no roi_heads.box_predictor: {need}")
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
    names = [name for name in evaluation if name in set(train)]
    size = 256
    with torch.no_grad(), mode_kept(trunk):
        outputs = create_feature_extractor(trunk.eval(), names)(torch.zeros(1, 3, size, size))
    strides: dict[str, tuple[int, int, bool]] = {}
    for name, output in outputs.items():
        if isinstance(output, Tensor) and output.ndim == 4:
            for stride in (4, 8, 16, 32):
                cells, coarsest = (size // stride,) * 2, max((s for s, _, _ in strides.values()), default=0)
                if stride >= coarsest and cells in (output.shape[2:], output.shape[1:3]):
                    last = output.shape[2:] != cells
                    strides[name] = stride, output.shape[3 if last else 1], last
    found: dict[int, tuple[str, int, bool]] = {}
    for name, (stride, channels, last) in strides.items():
        following = next((other for other, (s, _, _) in strides.items() if s > stride), "")
        # With a longer common prefix it is inside the block that halves the resolution.
        if len(commonprefix([name.split("."), following.split(".")])) < 2:
            found[stride] = name, channels, last
    return found


class TrunkWithFPN(nn.Module):
    """A classification trunk under a feature pyramid; :func:`backbone_with_fpn` builds it."""

    def __init__(self, trunk: nn.Module, nodes: dict[int, tuple[str, int, bool]], out_channels: int):
        super().__init__()
        self.body = create_feature_extractor(trunk, {name: str(i) for i, (name, _, _) in enumerate(nodes.values())})
        self.channels_last = [last for _, _, last in nodes.values()]
        in_channels = [channels for _, channels, _ in nodes.values()]
        self.fpn = FeaturePyramidNetwork(in_channels, out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = {
            name: feature.permute(0, 3, 1, 2) if last else feature
            for (name, feature), last in zip(self.body(images).items(), self.channels_last, strict=True)
        }
        return self.fpn(features)


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


@torch.no_grad()
def best_anchor_ious(model: FasterRCNN, images: Sequence[Tensor], targets: Sequence[dict]) -> Tensor:
    """How well the anchors fit: for every ground-truth box its IoU with the closest anchor.

    The IoU is taken in the resized image, where the anchors are, so it depends on ``min_size`` and
    ``max_size`` too, and on nothing that is trained.

    Args:
        model: torchvision's Faster or Mask R-CNN, or another with ``transform``, ``backbone`` and
            ``rpn.anchor_generator``. It is left in the mode it was in.
        images: float32 [3, H, W] in [0, 1], of any sizes, on the model's device.
        targets: one for each image; only ``boxes``, float32 [N, 4] XYXY in the image's pixels, is read.

    Returns:
        float32 [all N together] in [0, 1], in the order of the images and of their boxes.

    Raises:
        ValueError: there are no images, or not as many targets as images.
        AssertionError: from torchvision; the anchors do not have one tuple of sizes for each feature map.

    Source: notebook 09.
    """
    if not images or len(images) != len(targets):
        raise ValueError(f"{len(images)} images and {len(targets)} targets: give one target for each image")
    with mode_kept(model):
        model.eval()
        batch, resized = model.transform(list(images), [{"boxes": target["boxes"]} for target in targets])
        features = model.backbone(batch.tensors)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        anchors = model.rpn.anchor_generator(batch, maps)
    return torch.cat([box_iou(t["boxes"], a).amax(dim=1) for t, a in zip(resized, anchors, strict=True)])
