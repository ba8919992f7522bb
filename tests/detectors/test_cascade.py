from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from aligndet.detectors.backbones import Backbone
from aligndet.detectors.build import build_detector, build_pretrainable
from aligndet.detectors.cascade import CascadeRCNN, ClassAgnosticPredictor, HtcPretraining
from aligndet.detectors.roi_parts import mask_features

CLASSES = 4  # with background
IMAGES = [torch.rand(3, 128, 128), torch.rand(3, 96, 128)]
OBJECTS = torch.tensor([[8.0, 16.0, 64.0, 72.0], [30.0, 20.0, 120.0, 90.0]])
SIZES: dict[str, Any] = {"min_size": 96, "max_size": 128, "box_score_thresh": 0.0}
ALL: dict[str, Any] = {"box_batch_size_per_image": 10**6, "box_positive_fraction": 0.5}  # no region at random
FEW: dict[str, Any] = {"box_batch_size_per_image": 64}


def targets() -> list[dict[str, Tensor]]:
    masks = torch.zeros(2, 96, 128, dtype=torch.uint8)
    masks[0, 16:72, 8:64] = masks[1, 20:90, 30:120] = 1
    labels = torch.tensor([2, 3])
    return [
        {"boxes": OBJECTS, "labels": labels, "masks": torch.cat([masks, masks[:, :32]], dim=1)},
        {"boxes": OBJECTS[:1], "labels": labels[:1], "masks": masks[:1]},
    ]


def one_stage(masks: bool) -> tuple[Any, Any]:
    """torchvision's detector, and a cascade of one stage with the same weights."""
    backbone = HtcPretraining.backbone("resnet18", "none", 64, "none")
    family = MaskRCNN if masks else FasterRCNN
    single: Any = family(backbone, CLASSES, **SIZES, **ALL, rpn_post_nms_top_n_train=200)
    predictor = ClassAgnosticPredictor(1024, CLASSES)
    mask_predictors = [MaskRCNNPredictor(256, 256, CLASSES)] if masks else []
    cascade: Any = CascadeRCNN(backbone, [predictor], mask_predictors, **SIZES, **ALL)
    cascade.rpn = single.rpn
    nn.init.zeros_(predictor.bbox_pred.weight)  # the regions stay where they are: so will the mask head's
    nn.init.constant_(predictor.bbox_pred.bias, 0.0 if masks else 0.2)
    for name in ("weight", "bias"):
        theirs = getattr(single.roi_heads.box_predictor.bbox_pred, name)
        ours = getattr(predictor.bbox_pred, name)
        theirs.data = ours.data.repeat(CLASSES, *[1] * (ours.ndim - 1))
    state = {k: v for k, v in single.roi_heads.state_dict().items() if "bbox_pred" not in k}
    cascade.roi_heads.stages[0].load_state_dict(state, strict=False)
    return single, cascade


@pytest.mark.parametrize("masks", [False, True])
def test_one_stage_detects_what_torchvision_detects(masks: bool) -> None:
    single, cascade = (model.eval() for model in one_stage(masks))
    with torch.inference_mode():
        for theirs, ours in zip(single(IMAGES), cascade(IMAGES), strict=True):
            assert len(theirs["boxes"]) > 0
            assert set(theirs) == set(ours)
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("masks", [False, True])
def test_one_stage_loses_what_torchvision_loses(masks: bool) -> None:
    single, cascade = (model.train() for model in one_stage(masks))
    backbone: Backbone = single.backbone
    backbone.eval()
    torch.manual_seed(2)
    theirs = single(IMAGES, targets())
    torch.manual_seed(2)
    ours = cascade(IMAGES, targets())
    assert {name.removesuffix("_1") for name in ours} == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name.removesuffix("_1")])


