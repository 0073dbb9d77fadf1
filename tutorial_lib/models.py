"""The mini models and their weights, and the replacing of predictors.

The mini models are Faster R-CNN and Mask R-CNN put together from torchvision's own
parts, only narrower: a MobileNetV3-small trunk and a 96-channel FPN. They are
registered with torchvision, so that after importing this module
``torchvision.models.get_model("maskrcnn_mini_fpn", weights="DEFAULT")`` works as it
does for torchvision's models, from a file of this package, without a network.
"""

# No `from __future__ import annotations` here: torchvision finds a model's weights
# by reading the annotation of its `weights` parameter.

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from torchvision.models import Weights, WeightsEnum, get_model, mobilenet_v3_small
from torchvision.models._api import register_model
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms._presets import ObjectDetection

from tutorial_lib.engine import mode_kept
from tutorial_lib.sample import CATEGORIES


def _bilinear(start: Tensor, length: Tensor, bins: int, ratio: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels of one axis that RoIAlign interpolates between, and their weights: [N, bins, 2 * ratio] each."""
    step = (length / bins)[:, None, None]
    at = torch.arange(bins)[:, None] * step + (torch.arange(ratio) + 0.5) * step / ratio + start[:, None, None]
    last = (size - 1)[:, None, None].to(at.dtype)
    inside = (at >= -1) & (at <= last + 1)
    at = torch.minimum(at.where(inside, 0).clamp(min=0), last)
    low = at.floor()
    pixels = torch.stack([low, torch.minimum(low + 1, last)], dim=-1)
    weights = torch.stack([low + 1 - at, at - low], dim=-1) * inside[..., None] / ratio
    return pixels.flatten(2).long(), weights.flatten(2)


class EmbeddingBagRoIAlign(MultiScaleRoIAlign):
    """torchvision's ``MultiScaleRoIAlign``, several times as fast in training on a CPU.

    Each value of RoIAlign is a weighted mean of ``4 * sampling_ratio ** 2`` pixels of a feature map.
    ``torch.nn.functional.embedding_bag`` computes such sums, and their gradients, for all channels of a pixel at a time
    and with several threads; torchvision's gradient on a CPU goes through one number after the other with one.
    Values and gradients are the same up to rounding. On other devices, in a traced or scripted model, and with a
    ``sampling_ratio`` below 1, which stands for a number of its own for each box, it is torchvision's.

    Arguments, and those of ``forward``, are of ``torchvision.ops.MultiScaleRoIAlign``.

    Source: notebook 07; RoIAlign is of He et al., arXiv 1703.06870, the choice of a level of arXiv 1612.03144.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        features = [value for name, value in x.items() if name in self.featmap_names]
        on_cpu = all(value.device.type == "cpu" for value in features)
        if self.sampling_ratio < 1 or not on_cpu or torch.jit.is_tracing():
            return super().forward(x, boxes, image_shapes)
        if self.scales is None:  # found by torchvision at the first call
            super().forward(x, [value.new_zeros(0, 4) for value in features[:1]] * len(boxes), image_shapes)
        with torch.no_grad():
            level = self.map_levels(boxes)
            known = (level >= 0) & (level < len(features))  # torchvision leaves 0 what is of no map
            level = level.where(known, 0)
            image = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(of_image) for of_image in boxes]))
            height, width = torch.tensor([value.shape[-2:] for value in features])[level].unbind(1)
            pixels_before = torch.tensor([0, *(value[:, 0].numel() for value in features)]).cumsum(0)
            first = pixels_before[level] + image * height * width
            x1, y1, x2, y2 = (torch.cat(boxes) * torch.tensor(self.scales)[level, None]).unbind(1)
            bins_y, bins_x = self.output_size
            rows, row_weights = _bilinear(y1, (y2 - y1).clamp(min=1), bins_y, self.sampling_ratio, height)
            columns, column_weights = _bilinear(x1, (x2 - x1).clamp(min=1), bins_x, self.sampling_ratio, width)
            rows = first[:, None, None] + rows * width[:, None, None]
            index = rows[:, :, None, :, None] + columns[:, None, :, None, :]
            weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
            weights = weights * known[:, None, None, None, None]
        pixels = torch.cat([value.permute(0, 2, 3, 1).flatten(0, 2) for value in features])
        means = embedding_bag(
            index.flatten(3).flatten(0, 2), pixels, mode="sum",
            per_sample_weights=weights.flatten(3).flatten(0, 2).to(pixels.dtype),
        )  # fmt: skip
        return means.view(len(index), bins_y, bins_x, pixels.shape[1]).permute(0, 3, 1, 2).contiguous()

    def __prepare_scriptable__(self) -> MultiScaleRoIAlign:
        """What ``torch.jit.script`` takes in its place, and leaves in the model that it was given."""
        levels = {"canonical_scale": self.canonical_scale, "canonical_level": self.canonical_level}
        return MultiScaleRoIAlign(self.featmap_names, self.output_size, self.sampling_ratio, **levels)


