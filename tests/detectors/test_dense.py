from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.models.detection import FCOS, RetinaNet

from aligndet.boxes import BACKGROUND
from aligndet.detectors.build import build_detector, build_pretrainable
from aligndet.detectors.dense import sample_boxes
from aligndet.detectors.projection import ProjectionHead


def test_sample_is_half_assigned_half_background_and_never_ignored() -> None:
    ids = torch.tensor([BACKGROUND, 3, -2, 0, BACKGROUND, -2, 1, BACKGROUND, 2])
    assigned, background = {1, 3, 6, 8}, {0, 4, 7}
    picked = sample_boxes(ids, 4).tolist()
    assert len(set(picked[:2]) & assigned) == 2
    assert len(set(picked[2:]) & background) == 2
    assert set(sample_boxes(ids, 100).tolist()) == assigned | background
    assert len(sample_boxes(ids, 7)) == 6  # three assigned, and there are no more than three others
    assert len(sample_boxes(ids[:0], 2)) == 0
    seen = {index for _ in range(50) for index in sample_boxes(ids, 4).tolist()}
    assert seen == assigned | background


def test_each_anchor_of_a_location_has_output_weights_of_its_own() -> None:
    head = ProjectionHead(8, embedding_dim=5, num_anchors=3)
    features, anchors = torch.randn(4, 8), torch.tensor([2, 0, 1, 2])
    equal = head(features[:1].expand(3, -1), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(equal, equal[:1].expand(3, -1))  # they start alike
    torch.nn.init.normal_(head.output.weight)
    torch.nn.init.normal_(head.output.bias)
    hidden = torch.relu(features @ head.hidden.weight.T + head.hidden.bias)
    for row, anchor in enumerate(anchors.tolist()):
        part = slice(5 * anchor, 5 * anchor + 5)
        expected = head.output.weight[part] @ hidden[row] + head.output.bias[part]
        torch.testing.assert_close(head(features, anchors)[row], expected)


def box_losses_of_torchvision(plain: Any, adapter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same boxes through torchvision's own detector with the same weights, and through ours."""
    plain.load_state_dict(adapter.detector.state_dict(), strict=False)
    plain.train()
    plain.backbone.body.eval()
    adapter.detector.backbone.body.requires_grad_(False).eval()
    images = [torch.rand(3, 128, 128), torch.rand(3, 128, 96)]
    boxes = [
        torch.tensor([[8.0, 8.0, 70.0, 80.0], [30.0, 40.0, 120.0, 110.0]]),
        torch.tensor([[10.0, 20.0, 60.0, 90.0]]),
    ]
    theirs = plain(images, [{"boxes": b, "labels": torch.ones(len(b), dtype=torch.int64)} for b in boxes])
    return theirs, adapter(images, boxes).losses


def test_fcos_keeps_torchvisions_box_losses() -> None:
    plain = build_detector("fcos", num_classes=1, trunk="resnet18", fpn_channels=64, resize_in_training=False)
    theirs, ours = box_losses_of_torchvision(
        plain, build_pretrainable("fcos", trunk="resnet18", fpn_channels=64)
    )
    assert isinstance(plain, FCOS)
    assert set(ours) == {"bbox_regression", "bbox_ctrness"}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


def test_retinanet_keeps_torchvisions_box_loss() -> None:
    plain = build_detector(
        "retinanet", num_classes=1, trunk="resnet18", fpn_channels=64, resize_in_training=False
    )
    theirs, ours = box_losses_of_torchvision(
        plain, build_pretrainable("retinanet", trunk="resnet18", fpn_channels=64)
    )
    assert isinstance(plain, RetinaNet)
    assert set(ours) == {"bbox_regression"}
    torch.testing.assert_close(ours["bbox_regression"], theirs["bbox_regression"])


@pytest.mark.parametrize("detector", ["fcos", "retinanet"])
def test_boxes_are_computed_for_losses_alone(detector: str) -> None:
    adapter: Any = build_pretrainable(detector, trunk="resnet18", fpn_channels=64)
    calls = []
    adapter.detector.head.regression_head.register_forward_hook(lambda *call: calls.append(call))
    inputs = [torch.rand(3, 64, 64)], [torch.tensor([[4.0, 4.0, 50.0, 60.0]])]
    adapter(*inputs)
    assert len(calls) == 1
    with torch.no_grad():
        output = adapter(*inputs)
    assert len(calls) == 1
    assert not output.losses
    assert len(output.stages[0].embeddings)
