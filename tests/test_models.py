from __future__ import annotations

import hashlib
import re
import shutil
import warnings

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou

from tutorial_lib import models
from tutorial_lib.models import (
    EmbeddingBagRoIAlign,
    backbone_with_fpn,
    best_anchor_ious,
    feature_nodes,
    replace_box_predictor,
    replace_mask_predictor,
)
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.sample import CATEGORIES
from tutorial_lib.transforms import get_transform
from tutorial_lib.weights.pretrain import HELD_OUT, DrawnScenes

MINI = ["fasterrcnn_mini_fpn", "maskrcnn_mini_fpn"]
DETECTION_LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


def build(name: str, weights=None, **kwargs):
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=weights, **kwargs)


# RoIAlign


def pyramid(levels: int) -> dict[str, Tensor]:
    """Feature maps of two images of 96 x 128 pixels, from stride 4, and one that is not asked for."""
    torch.manual_seed(0)
    maps = {str(k): torch.randn(2, 5, 24 >> k, 32 >> k, dtype=torch.float64) for k in range(levels)}
    return {name: value.requires_grad_() for name, value in {**maps, "pool": torch.randn(2, 5, 1, 1)}.items()}


def boxes_of_all_kinds() -> list[Tensor]:
    """Small to larger than the image, over its edges, outside of it, and without area."""
    torch.manual_seed(1)
    xy = torch.rand(60, 2, dtype=torch.float64) * torch.tensor([128, 96])
    wh = torch.rand(60, 2, dtype=torch.float64) * torch.tensor([[8.0], [60.0], [400.0]]).repeat(20, 1)
    odd = torch.tensor([[-50, -50, -9, -9], [-3, -3, 5, 200], [10, 10, 10, 10], [0, 0, 128, 96]], dtype=torch.float64)
    return [torch.cat([xy, xy + wh], dim=1), odd]


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize(("output_size", "sampling_ratio"), [(7, 2), ((3, 5), 3), (14, 1), (7, 0)])
def test_the_embedding_bag_is_torchvisions_roi_align(levels, output_size, sampling_ratio):
    names = [str(k) for k in range(levels)]
    features, boxes = pyramid(levels), boxes_of_all_kinds()
    results = []
    for kind in (MultiScaleRoIAlign, EmbeddingBagRoIAlign):
        pool = kind(names, output_size, sampling_ratio, canonical_scale=50)
        values = pool(features, boxes, [(96, 128)] * 2)
        gradients = torch.autograd.grad((values * values.detach().cos()).sum(), [features[name] for name in names])
        assert all(gradient.any() for gradient in gradients)  # every level is used
        results.append([values, *gradients])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_embedding_bag_takes_images_without_boxes():
    features = {name: value.float() for name, value in pyramid(4).items()}
    pool = EmbeddingBagRoIAlign(["0", "1", "2", "3"], 7, 2)
    boxes = torch.tensor([[3.0, 4.0, 50.0, 60.0]])
    assert pool(features, [boxes[:0], boxes[:0]], [(96, 128)] * 2).shape == (0, 5, 7, 7)
    of_second = pool(features, [boxes[:0], boxes], [(96, 128)] * 2)
    alone = {name: value[1:] for name, value in features.items()}
    torch.testing.assert_close(of_second, pool(alone, [boxes], [(96, 128)]))


