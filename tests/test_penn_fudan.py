from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from kornia_rs.io import decode_image_png_u8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision import tv_tensors

from tutorial_lib import penn_fudan
from tutorial_lib.penn_fudan import (
    AspectRatioBatchSampler,
    PennFudanDataset,
    boxes_from_masks,
    collate_fn,
    download_penn_fudan,
    read_image,
    split_dataset,
)
from tutorial_lib.transforms import get_transform


def slow_boxes(mask: np.ndarray) -> list[list[int]]:
    """Half-open boxes of the ids 1 to N, one at a time."""
    boxes = []
    for number in range(1, int(mask.max()) + 1):
        y, x = np.nonzero(mask == number)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return boxes


# The toy data set: two images of 12 x 10 pixels, with two people and one.

TOY_MASKS = {"a": np.zeros((10, 12), np.uint8), "b": np.zeros((10, 12), np.uint8)}
TOY_MASKS["a"][2:7, 1:4] = 1
TOY_MASKS["a"][0, 11] = 2  # one pixel, in a corner
TOY_MASKS["b"][5:10, 3:12] = 1


@pytest.fixture
def toy_root(tmp_path: Path) -> Path:
    root = tmp_path / "Toy"
    for folder in ("PNGImages", "PedMasks"):
        (root / folder).mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name, mask in TOY_MASKS.items():
        pixels = noise.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "PNGImages" / f"{name}.png")
        Image.fromarray(mask).save(root / "PedMasks" / f"{name}_mask.png")
    return root


def test_an_index_can_be_a_tensor_and_count_from_the_end(sample_root):
    dataset = PennFudanDataset(sample_root, in_memory=True)
    for _ in range(2):
        samples = [dataset[index] for index in torch.arange(len(dataset))]
    assert [target["image_id"] for _, target in samples] == list(range(12))
    assert len(dataset._samples) == 12
    assert dataset[-1][1]["image_id"] == dataset.get_target(-1)["image_id"] == 11
    assert all(image.is_contiguous() for image, _ in dataset._samples.values())  # slower to work with otherwise
    with pytest.raises(IndexError):
        dataset[12]


def test_in_memory_decodes_once_and_gives_the_same(sample_root, monkeypatch):
    from_disk, in_memory = PennFudanDataset(sample_root), PennFudanDataset(sample_root, in_memory=True)
    first = in_memory[1]
    first[0].zero_(), first[1]["masks"].zero_()  # what is kept is not what was given
    monkeypatch.setattr(penn_fudan, "read_image", lambda *args: pytest.fail("decoded again"))
    image, target = in_memory[1]
    monkeypatch.undo()
    expected_image, expected_target = from_disk[1]
    assert torch.equal(image, expected_image) and type(image) is type(expected_image)
    assert target.keys() == expected_target.keys()
    for key, value in expected_target.items():
        assert type(target[key]) is type(value)
        assert torch.equal(target[key], value) if torch.is_tensor(value) else target[key] == value
    assert target["boxes"].canvas_size == expected_target["boxes"].canvas_size
    train = PennFudanDataset(sample_root, get_transform(train=False), in_memory=True)
    assert train[0][0].dtype == train[0][0].dtype == torch.float32


# The real photographs


@pytest.fixture(scope="module")
def real_people(penn_fudan_root: Path) -> list[dict]:
    """One pass over all the masks: what the data set gives for each image, and what a slow way gives."""
    dataset, images = PennFudanDataset(penn_fudan_root), []
    for index, name in enumerate(dataset.file_names):
        target = dataset.get_target(index)
        with Image.open(penn_fudan_root / "PedMasks" / name.replace(".png", "_mask.png")) as image:
            mask = np.asarray(image)
        masks = target["masks"].numpy()
        fields = {key: (value.dtype, tuple(value.shape)) for key, value in target.items() if torch.is_tensor(value)}
        images.append(
            {
                "name": name,
                "index": index,
                "image_id": target["image_id"],
                "fields": fields,
                "size": mask.shape,
                "ids": sorted(set(np.unique(mask).tolist()) - {0}),
                "boxes": target["boxes"].tolist(),
                "slow_boxes": slow_boxes(mask),
                "area": target["area"].tolist(),
                "slow_area": np.bincount(mask.ravel())[1:].tolist(),
                "masks_alike": bool((masks == (mask == np.arange(1, len(masks) + 1)[:, None, None])).all()),
                "labels": set(target["labels"].tolist()),
                "iscrowd": set(target["iscrowd"].tolist()),
            }
        )
    return images


