"""Training, evaluating, predicting, schedules and checkpoints."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from tutorial_lib import engine
from tutorial_lib.engine import (
    compute_in_bfloat16,
    evaluate,
    load_checkpoint,
    pick_device,
    predict,
    resume,
    save_checkpoint,
    to_device,
    train_one_epoch,
    use_bfloat16,
    validation_loss,
    warmup_cosine,
)
from tutorial_lib.models import maskrcnn_mini_fpn
from tutorial_lib.penn_fudan import AspectRatioBatchSampler, PennFudanDataset, collate_fn
from tutorial_lib.transforms import get_transform
from tutorial_lib.weights.pretrain import HELD_OUT, DrawnScenes

CPU = torch.device("cpu")
LOSSES = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine two threads wait for each other: a step takes 10 s instead of 0.2 s."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(sample_root):
    return PennFudanDataset(sample_root, get_transform(train=False))


def loader(dataset, batch_size=2, **kwargs):
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn, **kwargs)


def mini_model(seed=0):
    torch.manual_seed(seed)
    return maskrcnn_mini_fpn(weights=None, num_classes=2, min_size=96, max_size=160)


def snapshot(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Counted(Dataset):
    """Counts how often each sample is read."""

    def __init__(self, dataset):
        self.dataset, self.reads = dataset, [0] * len(dataset)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.dataset[index]


class Oracle(nn.Module):
    """Predicts the targets of the images that it is shown."""

    def __init__(self, dataset, masks=True):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.modes, self.answers = [], {}
        for i in range(len(dataset)):
            image, target = dataset[i]
            answer = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
            if masks:
                answer["masks"] = target["masks"][:, None].float()
            self.answers[image.numpy().tobytes()] = answer

    def forward(self, images):
        assert isinstance(images, list)
        self.modes.append(self.training)
        return [self.answers[image.numpy().tobytes()] for image in images]


class FakeLosses(nn.Module):
    """Gives the losses of a list, step by step, times a weight of 1."""

    def __init__(self, steps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.steps = iter(steps)

    def forward(self, images, targets):
        return {name: self.weight * value for name, value in next(self.steps).items()}


def fake_batches(count, start=0):
    return [((torch.zeros(3, 4, 4),), ({"image_id": start + i},)) for i in range(count)]


# Devices


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_pick_device(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device() == torch.device(expected)


def test_pick_num_threads_that_is_broken_off_leaves_the_number():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            engine.pick_num_threads(lambda: 1 / 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_pick_num_threads_sets_the_fastest():
    torch.set_num_threads(6)
    asked = []
    wait = {1: 0.004, 2: 0.001, 4: 0.003, 6: 0.005}

    def work():
        asked.append(torch.get_num_threads())
        time.sleep(wait[asked[-1]])

    try:
        seconds = engine.pick_num_threads(work, repeats=2)
        assert set(asked) == set(seconds) == {1, 2, 4, 6}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("device", "cuda", "cpu", "expected"),
    [
        ("cuda", True, "", True),
        ("cuda", False, "avx512_bf16", False),
        ("mps", True, "avx512_bf16", False),
        ("cpu", True, "avx512_f", False),
        ("cpu", False, "avx512_bf16", True),
        ("cpu", False, "amx_bf16", True),
    ],
)
def test_use_bfloat16_where_the_device_is_faster_in_it(monkeypatch, device, cuda, cpu, expected):
    asked = []

    def is_bf16_supported(including_emulation=True):
        asked.append(including_emulation)
        return cuda

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {cpu: True, "avx512_vnni": True}, raising=False)
    model = mini_model()
    assert use_bfloat16(model, torch.device(device)) is expected
    changed = {name for name, module in model.named_modules() if "forward" in vars(module)}
    heads = {"rpn.head", "roi_heads.box_head", "roi_heads.mask_head", "roi_heads.mask_predictor"}
    assert changed == ({"backbone"} | heads if expected else set())
    assert asked == ([False] if device == "cuda" else [])  # emulated bfloat16 is slower than float32


def test_a_copy_of_a_bfloat16_model_computes_with_its_own_weights():
    model = mini_model()
    compute_in_bfloat16(model.backbone)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.backbone.parameters():
            parameter.zero_()
    images = torch.rand(1, 3, 64, 64)
    assert not any(feature.any() for feature in copied.backbone(images).values())
    assert all(feature.any() for feature in model.backbone(images).values())


def test_a_bfloat16_model_can_be_saved_whole(tmp_path):
    model = mini_model()
    compute_in_bfloat16(model.backbone)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(dict(loaded.backbone(x=images)), dict(model.backbone(images)))


def test_use_bfloat16_says_when_it_has_changed_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert use_bfloat16(nn.Linear(2, 2), torch.device("cuda")) is False


def test_to_device_moves_tensors_and_leaves_the_rest():
    image, boxes = torch.zeros(3, 4, 4), torch.zeros(2, 4)
    given = {"boxes": boxes, "image_id": "a"}
    images, targets = to_device((image,), (given,), torch.device("meta"))
    assert images[0].device.type == "meta" and targets[0]["boxes"].device.type == "meta"
    assert targets[0]["image_id"] == "a"
    assert given["boxes"] is boxes


def test_to_device_waits_for_a_copy_except_to_cuda(monkeypatch):
    """From freed memory, MPS copies what is there by then."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: asked.append((device, non_blocking)))
    for name in ("cuda", "mps", "cpu"):
        to_device([torch.zeros(1)], [{"boxes": torch.zeros(1, 4)}], torch.device(name))
    assert asked == [(torch.device(name), name == "cuda") for name in ("cuda", "mps", "cpu") for _ in range(2)]


