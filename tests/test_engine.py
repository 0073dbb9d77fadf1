"""Training, evaluating, predicting; the schedule; device and precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.ops import FrozenBatchNorm2d

from tutorial_lib import engine
from tutorial_lib.data import AspectRatioBatchSampler, collate_fn
from tutorial_lib.engine import (
    evaluate,
    has_fast_bfloat16,
    pick_device,
    predict,
    to_device,
    train_one_epoch,
    use_bfloat16,
    validation_loss,
    warmup_cosine,
)
from tutorial_lib.models import replace_box_predictor, replace_mask_predictor, replace_predictors
from tutorial_lib.offline.mini_models import fasterrcnn_mini_fpn, maskrcnn_mini_fpn
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

CPU = torch.device("cpu")
LOSSES = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}


@pytest.fixture(scope="module")
def dataset(sample_root):
    return PennFudanDataset(sample_root, get_transform(train=False), in_memory=True)


@pytest.fixture
def starter():
    return maskrcnn_mini_fpn(weights="DEFAULT")


def loader(dataset, batch_size=2, **options):
    return DataLoader(dataset, batch_size, **{"collate_fn": collate_fn, **options})


def mini_model(seed=0):
    torch.manual_seed(seed)
    return maskrcnn_mini_fpn(weights=None, num_classes=2, min_size=96, max_size=160)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Oracle(nn.Module):
    """Predicts the targets of the images that it is shown."""

    def __init__(self, dataset, masks=True):
        super().__init__()
        self.norm, self.modes, self.answers = nn.BatchNorm2d(3), [], {}
        for image, target in (dataset[i] for i in range(len(dataset))):
            answer = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
            if masks:
                answer["masks"] = target["masks"][:, None].float()
            self.answers[image.numpy().tobytes()] = answer

    def forward(self, images):
        self.modes.append(self.training)
        return [self.answers[image.numpy().tobytes()] for image in images]


class FakeLosses(nn.Module):
    """Gives the losses of a list, step by step, times a weight of 1."""

    def __init__(self, *steps):
        super().__init__()
        self.weight, self.steps = nn.Parameter(torch.ones(())), iter(steps)

    def forward(self, images, targets):
        return {name: self.weight * value for name, value in next(self.steps).items()}


def train_fake(model, count, **options):
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batches = [((torch.zeros(3, 4, 4),), ({**nothing, "image_id": 40 + i},)) for i in range(count)]
    return train_one_epoch(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, CPU, **options)


# Device and precision


def test_pick_device(monkeypatch):
    monkeypatch.delenv("TUTORIAL_DEVICE", raising=False)
    devices = [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")]
    for cuda, mps, expected in devices:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device() == torch.device(expected)
    for chosen, expected in [("cpu", "cpu"), ("", "cuda")]:
        monkeypatch.setenv("TUTORIAL_DEVICE", chosen)
        assert pick_device() == torch.device(expected)
    for chosen in ("mps", "gpu", "cuda:0"):  # not there, no device, more than a name
        monkeypatch.setenv("TUTORIAL_DEVICE", chosen)
        with pytest.raises(ValueError, match=f"TUTORIAL_DEVICE is '{chosen}'; on this machine it can be cuda, cpu"):
            pick_device()


def test_use_bfloat16_where_the_device_is_faster_in_it(monkeypatch):
    heads = {"rpn.head", "roi_heads.box_head", "roi_heads.mask_head", "roi_heads.mask_predictor"}
    for device, cuda, cpu, expected in [
        ("cuda", True, "", True),
        ("cuda", False, "avx512_bf16", False),  # emulated bfloat16 is slower than float32
        ("mps", True, "avx512_bf16", False),
        ("cpu", True, "avx512_f", False),
        ("cpu", False, "avx512_bf16", True),
        ("cpu", False, "amx_bf16", True),
    ]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, cuda=cuda: cuda)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: {cpu: True}, raising=False)
        assert has_fast_bfloat16(torch.device(device)) is expected
        model = maskrcnn_mini_fpn(weights="DEFAULT")
        assert use_bfloat16(model, torch.device(device)) is expected
        changed = {name for name, module in model.named_modules() if "forward" in vars(module)}
        norms = {name for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d)}
        assert norms and changed == ({"backbone"} | heads | norms if expected else set())
    assert use_bfloat16(nn.Linear(2, 2), CPU) is False  # there is nothing to change


def test_training_in_bfloat16(monkeypatch, dataset, tmp_path):
    """A copy of the model computes with its own weights, and it can be saved whole."""
    monkeypatch.setattr(engine, "has_fast_bfloat16", lambda device: True)
    model = mini_model()
    assert use_bfloat16(model, CPU)
    torch.save(model, tmp_path / "model.pt")
    for trained in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        before, inside, outside = snapshot(trained), set(), set()
        for layer in (trained.backbone.body["0"], trained.rpn.head.cls_logits, trained.roi_heads.box_head.fc7):
            layer.register_forward_hook(lambda module, args, out, seen=inside: seen.add(out.dtype))
        trained.rpn.register_forward_hook(lambda module, args, out, seen=outside: seen.add(out[0][0].dtype))
        trained.rpn.head.register_forward_hook(lambda module, args, out, seen=outside: seen.add(out[0][0].dtype))
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        losses = train_one_epoch(trained, optimizer, loader(Subset(dataset, [0, 1])), CPU, progress=False)
        assert inside == {torch.bfloat16} and outside == {torch.float32}
        assert math.isfinite(losses["loss"]) and not same(before, trained.state_dict())
        assert same(before, model.state_dict())
    assert not torch.is_autocast_enabled("cpu")


def test_to_device_moves_tensors_and_leaves_the_rest(monkeypatch):
    given = {"boxes": torch.zeros(2, 4), "image_id": "a"}
    images, targets = to_device((torch.zeros(3, 4, 4),), (given,), torch.device("meta"))
    assert images[0].device.type == targets[0]["boxes"].device.type == "meta"
    assert targets[0]["image_id"] == "a" and given["boxes"].device == CPU
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: asked.append(non_blocking))
    for name in ("cuda", "mps", "cpu"):  # MPS would copy from freed memory
        to_device([torch.zeros(1)], [given], torch.device(name))
    assert asked == [True, True, False, False, False, False]


# train_one_epoch


def test_train_one_epoch_overfits_two_images_and_the_same_seed_gives_the_same_weights(dataset):
    def trained(seed, epochs):
        torch.manual_seed(seed)
        model = replace_predictors(maskrcnn_mini_fpn(weights="DEFAULT", min_size=96, max_size=160), 2).eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        options = {"lr_scheduler": warmup_cosine(optimizer, 0, 1000), "progress": False}
        batches = loader(Subset(dataset, [0, 1]), 1, shuffle=True)
        losses = [train_one_epoch(model, optimizer, batches, CPU, **options) for _ in range(epochs)]
        assert model.training and options["lr_scheduler"].last_epoch == 2 * epochs  # once a batch
        return model.state_dict(), losses

    _, losses = trained(0, 16)
    assert losses[0].keys() == LOSSES | {"loss"}
    assert losses[0]["loss"] == pytest.approx(sum(losses[0][name] for name in LOSSES), rel=1e-5)
    for name, factor in {"loss": 0.5, "loss_mask": 0.75, "loss_objectness": 1}.items():  # its masks are fair before
        assert losses[-1][name] < factor * losses[0][name]
    first, second, other = (trained(seed, 1)[0] for seed in (3, 3, 4))
    assert same(first, second) and not same(first, other)


def test_train_one_epoch_means_and_steps_by_hand(capsys):
    """The loss of step k is weight * (a + b); plain SGD takes lr * (a + b) off the weight each time."""
    for progress in (False, True):
        model = FakeLosses({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 0.0})
        losses = train_fake(model, 2, progress=progress)
        # weights: 1, then 1 - 0.1 * 3 = 0.7, then 0.7 - 0.1 * 3 = 0.4
        assert losses == pytest.approx({"loss": (3 + 2.1) / 2, "a": (1 + 2.1) / 2, "b": (2 + 0) / 2})
        assert model.weight.item() == pytest.approx(0.4)
        captured = capsys.readouterr()
        assert bool(captured.out) is progress and captured.err == ""
    with pytest.raises(ValueError, match="gives no batches"):
        train_fake(model, 0)


NOT_FINITE = {  # what is not, and what the message says
    "weights": r"step 1, images with image_id \[40\]: the weights are already not finite \(weight\)",
    "loss": r"step 2, images with image_id \[41\]: the loss is not finite \(a 0\.35, b {}\)",
    "gradient": r"step 2, images with image_id \[41\]: the loss is finite, the gradient of \['weight'\] is not",
}


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", NOT_FINITE)
def test_what_is_not_finite_stops_the_training_and_spares_the_weights(where, bad):
    model = FakeLosses({"a": 1.0, "b": 2.0}, {"a": 0.5, "b": bad if where == "loss" else 1.0}, {"a": 1.0, "b": 2.0})
    if where == "weights":
        model.weight.data.fill_(bad)
    if where == "gradient":
        steps = iter([1.0, bad])
        model.weight.register_hook(lambda gradient: gradient * next(steps))
    with pytest.raises(FloatingPointError, match=NOT_FINITE[where].format(bad)):
        train_fake(model, 3, progress=False)
    if where != "weights":
        assert model.weight.item() == pytest.approx(0.7)  # of the first step only


@pytest.mark.parametrize("kind", ["plain", "bfloat16", "DistributedDataParallel"])
def test_a_gradient_that_is_not_finite_leaves_a_detector_as_it_was(monkeypatch, dataset, tmp_path, kind):
    monkeypatch.setattr(engine, "has_fast_bfloat16", lambda device: kind == "bfloat16")
    model = wrapped = mini_model()
    assert use_bfloat16(model, CPU) is (kind == "bfloat16")
    model.rpn.head.cls_logits.weight.register_hook(lambda gradient: gradient * math.nan)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    if kind == "DistributedDataParallel":
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(model)
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with pytest.raises(
            FloatingPointError, match=r"the gradient of \['(module\.)?rpn\.head\.cls_logits\.weight'\] is"
        ):
            train_one_epoch(wrapped, optimizer, loader(Subset(dataset, [0, 1])), CPU, progress=False)
        assert same(before, dict(model.named_parameters()))
    finally:
        if kind == "DistributedDataParallel":
            dist.destroy_process_group()


@pytest.mark.parametrize("missing", ["boxes", "labels", "masks"])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
def test_a_target_that_lacks_something_is_named(dataset, wrap, missing):
    """Faster R-CNN needs no masks."""
    image, whole = dataset[0]
    target = {key: value for key, value in whole.items() if key != missing} | {"image_id": 17}
    model = mini_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    with pytest.raises(ValueError, match=f"the target with image_id 17 lacks {missing}; without objects, boxes are"):
        train_one_epoch(wrap(model), optimizer, [((image, image), (whole, target))], CPU, progress=False)
    if missing == "masks":
        boxes_only = fasterrcnn_mini_fpn(weights=None, num_classes=2, min_size=96, max_size=160)
        optimizer = torch.optim.SGD(boxes_only.parameters(), lr=0.001)
        train_one_epoch(wrap(boxes_only), optimizer, [((image,), (target,))], CPU, progress=False)


@pytest.mark.parametrize(
    ("replace", "message"),
    [(replace_box_predictor, r"\[3, 2\] classes"), (replace_mask_predictor, r"\[2, 3\] classes")],
)
def test_predictors_for_different_classes_are_not_trained(dataset, replace, message):
    model = replace(mini_model(), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    with pytest.raises(ValueError, match=rf"box and mask predictors have {message}: replace_predictors"):
        train_one_epoch(model, optimizer, loader(Subset(dataset, [0])), CPU, progress=False)


# validation_loss


@pytest.mark.parametrize("training", [True, False])
def test_validation_loss_is_repeatable_and_changes_nothing(monkeypatch, dataset, training):
    model = mini_model().train(training)
    before, found, seeded = snapshot(model), [], []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seeded.append)
    for seed in (11, 12):
        torch.default_generator.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(validation_loss(model, loader(Subset(dataset, range(4)), shuffle=True), CPU))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1] and math.isfinite(found[0]) and found[0] > 0
    assert seeded == []  # a GPU's generators are not its business
    assert same(before, model.state_dict()) and all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training is training for module in model.modules())


def test_validation_loss_is_the_mean_over_images(monkeypatch):
    """Of five images in batches of two, the last one counts as much as the others."""

    class MeanValue(nn.Module):
        def forward(self, images, targets):
            assert self.training
            mean = torch.stack(images).mean()
            return {"a": mean, "b": 2 * mean}

    batches = loader([(torch.full((3, 4, 4), value), {}) for value in (1.0, 2.0, 3.0, 4.0, 100.0)])
    assert validation_loss(MeanValue(), batches, CPU) == pytest.approx(3 * 22)
    calls = []  # on a GPU, its generator is seeded too, and set back
    monkeypatch.setattr(engine, "to_device", lambda images, targets, device: (images, targets))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: "as it was")
    for name in ("manual_seed", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, calls.append)
    validation_loss(MeanValue(), batches, torch.device("cuda"))
    assert calls == [0, "as it was"]
    with pytest.raises(ValueError, match="no images"):
        validation_loss(MeanValue(), [], CPU)


# evaluate


def test_evaluate_gives_an_oracle_full_marks_and_reads_each_image_once(dataset):
    read = []

    def recorded(batch):
        read.extend(target["image_id"] for _, target in batch)
        return collate_fn(batch)

    part = Subset(dataset, [7, 2, 11])
    for images, masks in ((dataset, True), (part, False)):
        read.clear()
        results = evaluate(Oracle(dataset, masks), loader(images, 5, collate_fn=recorded), CPU, progress=False)
        assert read == [images[i][1]["image_id"] for i in range(len(images))] and results.num_images == len(images)
        for metrics in (results.box, results.mask) if masks else (results.box,):
            assert [metrics.AP, metrics.AP50, metrics.AR, metrics.per_class[1]] == pytest.approx([1.0] * 4, abs=1e-9)
    assert results.mask is None


def test_evaluate_one_by_one_does_not_depend_on_the_order(dataset, starter):
    plain = evaluate(starter, loader(dataset, 1), CPU, progress=False)
    assert 0 < plain.box.AP < 1 and 0 < plain.mask.AP < 1
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    results = evaluate(starter, loader(Subset(dataset, order), 1), CPU, progress=False)
    for ours, theirs in ((results.box, plain.box), (results.mask, plain.mask)):
        for name in ("AP", "AP50", "AP75", "AR", "AR1"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-9)
    assert "unless the batch size is 1" in " ".join(evaluate.__doc__.split())  # padding changes predictions


def test_evaluate_leaves_the_model_and_what_hangs_on_it_alone(dataset, starter):
    """A user's own postprocess stays and is used, and hooks see what they see in torchvision."""
    theirs, used, shapes = starter.transform.postprocess, [], {}

    def own(result, image_shapes, original_sizes):
        used.extend(original_sizes)
        return theirs(result, image_shapes, original_sizes)

    starter.transform.postprocess = own
    starter.register_forward_hook(lambda _, args, out: shapes.update(model=out[0]["masks"].shape[1:]))
    starter.roi_heads.register_forward_hook(lambda _, args, out: shapes.update(heads=out[0][0]["masks"].shape[1:]))
    before, size = snapshot(starter.train()), tuple(dataset[0][0].shape[-2:])
    evaluate(starter, loader(Subset(dataset, [0])), CPU, progress=False)
    assert starter.transform.postprocess is own and used == [size]
    assert shapes == {"model": (1, *size), "heads": (1, 28, 28)}
    assert same(before, starter.state_dict()) and all(parameter.grad is None for parameter in starter.parameters())


