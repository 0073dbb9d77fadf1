"""What lets every cell run with no network: the mini models, their RoIAlign, and the synthetic sample."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from tools.pretrain import HELD_OUT, DrawnScenes
from tutorial_lib.data import collate_fn
from tutorial_lib.engine import evaluate
from tutorial_lib.models import replace_predictors
from tutorial_lib.offline import mini_models, sample
from tutorial_lib.offline.roi_align import EmbeddingBagRoIAlign
from tutorial_lib.offline.sample import CATEGORIES, draw_scene, write_sample
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

MINI = ["fasterrcnn_mini_fpn", "maskrcnn_mini_fpn"]
LEVELS = ["0", "1", "2", "3"]
SIZE = (96, 128)


def pyramid(levels: int = 4) -> dict[str, Tensor]:
    """Feature maps of two images of 96 x 128 pixels, from stride 4, and one that is not asked for."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 5, 24 >> k, 32 >> k, dtype=torch.float64, requires_grad=True) for k in range(levels)]
    return {**dict(zip(LEVELS, maps, strict=False)), "pool": torch.randn(2, 5, 1, 1)}


def boxes_of_all_kinds() -> list[Tensor]:
    """Small to larger than the image, over its edges, outside of it, and without area."""
    torch.manual_seed(1)
    xy = torch.rand(60, 2, dtype=torch.float64) * torch.tensor([128, 96])
    wh = torch.rand(60, 2, dtype=torch.float64) * torch.tensor([[8.0], [60.0], [400.0]]).repeat(20, 1)
    odd = torch.tensor([[-50, -50, -9, -9], [-3, -3, 5, 200], [10, 10, 10, 10], [0, 0, 128, 96]], dtype=torch.float64)
    return [torch.cat([xy, xy + wh], dim=1), odd]


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize(("output_size", "sampling_ratio"), [(7, 2), ((3, 5), 3), (14, 1), (7, 0)])
def test_values_and_gradients_are_those_of_torchvision(levels, output_size, sampling_ratio):
    features, results = pyramid(levels), []
    for kind in (MultiScaleRoIAlign, EmbeddingBagRoIAlign, EmbeddingBagRoIAlign):
        pool = kind(LEVELS[:levels], output_size, sampling_ratio, canonical_scale=50)
        values = pool(features, boxes_of_all_kinds(), [SIZE] * 2)
        maps = [features[name] for name in LEVELS[:levels]]
        results.append([values, *torch.autograd.grad((values * values.detach().cos()).sum(), maps)])
        assert all(gradient.any() for gradient in results[-1])  # every level is used
    torch.testing.assert_close(*results[:2], rtol=1e-9, atol=1e-9)
    assert sampling_ratio == 0 or all(map(torch.equal, *results[1:]))  # each time the same


def test_odd_boxes_are_taken_as_torchvision_does():
    """Without a number, with a negative area, of a level that has no map, of another dtype; images without boxes."""
    features, nan = {name: value.detach().float() for name, value in pyramid().items()}, float("nan")
    odd = torch.tensor([[nan, 1, 5, 9], [nan] * 4, [9, 9, 5, 20], [1, 2, 9, 9], [0, 0, 128, 96], [0, 0, 500, 500]])
    pools = [kind(["0", "2"], 7, 2, canonical_scale=50) for kind in (MultiScaleRoIAlign, EmbeddingBagRoIAlign)]
    for boxes in ([odd, odd[3:]], [odd[:0], odd], [odd[:0]] * 2):
        theirs, ours = (pool(features, boxes, [SIZE] * 2) for pool in pools)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours = EmbeddingBagRoIAlign(["0"], 7, 2)(features, [odd.double()] * 2, [SIZE] * 2)
    assert not ours[:2].any() and ours[3].any()


