"""Datasets that have a COCO file: what tools write, what is wrong, and pycocotools' own masks."""

import contextlib
import copy
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from tutorial_lib.checks import check_dataset
from tutorial_lib.coco import CocoDataset
from tutorial_lib.data import collate_fn
from tutorial_lib.engine import evaluate
from tutorial_lib.transforms import get_transform

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
SQUARE = [10, 5, 30, 5, 30, 25, 10, 25]  # 20 x 20 pixels


def annotation(key, image_id=7, category_id=2, **more):
    return {"id": key, "image_id": image_id, "category_id": category_id, "bbox": [10, 5, 20, 20], "iscrowd": 0, **more}


def coco(*annotations, **more):
    """Two images of 60 x 40 pixels, three classes whose ids have gaps."""
    images = [{"id": 7, "file_name": "a.png", "width": 60, "height": 40}]
    images.append({"id": 3, "file_name": "b c.JPG", "width": 60, "height": 40})
    names = {9: "dog", 2: "cat", 5: "bird"}
    categories = [{"id": key, "name": name} for key, name in names.items()]
    return {"images": images, "categories": categories, "annotations": list(annotations), **more}


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b c.JPG"):
        Image.fromarray(NOISE).save(images / name)
    return images


@pytest.fixture
def read(folder):
    """Of a dict, through a file."""

    def dataset(content, *arguments, **options):
        (folder.parent / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
        return CocoDataset(folder, folder.parent / "annotations.json", *arguments, **options)

    return dataset


def run_lengths(mask, compressed=True):
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    if compressed:
        return {"size": list(mask.shape), "counts": encoded["counts"].decode()}
    changes = np.flatnonzero(np.diff(mask.T.flatten().astype(int), prepend=0, append=2))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0).tolist()}


def test_a_sample_by_hand(read):
    hole = np.zeros((40, 60), np.uint8)
    hole[30:40, 50:60], hole[33:36, 52:54] = 1, 0
    dataset = read(
        coco(
            annotation(1, segmentation=[SQUARE], area=3),
            annotation(2, category_id=9, bbox=[50, 30, 10, 10], segmentation=run_lengths(hole)),
            annotation(4, category_id=5, bbox=[0.5, 0, 59.5, 40], iscrowd=1, segmentation=run_lengths(hole, False)),
        )
    )
    assert dataset.categories == ["__background__", "cat", "bird", "dog"] and dataset.category_ids == [-1, 2, 5, 9]
    assert (
        dataset.file_names == ["a.png", "b c.JPG"] and dataset.not_listed == [] and dataset.masks and len(dataset) == 2
    )
    assert dataset.get_height_and_width(-1) == (40, 60)
    image, target = dataset[torch.tensor(-2)]
    assert isinstance(image, tv_tensors.Image) and np.array_equal(image.permute(1, 2, 0), NOISE)
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and target["boxes"].canvas_size == (40, 60)
    assert target["boxes"].tolist() == [[10, 5, 30, 25], [50, 30, 60, 40], [0.5, 0, 60, 40]]
    assert target["labels"].tolist() == [1, 3, 2] and target["iscrowd"].tolist() == [0, 0, 1]
    assert target["area"].tolist() == [400, 94, 94] and target["masks"][1].tolist() == hole.tolist()
    assert type(target["image_id"]) is int and (target["image_id"], dataset[np.int64(1)][1]["image_id"]) == (7, 3)
    dtypes = {"boxes": torch.float32, "labels": torch.int64, "masks": torch.uint8, "area": torch.float32}
    for index, count in ((0, 3), (1, 0)):  # the second has no objects
        target = dataset[index][1]
        assert {key: target[key].dtype for key in dtypes} == dtypes and target["iscrowd"].dtype == torch.int64
        shapes = {"boxes": (count, 4), "labels": (count,), "masks": (count, 40, 60), "area": (count,)}
        assert {key: tuple(target[key].shape) for key in shapes} == shapes and target["masks"].is_contiguous()
        assert isinstance(target["masks"], tv_tensors.Mask)
    with pytest.raises(IndexError):
        dataset[2]


