from __future__ import annotations

import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader, Dataset

from aligndet.data.rle import EncodedMasks, decode, encode, read_segmentation
from aligndet.proposals.filters import best_proposals, filter_boxes
from aligndet.proposals.masks import MASK_SIDE
from aligndet.proposals.storage import clean, read_proposals, write_coco, write_shard
from aligndet.proposals.table import ImageProposals, ProposalTable
from aligndet.workers import worker_settings


def rows() -> list[ImageProposals]:
    some = np.array([[1.5, 2, 30, 40], [0, 0, 99.25, 50]], np.float32)
    return [
        ImageProposals("b/x.jpg", 100, 50, some),
        ImageProposals("a.jpg", 64, 64, np.zeros((0, 4), np.float32)),
        ImageProposals("broken.jpg", 0, 0, np.zeros((0, 4), np.float32), "broken.jpg: is empty"),
    ]


@pytest.mark.parametrize("form", ["folder", "file", "json"])
def test_what_is_written_is_read(form: str, tmp_path: Path) -> None:
    path = {"folder": tmp_path, "file": tmp_path / "part-00000.parquet", "json": tmp_path / "x.json"}[form]
    if form == "json":
        write_coco(path, rows())
    else:
        write_shard(tmp_path / "part-00000.parquet", rows())
    table = read_proposals(path)
    assert table.file_names == ["b/x.jpg", "a.jpg"]
    assert table.sizes.tolist() == [[100, 50], [64, 64]]
    np.testing.assert_array_equal(table.boxes_of(0), rows()[0].boxes)
    assert table.boxes_of(1).shape == (0, 4)


def masked_rows() -> list[ImageProposals]:
    some = np.array([[2, 3, 90, 47], [10, 0, 70, 50], [40, 10, 60, 30]], np.float32)
    grids = np.zeros((3, MASK_SIDE, MASK_SIDE), np.uint8)  # the third is empty
    grids[0, 8:40, :28] = grids[1, 30:, 14:] = 1
    none = ImageProposals("a.jpg", 64, 64, np.zeros((0, 4), np.float32), None, [])
    return [
        ImageProposals("b/x.jpg", 100, 50, some, None, encode(grids).counts),
        none,
        none._replace(file_name="broken.jpg", skipped="broken.jpg: is empty", masks=None),
    ]


