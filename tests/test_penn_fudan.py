"""The Penn-Fudan dataset, on a toy and on the photographs, and its download from a server of this machine."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from tutorial_lib import penn_fudan
from tutorial_lib.penn_fudan import PennFudanDataset, download_penn_fudan

# The toy: two images of 12 x 10 pixels, with two people and one.
TOY_MASKS = {"a": np.zeros((10, 12), np.uint8), "b": np.zeros((10, 12), np.uint8)}
TOY_MASKS["a"][2:7, 1:4] = 1
TOY_MASKS["a"][0, 11] = 2  # one pixel, in a corner
TOY_MASKS["b"][5:10, 3:12] = 1


@pytest.fixture
def toy_root(tmp_path: Path) -> Path:
    root, noise = tmp_path / "Toy", np.random.default_rng(0)
    for folder in ("PNGImages", "PedMasks"):
        (root / folder).mkdir(parents=True)
    for (name, mask), mode in zip(TOY_MASKS.items(), ("RGB", "L"), strict=True):
        image = Image.fromarray(noise.integers(0, 256, (10, 12, 3), dtype=np.uint8)).convert(mode)
        image.save(root / "PNGImages" / f"{name}.png")
        Image.fromarray(mask).save(root / "PedMasks" / f"{name}_mask.png")
    return root


def test_real_targets_equal_those_of_a_slow_way_and_the_annotation_files(penn_fudan_root, no_network):
    """The annotation's corners are 1-based and inclusive. The few that differ are slips of the annotation."""
    dataset, people, agree, ids = PennFudanDataset(penn_fudan_root), 0, np.zeros(4, int), {}
    line = re.compile(r"Bounding box for object (\d+) .*: \((\d+), (\d+)\) - \((\d+), (\d+)\)")
    for index, name in enumerate(dataset.file_names):
        target = dataset.get_target(index)
        with Image.open(penn_fudan_root / "PedMasks" / name.replace(".png", "_mask.png")) as image:
            mask = np.asarray(image)
        ids[name], count = sorted(set(np.unique(mask).tolist()) - {0}), int(mask.max())
        assert ids[name] == list(range(1, count + 1))
        slow = {
            "boxes": torch.zeros(count, 4),
            "labels": torch.ones(count, dtype=torch.int64),
            "masks": torch.from_numpy((mask == np.arange(1, count + 1)[:, None, None]).astype(np.uint8)),
            "area": torch.from_numpy(np.bincount(mask.ravel())[1:]).float(),
            "iscrowd": torch.zeros(count, dtype=torch.int64),
        }
        for k, (y, x) in enumerate(np.nonzero(mask == number) for number in ids[name]):
            slow["boxes"][k] = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
        assert type(target["image_id"]) is int and target.pop("image_id") == index and target.keys() == slow.keys()
        for key, value in slow.items():
            assert target[key].dtype == value.dtype and torch.equal(torch.as_tensor(target[key]), value), (name, key)
        text = (penn_fudan_root / "Annotation" / name).with_suffix(".txt").read_text(encoding="latin-1")
        found = np.array([[int(number) for number in match] for match in line.findall(text)])
        assert found[:, 0].tolist() == ids[name]
        difference = np.abs(found[:, 1:] - [1, 1, 0, 0] - target["boxes"].numpy())
        assert difference.max() <= 6
        people, agree = people + count, agree + (difference == 0).sum(axis=0)
    assert (len(dataset), people, agree.tolist()) == (170, 423, [418, 422, 412, 423])
    text = (penn_fudan_root / "added-object-list.txt").read_text(encoding="latin-1")  # after the paper, which has 345
    added = {tuple(line.split()) for line in text.splitlines() if line.strip() and not line.startswith("#")}
    assert len(added) == 78 and all(int(number) in ids[name] for name, number in added)
    assert penn_fudan._is_penn_fudan(penn_fudan_root)
    if penn_fudan_root.name == "PennFudanPed":
        assert download_penn_fudan(penn_fudan_root.parent) == penn_fudan_root and no_network == []


# The dataset


