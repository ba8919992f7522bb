from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import box_iou

from aligndet.boxes import as_targets
from aligndet.detectors.backbones import build_backbone
from aligndet.detectors.build import build_detector, build_pretrainable
from aligndet.detectors.roi_parts import PositiveSampler, overlaps, pick, refine
from aligndet.detectors.weights import initialise, pretrained_state

SMALL: dict[str, Any] = {"trunk": "resnet18", "fpn_channels": 64}
BOXES = [  # the first one of 56 pixels: a pseudo-mask on a grid of 56 is the mask itself
    torch.tensor([[8.0, 16.0, 64.0, 72.0], [30.0, 40.0, 120.0, 110.0]]),
    torch.tensor([[10.0, 20.0, 66.0, 76.0]]),
]


def disc() -> Tensor:
    """A mask that does not touch the edge of its box."""
    y, x = torch.meshgrid(torch.arange(56.0), torch.arange(56.0), indexing="ij")
    return ((y - 25) ** 2 + (x - 30) ** 2 < 18**2).byte()


def test_pick_thins_out_at_random() -> None:
    wanted = torch.tensor([True, False, True, True, False])
    assert torch.equal(pick(wanted, 3), wanted)
    assert torch.equal(pick(wanted, 10), wanted)
    assert torch.equal(pick(wanted[:0], 10), wanted[:0])
    drawn = torch.stack([pick(wanted, 2) for _ in range(60)])
    assert (drawn.sum(1) == 2).all()
    assert torch.equal(drawn.any(0), wanted)


def test_the_sampler_takes_objects_only_and_shares_the_limit() -> None:
    labels = [torch.tensor([0, 3, -1, 4, 5]), torch.tensor([0, 0]), torch.tensor([1, 0, 2])]
    picked, background = PositiveSampler(6)(labels)
    assert [int(mask.sum()) for mask in picked] == [2, 0, 2]
    assert all((label[mask] > 0).all() for label, mask in zip(labels, picked, strict=True))
    assert not any(mask.any() for mask in background)


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
def test_torchvisions_losses(detector: str) -> None:
    """The same weights, regions and boxes through torchvision's own detector of one class."""
    adapter: Any = build_pretrainable(detector, **SMALL)
    nn.init.normal_(adapter.stages[0].box_predictor.bbox_pred.weight, std=0.03)  # else no region moves
    plain: Any = build_detector(detector, num_classes=1, **SMALL, resize_in_training=False)
    initialise(plain, pretrained_state(adapter))
    plain.roi_heads.fg_bg_sampler = PositiveSampler(4096)
    for model in (adapter.detector, plain):
        model.backbone.body.requires_grad_(False).eval()
    images = [torch.rand(3, 128, 128), torch.rand(3, 128, 96)]
    targets = [{"boxes": b, "labels": torch.ones(len(b), dtype=torch.int64)} for b in BOXES]
    known = {}
    if detector == "mask_rcnn":
        known["masks"] = [torch.stack([disc(), torch.zeros_like(disc())]), disc()[None]]
        whole = torch.zeros(2, 128, 128, dtype=torch.uint8)
        whole[0, 16:72, 8:64] = disc()
        targets[0]["masks"] = whole
        targets[1]["masks"] = torch.zeros(1, 128, 96, dtype=torch.uint8)
        targets[1]["masks"][0, 20:76, 10:66] = disc()
    torch.manual_seed(1)
    ours = adapter(images, BOXES, **known).losses
    torch.manual_seed(1)
    theirs = plain(images, targets)
    assert set(ours) == set(theirs) - {"loss_classifier"}
    for name in set(ours) - {"loss_mask"}:
        torch.testing.assert_close(ours[name], theirs[name])
    if detector == "mask_rcnn":  # theirs also learns from the proposal without a mask
        assert ours["loss_mask"] != theirs["loss_mask"]
        known["masks"][0], targets[0]["masks"] = known["masks"][0][:1], targets[0]["masks"][:1]
        targets[0] |= {"boxes": BOXES[0][:1], "labels": targets[0]["labels"][:1]}
        torch.manual_seed(1)
        loss = adapter(images, [BOXES[0][:1], BOXES[1]], **known).losses["loss_mask"]
        torch.manual_seed(1)
        torch.testing.assert_close(loss, plain(images, targets)["loss_mask"])


