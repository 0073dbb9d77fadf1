from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tutorial_lib import sample
from tutorial_lib.penn_fudan import PennFudanDataset, boxes_from_masks
from tutorial_lib.sample import CATEGORIES, draw_scene, write_sample
from tutorial_lib.weights.pretrain import DrawnScenes


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_mask(root: Path, name: str) -> np.ndarray:
    with Image.open(root / "PedMasks" / name.replace(".png", "_mask.png")) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_layout_is_penn_fudans(sample_root):
    dataset = PennFudanDataset(sample_root)
    assert len(dataset) == 12
    stems = [Path(name).stem for name in dataset.file_names]
    assert stems == [f"DrawnPed{number:05d}" for number in range(1, 13)]
    assert sorted(path.name for path in sample_root.iterdir()) == ["Annotation", "PNGImages", "PedMasks"]
    assert sorted(path.name for path in (sample_root / "PedMasks").iterdir()) == [f"{s}_mask.png" for s in stems]
    assert sorted(path.name for path in (sample_root / "Annotation").iterdir()) == [f"{s}.txt" for s in stems]
    assert [path.name for path in sample_root.parent.iterdir()] == [sample_root.name]  # no scratch folder is left


def test_images_are_as_documented(sample_root):
    for name in PennFudanDataset(sample_root).file_names:
        with Image.open(sample_root / "PNGImages" / name) as image:
            assert image.mode == "RGB"
            assert 200 <= image.width <= 320 and 176 <= image.height <= 256
            assert np.asarray(image).std() > 2
            assert read_mask(sample_root, name).shape == (image.height, image.width)


def test_every_image_has_people_numbered_without_gaps(sample_root):
    counts = []
    for name in PennFudanDataset(sample_root).file_names:
        mask = read_mask(sample_root, name)
        sizes = np.bincount(mask.ravel())[1:]
        assert len(sizes) >= 1 and sizes.min() >= 24, name
        counts.append(len(sizes))
    assert len(set(counts)) > 1


def test_boxes_agree_with_masks(sample_root):
    for image, target in PennFudanDataset(sample_root):
        mask = read_mask(sample_root, PennFudanDataset(sample_root).file_names[target["image_id"]])
        assert image.shape[-2:] == mask.shape
        assert torch.equal(target["boxes"].as_subclass(torch.Tensor), boxes_from_masks(target["masks"]))
        for number, box in enumerate(target["boxes"].tolist(), start=1):
            y, x = np.nonzero(mask == number)
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_annotation_files_agree_with_the_boxes(sample_root):
    dataset = PennFudanDataset(sample_root)
    for index, name in enumerate(dataset.file_names):
        text = (sample_root / "Annotation" / name).with_suffix(".txt").read_text(encoding="utf-8")
        boxes = dataset.get_target(index)["boxes"].tolist()
        height, width = read_mask(sample_root, name).shape
        assert f'Image filename : "{sample_root.name}/PNGImages/{name}"' in text
        assert f"Image size (X x Y x C) : {width} x {height} x 3" in text
        assert re.search(r"Objects with ground truth : (\d+) \{ (.*) \}", text)[1] == str(len(boxes))
        found = re.findall(r"Bounding box for object (\d+) .*: \((\d+), (\d+)\) - \((\d+), (\d+)\)", text)
        numbers = [[int(n) for n in match] for match in found]
        assert [[n, x1 - 1, y1 - 1, x2, y2] for n, x1, y1, x2, y2 in numbers] == [
            [n, *box] for n, box in enumerate(boxes, start=1)
        ]


# Seeds


def test_same_seed_writes_the_same_bytes(sample_root, tmp_path):
    again = write_sample(tmp_path, num_images=12)
    assert again != sample_root and again.name == sample_root.name
    assert files_in(again) == files_in(sample_root)


def test_image_i_depends_on_the_seed_and_i_alone(sample_root, tmp_path):
    few = files_in(write_sample(tmp_path, num_images=3) / "PNGImages")
    many = files_in(sample_root / "PNGImages")
    assert len(few) == 3 and few == {name: many[name] for name in few}
    masks = files_in(write_sample(tmp_path, num_images=3) / "PedMasks")
    assert masks == {name: files_in(sample_root / "PedMasks")[name] for name in masks}


def test_another_seed_draws_other_images(sample_root, tmp_path):
    other = write_sample(tmp_path, num_images=3, seed=1)
    ours, theirs = (files_in(root / "PNGImages") for root in (sample_root, other))
    assert all(ours[name] != theirs[name] for name in theirs)
    assert other != write_sample(tmp_path, num_images=3, seed=0)


def test_sample_holds_no_scene_that_the_starter_weights_were_trained_on(sample_root):
    """Else quick's validation and test images would be known to the model before finetuning."""
    dataset = PennFudanDataset(sample_root)
    training = DrawnScenes(seed=0, start=0, length=len(dataset), train=False)
    drawn = [dataset[index][0] for index in range(len(dataset))]
    known = [(training[index][0] * 255).round().to(torch.uint8) for index in range(len(dataset))]
    assert [image.shape for image in drawn] != [image.shape for image in known]  # else they begin with the same state
    assert not any(torch.equal(ours, theirs) for ours in drawn for theirs in known)


