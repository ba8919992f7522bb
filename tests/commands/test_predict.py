"""`predict` and `evaluate` with a detector that knows the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
import torch
from PIL import Image
from torch import Tensor, nn

import aligndet
from aligndet.commands import evaluate as evaluate_module
from aligndet.commands import predict as predict_module
from aligndet.commands.evaluate import evaluate
from aligndet.commands.predict import predict
from aligndet.data.rle import EncodedMasks, decode, read_segmentation
from aligndet.data.videos import read_frames
from aligndet.detectors import weights
from aligndet.detectors.build import DETECTORS, build_detector
from aligndet.files import locked

MANIFEST: dict[str, Any] = {
    "architecture": {"detector": "fcos"},
    "class_names": ["bird", "fish"],
    "category_ids": [3, 7],
}


class Oracle(nn.Module):
    """Finds a sure fish and a doubtful bird in every image."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        boxes = torch.tensor([[2.0, 3.0, 12.0, 15.0], [20.0, 5.0, 30.0, 25.0]])
        found = {"boxes": boxes, "labels": torch.tensor([2, 1]), "scores": torch.tensor([0.9, 0.1])}
        return [found for _ in images]


class MaskOracle(Oracle):
    """Also finds that the fish fills the left half of its box, and the bird nothing of its own."""

    masks = True

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        masks = torch.zeros(2, 1, 30, 40)
        masks[0, 0, 3:15, 2:7] = 0.9
        return [{**found, "masks": masks} for found in super().forward(images)]


@pytest.fixture
def _finds_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {**MANIFEST, "architecture": {"detector": "oracle"}}
    monkeypatch.setattr(weights, "load_detector", lambda folder: (MaskOracle(), manifest))
    monkeypatch.setitem(DETECTORS, "oracle", MaskOracle)


@pytest.fixture(autouse=True)
def _oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "load_detector", lambda folder: (Oracle(), MANIFEST))
    monkeypatch.setattr(evaluate_module, "fingerprint", lambda path: f"of {path}")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "b.jpg"):
        Image.new("RGB", (40, 30)).save(folder / name)
    return folder


def annotate(images: Path, **further: Any) -> Path:
    names = [path.name for path in sorted(images.iterdir())]
    rows = [{"id": i + 1, "file_name": n, "width": 40, "height": 30} for i, n in enumerate(names)]
    boxes = [
        {"id": i + 1, "image_id": i + 1, "category_id": 7, "bbox": [2, 3, 10, 12], **further}
        for i in range(len(names))
    ]
    categories = [{"id": 3, "name": "bird"}, {"id": 7, "name": "fish"}]
    path = images.parent / "labels.json"
    path.write_text(json.dumps({"images": rows, "annotations": boxes, "categories": categories}))
    return path


