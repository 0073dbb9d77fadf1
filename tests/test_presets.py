"""Presets, the folder of the data, and weights that are fetched."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from tests.processes import REPOSITORY
from tutorial_lib import presets
from tutorial_lib.penn_fudan import NUM_IMAGES, PennFudanDataset, download_penn_fudan
from tutorial_lib.presets import (
    FULL_ON_CPU,
    PRESETS,
    choose_preset,
    data_folder,
    fetch_weights,
    prepare_data,
    provenance,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("TUTORIAL_PRESET", "TUTORIAL_DEVICE", "PENN_FUDAN_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("cuda", [True, False])
def test_an_argument_chooses_then_the_environment_then_the_device(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    on_cpu = replace(PRESETS["full"], **FULL_ON_CPU)
    assert choose_preset() is PRESETS["full" if cuda else "quick"]
    assert choose_preset("full") is PRESETS["full"] if cuda else choose_preset("full") == on_cpu
    assert choose_preset("full", CUDA) is PRESETS["full"] and choose_preset("full", CPU) == on_cpu
    for name, other in (("quick", "laptop"), ("laptop", "quick")):
        monkeypatch.setenv("TUTORIAL_PRESET", name)
        assert choose_preset() is PRESETS[name] and choose_preset(other) is PRESETS[other]
    for name in ("fast", "Quick", "quick ", "0"):
        monkeypatch.setenv("TUTORIAL_PRESET", name)
        for argument in (None, name):
            with pytest.raises(ValueError, match=f"{name!r}.*quick.*laptop.*full"):
                choose_preset(argument)


def test_presets_are_consistent():
    for name, preset in [*PRESETS.items(), ("full", choose_preset("full", CPU))]:
        assert preset.name == name
        assert {preset.faster_rcnn, preset.mask_rcnn} <= set(torchvision.models.list_models())
        assert min(preset.split) >= 1 and preset.epochs <= preset.long_epochs
        assert preset.min_size[-1] == max(preset.min_size) <= preset.max_size
        assert preset.data != "PennFudan" or sum(preset.split) == NUM_IMAGES
    assert all(value < getattr(PRESETS["full"], name) for name, value in FULL_ON_CPU.items())


def test_the_data_folder_of_a_clone_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_folder() == REPOSITORY / "data"
    for path in [*(REPOSITORY / "notebooks" / "py").glob("*.py"), REPOSITORY / "tutorial_lib" / "train.py"]:
        calls = re.findall(r"prepare_data\((.*)\)", path.read_text(encoding="utf-8"))
        assert set(calls) <= {"preset"}, path.name  # with no folder of its own


def test_the_data_folder_elsewhere_is_in_pytorchs_cache(tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "site-packages" / "tutorial_lib" / "presets.py"))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "cache" / "torch" / "tutorial_lib"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(presets, "download_penn_fudan", lambda root: Path(root) / "PennFudanPed")
    assert prepare_data(PRESETS["full"]) == tmp_path / "torch" / "tutorial_lib" / "PennFudanPed"
    assert prepare_data(PRESETS["full"], str(tmp_path)) == tmp_path / "PennFudanPed"
    monkeypatch.setenv("PENN_FUDAN_ROOT", str(tmp_path / "nowhere"))  # not for quick
    folder = prepare_data(replace(PRESETS["quick"], split=(2, 1, 1)))
    assert folder.parent == data_folder() and len(PennFudanDataset(folder)) == 4 and no_network == []


def test_penn_fudan_root_is_used_where_it_is(sample_root, tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("PENN_FUDAN_ROOT", str(sample_root))
    assert prepare_data(replace(PRESETS["laptop"], split=(6, 2, 4)), tmp_path / "data") == sample_root
    with pytest.raises(ValueError, match=f"{re.escape(str(sample_root))} holds 12 images; laptop needs 170"):
        prepare_data(PRESETS["laptop"], tmp_path)
    monkeypatch.setenv("PENN_FUDAN_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare_data(PRESETS["laptop"], tmp_path)
    assert list(tmp_path.iterdir()) == [] and no_network == []


def test_download_that_fails_says_what_to_set(tmp_path, monkeypatch, refused_address):
    monkeypatch.setattr(presets, "download_penn_fudan", lambda root: download_penn_fudan(root, refused_address + "/x"))
    with pytest.raises(RuntimeError, match=r"(?s)cannot be downloaded.*PENN_FUDAN_ROOT.*TUTORIAL_PRESET=quick"):
        prepare_data(PRESETS["laptop"], tmp_path / "data")


# fetch_weights: only the address is changed; what fetches, checks and loads the file is torchvision's own


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """torch.hub's folder, in a place of its own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def mobilenet():
    """Weights that no one has trained: the file's name, its content, the tensors."""
    state = {name: value + 1 for name, value in torchvision.models.mobilenet_v2().state_dict().items()}
    file = io.BytesIO()
    torch.save(state, file)
    return f"mobilenet_v2-{hashlib.sha256(file.getvalue()).hexdigest()[:8]}.pth", file.getvalue(), state