def test_people_alone_are_labelled_in_the_sample(tmp_path, monkeypatch):
    scenes = []
    monkeypatch.setattr(
        sample, "draw_scene", lambda *args, **more: scenes.append(draw_scene(*args, **more)) or scenes[-1]
    )
    folder = write_sample(tmp_path, num_images=6)
    scenes = [scene for scene in scenes if "person" in scene[2]]
    assert any(set(labels) != {"person"} for _, _, labels in scenes)
    for name, (_, ids, labels) in zip(PennFudanDataset(folder).file_names, scenes, strict=True):
        people = [number for number, label in enumerate(labels, start=1) if label == "person"]
        expected = sum((ids == number) * k for k, number in enumerate(people, start=1))
        assert (read_mask(folder, name) == expected).all()


def test_sample_that_is_there_is_not_drawn_again(tmp_path):
    folder = write_sample(str(tmp_path / "new" / "data"), num_images=1)
    mine = folder / "PNGImages" / "DrawnPed00001.png"
    mine.write_bytes(b"mine")
    assert write_sample(tmp_path / "new" / "data", num_images=1) == folder
    assert mine.read_bytes() == b"mine"


def test_sample_that_is_broken_off_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tutorial_lib.sample._annotation", fail)
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path, num_images=2)
    assert list(tmp_path.iterdir()) == []


def test_fog_leaves_an_eighth_of_the_contrast(tmp_path, monkeypatch):
    clear = []
    fog = sample._fog
    monkeypatch.setattr(sample, "_fog", lambda rng, image: clear.append(np.asarray(image)) or fog(rng, image))
    folder = write_sample(tmp_path, num_images=6)
    for name, before in zip(PennFudanDataset(folder).file_names, clear, strict=True):
        with Image.open(folder / "PNGImages" / name) as image:
            after = np.asarray(image).astype(float)
        coarse = [np.asarray(Image.fromarray(p.astype(np.uint8)).reduce(8)).std() for p in (before, after)]
        assert 0.09 < coarse[1] / coarse[0] < 0.17 and after.mean() > 140


# draw_scene


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Image.Image, np.ndarray, list[str]]]:
    return [draw_scene(np.random.default_rng([7, number])) for number in range(40)]


def test_scene_has_one_label_for_each_instance(scenes):
    for image, ids, labels in scenes:
        assert image.mode == "RGB" and image.size == (256, 192)
        assert ids.dtype == np.uint8 and ids.shape == (192, 256)
        assert int(ids.max()) == len(labels)
        assert set(labels) <= set(CATEGORIES[1:])


def test_counted_objects_are_in_sight(scenes):
    sizes = [np.bincount(ids.ravel(), minlength=len(labels) + 1)[1:] for _, ids, labels in scenes]
    assert all((size >= 64).all() for size in sizes)
    assert sum(map(len, sizes)) > 100


def test_specks_are_not_counted():
    """In small pictures many objects have fewer than 64 pixels."""
    for number in range(60):
        _, ids, labels = draw_scene(np.random.default_rng(number), size=(48, 36), people=(4, 8))
        assert (np.bincount(ids.ravel(), minlength=len(labels) + 1)[1:] >= 64).all()


def test_scenes_hold_every_category(scenes):
    assert {label for _, _, labels in scenes for label in labels} == set(CATEGORIES[1:])


def test_scene_holds_no_more_people_than_asked_for():
    for number in range(10):
        _, _, labels = draw_scene(np.random.default_rng(number), people=(2, 3), others=(0, 0))
        assert labels.count("person") <= 3
        assert set(labels) <= {"person", "bicycle"}  # some people ride
    _, ids, labels = draw_scene(np.random.default_rng(0), people=(0, 0), others=(0, 0))
    assert labels == [] and not ids.any()


def test_edges_of_the_instances_are_edges_of_the_image(scenes):
    """Neighbouring pixels differ more where the instance changes than elsewhere, in most scenes."""
    different = []
    for image, ids, labels in scenes[:10]:
        if labels:
            pixels = np.asarray(image).astype(float)
            edge = np.zeros(ids.shape, bool)
            edge[:, 1:] = ids[:, 1:] != ids[:, :-1]
            steps = np.abs(np.diff(pixels, axis=1, prepend=pixels[:, :1])).mean(axis=2)
            different.append(steps[edge].mean() > 2 * steps[~edge].mean())
    assert np.mean(different) > 0.7


def test_same_state_draws_the_same_scene():
    (first, ids, labels), (again, ids_again, labels_again) = (draw_scene(np.random.default_rng(3)) for _ in range(2))
    assert labels == labels_again and (ids == ids_again).all()
    assert first.tobytes() == again.tobytes()


def test_person_is_label_1():
    assert CATEGORIES[:2] == ["__background__", "person"]
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 8