@pytest.mark.parametrize("form", ["folder", "json"])
def test_masks_that_are_written_are_read(form: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json" if form == "json" else tmp_path
    row = masked_rows()[0]
    if form == "json":
        write_coco(path, masked_rows())
    else:
        write_shard(tmp_path / "part-00000.parquet", masked_rows()[:1])
        write_shard(tmp_path / "part-00001.parquet", masked_rows()[1:])
    table = read_proposals(path, masks=True)
    assert row.masks is not None
    grids = decode(EncodedMasks(MASK_SIDE, MASK_SIDE, row.masks))
    found = table.masks_of(0, np.array([2, 0, 1]))
    if form == "folder":
        np.testing.assert_array_equal(found, grids[[2, 0, 1]])
    else:  # there and back by way of the image's pixels, which are coarser than the grid
        assert (found != grids[[2, 0, 1]]).mean() < 0.02
    assert table.masks_of(1, np.arange(0)).shape == (0, MASK_SIDE, MASK_SIDE)
    assert read_proposals(path).masks is None


class Shown(Dataset[Any]):
    """What a process sees of a table."""

    def __init__(self, table: ProposalTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        chosen = np.arange(len(self.table.boxes_of(index)))
        masks, clusters = self.table.masks_of(index, chosen), self.table.clusters_of(index, chosen)
        return self.table.file_names[index], self.table.boxes_of(index).copy(), masks, clusters


def test_processes_share_a_table() -> None:
    boxes = np.array([[0, 0, 8, 8], [4, 4, 30, 20]], np.float32)
    grids = np.stack([np.eye(MASK_SIDE, dtype=np.uint8), np.ones((MASK_SIDE, MASK_SIDE), np.uint8)])
    masks = encode(grids).counts
    names = ["a.png", "größe/b.png", "c.png"]
    rows = [ImageProposals(n, 32, 24, boxes[:k], None, masks[:k]) for k, n in enumerate(names)]
    table = replace(ProposalTable.of(rows), clusters=np.array([4, 5, 6], np.int32))
    here = [Shown(table)[index] for index in range(3)]
    shown = DataLoader(Shown(table), batch_size=None, sampler=[0, 1, 2] + 8 * [1], **worker_settings(1))
    seen = []
    for item in shown:
        seen.append(item)
        if len(seen) == 3:
            table.boxes[0] = 7  # of this process's table: the other one sees it
    assert (seen[-1][1] == 7).all()
    for (name, *arrays), (expected, *others) in zip(seen[:3], here, strict=True):
        assert name == expected
        for array, other in zip(arrays, others, strict=True):
            assert np.array_equal(array, other)
    shared_names, *tensors, shared_masks = table._shared
    assert all(part.is_shared() for part in (*shared_names.__reduce__()[1], *tensors, *shared_masks))
    assert np.shares_memory(table.boxes, tensors[1].numpy())  # no second copy
    make, parts = table.__reduce__()
    received = make(*parts).file_names
    assert list(received) == received[:] == names
    assert received[-1] == "c.png"


def test_without_room_for_sharing_a_process_has_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError(f"unable to {what}")

    monkeypatch.setattr("torch.Tensor.share_memory_", refuse)
    table = replace(ProposalTable.of(masked_rows()[:1]), clusters=np.array([4, 5, 6]))
    what = "open shared memory object"
    copied = pickle.loads(pickle.dumps(table))
    assert copied.file_names == table.file_names
    np.testing.assert_array_equal(copied.sizes, table.sizes)
    np.testing.assert_array_equal(copied.boxes_of(0), table.boxes_of(0))
    for part in ("masks_of", "clusters_of"):
        ours, theirs = (getattr(side, part)(0, np.arange(3)) for side in (copied, table))
        np.testing.assert_array_equal(ours, theirs)
    what = "pickle"
    with pytest.raises(RuntimeError, match="unable to pickle"):
        pickle.dumps(table)


def test_json_carries_masks_at_the_size_of_the_image(tmp_path: Path) -> None:
    write_coco(tmp_path / "x.json", masked_rows())
    annotations = json.loads((tmp_path / "x.json").read_text())["annotations"]
    counts = [read_segmentation(a["segmentation"], 100, 50) for a in annotations]
    masks = decode(EncodedMasks(50, 100, counts))
    expected = np.zeros((3, 50, 100), np.uint8)
    expected[0, 9:34, 2:46] = 1  # 3 + 44 * 8 / 56 = 9.3, 3 + 44 * 40 / 56 = 34.4
    expected[1, 27:, 25:70] = 1
    np.testing.assert_array_equal(masks, expected)


def test_proposals_without_masks_are_read_but_not_where_masks_are_needed(tmp_path: Path) -> None:
    write_shard(tmp_path / "part-00000.parquet", rows())
    write_coco(tmp_path / "x.json", rows())
    assert len(read_proposals(tmp_path)) == 2
    message = rf"{tmp_path.name}: its proposals have no masks.*`aligndet propose --masks`"
    with pytest.raises(ValueError, match=message):
        read_proposals(tmp_path, masks=True)
    with pytest.raises(ValueError, match=r"x\.json: no COCO-style proposals with masks.*annotation 1 has no"):
        read_proposals(tmp_path / "x.json", masks=True)
    write_shard(tmp_path / "part-00001.parquet", [masked_rows()[0]._replace(file_name="c.jpg")])
    with pytest.raises(ValueError, match=message):  # some are not enough
        read_proposals(tmp_path, masks=True)


def test_a_dropped_box_takes_its_mask_along(tmp_path: Path) -> None:
    row = masked_rows()[0]
    boxes = row.boxes.copy()
    boxes[0, 2] = np.nan
    write_shard(tmp_path / "part-00000.parquet", [row._replace(boxes=boxes)])
    table = read_proposals(tmp_path, masks=True)
    assert len(table.boxes) == 2
    assert row.masks is not None
    expected = decode(EncodedMasks(MASK_SIDE, MASK_SIDE, row.masks[1:]))
    np.testing.assert_array_equal(table.masks_of(0, np.arange(2)), expected)


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    row, shard = masked_rows()[0], tmp_path / "part-00000.parquet"
    assert row.masks is not None
    write_shard(shard, [row._replace(masks=row.masks[:2])])
    with pytest.raises(ValueError, match=r"part-00000\.parquet: b/x\.jpg has 3 boxes and 2 masks of side 56"):
        read_proposals(tmp_path, masks=True)
    write_shard(shard, [row])
    table = pq.read_table(shard)
    other = pa.array([28], pa.int32())
    pq.write_table(table.set_column(table.column_names.index("mask_side"), "mask_side", other), shard)
    with pytest.raises(ValueError, match="3 boxes and 3 masks of side 28; there must be a mask of side 56"):
        read_proposals(tmp_path, masks=True)
    write_shard(shard, [row._replace(masks=[*row.masks[:2], None])])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="there must be a mask of side 56 for each box"):
        read_proposals(tmp_path, masks=True)
    document = coco(annotations=[{"id": 5, "image_id": 1, "bbox": [1, 2, 30, 20], "segmentation": [[1, 2]]}])
    (tmp_path / "x.json").write_text(json.dumps(document))
    assert len(read_proposals(tmp_path / "x.json").boxes) == 1
    with pytest.raises(ValueError, match=r"x\.json.*annotation 5 has a malformed segmentation"):
        read_proposals(tmp_path / "x.json", masks=True)


def coco(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40]}],
        **changes,
    }


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "no COCO-style"),
        ("[]", "no COCO-style"),
        (coco(images=[]), "no COCO-style|no image"),
        (coco(images=coco()["images"] * 2), "twice"),
        (coco(annotations=[{"id": 1, "image_id": 2, "bbox": [1, 2, 3, 4]}]), "KeyError: 2"),
        (coco(annotations=[{"id": 1, "image_id": 1, "bbox": [1, 2]}]), "no COCO-style"),
        *(
            (coco(annotations=[{"image_id": 1, "bbox": bbox}]), r"image a\.jpg: bbox .* four finite numbers")
            for bbox in (
                ["1", "2", "3", "4"],
                [True, 2, 3, 4],
                [10**400, 2, 3, 4],
                [float("inf"), 2, 3, 4],
                None,
            )
        ),
        *(
            (
                coco(images=[{"id": 1, "file_name": "a.jpg", "width": width, "height": 30}]),
                r"a\.jpg has the size",
            )
            for width in (float("inf"), 10**400, 2**31, 0, "40", None)
        ),
        *(
            (
                coco(images=[{"id": 1, "file_name": name, "width": 40, "height": 30}]),
                "file_name .* is no text",
            )
            for name in (None, 7)
        ),
        (coco(images=[{"id": 1, "file_name": "../a.jpg", "width": 40, "height": 30}]), "leads out"),
        (coco(images=[{"id": 1, "file_name": "C:\\..\\a.jpg", "width": 40, "height": 30}]), "leads out"),
    ],
)
def test_broken_json_is_refused_by_name(document: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError, match=rf"boxes\.json.*({message})"):
        read_proposals(path)