# evaluate


def test_evaluation_in_parts_of_a_batch_sampler_is_refused(dataset):
    batches = AspectRatioBatchSampler([1.0] * len(dataset), 1, num_replicas=2, generator=torch.Generator())
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate_fn)
    with pytest.raises(ValueError, match="batch_sampler that leaves images to other processes"):
        evaluate(mini_model(), loader, torch.device("cpu"), progress=False)


def test_evaluate_gives_an_oracle_full_marks(dataset):
    results = evaluate(Oracle(dataset), loader(dataset), CPU, progress=False)
    assert results.num_images == 12
    for metrics in (results.box, results.mask):
        assert [metrics.AP, metrics.AP50, metrics.AR] == pytest.approx([1.0] * 3, abs=1e-9)
        assert metrics.per_class == {1: pytest.approx(1.0, abs=1e-9)}


def test_evaluate_without_masks_measures_boxes_alone(dataset):
    results = evaluate(Oracle(dataset, masks=False), loader(dataset), CPU, progress=False)
    assert results.box.AP == pytest.approx(1.0, abs=1e-9) and results.mask is None


def test_evaluate_is_no_flatterer(dataset):
    """Half of the images get no prediction: the recall is the share of objects in the others."""
    oracle = Oracle(dataset)
    objects = [len(dataset[i][1]["labels"]) for i in range(12)]
    for i in range(0, 12, 2):
        answer = oracle.answers[dataset[i][0].numpy().tobytes()]
        answer.update({name: value[:0] for name, value in answer.items()})
    results = evaluate(oracle, loader(dataset), CPU, progress=False)
    expected = sum(objects[1::2]) / sum(objects)
    assert 0 < expected < 1
    assert results.box.AR == pytest.approx(expected, abs=1e-9) and results.mask.AR == pytest.approx(expected, abs=1e-9)


def test_evaluate_reads_every_image_of_the_loader_once_and_no_other(dataset):
    counted = Counted(dataset)
    results = evaluate(Oracle(dataset), loader(Subset(counted, [7, 2, 11])), CPU, progress=False)
    assert results.num_images == 3
    assert [i for i, reads in enumerate(counted.reads) if reads] == [2, 7, 11] and max(counted.reads) == 1
    counted = Counted(dataset)
    evaluate(Oracle(dataset), loader(counted, batch_size=5), CPU, progress=False)
    assert counted.reads == [1] * 12


