"""The mini models: Faster R-CNN and Mask R-CNN put together from torchvision's own parts, only narrower.

A MobileNetV3-small trunk and a 96-channel FPN. Importing this module registers them with
torchvision, so that ``torchvision.models.get_model("maskrcnn_mini_fpn", weights="DEFAULT")``
works as it does for torchvision's models, from a file of this package, without a network.
"""

# No `from __future__ import annotations` here: torchvision finds a model's weights
# by reading the annotation of its `weights` parameter.

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import Weights, WeightsEnum, mobilenet_v3_small
from torchvision.models._api import BUILTIN_MODELS, register_model
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.transforms._presets import ObjectDetection

from tutorial_lib.offline.roi_align import EmbeddingBagRoIAlign
from tutorial_lib.offline.sample import CATEGORIES


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
        path = _FOLDER / self.url
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.meta["sha256"]:
            raise RuntimeError(
                f"{path} is damaged: its SHA-256 is {found[:8]}…, not {self.meta['sha256'][:8]}…. "
                "Install the package again; in a clone, `git checkout` that file."
            )
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        return {name: t.float() if t.is_floating_point() else t for name, t in state_dict.items()}


# Both models share one file: Faster R-CNN leaves the mask branch out.
_FOLDER = Path(__file__).parent / "weights"
_META = json.loads((_FOLDER / "mini_fpn.json").read_text(encoding="utf-8"))
_OF_MODEL = _META.pop("models")


def _starter(model: str) -> Weights:
    docs = "Trained on scenes that tutorial_lib/offline/sample.py makes; they have never seen a photograph."
    meta = {**_META, **_OF_MODEL[model], "categories": CATEGORIES, "min_size": (1, 1), "_docs": docs}
    return Weights(url="mini_fpn.pt", transforms=ObjectDetection, meta=meta)


class FasterRCNN_Mini_FPN_Weights(_PackagedWeights):
    DRAWN_V1 = _starter("fasterrcnn_mini_fpn")
    DEFAULT = DRAWN_V1


class MaskRCNN_Mini_FPN_Weights(_PackagedWeights):
    DRAWN_V1 = _starter("maskrcnn_mini_fpn")
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


def maskrcnn_mini_fpn(
    *, weights: MaskRCNN_Mini_FPN_Weights | None = None, num_classes: int | None = None, **kwargs: Any
) -> MaskRCNN:
    """Mask R-CNN with the trunk and FPN of :func:`fasterrcnn_mini_fpn` and a mask head of two layers.

    Arguments and errors are those of :func:`fasterrcnn_mini_fpn`; ``kwargs`` go to
    ``torchvision.models.detection.MaskRCNN``.

    Source: He et al., arXiv 1703.06870; notebook 08.
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


for _builder in (fasterrcnn_mini_fpn, maskrcnn_mini_fpn):
    BUILTIN_MODELS.pop(_builder.__name__, None)  # of an earlier import, where this module is reloaded
    register_model()(_builder)
