"""From a name to a detector: one plain dict."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

from torch import nn

from aligndet.boxes import PretrainableDetector
from aligndet.detectors.backbones import PyramidNorm, normalisation
from aligndet.detectors.dense import FcosPretraining, RetinaNetPretraining

DETECTORS: dict[str, Any] = {
    "fcos": FcosPretraining,
    "retinanet": RetinaNetPretraining,
}


def build_pretrainable(
    detector: str,
    *,
    trunk: str,
    trunk_weights: str = "none",
    fpn_channels: int = 256,
    fpn_norm: PyramidNorm = "none",
    options: dict[str, Any] | None = None,
) -> PretrainableDetector:
    """Builds a detector for box-domain pre-training.

    Args:
        detector: A key of `DETECTORS`.
        trunk: As for `aligndet.detectors.backbones.build_backbone`.
        trunk_weights: Likewise.
        fpn_channels: Likewise.
        fpn_norm: Likewise.
        options: Further arguments of the detector's adapter, such as ``embedding_dim``.

    Raises:
        ValueError: If the detector, the trunk or an option is unknown, or the weights do not fit.
    """
    family = _family(detector)
    known = [p.name for p in signature(family).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise ValueError(f"{detector} has no option {unknown[0]!r}; there are: {', '.join(known)}")
    mean, std = normalisation(trunk)
    return family(
        family.backbone(trunk, trunk_weights, fpn_channels, fpn_norm),
        image_mean=list(mean),
        image_std=list(std),
        **(options or {}),
    )


def build_detector(
    detector: str,
    *,
    num_classes: int,
    trunk: str,
    trunk_weights: str = "none",
    fpn_channels: int = 256,
    fpn_norm: PyramidNorm = "none",
    min_size: int = 800,
    max_size: int = 1333,
    resize_in_training: bool = True,
) -> nn.Module:
    """Builds the plain detector of fine-tuning and prediction.

    Args:
        detector: A key of `DETECTORS`.
        num_classes: Object classes, without the background; torchvision's own count is one more.
        trunk: As for `aligndet.detectors.backbones.build_backbone`.
        trunk_weights: Likewise.
        fpn_channels: Likewise.
        fpn_norm: Likewise.
        min_size: Images are resized to this short side for prediction.
        max_size: Bound of their long side.
        resize_in_training: False where the data loader has resized the images already.

    Raises:
        ValueError: If the detector or the trunk is unknown, or the weights do not fit.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    family = _family(detector)
    mean, std = normalisation(trunk)
    return family.plain(
        family.backbone(trunk, trunk_weights, fpn_channels, fpn_norm),
        num_classes + 1,
        min_size=min_size,
        max_size=max_size,
        image_mean=list(mean),
        image_std=list(std),
        _skip_resize=not resize_in_training,
    )


def _family(detector: str) -> Any:
    if detector not in DETECTORS:
        raise ValueError(f"unknown detector {detector!r}; there are: {', '.join(DETECTORS)}")
    return DETECTORS[detector]
