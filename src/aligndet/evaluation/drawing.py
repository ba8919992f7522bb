"""Boxes and masks drawn over images, by supervision."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import supervision as sv
from PIL import Image
from torch import Tensor

from aligndet.evaluation.detections import to_detections


def draw_detections(
    image: npt.NDArray[np.uint8],
    prediction: dict[str, Tensor],
    class_names: Sequence[str],
    score: float = 0.0,
) -> npt.NDArray[np.uint8]:
    """Draws boxes with class and score, and masks if there are any.

    Args:
        image: (H, W, 3) RGB.
        prediction: Boxes (n, 4) xyxy pixels, labels (n,) from 1, scores (n,), and masks (n, H, W) bool
            if known.
        class_names: In label order.
        score: Boxes below are left out.

    Returns:
        A copy, (H, W, 3) RGB.
    """
    kept = prediction["scores"] >= score
    if not kept.any():
        return image.copy()
    detections = to_detections({name: value[kept] for name, value in prediction.items()}, class_names)
    named = zip(detections.data["class_name"], prediction["scores"][kept].tolist(), strict=True)
    return _annotated(image, detections, [f"{name} {score:.2f}" for name, score in named])


def draw_labelled(
    image: npt.NDArray[np.uint8],
    boxes: npt.NDArray[np.floating],
    labels: npt.NDArray[np.int64],
    class_names: Sequence[str],
) -> npt.NDArray[np.uint8]:
    """Draws boxes with their class, in the colours of `draw_detections`.

    Args:
        image: (H, W, 3) RGB.
        boxes: (n, 4) xyxy pixels.
        labels: (n,) from 1.
        class_names: In label order.

    Returns:
        A copy, (H, W, 3) RGB.
    """
    if not len(boxes):
        return image.copy()
    detections = sv.Detections(boxes, class_id=labels - 1)
    return _annotated(image, detections, [class_names[label - 1] for label in labels.tolist()])


def draw_boxes(image: npt.NDArray[np.uint8], boxes: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Draws boxes that have no class, each in a colour of its own.

    Args:
        image: (H, W, 3) RGB.
        boxes: (n, 4) xyxy pixels.

    Returns:
        A copy, (H, W, 3) RGB.
    """
    thickness = max(1, max(image.shape[:2]) // 300)
    annotator = sv.BoxAnnotator(thickness=thickness, color_lookup=sv.ColorLookup.INDEX)
    return annotator.annotate(image[:, :, ::-1].copy(), sv.Detections(boxes))[:, :, ::-1]


def draw_centers(image: npt.NDArray[np.uint8], points: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Draws points as yellow dots with a dark rim, which can be seen on any ground.

    Args:
        image: (H, W, 3) RGB.
        points: (n, 2) x and y in pixels.

    Returns:
        A copy, (H, W, 3) RGB.
    """
    radius = max(2, max(image.shape[:2]) // 130)
    annotator = sv.DotAnnotator(
        color=sv.Color.YELLOW, radius=radius, outline_thickness=1, color_lookup=sv.ColorLookup.INDEX
    )
    picture = image[:, :, ::-1].copy()  # supervision draws in BGR
    return annotator.annotate(picture, sv.Detections(np.concatenate([points, points], 1)))[:, :, ::-1]


def to_jpeg(picture: npt.NDArray[np.uint8]) -> bytes:
    """Encodes a picture.

    Args:
        picture: (H, W, 3) RGB.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _annotated(
    image: npt.NDArray[np.uint8], detections: sv.Detections, texts: Sequence[str]
) -> npt.NDArray[np.uint8]:
    wide = max(image.shape[:2])
    picture = sv.MaskAnnotator().annotate(image[:, :, ::-1].copy(), detections)  # none: nothing
    picture = sv.BoxAnnotator(thickness=max(1, wide // 300)).annotate(picture, detections)
    labels = sv.LabelAnnotator(text_scale=max(0.3, wide / 1500), text_padding=2, smart_position=True)
    return labels.annotate(picture, detections, labels=list(texts))[:, :, ::-1]
