"""The check of the real weights, with random ones that a server of this machine hands out."""

import hashlib
import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torchvision.models import get_model, get_model_weights

from tools import check_full
from tools.benchmarks.full_cpu import random_weights
from tutorial_lib.presets import PRESETS

CPU = torch.device("cpu")
NAMES = ("mobilenet_v2", "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")


@pytest.fixture
def full(sample_root, local_server, tmp_path, monkeypatch):
    """`full` on small synthetic images, with weights that no one has trained."""
    monkeypatch.setenv("PENN_FUDAN_ROOT", str(sample_root))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in NAMES:
        file = io.BytesIO()
        torch.save(get_model(name).state_dict() if name == "mobilenet_v2" else random_weights(name), file)
        page = f"/{name}-{hashlib.sha256(file.getvalue()).hexdigest()[:8]}.pth"
        address = local_server.serve(page, file.getvalue())
        monkeypatch.setattr(get_model_weights(name).DEFAULT.value, "url", address)
    return replace(PRESETS["full"], split=(6, 2, 4), min_size=(64,), max_size=96)


def test_weights_are_fetched_and_have_to_detect_people(full, local_server, monkeypatch, capsys):
    with pytest.raises(ValueError, match="fasterrcnn_resnet50_fpn with the weights DEFAULT should detect people"):
        check_full.check(full, CPU)
    fetched = [path.partition("-")[0] for path in local_server.requests]
    assert fetched == ["/mobilenet_v2", "/fasterrcnn_resnet50_fpn"]
    assert "fasterrcnn_resnet50_fpn, before training: 5 images\nbox   AP 0." in capsys.readouterr().out

    seen, results = [], SimpleNamespace(box=SimpleNamespace(AP50=0.51))
    monkeypatch.setattr(check_full, "evaluate", lambda model, *_, **__: seen.append(type(model).__name__) or results)
    check_full.check(full, CPU)
    assert seen == ["FasterRCNN", "MaskRCNN"]
    assert [path.partition("-")[0] for path in local_server.requests] == [f"/{name}" for name in NAMES]
    results.box.AP50 = None  # nothing to measure on
    with pytest.raises(ValueError, match="should detect people"):
        check_full.check(full, CPU)
