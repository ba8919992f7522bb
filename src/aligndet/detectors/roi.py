"""Faster and Mask R-CNN: torchvision's two-stage detectors, made pre-trainable region by region.

Proposals are the objects that the region proposal network learns to find. Its regions are assigned to
proposals by torchvision's own matcher, which returns the label of what a region stands for: with ``id + 1``
in the place of a class, it returns proposals. A projection head takes the slot of the classifier (paper,
eq. 2), and one box regression serves all classes. Cascades go through the same steps once a stage, see
`aligndet.detectors.cascade`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss

from aligndet.boxes import Adapter, BoxPredictions, PretrainOutput, as_targets, wants_losses
from aligndet.detectors.backbones import Backbone, PyramidNorm, build_backbone
from aligndet.detectors.roi_parts import (
    REPRESENTATION,
    EmbeddingPredictor,
    PositiveSampler,
    box_head,
    mask_features,
    overlaps,
    pick,
    refine,
    start_small,
)

_FOR_PRETRAINING: dict[str, Any] = {
    "_skip_resize": True,  # the loader has resized
    # the momentum detector's regions come from eval mode, without losses; as many as in train mode
    "rpn_pre_nms_top_n_test": 2000,
    "rpn_post_nms_top_n_test": 2000,
}


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
        self.detector = self.embedding_detector(backbone, embedding_dim, **_FOR_PRETRAINING, **settings)
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
        """Runs all stages on one pyramid."""
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
        """torchvision's mask loss of stage number `depth` against pseudo-masks.

        A pseudo-mask covers the box of its proposal, so regions are expressed in that box's coordinates.
        Proposals without a mask are left out.
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
            # torchvision samples masks half a pixel off (roi_align): here, too, by a pixel of the image, not
            # of the grid
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