def _mini_parts(num_classes: int) -> dict[str, Any]:
    # Momentum 0.1: with MobileNetV3's own 0.01 the running statistics lag behind in
    # a short training, and AP stays 0 while the loss falls.
    norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.1)
    trunk = mobilenet_v3_small(weights=None, norm_layer=norm_layer).features
    channels = 96
    backbone = BackboneWithFPN(
        trunk,
        return_layers={"1": "0", "3": "1", "8": "2", "11": "3"},
        in_channels_list=[16, 24, 48, 96],
        out_channels=channels,
    )
    return {
        "backbone": backbone,
        "rpn_anchor_generator": AnchorGenerator(
            sizes=((16,), (32,), (64,), (128,), (256,)), aspect_ratios=((0.5, 1.0, 2.0),) * 5
        ),
        "box_roi_pool": EmbeddingBagRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
        "box_head": TwoMLPHead(channels * 7**2, representation_size=192),
        "box_predictor": FastRCNNPredictor(192, num_classes),
    }


# Fewer proposals than torchvision's 2000 and 1000: small images hold fewer objects.
_MINI_DEFAULTS = {
    "min_size": 192, "max_size": 384,
    "rpn_pre_nms_top_n_train": 600, "rpn_post_nms_top_n_train": 300,
    "rpn_pre_nms_top_n_test": 300, "rpn_post_nms_top_n_test": 150,
    "box_batch_size_per_image": 64,
}  # fmt: skip


class _PackagedWeights(WeightsEnum):
    """Weights that are a file of this package: `url` is its name in the folder `weights`."""

    def get_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        path = _WEIGHTS / self.url
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.meta["sha256"]:
            raise RuntimeError(
                f"{path} is damaged: its SHA-256 is {found[:8]}…, not {self.meta['sha256'][:8]}…. "
                "Install the package again; in a clone, `git checkout` that file."
            )
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        return {name: t.float() if t.is_floating_point() else t for name, t in state_dict.items()}


# Both models share one file: Faster R-CNN leaves the mask branch out.
_WEIGHTS = Path(__file__).parent / "weights"
_STARTER = Weights(
    url="mini_fpn.pt",
    transforms=ObjectDetection,
    meta={
        "categories": CATEGORIES,
        "min_size": (1, 1),
        **json.loads((_WEIGHTS / "mini_fpn.json").read_text(encoding="utf-8")),
        "_docs": "Trained on scenes that tutorial_lib/sample.py draws; they have never seen a photograph.",
    },
)


class FasterRCNN_Mini_FPN_Weights(_PackagedWeights):
    DRAWN_V1 = _STARTER
    DEFAULT = DRAWN_V1


class MaskRCNN_Mini_FPN_Weights(_PackagedWeights):
    DRAWN_V1 = _STARTER
    DEFAULT = DRAWN_V1


def _num_classes(weights: WeightsEnum | None, num_classes: int | None) -> int:
    if weights is None:
        return 91 if num_classes is None else num_classes
    expected = len(weights.meta["categories"])
    if num_classes not in (None, expected):
        raise ValueError(
            f"num_classes={num_classes}, but {weights} knows {expected} (its meta['categories']). "
            "Load the weights without num_classes, then replace the predictors."
        )
    return expected


