"""Pictures of images with their targets or predictions, and of training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype
from torchvision.utils import draw_segmentation_masks

_COLOURS = colormaps["tab10"].colors


def _draw_one(axes, image: Tensor, target: dict | None, categories: Sequence[str] | None) -> None:
    pixels = to_dtype(torch.as_tensor(image), torch.uint8, scale=True).cpu()
    target = {} if target is None else target
    boxes = torch.as_tensor(target.get("boxes", torch.zeros(0, 4))).cpu()
    by_class = len(categories or ()) > 2 and "labels" in target  # the background and one class are not several
    colours = [_COLOURS[(int(target["labels"][i]) - 1 if by_class else i) % len(_COLOURS)] for i in range(len(boxes))]
    if len(target.get("masks", ())):
        masks = torch.as_tensor(target["masks"]).cpu().reshape(-1, *pixels.shape[-2:]) > 0.5
        # One by one, the best score last: where masks overlap, one call for all leaves no colour.
        for mask, colour in reversed(list(zip(masks, colours, strict=True))):
            pixels = draw_segmentation_masks(pixels, mask, 0.45, tuple(round(255 * c) for c in colour))
    axes.imshow(pixels.permute(1, 2, 0).numpy())
    height, width = pixels.shape[-2:]
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        # imshow puts the centre of pixel 0 at 0, so its left edge is at -0.5.
        corner, size = (x1 - 0.5, y1 - 0.5), (x2 - x1, y2 - y1)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colours[i], linewidth=1.6))
        name = [] if categories is None else [categories[int(target["labels"][i])]]
        score = [f"{float(target['scores'][i]):.2f}"] if "scores" in target else []
        if text := " ".join(name + score):
            box = {"facecolor": colours[i], "edgecolor": "none", "pad": 1, "alpha": 0.85}
            # Above the box, and inside it at the image's top; from its left edge, and in the right half from its right.
            right, top = x1 + x2 > width, y1 < 0.1 * height
            place = {"x": min(x2, width) - 0.5 if right else max(x1, 0) - 0.5, "y": max(y1, 0) - 0.5}
            place |= {"ha": "right" if right else "left", "va": "top" if top else "bottom"}
            axes.text(s=text, **place, fontsize=8, color="white", bbox=box, clip_on=True)


def show(
    images: Sequence[Tensor],
    targets: Sequence[dict | None] | None = None,
    titles: Sequence[str] | None = None,
    *,
    columns: int = 3,
    categories: Sequence[str] | None = None,
    cell: tuple[float, float] = (4.2, 3.6),
) -> Figure:
    """Images in a grid, with boxes and masks drawn on them.

    Each instance has its own colour; with ``categories`` of several classes, each class has.

    Args:
        images: uint8 in [0, 255] or float in [0, 1], [3, H, W], of any sizes.
        targets: for every image a target or a prediction, or None. ``masks`` may be
            [N, H, W] or [N, 1, H, W] and are cut at 0.5; ``scores`` are written on the
            boxes, and so are the names of ``labels`` when ``categories`` are given.
        cell: width and height of one picture, in inches.

    Returns:
        The figure; ``plt.show()`` shows it.

    Raises:
        ValueError: there are no images, or not as many targets or titles as images.
    """
    if not len(images):
        raise ValueError("there are no images to show")
    for name, things in (("targets", targets), ("titles", titles)):
        if things is not None and len(things) != len(images):
            raise ValueError(f"{len(things)} {name} for {len(images)} images")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(cell[0] * columns, cell[1] * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.axis("off")
    for i, (axes, image) in enumerate(zip(grid.flat, images, strict=False)):
        _draw_one(axes, image, None if targets is None else targets[i], categories)
        if titles is not None:
            axes.set_title(titles[i], fontsize=10)
    return figure


def plot_history(
    curves: Sequence[dict[str, Sequence[float]]], labels: Sequence[str], *, best: int | None = None
) -> Figure:
    """Curves over epochs, side by side.

    Args:
        curves: for every panel, its curves by name, each with one value an epoch.
        labels: the panels' y-axis labels.
        best: the epoch (from 1) to mark with a dashed line.
    """
    figure, panels = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.2), squeeze=False, layout="constrained")
    for axes, panel, label in zip(panels.flat, curves, labels, strict=True):
        for name, values in panel.items():
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
        if best is not None:
            axes.axvline(best, color="grey", linestyle="--", linewidth=1, label=f"best epoch, {best}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
