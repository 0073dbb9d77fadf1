from __future__ import annotations

import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from tutorial_lib import models, penn_fudan, presets  # noqa: F401  (models registers the mini models)
from tutorial_lib.penn_fudan import PennFudanDataset, download_penn_fudan
from tutorial_lib.presets import PRESETS, choose_preset, fetch_weights, prepare_data, provenance


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("TUTORIAL_PRESET", "PENN_FUDAN_ROOT"):
        monkeypatch.delenv(name, raising=False)


# choose_preset


@pytest.mark.parametrize(("cuda", "name"), [(True, "full"), (False, "quick")])
def test_default_depends_on_cuda(monkeypatch, cuda, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert choose_preset() is PRESETS[name]
    monkeypatch.setenv("TUTORIAL_PRESET", "")
    assert choose_preset().name == name


@pytest.mark.parametrize("name", ["quick", "laptop", "full"])
def test_environment_chooses_before_cuda_and_an_argument_before_both(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name != "full")
    monkeypatch.setenv("TUTORIAL_PRESET", name)
    assert choose_preset() is PRESETS[name]
    other = "laptop" if name == "quick" else "quick"
    assert choose_preset(other) is PRESETS[other]


@pytest.mark.parametrize("name", ["fast", "Quick", "quick ", "0"])
def test_unknown_name_is_an_error_that_lists_the_names(monkeypatch, name):
    for choose in (lambda: choose_preset(name), choose_preset):
        with pytest.raises(ValueError, match=f"{name!r}.*quick.*laptop.*full"):
            choose()
        monkeypatch.setenv("TUTORIAL_PRESET", name)


def test_presets_are_named_consistently_and_their_models_are_registered():
    assert list(PRESETS) == ["quick", "laptop", "full"]
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert {preset.faster_rcnn, preset.mask_rcnn} <= set(torchvision.models.list_models())
        assert preset.faster_rcnn.startswith("fasterrcnn_") and preset.mask_rcnn.startswith("maskrcnn_")
        assert min(preset.split) >= 1 and preset.epochs <= preset.long_epochs
        assert preset.min_size[-1] == max(preset.min_size) <= preset.max_size
        if preset.data == "PennFudan":
            assert sum(preset.split) == penn_fudan.NUM_IMAGES


# prepare_data


def test_quick_draws_its_images_without_a_network(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("PENN_FUDAN_ROOT", str(tmp_path / "nowhere"))  # not for quick
    folder = prepare_data(PRESETS["quick"], tmp_path / "data")
    assert folder.parent == tmp_path / "data"
    assert len(PennFudanDataset(folder)) == sum(PRESETS["quick"].split) == 64
    assert no_network == []


def test_penn_fudan_root_is_used_where_it_is(sample_root, tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("PENN_FUDAN_ROOT", str(sample_root))
    preset = replace(PRESETS["laptop"], split=(6, 2, 4))
    assert prepare_data(preset, tmp_path / "data") == sample_root
    assert list(tmp_path.iterdir()) == [] and no_network == []


def test_penn_fudan_root_with_the_real_photographs(penn_fudan_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PENN_FUDAN_ROOT", str(penn_fudan_root))
    for name in ("laptop", "full"):
        assert prepare_data(PRESETS[name], tmp_path) == penn_fudan_root


def test_penn_fudan_root_with_too_few_images(sample_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PENN_FUDAN_ROOT", str(sample_root))
    with pytest.raises(ValueError, match=f"{re.escape(str(sample_root))}.* 12 images.*laptop needs 170"):
        prepare_data(PRESETS["laptop"], tmp_path)


def test_penn_fudan_root_that_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PENN_FUDAN_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare_data(PRESETS["laptop"], tmp_path)


def test_download_that_fails_says_what_to_set(tmp_path, monkeypatch, refused_address):
    monkeypatch.setattr(presets, "download_penn_fudan", lambda root: download_penn_fudan(root, refused_address + "/x"))
    with pytest.raises(RuntimeError, match=r"(?s)cannot be downloaded.*PENN_FUDAN_ROOT.*TUTORIAL_PRESET=quick"):
        prepare_data(PRESETS["laptop"], tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_download_goes_into_the_root(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "download_penn_fudan", lambda root: Path(root) / "PennFudanPed")
    assert prepare_data(PRESETS["full"], tmp_path) == tmp_path / "PennFudanPed"


# fetch_weights


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    """torch.hub's folder, in a place of its own; emptied afterwards, for ResNet-50's size."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("TORCH_HUB", raising=False)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    assert folder.is_relative_to(tmp_path)
    yield folder
    for path in folder.glob("*"):
        path.unlink()


def random_weights(name: str) -> tuple[dict[str, Tensor], bytes]:
    """Weights that no one has trained, with nothing left at what a new model has."""
    none = {"weights_backbone": None} if "rcnn" in name else {}
    state = torchvision.models.get_model(name, weights=None, **none).state_dict()
    generator = torch.Generator().manual_seed(0)
    for value in state.values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator))
    file = io.BytesIO()
    torch.save(state, file)
    return state, file.getvalue()


def hashed_name(name: str, body: bytes) -> str:
    return f"/models/{name}-{hashlib.sha256(body).hexdigest()[:8]}.pth"


def move_weights(monkeypatch: pytest.MonkeyPatch, name: str, url: str) -> None:
    """Only the address is changed: what fetches, checks and loads the file is torchvision's own."""
    monkeypatch.setattr(torchvision.models.get_model_weights(name).DEFAULT.value, "url", url)


@pytest.fixture(scope="module")
def mobilenet() -> tuple[dict[str, Tensor], bytes]:
    return random_weights("mobilenet_v2")


def check_that_served_weights_are_used(name, state, body, local_server, checkpoints, monkeypatch):
    path = hashed_name(name, body)
    move_weights(monkeypatch, name, local_server.serve(path, body))
    fetch_weights(name)
    assert [file.name for file in checkpoints.iterdir()] == [path.rsplit("/", 1)[1]]
    del local_server.pages[path]  # what follows takes the file
    model = torchvision.models.get_model(name, weights="DEFAULT")
    loaded = model.state_dict()
    counters = {key for key in state if key.endswith("num_batches_tracked")}  # a frozen BatchNorm has none
    assert set(state) - counters <= set(loaded) <= set(state)
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    fetch_weights(name)
    assert local_server.requests == [path]


def test_fetched_weights_are_those_the_builder_takes(mobilenet, local_server, checkpoints, monkeypatch, capsys):
    check_that_served_weights_are_used("mobilenet_v2", *mobilenet, local_server, checkpoints, monkeypatch)


def test_fetched_detector_is_the_one_the_builder_takes(local_server, checkpoints, monkeypatch, capsys):
    """Of the full preset, with its ResNet-50: 160 MB through the same code."""
    name = PRESETS["full"].faster_rcnn
    check_that_served_weights_are_used(name, *random_weights(name), local_server, checkpoints, monkeypatch)


def test_weights_of_another_hash_are_refused(mobilenet, local_server, checkpoints, monkeypatch, capsys):
    url = local_server.serve("/models/mobilenet_v2-0123abcd.pth", mobilenet[1])
    move_weights(monkeypatch, "mobilenet_v2", url)
    with pytest.raises(RuntimeError, match=f"(?s)mobilenet_v2 .*{re.escape(url)}.*hash.*0123abcd.*TUTORIAL_PRESET"):
        fetch_weights("mobilenet_v2")
    assert list(checkpoints.iterdir()) == []


def test_weights_cut_short_are_refused(mobilenet, local_server, checkpoints, monkeypatch, capsys):
    path, size = hashed_name("mobilenet_v2", mobilenet[1]), len(mobilenet[1])
    url = local_server.serve(path, mobilenet[1][: size // 2], Content_Length=str(size))
    move_weights(monkeypatch, "mobilenet_v2", url)
    with pytest.raises(RuntimeError, match=re.escape(url)):
        fetch_weights("mobilenet_v2")
    assert list(checkpoints.iterdir()) == []


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "mobilenet_v2"])
def test_refused_connection_names_the_address_and_what_to_set(name, refused_address, checkpoints, monkeypatch, capsys):
    url = f"{refused_address}/models/{name}-01234567.pth"
    move_weights(monkeypatch, name, url)
    with pytest.raises(RuntimeError) as caught:
        fetch_weights(name)
    for part in (name, url, "TUTORIAL_PRESET=quick", str(checkpoints)):
        assert part in str(caught.value)


def test_page_not_found_names_the_address(local_server, checkpoints, monkeypatch, capsys):
    url = local_server.address + "/models/mobilenet_v2-01234567.pth"
    move_weights(monkeypatch, "mobilenet_v2", url)
    with pytest.raises(RuntimeError, match=f"(?s){re.escape(url)}.*404"):
        fetch_weights("mobilenet_v2")


def test_file_put_there_by_hand_is_taken(mobilenet, checkpoints, monkeypatch, no_network):
    """As the message says to do without a network."""
    path = hashed_name("mobilenet_v2", mobilenet[1])
    move_weights(monkeypatch, "mobilenet_v2", "https://download.pytorch.org" + path)
    checkpoints.mkdir(parents=True)
    (checkpoints / path.rsplit("/", 1)[1]).write_bytes(mobilenet[1])
    fetch_weights("mobilenet_v2")
    assert no_network == []


@pytest.mark.parametrize("wrong", ["page", "cut", "other weights"])
def test_wrong_file_put_there_by_hand_is_refused(mobilenet, checkpoints, monkeypatch, no_network, wrong):
    """torch.hub checks the hash of what it downloads, but not of what it finds."""
    state, body = mobilenet
    path = hashed_name("mobilenet_v2", body)
    move_weights(monkeypatch, "mobilenet_v2", "https://download.pytorch.org" + path)
    checkpoints.mkdir(parents=True)
    file = checkpoints / path.rsplit("/", 1)[1]
    if wrong == "other weights":
        torch.save({key: torch.zeros_like(value) for key, value in state.items()}, file)
    else:
        file.write_bytes(b"<!DOCTYPE html>" if wrong == "page" else body[: len(body) // 2])
    with pytest.raises(RuntimeError, match=re.escape(file.name)):
        fetch_weights("mobilenet_v2")


def test_no_weights_need_no_network(no_network):
    fetch_weights("mobilenet_v2", None)
    assert no_network == []


@pytest.mark.parametrize("name", ["quick", "laptop"])
def test_mini_models_need_no_network(name, checkpoints, no_network):
    for model in (PRESETS[name].faster_rcnn, PRESETS[name].mask_rcnn):
        fetch_weights(model, PRESETS[name].weights)
    assert no_network == [] and not checkpoints.exists()


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "mobilenet_v2"])
def test_published_address_is_pytorchs_and_carries_a_hash(name):
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    assert re.fullmatch(rf"https://download\.pytorch\.org/models/{name}\w*-[0-9a-f]{{8}}\.pth", url)


# provenance


def test_provenance_is_one_line_that_tells_the_presets_apart():
    lines = {name: provenance(preset, torch.device("cpu")) for name, preset in PRESETS.items()}
    assert len(set(lines.values())) == 3
    for name, line in lines.items():
        assert "\n" not in line
        for part in (f"preset {name}", PRESETS[name].data, "cpu", torch.__version__, torchvision.__version__):
            assert part in line
    assert "COCO" in lines["full"] and "COCO" not in lines["quick"] + lines["laptop"]
    assert "100 + 20 + 50" in lines["laptop"]


def test_provenance_names_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "A Card")
    assert "A Card" in provenance(PRESETS["full"], torch.device("cuda"))
