"""Boxes from masks, images from files, the split and the batches."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tutorial_lib.data import (
    AspectRatioBatchSampler,
    DetectionDataset,
    boxes_from_masks,
    collate_fn,
    read_image,
    split_dataset,
)

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_boxes_from_masks_by_hand(dtype):
    masks = torch.zeros(4, 5, 7, dtype=dtype)
    masks[0, 2, 3] = 1  # one pixel
    masks[1] = 1  # the whole image
    masks[2, 1:4, 2:7] = 1
    masks[3, 0, 6] = masks[3, 4, 0] = 1  # two pixels, in opposite corners
    assert boxes_from_masks(masks).tolist() == [[3, 2, 4, 3], [0, 0, 7, 5], [2, 1, 7, 4], [0, 0, 7, 5]]
    for boxes in (boxes_from_masks(masks), boxes_from_masks(masks[:0])):
        assert boxes.dtype == torch.float32 and boxes.shape[1:] == (4,)


# Images from files


@pytest.mark.parametrize("kept_as", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK"])
def test_read_image_is_pillows_image(tmp_path, kept_as):
    path = tmp_path / ("picture.tif" if kept_as == "CMYK" else "picture.png")
    PICTURE.convert(kept_as).save(path)
    for mode in (None, "RGB"):
        with Image.open(path) as image:
            assert image.mode == kept_as
            expected = np.array(image.convert(mode) if mode else image).reshape(10, 12, -1)
        assert np.array_equal(read_image(path, mode).permute(1, 2, 0), expected)


GREY = np.asarray(PICTURE.convert("L")).astype(np.int64)
DEEP = {  # values, the mode of the file, and its suffix
    "16 bits": ((GREY * 12 + 300).astype(np.uint16), "I;16", "png"),
    "16 bits, of another byte order": ((GREY * 12 + 300).astype(">u2"), "I;16B", "tif"),
    "32 bits": ((GREY * 70_000 - 9_000_000).astype(np.int32), "I", "tif"),
    "floats": ((GREY / 255 - 0.5).astype(np.float32), "F", "tif"),
    "large floats": ((GREY * 1e36).astype(np.float32), "F", "tif"),
}


@pytest.mark.parametrize(("values", "mode", "suffix"), DEEP.values(), ids=DEEP.keys())
def test_deep_pixels_are_scaled_and_never_cut_off(tmp_path, values, mode, suffix):
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(values).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    assert np.array_equal(read_image(path)[0], values)  # ids stay as they are
    expected, scaled = (GREY - GREY.min()) * 255 / np.ptp(GREY), read_image(path, "RGB")
    assert scaled.dtype == torch.uint8 and len(scaled) == 3 and abs(scaled.numpy() - expected).max() < 0.501
    if suffix == "png":  # a TIFF file's own note is followed by Pillow, or not
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(values).save(path, exif=exif)
        assert np.array_equal(read_image(path, "RGB"), scaled.rot90(-1, (1, 2)))
        assert np.array_equal(read_image(path, "RGB", turned=False), scaled)
    Image.fromarray(np.full_like(values, values[0, 0])).save(path)
    assert read_image(path, "RGB").sum() == 0


def test_colours_of_16_bits_are_read_as_8(tmp_path):
    """By Pillow, which cannot write them."""
    colours = np.random.default_rng(0).integers(0, 65536, (10, 12, 3), dtype=np.uint16)
    body = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", 12, 10, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(b)) + name + b + struct.pack(">I", zlib.crc32(name + b)) for name, b in chunks]
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    assert np.array_equal(read_image(tmp_path / "picture.png", "RGB").permute(1, 2, 0), colours >> 8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_cannot_be_scaled(tmp_path, bad):
    values = np.ones((4, 5), np.float32)
    values[1, 2] = bad
    Image.fromarray(values).save(tmp_path / "picture.tif")
    with pytest.raises(ValueError, match=r"picture\.tif .*NaN or infinity"):
        read_image(tmp_path / "picture.tif", "RGB")


def test_an_image_is_turned_as_the_camera_was(tmp_path):
    exif, xmp = Image.Exif(), PngInfo()
    exif[0x0112] = 6
    xmp.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>")
    turned = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    for note in ({"exif": exif}, {"pnginfo": xmp}):
        PICTURE.save(tmp_path / "picture.png", **note)
        assert np.array_equal(read_image(tmp_path / "picture.png", "RGB").permute(1, 2, 0), turned)


def test_a_damaged_file_is_never_another_picture(tmp_path):
    """A byte changed, or the end cut off: the file is refused, or the picture is what Pillow makes of it."""
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    whole, refused = path.read_bytes(), 0
    for seed in range(60):
        rng, png = np.random.default_rng(seed), bytearray(whole)
        at = int(rng.integers(len(png)))
        png[at] ^= int(rng.integers(1, 256))
        path.write_bytes(png[:at] if seed % 4 == 0 else png)
        try:
            with Image.open(path) as image:
                expected = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError):
            refused += 1
            with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as an image")):
                read_image(path, "RGB")
        else:
            assert np.array_equal(read_image(path, "RGB").permute(1, 2, 0), expected), seed
    assert 30 < refused < 60
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        read_image(path, "RGB")


def test_an_image_that_is_too_large_is_named(tmp_path, monkeypatch):
    PICTURE.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow refuses twice as many
    for mode in (None, "RGB"):
        with pytest.raises(ValueError, match=r"large\.png cannot be read as an image.*120 pixels"):
            read_image(tmp_path / "large.png", mode)


# Datasets


class Numbers(DetectionDataset):
    """Counts how often it decodes."""

    decoded = 0

    def _decode(self, index):
        self.decoded += 1
        return torch.full((1,), index), {"boxes": torch.zeros(1)}


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_dataset_takes_any_integer_and_keeps_copies(in_memory):
    dataset = Numbers("abc", in_memory=in_memory)
    indices = (2, -1, np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor(-1))
    for index in indices:
        image, target = dataset[index]
        assert image.item() == 2 and target["boxes"].item() == 0
        image.zero_(), target["boxes"].fill_(9)
    assert dataset.decoded == (1 if in_memory else len(indices)) and len(dataset) == 3
    dataset.transforms = lambda image, target: (image + 1, "changed")
    assert dataset[0] == (1, "changed")
    for index, error in ((3, IndexError), (-4, IndexError), (1.0, TypeError), ("a.png", TypeError)):
        with pytest.raises(error):
            dataset[index]


# Split and batches


def test_split_is_random_disjoint_and_known_by_its_seed():
    state = torch.get_rng_state()
    parts = split_dataset(range(170), (100, 20, 50), seed=3)
    assert [len(part) for part in parts] == [100, 20, 50]
    assert sorted(index for part in parts for index in part) == list(range(170))
    assert parts[0].indices != sorted(parts[0].indices)
    again, other = (split_dataset("x" * 170, (100, 20, 50), seed) for seed in (3, 4))
    assert [part.indices for part in parts] == [part.indices for part in again]
    assert [part.indices for part in parts] != [part.indices for part in other]
    assert torch.equal(state, torch.get_rng_state())
    parts = split_dataset(range(170), (100, 20, 50), seed=3, block=8)
    assert sorted(index for part in parts for index in part) == list(range(170))
    assert sum(len({index // 8 for index in part}) for part in parts) <= 22 + 2  # two of the 22 blocks may be cut
    for sizes in [(8, 3), (11,), (5, 0), (5, -1), (-1, 5)]:
        with pytest.raises(ValueError, match=r"sizes .*10"):
            split_dataset(range(10), sizes, seed=0)


def test_collate_keeps_images_of_different_sizes_apart():
    a, b = torch.zeros(3, 4, 5), torch.zeros(3, 6, 7)
    images, targets = collate_fn([(a, {"image_id": 0}), (b, {"image_id": 1})])
    assert images[0] is a and images[1] is b and targets == ({"image_id": 0}, {"image_id": 1})


RATIOS = [0.7, 2.0, 1.0, 1.5, 0.9, 1.2, 1.9, 0.8, 1.1, 1.4, 1.3, 1.6, 1.7]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_an_epoch_of_batches_has_every_image_once_but_for_what_is_left_over():
    batches, runs = AspectRatioBatchSampler(RATIOS, 4), []
    for _ in range(2):
        torch.manual_seed(0)  # torch's own generator decides the order where none is given
        runs.append([list(batches) for _ in range(20)])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]
    for epoch in runs[0]:
        assert len(batches) == 3 and [len(batch) for batch in epoch] == [4, 4, 4]
        assert len({index for batch in epoch for index in batch}) == 12
    assert {index for epoch in runs[0] for batch in epoch for index in batch} == set(range(13))  # each is trained on


@pytest.mark.parametrize(
    ("sizes", "more"),
    [((2, 2, 2, 2, 1), {}), ((3, 3, 3, 3, 2), {"num_windows": 5}), ((1, 1, 1), {}), ((9,), {"num_windows": 1})],
)
def test_images_of_a_window_are_sorted_into_batches_which_are_shuffled(sizes, more):
    ratios = list(range(1, 4 * sum(sizes) + 1))
    batches = AspectRatioBatchSampler(ratios, 4, **more, generator=seeded())
    order, expected = torch.randperm(len(ratios), generator=seeded()).tolist(), []
    for size in sizes:
        window, order = sorted(order[: 4 * size]), order[4 * size :]
        expected += [window[start : start + 4] for start in range(0, 4 * size, 4)]
    first, second = list(batches), list(batches)
    assert sorted(first) == sorted(expected) and first != expected
    assert second != first  # in the next epoch


def test_processes_share_the_batches():
    ratios, parts = torch.rand(90, generator=seeded()).tolist(), []
    for rank in range(3):
        torch.manual_seed(rank)  # their own, which must not matter
        parts.append(list(AspectRatioBatchSampler(ratios, 2, num_replicas=3, rank=rank, generator=seeded())))
    whole = list(AspectRatioBatchSampler(ratios, 6, generator=seeded()))
    assert len(whole) == 15
    assert [sorted(a + b + c) for a, b, c in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]
    narrowest = [min(ratios[index] for index in part[0]) for part in parts]
    assert max(narrowest) < sorted(ratios[index] for index in whole[0])[3]  # no process has the widest alone


def test_batches_that_cannot_be_made():
    for arguments, message in (
        ({"aspect_ratios": [1.0] * 3}, "3 images are too few for 1 process"),
        ({"num_replicas": 4, "generator": seeded()}, "too few for 4 process"),
        ({"batch_size": 0}, "start at 1"),
        ({"num_windows": 0}, "start at 1"),
        ({"aspect_ratios": [(10, 12)] * 20}, "one finite number over 0"),
        ({"aspect_ratios": [1.0] * 20 + [float("nan")]}, "one finite number over 0"),
        ({"aspect_ratios": [1.0] * 20 + [0.0]}, "one finite number over 0"),
        ({"num_replicas": 2, "rank": 2, "generator": seeded()}, "rank 2"),
        ({"num_replicas": 2}, "a generator each, of the same seed"),
    ):
        with pytest.raises(ValueError, match=message):
            AspectRatioBatchSampler(**{"aspect_ratios": RATIOS, "batch_size": 4, **arguments})