def test_the_gradient_of_the_embedding_bag_is_the_same_each_time():
    features, pool = pyramid(4), EmbeddingBagRoIAlign(["0", "1", "2", "3"], 7, 2)
    values = pool(features, boxes_of_all_kinds(), [(96, 128)] * 2)
    first, second = (torch.autograd.grad(values.sum(), features["0"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_embedding_bag_takes_odd_boxes_as_torchvision_does():
    """Without a number, with a negative area, of a level that has no map, and of another dtype than the maps."""
    features = {name: value.float() for name, value in pyramid(4).items()}
    nan = float("nan")
    odd = torch.tensor([[nan, 1, 5, 9], [nan] * 4, [9, 9, 5, 20], [1, 2, 9, 9], [0, 0, 128, 96], [0, 0, 500, 500]])
    pools = [kind(["0", "2"], 7, 2, canonical_scale=50) for kind in (MultiScaleRoIAlign, EmbeddingBagRoIAlign)]
    theirs, ours = (pool(features, [odd, odd[3:]], [(96, 128)] * 2) for pool in pools)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not ours[:3].any() and ours[3].any()
    for _ in range(2):
        assert EmbeddingBagRoIAlign(["0"], 7, 2)(features, [odd[3:].double()] * 2, [(96, 128)] * 2).any()


@pytest.mark.parametrize("convert", [torch.jit.script, lambda pool: pool], ids=["scripted", "traced"])
def test_scripted_and_traced_models_have_torchvisions_roi_align(convert):
    class Pooled(nn.Module):
        def __init__(self, pool: nn.Module):
            super().__init__()
            self.pool = convert(pool)

        def forward(self, maps: Tensor, boxes: Tensor) -> Tensor:
            return self.pool({"0": maps}, [boxes], [(96, 128)])

    maps = pyramid(1)["0"][:1].detach()
    few, many = boxes_of_all_kinds()[1], boxes_of_all_kinds()[0]
    pool = EmbeddingBagRoIAlign(["0"], 7, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and tracing warns of torchvision's own scales
        model = Pooled(pool)
        if convert is not torch.jit.script:
            model = torch.jit.trace(model, (maps, few))
    for boxes in (few, many):
        torch.testing.assert_close(model(maps, boxes), pool({"0": maps}, [boxes], [(96, 128)]), rtol=1e-9, atol=1e-9)


def test_a_mini_model_predicts_as_with_torchvisions_roi_align(sample_root):
    names = ["0", "1", "2", "3"]
    theirs = {"box_roi_pool": MultiScaleRoIAlign(names, 7, 2), "mask_roi_pool": MultiScaleRoIAlign(names, 14, 2)}
    image = get_transform(train=False)(*PennFudanDataset(sample_root)[0])[0]
    with torch.inference_mode():
        predictions = [
            build("maskrcnn_mini_fpn", weights="DEFAULT", **pools).eval()([image])[0] for pools in ({}, theirs)
        ]
    assert len(predictions[0]["boxes"])
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-3)


# The mini models


@pytest.mark.parametrize("name", MINI)
def test_mini_models_are_registered_with_torchvision(name):
    assert name in torchvision.models.list_models()
    assert torchvision.models.get_model_builder(name) is getattr(models, name)
    assert isinstance(build(name, num_classes=2), MaskRCNN if "mask" in name else FasterRCNN)


@pytest.mark.parametrize("name", MINI)
def test_mini_models_are_small(name):
    model = build(name, num_classes=len(CATEGORIES))
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) <= 2.5e6


@pytest.mark.parametrize("name", MINI)
def test_batch_norm_learns_its_statistics_in_a_short_training(name):
    norms = [module for module in build(name, num_classes=2).modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and {module.momentum for module in norms} == {0.1}


@pytest.mark.parametrize("name", MINI)
def test_classes_are_91_unless_told(name):
    assert build(name).roi_heads.box_predictor.cls_score.out_features == 91
    assert build(name, num_classes=3).roi_heads.box_predictor.cls_score.out_features == 3


def test_mask_predictor_has_the_box_predictors_classes():
    assert build("maskrcnn_mini_fpn", num_classes=3).roi_heads.mask_predictor.mask_fcn_logits.out_channels == 3


def test_keywords_reach_the_detector():
    assert build(MINI[0], num_classes=2).transform.min_size == (192,)
    model = build(MINI[1], num_classes=2, min_size=128, max_size=200, box_detections_per_img=7)
    assert model.transform.min_size == (128,) and model.transform.max_size == 200
    assert model.roi_heads.detections_per_img == 7
    assert model.rpn.post_nms_top_n() == 300
    model.eval()
    assert model.rpn.post_nms_top_n() == 150


@pytest.fixture(scope="module")
def batch(sample_root) -> tuple[list[Tensor], list[dict]]:
    dataset = PennFudanDataset(sample_root, get_transform(train=False))
    images, targets = zip(*(dataset[index] for index in (0, 1)), strict=True)
    return list(images), list(targets)


@pytest.mark.parametrize("name", MINI)
def test_training_gives_the_losses_and_reaches_every_parameter(name, batch):
    model = build(name, num_classes=2, min_size=128).train()
    losses = model(*batch)
    assert set(losses) == DETECTION_LOSSES | ({"loss_mask"} if "mask" in name else set())
    assert all(loss.shape == () and loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("name", MINI)
def test_evaluation_gives_torchvisions_predictions(name, batch):
    model = build(name, num_classes=2, min_size=128, box_score_thresh=0.0, box_detections_per_img=6).eval()
    with torch.inference_mode():
        predictions = model(batch[0])
    assert len(predictions) == 2
    for image, prediction in zip(batch[0], predictions, strict=True):
        height, width = image.shape[-2:]
        expected = {"boxes": (6, 4), "labels": (6,), "scores": (6,)}
        if "mask" in name:
            expected["masks"] = (6, 1, height, width)
        assert {key: tuple(value.shape) for key, value in prediction.items()} == expected
        assert prediction["labels"].dtype == torch.int64 and set(prediction["labels"].tolist()) == {1}
        assert all(value.dtype == torch.float32 for key, value in prediction.items() if key != "labels")
        assert prediction["boxes"].min() >= 0
        assert (prediction["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert (prediction["scores"].diff() <= 0).all()
        if "mask" in name:
            assert 0 <= prediction["masks"].min() and 0 < prediction["masks"].max() <= 1


@pytest.mark.parametrize("name", MINI)
def test_image_without_people_can_be_trained_on(name):
    target = {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 96, 128, dtype=torch.uint8),
    }  # fmt: skip
    losses = build(name, num_classes=2, min_size=96).train()([torch.rand(3, 96, 128)], [target])
    assert all(loss.isfinite() for loss in losses.values())


# Their weights


@pytest.fixture
def starter_file():
    path = models._WEIGHTS / "mini_fpn.pt"
    assert path.is_file(), f"{path}, the starter weights, is missing"
    return path


@pytest.mark.parametrize("name", MINI)
def test_weights_are_described_as_torchvision_does(name):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    assert weights.meta["categories"] == CATEGORIES and weights.meta["categories"][1] == "person"
    assert re.fullmatch("[0-9a-f]{64}", weights.meta["sha256"])
    picture = torch.zeros(3, 4, 5, dtype=torch.uint8)
    assert weights.transforms()(picture).dtype == torch.float32
    model = build("maskrcnn_mini_fpn", num_classes=len(CATEGORIES))
    assert weights.meta["num_params"] == sum(parameter.numel() for parameter in model.parameters())


def test_weights_file_is_small_and_of_its_hash(starter_file):
    assert starter_file.stat().st_size < 8e6
    meta = torchvision.models.get_model_weights("maskrcnn_mini_fpn").DEFAULT.meta
    assert hashlib.sha256(starter_file.read_bytes()).hexdigest() == meta["sha256"]


@pytest.mark.parametrize("name", MINI)
def test_default_weights_fill_the_whole_model_without_a_network(name, starter_file, no_network):
    state = torch.load(starter_file, map_location="cpu", weights_only=True)
    model = torchvision.models.get_model(name, weights="DEFAULT")
    loaded = model.state_dict()
    expected = {key for key in state if "mask" in name or not key.startswith("roi_heads.mask_")}
    assert set(loaded) == expected
    assert all(torch.equal(loaded[key], state[key].to(loaded[key].dtype)) for key in expected)
    assert all(value.dtype in (torch.float32, torch.int64) for value in loaded.values())
    assert all(value.isfinite().all() for value in loaded.values())
    assert model.roi_heads.box_predictor.cls_score.out_features == len(CATEGORIES)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert no_network == []


@pytest.mark.parametrize("name", MINI)
def test_weights_can_be_named_in_torchvisions_ways(name, starter_file):
    enum = torchvision.models.get_model_weights(name)
    first, *others = (
        torchvision.models.get_model(name, weights=weights).state_dict()
        for weights in ("DEFAULT", enum.DEFAULT, "DRAWN_V1", f"{enum.__name__}.DRAWN_V1")
    )
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    with pytest.raises(KeyError):
        torchvision.models.get_model(name, weights="COCO_V1")


def test_weights_of_the_other_model_are_refused(starter_file):
    with pytest.raises(TypeError, match="MaskRCNN_Mini_FPN_Weights"):
        models.maskrcnn_mini_fpn(weights=models.FasterRCNN_Mini_FPN_Weights.DEFAULT)


def test_weights_missing_an_entry_are_refused(starter_file, tmp_path, monkeypatch):
    state = torch.load(starter_file, map_location="cpu", weights_only=True)
    del state["rpn.head.cls_logits.bias"]
    torch.save(state, tmp_path / starter_file.name)
    weights = models.MaskRCNN_Mini_FPN_Weights.DEFAULT
    digest = hashlib.sha256((tmp_path / starter_file.name).read_bytes()).hexdigest()
    monkeypatch.setitem(weights.meta, "sha256", digest)
    monkeypatch.setattr(models, "_WEIGHTS", tmp_path)
    for name in MINI:
        with pytest.raises(RuntimeError, match="rpn.head.cls_logits.bias"):
            torchvision.models.get_model(name, weights="DEFAULT")


@pytest.mark.parametrize("name", MINI)
@pytest.mark.parametrize("damage", ["a byte", "cut", "empty"])
def test_damaged_weights_are_named(name, damage, starter_file, tmp_path, monkeypatch):
    copy = tmp_path / starter_file.name
    shutil.copy(starter_file, copy)
    monkeypatch.setattr(models, "_WEIGHTS", tmp_path)
    torchvision.models.get_model(name, weights="DEFAULT")  # the copy is good
    whole = copy.read_bytes()
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    copy.write_bytes({"a byte": changed, "cut": whole[:middle], "empty": b""}[damage])
    with pytest.raises(RuntimeError, match=re.escape(str(copy)) + " is damaged"):
        torchvision.models.get_model(name, weights="DEFAULT")


@pytest.mark.parametrize("name", MINI)
@pytest.mark.parametrize("num_classes", [2, 91])
def test_classes_that_contradict_the_weights_are_refused(name, num_classes):
    with pytest.raises(ValueError, match=rf"num_classes={num_classes}, .*\b{len(CATEGORIES)}\b"):
        torchvision.models.get_model(name, weights="DEFAULT", num_classes=num_classes)


@pytest.mark.parametrize("name", MINI)
def test_classes_that_agree_with_the_weights_are_accepted(name, starter_file):
    model = torchvision.models.get_model(name, weights="DEFAULT", num_classes=len(CATEGORIES))
    assert model.roi_heads.box_predictor.cls_score.out_features == len(CATEGORIES)


def test_starter_weights_find_drawn_people(starter_file):
    """Of twelve scenes without fog, which they were not trained on: most people, at any score above 0.3."""
    model = torchvision.models.get_model("maskrcnn_mini_fpn", weights="DEFAULT", box_score_thresh=0.3).eval()
    found = total = 0
    scenes = DrawnScenes(seed=0, start=HELD_OUT, length=12, train=False)
    for image, target in map(scenes.__getitem__, range(len(scenes))):
        with torch.inference_mode():
            prediction = model([image])[0]
        ours, theirs = (part["boxes"][part["labels"] == CATEGORIES.index("person")] for part in (target, prediction))
        if len(ours) and len(theirs):
            found += int((box_iou(ours, theirs) > 0.5).any(dim=1).sum())
        total += len(ours)
    assert found > total / 2


# Replacing predictors


def detector(name: str):
    if "mini" in name:
        return build(name, num_classes=8)
    return build(name, weights_backbone=None)


def check_replaced(replace, model, part: str, num_classes: int) -> None:
    """Only the part's parameters are new; every other one is the same object with the same values."""
    before = {key: (value, value.detach().clone()) for key, value in model.named_parameters()}
    assert replace(model, num_classes) is model
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert any(key.startswith(part) for key in after)
    for key, (value, values) in before.items():
        if key.startswith(part):
            assert after[key] is not value and after[key].requires_grad, key
        else:
            assert after[key] is value and torch.equal(value, values), key


@pytest.mark.parametrize("name", [*MINI, "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_replaced_box_predictor_is_all_that_is_new(name):
    model = detector(name)
    width = model.roi_heads.box_predictor.cls_score.in_features
    check_replaced(replace_box_predictor, model, "roi_heads.box_predictor.", 2)
    predictor = model.roi_heads.box_predictor
    assert predictor.cls_score.weight.shape == (2, width) and predictor.bbox_pred.weight.shape == (8, width)
    if "mask" in name:
        channels = model.roi_heads.mask_predictor.conv5_mask.weight.shape
        check_replaced(replace_mask_predictor, model, "roi_heads.mask_predictor.mask_fcn_logits.", 2)
        assert model.roi_heads.mask_predictor.conv5_mask.weight.shape == channels
        assert model.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 2


def test_replaced_predictors_are_where_the_model_is():
    model = models.maskrcnn_mini_fpn().to("meta")
    replace_mask_predictor(replace_box_predictor(model, 2), 2)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_parts_of_a_mini_model_can_be_given():
    anchors, head = AnchorGenerator(((24,),) * 5, ((1.0,),) * 5), RPNHead(96, 1)
    model = models.maskrcnn_mini_fpn(rpn_anchor_generator=anchors, rpn_head=head)
    assert model.rpn.anchor_generator is anchors and model.rpn.head is head


def test_hidden_width_of_the_mask_predictor_is_kept_where_it_differs():
    model = build("maskrcnn_mini_fpn", num_classes=8)
    conv = torchvision.models.detection.mask_rcnn.MaskRCNNPredictor
    model.roi_heads.mask_predictor = conv(96, 40, 8)
    replace_mask_predictor(model, 5)
    assert model.roi_heads.mask_predictor.conv5_mask.weight.shape == (96, 40, 2, 2)
    assert model.roi_heads.mask_predictor.mask_fcn_logits.weight.shape == (5, 40, 1, 1)


def test_model_with_replaced_predictors_trains_and_predicts(batch):
    model = build("maskrcnn_mini_fpn", num_classes=8, min_size=128, box_score_thresh=0.0)
    replace_mask_predictor(replace_box_predictor(model, 3), 3)
    losses = model.train()(*batch)
    assert set(losses) == DETECTION_LOSSES | {"loss_mask"}
    with torch.inference_mode():
        prediction = model.eval()(batch[0][:1])[0]
    assert set(prediction["labels"].tolist()) <= {1, 2} and len(prediction["masks"]) > 0


# Backbones

TRUNKS = {  # trunk: channels at the strides 4, 8, 16 and 32, from their papers and torchvision's source
    "resnet18": (64, 128, 256, 512), "resnet50": (256, 512, 1024, 2048), "wide_resnet50_2": (256, 512, 1024, 2048),
    "mobilenet_v2": (24, 32, 96, 1280), "mobilenet_v3_small": (16, 24, 48, 576),
    "mobilenet_v3_large": (24, 40, 112, 960), "efficientnet_b0": (24, 40, 112, 1280),
    "efficientnet_v2_s": (48, 64, 160, 1280), "convnext_tiny": (96, 192, 384, 768), "swin_t": (96, 192, 384, 768),
    "regnet_y_400mf": (48, 104, 208, 440), "densenet121": (256, 512, 1024, 1024),
    "mnasnet1_0": (24, 40, 96, 1280), "shufflenet_v2_x1_0": (24, 116, 232, 1024), "vgg11_bn": (256, 512, 512, 512),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.filterwarnings("ignore")
def test_backbone_with_fpn_finds_the_ends_of_the_stages(name):
    trunk = torchvision.models.get_model(name, weights=None).train()
    nodes = feature_nodes(trunk)
    assert list(nodes) == [4, 8, 16, 32]
    assert tuple(channels for _, channels, _ in nodes.values()) == TRUNKS[name]
    assert all(module.training for module in trunk.modules())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t", "resnet18"])
def test_backbone_with_fpn_makes_a_detector_that_trains_and_predicts(name):
    torch.manual_seed(0)
    backbone = backbone_with_fpn(name, out_channels=32)
    features = backbone(torch.rand(2, 3, 64, 96))
    assert [tuple(f.shape) for f in features.values()] == [
        (2, 32, 16, 24), (2, 32, 8, 12), (2, 32, 4, 6), (2, 32, 2, 3), (2, 32, 1, 2),
    ]  # fmt: skip
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5)
    model = FasterRCNN(backbone, 2, rpn_anchor_generator=anchors, min_size=64, max_size=96)
    target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}
    sum(model([torch.rand(3, 64, 80)], [target]).values()).backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    assert len(trained) > 0.95 * len(list(model.parameters()))
    assert model.eval()([torch.rand(3, 64, 80)])[0].keys() == {"boxes", "labels", "scores"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("squeezenet1_1", r"no features at stride \[4, 8, 16, 32\]"), ("vit_b_16", "cannot be traced")],
)
def test_backbone_with_fpn_says_what_a_trunk_lacks(name, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        backbone_with_fpn(name)


# Anchors


def one_map_detector(sizes=((16,),), ratios=((1.0,),), **kwargs) -> FasterRCNN:
    """Feature places every 16 pixels, from 0."""
    trunk = nn.Sequential(nn.Conv2d(3, 4, kernel_size=16, stride=16), nn.BatchNorm2d(4))
    trunk.out_channels = 4
    return FasterRCNN(trunk, 2, rpn_anchor_generator=AnchorGenerator(sizes, ratios), **kwargs)


def test_best_anchor_ious_by_hand():
    """Anchors of 16 x 16 pixels stand on 0, 16, 32 …: one box is an anchor, one is between two, one twice as wide."""
    model = one_map_detector(min_size=64, max_size=64)
    boxes = torch.tensor([[8.0, 8, 24, 24], [16, 8, 32, 24], [8, 8, 40, 24]])
    ious = best_anchor_ious(model, [torch.rand(3, 64, 64)], [{"boxes": boxes}])
    assert ious.dtype == torch.float32
    assert torch.allclose(ious, torch.tensor([1, 1 / 3, 1 / 2]))


def test_best_anchor_ious_are_of_the_resized_image():
    image, boxes = torch.rand(3, 32, 32), torch.tensor([[4.0, 4, 12, 12]])
    by_size = [
        best_anchor_ious(one_map_detector(min_size=size, max_size=size), [image], [{"boxes": boxes}]).item()
        for size in (32, 64)
    ]
    # 8 x 8 pixels share 4 x 4 with an anchor; doubled, the box is the anchor on (16, 16).
    assert by_size == pytest.approx([16 / (64 + 256 - 16), 1])


def test_best_anchor_ious_keep_the_order_and_the_model(batch):
    model = build(MINI[0], num_classes=2, min_size=128).train()
    model.backbone.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    images, targets = batch
    together = best_anchor_ious(model, images, targets)
    empty = {"boxes": torch.zeros(0, 4)}
    assert together.shape == (sum(len(target["boxes"]) for target in targets),)
    assert ((together > 0) & (together <= 1)).all() and not together.requires_grad
    # The images are of one size, so padding to a batch changes no anchor.
    alone = [best_anchor_ious(model, [image], [target]) for image, target in zip(images, targets, strict=True)]
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(best_anchor_ious(model, [images[0], *images], [empty, *targets]), together)
    assert best_anchor_ious(model, images[:1], [empty]).shape == (0,)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_best_anchor_ious_say_what_does_not_fit(batch):
    images, targets = batch
    model = one_map_detector(sizes=((16,), (32,)), ratios=((1.0,),) * 2, min_size=64).train()
    for arguments, numbers in (((images, targets[:1]), "2 images and 1 targets"), (([], []), "0 images and 0 targets")):
        with pytest.raises(ValueError, match=numbers):
            best_anchor_ious(model, *arguments)
    with pytest.raises(AssertionError, match="number of feature maps"):
        best_anchor_ious(model, images, targets)
    assert model.training and model.backbone.training
