from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet.commands.export import export
from aligndet.detectors.build import build_detector
from aligndet.detectors.onnx import save_onnx
from aligndet.detectors.trunks import normalised_places
from aligndet.detectors.weights import save_weights

ARCHITECTURE: dict[str, Any] = {"trunk": "resnet18", "fpn_channels": 64, "num_classes": 3}
ARCHITECTURE |= {"min_size": 128, "max_size": 192}


def _detector(name: str) -> Any:
    # few regions keep the test short
    own = {"score_thresh": 0.0} if name in ("fcos", "retinanet") else {"rpn_post_nms_top_n_test": 20}
    detector: Any = build_detector(name, **ARCHITECTURE, options=own)
    for layer, weight in detector.named_parameters():
        if any(part in layer for part in ("cls_logits.weight", "cls_score.weight", "rpn.head.cls_logits")):
            torch.nn.init.normal_(weight, std=0.3)  # untrained scores are all alike: ties, not an order
    return detector


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn", "mask_rcnn"])
def test_onnxruntime_finds_the_same(name: str, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    detector = _detector(name)
    share = save_onnx(detector, tmp_path / "model.onnx")
    assert share is not None
    assert share >= 0.99
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    image = torch.rand(3, 160, 128)
    expected = detector.eval()([image])[0]
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"image": image.numpy()}), strict=True))
    assert set(found) == set(expected)
    assert found["boxes"].shape == tuple(expected["boxes"].shape)
    scores = torch.from_numpy(found["scores"]).sort().values
    torch.testing.assert_close(scores, expected["scores"].detach().sort().values, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_another_model_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    detector = _detector("faster_rcnn")
    written = torch.onnx.export

    def changed(model: Any, *args: Any, **kwargs: Any) -> None:
        written(model, *args, **kwargs)
        model.roi_heads.box_predictor.cls_score.bias.data[2] += 3.0

    monkeypatch.setattr(torch.onnx, "export", changed)
    with pytest.raises(ValueError, match=r"model\.onnx: onnxruntime finds \d+ % of PyTorch's boxes only"):
        save_onnx(detector, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(tmp_path: Path) -> None:
    architecture = {"detector": "cascade_rcnn", **ARCHITECTURE}
    detector = build_detector(**architecture)
    manifest = {"architecture": architecture, "class_names": ["a", "b", "c"], "category_ids": [1, 2, 3]}
    save_weights(tmp_path / "tuned", detector.state_dict(), manifest)
    with pytest.raises(ValueError, match=r"CascadeRCNN cannot be written as ONNX; these can: FCOS"):
        export(tmp_path / "tuned", output=tmp_path / "out", format="onnx")
    (tmp_path / "tuned" / "manifest.json").write_text(json.dumps({**manifest, "class_names": None}))
    with pytest.raises(ValueError, match="knows no classes yet"):
        export(tmp_path / "tuned", output=tmp_path / "out", format="onnx")
    with pytest.raises(ValueError, match="is the folder of a detector"):
        export(tmp_path / "tuned", output=tmp_path / "tuned", format="onnx", overwrite=True)
    for given in ("num_classes", "min_size", "max_size"):
        asked: dict[str, Any] = {given: 64, "format": "onnx"}
        with pytest.raises(ValueError, match="are those of fine-tuning"):
            export(tmp_path / "tuned", output=tmp_path / "out", **asked)
    (tmp_path / "run.json").write_text("{}")
    for kind in ("onnx", None):
        with pytest.raises(ValueError, match="is the folder of a run; give another output"):
            export(tmp_path / "tuned", output=tmp_path, format=kind)
    with pytest.raises(ValueError, match="--min-size must be at least 1, not 0"):
        export(tmp_path / "tuned", output=tmp_path / "out", num_classes=3, min_size=0)
    with pytest.raises(ValueError, match=r"--num-classes: give the number"):
        export(tmp_path / "tuned", output=tmp_path / "out")
    assert not (tmp_path / "out" / "model.onnx").exists()


class _Places(torch.nn.Module):
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return normalised_places(maps.permute(0, 2, 3, 1))


def test_maps_of_swin_can_be_written(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    path, maps = tmp_path / "places.onnx", torch.rand(1, 8, 5, 6)
    torch.onnx.export(
        torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), _Places()), (maps,), str(path), dynamo=False
    )
    assert path.is_file()
