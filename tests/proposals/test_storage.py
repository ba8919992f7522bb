from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aligndet.proposals.filters import best_overlaps, filter_boxes
from aligndet.proposals.storage import ImageProposals, clean, read_proposals, write_coco, write_shard


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


numbers = st.floats(-50, 150, width=32) | st.sampled_from([float("nan"), float("inf"), 0.0])


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 12), st.just(4)), elements=numbers))
def test_clean_boxes_are_inside_and_have_a_size(boxes: Any) -> None:
    kept = clean(boxes, 100, 60)
    assert np.isfinite(kept).all()
    assert (kept >= 0).all()
    assert (kept <= [100, 60, 100, 60]).all()
    assert (kept[:, 2:] - kept[:, :2] >= 1).all()


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 12), st.just(4)), elements=st.floats(0, 100, width=32))
)
def test_filters_equal_a_loop_over_boxes(boxes: Any) -> None:
    boxes = clean(boxes, 100, 100)
    kept: list[Any] = []
    for box in boxes:
        width, height = box[2] - box[0], box[3] - box[1]
        fits = max(width, height) <= 3 * min(width, height) and 80 <= width * height <= 8100
        if fits and all(best_overlaps(other[None], box[None])[0] <= 0.5 for other in kept):
            kept.append(box)
    found = filter_boxes(boxes, 100, 100)
    np.testing.assert_array_equal(found, np.array(kept, np.float32).reshape(-1, 4))
    np.testing.assert_array_equal(filter_boxes(boxes, 100, 100, max_proposals=2), found[:2])


def test_best_overlaps() -> None:
    objects = np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32)
    proposals = np.array([[0, 0, 10, 5], [0, 0, 10, 8]], np.float32)
    np.testing.assert_allclose(best_overlaps(proposals, objects), [0.8, 0.0])
    np.testing.assert_array_equal(best_overlaps(proposals[:0], objects), [0, 0])
