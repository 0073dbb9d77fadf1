"""Draws pedestrians in PennFudan's folder layout: the dataset that needs no download.

Every scene is made by code from a seed, so it can be kept, changed and shared
freely. The pictures are simple on purpose: they are there so that each line of
the notebooks runs anywhere, not to replace photographs.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CATEGORIES = ["__background__", "person", "bicycle", "car", "dog", "tree", "bin", "sign"]
"""What a scene can hold, in the order of its labels; 0 is the background."""

VERSION = 2  # of the sample; raise it when the same seed gives other files
_FILES = {"PNGImages": ".png", "PedMasks": "_mask.png", "Annotation": ".txt"}
_SUPERSAMPLE = 2  # drawn this much larger, then reduced, for smooth edges
_SKIN = [(241, 205, 177), (224, 172, 135), (198, 134, 92), (141, 85, 54), (92, 56, 36)]
_HAIR = [(28, 22, 20), (60, 42, 30), (110, 78, 46), (176, 140, 84), (150, 150, 150)]
_LAMPS = [(255, 220, 160), (255, 180, 120), (200, 220, 255)]
_DUSK = np.array([(110, 100, 170), (240, 170, 150), (150, 110, 140)])  # of the haze: top, middle and bottom
_CLOTHES = [
    (30, 32, 38), (60, 64, 72), (118, 120, 124), (222, 222, 218), (36, 52, 92), (70, 100, 150), (130, 40, 44),
    (176, 60, 50), (60, 90, 60), (170, 150, 116), (112, 84, 60), (206, 170, 70), (140, 90, 130), (80, 140, 150),
    (240, 236, 226),
]  # fmt: skip


def _choose(rng: np.random.Generator, colours: list, spread: int = 18) -> tuple[int, int, int]:
    colour = np.asarray(colours[rng.integers(len(colours))]) + rng.integers(-spread, spread + 1, 3)
    return tuple(int(c) for c in colour.clip(0, 255))


# Every object is a list of parts in its own units: x to the right, y up from the
# ground at 0, one unit high. ("line", points, width, colour) has round ends;
# ("ellipse", (x, y), (rx, ry), colour); ("ring", ..., width, colour); ("polygon", points, colour).
# A mask follows the outline, as annotators draw it: a ring's inside belongs to it, and
# a polygon without a colour is in the mask alone.


def _person(rng: np.random.Generator, riding: bool = False) -> list[tuple]:
    skin, hair = _choose(rng, _SKIN), _choose(rng, _HAIR)
    top, bottom, shoes = (_choose(rng, _CLOTHES) for _ in range(3))
    broad, build = rng.uniform(0.55, 1.1), rng.uniform(0.85, 1.25)  # broad is seen from the front, narrow from the side
    stride = rng.uniform(0.25, 0.5) if rng.random() < 0.55 else rng.uniform(0.0, 0.12)
    lean = rng.uniform(0.10, 0.28) if riding else rng.normal(0, 0.015)
    hip_y, shoulder_y = rng.uniform(0.47, 0.52), rng.uniform(0.80, 0.83)
    shoulder, hip = 0.105 * broad * build, 0.075 * broad * build
    leg, arm = 0.062 * build, 0.047 * build
    parts: list[tuple] = []

    def limb(start, angles, lengths, width, colour):
        points = [start]
        for angle, length in zip(angles, lengths, strict=True):
            x, y = points[-1]
            points.append((x + length * math.sin(angle), y - length * math.cos(angle)))
        parts.append(("line", points, width, colour))
        return points[-1]

    def draw_leg(side, angle):
        if riding:
            angle, knee = rng.uniform(0.5, 1.1), rng.uniform(-0.5, -0.1)
        else:
            knee = angle - rng.uniform(0.0, 0.6) * (angle < 0) - rng.uniform(0, 0.05)
        bare = skin if shorts else bottom
        x = side * hip * (0.6 if broad > 0.8 else 0.25)
        foot = limb((x, hip_y), (angle, knee), (0.24, 0.23), leg, bare)
        parts.append(("line", [(x, hip_y), _towards((x, hip_y), angle, 0.20)], leg * 1.2, bottom))
        parts.append(("line", [foot, (foot[0] + rng.uniform(0.02, 0.07), foot[1] - 0.012)], 0.04, shoes))

    def draw_arm(side, angle):
        start = (side * shoulder + lean, shoulder_y - 0.02)
        elbow = angle + rng.uniform(0.0, 0.7) + (0.6 if riding else 0)
        hand = limb(start, (angle, elbow), (0.16, 0.14), arm, top)
        parts.append(("ellipse", hand, (0.024, 0.028), skin))
        return hand

    shorts, swing = rng.random() < 0.15, stride * rng.uniform(0.5, 1.2)
    draw_arm(-1, -swing if not riding else 0.9)
    draw_leg(-1, -stride)
    draw_leg(1, stride)
    if rng.random() < 0.18 and not riding:  # a skirt or a long coat
        hem, flare = rng.uniform(0.2, 0.36), hip * rng.uniform(1.1, 1.7)
        skirt = [(-hip, hip_y + 0.05), (hip, hip_y + 0.05), (flare, hem), (-flare, hem)]
        parts.append(("polygon", skirt, top if rng.random() < 0.5 else bottom))
    if rng.random() < 0.2:  # a backpack
        parts.append(("ellipse", (lean - shoulder, 0.68), (0.07, 0.11), _choose(rng, _CLOTHES)))
    low = hip_y - rng.uniform(0.0, 0.05)
    torso = [(-shoulder + lean, shoulder_y), (-0.03 + lean, 0.86), (0.03 + lean, 0.86), (shoulder + lean, shoulder_y)]
    parts.append(("polygon", [*torso, (hip * 1.15, low), (-hip * 1.15, low)], top))
    parts.append(("line", [(-shoulder + lean, 0.8), (shoulder + lean, 0.8)], 0.05, top))
    if rng.random() < 0.3:  # an open jacket shows what is under it
        under = [(lean - 0.02, 0.84), (lean + 0.02, 0.84), (0.025, low), (-0.025, low)]
        parts.append(("polygon", under, _choose(rng, _CLOTHES)))
    hand = draw_arm(1, swing if not riding else 0.7)
    if rng.random() < 0.25 and not riding:  # carrying a bag
        bag, (x, y) = _choose(rng, _CLOTHES), hand
        w, h = rng.uniform(0.05, 0.09), rng.uniform(0.08, 0.14)
        box = [(x - w, y - 0.03), (x + w, y - 0.03), (x + w, y - h - 0.03), (x - w, y - h - 0.03)]
        parts.append(("polygon", box, bag))
        parts.append(("line", [(x, y), (x, y - 0.04)], 0.015, bag))
    head = (lean * 1.25 + rng.normal(0, 0.008), 0.925)
    parts.append(("line", [(lean, 0.83), head], 0.05, skin))
    parts.append(("ellipse", head, (0.047, 0.062), skin))
    if rng.random() < 0.3:  # seen from behind
        parts.append(("ellipse", (head[0], head[1] + 0.01), (0.05, 0.062), hair))
    else:
        parts.append(("ellipse", (head[0], head[1] + 0.035), (0.05, 0.04), hair))
    if rng.random() < 0.15:
        parts.append(("ellipse", (head[0], head[1] + 0.045), (0.06, 0.03), _choose(rng, _CLOTHES)))
    return parts


def _towards(start, angle, length):
    return (start[0] + length * math.sin(angle), start[1] - length * math.cos(angle))


def _bicycle(rng: np.random.Generator) -> list[tuple]:
    frame, tyre = _choose(rng, _CLOTHES, 40), _choose(rng, [(25, 25, 25), (60, 60, 60)])
    r = 0.33
    back, front, pedal, seat, bar = (-0.52, r), (0.52, r), (-0.05, r), (-0.2, 0.85), (0.4, 0.92)
    lines = [(back, pedal), (pedal, seat), (seat, back), (seat, (0.42, 0.8)), (pedal, (0.42, 0.8)), (front, bar)]
    parts: list[tuple] = [("ring", hub, (r, r), 0.06, tyre) for hub in (back, front)]
    parts.append(("polygon", [back, seat, bar, front], None))
    parts += [("line", list(line), 0.055, frame) for line in lines]
    parts.append(("line", [(-0.3, 0.88), (-0.1, 0.88)], 0.07, tyre))
    parts.append(("line", [bar, (0.28, 0.98)], 0.05, tyre))
    return parts


def _car(rng: np.random.Generator) -> list[tuple]:
    paint, glass = _choose(rng, _CLOTHES, 40), _choose(rng, [(60, 76, 88), (150, 176, 190)])
    front, back = rng.uniform(0.45, 0.8), rng.uniform(0.6, 1.1)
    body = [(-1.45, 0.22), (-1.45, 0.52), (-back, 0.62), (front, 0.6), (1.4, 0.5), (1.45, 0.22)]
    cabin = [(-back - 0.1, 0.6), (-back * 0.75, 0.98), (front * 0.35, 1.0), (front + 0.05, 0.58)]
    window = [(-back * 0.95, 0.62), (-back * 0.7, 0.91), (front * 0.3, 0.93), (front * 0.85, 0.6)]
    parts = [("polygon", body, paint), ("polygon", cabin, paint), ("polygon", window, glass)]
    parts.append(("line", [(-0.2, 0.6), (-0.2, 0.93)], 0.06, paint))
    for x in (-0.85, 0.85):
        parts.append(("ellipse", (x, 0.2), (0.22, 0.2), (24, 24, 26)))
        parts.append(("ellipse", (x, 0.2), (0.11, 0.1), (140, 140, 144)))
    return parts


def _dog(rng: np.random.Generator) -> list[tuple]:
    fur = _choose(rng, _HAIR, 25)
    parts = [("line", [(x, 0.5), (x + rng.uniform(-0.12, 0.12), 0.04)], 0.11, fur) for x in (-0.4, -0.28, 0.28, 0.4)]
    parts.append(("line", [(-0.42, 0.56), (0.38, 0.58)], rng.uniform(0.26, 0.38), fur))
    parts.append(("line", [(0.4, 0.62), (0.58, 0.86)], 0.18, fur))
    parts.append(("ellipse", (0.62, 0.86), (0.17, 0.13), fur))
    parts.append(("line", [(0.66, 0.82), (0.84, 0.78)], 0.12, fur))
    parts.append(("line", [(-0.5, 0.6), (-0.72, rng.uniform(0.5, 0.95))], 0.07, fur))
    return parts


def _tree(rng: np.random.Generator) -> list[tuple]:
    trunk = _choose(rng, [(84, 62, 44), (110, 96, 80)])
    leaf = (rng.integers(40, 120), rng.integers(80, 150), rng.integers(30, 80))
    parts: list[tuple] = [("line", [(0, 0.0), (rng.normal(0, 0.02), 0.6)], rng.uniform(0.06, 0.12), trunk)]
    for _ in range(rng.integers(8, 18)):
        tone = rng.uniform(0.7, 1.2)
        shade = tuple(int(c * tone) for c in leaf)
        centre = (rng.normal(0, 0.14), rng.uniform(0.5, 0.88))
        parts.append(("ellipse", centre, tuple(rng.uniform(0.08, 0.16, 2)), shade))
    return parts


def _bin(rng: np.random.Generator) -> list[tuple]:
    paint = _choose(rng, _CLOTHES, 40)
    low, high = rng.uniform(0.2, 0.3), rng.uniform(0.28, 0.36)
    parts = [("polygon", [(-low, 0), (low, 0), (high, 0.85), (-high, 0.85)], paint)]
    parts.append(("ellipse", (0, 0.86), (high * 1.05, rng.uniform(0.06, 0.14)), tuple(int(c * 0.6) for c in paint)))
    return parts


def _sign(rng: np.random.Generator) -> list[tuple]:
    paint, rim = _choose(rng, [(190, 40, 40), (40, 70, 160), (230, 200, 60), (235, 235, 235)]), _choose(rng, _CLOTHES)
    parts: list[tuple] = [("line", [(0, 0), (0, 0.9)], 0.05, (120, 122, 124))]
    if rng.random() < 0.5:
        parts += [("ellipse", (0, 0.83), (0.17, 0.17), rim), ("ellipse", (0, 0.83), (0.13, 0.13), paint)]
    else:
        board = [(-0.17, 0.66), (0.17, 0.66), (0.17, 0.99), (-0.17, 0.99)]
        parts += [("polygon", board, paint), ("line", [(-0.1, 0.83), (0.1, 0.83)], 0.06, rim)]
    return parts


# How each category is drawn, and how tall it is beside a person.
_OBJECTS = {
    "person": (_person, (0.92, 1.08)), "bicycle": (_bicycle, (0.52, 0.6)), "car": (_car, (0.75, 0.95)),
    "dog": (_dog, (0.28, 0.5)), "tree": (_tree, (1.3, 2.4)), "bin": (_bin, (0.5, 0.8)), "sign": (_sign, (1.1, 1.6)),
}  # fmt: skip


def _draw_parts(draws: list[ImageDraw.ImageDraw], parts: list[tuple], x: float, y: float, height: float, flip: int):
    """Draw parts on several canvases at once; every canvas after the first is filled with white."""

    def place(points):
        return [(x + flip * px * height, y - py * height) for px, py in points]

    for kind, where, *rest, colour in parts:
        for draw, fill in zip(draws, [colour] + [255] * (len(draws) - 1), strict=True):
            if fill is None:
                continue
            if kind == "polygon":
                draw.polygon(place(where), fill=fill)
            elif kind == "line":
                width = max(rest[0] * height, 1)
                points = place(where)
                draw.line(points, fill=fill, width=round(width), joint="curve")
                for px, py in points:
                    draw.ellipse((px - width / 2, py - width / 2, px + width / 2, py + width / 2), fill=fill)
            else:
                ((px, py),) = place([where])
                rx, ry = rest[0][0] * height, rest[0][1] * height
                box = (px - rx, py - ry, px + rx, py + ry)
                if kind == "ellipse" or fill == 255:
                    draw.ellipse(box, fill=fill)
                else:
                    draw.ellipse(box, outline=fill, width=max(round(rest[1] * height), 1))


def _noise(rng: np.random.Generator, width: int, height: int, cells: int) -> np.ndarray:
    """Smooth noise in about [-1, 1] with `cells` bumps across, float32 [height, width]."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (max(cells * height // width, 2), cells)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator, width: int, height: int, horizon: float) -> Image.Image:
    sky = _choose(rng, [(170, 196, 226), (214, 218, 222), (150, 150, 152), (120, 128, 140), (196, 180, 160)], 25)
    ground = _choose(rng, [(128, 126, 122), (160, 152, 140), (96, 98, 100), (104, 124, 76), (150, 120, 96)], 20)
    image = Image.new("RGB", (width, height), sky)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 5)):  # walls with windows and doors
        x, w = rng.uniform(-0.2, 1) * width, rng.uniform(0.15, 0.7) * width
        top = rng.uniform(-0.2, horizon) * height
        wall = _choose(rng, _CLOTHES + [(180, 150, 130), (150, 90, 74), (206, 200, 188)], 25)
        draw.rectangle((x, top, x + w, horizon * height), fill=wall)
        step, pane = rng.uniform(0.06, 0.2) * width, _choose(rng, [(60, 70, 84), (150, 170, 190), (230, 220, 180)], 30)
        share = rng.uniform(0.3, 0.8)
        for wx in np.arange(x + step * 0.3, x + w - step * 0.5, step):
            for wy in np.arange(top + step * 0.3, horizon * height, step * rng.uniform(1.0, 1.6)):
                draw.rectangle((wx, wy, wx + step * share, wy + step * share), fill=pane)
    draw.rectangle((0, horizon * height, width, height), fill=ground)
    for _ in range(rng.integers(0, 7)):  # kerbs, stripes, poles, patches
        x, y = rng.uniform(0, width), rng.uniform(horizon, 1) * height
        colour = _choose(rng, _CLOTHES + [ground], 30)
        kind = rng.integers(3)
        if kind == 0:
            draw.line((0, y, width, y + rng.normal(0, 0.1) * height), fill=colour, width=int(rng.integers(2, 12)))
        elif kind == 1:
            draw.rectangle((x, y * rng.uniform(0.1, 0.7), x + rng.integers(3, 14), y), fill=colour)
        else:
            rx, ry = rng.uniform(0.02, 0.2) * width, rng.uniform(0.01, 0.12) * height
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)
    return image