def test_each_stage_starts_where_the_one_before_has_ended() -> None:
    cascade: Any = build_detector(
        "cascade_rcnn", num_classes=3, trunk="resnet18", fpn_channels=64, min_size=96
    )
    seen: list[list[Tensor]] = []
    for stage in cascade.roi_heads.stages:
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
    pool = cascade.roi_heads.stages[0].box_roi_pool
    pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    for index, stage in enumerate(cascade.roi_heads.stages):
        to_the_right = 0.05 * (index + 1) * stage.box_coder.weights[0]
        stage.box_predictor.bbox_pred.bias.data = torch.tensor([to_the_right, 0.0, 0.0, 0.0])
    with torch.inference_mode():
        cascade.eval()(IMAGES[:1])
    assert len(seen) == 3
    for shift, (before,), (after,) in zip((0.05, 0.10), seen, seen[1:], strict=False):
        width = before[:, 2] - before[:, 0]
        torch.testing.assert_close(after[:, 0], (before[:, 0] + shift * width).clamp(max=128.0))
    matchers = [stage.proposal_matcher for stage in cascade.roi_heads.stages]
    assert [matcher.high_threshold for matcher in matchers] == [0.5, 0.6, 0.7]
    assert [matcher.low_threshold for matcher in matchers] == [0.5, 0.6, 0.7]


def test_mask_features_flow_from_stage_to_stage() -> None:
    heads: Any = build_detector("htc", num_classes=3, trunk="resnet18", fpn_channels=64).roi_heads
    pooled = torch.rand(2, 64, 14, 14)
    one, two, three = heads.stages
    first = one.mask_head(pooled)
    second = two.mask_head(pooled + heads.flows[0](first))
    third = three.mask_head(pooled + heads.flows[1](second))
    found = mask_features([one, two, three], list(heads.flows), pooled)
    torch.testing.assert_close(found, [first, second, third])


@pytest.mark.slow
def test_htc_learns_to_detect() -> None:
    torch.manual_seed(3)
    few = {"box_batch_size_per_image": 64, "rpn_post_nms_top_n_train": 200, "rpn_post_nms_top_n_test": 200}
    model: Any = build_detector(
        "htc", num_classes=3, trunk="resnet18", fpn_channels=64, min_size=96, options=few
    )
    image = torch.rand(3, 96, 128) * 0.2
    image[:, 16:72, 8:64] += 0.7
    target = {**targets()[1]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(15):
        losses = model([image], [target])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    for layer in model.modules():  # so few steps leave no statistics to predict with
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = None
    with torch.inference_mode():
        found = model.eval()([image])[0]
    best = found["boxes"][0]
    corner = torch.maximum(best[:2], OBJECTS[0, :2])
    overlap = (torch.minimum(best[2:], OBJECTS[0, 2:]) - corner).clamp(min=0).prod()
    union = (best[2:] - best[:2]).prod() + (OBJECTS[0, 2:] - OBJECTS[0, :2]).prod() - overlap
    assert overlap / union > 0.5
    assert found["labels"][0] == 2
    assert found["masks"].shape == (len(found["boxes"]), 1, 96, 128)


def test_pretraining_weighs_the_stages() -> None:
    adapter: Any = build_pretrainable("htc", trunk="resnet18", fpn_channels=64)
    masks = [torch.ones(2, 8, 8, dtype=torch.uint8), torch.ones(1, 8, 8, dtype=torch.uint8)]
    outputs = []
    for weights in ((1.0, 1.0, 1.0), adapter.weights):
        adapter.weights = weights
        torch.manual_seed(1)
        outputs.append(adapter(IMAGES, [OBJECTS, OBJECTS[:1]], masks))
    assert [stage.weight for stage in outputs[1].stages] == [1.0, 0.5, 0.25]
    for depth, weight in enumerate((1.0, 0.5, 0.25), 1):
        for name in (f"loss_box_reg_{depth}", f"loss_mask_{depth}"):
            assert outputs[0].losses[name] > 0
            torch.testing.assert_close(outputs[1].losses[name], weight * outputs[0].losses[name])


@pytest.mark.parametrize("name", ["cascade_rcnn", "htc"])
def test_fine_tuning_weighs_the_stages(name: str) -> None:
    cascade: Any = build_detector(
        name, num_classes=3, trunk="resnet18", fpn_channels=64, min_size=96, options=FEW
    )
    kinds = ("classifier", "box_reg", *(["mask"] if name == "htc" else []))
    cascade.train().backbone.eval().requires_grad_(False)
    results = []
    for weights in ((1.0, 1.0, 1.0), cascade.roi_heads.weights):
        cascade.roi_heads.weights = weights
        torch.manual_seed(1)
        results.append(cascade(IMAGES[1:], targets()[1:]))
    for depth, weight in enumerate((1.0, 0.5, 0.25), 1):
        for loss in (f"loss_{kind}_{depth}" for kind in kinds):
            assert results[0][loss] > 0
            torch.testing.assert_close(results[1][loss], weight * results[0][loss])
    sum(results[1].values()).backward()
    assert all(parameter.grad is not None for parameter in cascade.roi_heads.parameters())
    precisions = [stage.box_coder.weights for stage in cascade.roi_heads.stages]
    assert precisions == [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)]


