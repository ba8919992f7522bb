from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as transforms

from aligndet.data.augmentations import multiscale
from aligndet.data.formats import read_labelled
from aligndet.data.images import ImageError, read_image
from aligndet.data.labelled import LabelledDataset
from aligndet.data.rle import encode
from aligndet.data.views import TwoViewDataset, short_sides
from aligndet.detectors.build import build_detector
from aligndet.finetuning import Finetuning
from aligndet.proposals.masks import MASK_SIDE, on_grid
from aligndet.proposals.table import ImageProposals, ProposalTable
from aligndet.training import StepSampler
from aligndet.workers import worker_settings


def table(folder: Path, names: tuple[str, ...] = ("a.png", "b.png"), boxes: int = 30) -> ProposalTable:
    rng = np.random.default_rng(0)
    rows = []
    for name in names:
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(folder / name)
        corner = rng.uniform(0, 40, (boxes, 2))
        rows.append(ImageProposals(name, 90, 60, np.concatenate([corner, corner + 15], 1).astype(np.float32)))
    return ProposalTable.of(rows)


def test_both_views_hold_the_same_proposals_in_the_same_order(tmp_path: Path) -> None:
    views = TwoViewDataset(tmp_path, table(tmp_path), min_size=(64, 128), max_size=160, max_proposals=12)
    for seed in range(20):
        item = views[0, seed]
        relative = []
        for view in (item.online, item.momentum):
            height, width = view.image.shape[1:]
            assert min(height, width) in range(64, 129)
            assert view.proposals.shape == (12, 4)
            assert view.proposals.dtype == torch.float32
            relative.append(view.proposals / torch.tensor([width, height, width, height]))
            assert (relative[-1] >= 0).all()
            assert (relative[-1] <= 1).all()
        left, right = relative
        mirrored = torch.stack([1 - right[:, 2], right[:, 1], 1 - right[:, 0], right[:, 3]], 1)
        assert min((left - right).abs().max(), (left - mirrored).abs().max()) < 0.02


def test_the_two_views_are_drawn_apart(tmp_path: Path) -> None:
    views = TwoViewDataset(tmp_path, table(tmp_path), min_size=(64, 128), max_size=400, max_proposals=12)
    sides, flips = [], []
    for seed in range(60):
        pair = views[0, seed][:2]
        sides.append([min(view.image.shape[1:]) for view in pair])
        first, second = (
            view.proposals / torch.tensor(view.image.shape[1:]).flip(0).repeat(2) for view in pair
        )
        flips.append(bool((first - second).abs().max() > 0.02))
    for view in zip(*sides, strict=True):
        assert {min(views.short_sides, key=lambda known: abs(known - side)) for side in view} == set(
            views.short_sides
        )
    assert len({tuple(pair) for pair in sides}) > len(views.short_sides)
    assert set(flips) == {True, False}


def test_the_seed_decides(tmp_path: Path) -> None:
    views = TwoViewDataset(tmp_path, table(tmp_path), min_size=(64, 128), max_size=160, max_proposals=12)
    state = torch.get_rng_state()
    first, again, other = views[0, 5], views[0, 5], views[0, 6]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.online.image, again.online.image)
    assert torch.equal(first.momentum.proposals, again.momentum.proposals)
    assert first.online.image.shape != other.online.image.shape or not torch.equal(
        first.online.proposals, other.online.proposals
    )


def test_top_proposals_keep_rank_order(tmp_path: Path) -> None:
    proposals = table(tmp_path)
    views = TwoViewDataset(
        tmp_path, proposals, min_size=(60, 60), max_size=90, max_proposals=5, top_proposals=True
    )
    found = views[0, 0].online.proposals
    expected = torch.from_numpy(proposals.boxes_of(0)[:5])
    flipped = torch.stack([90 - expected[:, 2], expected[:, 1], 90 - expected[:, 0], expected[:, 3]], 1)
    assert min((found - expected).abs().max(), (found - flipped).abs().max()) < 1e-3


