"""The mini models: Faster R-CNN and Mask R-CNN put together from torchvision's own parts, only narrower.

An EfficientNet-Lite0 trunk and a 96-channel FPN. Importing this module registers them with
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
from torchvision.models import Weights, WeightsEnum
from torchvision.models._api import BUILTIN_MODELS, register_model
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms._presets import ObjectDetection

from tutorial_lib.offline.roi_align import EmbeddingBagRoIAlign
from tutorial_lib.offline.sample import CATEGORIES

# EfficientNet-B0's blocks: expansion, kernel, stride, channels in and out, how often.
_BLOCKS = (
    (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1),
)  # fmt: skip


def efficientnet_lite0(norm_layer: type[nn.Module]) -> nn.Sequential:
    """The trunk of the mini models: the layers of EfficientNet-Lite0 before its last 1 x 1 convolution.

    That is EfficientNet-B0 without squeeze-and-excitation, and with ReLU6 in place of SiLU.
    Element 2 gives 24 channels at stride 4, 3 gives 40 at 8, 5 gives 112 at 16, and 7 gives 320 at 32.

    Args:
        norm_layer: ``BatchNorm2d`` or ``FrozenBatchNorm2d``.

    Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite; notebook 03.
    """
    block = partial(MBConv, se_layer=lambda *_, **__: nn.Identity())
    settings = [MBConvConfig(*row, block=block) for row in _BLOCKS]
    norm = partial(norm_layer, eps=0.001)
    whole = EfficientNet(settings, dropout=0, stochastic_depth_prob=0, last_channel=320, norm_layer=norm)
    trunk = whole.features[:-1]
    for name, module in list(trunk.named_modules()):
        if isinstance(module, nn.SiLU):
            trunk.set_submodule(name, nn.ReLU6(inplace=True))
    return trunk


def _mini_parts(weights: WeightsEnum | None, num_classes: int | None) -> dict[str, Any]:
    channels, num_classes = 96, _num_classes(weights, num_classes)
    backbone = BackboneWithFPN(
        efficientnet_lite0(nn.BatchNorm2d if weights is None else FrozenBatchNorm2d),
        return_layers={"2": "0", "3": "1", "5": "2", "7": "3"},
        in_channels_list=[24, 40, 112, 320],
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


# The trunk's own mean and deviation. Fewer proposals than torchvision's 2000 and 1000: small images hold fewer objects.
_MINI_DEFAULTS = {
    "min_size": 192, "max_size": 384, "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3,
    "rpn_pre_nms_top_n_train": 600, "rpn_post_nms_top_n_train": 300,
    "rpn_pre_nms_top_n_test": 300, "rpn_post_nms_top_n_test": 150,
    "box_batch_size_per_image": 128,
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
    docs = (
        "The trunk has the ImageNet weights of EfficientNet-Lite0 (Google, Apache-2.0). FPN and heads were trained on "
        "scenes that tutorial_lib/offline/sample.py makes."
    )
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


def _load(model: FasterRCNN, weights: WeightsEnum | None) -> FasterRCNN:
    if weights is not None:
        own = model.state_dict()
        model.load_state_dict({name: value for name, value in weights.get_state_dict().items() if name in own})
        for stage in "0123":  # as in torchvision's pre-trained detectors, the first stages stay as they are
            model.backbone.body[stage].requires_grad_(False)
    return model


def fasterrcnn_mini_fpn(
    *, weights: FasterRCNN_Mini_FPN_Weights | None = None, num_classes: int | None = None, **kwargs: Any
) -> FasterRCNN:
    """Faster R-CNN with an EfficientNet-Lite0 trunk and a 96-channel FPN over four of its levels.

    With weights, BatchNorm is frozen, as are the trunk's first stages, to stride 8; with none, nothing is.

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
    parts = _mini_parts(weights, num_classes)
    model = FasterRCNN(**{**parts, **_MINI_DEFAULTS, **kwargs})
    return _load(model, weights)


def maskrcnn_mini_fpn(
    *, weights: MaskRCNN_Mini_FPN_Weights | None = None, num_classes: int | None = None, **kwargs: Any
) -> MaskRCNN:
    """Mask R-CNN with the trunk and FPN of :func:`fasterrcnn_mini_fpn` and a mask head of two layers.

    Arguments and errors are those of :func:`fasterrcnn_mini_fpn`; ``kwargs`` go to
    ``torchvision.models.detection.MaskRCNN``.

    Source: He et al., arXiv 1703.06870; notebook 08.
    """
    weights = MaskRCNN_Mini_FPN_Weights.verify(weights)
    parts = _mini_parts(weights, num_classes)
    channels = parts["backbone"].out_channels
    parts["mask_roi_pool"] = EmbeddingBagRoIAlign(["0", "1", "2", "3"], output_size=14, sampling_ratio=2)
    parts["mask_head"] = MaskRCNNHeads(channels, (channels, channels), dilation=1)
    parts["mask_predictor"] = MaskRCNNPredictor(channels, channels, _num_classes(weights, num_classes))
    model = MaskRCNN(**{**parts, **_MINI_DEFAULTS, **kwargs})
    return _load(model, weights)


for _builder in (fasterrcnn_mini_fpn, maskrcnn_mini_fpn):
    BUILTIN_MODELS.pop(_builder.__name__, None)  # of an earlier import, where this module is reloaded
    register_model()(_builder)
