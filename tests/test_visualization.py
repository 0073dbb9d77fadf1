"""Pictures: what is on them, and where."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from tutorial_lib.visualization import plot_history, show


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def grey(height=20, width=30):
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def words(axes):
    return [text.get_text() for text in axes.texts]


def pixels(axes):
    (picture,) = axes.images
    return np.asarray(picture.get_array())


def test_one_picture_an_image():
    for count, columns, rows, across in ((1, 3, 1, 1), (2, 3, 1, 2), (4, 3, 2, 3), (5, 1, 5, 1)):
        figure = show([grey(20 + i) for i in range(count)], columns=columns, cell=(3.0, 2.0))
        spec = figure.axes[0].get_gridspec()
        assert (spec.nrows, spec.ncols) == (rows, across)
        assert tuple(figure.get_size_inches()) == (3.0 * across, 2.0 * rows)
        assert [pixels(axes).shape for axes in figure.axes[:count]] == [(20 + i, 30, 3) for i in range(count)]
        assert not any(len(axes.images) for axes in figure.axes[count:]) and not any(a.axison for a in figure.axes)
    images = [grey(), grey() / 255, (grey() / 255).half()]
    figure = show(images, titles=["uint8", "float32", "float16"])
    assert [axes.get_title() for axes in figure.axes] == ["uint8", "float32", "float16"]
    assert all(pixels(axes).dtype == np.uint8 and (abs(pixels(axes) - 100.0) <= 1).all() for axes in figure.axes)
    for message, more in (("1 targets for 2", {"targets": [None]}), ("3 titles for 2", {"titles": ["title"] * 3})):
        with pytest.raises(ValueError, match=f"{message} images"):
            show([grey(), grey()], **more)
    with pytest.raises(ValueError, match="no images"):
        show([])


def test_boxes_lie_on_the_edges_of_their_pixels_with_names_and_scores():
    """Pixel 3 goes from 2.5 to 3.5."""
    boxes, labels = torch.tensor([[3.0, 4.0, 10.0, 12.0], [0.0, 0.0, 30.0, 20.0]]), torch.tensor([2, 1])
    target = {"boxes": boxes, "labels": labels}
    found = {**target, "scores": torch.tensor([0.987, 0.5])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    nothing = [None, none, {**none, "masks": torch.zeros(0, 20, 30)}, {**none, "masks": torch.zeros(0, 1, 20, 30)}]
    figure = show([grey()] * 6, [target, found, *nothing], categories=["__background__", "person", "dog"])
    assert [words(axes) for axes in figure.axes] == [["dog", "person"], ["dog 0.99", "person 0.50"], [], [], [], []]
    assert all((pixels(axes) == 100).all() for axes in figure.axes)
    assert [len(axes.patches) for axes in figure.axes] == [2, 2, 0, 0, 0, 0]
    assert words(show([grey()], [found]).axes[0]) == ["0.99", "0.50"] and not words(show([grey()], [target]).axes[0])
    figure.canvas.draw()
    axes, (first, second) = figure.axes[0], figure.axes[0].patches
    assert first.get_bbox().bounds == (2.5, 3.5, 7, 8) and second.get_bbox().bounds == (-0.5, -0.5, 30, 20)
    assert not first.get_fill() and first.get_edgecolor() != second.get_edgecolor()
    assert axes.texts[0].get_position() == (2.5, 3.5)
    # The second box is the whole picture: nothing of it lies outside, and no edge of the picture outside of it.
    assert axes.get_xlim() == (-0.5, 29.5) and axes.get_ylim() == (19.5, -0.5)


@pytest.mark.parametrize("size", [(200, 300), (150, 400), (400, 150)])
def test_names_are_not_cut_off_at_any_edge(size):
    height, width = size
    lefts, tops = (0, width // 2 - 10, width - 20), (0, height // 2, height - 30)
    boxes = torch.tensor([[x, y, x + 20, y + 30] for x in lefts for y in tops], dtype=torch.float32)
    target = {"boxes": boxes, "labels": torch.ones(9, dtype=torch.int64), "scores": torch.ones(9)}
    figure = show([grey(*size)] * 2, [target] * 2, categories=["__background__", "person"])
    figure.canvas.draw()
    for axes in figure.axes:
        inside = axes.get_window_extent().expanded(1.001, 1.001)
        for text in axes.texts:
            corners = text.get_window_extent().corners()
            assert all(inside.contains(*corner) for corner in corners), (size, text.get_position())


def test_several_classes_have_a_colour_each_and_one_class_a_colour_an_instance():
    target = {"boxes": torch.tensor([[0.0, 0, 9, 9]] * 3), "labels": torch.tensor([1, 2, 1])}
    for categories, same in ((["__background__", "cat", "dog"], True), (None, False)):
        first, other, again = (
            patch.get_edgecolor() for patch in show([grey()], [target], categories=categories).axes[0].patches
        )
        assert (first == again) is same and first != other


def test_masks_colour_their_own_pixels():
    """Of a target and of a prediction, where 0.5 does not count; and of more instances than there are colours."""
    masks = torch.zeros(23, 20, 30, dtype=torch.uint8)
    for i in range(23):
        masks[i, 3, i] = masks[i, 12:18, i] = 1
    target = {"boxes": torch.tensor([[i, 3.0, i + 1, 18.0] for i in range(23)]), "masks": masks}
    figure = show([grey()] * 2, [target, {**target, "masks": masks[:, None] * 0.3 + 0.5}])
    for axes in figure.axes:
        np.testing.assert_array_equal((pixels(axes) != 100).any(axis=2), masks.any(dim=0).numpy())
        for i, box in enumerate(axes.patches):
            blend = 0.55 * 100 + 0.45 * 255 * np.array(to_rgb(box.get_edgecolor()))
            np.testing.assert_allclose(pixels(axes)[14, i], blend, atol=2)
    assert masks.max() == 1 and len(axes.patches) == 23


def test_plot_history_shows_the_curves():
    curves = [{"train": [3.0, 2.0, 1.5], "validation": [3.5, 2.5, 2.6]}, {"box AP": [0.1, 0.4, 0.3]}]
    for best in (2, None):
        figure = plot_history(curves, ["loss", "AP"], best=best)
        figure.canvas.draw()
        for axes, panel, label in zip(figure.axes, curves, ["loss", "AP"], strict=True):
            assert axes.get_xlabel() == "epoch" and axes.get_ylabel() == label
            lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
            marked = {f"best epoch, {best}": ([best, best], [0, 1])} if best else {}
            assert lines == {name: ([1, 2, 3], values) for name, values in panel.items()} | marked
            assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
            assert all(tick == round(tick) for tick in axes.get_xticks())
    with pytest.raises(ValueError):
        plot_history(curves, ["loss"])