@pytest.mark.parametrize("sides", [(60, 60), (200, 260)])
def test_views_are_the_resized_image(
    tmp_path: Path, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller than the image or larger, to a grey level."""
    monkeypatch.setattr("aligndet.data.views.recolour", lambda planes, rng: None)
    views = TwoViewDataset(tmp_path, table(tmp_path), min_size=sides, max_size=400)
    image = read_image(tmp_path / views.table.file_names[0], long_side=400)
    flips = set()
    for seed in range(8):
        for view in views[0, seed][:2]:
            expected = transforms.resize(image, list(view.image.shape[1:]), antialias=True).int()
            distances = [int((view.image.int() - e).abs().max()) for e in (expected, expected.flip(2))]
            assert min(distances) <= 1
            flips.add(distances[0] > distances[1])
    assert flips == {True, False}


@pytest.mark.parametrize(("max_size", "decoded"), [(400, (250, 200)), (125, (125, 100))])
def test_a_large_jpeg_is_decoded_no_larger_than_its_largest_view(
    tmp_path: Path, max_size: int, decoded: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (1000, 800)).save(tmp_path / "a.jpg")
    box = np.array([[0, 0, 500, 500]], np.float32)
    views = TwoViewDataset(
        tmp_path,
        ProposalTable.of([ImageProposals("a.jpg", 1000, 800, box)]),
        min_size=(64, 120),
        max_size=max_size,
    )
    sizes = []

    def recorded(*call: Any, **settings: Any) -> torch.Tensor:
        image = read_image(*call, **settings)
        sizes.append((image.shape[2], image.shape[1]))
        return image

    monkeypatch.setattr("aligndet.data.views.read_image", recorded)
    largest = max(view.image.shape[1] for seed in range(9) for view in views[0, seed][:2])
    assert set(sizes) == {decoded}
    assert largest == min(120, max_size * 4 // 5)


def test_a_broken_image_is_replaced_and_named(tmp_path: Path) -> None:
    proposals = table(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    item = TwoViewDataset(tmp_path, proposals, min_size=(64, 64), max_size=100)[0, 0]
    assert item.file_name == "b.png"
    assert "a.png" in item.skipped[0]
    with pytest.raises(ImageError, match=r"a\.png"):
        TwoViewDataset(tmp_path, proposals, min_size=(64, 64), max_size=100, strict=True)[0, 0]
    (tmp_path / "b.png").unlink()
    with pytest.raises(ImageError, match="none of the 2 images"):
        TwoViewDataset(tmp_path, proposals, min_size=(64, 64), max_size=100)[0, 0]


def test_an_image_that_was_turned_since_is_named_and_one_that_was_scaled_is_not(tmp_path: Path) -> None:
    proposals = table(tmp_path)
    for size, fits in (((60, 90), False), ((45, 30), True), ((89, 59), True)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        item = TwoViewDataset(tmp_path, proposals, min_size=(64, 64), max_size=100)[0, 0]
        assert (item.file_name == "a.png") == fits
        assert fits or "has 60x90 pixels, its proposals are of 90x60" in item.skipped[0]


def test_a_labelled_box_stays_on_its_object(tmp_path: Path) -> None:
    """Each object has a colour of its own, in the middle of its box whatever the size and the flip."""
    boxes = [[10, 10, 30, 20], [50, 30, 20, 40], [90, 15, 24, 24]]
    array = np.zeros((80, 120, 3), np.uint8)
    for label, (x, y, w, h) in enumerate(boxes, 1):
        array[y : y + h, x : x + w] = 80 * label
    Image.fromarray(array).save(tmp_path / "a.png")
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 120, "height": 80}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": n, "bbox": b} for n, b in enumerate(boxes, 1)
        ],
        "categories": [{"id": n, "name": str(n)} for n in (1, 2, 3)],
    }
    (tmp_path / "train.json").write_text(json.dumps(document))
    dataset = LabelledDataset(read_labelled(tmp_path / "train.json"), min_size=(60, 160), max_size=400)
    widths, sides = set(), set()
    for seed in range(12):
        item = dataset[0, seed]
        for box, label in zip(item.boxes, item.labels, strict=True):
            x, y = ((box[:2] + box[2:]) / 2).int().tolist()
            assert item.image[:, y, x].tolist() == [80 * int(label)] * 3
        widths.add(item.image.shape[2])
        sides.add(bool(item.boxes[0, 0] < item.boxes[2, 0]))
    assert len(widths) > 3
    assert sides == {True, False}


def test_fine_tuning_shows_what_the_labels_say(sample: Path) -> None:
    shown: list[Any] = []

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone: Any = nn.Module()
            self.backbone.body = nn.Linear(1, 1)

        def forward(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> Any:
            shown.extend(zip(images, targets, strict=True))
            return {"a": self.backbone.body.weight.sum(), "b": torch.tensor(2.0)}

    dataset = LabelledDataset(
        read_labelled(sample / "train.json", masks=True), min_size=(64, 96), max_size=128
    )
    batch = [dataset[index, index] for index in range(3)]
    ours = Finetuning(detector := Detector(), steps=10)
    assert ours.training_step(batch, 0) == detector.backbone.body.weight.sum() + 2.0
    for (image, target), item in zip(shown, batch, strict=True):
        torch.testing.assert_close(image, item.image / 255)
        assert target["boxes"] is item.boxes
        assert target["labels"] is item.labels
        assert target["masks"] is item.masks


def test_fine_tuning_resizes_as_torchvision_does_where_it_predicts(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images = [{"id": 1, "file_name": "a.png", "width": 200, "height": 150}]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    detector: Any = build_detector("fcos", num_classes=1, trunk="resnet18", min_size=60, max_size=100)
    transform = detector.eval().transform
    resized, _ = transform.resize(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    means = {}
    for antialias in (False, True):
        dataset = LabelledDataset(
            read_labelled(tmp_path / "a.json", tmp_path), min_size=(60, 60), max_size=100, antialias=antialias
        )
        image = dataset[0, 0].image / 255
        either = min((image - one).abs().mean() for one in (resized, resized.flip(-1)))
        means[antialias] = float(either)
    assert means[False] < 1 / 255 < 10 / 255 < means[True]


def test_labelled_masks_go_where_their_boxes_go(sample: Path) -> None:
    with_masks = LabelledDataset(
        read_labelled(sample / "train.json", masks=True), min_size=(64, 192), max_size=256
    )
    without = LabelledDataset(read_labelled(sample / "train.json"), min_size=(64, 192), max_size=256)
    for index in range(len(with_masks)):
        item, plain = with_masks[index, index], without[index, index]
        assert plain.masks is None
        assert torch.equal(item.image, plain.image)
        assert torch.equal(item.boxes, plain.boxes)
        assert item.masks is not None
        assert type(item.masks) is torch.Tensor
        assert item.masks.dtype == torch.uint8
        assert item.masks.shape == (len(item.boxes), *item.image.shape[1:])
        assert (masks_to_boxes(item.masks) - item.boxes).abs().max() <= 3  # flips would be far off


def test_an_image_without_objects_has_no_masks(sample: Path, tmp_path: Path) -> None:
    document = json.loads((sample / "train.json").read_text())
    document["annotations"] = []
    (tmp_path / "train.json").write_text(json.dumps(document))
    coco = read_labelled(tmp_path / "train.json", sample / "train", masks=True)
    item = LabelledDataset(coco, min_size=(64, 96), max_size=128)[0, 0]
    assert item.masks is not None
    assert item.masks.shape == (0, *item.image.shape[1:])


def with_masks(folder: Path, boxes: int = 30) -> ProposalTable:
    """Images whose left half is bright, and proposals whose masks are what is bright in their box."""
    plain = table(folder, boxes=boxes)
    pixels = np.full((60, 90, 3), 20, np.uint8)
    pixels[:, :45] = 220
    rows = []
    for index, name in enumerate(plain.file_names):
        Image.fromarray(pixels).save(folder / name)
        found = plain.boxes_of(index)
        grids = np.stack([on_grid(pixels[:, :, 0] // 200, box) for box in found])
        rows.append(ImageProposals(name, 90, 60, found, None, encode(grids).counts))
    return ProposalTable.of(rows)


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("file_size", [(90, 60), (180, 120)])  # the second: another file than proposed for
def test_masks_are_flipped_with_their_view(
    file_size: tuple[int, int], top: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # colours tell what is bright
    monkeypatch.setattr("aligndet.data.views.recolour", lambda planes, rng: None)
    proposals = with_masks(tmp_path)
    for name in proposals.file_names:
        with Image.open(tmp_path / name) as image:
            image.resize(file_size, Image.Resampling.NEAREST).save(tmp_path / name)
    views = TwoViewDataset(
        tmp_path, proposals, min_size=(64, 256), max_size=400, max_proposals=12, top_proposals=top
    )
    flipped = []
    for seed in range(12):
        for view in views[seed % 2, seed][:2]:
            assert view.masks is not None
            assert view.masks.shape == (12, MASK_SIDE, MASK_SIDE)
            assert view.masks.dtype == torch.uint8
            bright = (view.image[0] > 120).to(torch.uint8).numpy()  # the mask of the whole view
            expected = np.stack([on_grid(bright, box) for box in view.proposals.numpy()])
            assert (view.masks.numpy() != expected).mean() < 0.02
            flipped.append(bool(bright[0, -1]))
    assert len(set(flipped)) == 2


def test_masks_change_nothing_else_and_are_there_only_if_asked_for(tmp_path: Path) -> None:
    proposals = with_masks(tmp_path)
    plain = replace(proposals, masks=None)
    items = [TwoViewDataset(tmp_path, t, max_proposals=12)[0, 3] for t in (proposals, plain)]
    for view, other in zip(items[0][:2], items[1][:2], strict=True):
        assert torch.equal(view.image, other.image)
        assert torch.equal(view.proposals, other.proposals)
        assert other.masks is None


def test_loader_processes_bring_masks(tmp_path: Path) -> None:
    proposals = with_masks(tmp_path, boxes=3)
    views = TwoViewDataset(tmp_path, proposals, min_size=(64, 64), max_size=100)
    sampler = StepSampler(2, batch_size=2, batches=1)
    loader = DataLoader(views, batch_sampler=sampler, collate_fn=list, **worker_settings(1))
    for item in next(iter(loader)):
        assert item.online.masks is not None
        assert item.online.masks.float().mean() > 0.2


def test_sizes_that_make_no_sense_are_refused() -> None:
    assert short_sides((640, 800), 1333) == [640, 672, 704, 736, 768, 800]
    assert short_sides((64, 64), 64) == [64]
    with pytest.raises(ValueError, match="min_size"):
        short_sides((800, 640), 1333)
    with pytest.raises(ValueError, match="max_size"):
        multiscale((640, 800), 700)


@pytest.mark.parametrize("top", [True, False])
def test_clusters_go_with_their_proposals(tmp_path: Path, top: bool) -> None:
    known = table(tmp_path)
    known = replace(known, clusters=np.arange(60))  # the number of each box
    size: dict[str, Any] = {"max_size": 160, "max_proposals": 12}
    item = TwoViewDataset(tmp_path, known, min_size=(64, 64), top_proposals=top, **size)[1, 3]
    for view in item.online, item.momentum:
        assert view.clusters is not None
        numbers = view.clusters.numpy() - 30  # of the second image
        assert (numbers.tolist() == list(range(12))) == top
        width = view.image.shape[2]
        left, right = (known.boxes_of(1)[numbers] / 90)[:, 0], (known.boxes_of(1)[numbers] / 90)[:, 2]
        found = view.proposals.numpy() / width
        straight, mirrored = np.abs(found[:, 0] - left).max(), np.abs(found[:, 0] - (1 - right)).max()
        assert min(straight, mirrored) < 0.02


def test_each_view_has_colours_of_its_own(tmp_path: Path) -> None:
    views = TwoViewDataset(tmp_path, table(tmp_path), min_size=(60, 60), max_size=90)  # not resized
    image, changed, alike = read_image(tmp_path / "a.png"), 0, 0
    for seed in range(20):
        online, momentum = (view.image for view in views[0, seed][:2])
        for found in (online, momentum):
            changed += not any(torch.equal(found, one) for one in (image, image.flip(2)))
        alike += any(torch.equal(online, one) for one in (momentum, momentum.flip(2)))
    assert 28 <= changed < 40  # a ninth keeps its colours
    assert alike <= 5


def test_a_random_subset_of_proposals_is_drawn_anew_each_time(tmp_path: Path) -> None:
    known = replace(table(tmp_path), clusters=np.arange(60))  # the number of each box
    views = TwoViewDataset(tmp_path, known, min_size=(64, 64), max_size=96, max_proposals=12)
    drawn = [frozenset(views[0, seed].online.clusters.tolist()) for seed in range(12)]  # type: ignore[union-attr]
    assert len(set(drawn)) == 12
    assert frozenset.union(*drawn) == set(range(30))


def test_crowds_are_not_trained_on(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": n, "bbox": [n, n, 20, 20], "iscrowd": n - 1}
            for n in (1, 2)
        ],
        "categories": [{"id": 1, "name": "bird"}, {"id": 2, "name": "fish"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    data = LabelledDataset(read_labelled(tmp_path / "a.json", tmp_path), min_size=(32, 32), max_size=64)
    assert data[0, 0].labels.tolist() == [1]