def test_real_data_set_holds_170_images_and_423_people(real_people):
    assert len(real_people) == 170
    assert sum(len(image["boxes"]) for image in real_people) == 423
    assert [image["name"] for image in real_people] == sorted(image["name"] for image in real_people)
    assert all(image["ids"] == list(range(1, len(image["ids"]) + 1)) for image in real_people)


def test_real_boxes_areas_and_masks_equal_those_of_a_slow_way(real_people):
    for image in real_people:
        assert image["boxes"] == image["slow_boxes"], image["name"]
        assert image["area"] == image["slow_area"], image["name"]
        assert image["masks_alike"], image["name"]


def test_real_targets_have_the_documented_fields(real_people):
    for image in real_people:
        count = len(image["ids"])
        assert image["fields"] == {
            "boxes": (torch.float32, (count, 4)),
            "labels": (torch.int64, (count,)),
            "masks": (torch.uint8, (count, *image["size"])),
            "area": (torch.float32, (count,)),
            "iscrowd": (torch.int64, (count,)),
        }
        assert type(image["image_id"]) is int and image["image_id"] == image["index"]
        assert image["labels"] == {1} and image["iscrowd"] == {0}


def test_real_boxes_agree_with_the_annotation_files(real_people, penn_fudan_root):
    """Their corners are 1-based and inclusive. The few that differ are slips of the annotation."""
    box = re.compile(r"Bounding box for object (\d+) .*: \((\d+), (\d+)\) - \((\d+), (\d+)\)")
    agree, farthest = np.zeros(4, int), 0
    for image in real_people:
        path = (penn_fudan_root / "Annotation" / image["name"]).with_suffix(".txt")
        found = [[int(n) for n in match] for match in box.findall(path.read_text(encoding="latin-1"))]
        assert [number for number, *_ in found] == image["ids"], path.name
        theirs = np.array([[xmin - 1, ymin - 1, xmax, ymax] for _, xmin, ymin, xmax, ymax in found])
        difference = np.abs(theirs - np.array(image["boxes"]))
        agree += (difference == 0).sum(axis=0)
        farthest = max(farthest, difference.max())
    assert agree.tolist() == [418, 422, 412, 423]
    assert farthest == 6


def test_78_of_the_423_people_were_labelled_after_the_paper(real_people, penn_fudan_root):
    text = (penn_fudan_root / "added-object-list.txt").read_text(encoding="latin-1")
    added = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    ids = {image["name"]: image["ids"] for image in real_people}
    assert len(added) == 78 and len(set(map(tuple, added))) == 78
    assert all(int(number) in ids[name] for name, number in added)
    assert sum(map(len, ids.values())) - len(added) == 345


def test_real_samples_are_decoded_as_pillow_decodes_them(penn_fudan_root):
    dataset = PennFudanDataset(penn_fudan_root)
    assert len(dataset) == 170
    for index in (0, 84, 169):
        image, target = dataset[index]
        with Image.open(penn_fudan_root / "PNGImages" / dataset.file_names[index]) as expected:
            assert (image.permute(1, 2, 0).numpy() == np.asarray(expected)).all()
        assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
        assert image.shape[-2:] == target["masks"].shape[-2:] == target["boxes"].canvas_size


def test_real_folder_is_recognised_and_not_downloaded_again(penn_fudan_root, no_network):
    assert penn_fudan._is_penn_fudan(penn_fudan_root)
    if penn_fudan_root.name == "PennFudanPed":
        assert download_penn_fudan(penn_fudan_root.parent) == penn_fudan_root
    assert no_network == []


# boxes_from_masks


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_boxes_from_masks_by_hand(dtype):
    masks = torch.zeros(4, 5, 7, dtype=dtype)
    masks[0, 2, 3] = 1  # one pixel
    masks[1] = 1  # the whole image
    masks[2, 1:4, 2:7] = 1
    masks[3, 0, 6] = masks[3, 4, 0] = 1  # two pixels, in opposite corners
    boxes = boxes_from_masks(masks)
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [[3, 2, 4, 3], [0, 0, 7, 5], [2, 1, 7, 4], [0, 0, 7, 5]]


def test_boxes_from_masks_of_no_masks():
    boxes = boxes_from_masks(torch.zeros(0, 5, 7, dtype=torch.uint8))
    assert boxes.shape == (0, 4) and boxes.dtype == torch.float32


# The data set


