"""Replacing predictors, a backbone from any classification trunk, and how well anchors fit."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from tutorial_lib.models import (
    backbone_with_fpn,
    best_anchor_ious,
    feature_nodes,
    replace_box_predictor,
    replace_mask_predictor,
    replace_predictors,
)
from tutorial_lib.offline.mini_models import fasterrcnn_mini_fpn, maskrcnn_mini_fpn

BOX, MASK = "roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits."


@pytest.mark.parametrize(
    ("build", "replace", "new"),
    [
        (fasterrcnn_mini_fpn, replace_predictors, BOX),
        (maskrcnn_mini_fpn, replace_predictors, (BOX, MASK)),
        (maskrcnn_mini_fpn, replace_box_predictor, BOX),
        (maskrcnn_mini_fpn, replace_mask_predictor, MASK),
        (lambda: get_model("fasterrcnn_resnet50_fpn", weights_backbone=None), replace_predictors, BOX),
        (lambda: get_model("maskrcnn_resnet50_fpn", weights_backbone=None), replace_predictors, (BOX, MASK)),
        # Its hidden width is kept.
        (lambda: maskrcnn_mini_fpn(mask_predictor=MaskRCNNPredictor(96, 40, 91)), replace_mask_predictor, MASK),
    ],
)
def test_replaced_predictors_are_all_that_is_new(build, replace, new):
    """Every other parameter is the same object with the same values."""
    model = build()
    before = {key: (value, value.detach().clone()) for key, value in model.named_parameters()}
    assert replace(model, 3) is model
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and any(key.startswith(new) for key in after)
    for key, (value, values) in before.items():
        if key.startswith(new):
            outputs, *inputs = value.shape
            assert after[key].shape == (outputs // 91 * 3, *inputs) and after[key].requires_grad, key
        else:
            assert after[key] is value and torch.equal(value, values), key


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, "meta"])
def test_replaced_predictors_have_the_models_device_and_dtype(kind):
    for build, replaces in (
        (fasterrcnn_mini_fpn, [replace_predictors]),
        (maskrcnn_mini_fpn, [replace_predictors]),
        (maskrcnn_mini_fpn, [replace_box_predictor, replace_mask_predictor]),
    ):
        model = build().to(kind)
        for replace in replaces:
            replace(model, 2)
        assert {p.device.type if kind == "meta" else p.dtype for p in model.parameters()} == {kind}


def test_models_that_have_other_predictors_are_named():
    with torch.device("meta"):
        others = [get_model(name, weights_backbone=None) for name in ("retinanet_resnet50_fpn", "ssd300_vgg16")]
        others.append(nn.DataParallel(fasterrcnn_mini_fpn()))
    for model, name in zip(others, ("RetinaNet", "SSD", "DataParallel"), strict=True):
        with pytest.raises(TypeError, match=rf"\b{name} has no roi_heads\.box_predictor"):
            replace_predictors(model, 2)


# Backbones

TRUNKS = {  # trunk: channels at the strides 4, 8, 16 and 32, from their papers and torchvision's source
    "resnet18": (64, 128, 256, 512), "mobilenet_v2": (24, 32, 96, 1280), "mobilenet_v3_large": (24, 40, 112, 960),
    "efficientnet_b0": (24, 40, 112, 1280), "convnext_tiny": (96, 192, 384, 768), "swin_t": (96, 192, 384, 768),
    "regnet_y_400mf": (48, 104, 208, 440), "densenet121": (256, 512, 1024, 1024),
    "mnasnet1_0": (24, 40, 96, 1280), "shufflenet_v2_x1_0": (24, 116, 232, 1024), "vgg11_bn": (256, 512, 512, 512),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.filterwarnings("ignore")
def test_feature_nodes_are_the_ends_of_the_stages(name):
    trunk = get_model(name, weights=None).train()
    nodes = feature_nodes(trunk)
    assert list(nodes) == [4, 8, 16, 32] and tuple(channels for _, channels, _ in nodes.values()) == TRUNKS[name]
    assert all(module.training for module in trunk.modules())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t"])
def test_backbone_with_fpn_makes_a_detector_that_trains_and_predicts(name):
    torch.manual_seed(0)
    backbone = backbone_with_fpn(name, out_channels=32)
    features = backbone(torch.rand(2, 3, 64, 96))
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert [tuple(feature.shape) for feature in features.values()] == [(2, 32, *size) for size in sizes]
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5)
    model = FasterRCNN(backbone, 2, rpn_anchor_generator=anchors, min_size=64, max_size=96)
    target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}
    sum(model([torch.rand(3, 64, 80)], [target]).values()).backward()
    assert sum(p.grad is None for p in model.parameters()) < 0.05 * len(list(model.parameters()))
    assert model.eval()([torch.rand(3, 64, 80)])[0].keys() == {"boxes", "labels", "scores"}


def test_backbone_with_fpn_says_what_a_trunk_lacks():
    lacking = {"squeezenet1_1": r"has no features at stride \[4, 8, 16, 32\]", "vit_b_16": "cannot be traced"}
    for name, message in lacking.items():
        with pytest.raises(ValueError, match=f"{name} {message}"):
            backbone_with_fpn(name)


# Anchors


def detector(min_size: int, levels: int = 1) -> FasterRCNN:
    """Anchors of 16 x 16 pixels stand on 0, 16, 32 …"""
    trunk = nn.Sequential(nn.Conv2d(3, 4, kernel_size=16, stride=16), nn.BatchNorm2d(4))
    trunk.out_channels = 4
    anchors = AnchorGenerator(((16,),) * levels, ((1.0,),) * levels)
    return FasterRCNN(trunk, 2, rpn_anchor_generator=anchors, min_size=min_size, max_size=64)


def ious(model: FasterRCNN, *pairs: tuple[int, list]) -> Tensor:
    """Of square images of these sizes with these boxes."""
    images = [torch.rand(3, size, size) for size, _ in pairs]
    return best_anchor_ious(model, images, [{"boxes": torch.tensor(boxes).reshape(-1, 4)} for _, boxes in pairs])


def test_best_anchor_ious_by_hand():
    """One box is an anchor, one is between two, one twice as wide; of another image, one is an anchor once resized."""
    boxes, small = [[8.0, 8, 24, 24], [16, 8, 32, 24], [8, 8, 40, 24]], [[4.0, 4, 12, 12]]
    model = detector(64).train()
    model.backbone.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = ious(model, (64, []), (64, boxes), (32, small))
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, torch.tensor([1, 1 / 3, 1 / 2, 1]))
    assert ious(model, (64, [])).shape == (0,)
    # 8 x 8 pixels share 4 x 4 with an anchor.
    torch.testing.assert_close(ious(detector(32), (32, small)), torch.tensor([16 / (64 + 256 - 16)]))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_best_anchor_ious_say_what_does_not_fit():
    for images, targets in ((2, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"{images} images and {targets} targets"):
            best_anchor_ious(detector(64), [torch.rand(3, 9, 9)] * images, [{}] * targets)
    model = detector(64, levels=2)
    with pytest.raises(AssertionError, match="number of feature maps"):
        ious(model, (64, []))
    assert model.training and model.backbone.training
