"""From other annotation formats to the COCO dict that CocoDataset reads, and back. Notebook 05 uses it.

Every ``from_`` function returns ``{"info", "images", "annotations", "categories"}``, ready for ``json.dump``:

- ``file_name`` is relative to the folder of images, with "/". ``width`` and ``height`` are the image's own, in pixels,
  after its EXIF orientation, as annotation tools show it; before, only if the annotation file states that size. All ids
  count from 1.
- ``bbox`` is [x, y, width, height] in pixels, float, not rounded. The left edge of the first pixel is 0, and x + width
  is the right edge of the object's last pixel (half-open). Boxes beyond the image are not cut: CocoDataset does that.
- ``segmentation``, where there is one, is a list of polygons in the same coordinates, or a compressed RLE with counts
  as text. ``area`` is the number of its pixels, as pycocotools counts them. Without one it is the area of the box.
- ``iscrowd`` is 0.
- ``categories`` are in the order of the argument; without it, sorted by name. The background is not listed.
- ``info["notes"]`` names in full what the warnings count: what was left out or changed. Attributes that COCO has no
  field for (truncated, flags, text) are not converted.

Sub-folders are read, too; hidden files are not. VOC, LabelMe and VIA may give an image another folder or suffix than it
has, if only one image has that name. ``FileNotFoundError`` is raised where a folder, its files or an image is missing,
and ``ValueError``, which names file and entry, for what cannot be read or does not fit.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from pathlib import Path, PurePosixPath
from unicodedata import normalize
from xml.sax.saxutils import escape

import defusedxml.ElementTree
import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage

from tutorial_lib.data import IMAGE_SUFFIXES, opened, read_image


def _named(where, function, *args):
    """``function(*args)``; its errors name ``where``."""
    try:
        return function(*args)
    except (ValueError, TypeError, AttributeError, LookupError, SyntaxError, RecursionError) as error:
        raise ValueError(f"{where}: {f'there is no {error}' if isinstance(error, KeyError) else error}") from error


def _files(folder, suffixes):
    """The files of a folder by their path in it, sorted."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: path for name, path in files.items() if "/." not in f"/{name}"}
    if not files:
        what = f"holds no file named *{', *'.join(suffixes)}" if Path(folder).is_dir() else "is not a folder"
        raise FileNotFoundError(f"{folder} {what}")
    return files


def _keys(name):
    """How a file may be called elsewhere, the surest first: ./path, the same without suffix, name, stem."""
    path = PurePosixPath(normalize("NFC", name.replace("\\", "/")))
    stem = path.with_suffix("") if path.suffix.lower() in (*IMAGE_SUFFIXES, ".txt", ".xml", ".json") else path
    return [f"./{path}", f"./{stem}", path.name, stem.name]


def _mask_values(path):
    values = read_image(path).numpy()
    if len(values) != 1 or path.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"{path} is in colour or JPEG. A mask has one channel, kept without loss: save it as grey PNG")
    return values[0]


def _rle(mask):
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return rle | {"counts": rle["counts"].decode()}


def _ellipse(x, y, rx, ry, theta=0.0):
    """A polygon of 64 points, turned by theta, in radians."""
    angle = np.arange(64) * np.pi / 32
    points = (rx * np.cos(angle) + 1j * ry * np.sin(angle)) * np.exp(1j * theta) + complex(x, y)
    return points.view(float).tolist()