def draw_scene(
    rng: np.random.Generator,
    size: tuple[int, int] = (256, 192),
    people: tuple[int, int] = (1, 5),
    others: tuple[int, int] = (0, 4),
) -> tuple[Image.Image, np.ndarray, list[str]]:
    """Draw one street scene.

    Args:
        rng: the source of every choice; the same state draws the same scene.
        size: width and height in pixels.
        people: the fewest and the most people that are placed.
        others: the fewest and the most things of other categories.

    Returns:
        The image (RGB), the instances (uint8 [H, W], 0 where there is none, k where
        the k-th object is seen) and the objects' category names in that order. An
        object of which less than a quarter, or fewer than 64 pixels, is left in sight
        is drawn but not counted.
    """
    width, height = size[0] * _SUPERSAMPLE, size[1] * _SUPERSAMPLE
    horizon = rng.uniform(0.25, 0.62)
    image = _background(rng, width, height, horizon)
    names = ["person"] * int(rng.integers(people[0], people[1] + 1))
    names += rng.choice(CATEGORIES[2:], int(rng.integers(others[0], others[1] + 1))).tolist()
    scale = np.exp(rng.uniform(np.log(0.5), np.log(1.0)))  # height of a person in the front
    crowd = rng.uniform(0.2, 0.8) if rng.random() < 0.35 else None  # people close together
    things = []
    for name in names:
        depth = rng.uniform(0, 1)
        feet = horizon + (1 - horizon) * (0.25 + 0.75 * depth)
        build, (low, high) = _OBJECTS[name]
        tall = scale * (0.55 + 0.45 * depth) * rng.uniform(low, high)
        middle = rng.uniform(0.03, 0.97)
        if crowd is not None and name == "person":
            middle = float(np.clip(crowd + rng.normal(0, 0.12), 0.02, 0.98))
        flip = 1 if rng.random() < 0.5 else -1
        place = (middle * width, min(feet, 1.05) * height, tall * height, flip)
        riding = name == "person" and rng.random() < 0.12
        if riding:
            things.append((depth, "bicycle", _bicycle(rng), (*place[:2], place[2] * 0.58, flip)))
            place = (place[0] - flip * 0.12 * place[2], place[1] - 0.1 * place[2], *place[2:])
        parts = build(rng, riding) if name == "person" else build(rng)
        things.append((depth + 0.001 * riding, name, parts, place))
    things.sort(key=lambda thing: thing[0])

    draw = ImageDraw.Draw(image)
    ids, whole = np.zeros((size[1], size[0]), np.uint8), []
    shadow = rng.uniform(0.5, 0.95)
    for k, (_, _, parts, (x, y, tall, flip)) in enumerate(things, start=1):
        dark = tuple(int(c * shadow) for c in image.getpixel((int(np.clip(x, 0, width - 1)), int(min(y, height - 1)))))
        draw.ellipse((x - tall * 0.2, y - tall * 0.03, x + tall * 0.3, y + tall * 0.03), fill=dark)
        mask = Image.new("L", (width, height))
        _draw_parts([draw, ImageDraw.Draw(mask)], parts, x, y, tall, flip)
        seen = np.asarray(mask.reduce(_SUPERSAMPLE)) >= 128
        ids[seen] = k
        whole.append(int(seen.sum()))

    kept, labels = np.zeros_like(ids), []
    for k, (_, name, _, _) in enumerate(things, start=1):
        area = int((ids == k).sum())
        if area >= 64 and area * 4 >= whole[k - 1]:
            labels.append(name)
            kept[ids == k] = len(labels)
    return _light(rng, image.reduce(_SUPERSAMPLE), ids), kept, labels