@pytest.mark.parametrize("second", [2, 200])  # ids may have gaps
def test_toy_samples_by_hand(toy_root, second):
    mask = np.where(TOY_MASKS["a"] == 2, second, TOY_MASKS["a"]).astype(np.uint8)
    Image.fromarray(mask).save(toy_root / "PedMasks" / "a_mask.png")
    dataset = PennFudanDataset(str(toy_root))
    assert dataset.file_names == ["a.png", "b.png"] and len(list(dataset)) == 2
    image, target = dataset[torch.tensor(-2)]
    assert isinstance(image, tv_tensors.Image) and image.shape == (3, 10, 12) and image.dtype == torch.uint8
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and isinstance(target["masks"], tv_tensors.Mask)
    assert target["boxes"].format == tv_tensors.BoundingBoxFormat.XYXY and target["boxes"].canvas_size == (10, 12)
    assert target["boxes"].tolist() == [[1, 2, 4, 7], [11, 0, 12, 1]] and target["area"].tolist() == [15, 1]
    assert target["masks"].tolist() == [(mask == 1).tolist(), (mask == second).tolist()]
    assert dataset[1][0].shape == (3, 10, 12) and dataset[1][1]["boxes"].tolist() == [[3, 5, 12, 10]]
    assert dataset[1][1]["image_id"] == dataset.get_target(-1)["image_id"] == 1
    assert dataset.get_height_and_width(0) == (10, 12)
    (toy_root / "PNGImages" / "a.png").write_bytes(b"no image")
    Image.fromarray(0 * mask).save(toy_root / "PedMasks" / "a_mask.png")
    shapes = {key: tuple(v.shape) for key, v in dataset.get_target(0).items() if key != "image_id"}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "masks": (0, 10, 12), "area": (0,), "iscrowd": (0,)}
    for index, error, message in ((0, ValueError, r"a\.png cannot be read"), (2, IndexError, None)):
        with pytest.raises(error, match=message):
            dataset[index]