def test_evaluate_does_not_mind_shuffling(dataset):
    """With predictions that are neither all right nor all wrong, and scores that differ."""
    oracle = Oracle(dataset)
    generator = torch.Generator().manual_seed(0)
    for answer in oracle.answers.values():
        answer["boxes"] = answer["boxes"] + 4 * torch.randn(answer["boxes"].shape, generator=generator)
        answer["scores"] = torch.rand(len(answer["scores"]), generator=generator)
    plain = evaluate(oracle, loader(dataset), CPU, progress=False)
    assert 0.05 < plain.box.AP < 0.95
    for seed in range(2):
        shuffled = loader(dataset, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(seed))
        results = evaluate(oracle, shuffled, CPU, progress=False)
        assert results.box.AP == pytest.approx(plain.box.AP, abs=1e-9)
        assert results.mask.AP == pytest.approx(plain.mask.AP, abs=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_uses_evaluation_mode_and_leaves_the_mode_as_it_was(dataset, training):
    oracle = Oracle(dataset).train(training)
    evaluate(oracle, loader(dataset, batch_size=6), CPU, progress=False)
    assert oracle.modes == [False, False]
    assert oracle.training is training and oracle.norm.training is training


def test_evaluate_a_real_model(dataset):
    model = mini_model()
    before = snapshot(model.state_dict().items())
    results = evaluate(model, loader(Subset(dataset, [0, 1])), CPU, progress=False)
    assert results.num_images == 2 and 0 <= results.box.AP <= 1 and 0 <= results.mask.AP <= 1
    assert same(before, model.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_gives_the_same_of_a_model_that_pastes_its_masks(dataset):
    """Of torchvision's own models the masks are compared before they are pasted; of any other, after."""
    model = maskrcnn_mini_fpn(weights="DEFAULT", box_score_thresh=0.2)
    pasted = []

    class AnyModel(nn.Module):
        def forward(self, images):
            predictions = model.eval()(images)
            pasted.extend(prediction["masks"].shape[-2:] for prediction in predictions)
            return predictions

    direct = evaluate(model, loader(dataset), CPU, progress=False)
    whole = evaluate(AnyModel(), loader(dataset), CPU, progress=False)
    assert pasted == [image.shape[-2:] for image, _ in (dataset[i] for i in range(len(dataset)))]
    assert direct.mask.AP > 0 and str(direct) == str(whole)
    assert model.eval()([dataset[0][0]])[0]["masks"].shape[-2:] == dataset[0][0].shape[-2:]  # pastes again


def test_evaluate_a_subclass_that_looks_at_its_masks(dataset):
    """Its forward sees pasted masks, as everywhere else."""
    shapes = []

    class Curious(MaskRCNN):
        def forward(self, images, targets=None):
            predictions = super().forward(images, targets)
            shapes.extend(prediction["masks"].shape[-2:] for prediction in predictions)
            return predictions

    model = maskrcnn_mini_fpn(weights="DEFAULT")
    model.__class__ = Curious
    evaluate(model, loader(Subset(dataset, [0])), CPU, progress=False)
    assert shapes == [dataset[0][0].shape[-2:]]


def test_evaluate_names_the_image_whose_parts_do_not_fit(dataset):
    images = [dataset[i] for i in range(3)]
    images[2][1]["labels"] = torch.ones(40, dtype=torch.int64)
    images[2][1]["image_id"] = 17
    with pytest.raises(ValueError, match="image 2 of the loader, image_id 17: a target has . boxes and 40 labels"):
        evaluate(mini_model(), loader(images), CPU, progress=False)


def test_evaluate_real_photographs(penn_fudan_root):
    photographs = Subset(PennFudanDataset(penn_fudan_root, get_transform(train=False)), range(0, 170, 34))
    results = evaluate(Oracle(photographs), loader(photographs), CPU, progress=False)
    assert results.num_images == 5
    assert [results.box.AP, results.mask.AP] == pytest.approx([1.0, 1.0], abs=1e-9)


# train_one_epoch


def test_train_one_epoch_returns_mean_losses_and_changes_the_parameters(dataset):
    model = mini_model().eval()
    before = snapshot(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = warmup_cosine(optimizer, 2, 10)
    losses = train_one_epoch(
        model, optimizer, loader(Subset(dataset, range(6))), CPU, lr_scheduler=scheduler, progress=False
    )
    assert losses.keys() == LOSSES | {"loss"}
    assert losses["loss"] == pytest.approx(sum(losses[name] for name in LOSSES), rel=1e-5)
    assert all(isinstance(value, float) and math.isfinite(value) for value in losses.values())
    assert scheduler.last_epoch == 3  # once a batch
    after = dict(model.named_parameters())
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 0.9 * len(before)
    assert model.training


def test_train_one_epoch_means_and_steps_by_hand():
    """The loss of step k is weight * (a + b); plain SGD takes lr * (a + b) off the weight each time."""
    model = FakeLosses([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 0.0}])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = train_one_epoch(model, optimizer, fake_batches(2), CPU, progress=False)
    # weights: 1, then 1 - 0.1 * 3 = 0.7, then 0.7 - 0.1 * 3 = 0.4
    assert losses == pytest.approx({"loss": (3 + 2.1) / 2, "a": (1 + 2.1) / 2, "b": (2 + 0) / 2})
    assert model.weight.item() == pytest.approx(0.4)


def test_train_one_epoch_overfits_two_images(dataset):
    model = mini_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = loader(Subset(dataset, [0, 1]))
    losses = [train_one_epoch(model, optimizer, batches, CPU, progress=False) for _ in range(12)]
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]
    assert losses[-1]["loss_mask"] < 0.5 * losses[0]["loss_mask"]
    assert losses[-1]["loss_objectness"] < losses[0]["loss_objectness"]


def test_out_of_memory_says_what_to_lower():
    class Greedy(FakeLosses):
        def forward(self, images, targets):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = Greedy([])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(torch.OutOfMemoryError, match="2.00 GiB") as caught:
        train_one_epoch(model, optimizer, fake_batches(1), CPU, progress=False)
    assert "lower batch_size first, then min_size" in caught.value.__notes__[0]


def train_from_seed(dataset, seed):
    model = mini_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_one_epoch(model, optimizer, loader(Subset(dataset, range(4)), shuffle=True), CPU, progress=False)
    return model.state_dict()


def test_the_same_seed_gives_the_same_weights(dataset):
    first, second, other = (train_from_seed(dataset, seed) for seed in (3, 3, 4))
    assert same(first, second)
    assert not same(first, other)


@pytest.mark.parametrize("backbone", ["fpn", "bare"])
def test_training_in_bfloat16(monkeypatch, dataset, backbone):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    model = mini_model()
    if backbone == "bare":  # a trunk that gives a tensor, as in notebook 03

        class Bare(type(model.backbone)):
            def forward(self, images):
                return super().forward(images)["0"]

        model.backbone.__class__ = Bare
        model.roi_heads.box_roi_pool.featmap_names = model.roi_heads.mask_roi_pool.featmap_names = ["0"]
        model.rpn.anchor_generator = AnchorGenerator(((16, 32, 64),), ((1.0,),))
    assert use_bfloat16(model, torch.device("cuda"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = snapshot(model.named_parameters())
    inside, outside, boxes = [], [], []
    for layer in (model.backbone.body["0"], model.rpn.head.cls_logits, model.roi_heads.box_head.fc7):
        layer.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    model.rpn.register_forward_hook(lambda module, args, out: boxes.extend(box.dtype for box in out[0]))
    model.rpn.head.register_forward_hook(lambda module, args, out: outside.append(out[0][0].dtype))
    losses = train_one_epoch(model, optimizer, loader(Subset(dataset, [0, 1])), CPU, progress=False)
    assert set(inside) == {torch.bfloat16} and set(outside) == set(boxes) == {torch.float32}
    assert math.isfinite(losses["loss"])
    assert not same(before, dict(model.named_parameters()))
    assert set(model.state_dict()) == set(mini_model().state_dict())
    assert not torch.is_autocast_enabled("cpu")


def test_a_nan_in_an_image_stops_the_training_and_spares_the_weights(dataset):
    image, target = dataset[3]
    image = image.clone()
    image[0, 5, 5] = float("nan")
    batches = [(dataset[0],), (dataset[1], (image, target | {"image_id": "photo-17"}))]
    model = mini_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    reference, scheduler = copy.deepcopy(model), warmup_cosine(optimizer, 2, 10)
    torch.manual_seed(5)
    with pytest.raises(FloatingPointError) as caught:
        train_one_epoch(model, optimizer, map(collate_fn, batches), CPU, lr_scheduler=scheduler, progress=False)
    message = str(caught.value)
    assert "[1, 'photo-17']" in message and "nan" in message
    assert all(name in message for name in LOSSES)
    assert scheduler.last_epoch == 1
    # The weights are those after the first, healthy batch alone.
    expected = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(5)
    train_one_epoch(
        reference,
        expected,
        map(collate_fn, batches[:1]),
        CPU,
        lr_scheduler=warmup_cosine(expected, 2, 10),
        progress=False,
    )
    assert same(dict(reference.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_the_training(bad):
    model = FakeLosses([{"a": 1.0, "b": 2.0}, {"a": 0.5, "b": bad}, {"a": 1.0, "b": 2.0}])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError) as caught:
        train_one_epoch(model, optimizer, fake_batches(3, start=40), CPU, progress=False)
    assert f"b {bad}" in str(caught.value) and "a 0.35" in str(caught.value) and "[41]" in str(caught.value)
    assert model.weight.item() == pytest.approx(0.7)  # of the first step only


def test_progress_is_shown_only_when_asked(capsys):
    for progress in (False, True):
        model = FakeLosses([{"a": 1.0}] * 3)
        train_one_epoch(model, torch.optim.SGD(model.parameters(), lr=0.1), fake_batches(3), CPU, progress=progress)
        captured = capsys.readouterr()
        assert bool(captured.out) is progress and captured.err == ""


# validation_loss


@pytest.mark.parametrize("training", [True, False])
def test_validation_loss_changes_nothing_but_gives_a_number(dataset, training):
    model = mini_model().train(training)
    batches = loader(Subset(dataset, range(4)), shuffle=True)
    before = snapshot(model.state_dict().items())
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = validation_loss(model, batches, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert validation_loss(model, batches, CPU) == first
    assert isinstance(first, float) and math.isfinite(first) and first > 0
    assert same(before, model.state_dict())
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_validation_loss_by_hand():
    model = FakeLosses([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}])
    assert validation_loss(model, fake_batches(2), CPU) == pytest.approx(4.0)


def test_validation_loss_of_no_images():
    with pytest.raises(ValueError, match="no images"):
        validation_loss(FakeLosses([]), [], CPU)


# predict


def test_predict_on_a_real_model(dataset):
    model = mini_model().train()
    images = [dataset[0][0], dataset[1][0]]
    everything = predict(model, images, CPU, score_threshold=0.0)
    assert model.training and all(module.training for module in model.modules())
    threshold = everything[0]["scores"].median().item()
    predictions = predict(model, images, CPU, threshold)
    assert len(predictions) == 2
    for image, prediction, all_of_it in zip(images, predictions, everything, strict=True):
        scores = prediction["scores"]
        assert prediction.keys() == {"boxes", "labels", "scores", "masks"}
        assert all(value.device == CPU and not value.requires_grad for value in prediction.values())
        count = int((all_of_it["scores"] >= threshold).sum())
        assert prediction["boxes"].shape == (count, 4) and prediction["boxes"].dtype == torch.float32
        assert prediction["labels"].shape == (count,) and prediction["labels"].dtype == torch.int64
        assert prediction["masks"].shape == (count, 1, *image.shape[-2:])
        assert prediction["masks"].min() >= 0 and prediction["masks"].max() <= 1
        assert torch.equal(scores, scores.sort(descending=True).values)
        assert (scores >= threshold).all()
        assert torch.equal(prediction["boxes"], all_of_it["boxes"][:count])
    assert 0 < len(predictions[0]["scores"]) < len(everything[0]["scores"])


def test_predict_gives_what_the_model_gives_above_the_threshold():
    model = maskrcnn_mini_fpn(weights="DEFAULT")
    scenes = DrawnScenes(seed=0, start=HELD_OUT, length=2, train=False)  # without fog, so it is sure of something
    images = [scenes[0][0], scenes[1][0]]
    with torch.inference_mode():
        whole = model.eval()(images)
    for theirs, ours in zip(whole, predict(model, images, CPU, 0.3), strict=True):
        keep = theirs["scores"] >= 0.3
        assert 0 < keep.sum() < len(keep)
        for key in theirs:  # masks of fewer detections are computed in another batch, so not to the last bit
            torch.testing.assert_close(theirs[key][keep], ours[key], rtol=0, atol=1e-4)
    assert model.roi_heads.score_thresh == 0.05  # its own again


def test_predict_threshold_includes_its_own_value(dataset):
    oracle = Oracle(dataset).eval()
    image, target = dataset[0]
    scores = torch.full((len(target["labels"]),), 0.9)
    scores[-1] = 0.5
    oracle.answers[image.numpy().tobytes()]["scores"] = scores
    assert len(predict(oracle, [image], CPU)[0]["scores"]) == len(target["labels"])
    assert len(predict(oracle, [image], CPU, 0.5001)[0]["scores"]) == len(target["labels"]) - 1
    (nothing,) = predict(oracle, [image], CPU, 0.95)
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 1, *image.shape[-2:])


@pytest.mark.parametrize("training", [True, False])
def test_predict_uses_evaluation_mode_and_leaves_the_mode_as_it_was(dataset, training):
    oracle = Oracle(dataset).train(training)
    predict(oracle, [dataset[0][0]], CPU)
    assert oracle.modes == [False]
    assert oracle.training is training and oracle.norm.training is training


# warmup_cosine


def rates(warmup_steps, total_steps, steps, lr=1.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr)
    scheduler = warmup_cosine(optimizer, warmup_steps, total_steps)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_warmup_cosine_by_hand():
    """1/5 … 4/5 in the warm-up; 1 at step 4; half at step 8, in the middle of the cosine; 0 at step 12."""
    values = rates(4, 12, 16, lr=0.5)
    assert values[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert values[6] == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    assert values[8] == pytest.approx(0.25)
    assert values[10] == pytest.approx(0.25 * (1 - math.sqrt(0.5)))
    assert values[12:] == pytest.approx([0.0] * 4, abs=1e-12)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (3, 3), (5, 2), (1, 2), (10, 100)])
def test_warmup_cosine_never_leaves_its_range(warmup, total):
    values = rates(warmup, total, 120)
    assert all(0 <= value <= 1 for value in values)
    assert values[warmup] == 1.0 and values[-1] == 0
    assert values[: warmup + 1] == sorted(values[: warmup + 1])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)


# Workers


def test_workers_that_are_spawned_read_the_data(dataset):
    """As on macOS and Windows: the data set travels by pickle, transforms included."""
    part = Subset(dataset, [0, 1, 2])
    spawned = DataLoader(part, 2, num_workers=1, collate_fn=collate_fn, multiprocessing_context="spawn")
    here = [target["image_id"] for _, targets in loader(part) for target in targets]
    assert [target["image_id"] for _, targets in spawned for target in targets] == here


# Checkpoints


def parts_to_train():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, warmup_cosine(optimizer, 2, 10)


def a_step(model, optimizer, scheduler, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    scheduler.step()


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    path = tmp_path / "new folder" / "last.pt"
    names, parts = ("model", "optimizer", "scheduler"), parts_to_train()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        a_step(*parts, x)
    save_checkpoint(
        path, **dict(zip(names, parts, strict=True)), epoch=3, best=0.5, history=[{"loss": 1.5}], preset="quick"
    )
    drawn = torch.rand(2), np.random.rand(2), random.random()
    for _ in range(3):
        a_step(*parts, x)

    resumed = parts_to_train()
    rest = resume(path, **dict(zip(names, resumed, strict=True)))
    assert rest == {"epoch": 3, "best": 0.5, "history": [{"loss": 1.5}], "preset": "quick"}
    again = torch.rand(2), np.random.rand(2), random.random()
    assert torch.equal(drawn[0], again[0]) and (drawn[1] == again[1]).all() and drawn[2] == again[2]
    assert resumed[2].last_epoch == 3
    for _ in range(3):
        a_step(*resumed, x)
    assert same(parts[0].state_dict(), resumed[0].state_dict())
    assert parts[1].param_groups[0]["lr"] == resumed[1].param_groups[0]["lr"]
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "last.pt"
    model, optimizer, _ = parts_to_train()
    save_checkpoint(path, model=nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)), optimizer=optimizer)
    before = snapshot(model.state_dict().items())
    with pytest.raises(
        ValueError, match=r"last.pt is of another model: 7 entries differ.* \(5, 3\) in the file and \(4, 3\)"
    ):
        resume(path, model=model, optimizer=optimizer)
    save_checkpoint(path, model=mini_model())
    with pytest.raises(ValueError, match="missing"):
        resume(path, model=model)
    assert same(before, model.state_dict())


