from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
import torch
from torch import Tensor

from aligndet.data.crops import ClassifiedDataset, TwoCropsDataset, read_classes
from aligndet.data.images import ImageError
from aligndet.data.listing import list_images


def noisy(image: Any) -> list[Tensor]:
    """Draws from both generators, as lightly's augmentations do."""
    return [torch.rand(3, 4, 4) + float(np.random.random_sample()) + np.asarray(image).mean() for _ in "ab"]


def dataset(sample: Path, **settings: Any) -> TwoCropsDataset:
    return TwoCropsDataset(sample / "train", list_images(sample / "train"), noisy, **settings)


def test_a_seed_gives_the_same_crops_whatever_was_drawn_before(sample: Path) -> None:
    crops = dataset(sample)
    once = crops[3, 2**32 + 7]
    state, drawn = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    again = crops[3, 2**32 + 7]
    assert torch.equal(once.first, again.first)
    assert torch.equal(once.second, again.second)
    assert not torch.equal(once.first, once.second)
    for seed in (2**32 + 8, 7):  # another sample, and the same of another run
        assert not torch.equal(once.first, crops[3, seed].first)
    assert np.array_equal(state, np.random.get_state()[1])  # type: ignore[index]
    assert torch.equal(drawn, torch.get_rng_state())


def test_a_broken_image_is_replaced_and_named(sample: Path, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes((sample / "train" / "00000.jpg").read_bytes())
    (tmp_path / "a.jpg").write_bytes(b"broken")
    crops = TwoCropsDataset(tmp_path, ["a.jpg", "b.jpg"], noisy)
    item = crops[0, 0]
    assert item.file_name == "b.jpg"
    assert "a.jpg: is no image" in item.skipped[0]
    with pytest.raises(ImageError, match=r"a\.jpg"):
        TwoCropsDataset(tmp_path, ["a.jpg", "b.jpg"], noisy, strict=True)[0, 0]


def test_the_middle_of_an_image(sample: Path) -> None:
    raw, whole = (
        ClassifiedDataset(sample / "train", {"00001.jpg": 2}, size=32, mean=(mean,) * 3, std=(std,) * 3)
        for mean, std in ((0.0, 1.0), (0.2, 0.4))
    )
    image, label = whole[0]
    assert (len(whole), tuple(image.shape), label) == (1, (3, 32, 32), 2)
    torch.testing.assert_close(image, (raw[0][0] - 0.2) / 0.4)
    assert 0 <= raw[0][0].min() < raw[0][0].max() <= 1


def test_classes_of_a_coco_json_are_those_of_the_largest_box(sample: Path) -> None:
    names = list_images(sample / "train")
    classes = read_classes(str(sample / "train.json"), sample / "train", names, strict=True)
    assert set(classes) <= set(names)
    document = json.loads((sample / "train.json").read_text())
    order = sorted(category["id"] for category in document["categories"])
    for image in document["images"]:
        boxes = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        largest = max(boxes, key=lambda a: a["bbox"][2] * a["bbox"][3])
        assert classes[image["file_name"]] == order.index(largest["category_id"])


def test_classes_of_voc_and_yolo_are_those_of_coco(sample: Path, tmp_path: Path) -> None:
    document = json.loads((sample / "train.json").read_text())
    for entry in document["annotations"]:  # supervision would write the boxes of outlines
        del entry["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(document))
    theirs = sv.DetectionDataset.from_coco(str(sample / "train"), str(tmp_path / "boxes.json"))
    theirs.as_pascal_voc(str(tmp_path / "voc" / "JPEGImages"), str(tmp_path / "voc" / "Annotations"))
    yolo = tmp_path / "yolo"
    theirs.as_yolo(str(yolo / "images"), str(yolo / "labels"), str(yolo / "data.yaml"))
    names = list_images(sample / "train")
    wanted = read_classes(str(sample / "train.json"), sample / "train", names, strict=True)
    together = [(name, other) for name in wanted for other in wanted]
    for labels, images in ((tmp_path / "voc", tmp_path / "voc" / "JPEGImages"), (yolo, yolo / "images")):
        found = read_classes(str(labels), images, names, strict=True)
        assert set(found) == set(wanted)
        # each format has an order of classes of its own
        same = [(found[a] == found[b]) == (wanted[a] == wanted[b]) for a, b in together]
        assert all(same)


def test_classes_of_folders() -> None:
    names = ["cat/1.jpg", "cat/2.jpg", "dog/a/3.jpg", "dog/4.jpg", "5.jpg"]
    classes = read_classes("folders", Path("images"), names, strict=False)
    assert classes == {"cat/1.jpg": 0, "cat/2.jpg": 0, "dog/a/3.jpg": 1, "dog/4.jpg": 1}
    with pytest.raises(ValueError, match="0 of the 2 images have a class"):
        read_classes("folders", Path("images"), ["1.jpg", "2.jpg"], strict=False)
    with pytest.raises(ValueError, match="of 1 classes"):
        read_classes("folders", Path("images"), [f"cat/{i}.jpg" for i in range(9)], strict=False)
