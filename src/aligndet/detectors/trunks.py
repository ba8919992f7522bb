"""Trunks by the names of timm or torchvision, and their weights."""

from __future__ import annotations

from typing import Any

import timm
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from aligndet.detectors.layouts import load_trunk
from aligndet.detectors.reading import bundled_file, read_tensors, weights_file

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TORCHVISION_TRUNKS = tuple(
    name for name in torchvision.models.list_models(module=torchvision.models) if "resne" in name
)
_TIMM_NAMES = {  # torchvision's names that timm spells otherwise
    "mobilenet_v2": "mobilenetv2_100",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "vit_b_16": "vit_base_patch16_224",
}
_ANY_PATCHES = {"dynamic_img_size": True, "dynamic_img_pad": True}
_SETTINGS: dict[str, dict[str, Any]] = {  # timm builds transformers for one image size unless told so
    # stochastic depth as in detectors on Swin; timm's 0.1 is for classification
    "swin": {"strict_img_size": False, "always_partition": True, "drop_path_rate": 0.2},
    **dict.fromkeys(("vit", "deit", "eva"), _ANY_PATCHES),
}
_STRIDES = (4, 8, 16, 32)


def build_trunk(
    trunk: str, *, strides: tuple[int, ...] = _STRIDES, weights: str = "none", any_patch: bool = False
) -> tuple[nn.Module, list[int]]:
    """Builds a network that gives feature maps; call it through `trunk_features`.

    Args:
        trunk: A torchvision ResNet ("resnet50") or any timm model that offers ``features_only=True``
            ("convnext_tiny", "swin_tiny_patch4_window7_224", "vit_small_patch16_224");
            "timm/resnet50" asks for timm's where both have the name.
        strides: Of the wanted maps.
        weights: "default" (ImageNet weights, downloaded), "bundled" (carried by an installed package),
            "none" (random), or a file in one of the layouts of `aligndet.detectors.layouts`, or a run of
            `aligndet pretrain-backbone`.
        any_patch: Take ViTs of any patch size; their one map cannot make a pyramid unless it has stride 16.

    Returns:
        The trunk, and the channels of its maps: one for each stride, or one alone where all maps are of
        stride 16 (ViT).

    Raises:
        ValueError: If the trunk is unknown, lacks one of the strides, or the weights do not fit.
    """
    if trunk in _TORCHVISION_TRUNKS:
        body, channels = _torchvision_trunk(trunk, strides)
    else:
        body, channels = _timm_trunk(trunk, strides, any_patch)
    load_trunk_weights(body, trunk, weights)
    return body, channels


