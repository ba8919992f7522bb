"""FCOS and RetinaNet: torchvision's detectors, made pre-trainable by a head that embeds instead of
classifying.

torchvision's dense detectors end in ``self.head.compute_loss(targets, outputs, anchors, matched_idxs)`` and
return its dict untouched. The heads below keep torchvision's towers, box branch, target assignment and box
losses; the class layer is gone, and a projection head embeds the class tower's features of selected boxes
(paper, eq. 2).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.fast_norm import fast_group_norm
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead

from aligndet.boxes import (
    BACKGROUND,
    Adapter,
    BoxPredictions,
    PretrainOutput,
    as_targets,
    rows_of,
    wants_losses,
)
from aligndet.detectors.backbones import Backbone, PyramidNorm, build_backbone
from aligndet.detectors.projection import ProjectionHead


class _GroupNorm(nn.GroupNorm):
    """Works in the precision of its input, on GPUs as well; under autocast, torch's gives float32 there."""

    def forward(self, x: Tensor) -> Tensor:
        return fast_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


# The head of torchvision's RetinaNet v2. Without its norms, as in v1, features start so small that a short
# run of pre-training or fine-tuning is over before they have grown.
_RETINANET_NORM = partial(_GroupNorm, 32)
_RETINANET_BOX_LOSS = "giou"
_RETINANET_ANCHORS = 9  # at each location: torchvision's three sizes and three shapes


