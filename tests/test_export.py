"""tutorial_lib.export: ONNX files that agree with PyTorch, and the script that runs them without torch."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image

from tests.processes import run_python
from tutorial_lib import engine, export
from tutorial_lib.data import read_image
from tutorial_lib.export import export_onnx
from tutorial_lib.offline.sample import CATEGORIES, draw_scene

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def scene(number: int, height: int, width: int) -> Tensor:
    image = draw_scene(np.random.default_rng([0, number]), others=(2, 4))[0]
    return resize(pil_to_tensor(image).float() / 255, [height, width]).clamp(0, 1)


# torchvision's own trace resizes those of 60 x 147 and of 150 x 97 to another size than its model does.
IMAGES = [scene(0, 192, 256), scene(1, 60, 147), scene(2, 150, 97)]
NOTHING = torch.ones(3, 90, 130)  # without detections


def new(name: str) -> nn.Module:
    return get_model(name, weights="DEFAULT")


@pytest.fixture(scope="module", params=["fasterrcnn_mini_fpn", "maskrcnn_mini_fpn"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("the export") / "my model.onnx"
    model = new(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        largest = export_onnx(model, path, [NOTHING, *IMAGES], CATEGORIES)
    return model.eval(), path, largest


def test_onnx_agrees_with_pytorch_on_images_it_was_not_given(exported):
    model, path, largest = exported
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    number = 0
    for image in [NOTHING, torch.zeros(3, 40, 40), *(scene(i, 70 + 31 * i, 260 - 27 * i) for i in range(3, 7))]:
        found = dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))
        with torch.no_grad():
            wanted = model([image])[0]
        assert names == list(wanted) and set(largest) == {*names} - {"labels"}
        number += len(wanted["boxes"])
        for name, value in wanted.items():
            assert found[name].shape == value.shape and str(value.dtype) == f"torch.{found[name].dtype}"
            np.testing.assert_allclose(found[name], value, atol=0.01, err_msg=f"{name} of {list(image.shape)}")
    assert number > 20 and not len(model([NOTHING])[0]["boxes"])
    assert largest["boxes"] < 0.01 and largest["scores"] < 1e-4 and 0 < max(largest.values())
    assert sorted(file.name for file in path.parent.iterdir()) == ["my model.onnx", "my model_run.py"]


def test_the_script_runs_without_torch(exported, tmp_path: Path):
    model, path, _ = exported
    turned = to_pil_image(scene(7, 120, 200))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    grey = 30 + np.asarray(to_pil_image(scene(8, 150, 100)).convert("L")).astype(np.uint16) * 200
    Image.fromarray(grey).save(tmp_path / "grey.png")
    photos = [tmp_path / "turned.png", tmp_path / "grey.png"]
    blocked = (
        "import runpy, sys; sys.modules.update(torch=None, torchvision=None, tutorial_lib=None); "
        "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    ran = run_python("-c", blocked, path.with_name("my model_run.py"), *photos, timeout=60)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    wanted = []
    for photo in photos:
        found = engine.predict(model, [read_image(photo, "RGB").float() / 255], torch.device("cpu"))[0]
        wanted += zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        image, picture = read_image(photo, "RGB"), read_image(photo.with_name(f"{photo.stem}_detections.png"))
        assert image.shape == picture.shape and (image != picture).any()
    lines = ran.stdout.splitlines()
    assert len(lines) == len(wanted) > 2
    for line, (label, score, box) in zip(lines, wanted, strict=True):
        name, *numbers = line.rsplit(maxsplit=5)
        assert name == CATEGORIES[label]
        assert [float(number) for number in numbers] == pytest.approx([score, *box], abs=0.06)


def test_the_model_is_left_as_it_is_and_bfloat16_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "has_fast_bfloat16", lambda device: True)
    model, before = new("maskrcnn_mini_fpn").train(), new("maskrcnn_mini_fpn").eval()
    model.backbone.eval()
    assert engine.use_bfloat16(model, torch.device("cpu"))
    modes = [module.training for module in model.modules()]
    export_onnx(model, tmp_path / "model.onnx", IMAGES[:1])
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    assert "forward" in vars(model.backbone) and "resize" not in vars(model.transform)
    found = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"image": IMAGES[2].numpy()})
    with torch.no_grad():
        wanted = before([IMAGES[2]])[0]
    for one, other in zip(found, wanted.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=0.01)


def test_torchvisions_own_trace_does_not_agree_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "_resize", lambda transform, image: type(transform).resize(transform, image)[0])
    (tmp_path / "model.onnx").write_text("of yesterday")
    with pytest.raises(ValueError, match=r"image 1: .* not agree with PyTorch: \d+ detections, of scores up to 0\.9"):
        export_onnx(new("fasterrcnn_mini_fpn"), tmp_path / "model.onnx", IMAGES)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["of yesterday"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda boxes, labels, scores: (boxes[-2::-1], labels[-2::-1], scores[-2::-1]), None),
        (
            lambda boxes, labels, scores: (boxes[1:], labels[1:], scores[1:]),
            "image 0: .*: 1 detections, of scores up to",
        ),
        (lambda boxes, labels, scores: (boxes[:0], labels[:0], scores[:0]), "image 0: .* detections, of scores up to"),
        (lambda boxes, labels, scores: (boxes + 0.2, labels, scores), "image 0: .* detections, of scores up to"),
        (lambda boxes, labels, scores: (boxes, labels % 7 + 1, scores), "image 0: .* detections, of scores up to"),
    ],
    ids=["other order and one at the threshold left out", "one left out", "none", "moved", "other labels"],
)
def test_what_agrees(change, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Changed(onnxruntime.InferenceSession):
        def run(self, *arguments):
            return [value.copy() for value in change(*super().run(*arguments))]

    model = new("fasterrcnn_mini_fpn").eval()
    with torch.no_grad():
        model.roi_heads.score_thresh = model(IMAGES[:1])[0]["scores"][-1].item() - 5e-4
    monkeypatch.setattr(onnxruntime, "InferenceSession", Changed)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        export_onnx(model, tmp_path / "model.onnx", IMAGES[:1])
    assert len(list(tmp_path.iterdir())) == (0 if message else 2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"images": [*IMAGES, IMAGES[0][None]]},
            ValueError,
            r"image 3 is torch.float32 \[1, 3, 192, 256\]; it has",
        ),
        ({"images": [IMAGES[0][0]]}, ValueError, r"image 0 is torch.float32 \[192, 256\]"),
        ({"images": [IMAGES[0][:1]]}, ValueError, r"image 0 is torch.float32 \[1, 192, 256\]"),
        ({"images": [IMAGES[0], IMAGES[0].byte()]}, ValueError, r"image 1 is torch.uint8 \[3, 192, 256\]"),
        ({"images": [NOTHING]}, ValueError, "nothing is detected in 1 images"),
        ({"images": []}, ValueError, "nothing is detected in 0 images"),
        ({"categories": CATEGORIES[1:]}, ValueError, "there have to be 8 categories"),
        ({"path": "model.pt"}, ValueError, "model.pt has to end in .onnx"),
        ({"model": nn.DataParallel(nn.Linear(1, 1))}, TypeError, "a DataParallel cannot be exported: give a Faster or"),
        ({"model": get_model("ssdlite320_mobilenet_v3_large", weights_backbone=None)}, TypeError, "a SSD cannot be"),
    ],
)
def test_bad_input(changed: dict, error: type, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        export_onnx(**{"model": new("fasterrcnn_mini_fpn"), "path": "a.onnx", "images": IMAGES, **changed})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'{name}.*; to write ONNX files: pip install "tutorial-lib\[export\]"'):
        export_onnx(new("fasterrcnn_mini_fpn"), tmp_path / "model.onnx", IMAGES)