@register_model()
def fasterrcnn_mini_fpn(
    *, weights: FasterRCNN_Mini_FPN_Weights | None = None, num_classes: int | None = None, **kwargs: Any
) -> FasterRCNN:
    """Faster R-CNN with a MobileNetV3-small trunk and a 96-channel FPN over four of its levels.

    Args:
        weights: ``FasterRCNN_Mini_FPN_Weights.DEFAULT``, its name, or None for random weights.
        num_classes: with the background; taken from the weights, else 91 as in torchvision.
        kwargs: passed to ``torchvision.models.detection.FasterRCNN``; ``min_size`` is 192 and
            ``max_size`` 384 unless given, and there are fewer proposals than its defaults.

    Raises:
        ValueError: ``num_classes`` differs from what the weights were trained for.
        RuntimeError: the weights' file is damaged.

    Source: Ren et al., arXiv 1506.01497; notebook 02.
    """
    weights = FasterRCNN_Mini_FPN_Weights.verify(weights)
    parts = _mini_parts(_num_classes(weights, num_classes))
    model = FasterRCNN(**{**parts, **_MINI_DEFAULTS, **kwargs})
    if weights is not None:
        state_dict = weights.get_state_dict()
        model.load_state_dict({k: v for k, v in state_dict.items() if not k.startswith("roi_heads.mask_")})
    return model


@register_model()
def maskrcnn_mini_fpn(
    *, weights: MaskRCNN_Mini_FPN_Weights | None = None, num_classes: int | None = None, **kwargs: Any
) -> MaskRCNN:
    """Mask R-CNN with the trunk and FPN of :func:`fasterrcnn_mini_fpn` and a mask head of two layers.

    Arguments and errors are those of :func:`fasterrcnn_mini_fpn`; ``kwargs`` go to
    ``torchvision.models.detection.MaskRCNN``.

    Source: He et al., arXiv 1703.06870; notebook 02.
    """
    weights = MaskRCNN_Mini_FPN_Weights.verify(weights)
    parts = _mini_parts(_num_classes(weights, num_classes))
    channels = parts["backbone"].out_channels
    parts["mask_roi_pool"] = EmbeddingBagRoIAlign(["0", "1", "2", "3"], output_size=14, sampling_ratio=2)
    parts["mask_head"] = MaskRCNNHeads(channels, (channels, channels), dilation=1)
    parts["mask_predictor"] = MaskRCNNPredictor(channels, channels, _num_classes(weights, num_classes))
    model = MaskRCNN(**{**parts, **_MINI_DEFAULTS, **kwargs})
    if weights is not None:
        model.load_state_dict(weights.get_state_dict())
    return model


def replace_box_predictor(model: FasterRCNN, num_classes: int) -> FasterRCNN:
    """Give a Faster or Mask R-CNN a new, untrained classifier and box regressor, in place.

    Args:
        model: with torchvision's ``roi_heads.box_predictor``.
        num_classes: with the background, so 2 for people alone.

    Source: notebook 02.
    """
    old = model.roi_heads.box_predictor.cls_score
    new = FastRCNNPredictor(old.in_features, num_classes)
    model.roi_heads.box_predictor = new.to(old.weight.device)
    return model


def replace_mask_predictor(model: MaskRCNN, num_classes: int) -> MaskRCNN:
    """Give a Mask R-CNN a new, untrained last layer for its masks, in place.

    The transposed convolution before it does not know classes, and keeps what it has learned.

    Args:
        model: with torchvision's ``roi_heads.mask_predictor``.
        num_classes: with the background, so 2 for people alone.

    Source: notebook 04.
    """
    old = model.roi_heads.mask_predictor.mask_fcn_logits
    new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1)
    model.roi_heads.mask_predictor.mask_fcn_logits = new.to(old.weight.device)
    return model


def feature_nodes(trunk: nn.Module) -> dict[int, tuple[str, int, bool]]:
    """Where a classification trunk ends each of its resolutions.

    Args:
        trunk: one that torch.fx can trace, as most of ``torchvision.models`` are.

    Returns:
        For the strides 4, 8, 16 and 32, as far as the trunk has them: the graph node
        (``torchvision.models.feature_extraction``), its channels, and whether they come last in
        its shape, as in Swin.

    Source: notebook 03.
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
                if stride >= max((s for s, _, _ in strides.values()), default=0):
                    if output.shape[2:] == (size // stride,) * 2:
                        strides[name] = stride, output.shape[1], False
                    elif output.shape[1:3] == (size // stride,) * 2:
                        strides[name] = stride, output.shape[3], True
    found: dict[int, tuple[str, int, bool]] = {}
    for name, (stride, channels, last) in strides.items():
        following = next((other for other, (s, _, _) in strides.items() if s > stride), "")
        if (
            len(commonprefix([name.split("."), following.split(".")])) < 2
        ):  # else it is inside the block that halves the resolution
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

    Source: Lin et al., arXiv 1612.03144; notebook 03.
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

    Source: notebook 03.
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