def sample_boxes(proposal_ids: Tensor, limit: int) -> Tensor:
    """Picks boxes for the contrast at random: up to a half are assigned ones, the rest background.

    Args:
        proposal_ids: (M,) a proposal, BACKGROUND, or lower for a box that the detector ignores.
        limit: Most boxes to pick.

    Returns:
        Indices, (at most limit,) int64, assigned boxes first.
    """
    draw = torch.rand(len(proposal_ids), device=proposal_ids.device)
    picked: list[Tensor] = []
    for wanted, share in ((proposal_ids > BACKGROUND, limit // 2), (proposal_ids == BACKGROUND, limit)):
        room = min(share, limit - sum(map(len, picked)), int(wanted.sum()))
        picked.append(draw.masked_fill(~wanted, -1.0).topk(room).indices)
    return torch.cat(picked)


class _ContrastiveHead(nn.Module):
    """A mixin, to stand before a torchvision head: embeddings in the place of class scores."""

    classification_head: Any  # torchvision's, as is
    regression_head: Any
    projection_head: ProjectionHead
    max_boxes: int

    def _add_projection(self, channels: int, num_anchors: int, embedding_dim: int, max_boxes: int) -> None:
        del self.classification_head.cls_logits  # the class layer has no part in pre-training
        self.projection_head = ProjectionHead(channels, embedding_dim, num_anchors)
        self.max_boxes = max_boxes

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Runs the class tower and the box branch.

        The box branch runs only for losses, so the momentum detector skips it.
        """
        outputs = self._boxes(x) if wants_losses() else {}
        tower = self.classification_head.conv
        features = torch.cat([tower(level).flatten(2) for level in x], dim=2).mT  # (B, locations, C)
        return {**outputs, "class_features": features}

    def _boxes(self, pyramid: list[Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """What torchvision's detector returns: embeddings, their proposals, and box losses if wanted."""
        found = self._embed(head_outputs["class_features"], targets, matched_idxs)
        if wants_losses():
            found |= self._box_losses(targets, head_outputs, anchors, matched_idxs)
        return found

    def _box_losses(self, targets: list[dict[str, Tensor]], *others: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def _embed(
        self, class_features: Tensor, targets: list[dict[str, Tensor]], matched: list[Tensor]
    ) -> dict[str, Tensor]:
        """Turns torchvision's matches into proposal ids, selects boxes, and only then projects them."""
        ids = []
        for target, match in zip(targets, matched, strict=True):
            known = target["labels"]  # (N,) ids across the batch
            assigned = known[match.clamp(min=0)] if len(known) else match
            ids.append(torch.where(match >= 0, assigned, match))  # BACKGROUND and ignored stay negative
        proposal_ids = torch.cat(ids)  # (B * locations * anchors,)
        chosen = sample_boxes(proposal_ids, self.max_boxes)
        location, row = (chosen // self.projection_head.num_anchors).unique(return_inverse=True)
        anchor = chosen % self.projection_head.num_anchors
        locations = class_features.shape[1]  # not flattened: that would copy the features of all
        features = class_features[location // locations, location % locations]
        embeddings = self.projection_head(rows_of(features, row), anchor)
        return {"embeddings": embeddings, "proposal_ids": proposal_ids[chosen]}


class _FcosHead(_ContrastiveHead, FCOSHead):
    def __init__(self, channels: int, num_anchors: int, embedding_dim: int, max_boxes: int) -> None:
        FCOSHead.__init__(self, channels, num_anchors, num_classes=1)
        self._add_projection(channels, num_anchors, embedding_dim, max_boxes)

    def _boxes(self, pyramid: list[Tensor]) -> dict[str, Tensor]:
        boxes, centerness = self.regression_head(pyramid)
        return {
            "bbox_regression": boxes,
            "bbox_ctrness": centerness,
            # stands in for the class scores that FCOSHead.compute_loss wants to see; its loss is dropped
            "cls_logits": torch.zeros_like(centerness),
        }

    def _box_losses(self, targets: list[dict[str, Tensor]], *others: Any) -> dict[str, Tensor]:
        one_class = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
        losses = FCOSHead.compute_loss(self, one_class, *others)
        return {name: losses[name] for name in ("bbox_regression", "bbox_ctrness")}


class _RetinaNetHead(_ContrastiveHead, RetinaNetHead):
    def __init__(self, channels: int, num_anchors: int, embedding_dim: int, max_boxes: int) -> None:
        RetinaNetHead.__init__(self, channels, num_anchors, num_classes=1, norm_layer=_RETINANET_NORM)
        self.regression_head._loss_type = _RETINANET_BOX_LOSS
        self._add_projection(channels, num_anchors, embedding_dim, max_boxes)

    def _boxes(self, pyramid: list[Tensor]) -> dict[str, Tensor]:
        return {"bbox_regression": self.regression_head(pyramid)}

    def _box_losses(self, targets: list[dict[str, Tensor]], *others: Any) -> dict[str, Tensor]:
        return {"bbox_regression": self.regression_head.compute_loss(targets, *others)}


class _DensePretraining(Adapter):
    """A dense detector in the protocol of `PretrainableDetector`."""

    detector: nn.Module
    prediction_layers: tuple[str, ...] = ("head.classification_head.cls_logits", "head.projection_head")

    @staticmethod
    def backbone(trunk: str, trunk_weights: str, fpn_channels: int, fpn_norm: PyramidNorm) -> Backbone:
        """Builds the backbone of this family: P3 to P7."""
        if fpn_channels % 32 or fpn_channels < 64:  # a group of one channel has no variance at 1x1 pixels
            raise ValueError(
                f"fpn_channels must be a multiple of 32 from 64 on (group norm), not {fpn_channels}"
            )
        return build_backbone(
            trunk, trunk_weights=trunk_weights, fpn_channels=fpn_channels, fpn_norm=fpn_norm
        )

    def forward(self, images: list[Tensor], proposals: list[Tensor]) -> PretrainOutput:
        losses = self.detector(images, as_targets(proposals))
        stage = BoxPredictions(losses.pop("embeddings"), losses.pop("proposal_ids"))
        return PretrainOutput((stage,), losses)


class FcosPretraining(_DensePretraining):
    """FCOS: a location stands for the smallest proposal whose centre region it lies in (paper section 3.2,
    phi).
    """

    def __init__(
        self, backbone: Backbone, *, embedding_dim: int = 128, max_boxes: int = 2048, **transform: Any
    ) -> None:
        super().__init__()
        head = _FcosHead(backbone.out_channels, 1, embedding_dim, max_boxes)
        self.detector = _fcos(backbone, num_classes=1, head=head, _skip_resize=True, **transform)

    @staticmethod
    def plain(backbone: Backbone, num_classes: int, **transform: Any) -> FCOS:
        """Builds the detector of fine-tuning and prediction; num_classes counts the background,
        torchvision's way.
        """
        # torchvision reports boxes above 0.2 only, fit for pictures; average precision wants the tail as well
        return _fcos(backbone, num_classes, **{"score_thresh": 0.05, **transform})


def _fcos(*args: Any, **settings: Any) -> FCOS:
    """torchvision's FCOS with our norms, and with a box branch that starts at distances of 4 strides.

    The edges of a level's objects are 4 to 8 strides away. torchvision's branch starts around 0 and ends in a
    ReLU, which passes no gradient for half of the distances there; after a few large steps, it may for none.
    Short runs depend on this start, pre-trained or not.
    """
    detector = FCOS(*args, **settings)
    nn.init.constant_(detector.head.regression_head.bbox_reg.bias, 4.0)
    for module in detector.head.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = _GroupNorm
    return detector


class RetinaNetPretraining(_DensePretraining):
    """RetinaNet: an anchor stands for the proposal that it overlaps most, from IoU 0.5 on (paper section
    3.2, phi).
    """

    def __init__(
        self, backbone: Backbone, *, embedding_dim: int = 128, max_boxes: int = 2048, **transform: Any
    ) -> None:
        super().__init__()
        head = _RetinaNetHead(backbone.out_channels, _RETINANET_ANCHORS, embedding_dim, max_boxes)
        self.detector = RetinaNet(backbone, num_classes=1, head=head, _skip_resize=True, **transform)

    @staticmethod
    def plain(backbone: Backbone, num_classes: int, **transform: Any) -> RetinaNet:
        """Builds the detector of fine-tuning and prediction; num_classes counts the background,
        torchvision's way.
        """
        head = RetinaNetHead(
            backbone.out_channels, _RETINANET_ANCHORS, num_classes, norm_layer=_RETINANET_NORM
        )
        head.regression_head._loss_type = _RETINANET_BOX_LOSS
        return RetinaNet(backbone, num_classes, head=head, **transform)