def test_toy_samples_by_hand(toy_root):
    dataset = PennFudanDataset(str(toy_root))
    assert len(dataset) == 2 and dataset.file_names == ["a.png", "b.png"]
    image, target = dataset[0]
    assert isinstance(image, tv_tensors.Image) and image.shape == (3, 10, 12) and image.dtype == torch.uint8
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and isinstance(target["masks"], tv_tensors.Mask)
    assert target["boxes"].format == tv_tensors.BoundingBoxFormat.XYXY
    assert target["boxes"].tolist() == [[1, 2, 4, 7], [11, 0, 12, 1]]
    assert target["area"].tolist() == [15, 1]
    assert target["masks"].tolist() == [(TOY_MASKS["a"] == 1).tolist(), (TOY_MASKS["a"] == 2).tolist()]
    assert dataset[1][1]["boxes"].tolist() == [[3, 5, 12, 10]] and dataset[1][1]["image_id"] == 1


def test_iterating_ends(toy_root):
    assert len(list(PennFudanDataset(toy_root))) == 2


def test_ids_may_have_gaps(toy_root):
    mask = np.where(TOY_MASKS["a"] == 2, 200, TOY_MASKS["a"]).astype(np.uint8)
    Image.fromarray(mask).save(toy_root / "PedMasks" / "a_mask.png")
    assert PennFudanDataset(toy_root).get_target(0)["boxes"].tolist() == [[1, 2, 4, 7], [11, 0, 12, 1]]


def test_an_image_without_people_has_an_empty_target(toy_root):
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(toy_root / "PedMasks" / "a_mask.png")
    target = PennFudanDataset(toy_root)[0][1]
    shapes = {key: tuple(value.shape) for key, value in target.items() if key != "image_id"}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "masks": (0, 10, 12), "area": (0,), "iscrowd": (0,)}


def test_transforms_get_image_and_target_and_their_answer_is_the_sample(toy_root):
    seen = []

    def transforms(image, target):
        seen.append((image, target))
        return "image", "target"

    assert PennFudanDataset(toy_root, transforms)[1] == ("image", "target")
    ((image, target),) = seen
    assert image.dtype == torch.uint8 and target["image_id"] == 1


def test_get_target_does_not_decode_the_image(toy_root):
    (toy_root / "PNGImages" / "a.png").write_bytes(b"no image")
    dataset = PennFudanDataset(toy_root)
    assert len(dataset.get_target(0)["boxes"]) == 2
    with pytest.raises(ValueError, match="a.png"):
        dataset[0]


# Bad input


@pytest.mark.parametrize("missing", [".", "PNGImages", "PedMasks"])
def test_missing_folder_is_named(toy_root, missing):
    shutil.rmtree(toy_root / missing)
    with pytest.raises(FileNotFoundError, match=re.escape(str(toy_root / missing))):
        PennFudanDataset(toy_root)


def test_folder_without_images_is_named(toy_root):
    for path in (toy_root / "PNGImages").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=re.escape(str(toy_root / "PNGImages"))):
        PennFudanDataset(toy_root)


def test_image_without_its_mask_is_named(toy_root):
    missing = toy_root / "PedMasks" / "b_mask.png"
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
        PennFudanDataset(toy_root)


def test_mask_of_another_size_is_named_with_both_sizes(toy_root):
    Image.fromarray(TOY_MASKS["a"][:, :9]).save(toy_root / "PedMasks" / "a_mask.png")
    with pytest.raises(ValueError) as caught:
        PennFudanDataset(toy_root)[0]
    for part in (toy_root / "PNGImages" / "a.png", toy_root / "PedMasks" / "a_mask.png", "12 x 10", "9 x 10"):
        assert str(part) in str(caught.value)


def test_mask_in_colour_is_named(toy_root):
    path = toy_root / "PedMasks" / "a_mask.png"
    Image.fromarray(np.stack([TOY_MASKS["a"]] * 3, axis=2)).save(path)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*channel"):
        PennFudanDataset(toy_root)[0]


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # the camera was turned by 90 degrees
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'


@pytest.mark.parametrize("mode", [None, "RGB"])
@pytest.mark.parametrize("kept_as", ["RGB", "L", "P", "1", "RGBA", "LA", "I;16"])
def test_read_image_is_pillows_image(tmp_path, kept_as, mode):
    path = tmp_path / "picture.png"
    grey = Image.fromarray(np.asarray(PICTURE.convert("L"), np.uint16) * 200)
    (grey if kept_as == "I;16" else PICTURE.convert(kept_as)).save(path)
    with Image.open(path) as image:
        assert image.mode == kept_as
        expected = np.array(image.convert(mode) if mode else image)
    expected = expected[:, :, None] if expected.ndim == 2 else expected
    found = read_image(path, mode)
    assert found.shape == (3 if mode else expected.shape[2], 10, 12)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("how", [{"exif": EXIF}, {"pnginfo": "xmp"}], ids=["exif", "xmp"])
def test_an_image_is_turned_as_the_camera_was(tmp_path, how):
    if "pnginfo" in how:
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        how = {"pnginfo": info}
    PICTURE.save(tmp_path / "picture.png", **how)
    turned = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(read_image(tmp_path / "picture.png", "RGB").permute(1, 2, 0).numpy(), turned)


