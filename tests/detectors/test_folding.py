from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aligndet.detectors.build import build_pretrainable
from aligndet.detectors.folding import folded
from aligndet.detectors.trunks import build_trunk, trunk_features


def known(trunk: nn.Module) -> nn.Module:
    """The trunk in eval mode, with norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for norm in norms(trunk):
        for name, low, high in (("running_mean", -0.3, 0.3), ("running_var", 0.5, 2), ("bias", -0.3, 0.3)):
            getattr(norm, name).data.uniform_(low, high, generator=generator)
    return trunk.eval().requires_grad_(False)


def norms(trunk: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in trunk.modules()
        if "BatchNorm" in type(module).__name__ or "Frozen" in type(module).__name__
    ]


@pytest.mark.parametrize(
    ("name", "left"), [("resnet18", 0), ("tf_efficientnet_lite0", 0), ("resnetv2_18", 8), ("repvgg_a0", 17)]
)
def test_norms_are_folded_into_the_convolutions_before_them(name: str, left: int) -> None:
    """Pre-activated ones follow no convolution, and RepVGG has some on a way without any."""
    trunk = known(build_trunk(name)[0])
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    ours = folded(trunk)
    assert len(norms(ours)) == left < len(norms(trunk))
    images = torch.rand(2, 3, 64, 96)
    for level, expected in zip(trunk_features(ours, images), trunk_features(trunk, images), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in trunk.state_dict().items())


def test_a_trunk_of_transformers_is_folded() -> None:
    detector: Any = build_pretrainable("detr", trunk="resnet18").detector
    trunk = known(detector.backbone.body)
    ours, images = folded(trunk), torch.rand(2, 3, 64, 96)
    assert norms(trunk)
    assert not norms(ours)
    for level, expected in zip(trunk_features(ours, images), trunk_features(trunk, images), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trunk", ["inception_v3", "efficientformer_l1"])
def test_a_trunk_for_large_or_equal_images_is_run_as_it_is(trunk: str) -> None:
    """Or folded; the first has unpadded convolutions, the second maps of one size."""
    built = known(build_trunk(trunk)[0])
    images = torch.rand(1, 3, 224, 224)
    pairs = zip(trunk_features(folded(built), images), trunk_features(built, images), strict=True)
    assert all(float((level - expected).norm() / expected.norm()) < 1e-4 for level, expected in pairs)


class Layers(nn.Module):
    """A convolution, a norm and a way to use them."""

    def __init__(self, use: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), use

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.use(self.conv, self.norm, images)]


@pytest.mark.parametrize(
    "use",
    [
        lambda conv, norm, x: norm(conv(conv(x))),  # the first map goes elsewhere
        lambda conv, norm, x: conv(x) + norm(conv.forward(x)),
        lambda conv, norm, x: (lambda y: y + norm(y))(conv(x)),
        lambda conv, norm, x: norm(x) + conv(x),
    ],
)
def test_what_is_also_used_unfolded_stays(use: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
    trunk = known(Layers(use))
    assert folded(trunk) is trunk