def test_evaluate_names_the_image_whose_parts_do_not_fit(dataset):
    images = [dataset[i] for i in range(3)]
    oracle = Oracle(images)
    images[2][1].update(labels=torch.ones(40, dtype=torch.int64), image_id=17)
    with pytest.raises(ValueError, match="image 2 of the loader, image_id 17: a target has . boxes and 40 labels"):
        evaluate(oracle, loader(images), CPU, progress=False)


def test_evaluation_in_parts_needs_all_images(monkeypatch, dataset):
    """What several processes find together is tested in test_train.py."""
    batches = AspectRatioBatchSampler([1.0] * 12, 1, num_replicas=2, generator=torch.Generator())
    with pytest.raises(ValueError, match="batch_sampler that leaves images to other processes"):
        evaluate(Oracle(dataset), loader(dataset, 1, batch_sampler=batches), CPU, progress=False)

    def gather(parts, mine):
        parts[:] = [mine, mine]  # as if both processes had the same rank

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    sampler = DistributedSampler(dataset, 2, rank=1, shuffle=False)
    with pytest.raises(ValueError, match="6 of 12 images, the first with index 0, were given to no process"):
        evaluate(Oracle(dataset), loader(dataset, sampler=sampler), CPU, progress=False)


# predict


def test_predict_gives_what_the_model_gives_above_the_threshold(dataset, starter):
    images = [dataset[0][0], dataset[8][0]]
    with torch.inference_mode():
        whole = starter.eval()(images)
    threshold = min(prediction["scores"].max().item() for prediction in whole) - 0.01
    found = predict(starter, images, CPU, threshold)
    assert starter.roi_heads.score_thresh == 0.05  # its own again
    for theirs, ours in zip(whole, found, strict=True):
        keep = theirs["scores"] >= threshold
        assert 0 < keep.sum() < len(keep) and ours.keys() == {"boxes", "labels", "scores", "masks"}
        for key in theirs:  # masks of fewer detections are computed in another batch, so not to the last bit
            assert ours[key].device == CPU and not ours[key].requires_grad
            torch.testing.assert_close(theirs[key][keep], ours[key], rtol=0, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = predict(starter, images[:1], CPU, 0.1)
    assert len(found["scores"]) and {found[key].dtype for key in ("boxes", "scores", "masks")} == {torch.float32}


def test_predict_threshold_includes_its_own_value(dataset):
    oracle, (image, target) = Oracle(dataset), dataset[0]
    count = len(target["labels"])
    oracle.answers[image.numpy().tobytes()]["scores"] = torch.tensor([0.9] * (count - 1) + [0.5])
    for threshold, expected in {0.5: count, 0.5001: count - 1, 0.95: 0}.items():
        (found,) = predict(oracle, [image], CPU, threshold)
        assert found["boxes"].shape == (expected, 4) and found["masks"].shape == (expected, 1, *image.shape[-2:])


def test_predict_and_evaluate_use_evaluation_mode_and_leave_the_mode_as_it_was(dataset):
    for training in (True, False):
        oracle = Oracle(dataset).train(training)
        oracle.norm.train(not training)
        predict(oracle, [dataset[0][0]], CPU)
        evaluate(oracle, loader(dataset, 6), CPU, progress=False)
        assert oracle.modes == [False] * 3
        assert oracle.training is training and oracle.norm.training is not training


# warmup_cosine


def test_warmup_cosine_by_hand():
    """1/5 … 4/5 in the warm-up; 1 at step 4; half at step 8, in the middle of the cosine; 0 at step 12."""

    def factors(warmup_steps, total_steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))])
        return [warmup_cosine(optimizer, warmup_steps, total_steps).lr_lambdas[0](step) for step in range(120)]

    values = factors(4, 12)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[6:12:2] == pytest.approx([0.5 * (1 + cosine) for cosine in (math.sqrt(0.5), 0, -math.sqrt(0.5))])
    assert values[12:] == pytest.approx([0.0] * 108, abs=1e-12)
    for warmup, total in [(0, 1), (0, 10), (3, 3), (5, 2), (1, 2), (10, 100)]:
        values = factors(warmup, total)
        assert all(0 <= value <= 1 for value in values) and values[warmup] == 1.0 and values[-1] == 0
        assert values[: warmup + 1] == sorted(values[: warmup + 1])
        assert values[warmup:] == sorted(values[warmup:], reverse=True)
