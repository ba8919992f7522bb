"""Faster and Mask R-CNN: torchvision's two-stage detectors, made pre-trainable region by region.

Proposals are the objects that the region proposal network learns to find. Its regions are assigned to
proposals by torchvision's own matcher, which returns the label of what a region stands for: with ``id + 1``
in the place of a class, it returns proposals. A projection head takes the slot of the classifier (paper,
eq. 2), and one box regression serves all classes. Cascades go through the same steps once a stage, see
`aligndet.detectors.cascade`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image

from aligndet.boxes import Adapter, BoxPredictions, PretrainOutput, as_targets, wants_losses
from aligndet.detectors.backbones import Backbone, PyramidNorm, build_backbone
from aligndet.detectors.projection import ProjectionHead

REPRESENTATION = 1024  # width of torchvision's box heads
FOR_PRETRAINING: dict[str, Any] = {
    "_skip_resize": True,  # the loader has resized
    # the momentum detector's regions come from eval mode, without losses; as many as in train mode
    "rpn_pre_nms_top_n_test": 2000,
    "rpn_post_nms_top_n_test": 2000,
}


class PositiveSampler:
    """Takes assigned boxes only, in the place of torchvision's sampler, which fills up with background."""

    def __init__(self, limit: int, *, never_empty: bool = False) -> None:
        """Prepares the sampler.

        Args:
            limit: Most boxes of a batch; each image has an equal share.
            never_empty: Take one background box where no box of the batch is assigned: torchvision's losses
                of region proposals are means, of nothing not a number.
        """
        self.limit, self.never_empty = limit, never_empty

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Picks boxes at random.

        Args:
            labels: (M_i,) of each image; from 1: an object; 0: background.

        Returns:
            Masks (M_i,) of the boxes picked, of each image, and the same for background.
        """
        picked = [pick(label >= 1, max(1, self.limit // len(labels))) for label in labels]
        background = [torch.zeros_like(mask) for mask in picked]
        if self.never_empty and not torch.cat(picked).any():
            background[0] = pick(labels[0] == 0, 1)
        return picked, background


def pick(wanted: Tensor, limit: int) -> Tensor:
    """Thins a mask out, at random.

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
    """Starts a box predictor near zero, as OpenMMLab's detectors do, in which the paper's figures were made.

    With torchvision's start, what the heads have learnt makes logits of size 2 and moves as far as those
    to learn, all of them random: a short fine-tuning would be busy unlearning them.

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
        convolutions: How many; none leave the head to torchvision: two linear layers.
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
        # regions stay where they are at first: random moves are as large as those to learn
        nn.init.zeros_(self.bbox_pred.weight)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """From (M, C) to embeddings (M, D) and box deltas (M, 4)."""
        return self.projection_head(features), self.bbox_pred(features)


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """torchvision's `box_iou`, number for number, without its arrays of (N, M, 2): a quarter of the time.

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
        stage: Whose box coder the deltas are for.
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


