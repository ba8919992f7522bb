from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.distributed.utils import _recursive_to

from aligndet.data.labelled import HostBatch
from aligndet.detectors.backbones import build_backbone
from aligndet.momentum import momentum_copy
from aligndet.trainer import SyncBatchNorms


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("trunk", ["resnet18", "mobilenetv2_050"])  # timm's norms have an activation inside
def test_synchronised_batch_norms_compute_the_same(trunk: str, trained: bool) -> None:
    """And those of a frozen trunk stay what they are."""
    online = build_backbone(trunk, fpn_channels=64, fpn_norm="batch")
    both = nn.ModuleDict({"online": online, "momentum": momentum_copy(online, online.body)})
    image = torch.rand(2, 3, 64, 96)
    online(image)  # for the statistics
    both.eval()
    before = {name: both[name](image) for name in both}
    parameters = list(both.parameters())
    for backbone in (online, both["momentum"]):
        (backbone if trained else backbone.fpn).train()  # type: ignore[union-attr]
    SyncBatchNorms().apply(both)
    norms = [layer for layer in both.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 10
    assert all(isinstance(norm, nn.SyncBatchNorm) == norm.training for norm in norms)
    assert any(norm.training for norm in online.body.modules()) == trained
    both.eval()
    assert all(ours is theirs for ours, theirs in zip(both.parameters(), parameters, strict=True))
    assert both["momentum"].body is online.body
    for name, levels in before.items():
        for level, wanted in levels.items():
            torch.testing.assert_close(both[name](image)[level], wanted)


def test_images_for_validation_are_not_moved() -> None:
    """Neither by Lightning nor by DDP."""
    batch = HostBatch([(torch.zeros(3, 8, 8), {"boxes": torch.zeros(1, 4)}), None])
    assert len(batch.items) == 1
    assert move_data_to_device(batch, torch.device("meta")) is batch
    ((moved,),) = _recursive_to((batch,), torch.device("meta"), False)
    assert moved is batch