def test_a_checkpoint_that_lacks_a_part_or_fits_another_optimizer_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    model, optimizer, scheduler = parts_to_train()
    save_checkpoint(path, model=model, optimizer=torch.optim.AdamW([model[0].weight]), epoch=1)
    with torch.no_grad():
        model[0].weight += 1
    before = snapshot(model.state_dict().items())
    with pytest.raises(ValueError, match="last.pt does not hold scheduler; it holds model, optimizer, epoch, random"):
        resume(path, model=model, scheduler=scheduler)
    with pytest.raises(ValueError, match="last.pt does not fit the optimizer"):
        resume(path, model=model, optimizer=optimizer)
    assert same(before, model.state_dict())


def test_a_checkpoint_that_fits_in_part_changes_nothing(tmp_path):
    """The optimizer fits, and the schedule, which is of another kind, does not."""
    path = tmp_path / "last.pt"
    model, optimizer, scheduler = parts_to_train()
    save_checkpoint(path, model=model, optimizer=type(optimizer)(model.parameters(), lr=7.0), scheduler={})
    scheduler.load_state_dict = lambda state: state["lr_lambdas"]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="last.pt does not fit the scheduler"):
        resume(path, model=model, optimizer=optimizer, scheduler=scheduler)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize(
    "state, named",
    [
        ({"best": np.float64(0.5)}, "numpy"),
        ({"ema": {"model": nn.Linear(1, 1)}}, "torch.nn"),
        ({"random": 4}, "random"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, state, named):
    path = tmp_path / "last.pt"
    save_checkpoint(path, epoch=1)
    with pytest.raises(TypeError, match=named):
        save_checkpoint(path, **state)
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of a process's files")
def test_a_full_disk_is_said_and_the_earlier_checkpoint_kept(tmp_path):
    """The limit on a file's size fails a write as a full disk does, half-way through the file."""
    script = """
import resource, signal, sys, torch
from tutorial_lib.engine import load_checkpoint, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = sys.argv[1]
save_checkpoint(path, values=torch.ones(10))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(path, values=torch.ones(1_000_000))
except OSError as error:
    print(error)
assert len(load_checkpoint(path)["values"]) == 10
"""
    path = tmp_path / "last.pt"
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "last.pt cannot be written" in run.stdout and "is kept" in run.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked, to save their start")
def test_killed_twenty_times_training_ends_with_the_same_weights(tmp_path, sample_root):
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "killed_run.py", sample_root, tmp_path, "20"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "killed 20 times" in run.stdout and "identical" in run.stdout


def test_a_checkpoint_replaces_the_one_before(tmp_path):
    path = str(tmp_path / "last.pt")
    save_checkpoint(path, epoch=1)
    save_checkpoint(path, epoch=2)
    assert load_checkpoint(path)["epoch"] == 2


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pt"
    save_checkpoint(path, epoch=1)

    def write_a_bit_and_fail(state, file):
        file.write(b"PK")
        raise error

    monkeypatch.setattr(engine.torch, "save", write_a_bit_and_fail)
    with pytest.raises(
        type(error), match=None if isinstance(error, KeyboardInterrupt) else "last.pt cannot be written"
    ):
        save_checkpoint(path, epoch=2)
    assert load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "cut short.pt"
    save_checkpoint(path, model=parts_to_train()[0].state_dict())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="cut short.pt cannot be read as a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [b"junk" * 100, b"\0" * 64, b"<html>not found</html>", b"\x80", pickle.dumps({"a": 1}, protocol=2)[:-1]],
    ids=["junk", "zeros", "html", "one byte", "cut pickle"],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "junk.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="junk.pt cannot be read as a checkpoint"):
        load_checkpoint(path)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.system, (f'mkdir "{self.folder}"',)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_checkpoint_cannot_run_code(tmp_path, how):
    path, trace = tmp_path / "malicious.pt", tmp_path / "trace"
    state = {"model": Malicious(trace)}
    if how == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state, protocol=2))
    with pytest.raises(ValueError, match="malicious.pt cannot be read as a checkpoint"):
        load_checkpoint(path)
    assert not trace.exists()
    # The trap is a real one:
    torch.load(path, weights_only=False) if how == "torch" else pickle.loads(path.read_bytes())
    assert trace.exists()


@pytest.mark.parametrize("name", ["missing.pt", "."])
def test_a_missing_checkpoint(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / name)
