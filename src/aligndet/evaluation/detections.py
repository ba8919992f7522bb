"""Predictions as supervision's detections, for its annotators, trackers, zones and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import supervision as sv
from torch import Tensor

from aligndet.data.rle import EncodedMasks, decode, read_segmentation
from aligndet.files import accepts_strings, read_json


def to_detections(prediction: dict[str, Tensor], class_names: Sequence[str]) -> sv.Detections:
    """Converts what a detector has found in an image.

    Args:
        prediction: Boxes (n, 4) xyxy pixels, labels (n,) from 1, scores (n,), and masks (n, H, W) bool if
            known.
        class_names: In label order.

    Returns:
        With ``class_id`` from 0, and ``data["class_name"]``.
    """
    classes = prediction["labels"].numpy() - 1
    masks = prediction["masks"].numpy() if "masks" in prediction else None
    return sv.Detections(
        prediction["boxes"].numpy(),
        masks,
        prediction["scores"].numpy(),
        classes,
        data={"class_name": np.array([class_names[c] for c in classes.tolist()], dtype=str)},
    )


@accepts_strings
def read_detections(predictions: Path) -> dict[str, sv.Detections]:
    """Reads what `aligndet predict` has written.

    Args:
        predictions: Its output folder.

    Returns:
        By file name of the image, or "VIDEO/FRAME" with frames counted from 0; ``class_id`` is the position
        among the categories.

    Raises:
        ValueError: If the folder holds no predictions.
    """
    path = predictions / "predictions.json"
    if not path.is_file():
        raise ValueError(f"{predictions}: holds no predictions.json, which `aligndet predict` writes")
    document = read_json(path)
    categories = {entry["id"]: i for i, entry in enumerate(document["categories"])}
    names = np.array([str(entry["name"]) for entry in document["categories"]])
    found: dict[int, list[dict[str, object]]] = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        found[annotation["image_id"]].append(annotation)
    detections = {}
    for image in document["images"]:
        rows = found[image["id"]]
        boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = np.array([categories[row["category_id"]] for row in rows], np.int64)
        scores = np.array([row["score"] for row in rows], np.float32)
        masks = None
        if rows and "segmentation" in rows[0]:
            width, height = image["width"], image["height"]
            encoded = [read_segmentation(row["segmentation"], width, height) for row in rows]
            masks = decode(EncodedMasks(height, width, encoded)).astype(bool)
        detections[image["file_name"]] = sv.Detections(
            boxes, masks, scores, classes, data={"class_name": names[classes]}
        )
    return detections
