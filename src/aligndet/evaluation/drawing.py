"""Boxes and masks drawn over images, by supervision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import supervision as sv
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
    texts = [f"{name} {score:.2f}" for name, score in named]
    wide = max(image.shape[:2])
    picture = sv.MaskAnnotator().annotate(image[:, :, ::-1].copy(), detections)  # none: nothing
    picture = sv.BoxAnnotator(thickness=max(1, wide // 300)).annotate(picture, detections)
    labels = sv.LabelAnnotator(text_scale=max(0.3, wide / 1500), text_padding=2, smart_position=True)
    return labels.annotate(picture, detections, labels=texts)[:, :, ::-1]
