"""Replacing predictors, and a backbone from any classification trunk."""

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from tutorial_lib.models import (
    backbone_with_fpn,
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


def test_each_new_class_starts_as_the_mean_of_the_old_classes():
    """So the background keeps its score, and whatever the class, box and mask are the mean of those before."""
    model, inputs = maskrcnn_mini_fpn(num_classes=4), torch.rand(5, 192)
    images = torch.rand(5, 96, 14, 14)
    with torch.inference_mode():
        scores, boxes = model.roi_heads.box_predictor(inputs)
        masks = model.roi_heads.mask_predictor(images)
        replace_predictors(model, 3)
        new_scores, new_boxes = model.roi_heads.box_predictor(inputs)
        new_masks = model.roi_heads.mask_predictor(images)
    boxes, new_boxes = boxes.view(5, 4, 4), new_boxes.view(5, 3, 4)
    for old, new in ((scores, new_scores), (boxes, new_boxes), (masks, new_masks)):
        torch.testing.assert_close(new[:, 0], old[:, 0])
        for label in (1, 2):
            torch.testing.assert_close(new[:, label], old[:, 1:].mean(dim=1))
    assert all(parameter.requires_grad for parameter in model.roi_heads.parameters())


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


@pytest.mark.parametrize("replace", [replace_predictors, replace_box_predictor, replace_mask_predictor])
@pytest.mark.parametrize("num_classes", [-1, 0, 1])
def test_the_background_has_to_be_counted(replace, num_classes):
    model = maskrcnn_mini_fpn()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=f"num_classes is {num_classes}: it counts the background too"):
        replace(model, num_classes)
    assert all(value is before[name] for name, value in model.named_parameters())


@pytest.mark.parametrize(
    "name", ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large"]
)
def test_the_line_for_other_families_replaces_their_head(name):
    """It is run as printed, with the model's name; then the model trains and predicts."""
    sizes = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 64}
    torch.manual_seed(0)
    model = get_model(name, weights=None, weights_backbone=None, **sizes)
    before, kind = dict(model.named_parameters()), type(model).__name__
    with pytest.raises(TypeError, match=rf"^a {kind} has no roi_heads\.mask_predictor: ") as error:
        replace_mask_predictor(model, 3)
    with pytest.raises(TypeError, match=rf"^a {kind} has no roi_heads\.box_predictor: ") as error:
        replace_predictors(model, 3)
    line = str(error.value).splitlines()[-1].replace("NAME", repr(name))
    exec(line, {"model": model, "get_model": get_model})
    new = {key for key, value in model.named_parameters() if value is not before.get(key)}
    assert new and all(key.startswith("head.classification_head.") for key in new)
    shapes, images = [], [torch.rand(3, 64, 64)] * (2 if "lite" in name else 1)  # BatchNorm of one pixel needs two
    model.head.register_forward_hook(lambda module, args, out: shapes.append(out["cls_logits"].shape[-1]))
    target = {"boxes": torch.tensor([[5.0, 5, 40, 50], [20, 9, 60, 60]]), "labels": torch.tensor([1, 2])}
    loss = sum(model.train()(images, [target] * len(images)).values())
    loss.backward()
    assert torch.isfinite(loss) and all(value.grad is not None for value in model.head.parameters())
    assert model.eval()(images)[0].keys() == {"boxes", "labels", "scores"} and shapes == [3, 3]


@pytest.mark.parametrize(
    ("build", "replace", "message"),
    [
        (fasterrcnn_mini_fpn, replace_mask_predictor, r"FasterRCNN has no roi_heads\.mask_predictor: .* mask branch"),
        (lambda: nn.DataParallel(fasterrcnn_mini_fpn()), replace_predictors, r"DataParallel has no .* its \.module"),
        (lambda: get_model("resnet18"), replace_box_predictor, "ResNet has no .*: give a Faster R-CNN"),
        (lambda: get_model("swin_t"), replace_box_predictor, "SwinTransformer has no .*: give a Faster R-CNN"),
    ],
)
def test_a_model_without_the_predictor_is_named(build, replace, message):
    with torch.device("meta"):
        model = build()
    with pytest.raises(TypeError, match=message):
        replace(model, 2)


def test_keypoint_rcnn_keeps_its_keypoints():
    with torch.device("meta"):
        model = get_model("keypointrcnn_resnet50_fpn", weights=None, weights_backbone=None)
    before = dict(model.named_parameters())
    new = [key for key, value in replace_predictors(model, 3).named_parameters() if value is not before[key]]
    assert new and all(key.startswith(BOX) for key in new)
    assert model.roi_heads.box_predictor.cls_score.out_features == 3


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
