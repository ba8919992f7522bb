"""From a name to a detector: one plain dict."""

from __future__ import annotations

from collections.abc import Set
from inspect import Parameter, signature
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.models.detection.rpn import RPNHead

from aligndet.boxes import PretrainableDetector
from aligndet.detectors import query_families as families
from aligndet.detectors.backbones import PyramidNorm
from aligndet.detectors.cascade import CascadePretraining, HtcPretraining
from aligndet.detectors.composite import CompositeCascadePretraining, CompositeHtcPretraining
from aligndet.detectors.dense import FcosPretraining, RetinaNetPretraining
from aligndet.detectors.query import query_pretraining
from aligndet.detectors.roi import FasterRcnnPretraining, MaskRcnnPretraining
from aligndet.detectors.roi_parts import EmbeddingPredictor
from aligndet.detectors.trunks import normalisation

DETECTORS: dict[str, Any] = {
    "fcos": FcosPretraining,
    "retinanet": RetinaNetPretraining,
    "faster_rcnn": FasterRcnnPretraining,
    "mask_rcnn": MaskRcnnPretraining,
    "cascade_rcnn": CascadePretraining,
    "htc": HtcPretraining,
    "cbnet_cascade_rcnn": CompositeCascadePretraining,
    "cbnet_htc": CompositeHtcPretraining,
    "detr": query_pretraining(families.DETR),
    "conditional_detr": query_pretraining(families.CONDITIONAL_DETR),
    "dab_detr": query_pretraining(families.DAB_DETR),
    "deformable_detr": query_pretraining(families.DEFORMABLE_DETR),
    "rt_detr": query_pretraining(families.RT_DETR),
    "rt_detr_v2": query_pretraining(families.RT_DETR_V2),
    "d_fine": query_pretraining(families.D_FINE),
    "rf_detr": query_pretraining(families.RF_DETR),
}


_PREDICTION_HEADS = (
    *(FCOSClassificationHead, FCOSRegressionHead, RetinaNetClassificationHead, RetinaNetRegressionHead),
    *(RPNHead, FastRCNNPredictor, EmbeddingPredictor),
)


def family_of(detector: str) -> Any:
    """The class of a detector, an `Adapter`.

    Raises:
        ValueError: If there is no such key.
    """
    if detector not in DETECTORS:
        raise ValueError(f"unknown detector {detector!r}; there are: {', '.join(DETECTORS)}")
    return DETECTORS[detector]


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
    family = family_of(detector)
    known = {p.name for p in _parameters(family) if p.kind is Parameter.KEYWORD_ONLY}
    _check(detector, options, known | family.shared_options())
    mean, std = normalisation(trunk)
    backbone = family.backbone(trunk, trunk_weights, fpn_channels, fpn_norm)
    try:
        pretrainable: PretrainableDetector = family(
            backbone, image_mean=list(mean), image_std=list(std), **(options or {})
        )
    except TypeError as error:
        raise ValueError(f"{detector}: one of the options {options} has a wrong type ({error})") from error
    _predict_in_float32(pretrainable.detector)
    return pretrainable


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
    options: dict[str, Any] | None = None,
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
        options: Further arguments of torchvision's detector, such as ``box_batch_size_per_image``, or
            settings of transformers' configuration, such as ``num_queries``.

    Raises:
        ValueError: If the detector, the trunk or an option is unknown, or the weights do not fit.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    family = family_of(detector)
    mean, std = normalisation(trunk)
    own = {
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": list(mean),
        "image_std": list(std),
        "_skip_resize": not resize_in_training,
    }
    if family.weights_format == "transformers":
        _check(detector, options, family.shared_options())
    backbone = family.backbone(trunk, trunk_weights, fpn_channels, fpn_norm)
    model: nn.Module = family.plain(backbone, num_classes + 1, **{**own, **(options or {})})
    if family.weights_format == "torchvision":
        # torchvision's constructors ignore what they do not know; parts that they build themselves are None
        # by default
        known = {p.name for p in _parameters(type(model)) if p.default not in (Parameter.empty, None)}
        _check(detector, options, known - set(own) - family.fixed_options | family.shared_options())
    _predict_in_float32(model)
    return model


def training_defaults(
    detector: str, optimizer: str = "adamw", learning_rate: float = 1e-3
) -> dict[str, float]:
    """The training recipe, unless another one is asked for: learning_rate, weight_decay and clip.

    Args:
        detector: A key of `DETECTORS`; a kind of them may have numbers of its own for AdamW.
        optimizer: "adamw" or "sgd".
        learning_rate: Of AdamW, for detectors without one of their own.

    Raises:
        ValueError: If the detector is unknown.
    """
    recipe = {"learning_rate": learning_rate, "weight_decay": 0.05, "clip": 10.0}
    recipe |= family_of(detector).training_defaults
    return recipe | ({"learning_rate": 1e-2, "weight_decay": 1e-4} if optimizer == "sgd" else {})


def _predict_in_float32(detector: nn.Module) -> None:
    """Makes and decodes boxes in float32: in bfloat16, coordinates of 500 have steps of 2 pixels, and the
    anchors of torchvision, which have the type of the maps, would be 0 to 16 pixels wide.

    Outputs of the layers are still rounded to a half percent, but of the side of a box, not of its position.
    """
    heads = getattr(detector, "prediction_heads", None)
    for module in detector.modules() if heads is None else heads:
        if heads is not None or isinstance(module, _PREDICTION_HEADS):
            module.register_forward_hook(_to_float32)
        elif isinstance(module, MaskRCNNPredictor):
            module.register_forward_hook(_to_float32_in_eval_mode)
        elif isinstance(module, AnchorGenerator):
            module.register_forward_pre_hook(_as_of_float32)


def _as_of_float32(module: nn.Module, args: Any) -> Any:
    """Shows an anchor generator float32 maps; it looks at sizes, type and device alone."""
    images, (first, *others) = args
    return images, [first[:1, :1].float(), *others]


def _to_float32_in_eval_mode(module: nn.Module, args: Any, output: Any) -> Any:
    """For masks: in training, the loss is in float32 anyway, and a copy of all classes' would be kept."""
    return output if module.training else _to_float32(module, args, output)


def _to_float32(module: nn.Module, args: Any, output: Any) -> Any:
    return apply_to_collection(output, Tensor, Tensor.float)


def _parameters(kind: type) -> list[Parameter]:
    """Parameters of a constructor and of those of the ancestors."""
    return [p for ancestor in kind.__mro__[:-1] for p in signature(ancestor).parameters.values()]


def _check(detector: str, options: dict[str, Any] | None, known: Set[str]) -> None:
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise ValueError(f"{detector} has no option {unknown[0]!r}; there are: {', '.join(sorted(known))}")
