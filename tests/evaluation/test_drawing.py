from __future__ import annotations

import numpy as np
import torch

from aligndet.evaluation.drawing import draw_boxes, draw_centers, draw_detections, draw_labelled

PREDICTION = {
    "boxes": torch.tensor([[40.0, 60.0, 120.0, 150.0], [10.0, 60.0, 30.0, 150.0]]),
    "labels": torch.tensor([2, 1]),
    "scores": torch.tensor([0.9, 0.2]),
}


def test_boxes_above_the_score_are_drawn_on_a_copy() -> None:
    image = np.full((180, 160, 3), 90, np.uint8)
    drawn = draw_detections(image, PREDICTION, ["bird", "fish"], score=0.5)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (image == 90).all()
    changed = (drawn != 90).any(2)
    assert changed[60:150, 40].all()  # an edge of the first box
    assert not changed[65:145, 46:114].any()  # its inside
    assert not changed[:, :36].any()  # the second box is not sure enough


def test_nothing_found_leaves_the_image_as_it_is() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    drawn = draw_detections(image, PREDICTION, ["bird", "fish"], score=0.95)
    assert (drawn == image).all()
    assert drawn is not image


def test_colours_are_rgb() -> None:
    image = np.zeros((180, 160, 3), np.uint8)
    image[..., 0] = 200
    inside = draw_detections(image, PREDICTION, ["bird", "fish"])[100, 80]
    assert inside.tolist() == [200, 0, 0]


def test_the_label_of_a_box_at_the_edge_is_within_the_image() -> None:
    image = np.zeros((180, 160, 3), np.uint8)
    at_edge = {**PREDICTION, "boxes": torch.tensor([[40.0, 0.0, 120.0, 90.0], [10.0, 60.0, 30.0, 150.0]])}
    drawn = draw_detections(image, at_edge, ["bird", "fish"], score=0.5)
    assert drawn[3:8, 44:60].any(2).all()


def test_masks_are_laid_over_the_image() -> None:
    image = np.full((180, 160, 3), 90, np.uint8)
    masks = torch.zeros(2, 180, 160, dtype=torch.bool)
    masks[0, 70:100, 50:110] = masks[1, 100:140, 12:20] = True
    drawn = draw_detections(image, {**PREDICTION, "masks": masks}, ["bird", "fish"], score=0.5)
    changed = (drawn != 90).any(2)
    assert changed[70:100, 50:110].all()
    assert not changed[104:145, 46:114].any()  # the rest of its box
    assert not changed[:, :36].any()  # the second mask is not sure enough
    drawn = draw_detections(image, {**PREDICTION, "masks": masks}, ["bird", "fish"], score=0.95)
    assert (drawn == image).all()


def test_labels_have_the_colours_of_detections() -> None:
    image = np.full((180, 160, 3), 90, np.uint8)
    boxes, labels = PREDICTION["boxes"][:1].numpy(), PREDICTION["labels"][:1].numpy()
    drawn = draw_labelled(image, boxes, labels, ["bird", "fish"])
    edge = draw_detections(image, PREDICTION, ["bird", "fish"], score=0.5)[140, 40]
    assert (drawn[140, 40] == edge).all()
    assert edge.tolist() != [90, 90, 90]
    assert (draw_labelled(image, boxes[:0], labels[:0], []) == image).all()


def test_boxes_and_centres_without_a_class() -> None:
    image = np.full((180, 160, 3), 90, np.uint8)
    boxes = PREDICTION["boxes"].numpy()
    edges = draw_boxes(image, boxes)[100, [40, 10]]
    assert (edges != 90).any(1).all()
    assert edges[0].tolist() != edges[1].tolist()
    drawn = draw_centers(image, (boxes[:, :2] + boxes[:, 2:]) / 2)
    assert drawn[105, [80, 20]].tolist() == [[255, 255, 0]] * 2  # yellow, as RGB
    assert (drawn != 90).any(2).sum() < 200
    assert (image == 90).all()
