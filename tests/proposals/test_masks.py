from __future__ import annotations

from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest

from aligndet.proposals.filters import filter_boxes
from aligndet.proposals.masks import MASK_SIDE, on_grid, on_image, pseudo_masks
from aligndet.proposals.segments import objectness, segments_of, shares_inside

SETTINGS: dict[str, Any] = {
    "resolution": 100,
    "sigma": 0.5,
    "scale": 100.0,
    "min_size": 10,
    "min_inside": 0.9,
}


def scene(size: int = 100) -> tuple[Any, Any]:
    """A bright disc on a dark, noisy ground, and where it is."""
    y, x = np.mgrid[:size, :size] / size
    disc = (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.25**2
    noise = np.random.default_rng(0).integers(0, 6, (size, size, 3))
    return (noise + 40 + 160 * disc[:, :, None]).astype(np.uint8), disc


@pytest.mark.parametrize("seed", range(5))
def test_shares_equal_a_loop_over_boxes_and_segments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    segments = rng.integers(0, 7, (6, 5)).repeat(4, 0).repeat(5, 1).astype(np.int32)  # (24, 25)
    segments[rng.random(segments.shape) < 0.2] = 7
    corners = np.sort(rng.integers(0, 25, (9, 2, 2)), axis=1)
    boxes = corners.reshape(9, 4)  # some without a pixel
    expected = np.zeros((9, 8))
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        for number in range(8):
            expected[i, number] = (segments[y0:y1, x0:x1] == number).sum() / (segments == number).sum()
    np.testing.assert_array_equal(shares_inside(segments, boxes), expected)


def test_one_segment_and_no_box() -> None:
    segments = np.zeros((4, 6), np.int32)
    np.testing.assert_array_equal(
        shares_inside(segments, np.array([[0, 0, 6, 4], [0, 0, 3, 4]])), [[1], [0.5]]
    )
    assert shares_inside(segments, np.zeros((0, 4), np.int64)).shape == (0, 1)


def test_objectness_equals_a_loop_over_boxes_and_segments() -> None:
    image, _ = scene()
    image[70:90, 50:95] = (250, 20, 120)
    segments = segments_of(image, 0.5, 300.0, 20)
    assert segments.max() >= 2
    corner = np.random.default_rng(2).integers(0, 30, (20, 2))
    boxes = np.concatenate([corner, corner + np.random.default_rng(3).integers(30, 70, (20, 2))], 1)
    expected = []
    for x0, y0, x1, y1 in boxes:
        inside = np.zeros(segments.shape, bool)
        inside[y0:y1, x0:x1] = True
        cut = sum(
            min((inside & (segments == number)).sum(), (~inside & (segments == number)).sum())
            for number in range(segments.max() + 1)
        )
        expected.append(max(0.0, 1 - cut / inside.sum()) * (inside.mean()) ** 0.25)
    assert np.count_nonzero(expected) > 10
    np.testing.assert_allclose(objectness(image, boxes.astype(np.float32)), expected, atol=1e-9)
    assert objectness(image, np.zeros((0, 4), np.float32)).shape == (0,)


def test_a_box_around_an_object_goes_before_one_that_cuts_it() -> None:
    image, disc = scene(400)
    y, x = np.nonzero(disc)
    tight = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float32)
    boxes = np.stack([tight + 60, tight, tight - 50])
    score = partial(objectness, image)
    assert score(boxes)[1] > 1.5 * score(boxes)[[0, 2]].max()
    bounds: dict[str, Any] = {"max_aspect_ratio": 3.0, "min_area": 0.0, "max_area": 1.0, "nms_iou": 0.3}
    np.testing.assert_array_equal(filter_boxes(boxes, 400, 400, **bounds, score=score)[0], tight)
    np.testing.assert_array_equal(filter_boxes(boxes, 400, 400, **bounds)[0], boxes[0])


def test_masks_equal_a_loop_over_boxes() -> None:
    image, _ = scene()
    image[60:] += np.random.default_rng(1).integers(0, 90, (40, 100, 3)).astype(np.uint8)
    corner = np.random.default_rng(2).uniform(0, 50, (40, 2))
    boxes = np.concatenate([corner, corner + 45], 1).astype(np.float32)
    found = pseudo_masks(image, boxes, **SETTINGS)
    graph = cv2.ximgproc.segmentation.createGraphSegmentation(0.5, 100.0, 10)
    segments = graph.processImage(np.ascontiguousarray(image[:, :, ::-1]))
    assert segments.max() > 5
    for box, grid in zip(boxes, found, strict=True):
        x0, y0, x1, y1 = box.round().astype(int)
        inside = [
            n
            for n in range(segments.max() + 1)
            if (segments[y0:y1, x0:x1] == n).sum() >= 0.9 * (segments == n).sum()
        ]
        mask = np.isin(segments, inside).astype(np.uint8)
        np.testing.assert_array_equal(grid, on_grid(mask, box))
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("size", [100, 400])  # the second is scaled down first
def test_an_object_is_outlined(size: int) -> None:
    image, disc = scene(size)
    object_, part, ground = (
        np.array([[24, 14, 76, 66], [40, 30, 60, 50], [2, 70, 40, 98]], np.float32) * size / 100
    )
    around, within, elsewhere = pseudo_masks(image, np.stack([object_, part, ground]), **SETTINGS)
    assert around.shape == (MASK_SIDE, MASK_SIDE)
    found = on_image(around, object_, size, size) > 0
    assert (found & disc).sum() / (found | disc).sum() > 0.9
    assert not within.any()  # no segment lies within: nothing is known
    assert not elsewhere.any()
    assert pseudo_masks(image, np.zeros((0, 4), np.float32), **SETTINGS).shape == (0, MASK_SIDE, MASK_SIDE)


def test_the_share_inside_decides() -> None:
    image, _ = scene()
    cut = np.array([[25, 15, 75, 55]], np.float32)  # without the lowest fifth of the disc
    assert pseudo_masks(image, cut, **SETTINGS).mean() < 0.1  # but some crumbs of its blurred edge
    assert pseudo_masks(image, cut, **{**SETTINGS, "min_inside": 0.8}).mean() > 0.7


@pytest.mark.parametrize("box", [(10, 20, 10 + 56, 20 + 112), (3.5, 0.25, 150.5, 119.75), (0, 0, 160, 120)])
def test_from_the_grid_to_the_image_and_back(box: tuple[float, ...]) -> None:
    corners = np.array(box, np.float32)
    grid = np.random.default_rng(0).integers(0, 2, (MASK_SIDE, MASK_SIDE)).astype(np.uint8)
    mask = on_image(grid, corners, 160, 132)
    np.testing.assert_array_equal(on_grid(mask, corners), grid)
    y, x = np.nonzero(mask)
    assert x.min() + 0.5 >= box[0]
    assert x.max() + 0.5 <= box[2]
    assert y.min() + 0.5 >= box[1]
    assert y.max() + 0.5 <= box[3]
    for row, column in zip(y.tolist(), x.tolist(), strict=True):
        cell = [
            int((v + 0.5 - a) / (b - a) * MASK_SIDE)
            for v, a, b in ((row, box[1], box[3]), (column, box[0], box[2]))
        ]
        assert grid[cell[0], cell[1]]


def test_a_small_box_covers_what_it_holds() -> None:
    ones = np.ones((MASK_SIDE, MASK_SIDE), np.uint8)
    expected = np.zeros((6, 8), np.uint8)
    expected[2:5, 1:4] = 1
    np.testing.assert_array_equal(on_image(ones, np.array([0.6, 1.6, 3.9, 5.2], np.float32), 8, 6), expected)