def test_plain_png_files_are_decoded_by_kornia_and_all_others_by_pillow(tmp_path, monkeypatch):
    decoded = []

    def decode(data, size, kind):
        decoded.append((size, kind))
        return decode_image_png_u8(data, size, kind)

    monkeypatch.setattr(penn_fudan, "decode_image_png_u8", decode)
    for name, image in {"a.png": PICTURE, "b.jpg": PICTURE, "c.png": PICTURE.convert("P")}.items():
        image.save(tmp_path / name)
        read_image(tmp_path / name, "RGB")
    PICTURE.convert("L").save(tmp_path / "d.png")
    read_image(tmp_path / "d.png")
    assert decoded == [((10, 12), "rgb"), ((10, 12), "mono")]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.png"))):
        read_image(tmp_path / "none.png", "RGB")


@pytest.mark.parametrize("change", range(200))
def test_a_damaged_file_is_never_another_picture(tmp_path, change):
    """A byte changed, or the end cut off: the file is refused, or the picture is what Pillow makes of it."""
    PICTURE.save(tmp_path / "picture.png")
    png = bytearray((tmp_path / "picture.png").read_bytes())
    rng = np.random.default_rng(change)
    at = int(rng.integers(len(png)))
    png[at] ^= int(rng.integers(1, 256))
    (tmp_path / "picture.png").write_bytes(png[:at] if change % 4 == 0 else png)
    try:
        with Image.open(tmp_path / "picture.png") as image:
            expected = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        with pytest.raises(ValueError, match=r"picture\.png cannot be read as an image"):
            read_image(tmp_path / "picture.png", "RGB")
    else:
        assert np.array_equal(read_image(tmp_path / "picture.png", "RGB").permute(1, 2, 0).numpy(), expected)


UNREADABLE = {"empty": lambda png: b"", "text": lambda png: b"<html>sign in</html>", "cut": lambda png: png[:60]}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE.keys())
@pytest.mark.parametrize("name", ["PNGImages/a.png", "PedMasks/a_mask.png"])
def test_unreadable_png_is_named(toy_root, name, damage):
    path = toy_root / name
    png = path.read_bytes()
    assert len(png) > 60
    path.write_bytes(damage(png))
    with pytest.raises(ValueError, match=re.escape(str(path)) + " cannot be read"):
        PennFudanDataset(toy_root)[0]


