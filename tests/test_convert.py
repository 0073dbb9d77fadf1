"""Other annotation formats: to the pixel, there and back, against labelformat, and what is refused."""

import contextlib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from labelformat.formats import (
    COCOInstanceSegmentationInput,
    COCOObjectDetectionInput,
    PascalVOCObjectDetectionInput,
    PascalVOCObjectDetectionOutput,
    YOLOv8InstanceSegmentationInput,
    YOLOv8InstanceSegmentationOutput,
    YOLOv8ObjectDetectionInput,
    YOLOv8ObjectDetectionOutput,
)
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torchvision.ops import masks_to_boxes

from tutorial_lib import convert
from tutorial_lib.coco import CocoDataset

SIZE = (40, 30)  # of all images here, unless another is given


def image(path: Path, size=SIZE, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path, **options)
    return path


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def voc(*objects, filename="a.jpg", size=SIZE, database="") -> str:
    """objects: name, xmin, ymin, xmax, ymax"""
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = ["".join(f"<{s}>{v}</{s}>" for s, v in zip(sides, o[1:], strict=True)) for o in objects]
    text = "".join(
        f"<object><name>{o[0]}</name><bndbox>{b}</bndbox></object>" for o, b in zip(objects, boxes, strict=True)
    )
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    source = f"<source><database>{database}</database></source>"
    return f"<annotation><filename>{filename}</filename>{source}{stated}{text}</annotation>"


def shape(kind, points, label="cell", group=None):
    return {"label": label, "points": points, "group_id": group, "shape_type": kind, "flags": {}}


def labelme(*shapes, path="a.jpg", size=SIZE):
    return {"shapes": list(shapes), "imagePath": path, "imageData": None, "imageWidth": size[0], "imageHeight": size[1]}


def via(*regions, name="a.jpg", as_dict=False):
    """regions: (shape attributes, region attributes)"""
    found = [{"shape_attributes": s, "region_attributes": r} for s, r in regions]
    found = {str(n): region for n, region in enumerate(found)} if as_dict else found
    return {f"{name}123": {"filename": name, "size": 123, "regions": found, "file_attributes": {}}}


RECT = {"name": "rect", "x": 2, "y": 3, "width": 10, "height": 5}


def objects(coco: dict) -> list[tuple]:
    """(file name, class, x, y, width, height) of each, in order."""
    names = {entry["id"]: entry["file_name"] for entry in coco["images"]}
    classes = {entry["id"]: entry["name"] for entry in coco["categories"]}
    return [(names[a["image_id"]], classes[a["category_id"]], *a["bbox"]) for a in coco["annotations"]]