def move_weights(monkeypatch, url):
    monkeypatch.setattr(torchvision.models.MobileNet_V2_Weights.DEFAULT.value, "url", url)


def test_fetched_weights_are_those_the_builder_takes(mobilenet, local_server, checkpoints, monkeypatch):
    name, body, state = mobilenet
    move_weights(monkeypatch, local_server.serve(f"/{name}", body))
    fetch_weights("mobilenet_v2")
    assert [file.name for file in checkpoints.iterdir()] == [name]
    local_server.pages.clear()  # what follows takes the file
    loaded = torchvision.models.get_model("mobilenet_v2", weights="DEFAULT").state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in loaded.items())
    fetch_weights("mobilenet_v2")
    assert local_server.requests == [f"/{name}"]


def test_weights_that_cannot_be_fetched(mobilenet, local_server, refused_address, checkpoints, monkeypatch):
    name, body, _ = mobilenet
    other = "/mobilenet_v2-0123abcd.pth"
    for url, reason in [
        (local_server.serve(other, body), "hash.*0123abcd"),
        (local_server.serve(f"/{name}", body[: len(body) // 2], Content_Length=str(len(body))), ""),  # cut short
        (f"{local_server.address}/models{other}", "404"),
        (refused_address + other, ""),
    ]:
        move_weights(monkeypatch, url)
        where = f"{re.escape(str(checkpoints))}.*TUTORIAL_PRESET=quick"
        with pytest.raises(RuntimeError, match=f"(?s)of mobilenet_v2 .*{re.escape(url)}.*{reason}.*{where}"):
            fetch_weights("mobilenet_v2")
        assert list(checkpoints.iterdir()) == []


def test_a_file_put_there_by_hand(mobilenet, checkpoints, monkeypatch, no_network):
    """As the message says to do without a network. torch.hub checks what it downloads, but not what it finds."""
    name, body, _ = mobilenet
    move_weights(monkeypatch, "https://download.pytorch.org/models/" + name)
    checkpoints.mkdir(parents=True)
    (checkpoints / name).write_bytes(body)
    fetch_weights("mobilenet_v2")
    for wrong in (b"<!DOCTYPE html>", body[: len(body) // 2]):
        (checkpoints / name).write_bytes(wrong)
        with pytest.raises(RuntimeError, match=f"{name} is not what the hash in its name says; delete it"):
            fetch_weights("mobilenet_v2")
    assert no_network == []


def test_what_needs_no_network(checkpoints, no_network):
    fetch_weights("mobilenet_v2", None)
    for preset in (PRESETS["quick"], PRESETS["laptop"]):
        fetch_weights(preset.faster_rcnn, preset.weights)
        fetch_weights(preset.mask_rcnn, preset.weights)
    assert no_network == [] and not checkpoints.exists()


def test_provenance_is_one_line_that_tells_the_presets_apart(monkeypatch):
    lines = {name: provenance(preset, CPU) for name, preset in PRESETS.items()}
    for name, line in lines.items():
        for part in (f"preset {name} ", PRESETS[name].data, "cpu", torch.__version__, torchvision.__version__):
            assert part in line and "\n" not in line
    assert "COCO" in lines["full"] and "COCO" not in lines["quick"] + lines["laptop"]
    assert "100 + 20 + 50" in lines["laptop"] and "my own" in provenance(PRESETS["full"], CPU, "my own")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert "A GPU" in provenance(PRESETS["full"], CUDA)