def test_broken_parquet_is_refused_by_name(tmp_path: Path) -> None:
    shard = tmp_path / "part-00000.parquet"
    write_shard(shard, rows())
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"part-00000\.parquet: broken"):
        read_proposals(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        read_proposals(tmp_path / "nothing")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no proposals"):
        read_proposals(tmp_path / "none")


@pytest.mark.parametrize("column", ["file_name", "width", "height", "boxes"])
def test_what_an_image_lacks_is_named(column: str, tmp_path: Path) -> None:
    shard = tmp_path / "part-00000.parquet"
    write_shard(shard, rows())
    table = pq.read_table(shard)
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, column, pa.nulls(3, table.schema.field(column).type)), shard)
    with pytest.raises(ValueError, match=rf"part-00000\.parquet: an image has no {column}"):
        read_proposals(tmp_path)


def some_boxes(elements: st.SearchStrategy[float]) -> Any:
    """Boxes whose corners are drawn one by one: by default most would be equal, and most boxes empty."""
    shape = st.tuples(st.integers(0, 12), st.just(4))
    return hnp.arrays(np.float32, shape, elements=elements, fill=st.nothing())


numbers = st.floats(-50, 150, width=32) | st.sampled_from([float("nan"), float("inf"), 0.0, 30.0, 31.0, 90.0])