def checked(coco: dict, root: Path, **options) -> dict:
    """A dict that went through JSON, pycocotools and CocoDataset, which agree with it."""
    coco = json.loads(json.dumps(coco))
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = coco
        api.createIndex()
    dataset = CocoDataset(root, coco, **options)
    assert dataset.file_names == [entry["file_name"] for entry in coco["images"]]
    assert dataset.categories[1:] == [entry["name"] for entry in coco["categories"]]
    for index, entry in enumerate(coco["images"]):
        picture, target = dataset[index]
        assert tuple(picture.shape[1:]) == (entry["height"], entry["width"])
        found = api.loadAnns(api.getAnnIds(imgIds=entry["id"]))
        boxes = torch.tensor([a["bbox"] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert torch.allclose(target["boxes"], boxes, atol=1e-3)
        if dataset.masks or not any("segmentation" in a for a in found):
            assert target["area"].tolist() == pytest.approx([a["area"] for a in found])
        for a, mask in zip(found, target.get("masks", ()), strict=False):
            assert np.array_equal(api.annToMask(a), mask)
    return coco


# VOC


@pytest.mark.parametrize(
    "box, database, expected, guessed",
    [
        ((0, 3, 12, 8), "Unknown", False, False),
        ((0, 3, 40, 8), "The VOC2007 Database", False, False),  # the 0 is proof
        ((5, 3, 12, 8), "The VOC2012 Database", True, False),
        ((1, 3, 40, 8), "", True, True),
        ((5, 1, 12, 30), "", True, True),
        ((1, 3, 40, 8), "Unknown", False, True),  # LabelImg writes 1 for 0
        ((2, 3, 40, 8), "", False, True),
        ((1, 3, 12, 8), "", False, True),
    ],
)
def test_voc_corners_by_evidence(tmp_path, box, database, expected, guessed):
    image(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", voc(("dog", *box), ("cat", 9, 9, 9, 20), ("cat", 0, 0, 0, 0), database=database))
    with pytest.warns(UserWarning) as caught:
        coco = convert.from_voc(tmp_path)
    said = " | ".join(str(warning.message) for warning in caught)
    assert {Path(warning.filename).name for warning in caught} == {"test_convert.py"}
    assert ("a guess" in said) == guessed and len(caught) == 1 + guessed
    # One pixel wide if it were shifted first: left out, counted, named.
    assert f"2 objects without area, left out: {tmp_path / 'a.xml'}, object 2; {tmp_path / 'a.xml'}, object 3" in said
    assert coco["info"]["one_based"] is expected and len(coco["info"]["notes"]["objects without area, left out"]) == 2
    for one_based in (True, False, None):
        with warnings.catch_warnings(record=True):
            coco = convert.from_voc(tmp_path, one_based=one_based)
        x1, y1, x2, y2 = box
        shift = expected if one_based is None else one_based
        assert objects(coco) == [("a.jpg", "dog", x1 - shift, y1 - shift, x2 - x1 + shift, y2 - y1 + shift)]
        assert coco["annotations"][0]["area"] == (x2 - x1 + shift) * (y2 - y1 + shift)


@pytest.mark.parametrize(
    "file, filename, xml",
    [
        ("a.jpg", "a", "a.xml"),  # without suffix
        ("a.v2.jpg", "a.v2", "x.xml"),
        ("a.JPG", "a.jpg", "x.xml"),
        ("other name.PNG", "other name.PNG", "x.xml"),
        ("b.JPEG", "a.jpg", "b.xml"),  # by the XML's own name
        ("a.jpg", "C:\\Users\\me\\pictures\\a.jpg", "x.xml"),
        ("train/a.jpg", "a.jpg", "train/a.xml"),
        ("train/a.jpg", "train\\a.jpg", "x.xml"),
        ("Zellen größe 細胞.jpg", "Zellen größe 細胞.jpg", "細胞.xml"),
        ("gro\u0308ße.jpg", "größe.jpg", "x.xml"),  # as macOS and as the others write it
    ],
)
def test_the_image_of_a_voc_file(tmp_path, file, filename, xml):
    image(tmp_path / "JPEGImages" / file)
    write(tmp_path / "Annotations" / xml, b"\xef\xbb\xbf" + voc(("dog", 0, 2, 9, 9), filename=filename).encode())
    coco = convert.from_voc(tmp_path / "Annotations")
    assert objects(coco) == [(file, "dog", 0, 2, 9, 7)]
    checked(coco, tmp_path / "JPEGImages")


def test_voc_with_masks(tmp_path):
    """SegmentationObject: the k-th object has value k, also after one that is left out; 255 is void."""
    mask = np.zeros((30, 40), np.uint8)
    mask[2:7, 3:9], mask[10:20, 5], mask[9, 5] = 1, 3, 255
    palette = Image.fromarray(mask)
    palette.putpalette(list(range(256)) * 3)
    for name in ("a", "b"):
        image(tmp_path / "JPEGImages" / f"{name}.jpg")
        boxes = ("dog", 4, 3, 9, 7), ("cat", 9, 9, 9, 20), ("cat", 5, 10, 7, 20)
        write(
            tmp_path / "Annotations" / f"{name}.xml",
            voc(*boxes, filename=f"{name}.jpg", database="The VOC2012 Database"),
        )
    (tmp_path / "SegmentationObject").mkdir()
    palette.save(tmp_path / "SegmentationObject/a.png")
    with pytest.warns(UserWarning, match="images without annotations, left out: b.jpg|object 2"):
        coco = convert.from_voc(tmp_path / "Annotations", masks=tmp_path / "SegmentationObject")
    assert objects(coco) == [("a.jpg", "dog", 3, 2, 6, 5), ("a.jpg", "cat", 4, 9, 3, 11)]
    decoded = [coco_mask.decode(a["segmentation"]) for a in coco["annotations"]]
    assert np.array_equal(decoded, [mask == 1, mask == 3])
    assert [a["area"] for a in coco["annotations"]] == [30, 10]
    with pytest.warns(UserWarning, match="not listed"):
        checked(coco, tmp_path / "JPEGImages")


def test_a_turned_image_has_the_size_that_tools_show(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "a.jpg", exif=exif)
    for size in ((30, 40), None):
        write(tmp_path / "a.xml", voc(("dog", 0, 2, 9, 35), size=size))
        entry = convert.from_voc(tmp_path)["images"][0]
        assert (entry["width"], entry["height"]) == (30, 40)
    write(tmp_path / "a.xml", voc(("dog", 0, 2, 9, 9)))  # by a tool that does not turn it
    checked(convert.from_voc(tmp_path), tmp_path)


# YOLO


def test_yolo_to_the_pixel(tmp_path):
    for name in ("train/a.jpg", "train/empty.PNG", "val/a b.jpg", "val/none.jpg"):
        image(tmp_path / "images" / name)
    lines = "0 0.5 0.5 0.25 0.2\n\n1 0.1 0.1 0.5 0.1 0.5 0.6\r\n"
    write(tmp_path / "labels/train/a.txt", b"\xef\xbb\xbf" + lines.encode())
    write(tmp_path / "labels/train/empty.txt", "")
    write(tmp_path / "labels/val/a b.txt", "1.0 0.5 0.5 1.0000001 1\n")
    write(tmp_path / "labels/classes.txt", "dog\ncat\n")
    with pytest.warns(UserWarning, match="^1 images without a label file.*none.jpg"):
        coco = convert.from_yolo(tmp_path / "labels", tmp_path / "images", ["dog", "cat"])
    assert [entry["file_name"] for entry in coco["images"]] == [
        "train/a.jpg", "train/empty.PNG", "val/a b.jpg", "val/none.jpg",
    ]  # fmt: skip
    flat = [value for entry in objects(coco) for value in entry]
    expected = [
        "train/a.jpg",
        "dog",
        15,
        12,
        10,
        6,
        "train/a.jpg",
        "cat",
        4,
        3,
        16,
        15,
        "val/a b.jpg",
        "cat",
        0,
        0,
        40,
        30,
    ]
    assert [v for v in flat if isinstance(v, str)] == [v for v in expected if isinstance(v, str)]
    assert [v for v in flat if not isinstance(v, str)] == pytest.approx(
        [v for v in expected if not isinstance(v, str)], abs=1e-3
    )
    (polygon,) = coco["annotations"][1]["segmentation"]
    assert polygon == pytest.approx([4, 3, 20, 3, 20, 18])
    checked(coco, tmp_path / "images", masks=False)


# LabelMe and VIA


def test_labelme_to_the_pixel(tmp_path):
    image(tmp_path / "sub/a.jpg")
    shapes = [
        shape("rectangle", [[12, 8], [2, 3]]),
        shape(None, [[1, 1], [5, 1], [5, 7]], "größe"),
        shape("circle", [[20, 15], [20, 20]]),
        shape("polygon", [[30, 1], [35, 1], [35, 7], [30, 7]], group=1),
        shape("rectangle", [[36, 10], [38, 12]], group=1),
        shape("rectangle", [[1, 20], [3, 22]], "größe", group=1),  # another label: another object
        shape("point", [[1, 1]]),
        shape("linestrip", [[1, 1], [2, 2]]),
    ]
    write(tmp_path / "sub/x.json", labelme(*shapes, path="..\\images\\a.jpg"))
    with pytest.warns(UserWarning) as caught:
        coco = convert.from_labelme(tmp_path)
    for kind, number in (("linestrip", 8), ("point", 7)):
        assert any(
            f"1 objects of kind {kind}, left out" in str(w.message) and f"shape {number}" in str(w.message)
            for w in caught
        )
    assert [entry["name"] for entry in coco["categories"]] == ["cell", "größe"]
    assert [entry[1:] for entry in objects(coco)] == [
        ("cell", 2, 3, 10, 5), ("größe", 1, 1, 4, 6), ("cell", 15, 10, 10, 10), ("cell", 30, 1, 8, 11),
        ("größe", 1, 20, 2, 2),
    ]  # fmt: skip
    first, _, circle, group, _ = coco["annotations"]
    assert "segmentation" not in first and first["area"] == 50
    assert circle["area"] == pytest.approx(np.pi * 25, rel=0.03)
    assert group["segmentation"] == [[30, 1, 35, 1, 35, 7, 30, 7], [36, 10, 38, 10, 38, 12, 36, 12]]
    assert group["area"] == 30 + 4
    checked(coco, tmp_path, masks=False)
    coco["annotations"] = coco["annotations"][1:4]
    checked(coco, tmp_path)


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize("project", [True, False])
def test_via_to_the_pixel(tmp_path, as_dict, project):
    image(tmp_path / "images/a.jpg")
    regions = [
        (RECT, {"class": "dog", "quality": "good"}),
        (
            {"name": "polygon", "all_points_x": [1, 5, 5], "all_points_y": [1, 1, 7]},
            {"class": {"cat": True, "dog": False}},
        ),
        ({"name": "circle", "cx": 20, "cy": 15, "r": 5}, {"class": "cat"}),
        ({"name": "ellipse", "cx": 20, "cy": 15, "rx": 8, "ry": 4}, {"class": "cat"}),
        ({"name": "ellipse", "cx": 20, "cy": 15, "rx": 8, "ry": 4, "theta": np.pi / 2}, {"class": "cat"}),
        ({"name": "point", "cx": 1, "cy": 1}, {"class": "cat"}),
    ]
    data = via(*regions, as_dict=as_dict)
    file = write(tmp_path / "via.json", {"_via_settings": {}, "_via_img_metadata": data} if project else data)
    with pytest.warns(UserWarning, match="1 regions of kind point, left out: .*via.json, a.jpg123, region 5"):
        coco = convert.from_via(file, tmp_path / "images", ["dog", "cat"])
    found = np.array([entry[2:] for entry in objects(coco)])
    assert [entry[1] for entry in objects(coco)] == ["dog", "cat", "cat", "cat", "cat"]
    expected = [[2, 3, 10, 5], [1, 1, 4, 6], [15, 10, 10, 10], [12, 11, 16, 8], [16, 7, 8, 16]]
    assert np.allclose(found, expected)
    checked(coco, tmp_path / "images", masks=False)


@pytest.mark.parametrize(
    "attributes, categories, name", [({}, None, "object"), ({}, ["cell"], "cell"), ({"x": "b"}, None, "b")]
)
def test_the_class_of_via_regions(tmp_path, attributes, categories, name):
    image(tmp_path / "a.jpg")
    file = write(tmp_path / "via.json", via((RECT, attributes)))
    assert objects(convert.from_via(file, tmp_path, categories)) == [("a.jpg", name, 2, 3, 10, 5)]


# Masks

BLOBS = np.zeros((30, 40), np.uint8)
BLOBS[2:7, 3:9], BLOBS[7:9, 9:12], BLOBS[20:25, 30:40] = 1, 1, 1  # the first two touch at a corner
LEFT, RIGHT = (BLOBS > 0) & (np.arange(40) < 20), (BLOBS > 0) & (np.arange(40) > 20)
IDS = BLOBS * 0
IDS[2:7, 3:9], IDS[10:12, 0:4], IDS[29, 39] = 1, 2, 5
OBJECTS = [(IDS == k, "object") for k in (1, 2, 5)]
WITH_VOID = np.where(BLOBS, np.uint8(255), IDS)


@pytest.mark.parametrize(
    "kind, masks, categories, expected",
    [
        ("instances", {"a_mask.png": IDS}, ["cell"], [(mask, "cell") for mask, _ in OBJECTS]),
        ("instances", {"a.png": IDS.astype(np.uint16) * 300}, None, OBJECTS),
        ("instances", {"a.png": WITH_VOID}, None, [(WITH_VOID == k, "object") for k in (2, 5)]),
        ("instances", {"a.png": np.uint8([0, 253, 254, 0, 0, 255])[IDS]}, None, OBJECTS),
        ("semantic", {"a.png": BLOBS}, ["cell"], [(LEFT, "cell"), (RIGHT, "cell")]),
        ("semantic", {"a.tif": BLOBS * 255}, ["cell"], [(LEFT, "cell"), (RIGHT, "cell")]),
        ("semantic", {"a.png": np.where(IDS == 5, np.uint8(255), IDS)}, ["x", "w"], [(IDS == 1, "x"), (IDS == 2, "w")]),
        ("semantic", {"a.png": IDS}, None, [(IDS == k, f"class_00{k}") for k in (1, 2, 5)]),
        ("objects", {f"a_{k}.png": (IDS == k) * np.uint8(255) for k in (1, 2, 5)}, None, OBJECTS),
        ("objects", {f"a/{k}.png": IDS == k for k in (1, 2, 5)}, ["object"], OBJECTS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["", "train/"])
def test_masks_to_the_pixel(tmp_path, kind, masks, categories, expected, folder):
    image(tmp_path / "images" / f"{folder}a.JPG", format="jpeg")
    for name, mask in masks.items():
        write(tmp_path / "masks" / folder / name, mask)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coco = convert.from_masks(tmp_path / "images", tmp_path / "masks", kind, categories)
    void = any((mask == 255).any() and len(np.unique(mask)) > 2 and 254 not in mask for mask in masks.values())
    assert len(caught) == void and all("void regions (255), left out" in str(warning.message) for warning in caught)
    want = torch.tensor(np.array([mask for mask, _ in expected]))
    assert np.array_equal([coco_mask.decode(a["segmentation"]) for a in coco["annotations"]], want)
    assert [entry[1] for entry in objects(coco)] == [name for _, name in expected]
    boxes = torch.tensor([entry[2:] for entry in objects(coco)])
    boxes[:, 2:] += boxes[:, :2] - 1
    assert torch.equal(boxes, masks_to_boxes(want).double())
    assert all(isinstance(a["segmentation"]["counts"], str) for a in coco["annotations"])
    checked(coco, tmp_path / "images")


def test_masks_of_stems_that_begin_alike(tmp_path):
    for name in ("a", "a_1", "b"):
        image(tmp_path / "images" / f"{name}.jpg")
    for name, k in (("a_2", 1), ("a_1_2", 2), ("a_1_3", 5)):
        write(tmp_path / "masks" / f"{name}.png", IDS == k)
    with pytest.warns(UserWarning, match="1 images without annotations, left out: b.jpg"):
        coco = convert.from_masks(tmp_path / "images", tmp_path / "masks", "objects")
    assert [(entry[0], *entry[2:]) for entry in objects(coco)] == [
        ("a.jpg", 3, 2, 6, 5), ("a_1.jpg", 0, 10, 4, 2), ("a_1.jpg", 39, 29, 1, 1),
    ]  # fmt: skip


def test_semantic_masks_are_not_taken_for_instances_in_silence(tmp_path):
    for name in "ab":
        image(tmp_path / "images" / f"{name}.jpg")
        write(tmp_path / "masks" / f"{name}.png", BLOBS * 255)
    with pytest.warns(UserWarning, match="all masks have one value, 255: are they semantic"):
        convert.from_masks(tmp_path / "images", tmp_path / "masks", "instances")


# There and back, and against labelformat


@pytest.fixture
def sample(tmp_path) -> dict:
    """Three images, the last without objects; boxes at the edges, and with fractions; polygons."""
    rng, names = np.random.default_rng(0), ["dog", "black cat & <hat>", "鳥"]
    images = [
        {"id": 7 * n, "file_name": f, "width": 641, "height": 479}
        for n, f in ((1, "a.jpg"), (2, "b c.JPG"), (3, "d.png"))
    ]
    annotations = []
    for n in range(20):
        x1, y1 = rng.uniform(0, 300, 2) if n % 2 else rng.integers(0, 300, 2)
        x2, y2 = (641, 479) if n == 0 else (x1 + rng.integers(3, 300), y1 + rng.integers(3, 170))
        box = [float(v) for v in (x1, y1, x2 - x1, y2 - y1)]
        annotations.append({
            "id": n + 1, "image_id": 7 + n % 2 * 7, "category_id": (4, 2, 9)[n % 3], "bbox": box, "iscrowd": 0,
            "area": box[2] * box[3], "segmentation": [[float(v) for v in (x1, y1, x2, y1, x2, y2, (x1 + x2) / 2, y2)]],
        })  # fmt: skip
    annotations.sort(key=lambda a: a["image_id"])
    for entry in images:
        image(tmp_path / "images" / entry["file_name"], (641, 479))
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in zip((2, 4, 9), names, strict=True)],
    }


NAMES = ["dog", "black cat & <hat>", "鳥"]


def same(left: dict, right: dict) -> bool:
    ours, theirs = objects(left), objects(right)
    near = np.allclose([entry[2:] for entry in ours], [entry[2:] for entry in theirs], atol=1e-3, rtol=0)
    return near and [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]


def test_there_and_back(tmp_path, sample):
    images = tmp_path / "images"
    convert.to_yolo(sample, tmp_path / "yolo")
    convert.to_yolo(sample, tmp_path / "yolo")  # the same again is no conflict
    boxes = convert.from_yolo(tmp_path / "yolo", images, NAMES)
    assert same(boxes, sample) and len(boxes["images"]) == 3
    assert (tmp_path / "yolo/classes.txt").read_text("utf-8").splitlines() == NAMES
    convert.to_yolo(sample, tmp_path / "segments", segments=True)
    polygons = convert.from_yolo(tmp_path / "segments", images, NAMES)
    assert same(polygons, sample)
    for ours, theirs in zip(polygons["annotations"], sample["annotations"], strict=True):
        assert np.allclose(ours["segmentation"], theirs["segmentation"], atol=1e-3)
    for one_based in (False, True):
        convert.to_voc(boxes, tmp_path / f"voc{one_based}", one_based=one_based)
        back = convert.from_voc(tmp_path / f"voc{one_based}", images, NAMES)
        assert back["info"]["one_based"] is one_based and same(back, sample)
        convert.to_yolo(back, tmp_path / f"again{one_based}")
        assert same(convert.from_yolo(tmp_path / f"again{one_based}", images, NAMES), sample)


def test_sub_folders_there_and_back(tmp_path):
    for name in ("train/a.jpg", "val/a.jpg"):
        image(tmp_path / "images" / name)
    images = [{"id": n, "file_name": f, "width": 40, "height": 30} for n, f in enumerate(("train/a.jpg", "val/a.jpg"))]
    annotations = [{"id": n, "image_id": n, "category_id": 1, "bbox": [n, 2, 5, 6], "iscrowd": 0} for n in (0, 1)]
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dog"}]}
    convert.to_voc(coco, tmp_path / "voc")
    convert.to_yolo(coco, tmp_path / "yolo")
    assert same(convert.from_voc(tmp_path / "voc", tmp_path / "images"), coco)
    assert same(convert.from_yolo(tmp_path / "yolo", tmp_path / "images", ["dog"]), coco)


def theirs(labels) -> dict:
    """Boxes, and the points of polygons, of a labelformat reader: by file and class, sorted."""
    found = {}
    for entry in labels:
        for item in entry.objects:
            box = item.box if hasattr(item, "box") else item.segmentation.bounding_box()
            points = [] if hasattr(item, "box") else np.ravel(item.segmentation.polygons).tolist()
            found.setdefault((Path(entry.image.filename).stem, item.category.name), []).append(
                [box.xmin, box.ymin, box.xmax, box.ymax, *points]
            )
    return {key: sorted(values) for key, values in found.items()}


def ours(coco: dict, segments: bool = False) -> dict:
    found = {}
    for a, (name, category, x, y, w, h) in zip(coco["annotations"], objects(coco), strict=True):
        points = np.ravel(a["segmentation"]).tolist() if segments else []
        points = points[:-2] if points[:2] == points[-2:] else points  # labelformat closes polygons
        found.setdefault((Path(name).stem, category), []).append([x, y, x + w, y + h, *points])
    return {key: sorted(values) for key, values in found.items()}


def agree(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.allclose(left[key], right[key], atol=1e-3, rtol=0) for key in left)


def test_labelformat_reads_what_is_written_and_writes_what_is_read(tmp_path, sample):
    images = tmp_path / "images"
    file = write(
        tmp_path / "coco.json",
        sample | {"categories": [{"id": c["id"], "name": c["name"]} for c in sample["categories"]]},
    )
    # VOC
    convert.to_voc(sample, tmp_path / "voc")
    assert agree(theirs(PascalVOCObjectDetectionInput(tmp_path / "voc", ",".join(NAMES)).get_labels()), ours(sample))
    PascalVOCObjectDetectionOutput(tmp_path / "their_voc").save(COCOObjectDetectionInput(file))
    assert agree(ours(convert.from_voc(tmp_path / "their_voc", images, NAMES, one_based=False)), ours(sample))
    # YOLO: labelformat writes the file's own ids, so they count from 0 here.
    numbers = {c["id"]: n for n, c in enumerate(sample["categories"])}
    from_0 = sample | {
        "categories": [{"id": n, "name": name} for n, name in enumerate(NAMES)],
        "annotations": [a | {"category_id": numbers[a["category_id"]]} for a in sample["annotations"]],
    }
    file = write(tmp_path / "coco.json", from_0)
    for segments, reader, writer, coco_reader in (
        (False, YOLOv8ObjectDetectionInput, YOLOv8ObjectDetectionOutput, COCOObjectDetectionInput),
        (True, YOLOv8InstanceSegmentationInput, YOLOv8InstanceSegmentationOutput, COCOInstanceSegmentationInput),
    ):
        root = tmp_path / f"yolo{segments}"
        for entry in sample["images"]:
            image(root / "images" / entry["file_name"], (641, 479))
        convert.to_yolo(sample, root / "labels", segments=segments)
        data = write(root / "data.yaml", yaml.safe_dump({"path": ".", "train": "images", "nc": 3, "names": NAMES}))
        assert agree(theirs(reader(data, "train").get_labels()), ours(sample, segments))
        writer(tmp_path / f"theirs{segments}/data.yaml", "train").save(coco_reader(file))
        back = convert.from_yolo(tmp_path / f"theirs{segments}/labels", images, NAMES)
        assert agree(ours(back, segments), ours(sample, segments))


# What is refused

POLYGON, BOX = "0 0.1 0.1 0.5 0.1 0.5 0.6", "0 0.5 0.5 0.2 0.2"
BOMB = '<?xml version="1.0"?><!DOCTYPE b [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>'
DOG = ("dog", 0, 2, 9, 9)


NAN = float("nan")


def from_voc(root, categories=None):
    return convert.from_voc(root / "x", root / "images", categories)


def voc_with_masks(root):
    return convert.from_voc(root / "x", root / "images", masks=root / "x")


def from_yolo(root, categories=("dog", "cat")):
    return convert.from_yolo(root / "x", root / "images", categories)


def from_labelme(root):
    return convert.from_labelme(root / "images")


def from_via(root, categories=None):
    return convert.from_via(root / "x/v.json", root / "images", categories)


def masks_as(kind, categories=None, masks="x"):
    return lambda root: convert.from_masks(root / "images", root / masks, kind, categories)


# One file of annotations for images/a.jpg, and what the error says of it. All are a ValueError.
BAD_VOC = [
    ("", "no element found"),
    (voc(DOG)[:-9], "no element|unclosed"),
    (BOMB, "EntitiesForbidden"),
    (voc(DOG).replace("dog", "größe").encode("latin-1"), "not well-formed"),
    (b'<?xml version="1.0" encoding="abc"?><annotation/>', "unknown encoding"),
    ("<annotations><image/></annotations>", "<annotations>"),
    (voc(DOG, size=("wide", 40)), "'wide'"),
    (voc(DOG, size=(41, 30)), r"\(41, 30\) .*a.jpg has \(40, 30\)"),
    (voc(DOG, ("", 1, 2, 3, 4)), "object 2: the class ''"),
    (voc(DOG, ("dog", 1, 2, "three", 4)), "object 2: .*'three'"),
    (voc(("dog", 1, 2, "inf", 4)), "object 1: .*inf"),
    (voc(DOG).replace("ymax", "top"), "object 1: there is no 'ymax'"),
    (voc(DOG).replace("bndbox", "robndbox"), "object 1: there is no 'xmin'"),
]
BAD_YOLO = [
    (f"{BOX}\n2 0.5 0.5 0.2 0.2", "line 2: the class 2 .*0 to 1"),
    ("-1 0.5 0.5 0.2 0.2", "line 1: the class -1"),
    ("0.5 0.5 0.5 0.2 0.2", "line 1: the class 0.5"),
    ("dog 0.5 0.5 0.2 0.2", "line 1: .*'dog'"),
    (f"{BOX} 0.9", "line 1: 6 numbers.*confidence"),
    (f"{POLYGON} 0.9", "line 1: 8 numbers.*confidence"),
    ("0 0.5 0.5", "line 1: 3 numbers"),
    ("0 20 15 10 6", "line 1: .*Pixels"),
    ("0 nan 0.5 0.2 0.2", "line 1: a number is not from 0 to 1"),
    ("0,0.5,0.5,0.2,0.2", "line 1: could not convert"),
    (BOX.encode("utf-16"), "'utf-8' codec"),
]
BAD_LABELME = [
    ("{", "Expecting"),
    ("[" * 100_000, "recursion"),
    ('{"shapes": "größe"}'.encode("latin-1"), "'utf-8' codec"),
    ({"images": []}, "there is no 'shapes'"),
    (labelme(size=(41, 30)), r"\(41, 30\) .*a.jpg has \(40, 30\)"),
    (labelme(shape("polygon", [[1, 1], [2, 2]])), "shape 1: .*three points"),
    (labelme(shape("polygon", [[1, 1], [2], [3, 3]])), "shape 1: "),
    (labelme(shape("polygon", [[1, 1], [NAN, 1], [3, 3]])), "shape 1: .*nan"),
    (labelme(shape("circle", [[1, 1]])), "shape 1: "),
    (labelme({"points": [[1, 1]] * 3}), "shape 1: there is no 'label'"),
    (labelme(shape("rectangle", [[1, 1], [5, 5]], label=3)), "shape 1: the class 3"),
]
BAD_VIA = [
    ("{", "Expecting"),
    ([], "list"),
    ({"images": [], "annotations": []}, "images: list"),
    (via((RECT, {"a": "1", "b": "2"})), r"a.jpg123, region 0: .*\['a', 'b'\]"),
    (via((RECT, {"type": "1", "class": "2"})), r"a.jpg123, region 0: .*\['class', 'type'\]"),
    (via((RECT, {"a": "1"}), (RECT, {})), "a.jpg123, region 1: there is no 'a'"),
    (via((RECT, {"a": ""})), "region 0: the class ''"),
    (via((RECT, {"a": {"x": True, "y": True}})), "region 0: too many"),
    (via(({"name": "rect", "x": 1, "y": 2, "width": 3}, {"a": "b"})), "region 0: there is no 'height'"),
    (via(({"name": "polygon", "all_points_x": [1, 2, 3], "all_points_y": [1]}, {"a": "b"})), "region 0: "),
    (via(({"x": 1}, {"a": "b"})), "region 0: there is no 'name'"),
]
# Several files, other arguments, other errors.
BAD = [
    *[(from_voc, {"x/a.xml": content}, ValueError, f"a.xml.*{message}") for content, message in BAD_VOC],
    *[(from_yolo, {"x/a.txt": content}, ValueError, f"a.txt.*{message}") for content, message in BAD_YOLO],
    *[(from_labelme, {"images/a.json": content}, ValueError, f"a.json.*{message}") for content, message in BAD_LABELME],
    *[(from_via, {"x/v.json": content}, ValueError, f"v.json.*{message}") for content, message in BAD_VIA],
    (from_voc, {}, FileNotFoundError, "x is not a folder"),
    (from_voc, {"x/a.json": "{}"}, FileNotFoundError, r"x holds no file named \*.xml"),
    (from_voc, {"x/.a.xml": voc(DOG)}, FileNotFoundError, r"x holds no file named \*.xml"),
    (from_voc, {"x/b.xml": voc(DOG, filename="c.jpg")}, FileNotFoundError, "b.xml: the image ./c.jpg is not in"),
    (from_voc, {"x/a.xml": voc(DOG), "x/b.xml": voc(DOG)}, ValueError, "b.xml and .*a.xml are both for .*a.jpg"),
    (from_voc, {"x/a.xml": voc(DOG), "images/a.jpg": b"no image"}, ValueError, "a.jpg cannot be read"),
    (from_voc, {"x/s/x.xml": voc(DOG), "images/b/a.jpg": None}, ValueError, "x.xml: the image .* a.jpg or b/a.jpg"),
    (lambda root: from_voc(root, ["cat"]), {"x/a.xml": voc(DOG)}, ValueError, "a.xml, object 1: .*'dog'.*cat"),
    (lambda root: from_voc(root, "dog"), {"x/a.xml": voc(DOG)}, ValueError, "categories .*'dog'"),
    (lambda root: from_voc(root, ["dog", "dog"]), {"x/a.xml": voc(DOG)}, ValueError, "categories .*different"),
    (lambda root: from_voc(root, ["__background__", "dog"]), {"x/a.xml": voc(DOG)}, ValueError, "background"),
    (voc_with_masks, {"x/a.xml": voc(DOG), "x/a.png": IDS}, ValueError, "a.xml: .*a.png has object 5, but .* has 1"),
    (voc_with_masks, {"x/a.xml": voc(DOG), "x/a.png": BLOBS[:9]}, ValueError, "a.xml, object 1: the mask has 40 x 9"),
    (from_yolo, {"x/a.xml": ""}, FileNotFoundError, r"x holds no file named \*.txt"),
    (from_yolo, {"x/b.txt": BOX}, FileNotFoundError, "1 label files have no image in .*b.txt"),
    (from_yolo, {"x/a.txt": BOX, "images/a.png": None}, ValueError, "a.txt: .*a.jpg or a.png"),
    (lambda root: from_yolo(root, {0: "dog"}), {"x/a.txt": BOX}, ValueError, "a.txt, line 1: the class 0 is not"),
    (from_labelme, {}, FileNotFoundError, r"images holds no file named \*.json"),
    (from_labelme, {"images/b.json": labelme(path="c.jpg")}, FileNotFoundError, "b.json: the image ./c.jpg"),
    (from_via, {}, FileNotFoundError, "v.json"),
    (from_via, {"x/v.json": via(name="b.jpg")}, FileNotFoundError, "v.json, b.jpg123: the image ./b.jpg"),
    (lambda root: from_via(root, ["dog", "cat"]), {"x/v.json": via((RECT, {}))}, ValueError, "region 0: which of the"),
    (masks_as("panoptic"), {"x/a.png": IDS}, ValueError, "kind is .*panoptic"),
    (masks_as("instances", ["a", "b"]), {"x/a.png": IDS}, ValueError, "one category.*'b'"),
    (masks_as("semantic", ["a", "b"]), {"x/a.png": IDS}, ValueError, "x/a, a.png, value 5, region 1: .* 2 categories"),
    (masks_as("instances"), {"x/b.png": IDS}, FileNotFoundError, "b.png is not the mask of an image"),
    (masks_as("instances", masks="images"), {}, FileNotFoundError, "a.jpg is not the mask of an image"),
    (masks_as("instances"), {"x/a.png": IDS, "x/a_mask.png": IDS}, ValueError, "x/a: .*a.png, one of 2 files"),
    (masks_as("instances"), {"x/a.png": IDS[:9]}, ValueError, "x/a, a.png, value 1.*: the mask has 40 x 9 pixels"),
    (masks_as("semantic"), {"x/a.png": None}, ValueError, "a.png is in colour"),
    (masks_as("semantic"), {"x/a.jpg": IDS}, ValueError, "a.jpg is in colour or JPEG"),
    (masks_as("semantic"), {"x/a.png": "no image"}, ValueError, "a.png cannot be read as an image"),
    (masks_as("objects"), {"x/a_1.png": IDS}, ValueError, r"x/a: .*a_1.png, .* values \[1, 2, 5\]"),
    (masks_as("objects"), {"x/a_1.png": IDS * 0}, ValueError, r"x/a: .*a_1.png, .* values \[\]"),
]


@pytest.mark.parametrize("call, files, error, message", BAD)
def test_bad_input_is_refused_by_file_and_entry(tmp_path, call, files, error, message):
    for name, content in {"images/a.jpg": None, **files}.items():
        image(tmp_path / name) if content is None else write(tmp_path / name, content)
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("ignore")
        call(tmp_path)


ENTRY = {
    "id": 3,
    "image_id": 1,
    "category_id": 1,
    "bbox": [2, 3, 10, 5],
    "iscrowd": 0,
    "segmentation": [[2, 3, 9, 3, 9, 8]],
}


@pytest.mark.parametrize(
    "change, one_based, segments, error, message",
    [
        ({"iscrowd": 1}, False, False, ValueError, "annotation 3: a crowd"),
        ({"bbox": [2, 3, 0, 5]}, False, False, ValueError, "annotation 3: .*a.jpg"),
        ({"bbox": [2, 3, 50, 5]}, False, False, ValueError, "annotation 3: .*not inside of the image"),
        ({"bbox": [2, 3, float("nan"), 5]}, False, False, ValueError, "annotation 3: "),
        ({"bbox": [2, 3, 1, 5]}, True, None, ValueError, "annotation 3: .*too small"),
        ({"segmentation": [[2, 3, 9, 3, 9, 8]] * 2}, None, True, ValueError, "annotation 3: .*one polygon"),
        ({"segmentation": {"size": [30, 40], "counts": "x"}}, None, True, ValueError, "annotation 3: .*RLE"),
        ({"segmentation": []}, None, True, ValueError, "annotation 3: .*one polygon"),
        ({"image_id": 9}, False, False, ValueError, "annotation 3: there is no 9"),
        ({"category_id": 9}, False, False, ValueError, "annotation 3: there is no 9"),
        ({"file_name": "../a.jpg"}, False, False, ValueError, "image 1, ../a.jpg: "),
        ({"file_name": "/a.jpg"}, False, False, ValueError, "image 1, /a.jpg: "),
        ({"file_name": "b.jpg"}, False, False, ValueError, "image 2, b.png: its id or stem is used twice"),
        ({"image id": 2}, False, False, ValueError, "image 2, .*: its id or stem is used twice"),
        ({"file_name": "classes.jpg"}, None, False, ValueError, "image 1, classes.jpg"),
        ({"file_name": "there.jpg"}, False, False, FileExistsError, "there.* is there already"),
    ],
)  # fmt: skip
def test_what_yolo_and_voc_cannot_hold(tmp_path, change, one_based, segments, error, message):
    """None of it is written, and nothing else either."""
    first = {"id": change.get("image id", 1), "file_name": change.get("file_name", "a.jpg"), "width": 40, "height": 30}
    coco = {
        "images": [first, {"id": 2, "file_name": "b.png", "width": 40, "height": 30}],
        "annotations": [ENTRY | {"image_id": first["id"]} | change],
        "categories": [{"id": 1, "name": "dog"}],
    }
    for name in ("there.txt", "there.xml"):
        write(tmp_path / name, "mine")
    for wanted, save in (
        (segments, lambda: convert.to_yolo(coco, tmp_path, segments=segments)),
        (one_based, lambda: convert.to_voc(coco, tmp_path, one_based=one_based)),
    ):
        if wanted is not None:
            with pytest.raises(error, match=message):
                save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.txt", "there.xml"]
    assert (tmp_path / "there.txt").read_text() == (tmp_path / "there.xml").read_text() == "mine"