def test_masks_and_areas_are_pycocotools(read):
    """Polygons of several parts, fractions, corners outside the image; run lengths of both kinds."""
    rng, annotations = np.random.default_rng(0), []
    for key in range(1, 61):
        parts = [rng.uniform(-5, 65, 2 * rng.integers(3, 9)).round(2).tolist() for _ in range(rng.integers(1, 4))]
        blob = np.kron(rng.random((8, 12)) > 0.6, np.ones((5, 5)))
        kinds = (parts, run_lengths(blob), run_lengths(blob, False))
        box = [float(side) for side in rng.uniform(0, 20, 4).round(2)]
        annotations.append(annotation(key, image_id=(7, 3)[key % 2], segmentation=kinds[key % 3], bbox=box))
    dataset = read(coco(*annotations))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(dataset.root.parent / "annotations.json"))
    for index, image_id in enumerate((7, 3)):
        target, entries = dataset[index][1], truth.imgToAnns[image_id]
        expected = np.stack([truth.annToMask(entry) for entry in entries])
        assert len(entries) == 30 and np.array_equal(target["masks"], expected)
        assert target["area"].tolist() == expected.sum(axis=(1, 2)).tolist()
        corners = np.array([entry["bbox"] for entry in entries])
        assert np.allclose(target["boxes"], np.hstack([corners[:, :2], corners[:, :2] + corners[:, 2:]]))


def test_boxes_without_masks_and_masks_without_boxes(read):
    plain = read(coco(annotation(1), annotation(2, bbox=[0.25, 0, 10.5, 4], segmentation=[])))
    assert not plain.masks and plain[0][1].keys() == {"boxes", "labels", "image_id", "area", "iscrowd"}
    assert plain[0][1]["area"].tolist() == [400, 42] and plain[1][1]["boxes"].shape == (0, 4)
    no_box = annotation(1, segmentation=[SQUARE, [40, 30, 50, 30, 50, 38, 40, 38]])
    del no_box["bbox"]
    for masks in (None, False, True):
        dataset = read(coco(no_box), masks=masks)
        assert dataset[0][1]["boxes"].tolist() == [[10, 5, 50, 38]] and dataset.masks is (masks is not False)
    part = coco(annotation(1, segmentation=[SQUARE]), annotation(8), annotation(9, segmentation=[[1, 2, 3, 4]]))
    for masks in (None, True):
        with pytest.raises(ValueError, match=r"2 of 3 objects have no mask, annotations 8, 9; masks=False"):
            read(part, masks=masks)
    assert len(read(part, masks=False)[0][1]["boxes"]) == 3
    assert read(coco(), masks=True)[0][1]["masks"].shape == (0, 40, 60)


def test_crowds_can_be_left_out(read):
    content = coco(annotation(1, segmentation=[SQUARE], iscrowd=1), annotation(2, segmentation=[SQUARE]))
    assert [read(content, crowds=crowds)[0][1]["iscrowd"].tolist() for crowds in (True, False)] == [[1, 0], [0]]


def test_in_memory_and_transforms(read, folder):
    dataset = read(coco(annotation(1, segmentation=[SQUARE])), in_memory=True)
    first = dataset[0]
    first[0].zero_(), first[1]["masks"].zero_(), first[1]["boxes"].zero_()
    (folder / "a.png").unlink()
    image, target = dataset[0]
    assert np.array_equal(image.permute(1, 2, 0), NOISE) and target["masks"].sum() == 400
    dataset.transforms = lambda image, target: (image.shape, target["boxes"].tolist())
    assert dataset[0] == ((3, 40, 60), [[10, 5, 30, 25]])


# What is left out, or cut, is said


