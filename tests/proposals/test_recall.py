from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aligndet.data.coco import CocoDataset
from aligndet.data.formats import read_labelled
from aligndet.data.rle import encode
from aligndet.proposals.masks import MASK_SIDE
from aligndet.proposals.recall import Recall
from aligndet.proposals.table import ImageProposals


@pytest.fixture
def coco(tmp_path: Path) -> CocoDataset:
    """An object, a crowd, and an image without either."""
    sizes = {"image_id": 1, "category_id": 1, "area": 1e4}
    document: dict[str, Any] = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": 400, "height": 100} for number in (1, 2)
        ],
        "categories": [{"id": 1, "name": "leaf"}],
        "annotations": [
            {"id": 1, "bbox": [0, 0, 100, 100], "iscrowd": 0, **sizes},
            {"id": 2, "bbox": [200, 0, 100, 100], "iscrowd": 1, **sizes},  # not to be found
        ],
    }
    for annotation in document["annotations"]:
        left = annotation["bbox"][0]
        annotation["segmentation"] = [[left, 0, left + 100, 0, left + 100, 100, left, 100]]
    for image in document["images"]:
        Image.new("RGB", (400, 100)).save(tmp_path / image["file_name"])
    (tmp_path / "labels.json").write_text(json.dumps(document))
    return read_labelled(tmp_path / "labels.json", tmp_path, masks=None)


def test_recall_counts_objects_by_their_best_box(coco: CocoDataset) -> None:
    boxes = np.array([[0, 0, 72, 100], [0, 0, 50, 100]], np.float32)
    recall = Recall(coco)
    recall.add(ImageProposals("2.png", 400, 100, boxes))
    recall.add(ImageProposals("not labelled.png", 400, 100, boxes))
    assert recall.figures() == {}
    recall.add(ImageProposals("1.png", 400, 100, boxes))
    assert recall.figures() == {"recall50": 1.0, "recall70": 1.0, "AR": 0.5}  # IoU 0.72
    assert recall.mask_iou() is None


def test_masks_of_objects_that_are_found_are_compared(coco: CocoDataset) -> None:
    grids = np.zeros((2, MASK_SIDE, MASK_SIDE), np.uint8)
    grids[0, : MASK_SIDE // 2] = 1  # the upper half of the box
    masks = encode(grids).counts
    recall = Recall(coco)
    recall.add(ImageProposals("1.png", 400, 100, np.array([[0, 0, 60, 100]], np.float32), None, masks[:1]))
    assert recall.mask_iou() is None  # IoU 0.6 is not found
    boxes = np.array([[0, 0, 80, 100], [0, 0, 50, 100]], np.float32)
    recall.add(ImageProposals("1.png", 400, 100, boxes, None, masks))
    assert recall.mask_iou() == pytest.approx(0.4)


def test_an_image_that_is_listed_twice_counts_with_all_its_objects(coco: CocoDataset) -> None:
    twice = replace(coco, file_names=["1.png", "1.png"], boxes=[coco.boxes[0], coco.boxes[0]])
    twice = replace(twice, iscrowd=[coco.iscrowd[0], ~coco.iscrowd[0]])  # the other object of the two
    recall = Recall(twice)
    recall.add(ImageProposals("1.png", 400, 100, np.array([[0, 0, 100, 100]], np.float32)))
    assert recall.figures()["recall50"] == 0.5


def test_labels_of_a_turned_image_are_left_out(coco: CocoDataset) -> None:
    recall = Recall(coco)
    recall.add(ImageProposals("1.png", 100, 400, np.array([[0, 0, 100, 100]], np.float32)))
    assert (recall.figures(), recall.unlike) == ({}, 1)