def _light(rng: np.random.Generator, image: Image.Image, ids: np.ndarray) -> Image.Image:
    """Texture, shading, exposure, blur and noise, as a camera would add them."""
    width, height = image.size
    pixels = np.asarray(image).astype(np.float32)
    count = int(ids.max()) + 1
    for cells in (4, 12, 40, 90):  # each object has a texture of its own strength, the background a stronger one
        strength = (rng.uniform(0, 0.12, count) * np.where(np.arange(count), 1, 1.6)).astype(np.float32)[ids]
        pixels *= 1 + (strength * _noise(rng, width, height, cells))[..., None]
    stripes = np.sin(np.arange(height)[:, None] * rng.uniform(0.4, 1.6) + rng.uniform(0, 6))
    striped = ((rng.random(count) < 0.15) & (np.arange(count) > 0)).astype(np.float32)[ids]
    pixels *= 1 + 0.2 * (striped * stripes)[..., None]
    pixels *= 1 + rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    pixels *= rng.uniform(0.6, 1.25) * rng.uniform(0.88, 1.12, 3)
    pixels = 255 * (pixels.clip(0, 255) / 255) ** rng.uniform(0.75, 1.35)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.4, 1.2)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
    pixels = np.asarray(image) + rng.normal(0, rng.uniform(0, 8), (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _dusk(rng: np.random.Generator, image: Image.Image, ids: np.ndarray) -> Image.Image:
    """The scene in the haze of dusk, which lets a sixth of the contrast through, with lamps behind and some noise."""
    height, width = ids.shape
    colours = _DUSK + rng.uniform(-12, 12, _DUSK.shape)
    haze = np.stack([np.interp(np.linspace(0, 2, height), range(3), colour) for colour in colours.T], axis=1)
    pixels = haze[:, None] + rng.uniform(0.14, 0.20) * (np.asarray(image).astype(np.float32) - 128)
    lamps = Image.new("RGB", image.size)
    for _ in range(rng.integers(2, 7)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, 0.45) * height, rng.uniform(2, 10)
        ImageDraw.Draw(lamps).ellipse((x - r, y - r, x + r, y + r), fill=_choose(rng, _LAMPS))
    lamps = np.asarray(lamps.filter(ImageFilter.GaussianBlur(1)))
    pixels += 0.3 * lamps * (ids == 0)[..., None] + rng.normal(0, 1.5, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_sample(root: str | Path, num_images: int = 64, seed: int = 0) -> Path:
    """Write synthetic street scenes as a dataset in PennFudan's layout, unless it is there already.

    Only people are labelled, as in PennFudan; cars, trees and dogs are left for the
    detector to tell apart. It is dusk: the starter weights have only seen the light
    of day. Image i depends on (seed, i) only.

    Args:
        root: the folder to put the dataset in; made if need be.
        num_images: how many images, each with at least one person; some tens of milliseconds each.
        seed: of all that is random.

    Returns:
        The dataset's folder, for ``PennFudanDataset``: ``PNGImages`` (RGB, 200 to 320
        pixels wide, 176 to 256 high), ``PedMasks`` and ``Annotation``. It appears
        only when it is complete.

    Raises:
        RuntimeError: the folder is there, and does not hold all of this sample.
    """
    folder = Path(root) / f"DuskPed-{num_images}-{seed}-v{VERSION}"
    stems = [f"DrawnPed{number + 1:05d}" for number in range(num_images)]
    if folder.exists():
        return _whole(folder, stems)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="DrawnPed.") as scratch:
        drawn = Path(scratch) / folder.name
        for name in _FILES:
            (drawn / name).mkdir(parents=True)
        for number, stem in enumerate(stems):
            rng = np.random.default_rng([seed, number, 1])  # not the scenes of tools/pretrain.py
            people = 0
            while not people:
                size = (int(rng.integers(200, 320)), int(rng.integers(176, 256)))
                image, ids, labels = draw_scene(rng, size, people=(1, 3), others=(0, 3))
                people = labels.count("person")
            image = _dusk(rng, image, ids)
            # Renumber 1 to N, people only.
            is_person = np.array(["", *labels]) == "person"
            mask = (np.cumsum(is_person) * is_person).astype(np.uint8)[ids]
            image.save(drawn / "PNGImages" / f"{stem}.png")
            Image.fromarray(mask).save(drawn / "PedMasks" / f"{stem}_mask.png")
            (drawn / "Annotation" / f"{stem}.txt").write_text(_annotation(folder.name, stem, mask), encoding="utf-8")
        try:
            drawn.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return _whole(folder, stems)


def _whole(folder: Path, stems: list[str]) -> Path:
    for name, ending in _FILES.items():
        if {path.name for path in folder.glob(f"{name}/*")} != {stem + ending for stem in stems}:
            raise RuntimeError(f"{folder / name} does not hold the files of the sample; delete {folder} and try again")
    return folder


def _annotation(root: str, stem: str, mask: np.ndarray) -> str:
    """What PennFudan's Annotation files say, in their words: boxes are 1-based and inclusive."""
    height, width = mask.shape
    people = int(mask.max())
    kind = '"PASpersonWalking"'
    lines = [
        "# Compatible with PASCAL Annotation Version 1.00",
        f'Image filename : "{root}/PNGImages/{stem}.png"',
        f"Image size (X x Y x C) : {width} x {height} x 3",
        'Database : "Drawn pedestrians"',
        f"Objects with ground truth : {people} {{ {' '.join([kind] * people)} }}",
        "# Top left pixel co-ordinates : (1, 1)",
    ]
    for k in range(1, people + 1):
        y, x = np.nonzero(mask == k)
        box = f"({x.min() + 1}, {y.min() + 1}) - ({x.max() + 1}, {y.max() + 1})"
        lines += [
            f"# Details for pedestrian {k} ({kind})",
            f'Original label for object {k} {kind} : "DrawnPed"',
            f"Bounding box for object {k} {kind} (Xmin, Ymin) - (Xmax, Ymax) : {box}",
            f'Pixel mask for object {k} {kind} : "{root}/PedMasks/{stem}_mask.png"',
        ]
    return "\n".join(lines) + "\n"