def _annotation(parse, raw, size, names):
    """What to say about an object that is left out, or None; and its annotation, or None."""
    name, shape, *box = parse(raw, size)
    if shape is None:
        return name, None
    if not isinstance(name, str) or name not in (names or [name.strip() or None]):
        raise ValueError(f"the class {name!r} is not {f'among the categories {names}' if names else 'a name'}")
    if isinstance(shape, dict):
        if shape["size"] != [size[1], size[0]]:
            raise ValueError(f"the mask has {shape['size'][1]} x {shape['size'][0]} pixels, the image {size}")
        x, y, w, h = coco_mask.toBbox(shape).tolist()
        box = box or [(x, y, x + w, y + h)]
    elif len(shape) == 1 and isinstance(shape[0], tuple):
        box, shape = shape, None
    else:
        shape = [[part[i] for i in (0, 1, 2, 1, 2, 3, 0, 3)] if isinstance(part, tuple) else part for part in shape]
        if any(len(part) < 6 or len(part) % 2 for part in shape):
            raise ValueError("a polygon needs three points or more, of two numbers each")
        points = np.reshape(sum(shape, []), (-1, 2))
        box = [(*points.min(0).tolist(), *points.max(0).tolist())]
    x1, y1, x2, y2 = box[0]
    if not (np.abs(box) < 1e6).all():
        raise ValueError(f"x1, y1, x2, y2 = {box[0]} are not pixels")
    fields = {"category_id": name, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
    if shape:
        rles = coco_mask.frPyObjects(shape, size[1], size[0]) if isinstance(shape, list) else [shape]
        fields |= {"segmentation": shape, "area": float(coco_mask.area(coco_mask.merge(rles)))}
    empty = x1 >= x2 or y1 >= y2 or not fields["area"]
    return ("objects without area, left out", None) if empty else (None, fields)


def _coco(files, sources, load, parse, categories):
    """The COCO dict of annotation sources, ``{what errors call it: item}``.

    ``load(item)`` gives the keys of an image, the size that is stated for it (0 where none is), and ``{entry: raw}``.
    ``parse(raw, (width, height))`` gives an object's class, its shape (an RLE or a list of boxes, tuples XYXY, and
    polygons, lists), and its box if that is not the shape's; or what to say of an object that is left out, and None.
    """
    names = list(categories or ())
    if isinstance(categories, str) or len({"", "__background__", *names}) != len(names) + 2:
        raise ValueError(f"categories must be a list of different names, without the background, not {categories!r}")
    index, used, images, annotations, notes = defaultdict(dict), {}, [], [], defaultdict(list)
    for name in files:
        for key in _keys(name):
            index[key][name] = None
    records = [(source, *_named(source, load, item)) for source, item in sources.items()]
    for source, keys, stated, raws in records:
        fitting = next((list(index[key]) for key in keys if key in index), [])
        if len(fitting) != 1:
            error = ValueError if fitting else FileNotFoundError
            raise error(f"{source}: the image {keys[0]} is {' or '.join(fitting) or 'not in the folder of images'}")
        name, path = fitting[0], files[fitting[0]]
        if used.setdefault(name, source) != source:
            raise ValueError(f"{source} and {used[name]} are both for {path}")
        with opened(path) as image:
            turned = image.getexif().get(0x0112, 1) > 4 and stated != image.size
            size = image.size[::-1] if turned else image.size
        if all(stated) and stated != size:
            raise ValueError(f"{source} is for an image of {stated} pixels, but {path} has {size}")
        images.append({"id": len(images) + 1, "file_name": name, "width": size[0], "height": size[1]})
        for entry, raw in raws.items():
            note, fields = _named(f"{source}, {entry}", _annotation, parse, raw, size, names)
            if fields:
                annotations.append({"id": len(annotations) + 1, "image_id": len(images)} | fields)
            else:
                notes[note].append(f"{source}, {entry}")
    if unused := [name for name in files if name not in used]:
        notes["images without annotations, left out"] = unused
    for note, places in notes.items():
        warnings.warn(f"{len(places)} {note}: {'; '.join(places[:9])}{'; ...' * (len(places) > 9)}", stacklevel=3)
    names = names or sorted({fields["category_id"] for fields in annotations})
    for fields in annotations:
        fields["category_id"] = names.index(fields["category_id"]) + 1
    listed = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"info": {"notes": dict(notes)}, "images": images, "annotations": annotations, "categories": listed}