class Pooled(nn.Module):
    def __init__(self, pool: nn.Module):
        super().__init__()
        self.pool = pool

    def forward(self, maps: Tensor, boxes: Tensor) -> Tensor:
        return self.pool({"0": maps}, [boxes], [(96, 128)])


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and tracing warns of torchvision's own scales
@pytest.mark.parametrize("how", ["script", "trace", "export"])
def test_recorded_models_take_any_number_of_boxes(how):
    maps, (many, few) = pyramid(1)["0"][:1].detach(), boxes_of_all_kinds()
    model = Pooled(EmbeddingBagRoIAlign(["0"], 7, 2))
    if how == "script":
        recorded = Pooled(torch.jit.script(model.pool))
    elif how == "trace":
        recorded = torch.jit.trace(model, (maps, few))
    else:
        dynamic = (None, {0: torch.export.Dim("boxes")})
        recorded = torch.export.export(model, (maps, few), dynamic_shapes=dynamic, strict=False).module()
    for boxes in (few, many):
        torch.testing.assert_close(recorded(maps, boxes), model(maps, boxes), rtol=1e-9, atol=1e-9)


# The mini models


@pytest.mark.parametrize("name", MINI)
def test_mini_models_are_torchvisions_from_their_registry(name, sample_root):
    """Small, with 91 classes unless told; with replaced predictors they train every parameter, and predict."""
    assert torchvision.models.get_model_builder(name) is getattr(mini_models, name)
    assert get_model(name).roi_heads.box_predictor.cls_score.out_features == 91
    torch.manual_seed(0)
    model = get_model(name, num_classes=8, min_size=128, box_score_thresh=0.0, box_detections_per_img=6)
    assert model.transform.min_size == (128,) and get_model(name).transform.min_size == (192,)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) <= 5e6
    body = get_model(name, weights="DEFAULT").backbone.body
    for trunk, kind, other in ((model, nn.BatchNorm2d, FrozenBatchNorm2d), (body, FrozenBatchNorm2d, nn.BatchNorm2d)):
        assert {norm.eps for norm in trunk.modules() if isinstance(norm, kind)} == {0.001}
        assert not [module for module in trunk.modules() if isinstance(module, other)]
    trained = {stage for stage, part in body.named_children() if any(p.requires_grad for p in part.parameters())}
    assert trained == set("4567")
    image, target = PennFudanDataset(sample_root, get_transform(train=False))[0]
    none = {key: target[key][:0] for key in ("boxes", "labels", "masks")}
    losses = replace_predictors(model, 3).train()([image, image], [target, none])
    assert ("loss_mask" in losses) == ("mask" in name)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
    with torch.inference_mode():
        (prediction,) = model.eval()([image])
    assert len(prediction["boxes"]) == 6 and set(prediction["labels"].tolist()) <= {1, 2}
    assert "mask" not in name or prediction["masks"].shape == (6, 1, *image.shape[-2:])


STARTER = mini_models._FOLDER / "mini_fpn.pt"


@pytest.mark.parametrize("name", MINI)
def test_weights_are_the_files_and_say_what_they_are(name, no_network):
    enum = torchvision.models.get_model_weights(name)
    state = torch.load(STARTER, map_location="cpu", weights_only=True)
    expected = {key: value for key, value in state.items() if "mask" in name or "roi_heads.mask_" not in key}
    for weights in ("DEFAULT", enum.DEFAULT, f"{enum.__name__}.DRAWN_V1"):
        model = get_model(name, weights=weights, num_classes=len(CATEGORIES))
        loaded = model.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in expected.items())
    meta = enum.DEFAULT.meta
    untrained = get_model(name, num_classes=len(CATEGORIES))  # BatchNorm's are parameters only there
    assert meta["num_params"] == sum(parameter.numel() for parameter in untrained.parameters())
    (metrics,) = meta["_metrics"].values()
    assert {key.split("_")[0] for key in metrics} == ({"box", "mask"} if "mask" in name else {"box"})
    assert meta["categories"] == CATEGORIES and CATEGORIES[:2] == ["__background__", "person"]
    assert enum.DEFAULT.transforms()(torch.zeros(3, 4, 5, dtype=torch.uint8)).dtype == torch.float32
    assert STARTER.stat().st_size < 10e6 and no_network == []
    for num_classes in (2, 91):
        with pytest.raises(ValueError, match=rf"num_classes={num_classes}, .*\b{len(CATEGORIES)}\b"):
            get_model(name, weights="DEFAULT", num_classes=num_classes)