@pytest.mark.parametrize("pretraining", [False, True])
def test_in_training_too_a_stage_starts_where_the_one_before_has_ended(pretraining: bool) -> None:
    small: Any = {"trunk": "resnet18", "fpn_channels": 64}
    adapter: Any = build_pretrainable("htc", **small)
    plain: Any = build_detector("htc", num_classes=3, **small, min_size=96, options=FEW)
    cascade = adapter.detector if pretraining else plain
    seen: list[Tensor] = []
    masked: list[Tensor] = []
    for stage in cascade.roi_heads.stages:  # all regions go beyond the right edge
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        stage.box_predictor.bbox_pred.bias.data = torch.tensor([1e4, 0.0, 0.0, 0.0])
        stage.mask_roi_pool.register_forward_pre_hook(lambda _, inputs: masked.append(inputs[1][0]))
    pool = cascade.roi_heads.stages[0].box_roi_pool
    pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1][0]))
    if pretraining:
        adapter(IMAGES[1:], [OBJECTS[:1]], [torch.ones(1, 8, 8, dtype=torch.uint8)])
    else:
        cascade.train()(IMAGES[1:], targets()[1:])
    assert (seen[0][:, 0] < 128).sum() > 10
    for regions in seen[1:]:
        moved = (regions != OBJECTS[0]).any(1)  # but the object that is added to them
        assert moved.any() != pretraining  # which takes no other region then
        assert (regions[moved][:, 0] == 128).all()
    assert [len(regions) for regions in masked] == [1, 1, 1]  # the object alone: masks are of moved regions


def test_classes_are_the_mean_over_all_stages() -> None:
    cascade: Any = build_detector(
        "cascade_rcnn", num_classes=3, trunk="resnet18", fpn_channels=64, min_size=96
    )
    chances = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.1, 0.2, 0.6, 0.1], [0.1, 0.1, 0.1, 0.7]])
    for stage, chance in zip(cascade.roi_heads.stages, chances, strict=True):
        nn.init.zeros_(stage.box_predictor.cls_score.weight)
        stage.box_predictor.cls_score.bias.data = chance.log()
    with torch.inference_mode():
        found = cascade.eval()(IMAGES[1:])[0]
    assert set(found["labels"].tolist()) == {1, 2, 3}
    torch.testing.assert_close(found["scores"], chances.mean(0)[found["labels"]])


def test_masks_are_the_mean_over_all_stages() -> None:
    options = {"box_score_thresh": 0.0, "box_detections_per_img": 5}
    made: list[Tensor] = []
    seen: list[Tensor] = []
    htc: Any = build_detector(
        "htc", num_classes=3, trunk="resnet18", fpn_channels=64, min_size=96, options=options
    )
    for stage, chance in zip(htc.roi_heads.stages, (0.1, 0.2, 0.6), strict=True):
        nn.init.zeros_(stage.mask_predictor.mask_fcn_logits.weight)
        nn.init.constant_(stage.mask_predictor.mask_fcn_logits.bias, math.log(chance / (1 - chance)))
        stage.mask_head.register_forward_hook(lambda *call: made.append(call[2]))
        stage.mask_predictor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        masks = htc.eval()(IMAGES[1:])[0]["masks"]
    torch.testing.assert_close(masks.amax(), torch.tensor(0.3))
    assert len(made) == 3
    assert all(ours is theirs for ours, theirs in zip(seen, made, strict=True))  # each of its own features
