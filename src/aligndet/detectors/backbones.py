"""Backbones: a trunk by timm or torchvision name, with a feature pyramid on top, named as torchvision
names them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import Conv2dNormActivation

from aligndet.detectors.trunks import build_trunk, trunk_features

PyramidNorm = Literal["none", "batch"]


class Branch(NamedTuple):
    """A pyramid that a detector is trained on."""

    pyramid: dict[str, Tensor]
    weight: float = 1.0  # of its losses
    prefix: str = ""  # of their names


class Backbone(nn.Module):
    """A trunk and its feature pyramid; submodules ``body`` and ``fpn``, as in torchvision's detectors.

    Attributes:
        out_channels: Of every pyramid level.
    """

    def __init__(self, body: nn.Module, fpn: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the pyramid's levels, finest first, (B, out_channels, H_l, W_l) each."""
        return self.pyramid(trunk_features(self.body, images))

    def branches(self, images: Tensor) -> tuple[Branch, ...]:
        """Returns the pyramids to train on: one; of a composite trunk, its assistant's as well."""
        return (Branch(self(images)),)

    def pyramid(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns the levels out of the trunk's maps, finest first."""
        return self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(features)))


def build_backbone(
    trunk: str,
    *,
    trunk_weights: str = "none",
    fpn_channels: int = 256,
    fpn_norm: PyramidNorm = "none",
    strides: tuple[int, ...] = (8, 16, 32),
    extra_levels: bool = True,
) -> Backbone:
    """Builds a trunk with a feature pyramid.

    Args:
        trunk: As for `build_trunk`; one with maps of stride 16 alone (ViT) gets a simple feature pyramid.
        trunk_weights: Likewise.
        fpn_channels: Width of the pyramid.
        fpn_norm: "none", or "batch": a batch norm after every convolution of the pyramid, which gives the
            features of any trunk the same magnitude (paper section 4.1).
        strides: Of the pyramid's levels that come from the trunk, from 4, 8, 16, 32.
        extra_levels: Two more levels, P6 and P7, by strided convolutions (dense detectors); else one by
            pooling.

    Raises:
        ValueError: If the trunk is unknown, lacks one of the strides, or the weights do not fit.
    """
    body, channels = build_trunk(trunk, strides=strides, weights=trunk_weights)
    fpn = build_pyramid(channels, fpn_channels, norm=fpn_norm, strides=strides, extra_levels=extra_levels)
    return Backbone(body, fpn, fpn_channels)


def build_pyramid(
    channels: list[int], width: int, *, norm: PyramidNorm, strides: tuple[int, ...], extra_levels: bool
) -> nn.Module:
    """Builds the pyramid of a trunk.

    Args:
        channels: Of the trunk's maps, as `build_trunk` returns them.
        width: As ``fpn_channels`` of `build_backbone`.
        norm: As its ``fpn_norm``.
        strides: As there.
        extra_levels: As there.
    """
    extra: ExtraFPNBlock = LastLevelP6P7(width, width) if extra_levels else LastLevelMaxPool()
    layer = nn.BatchNorm2d if norm == "batch" else None
    if layer and extra_levels:
        extra.p6, extra.p7 = (nn.Sequential(level, layer(width)) for level in (extra.p6, extra.p7))
    if len(channels) == 1:
        return SimpleFeaturePyramid(channels[0], width, strides, extra, layer or LayerNorm2d)
    return FeaturePyramidNetwork(channels, width, extra_blocks=extra, norm_layer=layer)


class SimpleFeaturePyramid(nn.Module):
    """A pyramid out of the last map of a plain transformer, which has one stride of 16 throughout (ViTDet).

    Every level has its own layers on that map: transposed convolutions to finer strides, pooling to coarser
    ones, then a 1x1 and a 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        strides: Sequence[int],
        extra_blocks: ExtraFPNBlock,
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.extra_blocks = extra_blocks
        self.levels = nn.ModuleList()
        for stride in strides:
            scaled, channels = _rescale(in_channels, stride, norm)
            self.levels.append(
                nn.Sequential(
                    *scaled,
                    *(
                        Conv2dNormActivation(i, out_channels, size, norm_layer=norm, activation_layer=None)
                        for i, size in ((channels, 1), (out_channels, 3))
                    ),
                )
            )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the trunk's maps by name, returns the pyramid's levels by name."""
        last = list(x.values())[-1]
        levels = [level(last) for level in self.levels]
        names = [str(level) for level in range(len(levels))]
        levels, names = self.extra_blocks(levels, [last] * len(levels), names)
        return OrderedDict(zip(names, levels, strict=True))


def _rescale(channels: int, stride: int, norm: Callable[[int], nn.Module]) -> tuple[list[nn.Module], int]:
    """Layers from stride 16 to another one, and their number of output channels."""
    layers: list[nn.Module] = [nn.MaxPool2d(stride // 16)] if stride > 16 else []
    for factor in range((16 // stride).bit_length() - 1):
        layers += [norm(channels), nn.GELU()] if factor else []
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
        channels //= 2
    return layers, channels
