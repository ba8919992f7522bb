from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet, retinanet_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

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
    assert not head.hidden.bias.any()
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


class Places(nn.Module):
    """A pyramid whose features say where they are: number of the image, x, y, and the stride."""

    out_channels = 64

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for stride in (8, 16, 32, 64, 128):
            height, width = (side // stride for side in images.shape[-2:])
            level = images.new_zeros(len(images), self.out_channels, height, width)
            level[:, 0] = torch.arange(len(images))[:, None, None]
            level[:, 1] = torch.arange(width) * stride
            level[:, 2] = torch.arange(height)[:, None] * stride
            level[:, 3] = stride
            maps[str(stride)] = level
        return maps


class Unprojected(nn.Module):
    """Features as they are, and the number of the anchor."""

    def __init__(self, num_anchors: int) -> None:
        super().__init__()
        self.num_anchors = num_anchors

    def forward(self, features: Tensor, anchors: Tensor) -> Tensor:
        return torch.cat([features[:, :4], anchors[:, None]], 1)


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_an_embedding_is_of_the_place_that_stands_for_its_proposal(name: str) -> None:
    adapter: Any = build_pretrainable(name, trunk="resnet18", fpn_channels=64)
    head, anchors_of = adapter.detector.head, adapter.detector.anchor_generator
    adapter.detector.backbone = Places()
    head.classification_head.conv = nn.Identity()
    head.projection_head = Unprojected(head.projection_head.num_anchors)
    generator = torch.Generator().manual_seed(0)
    corners = [torch.rand(12, 2, generator=generator) * 150 for _ in range(2)]
    proposals = [
        torch.cat([c, c + 20 + torch.rand(12, 2, generator=generator) * 80], 1).round() for c in corners
    ]
    with torch.no_grad():
        stage = adapter([torch.rand(3, 256, 256) for _ in range(2)], proposals).stages[0]
    assigned = stage.proposal_ids != BACKGROUND
    assert len(stage.proposal_ids[assigned].unique()) > 15
    certain = 0
    for embedding, number in zip(stage.embeddings, stage.proposal_ids.tolist(), strict=True):
        image, x, y, stride, anchor = (int(value) for value in embedding.tolist())
        own = number % 12
        assert number == BACKGROUND or image == number // 12
        if name == "fcos" and number != BACKGROUND:  # within the box, and 1.5 strides of its centre
            left, top, right, bottom = proposals[image][own].tolist()
            assert left < x < right
            assert top < y < bottom
            assert abs(x - (left + right) / 2) < 1.5 * stride
            assert abs(y - (top + bottom) / 2) < 1.5 * stride
            certain += 1
        elif name == "retinanet":
            shape = anchors_of.cell_anchors[(8, 16, 32, 64, 128).index(stride)][anchor]
            overlaps = box_iou(shape[None] + torch.tensor([[x, y, x, y]]), proposals[image])[0]
            if number == BACKGROUND:
                assert overlaps.max() < 0.4  # what lies between is ignored
            elif overlaps.max() >= 0.5:  # below, it is the best anchor of a proposal that has no better one
                assert overlaps.argmax() == own
                certain += 1
    assert certain > 50


@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn"])
def test_anchors_are_exact_in_half_precision(name: str) -> None:
    """In bfloat16, beyond 1,024 pixels FCOS's anchors of 8 would be 0 or 16 wide."""
    detector: Any = build_detector(name, num_classes=1, trunk="resnet18", fpn_channels=64)
    anchors_of = (detector.rpn if name == "faster_rcnn" else detector).anchor_generator
    images = ImageList(torch.zeros(1, 3, 64, 1344), [(64, 1344)])
    maps = [torch.zeros(1, 1, 64 // stride, 1344 // stride) for stride in (4, 8, 16, 32, 64)]
    exact, half = (anchors_of(images, [m.to(dtype) for m in maps])[0] for dtype in (None, torch.bfloat16))
    assert half.dtype == torch.float32
    assert torch.equal(exact, half)


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


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
def test_norms_of_towers_have_the_precision_of_autocast(name: str) -> None:
    """torch keeps them, and with them the towers' maps, in float32 on GPUs."""
    detectors: list[Any] = [
        build_detector(name, num_classes=3, trunk="resnet18", fpn_channels=64),
        build_pretrainable(name, trunk="resnet18", fpn_channels=64),
    ]
    for detector in detectors:
        norms = [module for module in detector.modules() if isinstance(module, nn.GroupNorm)]
        assert len(norms) == 8
        for norm in norms:
            x = torch.randn(2, 64, 3, 5)
            torch.testing.assert_close(norm(x), nn.GroupNorm.forward(norm, x))
            with torch.autocast("cpu", torch.bfloat16):
                assert norm(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "kind", "losses"),
    [("fcos", FCOS, {"bbox_regression", "bbox_ctrness"}), ("retinanet", RetinaNet, {"bbox_regression"})],
)
def test_torchvisions_box_losses_are_kept(name: str, kind: type, losses: set[str]) -> None:
    plain = build_detector(name, num_classes=1, trunk="resnet18", fpn_channels=64, resize_in_training=False)
    adapter = build_pretrainable(name, trunk="resnet18", fpn_channels=64)
    theirs, ours = box_losses_of_torchvision(plain, adapter)
    assert isinstance(plain, kind)
    assert set(ours) == losses
    for loss, value in ours.items():
        torch.testing.assert_close(value, theirs[loss])


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


def test_what_differs_from_torchvisions_own() -> None:
    """The head of its second RetinaNet; FCOS's distances start within a level, and low scores are kept."""
    theirs: Any = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=4)
    ours: Any = build_detector("retinanet", num_classes=3, trunk="resnet18")
    ours.head.load_state_dict(theirs.head.state_dict(), strict=True)
    adapter: Any = build_pretrainable("retinanet", trunk="resnet18", fpn_channels=64)
    for model in (theirs, ours, adapter.detector):
        assert model.head.regression_head._loss_type == "giou"
    fcos: Any = build_pretrainable("fcos", trunk="resnet18", fpn_channels=64)
    plain: Any = build_detector("fcos", num_classes=3, trunk="resnet18", fpn_channels=64)
    for model in (fcos.detector, plain):  # both sides of a comparison start alike
        assert (model.head.regression_head.bbox_reg.bias == 4.0).all()
    assert plain.score_thresh == 0.05
