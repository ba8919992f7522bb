"""Where a detector looks before it has seen a label (the paper's figure 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def predicted_centers(detector: Any, image: Tensor, *, count: int, device: torch.device) -> Tensor:
    """Finds the centres of the boxes that a detector is surest of.

    Its class layer is random before fine-tuning. So two-stage detectors are asked for the regions that their
    region proposal network puts first, others for their boxes, however low the score.

    Args:
        detector: A plain detector in eval mode.
        image: (3, H, W) uint8.
        count: Most boxes.
        device: To compute on.

    Returns:
        (n, 2) x and y in pixels of the image, on the CPU.
    """
    pixels = image.to(device).float() / 255
    detector.to(device)
    if hasattr(detector, "rpn"):
        batch, _ = detector.transform([pixels])
        regions, _ = detector.rpn(batch, detector.backbone(batch.tensors))
        height, width = batch.image_sizes[0]
        scale = torch.tensor([image.shape[2] / width, image.shape[1] / height] * 2, device=device)
        boxes = regions[0][:count] * scale
    else:
        threshold = getattr(detector, "score_thresh", 0.0)
        detector.score_thresh = 0.0
        try:
            boxes = detector([pixels])[0]["boxes"][:count]
        finally:
            detector.score_thresh = threshold
    return ((boxes[:, :2] + boxes[:, 2:]) / 2).cpu()