def test_what_is_left_out_is_counted_and_named(read, folder):
    (folder / "more").mkdir()
    for name in ("c.PNG", "more/d.jpeg", "notes.txt"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    bad = [[1, 1, 0, 5], [1, 1, 5, -2], [60, 0, 5, 5], [-9, 3, 9, 3], [3, 3, 1e-9, 1]]
    annotations = [annotation(10 + place, bbox=box) for place, box in enumerate(bad)]
    annotations += [annotation(30, segmentation=[[70, 1, 80, 1, 80, 9]])]  # outside: no pixels
    annotations += [annotation(31, bbox=[50, 30, 30, 30], segmentation=[SQUARE])]
    with pytest.warns(UserWarning) as found:
        dataset = read(coco(*annotations))
    texts = [str(one.message) for one in found]
    assert len(texts) == 3 and all(text.startswith(str(folder.parent / "annotations.json")) for text in texts)
    assert "6 objects have no size inside the image and are left out: annotations 10, 11, 12, 13, 14" in texts[0]
    assert "1 boxes reach over a pixel beyond the image and are cut: annotations 31" in texts[1]
    assert texts[2].endswith("2 image files in " + str(folder) + " are not listed: 'c.PNG', 'more/d.jpeg'")
    assert all(one.filename == __file__ for one in found[:1])  # read() above
    assert dataset.not_listed == ["c.PNG", "more/d.jpeg"] and dataset[0][1]["boxes"].tolist() == [[50, 30, 60, 40]]


# What tools write


def cvat():
    licenses = {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"contributor": "", "year": ""}}
    blob = np.zeros((40, 60), bool)
    blob[3:9, 4:10] = True
    attributes = {"occluded": False, "rotation": 0.0}
    rows = [annotation(1, image_id=1, category_id=1, segmentation=[SQUARE], area=400.0, attributes=attributes)]
    crowd = {"segmentation": run_lengths(blob, False), "bbox": [4.0, 3.0, 6.0, 6.0], "iscrowd": 1, "area": 36.0}
    rows.append(annotation(2, image_id=1, category_id=2, attributes=attributes, **crowd))
    more = {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
    image = {"id": 1, "width": 60, "height": 40, "file_name": "a.png", **more}
    kinds = [{"id": 1, "name": "cat", "supercategory": ""}, {"id": 2, "name": "dog", "supercategory": ""}]
    return {**licenses, "categories": kinds, "images": [image], "annotations": rows}


def label_studio(segmentation):
    image = {"width": 60, "height": 40, "id": 0, "file_name": "images\\1\\a.png"}
    row = annotation(0, image_id=0, category_id=0, segmentation=segmentation, ignore=0)
    return {
        "images": [image], "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}], "annotations": [row],
        "info": {"year": 2024, "version": "1.0", "description": "", "contributor": "Label Studio", "url": ""},
    }  # fmt: skip


def roboflow(heading):
    kinds = [{"id": 0, "name": heading, "supercategory": "none"}]
    kinds += [{"id": key, "name": name, "supercategory": heading} for key, name in ((1, "cat"), (2, "dog"))]
    image = {
        "id": 0,
        "license": 1,
        "file_name": "a.png",
        "height": 40,
        "width": 60,
        "date_captured": "2024-01-01T00:00",
    }
    row = annotation(0, image_id=0, category_id=1, area=400, segmentation=[])
    return {"info": {}, "licenses": [], "categories": kinds, "images": [image], "annotations": [row]}


def one_class():
    """No heading: the only class has the id 0."""
    return roboflow("x") | {
        "categories": [{"id": 0, "name": "cat", "supercategory": "none"}],
        "annotations": [annotation(0, image_id=0, category_id=0)],
    }


def labelme_exporter():
    """The backslash is what it writes on Windows; the class of the background has no objects."""
    image = {"license": 0, "url": None, "file_name": "JPEGImages\\a.png", "height": 40, "width": 60, "id": 0}
    kinds = [{"supercategory": None, "id": 0, "name": "_background_"}, {"supercategory": None, "id": 1, "name": "cat"}]
    row = annotation(0, image_id=0, category_id=1, segmentation=[SQUARE], area=400.0, bbox=[10.0, 5.0, 20.0, 20.0])
    return {"info": {"url": None}, "type": "instances", "images": [image], "annotations": [row], "categories": kinds}


EXPORTS = {
    "CVAT": (cvat(), ["cat", "dog"], [1, 2], True),
    "Label Studio, polygons": (label_studio([SQUARE]), ["cat", "dog"], [1], True),
    "Label Studio, boxes": (label_studio([]), ["cat", "dog"], [1], False),
    "Roboflow": (roboflow("animals"), ["cat", "dog"], [1], False),
    "Roboflow, the older kind": (one_class(), ["cat"], [1], False),
    "Roboflow, a project with a class's name": (roboflow("cat"), ["cat", "dog"], [1], False),
    "LabelMe's exporter": (labelme_exporter(), ["_background_", "cat"], [2], True),
}


@pytest.mark.parametrize(("content", "classes", "labels", "masks"), EXPORTS.values(), ids=EXPORTS.keys())
@pytest.mark.filterwarnings("error::UserWarning")
def test_what_tools_export_opens_without_a_touch(folder, content, classes, labels, masks):
    (folder / "b c.JPG").unlink()
    file = folder / "_annotations.coco.json"
    file.write_text(json.dumps(content), encoding="utf-8-sig")  # with a byte-order mark
    for annotations in (str(file), content):
        dataset = CocoDataset(str(folder), annotations)
        target = dataset[0][1]
        assert dataset.categories[1:] == classes and target["labels"].tolist() == labels and dataset.masks is masks
        assert target["boxes"][0].tolist() == [10, 5, 30, 25] and target["area"][0] == 400
        assert not masks or target["masks"][0].sum() == 400


NAMES = {  # in the file, and in the folder
    "снимок № 1.png": "снимок № 1.png",
    "a.b.PNG": "a.b.PNG",
    "train\\a b.png": "train/a b.png",
    "train/a.png": "train/a.png",
    "/data/upload/写真.png": "写真.png",
    "C:\\Users\\me\\x.png": "x.png",
}


@pytest.mark.parametrize(("listed", "stored"), NAMES.items(), ids=range(len(NAMES)))
def test_names_of_files(folder, listed, stored):
    (folder / stored).parent.mkdir(exist_ok=True)
    (folder / "a.png").rename(folder / "rest.txt"), (folder / "b c.JPG").unlink()
    (folder / "rest.txt").rename(folder / stored)
    dataset = CocoDataset(folder, coco(images=[{"id": 1, "file_name": listed, "width": 60, "height": 40}]))
    assert dataset.file_names == [stored] and dataset[0][0].shape == (3, 40, 60) and dataset.not_listed == []


# Images


MODES = {mode: "a.png" for mode in ("RGB", "L", "LA", "P", "RGBA", "1", "I;16")} | {"CMYK": "a.tif", "F": "a.tif"}


@pytest.mark.parametrize(("mode", "name"), MODES.items(), ids=MODES.keys())
def test_modes_of_images(folder, mode, name):
    grey = np.asarray(Image.fromarray(NOISE).convert("L"), np.float32)
    if mode in ("I;16", "F"):  # a microscope's range, of which Pillow would make white
        picture = Image.fromarray((grey * 10 + 300).astype(np.uint16 if mode == "I;16" else np.float32))
        expected = np.repeat(((grey - grey.min()) * 255 / np.ptp(grey)).round()[..., None], 3, axis=2)
    else:
        picture = Image.fromarray(NOISE).convert(mode)
        expected = np.asarray(picture.convert("RGB"))
    picture.save(folder / name)
    for more in ({"width": 60, "height": 40}, {}):  # sizes may be missing
        content = coco(annotation(1), images=[{"id": 7, "file_name": name, **more}])
        with pytest.warns(UserWarning, match="not listed"):
            image, target = CocoDataset(folder, content)[0]
        assert np.array_equal(image.permute(1, 2, 0), expected) and target["boxes"].canvas_size == (40, 60)


@pytest.mark.parametrize(("width", "height", "turned"), [(40, 60, True), (60, 40, False), (None, None, True)])
def test_an_image_is_turned_where_the_file_says_so(folder, width, height, turned):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE).save(folder / "a.png", exif=exif)
    size = {} if width is None else {"width": width, "height": height}
    (folder / "b c.JPG").unlink()
    image, target = CocoDataset(folder, coco(images=[{"id": 7, "file_name": "a.png", **size}]))[0]
    assert np.array_equal(image.permute(1, 2, 0), np.rot90(NOISE, -1) if turned else NOISE)
    assert target["boxes"].canvas_size == tuple(image.shape[1:])


