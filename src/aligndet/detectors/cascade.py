"""Cascade R-CNN and HTC: three stages of torchvision's RoI heads, each from the boxes of the one before.

torchvision has neither, so the plain detectors are here as well. A stage is a `RoIHeads` of torchvision with
its own matcher, sampler, box coder, heads and losses; a cascade is the loop over them (Cai & Vasconcelos,
2018). HTC adds a mask head a stage, which sees the boxes after the stage has moved them, and the mask
features of the stages before it (Chen et al., 2019; without its semantic branch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from aligndet.detectors.backbones import Backbone
from aligndet.detectors.roi import RoIPretraining
from aligndet.detectors.roi_parts import (
    REPRESENTATION,
    EmbeddingPredictor,
    box_head,
    mask_features,
    refine,
    start_small,
)

THRESHOLDS = (0.5, 0.6, 0.7)  # IoU from which on a box stands for an object, by stage
WEIGHTS = (1.0, 0.5, 0.25)  # of the losses, by stage


class ClassAgnosticPredictor(FastRCNNPredictor):
    """torchvision's box predictor with one regression for all classes, repeated as torchvision expects it."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)
        start_small(self)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """From (M, C) to class logits (M, classes) and box deltas (M, 4 * classes)."""
        scores, deltas = super().forward(features)
        return scores, deltas.repeat(1, scores.shape[1])