def build_timm_trunk(
    trunk: str, *, strides: tuple[int, ...] = _STRIDES, weights: str = "none"
) -> tuple[str, nn.Module, list[int]]:
    """Builds a convolutional trunk as ``timm.create_model(name, features_only=True)`` alone builds it.

    Args:
        trunk: By timm's name, or by torchvision's where timm has the same network under it.
        strides: Of the wanted maps, up to the coarsest.
        weights: As for `build_trunk`; torchvision's weights where the name is torchvision's.

    Returns:
        timm's name, the trunk, and the channels of its maps.

    Raises:
        ValueError: If timm has no such trunk with these strides that takes images of any size, or the
            weights do not fit.
    """
    name = _timm_name(trunk)
    if name.startswith(tuple(_SETTINGS)):
        raise ValueError(f"trunk {trunk!r} is for images of one size here; take a convolutional one")
    body, channels = _timm_trunk(name, strides)
    if len(channels) < len(strides) or getattr(body, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(f"trunk {trunk!r} has no feature maps (channels first) at strides {strides}")
    load_trunk_weights(body, trunk, weights)
    return name, body, channels


def load_trunk_weights(body: nn.Module, trunk: str, weights: str, **of_timm: Any) -> None:
    """Loads weights into a trunk.

    Args:
        body: The trunk.
        trunk: Its name, as for `build_trunk`.
        weights: As for `build_trunk`.
        of_timm: What timm is asked for where ``weights`` are "default"; maps by default.

    Raises:
        ValueError: If they do not fit, or cannot be had.
    """
    if weights == "bundled":
        load_trunk(body, read_tensors(bundled_file(trunk)), f"bundled weights of {trunk!r}")
    elif weights == "default":
        load_trunk(body, _downloaded(trunk, **of_timm), f"ImageNet weights of {trunk!r}")
    elif weights != "none":
        match = load_trunk(
            body, read_tensors(weights_file(weights)), f"trunk weights {weights!r} do not fit trunk {trunk!r}"
        )
        print(f"trunk weights {weights}: {match}")


def trunk_features(body: nn.Module, images: Tensor) -> list[Tensor]:
    """A trunk's feature maps, whichever library it is from.

    Args:
        body: Of `build_trunk`.
        images: (B, 3, H, W) normalised; padded to multiples of 32 (patches and windows want whole numbers
            of pixels; torchvision's detectors have padded already).

    Returns:
        (B, C_l, H_l, W_l), finest first.
    """
    features = body(padded(images))
    if isinstance(features, dict):  # torchvision's
        return list(features.values())
    if getattr(body, "output_fmt", "NCHW") == "NHWC":  # timm's Swin
        return [normalised_places(feature).permute(0, 3, 1, 2).contiguous() for feature in features]
    return list(features)


def first_stages(body: nn.Module, count: int) -> list[nn.Module]:
    """Finds what a trunk does first: everything up to its map of stride 4 is its first stage, 8 its second.

    Args:
        body: A convolutional trunk or a Swin, torchvision's or timm's.
        count: How many stages.

    Returns:
        Modules that hold nothing else; none where count is 0.

    Raises:
        ValueError: If the trunk has no stages, or not so many.
    """
    info = getattr(body, "feature_info", None)
    maps = [(f"layer{n}", 2 ** (n + 1)) for n in (1, 2, 3, 4)]  # torchvision's
    if info is not None:
        maps = [(entry["module"], entry["reduction"]) for entry in info.info]
    stage = next((name for name, stride in maps if count and stride == 2 ** (count + 1)), None)
    names = [name for name, _ in body.named_modules()]  # in the order in which they compute
    inside = [n for n in names if stage and f"{n}.".startswith((f"{stage}.", f"{stage.replace('.', '_')}."))]
    if not inside:
        if count:
            raise ValueError(f"this trunk ({type(body).__name__}) has no {count} first stages to be frozen")
        return []
    before = names[1 : names.index(inside[0])]
    return [body.get_submodule(n) for n in before if not inside[0].startswith(f"{n}.")] + [
        body.get_submodule(n) for n in inside
    ]


def normalised_places(features: Tensor) -> Tensor:
    """Normalises every location of a map (B, H, W, C) over its channels, as detectors on Swin do.

    Their layer norms also scale and shift, which the convolution that follows can do as well.
    """
    return F.layer_norm(features, (int(features.shape[-1]),))  # a number: ONNX's tracer wants a constant


def padded(images: Tensor) -> Tensor:
    """Pads images (B, 3, H, W) with zeros, at the right and below, to multiples of 32."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % 32, 0, -height % 32)) if height % 32 or width % 32 else images


def normalisation(trunk: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the images that a trunk was trained on."""
    if trunk in _TORCHVISION_TRUNKS:
        return IMAGENET_MEAN, IMAGENET_STD
    config = timm.get_pretrained_cfg(_timm_name(trunk))
    return (tuple(config.mean), tuple(config.std)) if config else (IMAGENET_MEAN, IMAGENET_STD)


def _torchvision_trunk(trunk: str, strides: tuple[int, ...]) -> tuple[nn.Module, list[int]]:
    # stride 4: layer1
    layers = {f"layer{stride.bit_length() - 2}": str(level) for level, stride in enumerate(strides)}
    model = torchvision.models.get_model(trunk, weights=None)
    widths = [model.inplanes // 8 * 2 ** (int(layer[-1]) - 1) for layer in layers]
    return IntermediateLayerGetter(model, return_layers=layers), widths


def _timm_trunk(trunk: str, strides: tuple[int, ...], any_patch: bool = False) -> tuple[nn.Module, list[int]]:
    name = _timm_name(trunk)
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"unknown trunk {trunk!r}; similar names: {close}")
    settings = next((v for prefix, v in _SETTINGS.items() if name.startswith(prefix)), {})
    try:
        model: Any = timm.create_model(
            name, features_only=True, pretrained=False, out_indices=tuple(range(-len(strides), 0)), **settings
        )
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"trunk {trunk!r} has no feature maps at strides {strides}: {error}") from error
    reductions, channels = model.feature_info.reduction(), model.feature_info.channels()
    if reductions == list(strides):
        return model, channels
    if set(reductions) == {16} or (any_patch and settings is _ANY_PATCHES and len(set(reductions)) == 1):
        return model, channels[-1:]
    raise ValueError(f"trunk {trunk!r} has no feature maps at strides {strides} but at {reductions}")


def _timm_name(trunk: str) -> str:
    name = trunk.removeprefix("timm/")
    return _TIMM_NAMES.get(name, name)


def _downloaded(trunk: str, **of_timm: Any) -> dict[str, Tensor]:
    try:
        if trunk in _TORCHVISION_TRUNKS:  # the paper's ResNet-50 is the first version of the weights
            return dict(torchvision.models.get_model_weights(trunk)["IMAGENET1K_V1"].get_state_dict())
        asked = of_timm or {"features_only": True}
        return dict(timm.create_model(_timm_name(trunk), pretrained=True, **asked).state_dict())
    except Exception as error:  # urllib, huggingface_hub and requests raise kinds of their own
        raise ValueError(
            f"could not get ImageNet weights for trunk {trunk!r} ({type(error).__name__}: {error});"
            " give a file, 'bundled' or 'none' as trunk_weights"
        ) from error