def test_an_image_of_another_size_and_a_damaged_one(read, folder):
    Image.fromarray(NOISE[:, :50]).save(folder / "a.png")
    (folder / "b c.JPG").write_bytes(b"<html>")
    dataset = read(coco())
    with pytest.raises(ValueError, match=r"a\.png is 50 x 40 pixels, but .*annotations\.json is 60 x 40"):
        dataset[0]
    with pytest.raises(ValueError, match=r"b c\.JPG cannot be read as an image"):
        dataset[1]


# Bad files


def changed(kind, place, **fields):
    """The good file with fields of one entry changed, or without them where they are None."""
    content = coco(*(annotation(key, segmentation=[SQUARE]) for key in (17, 18)))
    content[kind][place] |= fields
    return content


def with_counts(counts, size=(40, 60)):
    return changed("annotations", 0, segmentation={"size": list(size), "counts": counts})


BAD_FILES = {
    "not JSON": ("{", "is not JSON"),
    "not UTF-8": (b"\xff\xfe{\x00", "is not JSON"),
    "empty": ("", "is not JSON"),
    "cut off": (json.dumps(coco())[:100], "is not JSON"),
    "nested": ("[" * 100_000, "is not JSON"),
    "a list": ([], "has no list of images"),
    "predictions": ([{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}], "has no list of images"),
    "no images": ({"annotations": [], "categories": []}, "has no list of images"),
    "no annotations": ({"images": [], "categories": []}, "has no list of annotations"),
    "no categories": ({"images": [], "annotations": []}, "has no list of categories"),
    "entries by key": ({**coco(), "images": {"7": {}}}, "has no list of images"),
    "null entry": ({**coco(), "annotations": [None]}, "has no list of annotations"),
    "text as an id": (changed("images", 1, id="3"), r"images\[1\], id '3': id is '3'; .* whole number"),
    "null as an id": (changed("categories", 0, id=None), r"categories\[0\], id None: id is None"),
    "fraction as an id": (changed("annotations", 0, id=1.5), r"annotations\[0\], id 1.5: id is 1.5"),
    "image id twice": (changed("images", 1, id=7), r"images\[1\], id 7: id is 7; .* used once"),
    "category id twice": (changed("categories", 1, id=9), r"categories\[1\], id 9: id is 9; .* used once"),
    "annotation id twice": (changed("annotations", 1, id=17), r"annotations\[1\], id 17: id is 17; .* used once"),
    "file twice": (changed("images", 1, file_name="x\\a.png"), r"two entries have the file_name 'a\.png'"),
    "file name twice": (changed("images", 1, file_name="a.png"), r"two entries have the file_name 'a\.png'"),
    "name twice": (changed("categories", 0, name="cat"), "two entries have the category 'cat'"),
    "background": (
        changed("categories", 0, name="__background__"),
        "two entries have the category '__background__'",
    ),
    "file name null": (changed("images", 0, file_name=None), r"images\[0\], id 7: file_name is None; .* text"),
    "name a number": (changed("categories", 2, name=5), r"categories\[2\], id 5: name is 5; .* text"),
    "width text": (changed("images", 0, width="60"), r"images\[0\], id 7: height and width are \(40, '60'\)"),
    "height null": (changed("images", 0, height=None), r"images\[0\], id 7: height and width are \(None, 60\)"),
    "width 0": (changed("images", 0, width=0), r"images\[0\], id 7: height and width are \(40, 0\)"),
    "unknown image": (changed("annotations", 0, image_id=8), r"annotations\[0\], id 17: image_id is 8; .* listed"),
    "image id text": (changed("annotations", 0, image_id="7"), r"annotations\[0\], id 17: image_id is '7'"),
    "image id list": (changed("annotations", 0, image_id=[7]), r"annotations\[0\], id 17: image_id is \[7\]"),
    "unknown class": (
        changed("annotations", 1, category_id=1),
        r"annotations\[1\], id 18: category_id is 1; .* listed",
    ),
    "background's id": (changed("annotations", 1, category_id=-1), r"id 18: category_id is -1; .* listed"),
    "iscrowd text": (changed("annotations", 0, iscrowd="0"), r"id 17: iscrowd is '0'; it has to be 0 or 1"),
    "bbox null": (changed("annotations", 0, bbox=None), r"annotations\[0\], id 17: bbox is None; it has to be"),
    "bbox of text": (changed("annotations", 0, bbox=["1", "2", "3", "4"]), r"id 17: bbox is \['1'.* has to be"),
    "bbox with null": (changed("annotations", 0, bbox=[1, 2, None, 4]), r"id 17: bbox is \[1, 2, None.* has to be"),
    "bbox of three": (changed("annotations", 0, bbox=[1, 2, 3]), r"id 17: bbox is \[1, 2, 3\]; .* 4 finite numbers"),
    "bbox of six": (changed("annotations", 0, bbox=[1, 2, 3, 4, 5, 6]), "id 17: bbox is .* 4 finite numbers"),
    "bbox a dict": (changed("annotations", 0, bbox={"x": 1}), "id 17: bbox .* has to be"),
    "bbox NaN": (changed("annotations", 0, bbox=[1, 2, float("nan"), 4]), "id 17: bbox .*nan.* has to be"),
    "bbox infinite": (changed("annotations", 0, bbox=[1, 2, float("inf"), 4]), "id 17: bbox .*inf.* has to be"),
    "bbox huge": (changed("annotations", 0, bbox=[1, 2, 10**30, 4]), "id 17: bbox .* has to be"),
    "odd polygon": (changed("annotations", 0, segmentation=[SQUARE[:7]]), "id 17: segmentation is .* even number"),
    "flat polygon": (changed("annotations", 0, segmentation=SQUARE), "id 17: segmentation is 10; it has to be"),
    "points": (changed("annotations", 0, segmentation=[[[1, 2], [3, 4], [5, 1]]]), "id 17: segmentation .* has to be"),
    "polygon of text": (changed("annotations", 0, segmentation=[["1"] * 6]), "id 17: segmentation .* has to be"),
    "polygon infinite": (changed("annotations", 0, segmentation=[[float("inf")] * 6]), "id 17: segmentation .* has"),
    "segmentation text": (changed("annotations", 0, segmentation="mask.png"), "id 17: segmentation is m; it has to be"),
    "segmentation number": (changed("annotations", 0, segmentation=5), "id 17: 'int'.*"),
    "counts missing": (changed("annotations", 0, segmentation={"size": [40, 60]}), "id 17: 'counts'"),
    "counts too few": (with_counts([10, 20]), "id 17: the run lengths"),
    "counts too many": (with_counts([10, 20, 9999]), "id 17: .*RLE"),
    "counts negative": (with_counts([10, -20, 2410]), "id 17: .*-20"),
    "counts text": (with_counts(["10", "2390"]), "id 17: "),
    "counts damaged": (with_counts("hello"), "id 17: .*RLE"),
    "counts a number": (with_counts(5), "id 17: "),
    "size swapped": (with_counts([2400], (60, 40)), r"id 17: the run lengths .* do not fit .*\(40, 60\)"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files_are_named_with_the_entry(folder, content, message):
    file = folder.parent / "annotations.json"
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}.*{message}"):
        CocoDataset(folder, file)


def test_files_that_are_missing(read, folder):
    images = [{"id": key, "file_name": f"x/{key}.png", "width": 60, "height": 40} for key in range(1, 4)]
    with pytest.raises(FileNotFoundError, match=r"annotations\.json: 3 images are not in .*images: 1\.png"):
        read(coco(images=images))
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(coco(images=[{"id": 1, "file_name": "nothing.png"}]))
    with pytest.raises(FileNotFoundError, match=r"no\.json"):
        CocoDataset(folder, folder / "no.json")
    with pytest.raises(FileNotFoundError, match="2 images are not in .*elsewhere"):
        CocoDataset(folder.parent / "elsewhere", coco())


# In use


class Perfect(torch.nn.Module):
    def __init__(self, targets):
        super().__init__()
        self.targets = iter(targets)

    def forward(self, images):
        found = []
        for target in (next(self.targets) for _ in images):
            is_object = target["iscrowd"] == 0
            one = {key: target[key][is_object] for key in ("boxes", "labels", "masks") if key in target}
            if "masks" in one:
                one["masks"] = one["masks"][:, None].float()
            found.append(one | {"scores": torch.ones(len(one["labels"]))})
        return found


@pytest.mark.parametrize("workers", [0, 1])
def test_checked_loaded_and_evaluated(folder, workers):
    """Several classes, one of them rare, a crowd and an image without objects: no finding, and AP 1."""
    rng, annotations, images = np.random.default_rng(0), [], []
    for image_id in range(1, 13):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 60, "height": 40})
        for number in range(0 if image_id == 5 else 3):
            x, y = (int(corner) for corner in rng.integers(0, 25, 2))
            width, height = (int(side) for side in rng.integers(5, 15, 2))
            outline = [x, y, x + width, y, x + width, y + height, x, y + height]
            kind = 5 if (image_id, number) == (8, 1) else (2, 9)[number % 2]
            more = {"bbox": [x, y, width, height], "segmentation": [outline], "iscrowd": int(number == image_id == 2)}
            annotations.append(annotation(len(annotations) + 1, image_id=image_id, category_id=kind, **more))
    for path in ("a.png", "b c.JPG"):
        (folder / path).unlink()
    content = coco(*annotations, images=images)
    dataset = CocoDataset(folder, copy.deepcopy(content), get_transform(train=False))
    assert {finding.kind for finding in check_dataset(dataset, 4, progress=False).findings} <= {
        "no objects",
        "crowds",
        "rare labels",
    }
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=collate_fn)
    targets = [target for _, targets in loader for target in targets]
    assert [target["image_id"] for target in targets] == list(range(1, 13))
    results = evaluate(Perfect(targets), loader, torch.device("cpu"), progress=False)
    assert results.box.AP == results.mask.AP == pytest.approx(1) and results.box.per_class.keys() == {1, 2, 3}
    boxes = CocoDataset(folder, content, get_transform(train=False), masks=False)
    results = evaluate(Perfect([boxes[i][1] for i in range(12)]), DataLoader(boxes, collate_fn=collate_fn), "cpu")
    assert results.box.AP == pytest.approx(1) and results.mask is None
