from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aligndet.data.coco import read_coco
from aligndet.data.images import ImageError
from aligndet.data.labelled import LabelledDataset
from aligndet.data.views import TwoViewDataset, geometric, short_sides
from aligndet.proposals.storage import ImageProposals, ProposalTable


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


def test_labelled_images_are_resized_with_their_boxes(sample: Path) -> None:
    coco = read_coco(sample / "train.json")
    for index in range(len(coco)):
        item = LabelledDataset(coco, min_size=(64, 96), max_size=128)[index, index]
        assert len(item.boxes) == len(item.labels)
        height, width = item.image.shape[1:]
        assert (item.boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert (item.boxes[:, 2:] > item.boxes[:, :2]).all()


def test_sizes_that_make_no_sense_are_refused() -> None:
    assert short_sides((640, 800)) == [640, 672, 704, 736, 768, 800]
    assert short_sides((64, 64)) == [64]
    with pytest.raises(ValueError, match="min_size"):
        short_sides((800, 640))
    with pytest.raises(ValueError, match="max_size"):
        geometric((640, 800), 700)
