"""CBNet v2 (Liang et al., 2022): a composite of two trunks, under Cascade R-CNN and HTC.

The lead is the trunk that detects. The assistant runs first, and what each of its stages finds enters all
stages of the lead down to the same depth (dense higher-level connections). In training the assistant's maps
go through the same pyramid and heads as the lead's (assistant supervision); prediction uses the lead alone.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from aligndet.detectors.backbones import Backbone, Branch, PyramidNorm, build_pyramid
from aligndet.detectors.cascade import CascadePretraining, CascadeRCNN, HtcPretraining
from aligndet.detectors.trunks import build_trunk, normalised_places, padded

ASSISTANT_WEIGHT = 0.5  # of the losses on the assistant's maps


class CompositeBackbone(Backbone):
    """Two copies of a trunk's stages on one stem, and a feature pyramid.

    ``body`` holds what comes out of image-domain pre-training: stem, assistant, lead. ``connections`` are
    new like the neck: ``connections[l][k]`` leads from the assistant's stage l + k to the lead's stage l.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: nn.ModuleDict,
        channels: Sequence[int],
        fpn: nn.Module,
        out_channels: int,
        *,
        channels_last: bool = False,
    ) -> None:
        """Doubles the stages.

        Args:
            stem: What the stages begin with; both copies share it.
            stages: In order, one for each of the trunk's maps.
            channels: Of these maps.
            fpn: The pyramid of either copy.
            out_channels: Of every pyramid level.
            channels_last: Whether stem and stages work on (B, H, W, C).
        """
        parts = {"stem": stem, "assistant": stages, "lead": copy.deepcopy(stages)}
        super().__init__(nn.ModuleDict(parts), fpn, out_channels)
        self.channels_last = channels_last
        width = list(stem.parameters())[-1].shape[0]  # the last layer's bias or kernel
        self.connections = nn.ModuleList(
            nn.ModuleList(_connection(source, into) for source in channels[level:])
            for level, into in enumerate((width, *channels[:-1]))
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the levels of the lead's pyramid, finest first, (B, out_channels, H_l, W_l) each."""
        return self.pyramid(self.maps(images)[1])

    def branches(self, images: Tensor) -> tuple[Branch, ...]:
        """Returns the pyramids of the assistant and of the lead."""
        assistant, lead = self.maps(images)
        with _statistics_kept(self.fpn):  # running statistics are for the lead, which alone predicts
            supervised = Branch(self.pyramid(assistant), ASSISTANT_WEIGHT, "assistant_")
        return supervised, Branch(self.pyramid(lead))

    def maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Runs both trunks.

        Args:
            images: (B, 3, H, W) normalised; padded to multiples of 32.

        Returns:
            The assistant's and the lead's maps, (B, C_l, H_l, W_l) each, finest first.
        """
        body: Any = self.body
        stem = self._channels_first(body["stem"](padded(images)))
        assistant, x = [], stem
        for stage in body["assistant"].values():
            x = self._run(stage, x)
            assistant.append(self._normalised(x))
        lead, x = [], stem
        for level, stage in enumerate(body["lead"].values()):
            x = self._run(stage, x + self._connected(level, assistant, x.shape[-2:]))
            lead.append(self._normalised(x))
        return assistant, lead

    def _connected(self, level: int, assistant: Sequence[Tensor], size: torch.Size) -> Tensor:
        """The sum of what the assistant's stages send to a stage of the lead."""
        connections: Any = self.connections[level]
        sent = [
            F.interpolate(connection(found), size=size, mode="nearest")
            for connection, found in zip(connections, assistant[level:], strict=True)
        ]
        return reduce(torch.add, sent)

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return self._channels_first(stage(x.permute(0, 2, 3, 1) if self.channels_last else x))

    def _normalised(self, x: Tensor) -> Tensor:
        """The map as the trunk alone would give it, see `trunk_features`."""
        return normalised_places(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.channels_last else x

    def _channels_first(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self.channels_last else x


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Lets batch norms normalise by the batch without updating their running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _connection(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 1x1 convolution and a norm that starts at zero: the lead starts as the plain trunk."""
    norm = LayerNorm2d(out_channels)
    nn.init.zeros_(norm.weight)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), norm)


def build_composite_backbone(
    trunk: str, trunk_weights: str = "none", fpn_channels: int = 256, fpn_norm: PyramidNorm = "none"
) -> CompositeBackbone:
    """Builds two copies of a trunk and a feature pyramid, P2 to P6.

    Args:
        trunk: As for `aligndet.detectors.trunks.build_trunk`: one whose stages follow each other (ResNets,
            Swin, ConvNeXt, MobileNets, EfficientNets).
        trunk_weights: Likewise, for both copies.
        fpn_channels: As for `aligndet.detectors.backbones.build_backbone`.
        fpn_norm: Likewise.

    Raises:
        ValueError: If the trunk is unknown or cannot be doubled, or the weights do not fit.
    """
    body, channels = build_trunk(trunk, weights=trunk_weights)
    stem, stages = _stem_and_stages(body)
    if not stages:
        raise ValueError(
            f"trunk {trunk!r} cannot be doubled for CBNet v2: its stages are no layers of their own;"
            " take a ResNet, a Swin, a ConvNeXt, a MobileNet or an EfficientNet"
        )
    fpn = build_pyramid(channels, fpn_channels, norm=fpn_norm, strides=(4, 8, 16, 32), extra_levels=False)
    return CompositeBackbone(
        stem,
        stages,
        channels,
        fpn,
        fpn_channels,
        channels_last=getattr(body, "output_fmt", "NCHW") == "NHWC",
    )


def _stem_and_stages(body: Any) -> tuple[nn.Sequential, nn.ModuleDict]:
    """Splits a trunk into a stem and a stage for each map; no stages if a map comes from within a layer."""
    layers = OrderedDict(body.named_children())
    names = list(getattr(body, "return_layers", ()))  # torchvision's and timm's
    stages: dict[str, nn.Module] = {}
    if names and list(layers)[-len(names) :] == names:
        stages = {name: layers.pop(name) for name in names}
    elif list(layers)[-1] == "blocks":  # timm's MobileNets and EfficientNets: a stage is one block or more
        blocks, ends = layers.pop("blocks"), [name.split(".")[1] for name in body.feature_info.module_name()]
        for start, end in pairwise([0, *(int(end) + 1 for end in ends)]):
            stages[f"blocks_{end}"] = blocks[start:end]
    return nn.Sequential(layers), nn.ModuleDict(stages)


class CompositeCascadeRCNN(CascadeRCNN):
    """Cascade R-CNN or HTC on a composite backbone."""

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """As torchvision's detectors: detections in eval mode, losses in train mode."""
        if not self.training:
            return super().forward(images, targets)
        batch, targets = self.transform(images, targets)
        losses: dict[str, Tensor] = {}
        for pyramid, weight, prefix in self.backbone.branches(batch.tensors):
            regions, of_regions = self.rpn(batch, pyramid, targets)
            _, of_heads = self.roi_heads(pyramid, regions, batch.image_sizes, targets)
            losses |= {prefix + name: weight * loss for name, loss in (of_regions | of_heads).items()}
        return losses


class CompositeCascadePretraining(CascadePretraining):
    """CBNet v2 with Cascade R-CNN: three contrasts on the assistant's maps, weighted half, three on the
    lead's.
    """

    network = CompositeCascadeRCNN
    backbone = staticmethod(build_composite_backbone)


class CompositeHtcPretraining(HtcPretraining):
    """CBNet v2 with HTC: likewise, with mask heads."""

    network = CompositeCascadeRCNN
    backbone = staticmethod(build_composite_backbone)