@pytest.mark.parametrize("rows", [1, 2])
def test_pseudo_masks_of_large_boxes_lie_where_torchvision_would_have_them(rows: int) -> None:
    """A mask on a grid of half the image's resolution costs what the mask of the image itself does."""
    adapter: Any = build_pretrainable("mask_rcnn", **SMALL)
    torch.nn.init.normal_(adapter.detector.roi_heads.mask_predictor.mask_fcn_logits.weight, std=1.0)
    features = {str(i): torch.randn(1, 64, 64 >> i, 64 >> i) for i in range(4)}
    bottom = 48 + 56 * rows
    box, grid = torch.tensor([[32.0, 48.0, 144.0, bottom]]), disc()
    whole = torch.zeros(1, 256, 256, dtype=torch.uint8)
    whole[0, 48:bottom, 32:144] = grid.repeat_interleave(rows, 0).repeat_interleave(2, 1)
    region, match, label = [box + 4.0], [torch.zeros(1, dtype=torch.int64)], torch.ones(1, dtype=torch.int64)
    targets = [{"boxes": box, "labels": label, "masks": grid[None]}]
    ours = adapter._mask_loss(1, features, region, match, targets, [(256, 256)])
    heads = adapter.detector.roi_heads
    logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, region, [(256, 256)])))
    theirs = maskrcnn_loss(logits, region, [whole], [label - 1], match)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)


def test_the_images_of_a_batch_share_the_masks() -> None:
    adapter: Any = build_pretrainable("mask_rcnn", **SMALL, options={"max_masks": 5})
    features = {str(i): torch.randn(2, 64, 64 >> i, 64 >> i) for i in range(4)}
    box, seen = torch.tensor([[32.0, 48.0, 144.0, 160.0]]), list[int]()
    pool = adapter.detector.roi_heads.mask_roi_pool
    pool.register_forward_pre_hook(lambda _, inputs: seen.extend(map(len, inputs[1])))
    target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": disc()[None]}
    matched = torch.zeros(4, dtype=torch.int64)
    adapter._mask_loss(1, features, [box.repeat(4, 1)] * 2, [matched] * 2, [target] * 2, [(256, 256)] * 2)
    assert seen == [2, 2]


def test_half_precision_leaves_out_exactly_the_added_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter: Any = build_pretrainable("cascade_rcnn", **SMALL)
    sizes: list[list[int]] = []

    def watched(*args: Any) -> list[Tensor]:
        moved = refine(*args)
        sizes.append([len(before) - len(after) for before, after in zip(args[2], moved, strict=True)])
        return moved

    monkeypatch.setattr("aligndet.detectors.roi.refine", watched)
    with torch.autocast("cpu", torch.bfloat16):
        adapter([torch.rand(3, 128, 128), torch.rand(3, 128, 96)], BOXES)
    assert sizes == [[2, 1]] * 3