@settings(max_examples=60, deadline=None)
@given(some_boxes(numbers))
def test_clean_boxes_are_inside_and_have_a_size(boxes: Any) -> None:
    limits = np.array([100, 60, 100, 60], np.float32)
    inside = [np.minimum(np.maximum(box, 0), limits) for box in boxes if np.isfinite(box).all()]
    expected = [box for box in inside if box[2] - box[0] >= 1 and box[3] - box[1] >= 1]
    np.testing.assert_array_equal(clean(boxes, 100, 60), np.array(expected, np.float32).reshape(-1, 4))


def test_a_box_of_one_pixel_is_kept() -> None:
    boxes = np.array([[-3, 4, 1, 5], [3, 4, 3.9, 9], [98, 2, 99, 2.9], [99, 59, 120, 70]], np.float32)
    assert clean(boxes, 100, 60).tolist() == [[0, 4, 1, 5], [99, 59, 100, 60]]


@settings(max_examples=60, deadline=None)
@given(some_boxes(st.floats(0, 100, width=32)))
def test_filters_equal_a_loop_over_boxes(boxes: Any) -> None:
    boxes = clean(boxes, 100, 100)
    kept: list[Any] = []
    for box in boxes:
        width, height = box[2] - box[0], box[3] - box[1]
        fits = max(width, height) <= 3 * min(width, height) and 80 <= width * height <= 8100
        if fits and all(best_proposals(other[None], box[None])[0] <= 0.5 for other in kept):
            kept.append(box)
    bounds: dict[str, Any] = {"max_aspect_ratio": 3.0, "min_area": 0.008, "max_area": 0.81, "nms_iou": 0.5}
    found = filter_boxes(boxes, 100, 100, **bounds)
    np.testing.assert_array_equal(found, np.array(kept, np.float32).reshape(-1, 4))
    np.testing.assert_array_equal(filter_boxes(boxes, 100, 100, **bounds, max_proposals=2), found[:2])


def test_best_proposals() -> None:
    objects = np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32)
    proposals = np.array([[0, 0, 10, 5], [0, 0, 10, 8]], np.float32)
    overlaps, positions = best_proposals(proposals, objects)
    np.testing.assert_allclose(overlaps, [0.8, 0.0])
    assert positions[0] == 1
    np.testing.assert_array_equal(best_proposals(proposals[:0], objects), [[0, 0], [0, 0]])


def test_some_of_the_images() -> None:
    rng = np.random.default_rng(0)
    counts = {"a.jpg": 3, "b.jpg": 0, "c.jpg": 2, "d.jpg": 4}
    masks = {
        name: [bytes(rng.integers(1, 9, i + 1, np.uint8)) for i in range(n)] for name, n in counts.items()
    }
    table = ProposalTable.of(
        ImageProposals(name, 9, 8, rng.random((n, 4), np.float32), None, masks[name])
        for name, n in counts.items()
    )
    table = replace(table, clusters=np.arange(9))
    some = table.only(["d.jpg", "b.jpg", "c.jpg", "elsewhere.jpg"])
    assert some.file_names == ["b.jpg", "c.jpg", "d.jpg"]
    assert some.sizes.shape == (3, 2)
    for index, before in enumerate((1, 2, 3)):
        np.testing.assert_array_equal(some.boxes_of(index), table.boxes_of(before))
    assert some.clusters_of(2, np.arange(4)).tolist() == [5, 6, 7, 8]
    assert some.masks is not None
    runs, offsets = some.masks
    kept = [bytes(runs[a:b].numpy()) for a, b in itertools.pairwise(offsets)]
    assert kept == masks["c.jpg"] + masks["d.jpg"]
    assert not len(table.only([]))