def test_wrong_weights_are_refused(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="FasterRCNN_Mini_FPN_Weights"):
        mini_models.fasterrcnn_mini_fpn(weights=mini_models.MaskRCNN_Mini_FPN_Weights.DEFAULT)
    whole, copy = STARTER.read_bytes(), tmp_path / STARTER.name
    monkeypatch.setattr(mini_models, "_FOLDER", tmp_path)
    middle = len(whole) // 2
    for damage in (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], whole[:middle], b""):
        copy.write_bytes(damage)
        with pytest.raises(RuntimeError, match=re.escape(str(copy)) + " is damaged"):
            get_model(MINI[0], weights="DEFAULT")


def test_reloading_works():
    """As IPython's autoreload does it; in a process of its own, since the other tests hold the first classes."""
    script = """
import importlib
from torchvision.models import get_model
import tutorial_lib.offline
from tutorial_lib.offline import mini_models, roi_align, sample
for _ in range(2):
    for module in (sample, roi_align, mini_models, tutorial_lib.offline):
        importlib.reload(module)
        model = get_model("maskrcnn_mini_fpn", weights="DEFAULT")
assert type(model.roi_heads.box_roi_pool) is roi_align.EmbeddingBagRoIAlign
model = mini_models.fasterrcnn_mini_fpn(weights=mini_models.FasterRCNN_Mini_FPN_Weights.DEFAULT)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr


def test_starter_weights_detect_synthetic_people():
    """In twelve scenes of the day, which they were not trained on."""
    loader = DataLoader(DrawnScenes(seed=0, start=HELD_OUT, length=12, train=False), collate_fn=collate_fn)
    results = evaluate(get_model(MINI[1], weights="DEFAULT"), loader, torch.device("cpu"), progress=False)
    assert results.box.per_class[CATEGORIES.index("person")] > 0.3
    assert results.mask.per_class[CATEGORIES.index("person")] > 0.2


# The sample


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_sample_has_penn_fudans_layout(sample_root):
    dataset = PennFudanDataset(sample_root)
    assert sample_root.name.endswith(f"Ped-12-0-v{sample.VERSION}")
    stems = [f"DrawnPed{number:05d}" for number in range(1, 13)]
    endings = {"PNGImages": ".png", "PedMasks": "_mask.png", "Annotation": ".txt"}
    assert files_in(sample_root).keys() == {f"{f}/{stem}{end}" for f, end in endings.items() for stem in stems}
    assert [path.name for path in sample_root.parent.iterdir()] == [sample_root.name]  # no scratch folder is left
    for stem, (image, target) in zip(stems, dataset, strict=True):
        height, width = image.shape[-2:]
        assert 200 <= width <= 320 and 176 <= height <= 256 and image.float().std() > 2
        text = (sample_root / "Annotation" / f"{stem}.txt").read_text(encoding="utf-8")
        assert f'Image filename : "{sample_root.name}/PNGImages/{stem}.png"' in text
        assert f"Image size (X x Y x C) : {width} x {height} x 3" in text
        assert f"Objects with ground truth : {len(target['boxes'])} {{" in text
        boxes = re.findall(r"Bounding box for object \d+ .*: \((\d+), (\d+)\) - \((\d+), (\d+)\)", text)
        assert [[int(x1) - 1, int(y1) - 1, int(x2), int(y2)] for x1, y1, x2, y2 in boxes] == target["boxes"].tolist()


# By VERSION, of the first three images at seed 0: SHA-256 of their masks, and the means of their pixels.
PINNED = {2: ("d272fa0a60a8eda3", [156.8, 151.0, 153.8])}


def test_same_seed_and_version_give_the_same_files(sample_root, tmp_path):
    """If this fails, the scenes have changed: raise VERSION, and pin the new numbers.

    Image i depends on the seed and i alone. Another processor may round pixels otherwise, hence only their means.
    """
    few, many = write_sample(tmp_path, num_images=3), files_in(sample_root)
    again = {name: body for name, body in files_in(few).items() if name.endswith(".png")}  # the texts name the folder
    assert len(again) == 6 and again.items() <= many.items()
    assert files_in(write_sample(tmp_path, num_images=12)) == many
    digest, means = hashlib.sha256(), []
    for image, target in PennFudanDataset(few):
        digest.update(target["masks"].numpy().tobytes())
        means.append(image.float().mean().item())
    found = {sample.VERSION: (digest.hexdigest()[:16], [round(mean, 1) for mean in means])}
    expected_digest, expected_means = PINNED.get(sample.VERSION, (None, []))
    assert found[sample.VERSION] == (expected_digest, pytest.approx(expected_means, abs=0.5)), f"PINNED = {found}"
    other = files_in(write_sample(tmp_path, num_images=3, seed=1))
    assert not {body for name, body in other.items() if "PNG" in name} & set(many.values())
    # Nor are they scenes that the starter weights were trained on: the same random numbers would give the same sizes.
    trained = DrawnScenes(seed=0, start=0, length=3, train=False)
    assert all(trained[index][0].shape != PennFudanDataset(few)[index][0].shape for index in range(3))


def test_sample_is_written_once_and_an_incomplete_one_is_refused(tmp_path, monkeypatch):
    folder = write_sample(str(tmp_path / "new" / "data"), num_images=1)
    mine, root = folder / "PNGImages" / "DrawnPed00001.png", folder.parent
    mine.write_bytes(b"mine")
    assert write_sample(root, num_images=1) == folder and mine.read_bytes() == b"mine"
    for remove in (mine.unlink, mine.parent.rmdir, lambda: shutil.rmtree(folder), folder.mkdir):
        remove()
        if folder.exists():
            with pytest.raises(RuntimeError, match=f"delete {re.escape(str(folder))}"):
                write_sample(root, num_images=1)
    assert not list(folder.iterdir())


def test_sample_of_two_writers_at_once_and_one_that_is_broken_off(tmp_path, monkeypatch):
    annotation = sample._annotation

    def while_another_writes(*args):
        monkeypatch.setattr(sample, "_annotation", annotation)
        write_sample(tmp_path, num_images=2)
        return annotation(*args)

    monkeypatch.setattr(sample, "_annotation", while_another_writes)
    folder = write_sample(tmp_path, num_images=2)
    assert list(tmp_path.iterdir()) == [folder] and len(files_in(folder)) == 6
    monkeypatch.setattr(sample, "_annotation", lambda *args: [][0])
    with pytest.raises(IndexError):
        write_sample(tmp_path, num_images=3)
    assert list(tmp_path.iterdir()) == [folder]


def test_people_alone_are_labelled_and_it_is_not_day(tmp_path, monkeypatch):
    scenes = []
    monkeypatch.setattr(sample, "draw_scene", lambda *args, **kw: scenes.append(draw_scene(*args, **kw)) or scenes[-1])
    dataset = PennFudanDataset(write_sample(tmp_path, num_images=6))
    scenes = [scene for scene in scenes if "person" in scene[2]]
    assert any(set(labels) != {"person"} for _, _, labels in scenes)
    for (image, target), (day, ids, labels) in zip(dataset, scenes, strict=True):
        people = [number for number, label in enumerate(labels, start=1) if label == "person"]
        assert np.array_equal(target["masks"], ids == np.array(people)[:, None, None])
        assert np.abs(image.permute(1, 2, 0).numpy() - np.asarray(day, np.float32)).mean() > 20


def test_scenes_have_one_label_for_each_instance_in_sight():
    seen = []
    for number in range(40):
        (image, ids, labels), again = (draw_scene(np.random.default_rng([7, number])) for _ in range(2))
        assert image.tobytes() == again[0].tobytes() and np.array_equal(ids, again[1]) and labels == again[2]
        assert image.mode == "RGB" and image.size == (256, 192) and ids.dtype == np.uint8 and ids.shape == (192, 256)
        seen += labels
        _, small, of_small = draw_scene(np.random.default_rng(number), size=(48, 36), people=(4, 8))
        for masks, names in ((ids, labels), (small, of_small)):
            sizes = np.bincount(masks.ravel())[1:]
            assert len(sizes) == len(names) and (sizes >= 64).all()  # specks are not counted
        _, _, labels = draw_scene(np.random.default_rng(number), people=(2, 3), others=(0, 0))
        assert labels.count("person") <= 3 and set(labels) <= {"person", "bicycle"}  # some people ride
    assert len(seen) > 100 and set(seen) == set(CATEGORIES[1:])
    _, ids, labels = draw_scene(np.random.default_rng(0), people=(0, 0), others=(0, 0))
    assert labels == [] and not ids.any()