def from_voc(
    annotations: str | Path, images: str | Path | None = None, categories: list[str] | None = None, *,
    one_based: bool | None = None, masks: str | Path | None = None,
) -> dict:  # fmt: skip
    """Pascal VOC: one XML file an image, with boxes.

    Corners: the original counts pixels from 1, and xmax is the last one, so a box covers the edges xmin - 1 .. xmax.
    Most tools (CVAT, LabelImg, Roboflow) count from 0 and write the edges themselves. Which of the two holds is decided
    for the whole folder, and is in ``info["one_based"]``:

    1. A corner of 0 proves that they count from 0.
    2. If ``<database>`` names VOC2005 to VOC2012 in every file, they count from 1.
    3. Otherwise a warning says that it is a guess: from 1, if boxes reach the left or top edge as 1 and the right or
       bottom edge as the image's size; but not if a ``<database>`` is "Unknown", as LabelImg has it: it writes 1 for 0.

    Args:
        images: the folder of images; None: JPEGImages beside ``annotations`` if there is one, else ``annotations``.
            An image is looked for by ``<filename>``, then by the XML file's own name, with any suffix.
        one_based: True (the original's corners) or False (edges) decides.
        masks: a SegmentationObject folder: pixels of value k belong to the k-th object of the XML file, 255 is void.
            Boxes stay those of the file. XML files without a mask are left out, with their images.

    A box with xmax <= xmin or ymax <= ymin is left out, before any shift. "difficult" objects are kept as ordinary
    ones. Boxes of ``<part>`` and ``<polygon>`` are not converted. A ``<size>`` other than the image's is an error.
    """
    xmls, databases, corners, beside = _files(annotations, (".xml",)), [], [], Path(annotations).parent / "JPEGImages"
    files = _files(images or (beside if beside.is_dir() else annotations), IMAGE_SUFFIXES)
    ids = {_keys(name)[1]: path for name, path in _files(masks, (".png",)).items()} if masks else {}

    def load(name):
        root, mask = defusedxml.ElementTree.fromstring(xmls[name].read_bytes()), ids.get(_keys(name)[1])
        if root.tag != "annotation":
            raise ValueError(f"a VOC file begins with <annotation>, not with <{root.tag}>")
        databases.append(root.findtext("source/database", ""))
        objects, values = root.findall("object"), _mask_values(mask) if mask else np.zeros((1, 1), int)
        if (last := values[values != 255].max(initial=0)) > len(objects):
            raise ValueError(f"{mask} has object {last}, but the file has {len(objects)}")
        raws = {f"object {n}": (element, mask and _rle(values == n)) for n, element in enumerate(objects, 1)}
        listed = PurePosixPath(name).parent / root.findtext("filename", "").strip().replace("\\", "/")
        size = tuple(int(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
        return [*_keys(str(listed)), *_keys(name)[1:]], size, raws

    def parse(raw, size):
        sides = {child.tag: float(child.text) for child in raw[0].iterfind("bndbox/*")}
        x1, y1, x2, y2 = box = tuple(sides[side] for side in ("xmin", "ymin", "xmax", "ymax"))
        if x1 < x2 and y1 < y2:
            corners.append((min(x1, y1), x2 == size[0] or y2 == size[1]))
        return raw[0].findtext("name", "").strip(), raw[1] or [box], box

    sources = {path: name for name, path in xmls.items() if not masks or _keys(name)[1] in ids}
    coco = _coco(files, sources, load, parse, categories)
    if one_based is None:
        first, ends, original = (
            min(corners, default=(1,))[0],
            any(end for _, end in corners),
            all("VOC20" in text for text in databases),
        )
        one_based = first >= 1 and (original or first == 1 and ends and "Unknown" not in databases)
        if first >= 1 and not original:
            way = "pixels that count from 1" if one_based else "edges that count from 0"
            warnings.warn(f"corners are taken for {way}: a guess, pass one_based=True or False", stacklevel=2)
    for fields in coco["annotations"] if one_based else ():
        x, y, w, h = fields["bbox"]
        fields |= {"bbox": [x - 1, y - 1, w + 1, h + 1], "area": fields["area"] if masks else (w + 1) * (h + 1)}
    coco["info"]["one_based"] = bool(one_based)
    return coco


def from_yolo(labels: str | Path, images: str | Path, categories: list[str]) -> dict:
    """YOLO: one text file an image, a line an object: "class cx cy width height" or "class x1 y1 x2 y2 x3 y3 ...".

    The class counts from 0 in ``categories``. Coordinates are edges, as fractions of the image's width and height: the
    left edge of the first pixel is 0, and the right edge of the last is 1. A number below -0.001 or over 1.001 is an
    error. A file may have lines of both kinds; a polygon is one object. ``labels/train/a.txt`` belongs to the image
    ``images/train/a`` with any suffix. ``classes.txt`` is passed over. An image without a label file is taken for one
    without objects, and a warning counts them; an empty label file says so itself.
    """
    files, names = _files(images, IMAGE_SUFFIXES), list(categories)
    texts = {_keys(name)[1]: path for name, path in _files(labels, (".txt",)).items() if path.name != "classes.txt"}
    stems = {_keys(name)[1]: name for name in files}
    if orphans := sorted(texts.keys() - stems.keys()):
        raise FileNotFoundError(f"{len(orphans)} label files have no image in {images}; one is {texts[orphans[0]]}")

    def load(stem):
        lines = texts[stem].read_text("utf-8-sig").splitlines() if stem in texts else [None]
        return [stem], (0, 0), {f"line {n}": line for n, line in enumerate(lines, 1) if line is None or line.strip()}

    def parse(line, size):
        if line is None:
            return "images without a label file, taken for images without objects", None
        number, *values = map(float, line.split())
        if len(values) < 4 or len(values) % 2:
            raise ValueError(f"{len(values) + 1} numbers, not 5 (box) or 7, 9, 11, ... (polygon): is one a confidence?")
        if number not in range(len(names)):
            raise ValueError(f"the class {number:g} is not from 0 to {len(names) - 1}, as the categories are")
        if not all(-0.001 <= value <= 1.001 for value in values):
            raise ValueError("a number is not from 0 to 1. Pixels have to be divided by the image's width and height")
        points = np.reshape(values, (-1, 2)) * size
        box = (*(points[0] - points[1] / 2), *(points[0] + points[1] / 2))
        return names[int(number)], [points.ravel().tolist() if len(points) > 2 else box]

    sources = {texts.get(stem, files[name]): stem for stem, name in stems.items()}
    return _coco(files, sources, load, parse, categories)


_LABELME = {
    "polygon": lambda points: np.array(points, float).ravel().tolist(),
    "rectangle": lambda points: (*np.min(points, 0).tolist(), *np.max(points, 0).tolist()),
    "circle": lambda points: _ellipse(*points[0], *[math.dist(*points)] * 2),
}


def from_labelme(folder: str | Path, categories: list[str] | None = None) -> dict:
    """LabelMe: one JSON file an image, with polygons, rectangles and circles, in the images' folder or below it.

    Points are [x, y] in pixels, and 0 is the left edge of the first pixel. Rectangles become boxes, circles polygons of
    64 points. Shapes of one label and ``group_id`` are the parts of one object, rectangles as polygons. Other shapes
    (point, line, mask, ...) are left out. Images are looked for by ``imagePath``, then by the JSON file's own name;
    ``imageData`` is not read. A stated size other than the image's is an error.
    """
    jsons = _files(folder, (".json",))

    def load(name):
        data, groups = json.loads(jsons[name].read_bytes()), {}
        for number, shape in enumerate(data["shapes"], 1):
            group = number if shape.get("group_id") is None else (shape["label"], shape["group_id"])
            groups.setdefault(group, (f"shape {number}", []))[1].append(shape)
        listed = PurePosixPath(name).parent / (data.get("imagePath") or "").replace("\\", "/")
        size = (data.get("imageWidth") or 0, data.get("imageHeight") or 0)
        return [*_keys(str(listed)), *_keys(name)[1:]], size, dict(groups.values())

    def parse(shapes, size):
        kinds = [shape.get("shape_type") or "polygon" for shape in shapes]
        if others := sorted(set(kinds) - set(_LABELME)):
            return f"objects of kind {', '.join(others)}, left out", None
        parts = [_LABELME[kind](shape["points"]) for kind, shape in zip(kinds, shapes, strict=True)]
        return shapes[0]["label"], parts

    return _coco(_files(folder, IMAGE_SUFFIXES), {path: name for name, path in jsons.items()}, load, parse, categories)


_VIA = {
    "polygon": lambda s: [v for point in zip(s["all_points_x"], s["all_points_y"], strict=True) for v in point],
    "rect": lambda s: (s["x"], s["y"], s["x"] + s["width"], s["y"] + s["height"]),
    "circle": lambda s: _ellipse(s["cx"], s["cy"], s["r"], s["r"]),
    "ellipse": lambda s: _ellipse(s["cx"], s["cy"], s["rx"], s["ry"], s.get("theta", 0)),
}


def from_via(file: str | Path, images: str | Path, categories: list[str] | None = None) -> dict:
    """VGG Image Annotator 1 and 2: one JSON file, project or export, with regions rect, polygon, circle and ellipse.

    Coordinates are in pixels, and 0 is the left edge of the first pixel; a rect covers x .. x + width. Circles and
    ellipses become polygons of 64 points. Other regions (point, polyline) are left out. The class is the region
    attribute; of several, the one called class, label, name, type or category. Without any, all objects are of the one
    class in ``categories``, or "object".
    """

    def load(key):
        regions = entries[key]["regions"]
        numbered = regions if isinstance(regions, dict) else dict(enumerate(regions))
        attributes.update(name for region in numbered.values() for name in region["region_attributes"])
        return _keys(entries[key]["filename"]), (0, 0), {f"region {n}": region for n, region in numbered.items()}

    def parse(region, size):
        named = [name for name in sorted(attributes) if len(attributes) == 1 or name.lower() in common]
        if len(named) != 1 and (attributes or len(categories or "1") != 1):
            raise ValueError(
                f"which of the attributes {sorted(attributes)} is the class? Call it 'class', or remove others"
            )
        shape, values = region["shape_attributes"], region["region_attributes"]
        if shape["name"] not in _VIA:
            return f"regions of kind {shape['name']}, left out", None
        name = values[named[0]] if named else (categories or ["object"])[0]
        if isinstance(name, dict):  # checkboxes
            (name,) = [key for key, checked in name.items() if checked]
        return name, [_VIA[shape["name"]](shape)]

    attributes, common = set(), ("class", "label", "name", "type", "category")
    data = _named(file, lambda: json.loads(Path(file).read_bytes()))
    entries = _named(file, lambda: data.get("_via_img_metadata", data))
    return _coco(_files(images, IMAGE_SUFFIXES), {f"{file}, {key}": key for key in entries}, load, parse, categories)


def from_masks(images: str | Path, masks: str | Path, kind: str, categories: list[str] | None = None) -> dict:
    """Masks: PNG or another format without loss, one channel, 0 for the background.

    - "instances": the value of a pixel is the number of its object, in 8 or 16 bit.
    - "semantic": the value k is class ``categories[k - 1]``; 255, if no mask has another value, is class 1. Each
      connected region is an object, also if it is connected by corners: objects of a class that touch become one.
    - "objects": one file an object, with one value.

    "instances" and "objects" have one category, "object" if none is given; "semantic" classes without names are called
    class_001 and so on. 255 beside other values is void, as in VOC, and left out: always with "semantic"; with
    "instances" if it is the highest value and no mask has 254.

    The masks of images/STEM.jpg are masks/STEM.png, masks/STEM_ANYTHING.png or masks/STEM/ANYTHING.png; if two stems
    fit, those of the longer. Images without a mask are left out.
    """
    if kind not in ("instances", "semantic", "objects") or kind != "semantic" and len(categories or "1") != 1:
        raise ValueError(f"kind is instances, objects (both with one category) or semantic, not {kind}, {categories}")
    files, seen, semantic = _files(images, IMAGE_SUFFIXES), set(), kind == "semantic"
    found = {_keys(name)[1]: [] for name in files}
    for name, path in _files(masks, IMAGE_SUFFIXES).items():
        stem = _keys(name)[1]
        while stem and stem not in found:
            stem = stem[: max(stem.rfind("_"), stem.rfind("/"), 0)]
        if not stem or path.samefile(files.get(name, masks)):
            raise FileNotFoundError(f"{path} is not the mask of an image in {images}")
        found[stem].append(path)

    def load(stem):
        raws = {}
        for path in found[stem]:
            values = _mask_values(path)
            ids = np.unique(values[values > 0]).tolist()
            if (len(ids) if kind == "objects" else len(found[stem])) != 1:
                detail = f"{path}, one of {len(found[stem])} files, has the values {ids[:9]}"
                raise ValueError(f"{detail}: 'objects' has one value a file, the other kinds have one file an image")
            seen.update(ids)
            for value in ids:
                parts = ndimage.label(values == value, np.ones((3, 3)))[0] if semantic else values == value
                for number in range(1, parts.max() + 1):
                    raws[f"{path.name}, value {value}, region {number}"] = value, _rle(parts == number)
        return [stem], (0, 0), raws

    def parse(raw, size):
        number, rle = raw
        if number == 255 == max(seen) and len(seen) > 1 and (semantic or kind == "instances" and 254 not in seen):
            return "void regions (255), left out", None
        number = number if semantic and seen != {255} else 1
        if number > len(categories or range(number)):
            raise ValueError(f"there are only {len(categories)} categories")
        return categories[number - 1] if categories else f"class_{number:03}" if semantic else "object", rle

    coco = _coco(
        files, {f"{masks}/{stem[2:]}": stem for stem, paths in found.items() if paths}, load, parse, categories
    )
    if kind == "instances" and len(seen) == 1 and len(files) > 1:
        warnings.warn(f"all masks have one value, {min(seen)}: are they semantic?", stacklevel=2)
    return coco


def _export(coco, folder, suffix, line, page, texts):
    """Write texts, and a page of lines an image, a line an annotation. All is checked before anything is written."""
    pages = {image["id"]: (image, []) for image in coco["images"]}

    def add(fields):
        (image, lines), (x, y, w, h) = pages[fields["image_id"]], fields["bbox"]
        size, corners = [image["width"], image["height"]], np.array([x, y, x + w, y + h])
        inside = np.clip(corners, 0, size * 2)
        if fields.get("iscrowd") or not (abs(inside - corners) <= 1).all() or not (inside[2:] > inside[:2]).all():
            raise ValueError(
                f"a crowd, or a box that is not inside of the image: {fields['bbox']}, {image['file_name']}"
            )
        lines.append(line(fields, inside, size))

    for fields in coco["annotations"]:
        _named(f"annotation {fields.get('id')}", add, fields)
    for image in coco["images"]:
        name = PurePosixPath(image["file_name"])
        path = Path(folder, name.with_suffix(suffix))
        if path in texts or ".." in name.parts or name.is_absolute() or pages[image["id"]][0] is not image:
            raise ValueError(
                f"image {image['id']}, {name}: its id or stem is used twice, or it is not inside the folder"
            )
        texts[path] = page(*pages[image["id"]])
    for path, text in texts.items():
        if path.exists() and path.read_text("utf-8") != text:
            raise FileExistsError(f"{path} is there already, with other content: choose an empty folder")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def to_yolo(coco: dict, folder: str | Path, *, segments: bool = False) -> None:
    """Write ``classes.txt``, with the categories in the order of their ids, and a text file an image, with its path.

    Every line is "class cx cy width height", or, with ``segments``, "class x1 y1 x2 y2 ..." of the polygon. 8 digits
    are written, so that :func:`from_yolo` gives the same to a thousandth of a pixel.

    Raises:
        ValueError: YOLO cannot hold it: a crowd; with ``segments``, an object of several polygons, of an RLE, or
            without a segmentation; two images with one stem. The message names it, and nothing is written.
        FileExistsError: a file is there, and has another content.
    """
    categories = sorted(coco["categories"], key=lambda category: category["id"])
    numbers = {category["id"]: str(number) for number, category in enumerate(categories)}

    def line(fields, corners, size):
        points = np.array([(corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]])
        if segments:
            parts = fields.get("segmentation")
            if not isinstance(parts, list) or len(parts) != 1 or len(parts[0]) < 6:
                raise ValueError("a YOLO line is one polygon, no parts and no RLE; segments=False writes the box")
            points = np.clip(np.reshape(parts[0], (-1, 2)), 0, size)
        return " ".join([numbers[fields["category_id"]], *(f"{v:.8g}" for v in (points / size).ravel())]) + "\n"

    names = {Path(folder, "classes.txt"): "".join(f"{category['name']}\n" for category in categories)}
    _export(coco, folder, ".txt", line, lambda image, lines: "".join(lines), names)


def to_voc(coco: dict, folder: str | Path, *, one_based: bool = False) -> None:
    """Write an XML file an image, with its path: boxes only.

    Corners are the box's edges; with ``one_based``, xmin and ymin are 1 more, as in the original. Whole numbers are
    written as such and others with three decimals, which old readers may not take. Segmentations are not written.

    Raises:
        ValueError: VOC cannot hold it: a crowd; with ``one_based`` a box of one pixel or less, which
            :func:`from_voc` would leave out; two images with one stem. The message names it; nothing is written.
        FileExistsError: a file is there, and has another content.
    """
    names = {category["id"]: escape(category["name"]) for category in coco["categories"]}

    def line(fields, corners, size):
        corners = corners + [one_based, one_based, 0, 0]
        if not (corners[2:] > corners[:2]).all():
            raise ValueError(f"the box {fields['bbox']} is too small: xmax has to be over xmin")
        texts = [str(round(value, 3)).removesuffix(".0") for value in corners.tolist()]
        box = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>".format(*texts)
        name = f"<name>{names[fields['category_id']]}</name>"
        return f"<object>{name}<difficult>0</difficult><bndbox>{box}</bndbox></object>\n"

    def page(image, lines):
        name = f"<filename>{escape(PurePosixPath(image['file_name']).name)}</filename>"
        source = f"<source><database>{'VOC2007 corners' if one_based else 'Unknown'}</database></source>"
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
        return f"<annotation>{name}{source}{size}\n{''.join(lines)}</annotation>\n"

    _export(coco, folder, ".xml", line, page, {})
