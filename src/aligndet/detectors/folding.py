"""A frozen trunk, run with its batch norms folded into the convolutions before them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from aligndet.detectors.trunks import trunk_features

_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d, FrozenBatchNormAct2d)


def folded(trunk: nn.Module) -> nn.Module:
    """Copies a trunk in eval mode, with every batch norm that follows a convolution folded into it.

    Such a norm scales and shifts each channel, which the convolution can do at no extra cost.

    Args:
        trunk: For `trunk_features`.

    Returns:
        A network with the same maps, up to rounding; the trunk itself if nothing can be folded, or if it is
        called part by part (CBNet's) or split over several devices.
    """
    in_parts = type(trunk) is nn.ModuleDict or any(hasattr(p, "full_tensor") for p in trunk.parameters())
    if in_parts or not any(isinstance(module, _NORMS) for module in trunk.modules()):
        return trunk
    try:
        return _folded(copy.deepcopy(trunk)) or trunk
    except (AssertionError, RuntimeError, ValueError):  # a trunk for images of one size
        return trunk


@torch.no_grad()
def _folded(trunk: nn.Module) -> nn.Module | None:
    """Folds in place; returns None if there is nothing to fold, or the maps would change."""
    example = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    example = example.to(next(trunk.parameters()).device)
    pairs, before = _pairs(trunk, example)
    for conv, norm in pairs:
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    replaced = {norm: _activation(norm) for _, norm in pairs}
    for parent in list(trunk.modules()):
        for name, child in parent.named_children():
            if child in replaced:
                setattr(parent, name, replaced[child])
    # If a convolution's output is also used outside its norm, folding changes the network; compare and
    # give up.
    same = all(
        float((after - former).norm()) <= 1e-2 * float(former.norm())
        for after, former in zip(trunk_features(trunk, example), before, strict=True)
    )
    return trunk if pairs and same else None


def _pairs(trunk: nn.Module, example: Tensor) -> tuple[list[tuple[nn.Conv2d, Any]], list[Tensor]]:
    """Convolutions that are called once, each with the norm that takes its map; and the trunk's maps."""
    maps: list[tuple[Tensor, nn.Conv2d]] = []  # kept alive, so that no other tensor takes the place of one
    pairs: list[tuple[nn.Conv2d, Any]] = []

    def made(conv: nn.Conv2d, _: tuple[Tensor, ...], output: Tensor) -> None:
        maps.append((output, conv))

    def taken(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pairs.extend((conv, norm) for output, conv in maps if output is inputs[0])

    hooks = [m.register_forward_hook(made) for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(taken) for m in trunk.modules() if isinstance(m, _NORMS)]
    features = [level.clone() for level in trunk_features(trunk, example)]
    for hook in hooks:
        hook.remove()
    calls = [conv for _, conv in maps]
    return [(conv, norm) for conv, norm in pairs if calls.count(conv) == 1], features


def _activation(norm: Any) -> nn.Module:
    """The activation within a norm: timm's have one."""
    activates = isinstance(norm, BatchNormAct2d | FrozenBatchNormAct2d)
    return norm.act if activates else nn.Identity()
