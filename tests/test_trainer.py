from __future__ import annotations

import pytest
import torch
from torch import nn

from aligndet.detectors.backbones import build_backbone
from aligndet.momentum import momentum_copy
from aligndet.trainer import SyncBatchNorms


@pytest.mark.parametrize("trunk", ["resnet18", "mobilenetv2_050"])  # timm's norms have an activation inside
def test_synchronised_batch_norms_compute_the_same(trunk: str) -> None:
    online = build_backbone(trunk, fpn_channels=64, fpn_norm="batch")
    both = nn.ModuleDict({"online": online, "momentum": momentum_copy(online, online.body)})
    image = torch.rand(2, 3, 64, 96)
    online(image)  # for the statistics
    online.body.eval()
    before = {name: both[name](image) for name in both}
    parameters = list(both.parameters())
    SyncBatchNorms().apply(both)
    norms = [layer for layer in both.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 10
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert all(ours is theirs for ours, theirs in zip(both.parameters(), parameters, strict=True))
    assert both["momentum"].body is online.body
    for name, levels in before.items():
        for level, wanted in levels.items():
            torch.testing.assert_close(both[name](image)[level], wanted)