def test_in_memory_decodes_once_and_gives_the_same_to_the_transforms(toy_root, monkeypatch):
    expected_image, expected_target = PennFudanDataset(toy_root)[1]
    dataset = PennFudanDataset(toy_root, in_memory=True)
    first = dataset[1]
    first[0].zero_(), first[1]["masks"].zero_()  # what is kept is not what was given
    monkeypatch.setattr(PennFudanDataset, "_decode", lambda *args: pytest.fail("decoded again"))
    image, target = dataset[1]
    assert dataset._samples[1][0].is_contiguous()  # slower to work with otherwise
    assert target.keys() == expected_target.keys() and target.pop("image_id") == expected_target["image_id"]
    for key, value in [("image", image), *target.items()]:
        expected = expected_image if key == "image" else expected_target[key]
        assert type(value) is type(expected) and torch.equal(value, expected)
    assert target["boxes"].canvas_size == expected_target["boxes"].canvas_size
    dataset.transforms = lambda image, target: (image.dtype, target["image_id"])
    assert dataset[1] == (torch.uint8, 1)


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_masks_of_other_depths(toy_root, bits):
    ids = TOY_MASKS["a"].astype(np.uint16) * (257, 1, 30_000)[bits // 8]
    mask = Image.fromarray(ids > 0) if bits == 1 else Image.fromarray(ids.astype((np.uint8, np.uint16)[bits // 16]))
    mask.save(toy_root / "PedMasks" / "a_mask.png")
    masks = PennFudanDataset(toy_root)[0][1]["masks"]
    expected = [ids > 0] if bits == 1 else [TOY_MASKS["a"] == 1, TOY_MASKS["a"] == 2]
    assert masks.dtype == torch.uint8 and np.array_equal(masks, np.stack(expected))


@pytest.mark.parametrize("missing", [".", "PNGImages", "PedMasks", "PNGImages/*", "PedMasks/b*"])
def test_what_is_missing_is_named(toy_root, missing):
    for path in [toy_root] if missing == "." else list(toy_root.glob(missing)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    named = path.parent if missing == "PNGImages/*" else path
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(named))):
        PennFudanDataset(toy_root)


BAD_MASKS = {
    "narrow": (Image.fromarray(TOY_MASKS["a"][:, :9]), r"12 x 10 .*, but its mask .*a_mask\.png is 9 x 10"),
    "colour": (Image.fromarray(TOY_MASKS["a"]).convert("RGB"), r"a_mask\.png has 3 channel"),
    "soft colour": (Image.fromarray(TOY_MASKS["a"]).convert("RGBA"), r"a_mask\.png has 4 channel"),
    "a person or not": (
        Image.fromarray((TOY_MASKS["a"] > 0) * np.uint8(255)),
        r"a_mask\.png has only 0 and 255: from_",
    ),
    "inverted": (Image.fromarray((TOY_MASKS["a"] == 0) * np.uint8(255)), r"a_mask\.png has only 0 and 255: from_masks"),
    "no image": (None, r"a_mask\.png cannot be read as an image"),
}


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_bad_masks_are_named(toy_root, mask, message):
    path, dataset = toy_root / "PedMasks" / "a_mask.png", PennFudanDataset(toy_root)
    mask.save(path) if mask else path.write_bytes(b"<html>sign in</html>")
    for read in (dataset.__getitem__, *([] if mask else [dataset.get_target, dataset.get_height_and_width])):
        with pytest.raises(ValueError, match=message):
            read(0)


# The download


def make_archive(folder: Path, top: str = "PennFudanPed", **extra: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in sorted(folder.rglob("*.png")):
            zipped.write(path, f"{top}/{path.relative_to(folder).as_posix()}")
        for name, body in extra.items():
            zipped.writestr(name, body)
    return buffer.getvalue()


@pytest.fixture
def archive(toy_root, monkeypatch) -> bytes:
    """A good archive: the toy stands for PennFudan."""
    digest = hashlib.sha256()
    for path in [*sorted(toy_root.glob("PNGImages/*")), *sorted(toy_root.glob("PedMasks/*"))]:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    monkeypatch.setattr(penn_fudan, "DIGEST", digest.hexdigest())
    return make_archive(toy_root, **{"PennFudanPed/readme.txt": b"terms"})


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_it_fails(root: Path, url: str, message: str, error: type[Exception] = RuntimeError) -> None:
    with pytest.raises(error, match=message):
        download_penn_fudan(root, url)
    assert list(root.iterdir()) == []  # nothing is left behind


def test_download_of_a_good_archive_is_not_repeated(archive, toy_root, tmp_path, local_server):
    url = local_server.serve("/moved.zip", b"", status=302, Location=local_server.serve("/good.zip", archive))
    root = tmp_path / "new" / "data"
    assert download_penn_fudan(str(root), url) == root / "PennFudanPed"
    assert files_in(root / "PennFudanPed") == {**files_in(toy_root), "readme.txt": b"terms"}
    assert [path.name for path in root.iterdir()] == ["PennFudanPed"]
    assert local_server.requests[-1] == "/good.zip"
    local_server.requests.clear()
    assert download_penn_fudan(root, url) == root / "PennFudanPed"
    for changed in ("readme.txt", "PNGImages/c.png", "PedMasks/a_mask.png"):  # of which only the first may be
        (root / "PennFudanPed" / changed).write_bytes(b"mine")
        before = files_in(root)
        with contextlib.nullcontext() if "readme" in changed else pytest.raises(RuntimeError, match="move it away"):
            download_penn_fudan(root, url)
        assert files_in(root) == before and local_server.requests == []


def damaged(archive: bytes) -> bytes:
    """The archive with the packed bytes of its first file changed; its directory is whole."""
    start = 30 + archive[26] + 256 * archive[27]
    return archive[:start] + bytes(byte ^ 0xFF for byte in archive[start : start + 40]) + archive[start + 40 :]


def zeros_in(toy: Path) -> bytes:
    return make_archive(toy, **{"PennFudanPed/zeros": bytes(6000)})


def page(body: bytes, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Length": str(len(body)), **headers}, body


BAD_ANSWERS = {  # made from the good archive and its folder
    "a proxy's page": (lambda good, toy: page(b"<!DOCTYPE html><p>Sign in"), " gave .*25 bytes .*DOCTYPE.*proxy"),
    "damaged": (lambda good, toy: page(damaged(good)), " gave no whole zip file"),
    "second half": (lambda good, toy: page(good[len(good) // 2 :]), "no whole zip file"),
    "outside": (lambda good, toy: page(make_archive(toy, "PennFudanPed/../../..")), "does not hold"),
    "more": (lambda good, toy: page(make_archive(toy, **{"PennFudanPed/PNGImages/c.png": b""})), "does not hold"),
    "cut": (lambda good, toy: (200, {"Content-Length": "999"}, good[:400]), " 400 bytes|IncompleteRead"),
    "cut chunk": (lambda good, toy: (200, {"Transfer-Encoding": "chunked"}, b"999\r\n" + good), "IncompleteRead"),
    "stalls": (
        lambda good, toy: (200, {"Content-Length": "999", "Stall": ""}, good[:400]),
        "no whole zip file.*timed out",
    ),
    "announced": (lambda good, toy: page(bytes(6000)), " gives 6,000 bytes, over 5,000"),
    "not announced": (lambda good, toy: (200, {}, bytes(6000)), " gives 6,000 bytes, over 5,000"),
    "large inside": (lambda good, toy: page(make_archive(toy, x=bytes(6000))), " gives [67],... bytes, over 5,000"),
}


@pytest.mark.parametrize(("make", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_bad_answer_leaves_nothing_behind(archive, toy_root, tmp_path, local_server, monkeypatch, make, message):
    monkeypatch.setattr(penn_fudan, "_TIMEOUT", 0.5)
    monkeypatch.setattr(penn_fudan, "_MAX_BYTES", 5000)
    url, before = local_server.address + "/bad.zip", files_in(tmp_path)
    local_server.pages["/bad.zip"] = make(archive, toy_root)
    assert_it_fails(tmp_path / "data", url, f"{re.escape(url)}.*({message})")
    assert files_in(tmp_path) == before
    assert download_penn_fudan(tmp_path / "data", local_server.serve("/bad.zip", archive)).is_dir()


def test_a_second_run_recovers_from_a_download_that_was_killed(archive, toy_root, tmp_path, local_server):
    root = tmp_path / "data"
    url = local_server.serve("/slow.zip", archive[:99], Content_Length=str(len(archive)), Stall="yes")
    script = "import sys; from tutorial_lib.penn_fudan import download_penn_fudan; download_penn_fudan(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", script, str(root), url], stderr=subprocess.DEVNULL)
    try:
        assert local_server.stalled.wait(60)
    finally:
        process.kill()
        process.wait(timeout=60)
    (left_over,) = root.iterdir()  # what a killed process cannot clear away
    assert left_over.name != "PennFudanPed"
    folder = download_penn_fudan(root, local_server.serve("/good.zip", archive))
    assert len(PennFudanDataset(folder)) == 2 and left_over.exists()  # it might be another run's, still going
    shutil.rmtree(folder)
    mine = [root / "PennFudanPed.old" / "mine.png", root / "PennFudanPed.zip"]  # as people name what they keep
    mine[0].parent.mkdir()
    for path in (mine[0], mine[1], mine[0].parent, left_over):
        path.exists() or path.write_bytes(b"mine")
        os.utime(path, (0, 0))
    download_penn_fudan(root, local_server.serve("/good.zip", archive))
    assert sorted(path.name for path in root.iterdir()) == ["PennFudanPed", "PennFudanPed.old", "PennFudanPed.zip"]
    assert all(path.read_bytes() == b"mine" for path in mine)


def test_two_downloads_at_once_end_well(archive, tmp_path, local_server, monkeypatch):
    """The other process's folder appears while this one downloads."""
    url, root, urlopen = local_server.serve("/good.zip", archive), tmp_path / "data", urllib.request.urlopen

    def open_while_another_downloads(*args, **options):
        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        download_penn_fudan(root, url)
        return urlopen(*args, **options)

    monkeypatch.setattr(urllib.request, "urlopen", open_while_another_downloads)
    assert len(PennFudanDataset(download_penn_fudan(root, url))) == 2
    assert [path.name for path in root.iterdir()] == ["PennFudanPed"] and len(local_server.requests) == 2


def test_address_that_is_not_https_is_refused_before_connecting(tmp_path, no_network):
    hosts = ("http://example.com", "http://127.0.0.1@example.com", "http://127.0.0.1.example.com", "ftp://127.0.0.1")
    for url in (*hosts, "file://", "PennFudanPed.zip"):
        assert_it_fails(tmp_path / "data", url + "/PennFudanPed.zip", f"{url}/Penn.* is not an https", ValueError)
    assert no_network == []
    assert_it_fails(tmp_path / "data", "https://127.0.0.1/PennFudanPed.zip", "no network in this test", OSError)


def test_redirect_to_an_address_that_is_not_https_or_to_nothing(archive, tmp_path, local_server, monkeypatch):
    """elsewhere.example is led to the local server, which would give a good archive."""
    connect, port = socket.create_connection, int(local_server.address.rsplit(":", 1)[1])
    monkeypatch.setattr(socket, "create_connection", lambda _, *args, **kw: connect(("127.0.0.1", port), *args, **kw))
    local_server.serve("/good.zip", archive)
    url = local_server.serve("/moved.zip", b"", status=302, Location="http://elsewhere.example/good.zip")
    assert_it_fails(tmp_path / "data", url, "http://elsewhere.example/good.zip", ValueError)
    assert_it_fails(tmp_path / "data", local_server.address + "/nothing.zip", "404", OSError)