def test_png_with_damaged_pixels_is_named(toy_root):
    """In a process of its own: torchvision's PNG decoder ends the process on such a file (seen in 0.29.2)."""
    paths = [toy_root / "PNGImages" / "a.png", toy_root / "PedMasks" / "b_mask.png"]
    for path in paths:
        png = bytearray(path.read_bytes())
        png[png.index(b"IDAT") + 8] ^= 0xFF
        path.write_bytes(bytes(png))
    code = (
        "import sys\n"
        "from tutorial_lib.penn_fudan import PennFudanDataset\n"
        "for index in (0, 1):\n"
        "    try:\n"
        "        PennFudanDataset(sys.argv[1])[index]\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    command = [sys.executable, "-c", code, str(toy_root)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stderr[-300:]}"
    assert all(f"{path} cannot be read" in done.stdout for path in paths)


# split_dataset and collate_fn


def test_split_is_disjoint_and_of_the_sizes():
    parts = split_dataset(range(170), (100, 20, 50), seed=3)
    assert [len(part) for part in parts] == [100, 20, 50]
    assert sorted(index for part in parts for index in part.indices) == list(range(170))


def test_split_depends_on_the_seed_and_the_length_alone():
    first, again, other = (
        split_dataset(data, (6, 4), seed) for data, seed in ((range(20), 0), ("x" * 20, 0), (range(20), 1))
    )
    assert [part.indices for part in first] == [part.indices for part in again]
    assert [part.indices for part in first] != [part.indices for part in other]
    assert first[0].indices != sorted(first[0].indices)
    state = torch.get_rng_state()
    split_dataset(range(20), (6, 4), seed=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("sizes", [(8, 3), (11,), (5, 0), (5, -1), (-1, 5)])
def test_split_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match=r"sizes .*10"):
        split_dataset(range(10), sizes, seed=0)


def test_split_may_use_every_image_once():
    parts = split_dataset(range(10), (7, 3), seed=0)
    assert sorted(index for part in parts for index in part) == list(range(10))


def test_collate_keeps_images_of_different_sizes_apart():
    a, b = torch.zeros(3, 4, 5), torch.zeros(3, 6, 7)
    images, targets = collate_fn([(a, {"image_id": 0}), (b, {"image_id": 1})])
    assert images[0] is a and images[1] is b
    assert targets == ({"image_id": 0}, {"image_id": 1})


# download_penn_fudan


def make_archive(folder: Path, top: str = "PennFudanPed", extra: dict[str, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in sorted(folder.rglob("*.png")):
            zipped.write(path, f"{top}/{path.relative_to(folder).as_posix()}")
        for name, body in (extra or {}).items():
            zipped.writestr(name, body)
    return buffer.getvalue()


def digest_of(folder: Path) -> str:
    """As DIGEST: over the name and SHA-256 of each image and then of each mask, in order."""
    total = hashlib.sha256()
    for part in ("PNGImages", "PedMasks"):
        for name in sorted(path.name for path in (folder / part).iterdir()):
            total.update(name.encode() + hashlib.sha256((folder / part / name).read_bytes()).digest())
    return total.hexdigest()


@pytest.fixture
def archive(toy_root, monkeypatch) -> bytes:
    """A good archive: the toy data set stands for PennFudan."""
    monkeypatch.setattr(penn_fudan, "DIGEST", digest_of(toy_root))
    return make_archive(toy_root, extra={"PennFudanPed/readme.txt": b"terms"})


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_download_of_a_good_archive(archive, toy_root, tmp_path, local_server, capsys):
    root = tmp_path / "new" / "data"
    folder = download_penn_fudan(root, local_server.serve("/good.zip", archive))
    assert folder == root / "PennFudanPed"
    assert files_in(folder) == {**files_in(toy_root), "readme.txt": b"terms"}
    assert [path.name for path in root.iterdir()] == ["PennFudanPed"]
    assert len(PennFudanDataset(folder)) == 2


def test_complete_folder_is_not_downloaded_again(archive, tmp_path, local_server):
    url = local_server.serve("/good.zip", archive)
    folder = download_penn_fudan(str(tmp_path / "data"), url)
    assert download_penn_fudan(str(tmp_path / "data"), url) == folder
    assert local_server.requests == ["/good.zip"]


@pytest.mark.parametrize("change", ["a file is missing", "a file differs", "a name differs", "nothing but a note"])
def test_existing_wrong_folder_is_not_touched(archive, toy_root, tmp_path, local_server, change):
    folder = tmp_path / "data" / "PennFudanPed"
    shutil.copytree(toy_root, folder)
    if change == "a file is missing":
        (folder / "PedMasks" / "a_mask.png").unlink()
    elif change == "a file differs":
        (folder / "PNGImages" / "a.png").write_bytes(b"mine")
    elif change == "a name differs":
        (folder / "PNGImages" / "a.png").rename(folder / "PNGImages" / "aa.png")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "note.txt").write_bytes(b"mine")
    before = files_in(tmp_path / "data")
    with pytest.raises(RuntimeError, match=re.escape(str(folder))):
        download_penn_fudan(tmp_path / "data", local_server.serve("/good.zip", archive))
    assert files_in(tmp_path / "data") == before
    assert local_server.requests == []


def damaged(archive: bytes) -> bytes:
    """The archive with the packed bytes of its first file changed; its directory is whole."""
    start = 30 + archive[26] + 256 * archive[27]
    return archive[:start] + bytes(byte ^ 0xFF for byte in archive[start : start + 40]) + archive[start + 40 :]


BAD_ANSWERS = {
    "page": (lambda good, toy: b"<!DOCTYPE html><title>Sign in</title>", "no zip file.*DOCTYPE"),
    "empty": (lambda good, toy: b"", "no zip file"),
    "first half": (lambda good, toy: good[: len(good) // 2], "no zip file"),
    "second half": (lambda good, toy: good[len(good) // 2 :], "damaged|no zip file"),
    "damaged": (lambda good, toy: damaged(good), "damaged"),
    "evil": (lambda good, toy: make_archive(toy, extra={"../evil.txt": b"x"}), r"outside.*\.\./evil\.txt"),
    "evil deep": (lambda good, toy: make_archive(toy, extra={"PennFudanPed/../../evil.txt": b"x"}), "outside"),
    "evil root": (lambda good, toy: make_archive(toy, extra={"/evil.txt": b"x"}), "outside"),
    "other files": (lambda good, toy: make_archive(toy / "PedMasks"), "does not hold"),
    "other folder": (lambda good, toy: make_archive(toy, top="Other"), "does not hold"),
    "one too many": (
        lambda good, toy: make_archive(toy, extra={"PennFudanPed/PNGImages/c.png": b"x"}),
        "does not hold",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_bad_archive_leaves_nothing_behind_and_can_be_tried_again(
    archive, toy_root, tmp_path, local_server, make, message
):
    root = tmp_path / "home" / "data"
    url = local_server.serve("/bad.zip", make(archive, toy_root))
    with pytest.raises(RuntimeError, match=f"(?s){re.escape(url)}.*({message})"):
        download_penn_fudan(root, url)
    assert list(root.iterdir()) == []
    assert not list(tmp_path.rglob("evil.txt"))
    folder = download_penn_fudan(root, local_server.serve("/bad.zip", archive))
    assert len(PennFudanDataset(folder)) == 2


def test_download_cut_short_tells_how_much_came(archive, tmp_path, local_server):
    size = len(archive)
    url = local_server.serve("/cut.zip", archive[: size // 2], Content_Length=str(size))
    with pytest.raises(RuntimeError, match=f"{re.escape(url)}.*{size // 2:,} of {size:,}"):
        download_penn_fudan(tmp_path / "data", url)
    assert list((tmp_path / "data").iterdir()) == []
    assert download_penn_fudan(tmp_path / "data", local_server.serve("/cut.zip", archive)).is_dir()


def test_download_that_stalls_ends_and_says_so(archive, tmp_path, local_server, monkeypatch):
    monkeypatch.setattr(penn_fudan, "_TIMEOUT", 0.3)
    size = str(len(archive))
    url = local_server.serve("/stall.zip", archive[: len(archive) // 2], Content_Length=size, Stall="yes")
    with pytest.raises(RuntimeError, match=f"{re.escape(url)}: the download stopped .*timed out"):
        download_penn_fudan(tmp_path / "data", url)
    assert list((tmp_path / "data").iterdir()) == []


def test_download_that_does_not_end_is_stopped(archive, tmp_path, local_server, monkeypatch):
    monkeypatch.setattr(penn_fudan, "_MAX_BYTES", 1000)
    url = local_server.serve("/endless.zip", bytes(5000))
    with pytest.raises(RuntimeError, match=f"{re.escape(url)} sends over 1,000 bytes"):
        download_penn_fudan(tmp_path / "data", url)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_second_run_recovers_from_a_download_that_was_killed(archive, toy_root, tmp_path, local_server, share):
    """SIGKILL in the middle, when this much has come."""
    root, come = tmp_path / "data", archive[: int(share * len(archive))]
    url = local_server.serve("/slow.zip", come, Content_Length=str(len(archive)), Stall="yes")
    script = "import sys; from tutorial_lib.penn_fudan import download_penn_fudan; download_penn_fudan(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", script, str(root), url], stdout=subprocess.DEVNULL)
    assert local_server.stalled.wait(60)
    process.kill()
    process.wait()
    assert not (root / "PennFudanPed").exists()
    (left_over,) = root.iterdir()  # what a killed process cannot clear away
    folder = download_penn_fudan(root, local_server.serve("/good.zip", archive))
    assert len(PennFudanDataset(folder)) == 2 and left_over.exists()  # it might be another run's, still going
    os.utime(left_over, (0, 0))
    shutil.rmtree(folder)
    download_penn_fudan(root, local_server.serve("/good.zip", archive))
    assert [path.name for path in root.iterdir()] == ["PennFudanPed"]


def test_what_was_moved_away_is_not_cleared_away(archive, tmp_path, local_server):
    """As the message of a folder that is not PennFudan asks for, and as people name what they keep."""
    mine = tmp_path / "PennFudanPed.old" / "PNGImages" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    zipped = tmp_path / "PennFudanPed.zip"
    zipped.write_bytes(b"zip")
    for path in (mine.parent.parent, zipped):
        os.utime(path, (0, 0))
    download_penn_fudan(tmp_path, local_server.serve("/good.zip", archive))
    assert mine.read_bytes() == b"mine" and zipped.read_bytes() == b"zip"


def test_two_downloads_at_once_end_well(archive, tmp_path, local_server, monkeypatch):
    """The other process's folder appears while this one unpacks."""
    url = local_server.serve("/good.zip", archive)
    fetch = penn_fudan._fetch

    def fetch_while_another_does(*args):
        monkeypatch.setattr(penn_fudan, "_fetch", fetch)
        download_penn_fudan(tmp_path / "data", url)
        fetch(*args)

    monkeypatch.setattr(penn_fudan, "_fetch", fetch_while_another_does)
    assert len(PennFudanDataset(download_penn_fudan(tmp_path / "data", url))) == 2
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["PennFudanPed"]


@pytest.mark.parametrize("mode", ["1", "I;16"])
def test_mask_of_other_than_8_bits_is_named(toy_root, mode):
    path = sorted((toy_root / "PedMasks").iterdir())[0]
    Image.open(path).convert("L").point(bool).convert("1" if mode == "1" else "I").convert(mode).save(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*8 bits"):
        PennFudanDataset(toy_root).get_target(0)


def test_download_in_chunks_cut_short(archive, tmp_path, local_server):
    """Without a length, in HTTP's chunks, of which the last never comes."""
    url = local_server.serve("/cut.zip", b"")
    chunk = b"%x\r\n" % len(archive) + archive[: len(archive) // 2]
    local_server.pages["/cut.zip"] = (200, {"Transfer-Encoding": "chunked"}, chunk)
    with pytest.raises((RuntimeError, OSError)):
        download_penn_fudan(tmp_path / "data", url)
    assert list((tmp_path / "data").iterdir()) == []


def test_download_without_a_length(archive, tmp_path, local_server):
    url = local_server.serve("/good.zip", archive)
    local_server.pages["/good.zip"] = (200, {}, archive)
    assert download_penn_fudan(tmp_path / "data", url).is_dir()


def test_page_not_found_is_an_oserror(tmp_path, local_server):
    with pytest.raises(OSError, match="404"):
        download_penn_fudan(tmp_path / "data", local_server.address + "/nothing.zip")
    assert list((tmp_path / "data").iterdir()) == []


def test_address_that_is_refused_is_an_oserror(tmp_path, refused_address):
    with pytest.raises(OSError):
        download_penn_fudan(tmp_path / "data", refused_address + "/PennFudanPed.zip")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/PennFudanPed.zip",
        "http://127.0.0.1@example.com/PennFudanPed.zip",
        "http://127.0.0.1.example.com/PennFudanPed.zip",
        "ftp://127.0.0.1/PennFudanPed.zip",
        "file:///PennFudanPed.zip",
        "PennFudanPed.zip",
    ],
)
def test_address_that_is_not_https_is_refused_before_connecting(tmp_path, no_network, url):
    with pytest.raises(ValueError, match=re.escape(url)):
        download_penn_fudan(tmp_path / "data", url)
    assert no_network == []
    assert list((tmp_path / "data").iterdir()) == []


def test_redirect_to_another_address_of_this_machine_is_followed(archive, tmp_path, local_server):
    good = local_server.serve("/good.zip", archive)
    url = local_server.serve("/moved.zip", b"", status=302, Location=good)
    assert download_penn_fudan(tmp_path / "data", url).is_dir()
    assert local_server.requests == ["/moved.zip", "/good.zip"]


def test_redirect_to_an_address_that_is_not_https_is_refused(archive, tmp_path, local_server, monkeypatch):
    """elsewhere.example is led to the local server, which would give a good archive."""
    connect, port = socket.create_connection, int(local_server.address.rsplit(":", 1)[1])
    monkeypatch.setattr(socket, "create_connection", lambda _, *args, **kw: connect(("127.0.0.1", port), *args, **kw))
    local_server.serve("/good.zip", archive)
    url = local_server.serve("/moved.zip", b"", status=302, Location="http://elsewhere.example/good.zip")
    with pytest.raises(ValueError, match="http://elsewhere.example/good.zip"):
        download_penn_fudan(tmp_path / "data", url)
    assert list((tmp_path / "data").iterdir()) == []


def test_the_published_address_is_https():
    assert penn_fudan.URL.startswith("https://www.cis.upenn.edu/")
    assert penn_fudan.NUM_IMAGES == 170


# Batches of similar shapes

RATIOS = [0.7, 2.0, 1.0, 1.5, 0.9, 1.2, 1.9, 0.8, 1.1, 1.4, 1.3, 1.6, 1.7]


def test_an_epoch_of_batches_has_every_image_once_but_for_what_is_left_over():
    batches = AspectRatioBatchSampler(RATIOS, 4, generator=torch.Generator().manual_seed(0))
    epochs = [list(batches) for _ in range(20)]
    for epoch in epochs:
        assert len(epoch) == len(batches) == 3
        assert all(len(batch) == 4 for batch in epoch)
        assert len({index for batch in epoch for index in batch}) == 12
    assert {index for epoch in epochs for batch in epoch for index in batch} == set(range(13))  # each is trained on


@pytest.mark.parametrize("num_windows", [1, 5, 1000])
def test_other_images_meet_in_the_next_epoch(num_windows):
    ratios = torch.rand(103, generator=torch.Generator().manual_seed(0)).tolist()
    batches = AspectRatioBatchSampler(ratios, 4, num_windows, generator=torch.Generator().manual_seed(0))
    first, second = ({tuple(sorted(batch)) for batch in batches} for _ in range(2))
    assert len(first & second) < 13


def spread_in_batches(num_images: int, **options) -> float:
    """Of ratios drawn from [0, 1]: the largest less the smallest of a batch of 4, on average."""
    ratios = torch.rand(num_images, generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(AspectRatioBatchSampler(ratios, 4, **options, generator=torch.Generator().manual_seed(0)))
    return sum(max(ratios[i] for i in batch) - min(ratios[i] for i in batch) for batch in batches) / len(batches)


def test_images_of_a_batch_have_similar_shapes():
    assert 0.5 < spread_in_batches(200, num_windows=50) < 0.7  # 0.6 is expected of four numbers
    assert spread_in_batches(200, num_windows=1000) == spread_in_batches(200, num_windows=50)
    assert 0.03 < spread_in_batches(200, num_windows=5) < 0.15
    assert spread_in_batches(200) == spread_in_batches(200, num_windows=5)
    assert spread_in_batches(200, num_windows=1) < 0.03


@pytest.mark.parametrize(("sizes", "num_windows"), [((2, 2, 2, 2, 1), 5), ((3, 3, 3, 3, 2), 5), ((1, 1, 1), 5)])
def test_windows_are_as_many_as_asked_for_if_there_are_batches(sizes, num_windows):
    ratios = list(range(1, 4 * sum(sizes) + 1))
    drawn = AspectRatioBatchSampler(ratios, 4, num_windows, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(len(ratios), generator=torch.Generator().manual_seed(0)).tolist()
    expected = []
    for size in sizes:
        window, order = sorted(order[: 4 * size]), order[4 * size :]
        expected += [window[start : start + 4] for start in range(0, 4 * size, 4)]
    assert sorted(drawn) == sorted(expected)


def test_the_order_of_batches_is_shuffled_after_sorting():
    ratios = [float(k + 1) for k in range(40)]
    batches = AspectRatioBatchSampler(ratios, 4, 1, generator=torch.Generator().manual_seed(0))
    smallest = [min(batch) for batch in batches]
    assert sorted(smallest) == list(range(0, 40, 4)) and smallest != sorted(smallest)


def test_torchs_own_generator_decides_the_order_where_none_is_given():
    batches = AspectRatioBatchSampler(RATIOS, 4)
    torch.manual_seed(0)
    first = list(batches)
    assert list(batches) != first
    torch.manual_seed(0)
    assert list(batches) == first


def test_processes_share_the_batches():
    ratios = torch.rand(90, generator=torch.Generator().manual_seed(0)).tolist()
    parts = []
    for rank in range(3):
        torch.manual_seed(rank)  # their own, which must not matter
        generator = torch.Generator().manual_seed(0)
        parts.append(list(AspectRatioBatchSampler(ratios, 2, num_replicas=3, rank=rank, generator=generator)))
    whole = list(AspectRatioBatchSampler(ratios, 6, generator=torch.Generator().manual_seed(0)))
    assert len(whole) == 15
    assert [sorted(a + b + c) for a, b, c in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]
    first = [ratios[min(part[0], key=ratios.__getitem__)] for part in parts]
    assert max(first) < sorted(ratios[index] for index in whole[0])[3]  # no process has the widest of a batch alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"aspect_ratios": [1.0] * 3}, "3 images are too few for 1 process"),
        ({"num_replicas": 4, "generator": torch.Generator()}, "too few for 4 process"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"aspect_ratios": [(10, 12)] * 20}, "one finite number over 0"),
        ({"aspect_ratios": [1.0] * 20 + [float("nan")]}, "one finite number over 0"),
        ({"aspect_ratios": [1.0] * 20 + [0.0]}, "one finite number over 0"),
        ({"num_windows": 0}, "num_windows 0"),
        ({"num_replicas": 2, "rank": 2, "generator": torch.Generator()}, "rank 2"),
        ({"num_replicas": 2}, "a generator each, of the same seed"),
    ],
)
def test_batches_that_cannot_be_drawn(arguments, message):
    with pytest.raises(ValueError, match=message):
        AspectRatioBatchSampler(**{"aspect_ratios": RATIOS, "batch_size": 4, **arguments})


def test_a_batch_size_that_is_no_whole_number_is_refused():
    with pytest.raises(TypeError, match="float"):
        AspectRatioBatchSampler(RATIOS, 2.5)


def test_height_and_width_are_those_of_the_image(toy_root, sample_root):
    assert PennFudanDataset(toy_root).get_height_and_width(0) == (10, 12)
    dataset = PennFudanDataset(sample_root)
    for index in range(4):
        assert dataset.get_height_and_width(index) == tuple(dataset[index][0].shape[-2:])
    (toy_root / "PedMasks" / "a_mask.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a_mask\.png cannot be read as an image"):
        PennFudanDataset(toy_root).get_height_and_width(0)