def test_predictions_stand_alone(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "b.jpg").write_bytes(b"")
    output = predict(Path("model"), images, output=tmp_path / "out", batch_size=2)
    document = json.loads((output / "predictions.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["a.jpg", "a.png"]
    assert document["images"][0] == {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}
    assert document["categories"] == [{"id": 3, "name": "bird"}, {"id": 7, "name": "fish"}]
    assert [a["category_id"] for a in document["annotations"]] == [7, 7]
    assert document["annotations"][0]["bbox"] == [2, 3, 10, 12]
    assert sorted(p.name for p in (output / "pictures").iterdir()) == ["a.jpg", "a.png.jpg"]
    printed = capsys.readouterr().out
    assert "b.jpg: is empty" in printed
    assert "2 images, 2 boxes, 1 skipped" in printed


def test_a_score_is_no_percentage(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--score must be from 0 to 1, not 30"):
        predict(Path("model"), images, output=tmp_path / "out", score=30.0)


def test_a_single_image_without_pictures(images: Path, tmp_path: Path) -> None:
    output = predict(Path("model"), images / "b.jpg", output=tmp_path / "out", draw=False, score=0.05)
    document = json.loads((output / "predictions.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["b.jpg"]
    assert len(document["annotations"]) == 2
    assert not (output / "pictures").exists()


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_boxes_below_the_score_are_all_that_is_left_out(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not made in the first place; the region proposal network's score is another one."""
    few = {"faster_rcnn": {"rpn_post_nms_top_n_test": 50}}.get(name, {})
    detector: Any = build_detector(
        name, num_classes=2, trunk="resnet18", fpn_channels=64, min_size=64, options=few
    )
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "a.png")
    if name == "faster_rcnn":
        detector.rpn.head.cls_logits.bias.data.fill_(-3.0)  # objectness 0.05
        detector.roi_heads.box_predictor.cls_score.bias.data[:] = torch.tensor([0.0, 1.0, -0.5])
    else:
        detector.head.classification_head.cls_logits.bias.data.fill_(-0.9)  # 0.29
        detector.head.classification_head.cls_logits.weight.data.mul_(20)
    monkeypatch.setattr(weights, "load_detector", lambda folder: (detector, MANIFEST))
    scores = {}
    for least in (0.0, 0.3):  # in this order: the second raises the detector's own
        output = predict(
            Path("model"), images / "a.png", output=tmp_path / f"{least}", score=least, draw=False
        )
        found = json.loads((output / "predictions.json").read_text())["annotations"]
        scores[least] = [one["score"] for one in found if one["score"] >= 0.3]
        assert len(found) > len(scores[least]) or least
    assert scores[0.3]
    assert scores[0.3] == pytest.approx(scores[0.0])


def test_what_stops_a_prediction(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = predict(Path("model"), images, output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds predictions\.json already"):
        predict(Path("model"), images, output=output)
    predict(Path("model"), images, output=output, overwrite=True)
    with locked(output), pytest.raises(ValueError, match="in use"):
        predict(Path("model"), images, output=output, overwrite=True)
    (images / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.jpg: is no image"):
        predict(Path("model"), images, output=tmp_path / "strict", strict=True)
    with pytest.raises(ValueError, match=r"none of its 1 images can be read; the first: .*a\.jpg"):
        predict(Path("model"), images / "a.jpg", output=tmp_path / "broken")
    assert not (tmp_path / "broken" / "predictions.json").exists()
    monkeypatch.setattr(weights, "load_detector", lambda folder: (Oracle(), {"class_names": None}))
    with pytest.raises(ValueError, match="knows no classes yet"):
        predict(Path("model"), images, output=tmp_path / "new")


def test_pictures_of_other_images_are_not_left(images: Path, tmp_path: Path) -> None:
    output = predict(Path("model"), images, output=tmp_path / "out")
    (output / "pictures" / "mine.jpg").write_bytes(b"not drawn by us")
    predict(Path("model"), images / "b.jpg", output=output, overwrite=True)
    assert sorted(path.name for path in (output / "pictures").iterdir()) == ["b.jpg", "mine.jpg"]


def test_photos_of_others_stay(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "pictures").mkdir(parents=True)
    (output / "pictures" / "a.jpg").write_bytes(b"mine")
    predict(Path("model"), images, output=output, draw=False)  # draws nothing, so that nothing is in its way
    for _ in range(2):
        predict(Path("model"), images, output=output, draw=False, overwrite=True)
        assert (output / "pictures" / "a.jpg").read_bytes() == b"mine"
    for other in ("{}", "no JSON"):
        (output / "predictions.json").write_text(other)
        predict(Path("model"), images, output=output, draw=False, overwrite=True)
        assert len(json.loads((output / "predictions.json").read_text())["images"]) == 3


def test_a_folder_of_pictures_that_is_there_is_not_drawn_into(images: Path) -> None:
    (images / "pictures").mkdir()
    (images / "pictures" / "a.jpg").write_bytes((images / "a.jpg").read_bytes() + b"mine")
    with pytest.raises(ValueError, match="holds pictures already"):
        predict(Path("model"), images, output=images)
    assert (images / "pictures" / "a.jpg").read_bytes().endswith(b"mine")


def test_photos_are_not_drawn_over(images: Path, tmp_path: Path) -> None:
    photos = images.rename(tmp_path / "pictures")
    before = (photos / "a.jpg").read_bytes()
    for source in (photos, photos / "a.jpg"):
        with pytest.raises(ValueError, match="drawn pictures would replace"):
            predict(Path("model"), source, output=tmp_path)
    assert (photos / "a.jpg").read_bytes() == before


def test_figures_of_the_oracle(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = annotate(images)
    (images / "a.png").write_bytes(b"")
    result = evaluate(Path("model"), labels, images=images, output=tmp_path / "figures.json", batch_size=2)
    assert result.figures["AP"] == pytest.approx(1.0)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["images"] == 2
    assert written["weights"] == "of model/model.safetensors"
    assert written["AP_by_class"] == {"bird": None, "fish": pytest.approx(1.0)}
    assert "a.png: is empty" in written["skipped"][0]
    assert "2 images, 1 skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"a\.png: is empty"):
        evaluate(Path("model"), labels, images=images, strict=True)
    nothing = tmp_path / "nothing.json"
    nothing.write_text(json.dumps(json.loads(labels.read_text()) | {"annotations": []}))
    with pytest.raises(ValueError, match=r"nothing\.json: has no object in any of its 3 images"):
        evaluate(Path("model"), nothing, images=images)
    (images / "b.jpg").unlink()
    evaluate(Path("model"), labels, images=images, output=tmp_path / "figures.json")
    assert "1 images, 1 skipped, 1 remarks on the labels" in capsys.readouterr().out
    assert "b.jpg: not in" in json.loads((tmp_path / "figures.json").read_text())["warnings"][0]


@pytest.mark.usefixtures("_finds_masks")
def test_predicted_masks(images: Path, tmp_path: Path) -> None:
    output = predict(Path("model"), images, output=tmp_path / "out", score=0.05)
    fish, bird = json.loads((output / "predictions.json").read_text())["annotations"][:2]
    expected = np.zeros((30, 40), np.uint8)
    expected[3:15, 2:7] = 1
    for annotation, mask in ((fish, expected), (bird, 0 * expected)):
        counts = read_segmentation(annotation["segmentation"], 40, 30)
        np.testing.assert_array_equal(decode(EncodedMasks(30, 40, [counts]))[0], mask)
    picture = np.asarray(Image.open(output / "pictures" / "a.png.jpg"))
    assert (picture[10:14, 4:6] > 20).any(2).all()  # the fish's mask, drawn
    certain = predict(Path("model"), images, output=tmp_path / "certain")
    assert len(json.loads((certain / "predictions.json").read_text())["annotations"]) == 3


@pytest.mark.usefixtures("_finds_masks")
def test_figures_of_masks(images: Path, tmp_path: Path) -> None:
    labels = annotate(images, segmentation=[[2, 3, 7, 3, 7, 15, 2, 15]])
    result = evaluate(Path("model"), labels, images=images, output=tmp_path / "figures.json")
    assert result.figures["AP"] == result.figures["mask_AP"] == pytest.approx(1.0)
    whole_box = annotate(images, segmentation=[[2, 3, 12, 3, 12, 15, 2, 15]])
    result = evaluate(Path("model"), whole_box, images=images, output=tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["AP"] == pytest.approx(1.0)
    assert written["mask_AP50"] == pytest.approx(1.0)  # the fish's mask is half of it
    assert written["mask_AP75"] == 0.0
    assert written["mask_AP_by_class"] == {"bird": None, "fish": pytest.approx(0.1)}


@pytest.mark.usefixtures("_finds_masks")
def test_labels_without_masks_measure_boxes_alone(images: Path) -> None:
    with pytest.raises(ValueError, match=r"labels\.json: annotation 1 has no mask"):
        evaluate(Path("model"), annotate(images), images=images)
    figures = evaluate(Path("model"), annotate(images), images=images, masks=False).figures
    assert figures["AP"] == pytest.approx(1.0)
    assert "mask_AP" not in figures


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Five frames, each brighter than the one before."""
    path = tmp_path / "clip.avi"
    with sv.VideoSink(str(path), sv.VideoInfo(40, 30, 10.0), codec="MJPG") as sink:
        for brightness in range(0, 250, 50):
            sink.write_frame(np.full((30, 40, 3), brightness, np.uint8))
    return path


def test_a_video(video: Path, tmp_path: Path) -> None:
    output = predict(Path("model"), video, output=tmp_path / "out", batch_size=2)
    document = json.loads((output / "predictions.json").read_text())
    assert [image["file_name"] for image in document["images"]] == [f"clip.avi/00000{i}" for i in range(5)]
    assert len(document["annotations"]) == 5
    drawn = output / "pictures" / "clip.mp4"
    assert [path.name for path in drawn.parent.iterdir()] == ["clip.mp4"]
    info = sv.VideoInfo.from_video_path(str(drawn))
    assert (info.width, info.height, info.fps) == (40, 30, 10.0)
    frames = list(read_frames(drawn))
    assert len(frames) == 5
    assert frames[4][:, 25, 35].float().mean() == pytest.approx(200, abs=12)
    assert (frames[4][:, 3, 2:12].float() - 200).abs().max() > 50  # the box is drawn
    predict(Path("model"), video, output=tmp_path / "plain", draw=False)
    assert not (tmp_path / "plain" / "pictures").exists()


def test_videos_that_are_broken(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nonsense = tmp_path / "nonsense.mp4"
    nonsense.write_bytes(b"no video at all")
    with pytest.raises(ValueError, match=r"nonsense\.mp4: cannot be opened as a video"):
        predict(Path("model"), nonsense, output=tmp_path / "a")
    assert not (tmp_path / "a" / "predictions.json").exists()
    monkeypatch.setattr(predict_module, "rate_and_length", lambda path: (10.0, 9))
    predict(Path("model"), video, output=tmp_path / "b")
    assert "clip.avi: only 5 of its 9 frames can be read" in capsys.readouterr().out
    with pytest.raises(ValueError, match="only 5 of its 9 frames"):
        predict(Path("model"), video, output=tmp_path / "c", strict=True)
    assert not list((tmp_path / "c").rglob("*.mp4"))


def test_frames_that_were_not_written_are_missed(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = sv.VideoSink.write_frame, iter(range(3))

    def as_on_a_full_disk(sink: sv.VideoSink, frame: np.ndarray) -> None:
        if next(left, None) is not None:
            write(sink, frame)

    monkeypatch.setattr(sv.VideoSink, "write_frame", as_on_a_full_disk)
    with pytest.raises(OSError, match=r"clip\.mp4: not all 5 frames could be written; is the disk full"):
        predict(Path("model"), video, output=tmp_path / "out")
    assert not list((tmp_path / "out" / "pictures").iterdir())


def test_predictions_as_detections(images: Path, tmp_path: Path) -> None:
    predict(Path("model"), images, output=tmp_path / "out", score=0.0)
    found = aligndet.read_detections(tmp_path / "out")
    assert list(found) == ["a.jpg", "a.png", "b.jpg"]
    detections: Any = found["a.png"]
    assert detections.xyxy.tolist() == [[2, 3, 12, 15], [20, 5, 30, 25]]
    assert detections.class_id.tolist() == [1, 0]
    assert detections.data["class_name"].tolist() == ["fish", "bird"]
    assert detections[detections.confidence > 0.5].mask is None
    with pytest.raises(ValueError, match=r"holds no predictions\.json"):
        aligndet.read_detections(tmp_path)


@pytest.mark.usefixtures("_finds_masks")
def test_masks_as_detections(images: Path, tmp_path: Path) -> None:
    predict(Path("model"), images, output=tmp_path / "out")
    detections: Any = aligndet.read_detections(tmp_path / "out")["b.jpg"]
    assert detections.mask.shape == (1, 30, 40)
    assert detections.mask[0, 3:15, 2:7].all()
    assert detections.mask.sum() == 12 * 5


class Sighted(nn.Module):
    """Finds a fish as far to the right as the image is bright."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            x = float((image.mean() * 255).round())
            box = torch.tensor([[x, 3.0, x + 10, 15.0], [x, 20.0, x + 8, 28.0]])
            found.append({"boxes": box, "labels": torch.tensor([2, 2]), "scores": torch.tensor([0.8, 0.9])})
        return found


def test_predictions_are_measured_on_their_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "load_detector", lambda folder: (Sighted(), MANIFEST))
    folder = tmp_path / "images"
    folder.mkdir()
    places = (0, 5, 10, 15, 20)
    (folder / "0.png").write_bytes(b"")  # an image that is skipped shifts nothing
    for place in places[1:]:
        Image.new("RGB", (40, 30), (place,) * 3).save(folder / f"{place}.png")
    rows = [{"id": p + 1, "file_name": f"{p}.png", "width": 40, "height": 30} for p in places]
    boxes: list[dict[str, Any]] = []
    for place in places:  # the second one is a crowd: found or not, it counts for nothing
        for box, crowd in (([place, 3, 10, 12], 0), ([place, 20, 8, 8], 1)):
            known = {"id": len(boxes) + 1, "image_id": place + 1, "category_id": 7, "bbox": box}
            boxes.append({**known, "iscrowd": crowd})
    categories = [{"id": 3, "name": "bird"}, {"id": 7, "name": "fish"}]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"images": rows, "annotations": boxes, "categories": categories}))
    result = evaluate(Path("model"), labels, images=folder, batch_size=2)
    assert result.images == 4
    assert result.figures["AP"] == pytest.approx(1.0)
    assert result.figures["AR10"] == pytest.approx(1.0)
