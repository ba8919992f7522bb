"""Parts of two-stage detectors: how regions are sampled, compared, embedded and moved, and how
heads start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image

from aligndet.detectors.backbones import Backbone
from aligndet.detectors.projection import ProjectionHead

REPRESENTATION = 1024  # width of torchvision's box heads


class PositiveSampler:
    """Takes assigned boxes only, in the place of torchvision's sampler, which fills up with background."""

    def __init__(self, limit: int, *, never_empty: bool = False) -> None:
        """Prepares the sampler.

        Args:
            limit: Most boxes of a batch; each image has an equal share.
            never_empty: Take one background box if no box of the batch is assigned: the losses of
                torchvision's RPN are means, and the mean of nothing is not a number.
        """
        self.limit, self.never_empty = limit, never_empty

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Picks boxes at random.

        Args:
            labels: (M_i,) of each image; from 1: an object; 0: background.

        Returns:
            For each image a mask (M_i,) of the boxes picked, and the same for background.
        """
        picked = [pick(label >= 1, max(1, self.limit // len(labels))) for label in labels]
        background = [torch.zeros_like(mask) for mask in picked]
        if self.never_empty and not torch.cat(picked).any():
            background[0] = pick(labels[0] == 0, 1)
        return picked, background


def pick(wanted: Tensor, limit: int) -> Tensor:
    """Keeps a random part of a mask.

    Args:
        wanted: (M,) bool.
        limit: Most elements to keep.

    Returns:
        (M,) bool, a subset.
    """
    draw = torch.rand(len(wanted), device=wanted.device).masked_fill(~wanted, -1.0)
    kept = draw.topk(min(limit, len(wanted))).indices
    return torch.zeros_like(wanted).index_fill(0, kept, True) & wanted


def start_small(predictor: Any) -> None:
    """Starts a box predictor near zero, as OpenMMLab does, with which the paper's figures were made.

    With torchvision's start, features of pre-trained heads give random logits of about 2 and random moves as
    large as those to learn: a short fine-tuning would be busy unlearning them.

    Args:
        predictor: torchvision's FastRCNNPredictor, or one like it.
    """
    for layer, size in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=size)
        nn.init.zeros_(layer.bias)


def box_head(backbone: Backbone, convolutions: int) -> nn.Module | None:
    """Builds a box head of convolutions and one linear layer, as the official implementation has it (four).

    Args:
        backbone: Whose width the convolutions have.
        convolutions: How many; 0 leaves the head to torchvision: two linear layers.
    """
    width, side = backbone.out_channels, 7  # of pooled regions
    if not convolutions:
        return None
    return FastRCNNConvFCHead((width, side, side), [width] * convolutions, [REPRESENTATION])


class EmbeddingPredictor(nn.Module):
    """torchvision's box predictor with embeddings in the place of class scores, and one box regression."""

    def __init__(self, in_channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.projection_head = ProjectionHead(in_channels, embedding_dim)
        self.bbox_pred = nn.Linear(in_channels, 4)
        # regions stay where they are at first: random moves would be as large as those to learn
        nn.init.zeros_(self.bbox_pred.weight)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """From (M, C) to embeddings (M, D) and box deltas (M, 4)."""
        return self.projection_head(features), self.bbox_pred(features)


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """The same numbers as torchvision's `box_iou`, in a quarter of the time: no arrays of (N, M, 2).

    Args:
        boxes: (N, 4) xyxy.
        others: (M, 4) xyxy.

    Returns:
        (N, M).
    """
    x0, y0, x1, y1 = boxes.T.contiguous()[..., None]
    u0, v0, u1, v1 = others.T.contiguous()
    width = (torch.minimum(x1, u1) - torch.maximum(x0, u0)).clamp_(min=0)
    height = (torch.minimum(y1, v1) - torch.maximum(y0, v0)).clamp_(min=0)
    inter = width.mul_(height)
    return inter / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - inter)


def refine(
    stage: RoIHeads,
    deltas: Tensor,
    regions: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    objects: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Moves regions to where a stage predicts them; no gradient flows through.

    Args:
        stage: Its box coder decodes the deltas.
        deltas: (sum of M_i, 4).
        regions: (M_i, 4) xyxy pixels of each image.
        sizes: Height and width of each image.
        objects: In training, (N_i, 4) boxes that were added to the regions; they are left out again, since
            the next stage adds them itself.

    Returns:
        (at most M_i, 4) of each image.
    """
    moved = stage.box_coder.decode(deltas.detach().float(), list(regions)).reshape(-1, 4)  # (sum of M_i, 4)
    parts = list(moved.split([len(boxes) for boxes in regions]))
    if objects is not None:
        added = [
            (r[:, None] == o[None].to(r.dtype)).all(2).any(1) for r, o in zip(regions, objects, strict=True)
        ]
        parts = [part[~mask] for part, mask in zip(parts, added, strict=True)]
    return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]


def mask_features(stages: Sequence[RoIHeads], flows: Sequence[nn.Module], pooled: Tensor) -> list[Tensor]:
    """Features of the mask heads; each stage's enter the next one's.

    Args:
        stages: With a mask head each.
        flows: From the mask features of a stage to the input of the next: one less than stages.
        pooled: (M, C, 14, 14) of the regions.

    Returns:
        (M, 256, 14, 14) of each stage.
    """
    features = [stages[0].mask_head(pooled)]
    for flow, stage in zip(flows, stages[1:], strict=True):
        features.append(stage.mask_head(pooled + flow(features[-1])))
    return features
