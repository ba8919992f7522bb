"""What can be seen in a pre-trained detector: features of boxes, and where it looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aligndet.boxes import BACKGROUND, BoxPredictions, PretrainOutput
from aligndet.data.formats import read_labelled
from aligndet.detectors.build import build_detector, build_pretrainable
from aligndet.detectors.weights import save_weights
from aligndet.evaluation.centers import predicted_centers
from aligndet.evaluation.pretraining import load_pretrainable, load_untuned
from aligndet.evaluation.tsne import box_features, embed_boxes

CPU = torch.device("cpu")
SIDES = {"online": 0, "momentum": 1}  # and how far apart they are
SMALL: dict[str, Any] = {"trunk": "mobilenetv3_small_050", "fpn_channels": 64}


class _Known(nn.Module):
    """Three predictions: two for the second proposal, one for none."""

    def forward(self, images: list[Tensor], proposals: list[Tensor]) -> PretrainOutput:
        embeddings = torch.tensor([[3.0, 0.0], [0.0, 0.5], [1.0, 1.0]])
        return PretrainOutput((BoxPredictions(embeddings, torch.tensor([1, 1, BACKGROUND])),), {})


def test_a_box_has_the_mean_of_the_predictions_that_stand_for_it() -> None:
    features, seen = box_features(_Known(), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.rand(2, 4))
    assert seen.tolist() == [False, True]
    torch.testing.assert_close(features, torch.tensor([[0.0, 0.0], [0.5, 0.5]]))


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn"])
def test_every_kind_of_detector_has_features(detector: str) -> None:
    adapter: Any = build_pretrainable(detector, **SMALL)
    image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 10, 80, 80], [60, 20, 120, 90]])
    features, seen = box_features(adapter.train(), image, boxes)
    assert features.shape == (2, 128)
    assert seen.all()
    assert not features.requires_grad


def test_features_in_two_dimensions(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = build_pretrainable("fcos", **SMALL), build_pretrainable("fcos", **SMALL)
    coco = read_labelled(sample / "train.json")
    embedded = embed_boxes(pair, coco, min_size=128, max_size=128, classes=2, boxes=8, device=CPU)
    count = len(embedded.classes)
    assert embedded.before.shape == embedded.after.shape == (count, 2)
    assert np.isfinite(embedded.after).all()
    largest = sorted(np.bincount(np.concatenate(coco.labels)))[-2:]
    assert min(largest) > 8
    assert sorted(map(embedded.classes.count, set(embedded.classes))) == [8, 8]
    assert set(embedded.levels) <= {"P2", "P3", "P4", "P5"}
    with pytest.raises(ValueError, match="boxes have features; at least 10 are needed"):
        embed_boxes(pair, coco, min_size=128, max_size=128, classes=1, boxes=3, device=CPU)

    def side(adapter: Any, _: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(boxes), 2), float(adapter is pair[1])), torch.ones(len(boxes)) > 0

    monkeypatch.setattr("aligndet.evaluation.tsne.box_features", side)
    monkeypatch.setattr("aligndet.evaluation.tsne._laid_out", lambda features, _: features.numpy())
    embedded = embed_boxes(pair, coco, min_size=128, max_size=128, device=CPU)
    assert not embedded.before.any()
    assert embedded.after.all()


@pytest.mark.parametrize("detector", ["fcos", "faster_rcnn"])
def test_centers_are_in_the_image(detector: str) -> None:
    model: Any = build_detector(detector, num_classes=1, min_size=128, max_size=256, **SMALL).eval()
    threshold = getattr(model, "score_thresh", None)
    image = torch.randint(0, 255, (3, 200, 400), dtype=torch.uint8)
    centers = predicted_centers(model, image, count=30, device=CPU)
    assert 5 < len(centers) <= 30
    assert (centers >= 0).all()
    assert (centers[:, 0] > 256).any()  # pixels of the image, not of what the network saw
    assert (centers <= torch.tensor([400, 200])).all()
    assert getattr(model, "score_thresh", None) == threshold


def _run(folder: Path) -> Path:
    settings: dict[str, Any] = {
        "detector": "fcos",
        "fpn_norm": "none",
        "options": None,
        "seed": 3,
        "proposals": "p",
    }
    settings |= {**SMALL, "min_size": [64, 96], "max_size": 128}
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    return folder


def _neck(detector: Any) -> Tensor:
    return detector.backbone.fpn.inner_blocks[0][0].weight.detach()


def test_features_are_those_of_the_trained_detector(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    trained: Any = build_pretrainable("fcos", **SMALL)
    state = {f"{side}.{k}": v + add for k, v in trained.state_dict().items() for side, add in SIDES.items()}
    (run / "checkpoints").mkdir()
    torch.save({"state_dict": state, "global_step": 0}, run / "checkpoints" / "last.ckpt")
    before, after = load_pretrainable(run)
    for name, value in after.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name
    assert not torch.equal(_neck(before.detector), _neck(after.detector))
    trunks = [side.detector.backbone.body.state_dict() for side in (before, after)]
    assert all(torch.equal(value, trunks[1][name]) for name, value in trunks[0].items())


def test_before_fine_tuning_there_is_random_and_then_pretrained(tmp_path: Path) -> None:
    run, architecture = _run(tmp_path / "run"), {"detector": "fcos", "fpn_norm": "none", **SMALL}
    detector: Any = build_detector(
        **architecture, num_classes=1, min_size=96, max_size=128, trunk_weights="none"
    )
    manifest = {"kind": "pretrained", "architecture": architecture}
    save_weights(run / "pretrained", detector.state_dict(), manifest)
    before, after = load_untuned(run)
    assert torch.equal(_neck(after), _neck(detector))
    assert not torch.equal(_neck(before), _neck(detector))
    for side in (before, after):
        for name, value in side.backbone.body.state_dict().items():
            assert torch.equal(value, detector.backbone.body.state_dict()[name]), name


def test_a_folder_that_is_no_pretraining(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"settings": {"annotations": "train.json"}}')
    for load in (load_pretrainable, load_untuned):
        with pytest.raises(ValueError, match="is no run of aligndet pretrain"):
            load(tmp_path)
