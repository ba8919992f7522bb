from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from aligndet.data.augmentations import AUGMENTATIONS, AugmentationName, _RandomSizeCrop
from aligndet.data.formats import read_labelled
from aligndet.data.images import MIN_SIDE
from aligndet.data.labelled import Labelled, LabelledDataset

BOXES = [[10, 10, 30, 20], [50, 30, 20, 40], [90, 15, 24, 24], [5, 50, 40, 28]]
BRIGHT = (60, 120, 180, 240)


def dataset(folder: Path, augmentation: AugmentationName, boxes: list[list[int]]) -> LabelledDataset:
    """An image of 120x80 pixels; each object has its box's outline and a brightness of its own."""
    array = np.zeros((80, 120, 3), np.uint8)
    for level, (x, y, w, h) in zip(BRIGHT, boxes, strict=False):
        array[y : y + h, x : x + w] = level
    Image.fromarray(array).save(folder / "a.png")
    objects = []
    for n, (x, y, w, h) in enumerate(boxes, 1):
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        objects.append(
            {"id": n, "image_id": 1, "category_id": n, "bbox": [x, y, w, h], "segmentation": [outline]}
        )
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 120, "height": 80}],
        "annotations": objects,
        "categories": [{"id": n, "name": str(n)} for n in range(1, 5)],
    }
    (folder / "train.json").write_text(json.dumps(document))
    labels = read_labelled(folder / "train.json", masks=True)
    return LabelledDataset(labels, min_size=(64, 128), max_size=192, augmentation=augmentation)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_boxes_masks_and_labels_stay_on_their_objects(tmp_path: Path, name: AugmentationName) -> None:
    data = dataset(tmp_path, name, BOXES)
    seen, sides = 0, set()
    for seed in range(60):
        item = data[0, seed]
        height, width = item.image.shape[1:]
        assert item.masks is not None
        assert item.masks.shape == (len(item.boxes), height, width)
        assert len(item.labels) == len(item.boxes) <= 4
        assert (item.boxes >= 0).all()
        assert (item.boxes <= torch.tensor([width, height, width, height])).all()
        seen_at_all = item.masks.flatten(1).any(1).bool()  # of a box of a pixel the mask may have none
        error = (
            masks_to_boxes(item.masks[seen_at_all]) + torch.tensor([0, 0, 1, 1]) - item.boxes[seen_at_all]
        ).abs()
        assert (error <= 1 + 0.02 * max(height, width)).all()
        if name != "ssd":  # the others leave colours as they are
            for mask, label in zip(item.masks, item.labels, strict=True):
                if mask.sum() > 100:
                    level = item.image[0][mask.bool()].float().median()
                    assert level == pytest.approx(BRIGHT[int(label) - 1], abs=8)
                    seen += 1
        sides.add((height, width))
    assert seen > 60 or name == "ssd"
    assert len(sides) >= (3 if name == "multiscale" else 20)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_same_seed_shows_the_same(tmp_path: Path, name: AugmentationName) -> None:
    data = dataset(tmp_path, name, BOXES)
    for seed in range(5):
        first, second = data[0, seed], data[0, seed]
        assert torch.equal(first.image, second.image)
        assert torch.equal(first.boxes, second.boxes)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_without_objects_is_changed_too(tmp_path: Path, name: AugmentationName) -> None:
    data = dataset(tmp_path, name, [])
    for seed in range(5):
        item = data[0, seed]
        assert item.boxes.shape == (0, 4)
        assert item.labels.shape == (0,)


def magnified(item: Labelled) -> torch.Tensor:
    """How many times as long the uncut sides are as in the file: boxes that touch no border."""
    height, width = item.image.shape[1:]
    inside = (item.boxes[:, :2] > 0).all(1) & (item.boxes[:, 2:] < torch.tensor([width, height])).all(1)
    original = torch.tensor(BOXES, dtype=torch.float32)[item.labels[inside] - 1, 2:]
    return ((item.boxes[:, 2:] - item.boxes[:, :2])[inside] / original).flatten()


def test_every_second_image_of_detrs_is_a_part(tmp_path: Path) -> None:
    data = dataset(tmp_path, "detr", BOXES)
    items = [data[0, seed] for seed in range(80)]
    parts = [item for item in items if len(item.boxes) < 4 or len(magnified(item)) < 8]
    assert 20 < len(parts) < 60
    # shapes: a whole image has 3:2, a part 48:75 to 75:48; short sides are those of whole images
    assert {min(item.image.shape[1:]) for item in items} <= {64, 96, 128}
    for item in parts:
        height, width = item.image.shape[1:]
        assert 0.6 < width / height < 1.6
    largest = torch.cat([magnified(item) for item in parts]).max()
    whole = 128 / 80
    assert whole * 1.1 < largest <= whole * 128 / (128 * 12 // 25) + 0.1  # of a part of the least side


def test_large_scale_jitter_has_objects_of_all_sizes_in_a_square(tmp_path: Path) -> None:
    data = dataset(tmp_path, "lsj", BOXES)
    items = [data[0, seed] for seed in range(80)]
    side = round((128 * 192) ** 0.5)
    assert max(max(item.image.shape[1:]) for item in items) == side
    scales = torch.cat([magnified(item) for item in items]) * 120 / side
    assert scales.min() < 0.25
    assert 1.6 < scales.max() <= 2.1


def test_zooming_out_puts_images_on_grey_and_leaves_an_object(tmp_path: Path) -> None:
    data = dataset(tmp_path, "ssd", BOXES)
    items = [data[0, seed] for seed in range(80)]
    assert all(len(item.boxes) for item in items)
    # small images are crops or put on a larger canvas, whose grey no colour change touches
    grey = [float((item.image == 114).all(0).float().mean()) for item in items]
    assert 10 < sum(share > 0.2 for share in grey) < 70
    assert len({tuple(item.image[:, 0, 0].tolist()) for item in items}) > 1
    scales = torch.cat([magnified(item) for item in items])
    assert scales.min() < 0.5 < 2 < scales.max()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_panorama_keeps_a_row_of_pixels(tmp_path: Path, name: AugmentationName) -> None:
    Image.new("RGB", (900, MIN_SIDE)).save(tmp_path / "a.png")
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 900, "height": MIN_SIDE}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(document))
    labels = read_labelled(tmp_path / "train.json")
    data = LabelledDataset(labels, min_size=(64, 64), max_size=120, augmentation=name)
    assert min(min(data[0, seed].image.shape) for seed in range(20)) >= 1


def test_sides_of_a_crop_are_drawn_from_what_there_is_of_the_range() -> None:
    crop = _RandomSizeCrop(384, 600)
    torch.manual_seed(0)
    parts = [crop.make_params([torch.zeros(3, 400, 533)]) for _ in range(300)]
    heights, widths = ([part[side] for part in parts] for side in ("height", "width"))
    assert (min(heights), max(heights)) == (384, 400)
    assert 384 <= min(widths) < 390 < 528 < max(widths) <= 533
    assert sum(height == 400 for height in heights) < 40
    assert all(0 <= part["top"] <= 400 - part["height"] for part in parts)
    assert all(0 <= part["left"] <= 533 - part["width"] for part in parts)
    assert crop.make_params([torch.zeros(3, 20, 30)]) == {"top": 0, "left": 0, "height": 20, "width": 30}