def test_a_region_stands_for_the_proposal_that_it_overlaps_most() -> None:
    adapter: Any = build_pretrainable("faster_rcnn", **SMALL)
    generator = torch.Generator().manual_seed(4)
    shifts = torch.randint(-25, 26, (200, 4), generator=generator)
    regions = [boxes.repeat(200 // len(boxes), 1) + shifts for boxes in BOXES]
    chosen, _, labels, _ = adapter.stages[0].select_training_samples(regions, as_targets(BOXES, first=1))
    offsets = [0, len(BOXES[0])]
    for boxes, region, label, offset in zip(BOXES, chosen, labels, offsets, strict=True):
        assert len(region) > 20
        for box, found in zip(region, label.tolist(), strict=True):
            overlaps = box_iou(box[None], boxes)[0]
            assert overlaps.max() >= 0.5
            assert found - 1 - offset == int(overlaps.argmax())


@pytest.mark.parametrize("detector", ["faster_rcnn", "cascade_rcnn"])
def test_regions_stay_where_they_are_at_first(detector: str) -> None:
    adapter: Any = build_pretrainable(detector, **SMALL)
    for stage in adapter.stages:
        assert not stage.box_predictor(torch.randn(3, 1024))[1].any()


def test_refined_regions_are_where_the_deltas_say_without_the_added_objects() -> None:
    stage = build_pretrainable("faster_rcnn", **SMALL).stages[0]  # type: ignore[attr-defined]
    regions = [torch.tensor([[10.0, 10.0, 50.0, 30.0], [8.0, 16.0, 64.0, 72.0]]), torch.zeros(0, 4)]
    deltas = torch.tensor([[1.0, 0.0, 0.0, 5.0 * torch.log(torch.tensor(2.0))], [0.0, 0.0, 0.0, 0.0]])
    moved = refine(stage, deltas.requires_grad_(), regions, [(128, 128), (128, 96)], BOXES)
    assert not moved[0].requires_grad
    # a tenth of the width to the right, twice as high about the same centre
    torch.testing.assert_close(moved[0], torch.tensor([[14.0, 0.0, 54.0, 40.0]]))
    assert moved[1].shape == (0, 4)
    assert len(refine(stage, deltas, regions, [(128, 128), (128, 96)])[0]) == 2
    nothing = [torch.zeros(0, 4), torch.zeros(0, 4)]
    moved = refine(stage, torch.zeros(0, 4), nothing, [(128, 128), (128, 96)])
    assert [part.shape for part in moved] == [(0, 4), (0, 4)]


def test_the_papers_mask_head_stays_as_it_is() -> None:
    adapter: Any = build_pretrainable("mask_rcnn", **SMALL, options={"pretrain_mask": False})
    assert adapter.needs == ()
    output = adapter([torch.rand(3, 128, 128)], BOXES[:1])
    assert set(output.losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_box_reg"}
    plain = build_detector("mask_rcnn", num_classes=3, **SMALL)
    new = [m for m, origin in initialise(plain, pretrained_state(adapter)).items() if origin == "new"]
    assert {m.split(".")[1] for m in new if "cls_score" not in m} == {"mask_head", "mask_predictor"}


def test_the_region_proposal_network_can_be_shown_objects_alone() -> None:
    images = [torch.rand(3, 128, 128)]
    both: Any = build_pretrainable("faster_rcnn", **SMALL)
    alone: Any = build_pretrainable("faster_rcnn", **SMALL, options={"rpn_positives": True})
    alone.load_state_dict(both.state_dict())
    for adapter in (both, alone):  # everything is background to this network
        torch.nn.init.constant_(adapter.detector.rpn.head.cls_logits.bias, -20.0)
    assert both(images, BOXES[:1]).losses["loss_objectness"] < 15
    assert alone(images, BOXES[:1]).losses["loss_objectness"] > 15


@pytest.mark.parametrize(("count", "others"), [(200, 30), (1, 1), (0, 5), (5, 0)])
def test_overlaps_are_those_of_torchvision(count: int, others: int) -> None:
    first, second = (torch.rand(n, 4).cumsum(1) * 50 for n in (count, others))  # x0 < y0 < x1 < y1
    assert torch.equal(overlaps(first, second), box_iou(first, second))
    adapter: Any = build_pretrainable("faster_rcnn", **SMALL)
    assert adapter.detector.rpn.box_similarity is overlaps


@pytest.mark.parametrize("detector", ["faster_rcnn", "cascade_rcnn"])
def test_a_batch_without_proposals_has_losses(detector: str) -> None:
    adapter: Any = build_pretrainable(detector, **SMALL, options={"rpn_positives": True})
    losses = adapter([torch.rand(3, 128, 128)] * 2, [BOXES[0][:0]] * 2).losses
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_the_stages_of_a_cascade_have_their_own_iou() -> None:
    with pytest.raises(ValueError, match="cascade_rcnn has no option 'box_fg_iou_thresh'"):
        build_detector("cascade_rcnn", num_classes=3, **SMALL, options={"box_fg_iou_thresh": 0.9})


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "htc"])
def test_new_box_predictors_start_near_zero(detector: str) -> None:
    plain: Any = build_detector(detector, num_classes=3, **SMALL)
    stages = getattr(plain.roi_heads, "stages", [plain.roi_heads])
    for stage in stages:
        predictor = stage.box_predictor
        for layer, size in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
            assert float(layer.weight.detach().std()) == pytest.approx(size, rel=0.1)  # torchvision's: 0.018
            assert not layer.bias.any()


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "htc"])
def test_box_heads_may_have_the_papers_convolutions(detector: str) -> None:
    options = {"box_convolutions": 4}
    adapter: Any = build_pretrainable(detector, **SMALL, options=options)
    plain = build_detector(detector, num_classes=3, **SMALL, options=options)
    origins = initialise(plain, pretrained_state(adapter))
    convolutions = [name for name in origins if ".box_head." in name and name.endswith(".0")]
    assert len(convolutions) == 4 * len(adapter.stages)
    assert {origins[name] for name in convolutions} == {"pre-trained"}
    with pytest.raises(ValueError, match="these weights are of another detector"):
        initialise(build_detector(detector, num_classes=3, **SMALL), pretrained_state(adapter))


def test_torchvision_alone_loads_the_papers_box_head() -> None:
    ours = build_detector("faster_rcnn", num_classes=3, **SMALL, options={"box_convolutions": 4})
    backbone = build_backbone("resnet18", fpn_channels=64, strides=(4, 8, 16, 32), extra_levels=False)
    theirs = FasterRCNN(backbone, 3 + 1, box_head=FastRCNNConvFCHead((64, 7, 7), [64] * 4, [1024]))
    theirs.load_state_dict(ours.state_dict(), strict=True)