class CascadeRoIHeads(nn.Module):
    """RoI heads in a row, in the place of torchvision's single ones."""

    def __init__(self, stages: Sequence[RoIHeads], flows: Sequence[nn.Module] = ()) -> None:
        """Joins the stages.

        Args:
            stages: In order; with mask heads in all of them or in none.
            flows: From the mask features of a stage to the input of the next one's mask head.
        """
        super().__init__()
        self.stages, self.weights = nn.ModuleList(stages), WEIGHTS[: len(stages)]
        self.flows = nn.ModuleList(flows)
        self.predicts_masks = bool(stages[0].has_mask())

    def forward(
        self,
        features: dict[str, Tensor],
        regions: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's RoI heads: detections and no losses in eval mode, losses alone in train mode."""
        if not self.training:
            return self._detect(features, regions, sizes), {}
        assert targets is not None
        losses: dict[str, Tensor] = {}
        for depth, weight in enumerate(self.weights, start=1):
            stage: Any = self.stages[depth - 1]
            regions, _, labels, deltas = stage.select_training_samples(regions, targets)
            logits, predicted = self._predict(stage, features, regions, sizes)
            classes, boxes = fastrcnn_loss(logits, predicted, labels, deltas)
            losses |= {f"loss_classifier_{depth}": weight * classes, f"loss_box_reg_{depth}": weight * boxes}
            regions = refine(stage, predicted[:, :4], regions, sizes, [target["boxes"] for target in targets])
            if self.predicts_masks:
                losses[f"loss_mask_{depth}"] = weight * self._mask_loss(
                    depth, features, regions, sizes, targets
                )
        return [], losses

    def _predict(
        self, stage: Any, features: dict[str, Tensor], regions: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, regions, sizes)))

    def _mask_features(
        self, depth: int, features: dict[str, Tensor], regions: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        stages: Any = list(self.stages)[:depth]
        pooled = stages[-1].mask_roi_pool(features, regions, sizes)
        return mask_features(stages, list(self.flows)[: depth - 1], pooled)

    def _mask_loss(
        self,
        depth: int,
        features: dict[str, Tensor],
        regions: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """The mask loss of boxes as this stage has moved them, assigned anew (interleaved execution)."""
        stage: Any = self.stages[depth - 1]
        regions, matched, labels, _ = stage.select_training_samples(regions, targets)
        objects = [label > 0 for label in labels]
        regions = [region[kept] for region, kept in zip(regions, objects, strict=True)]
        matched = [match[kept] for match, kept in zip(matched, objects, strict=True)]
        logits = stage.mask_predictor(self._mask_features(depth, features, regions, sizes)[-1])
        masks, classes = ([target[name] for target in targets] for name in ("masks", "labels"))
        return maskrcnn_loss(logits, regions, masks, classes, matched)

    def _detect(
        self, features: dict[str, Tensor], regions: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Class scores and masks are means over all stages, boxes are those of the last one."""
        stages: Any = self.stages
        *former, last = stages
        scores: list[Tensor] = []
        for stage in former:
            logits, deltas = self._predict(stage, features, regions, sizes)
            scores.append(logits.softmax(1))
            regions = refine(stage, deltas[:, :4], regions, sizes)
        logits, deltas = self._predict(last, features, regions, sizes)
        mean = torch.stack([*scores, logits.softmax(1)]).mean(0).log()  # whose softmax is the mean itself
        found = last.postprocess_detections(mean, deltas, regions, sizes)
        detections = [
            {"boxes": boxes, "scores": score, "labels": labels}
            for boxes, score, labels in zip(*found, strict=True)
        ]
        if self.predicts_masks:
            boxes, labels = ([detection[name] for detection in detections] for name in ("boxes", "labels"))
            seen = self._mask_features(len(stages), features, boxes, sizes)
            by_stage = [
                maskrcnn_inference(stage.mask_predictor(feature), labels)
                for stage, feature in zip(stages, seen, strict=True)
            ]
            for detection, masks in zip(detections, zip(*by_stage, strict=True), strict=True):
                detection["masks"] = torch.stack(masks).mean(0)
        return detections


class CascadeRCNN(FasterRCNN):
    """Cascade R-CNN, or HTC if there are mask predictors, built on torchvision's Faster R-CNN."""

    def __init__(
        self,
        backbone: Backbone,
        box_predictors: Sequence[nn.Module],
        mask_predictors: Sequence[nn.Module] = (),
        *,
        box_convolutions: int = 0,
        **kwargs: Any,
    ) -> None:
        """Builds the stages.

        Args:
            backbone: P2 to P6.
            box_predictors: One a stage, of features (M, 1024); at most three.
            mask_predictors: One a stage, of features (M, 256, 14, 14); none for Cascade R-CNN.
            box_convolutions: Of each stage's box head, see `aligndet.detectors.roi_parts.box_head`.
            kwargs: For torchvision's FasterRCNN.
        """
        super().__init__(backbone, box_predictor=box_predictors[0], **kwargs)
        single: Any = self.roi_heads  # type: ignore[has-type]
        width = backbone.out_channels
        stages = []
        for index, (predictor, threshold) in enumerate(
            zip(box_predictors, THRESHOLDS[: len(box_predictors)], strict=True)
        ):
            precision = (10.0 * (index + 1), 10.0 * (index + 1), 5.0 * (index + 1), 5.0 * (index + 1))
            parts: dict[str, Any] = {}
            if mask_predictors:
                parts["mask_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)
                parts["mask_head"] = MaskRCNNHeads(width, (256, 256, 256, 256), 1)
                parts["mask_predictor"] = mask_predictors[index]
            stages.append(
                RoIHeads(
                    single.box_roi_pool,
                    box_head(backbone, box_convolutions) or TwoMLPHead(width * 7 * 7, REPRESENTATION),
                    predictor,
                    fg_iou_thresh=threshold,
                    bg_iou_thresh=threshold,
                    batch_size_per_image=single.fg_bg_sampler.batch_size_per_image,
                    positive_fraction=single.fg_bg_sampler.positive_fraction,
                    bbox_reg_weights=precision,
                    score_thresh=single.score_thresh,
                    nms_thresh=single.nms_thresh,
                    detections_per_img=single.detections_per_img,
                    **parts,
                )
            )
        flows = [nn.Conv2d(256, width, 1) for _ in mask_predictors[1:]]
        self.roi_heads = CascadeRoIHeads(stages, flows)


class CascadePretraining(RoIPretraining):
    """Cascade R-CNN: a contrast for each of IoU 0.5, 0.6 and 0.7, weighted 1, 0.5 and 0.25."""

    network: type[CascadeRCNN] = CascadeRCNN
    # each stage has its own IoU, and HTC its own masks
    fixed_options = frozenset({"box_fg_iou_thresh", "box_bg_iou_thresh", "mask_predictors"})

    @classmethod
    def embedding_detector(cls, backbone: Backbone, embedding_dim: int, **settings: Any) -> CascadeRCNN:
        """Builds the detector, whose settings may be mask predictors, too."""
        box_predictors = [EmbeddingPredictor(REPRESENTATION, embedding_dim) for _ in THRESHOLDS]
        return cls.network(backbone, box_predictors, **settings)

    @classmethod
    def plain(cls, backbone: Backbone, num_classes: int, **transform: Any) -> CascadeRCNN:
        """Builds the detector of fine-tuning and prediction; num_classes counts the background."""
        box_predictors = [ClassAgnosticPredictor(REPRESENTATION, num_classes) for _ in THRESHOLDS]
        mask_predictors = [MaskRCNNPredictor(256, 256, num_classes) for _ in THRESHOLDS if cls.masks]
        return cls.network(backbone, box_predictors, mask_predictors, **transform)


class HtcPretraining(CascadePretraining):
    """HTC: the cascade with mask heads, which learn from pseudo-masks unless ``pretrain_mask=False``."""

    masks = True

    def __init__(
        self, backbone: Backbone, *, max_masks: int = 128, pretrain_mask: bool = True, **settings: Any
    ) -> None:
        mask_predictors = [MaskRCNNPredictor(256, 256, num_classes=1) for _ in THRESHOLDS if pretrain_mask]
        super().__init__(backbone, mask_predictors=mask_predictors, **settings)
        self.max_masks = max_masks
