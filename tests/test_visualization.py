"""Pictures: what is drawn, and where."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.visualization import draw_detector, plot_history, show


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def grey(height=20, width=30, dtype=torch.uint8):
    return (
        torch.full((3, height, width), 100, dtype=torch.uint8)
        if dtype == torch.uint8
        else torch.full((3, height, width), 100 / 255, dtype=dtype)
    )


def rectangles(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def words(axes):
    return [text.get_text() for text in axes.texts]


def pixels(axes):
    (picture,) = axes.images
    return np.asarray(picture.get_array())


@pytest.mark.parametrize(
    ("count", "columns", "grid"), [(1, 3, (1, 1)), (2, 3, (1, 2)), (3, 3, (1, 3)), (4, 3, (2, 3)), (5, 1, (5, 1))]
)
def test_one_picture_an_image(count, columns, grid):
    figure = show([grey() for _ in range(count)], columns=columns)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == grid[0] * grid[1]
    spec = figure.axes[0].get_gridspec()
    assert (spec.nrows, spec.ncols) == grid
    assert [len(axes.images) for axes in figure.axes] == [1] * count + [0] * (grid[0] * grid[1] - count)
    assert not any(axes.axison for axes in figure.axes)


def test_cell_is_the_size_of_one_picture():
    figure = show([grey() for _ in range(4)], columns=2, cell=(3.0, 2.0))
    assert tuple(figure.get_size_inches()) == (6.0, 4.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_uint8_and_float_images_look_alike(dtype):
    (axes,) = show([grey(dtype=dtype)]).axes
    assert pixels(axes).dtype == np.uint8 and pixels(axes).shape == (20, 30, 3)
    assert (abs(pixels(axes).astype(int) - 100) <= 1).all()


def test_images_of_different_sizes():
    figure = show([grey(20, 30), grey(50, 10), grey(7, 8)])
    assert [pixels(axes).shape for axes in figure.axes] == [(20, 30, 3), (50, 10, 3), (7, 8, 3)]


def test_boxes_are_drawn_on_the_edges_of_their_pixels():
    """Pixel 3 is drawn from 2.5 to 3.5."""
    boxes = torch.tensor([[3.0, 4.0, 10.0, 12.0], [0.0, 0.0, 30.0, 20.0]])
    (axes,) = show([grey()], [{"boxes": boxes, "labels": torch.tensor([1, 1])}]).axes
    first, second = rectangles(axes)
    assert first.get_xy() == (2.5, 3.5) and (first.get_width(), first.get_height()) == (7, 8)
    assert second.get_xy() == (-0.5, -0.5) and (second.get_width(), second.get_height()) == (30, 20)
    assert not first.get_fill() and first.get_edgecolor() != second.get_edgecolor()
    # The second box is the whole picture: nothing of it lies outside, and no edge of the picture outside of it.
    assert axes.get_xlim() == (-0.5, 29.5) and axes.get_ylim() == (19.5, -0.5)
    assert words(axes) == []


def test_scores_and_categories_are_written_at_the_boxes():
    target = {
        "boxes": torch.tensor([[3.0, 4.0, 10.0, 12.0], [5.0, 6.0, 9.0, 9.0]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.987, 0.5]),
    }
    categories = ["__background__", "person", "dog"]
    without_scores = {k: v for k, v in target.items() if k != "scores"}
    figure = show([grey()] * 3, [target, target, without_scores], categories=categories)
    assert words(figure.axes[0]) == ["dog 0.99", "person 0.50"]
    assert figure.axes[0].texts[1].get_position() == (4.5, 5.5)
    assert words(figure.axes[2]) == ["dog", "person"]
    assert words(show([grey()], [target]).axes[0]) == ["0.99", "0.50"]


@pytest.mark.parametrize("as_prediction", [False, True])
def test_masks_colour_their_own_pixels(as_prediction):
    masks = torch.zeros(2, 20, 30, dtype=torch.uint8)
    masks[0, 5:10, 5:10], masks[1, 12:18, 20] = 1, 1
    target = {"boxes": torch.tensor([[5.0, 5, 10, 10], [20, 12, 21, 18]]), "labels": torch.tensor([1, 1])}
    if as_prediction:  # [N, 1, H, W] in [0, 1], of which 0.5 does not count
        target |= {"masks": masks[:, None].float() * 0.3 + 0.5, "scores": torch.tensor([0.9, 0.8])}
    else:
        target["masks"] = masks
    (axes,) = show([grey()], [target]).axes
    changed = (pixels(axes) != 100).any(axis=2)
    np.testing.assert_array_equal(changed, masks.any(dim=0).numpy())
    first, second = pixels(axes)[6, 6], pixels(axes)[14, 20]
    assert (first != second).any()
    for colour, rectangle in zip((first, second), rectangles(axes), strict=True):
        blend = 0.55 * 100 + 0.45 * 255 * np.array(to_rgb(rectangle.get_edgecolor()))
        np.testing.assert_allclose(colour, blend, atol=2)


@pytest.mark.parametrize("masks", [None, (0, 20, 30), (0, 1, 20, 30)])
def test_no_objects(masks):
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    if masks is not None:
        target["masks"] = torch.zeros(masks)
    (axes,) = show([grey()], [target], categories=["__background__", "person"]).axes
    assert not rectangles(axes) and not words(axes)
    assert (pixels(axes) == 100).all()


def test_targets_that_are_none():
    boxes = {"boxes": torch.tensor([[1.0, 1, 5, 5]])}
    figure = show([grey()] * 3, [None, boxes, None])
    assert [len(rectangles(axes)) for axes in figure.axes] == [0, 1, 0]


def test_more_instances_than_colours():
    masks = torch.zeros(23, 20, 30, dtype=torch.uint8)
    for i in range(23):
        masks[i, 3, i] = 1
    target = {"boxes": torch.tensor([[i, 3.0, i + 1, 4.0] for i in range(23)]), "masks": masks}
    (axes,) = show([grey()], [target]).axes
    assert len(rectangles(axes)) == 23
    assert (pixels(axes) != 100).any(axis=2).sum() == 23


def test_titles():
    figure = show([grey(), grey()], titles=["before", "after"])
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]


@pytest.mark.parametrize("name", ["targets", "titles"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_mismatched_lengths_are_refused(name, count):
    things = {"targets": [None] * count, "titles": ["title"] * count}
    with pytest.raises(ValueError, match=f"{count} {name} for 2 images"):
        show([grey(), grey()], **{name: things[name]})


def test_the_inputs_are_left_as_they_were():
    image, masks = grey(), torch.ones(1, 20, 30, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[1.0, 1, 5, 5]]), "labels": torch.tensor([1]), "masks": masks}
    show([image], [target])
    assert (image == 100).all() and (masks == 1).all() and target["boxes"].tolist() == [[1, 1, 5, 5]]


def test_samples_of_the_data_set_can_be_drawn_and_rendered(sample_root):
    dataset = PennFudanDataset(sample_root)
    images, targets = zip(*(dataset[i] for i in range(2)), strict=True)
    figure = show(images, targets, categories=["__background__", "person"])
    figure.canvas.draw()
    for axes, target in zip(figure.axes, targets, strict=True):
        assert len(rectangles(axes)) == len(target["boxes"]) == len(words(axes)) > 0


def test_plot_history_draws_the_curves():
    curves = [{"train": [3.0, 2.0, 1.5], "validation": [3.5, 2.5, 2.6]}, {"box AP": [0.1, 0.4, 0.3]}]
    figure = plot_history(curves, ["loss", "AP"], best=2)
    assert isinstance(figure, Figure) and len(figure.axes) == 2
    for axes, panel, label in zip(figure.axes, curves, ["loss", "AP"], strict=True):
        assert axes.get_xlabel() == "epoch" and axes.get_ylabel() == label
        *lines, best = axes.lines
        assert [line.get_label() for line in lines] == list(panel)
        for line, values in zip(lines, panel.values(), strict=True):
            assert list(line.get_xdata()) == [1, 2, 3]
            assert list(line.get_ydata()) == values
        assert list(best.get_xdata()) == [2, 2] and best.get_linestyle() == "--"
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == [*panel, "best epoch, 2"]
    figure.canvas.draw()


def test_plot_history_without_a_best_epoch():
    (axes,) = plot_history([{"loss": [2.0, 1.0]}], ["loss"]).axes
    assert len(axes.lines) == 1


def test_plot_history_counts_whole_epochs():
    figure = plot_history([{"loss": [2.0, 1.0]}], ["loss"])
    figure.canvas.draw()
    ticks = figure.axes[0].get_xticks()
    assert all(tick == round(tick) for tick in ticks)


def test_plot_history_refuses_a_label_too_few():
    with pytest.raises(ValueError):
        plot_history([{"loss": [1.0]}, {"AP": [0.1]}], ["loss"])


@pytest.mark.parametrize("masks", [False, True])
def test_the_words_of_the_diagram_fit_its_boxes(masks):
    figure = draw_detector(masks)
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    figure.canvas.draw()
    boxes = [patch.get_window_extent(renderer) for patch in axes.patches]
    words = [text for text in axes.texts if text.get_text()]
    assert any("mask_predictor" in text.get_text() for text in words) is masks
    inside = 0
    for text in words:
        extent = text.get_window_extent(renderer)
        middle = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
        for box in boxes:
            if box.contains(*middle):
                assert box.x0 <= extent.x0 and extent.x1 <= box.x1 and box.y0 <= extent.y0 and extent.y1 <= box.y1
                inside += 1
    assert inside == len(boxes)