class RoIPretraining(Adapter):
    """A two-stage detector in the protocol of `PretrainableDetector`: one assignment, or several in a row."""

    network: type[FasterRCNN]
    max_masks: int  # most regions of a stage and batch that the mask head learns from

    def __init__(
        self,
        backbone: Backbone,
        *,
        embedding_dim: int = 128,
        max_boxes: int = 4096,
        rpn_positives: bool = False,
        **settings: Any,
    ) -> None:
        """Builds the detector with box predictors that embed.

        Args:
            backbone: Of `RoIPretraining.backbone`.
            embedding_dim: Of the contrast.
            max_boxes: Most regions of a stage and batch, all of them assigned to proposals.
            rpn_positives: Show assigned anchors alone to the region proposal network; by default it keeps
                torchvision's balance with background.
            settings: Of `embedding_detector`.
        """
        super().__init__()
        self.detector = self.embedding_detector(backbone, embedding_dim, **FOR_PRETRAINING, **settings)
        heads, rpn = self.detector.roi_heads, self.detector.rpn
        self.stages: tuple[Any, ...] = tuple(getattr(heads, "stages", [heads]))
        self.weights: tuple[float, ...] = getattr(heads, "weights", (1.0,))  # of each stage in all losses
        self.flows = tuple(getattr(heads, "flows", ()))  # between the mask heads of the stages
        self.needs = ("masks",) if self.stages[0].has_mask() else ()
        for stage in self.stages:
            stage.fg_bg_sampler = PositiveSampler(max_boxes)
        rpn.box_similarity = overlaps
        if rpn_positives:
            rpn.fg_bg_sampler = PositiveSampler(max_boxes, never_empty=True)
        modules = self.detector.named_modules()
        layers = [f"{name}." for name, module in modules if isinstance(module, EmbeddingPredictor)]
        self.prediction_layers = tuple(
            f"{n}{part}" for n in layers for part in ("cls_score", "projection_head")
        )

    @classmethod
    def embedding_detector(cls, backbone: Backbone, embedding_dim: int, **settings: Any) -> Any:
        """Builds the detector that `export` saves; ``transform``, ``backbone`` and ``rpn`` are torchvision's,
        ``roi_heads`` too, or those of `aligndet.detectors.cascade`.
        """
        raise NotImplementedError

    @staticmethod
    def shared_options() -> frozenset[str]:
        """Names of the settings that pre-training and fine-tuning share."""
        return frozenset({"box_convolutions"})

    @classmethod
    def plain(
        cls, backbone: Backbone, num_classes: int, *, box_convolutions: int = 0, **transform: Any
    ) -> FasterRCNN:
        """Builds the detector of fine-tuning and prediction; num_classes counts the background."""
        head = box_head(backbone, box_convolutions)
        detector = cls.network(backbone, num_classes, box_head=head, **transform)
        start_small(detector.roi_heads.box_predictor)
        return detector

    @staticmethod
    def backbone(trunk: str, trunk_weights: str, fpn_channels: int, fpn_norm: PyramidNorm) -> Backbone:
        """Builds the backbone of this family: P2 to P6."""
        return build_backbone(
            trunk,
            trunk_weights=trunk_weights,
            fpn_channels=fpn_channels,
            fpn_norm=fpn_norm,
            strides=(4, 8, 16, 32),
            extra_levels=False,
        )

    def forward(
        self, images: list[Tensor], proposals: list[Tensor], masks: list[Tensor] | None = None
    ) -> PretrainOutput:
        """Assigns regions to proposals, embeds them, and adds up torchvision's box and mask losses."""
        targets = as_targets(proposals, first=1)  # torchvision's label 0 is the background
        if masks is not None:
            targets = [{**target, "masks": mask} for target, mask in zip(targets, masks, strict=True)]
        batch, _ = self.detector.transform(images)
        self.detector.rpn.train(wants_losses())
        stages: list[BoxPredictions] = []
        losses: dict[str, Tensor] = {}
        for pyramid, weight, prefix in self.detector.backbone.branches(batch.tensors):
            output = self._over(pyramid, batch, targets)
            stages += [stage._replace(weight=weight * stage.weight) for stage in output.stages]
            losses |= {prefix + name: weight * loss for name, loss in output.losses.items()}
        return PretrainOutput(tuple(stages), losses)

    def _over(
        self, features: dict[str, Tensor], batch: ImageList, targets: list[dict[str, Tensor]]
    ) -> PretrainOutput:
        """All stages over one pyramid."""
        sizes, objects = batch.image_sizes, [target["boxes"] for target in targets]
        regions, losses = self.detector.rpn(batch, features, targets)
        predictions: list[BoxPredictions] = []
        for stage, weight in zip(self.stages, self.weights, strict=True):
            regions, matched, labels, deltas = stage.select_training_samples(regions, targets)
            pooled = stage.box_roi_pool(features, regions, sizes)
            embeddings, predicted = stage.box_predictor(stage.box_head(pooled))
            predictions.append(BoxPredictions(embeddings, torch.cat(labels) - 1, weight))
            suffix = f"_{len(predictions)}" if len(self.stages) > 1 else ""
            if wants_losses():
                loss = F.smooth_l1_loss(predicted.float(), torch.cat(deltas), beta=1 / 9, reduction="sum")
                losses[f"loss_box_reg{suffix}"] = weight * loss / max(1, len(predicted))
            if len(self.stages) > 1:
                regions = refine(stage, predicted, regions, sizes, objects)
            if wants_losses() and "masks" in targets[0]:
                seen = regions
                if len(self.stages) > 1:  # interleaved: mask heads see the moved regions
                    seen, matched, _, _ = stage.select_training_samples(regions, targets)
                loss = self._mask_loss(len(predictions), features, seen, matched, targets, sizes)
                losses[f"loss_mask{suffix}"] = weight * loss
        return PretrainOutput(tuple(predictions), losses)

    def _mask_loss(
        self,
        depth: int,
        features: dict[str, Tensor],
        regions: list[Tensor],
        matched: list[Tensor],
        targets: list[dict[str, Tensor]],
        sizes: list[tuple[int, int]],
    ) -> Tensor:
        """torchvision's mask loss, of the last of the first `depth` stages, against pseudo-masks.

        These are given over the box of their proposal, so regions are expressed in its coordinates. Proposals
        without a mask have no part.
        """
        room = max(1, self.max_masks // len(targets))
        kept_regions, kept_matched, inside = [], [], []
        for region, match, target in zip(regions, matched, targets, strict=True):
            kept = pick(target["masks"].bool().flatten(1).any(1)[match], room)
            region, match = region[kept], match[kept]
            corner, opposite = target["boxes"][match].split(2, dim=1)
            scale = target["masks"].shape[-1] / (opposite - corner)
            kept_regions.append(region)
            kept_matched.append(match)
            # torchvision takes a pixel for the point at its corner: of the image, not of the grid
            corner, scale = corner.repeat(1, 2), scale.repeat(1, 2)
            inside.append((region - corner + 0.5) * scale - 0.5)
        stage = self.stages[depth - 1]
        pooled = stage.mask_roi_pool(features, kept_regions, sizes)
        logits = stage.mask_predictor(mask_features(self.stages[:depth], self.flows[: depth - 1], pooled)[-1])
        one_class = [torch.zeros_like(target["labels"]) for target in targets]
        return maskrcnn_loss(logits.float(), inside, [t["masks"] for t in targets], one_class, kept_matched)


class FasterRcnnPretraining(RoIPretraining):
    """Faster R-CNN: a region stands for the proposal that it overlaps most, from IoU 0.5 on."""

    network = FasterRCNN

    @classmethod
    def embedding_detector(
        cls,
        backbone: Backbone,
        embedding_dim: int,
        *,
        box_convolutions: int = 0,
        learn_masks: bool = False,
        **settings: Any,
    ) -> FasterRCNN:
        """Builds torchvision's detector, with a mask head only if it learns."""
        parts: dict[str, Any] = {
            "box_head": box_head(backbone, box_convolutions),
            "box_predictor": EmbeddingPredictor(REPRESENTATION, embedding_dim),
        }
        if learn_masks:
            parts["mask_predictor"] = MaskRCNNPredictor(256, 256, num_classes=1)
        return (MaskRCNN if learn_masks else FasterRCNN)(backbone, **parts, **settings)


class MaskRcnnPretraining(FasterRcnnPretraining):
    """Mask R-CNN: as Faster R-CNN, and one mask for all classes learns from pseudo-masks.

    The official code leaves the mask head at random numbers; so does ``pretrain_mask=False``.
    """

    network, masks = MaskRCNN, True

    def __init__(
        self, backbone: Backbone, *, max_masks: int = 128, pretrain_mask: bool = True, **settings: Any
    ) -> None:
        super().__init__(backbone, learn_masks=pretrain_mask, **settings)
        self.max_masks = max_masks
