from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aligndet.data.rle import EncodedMasks, areas, decode, encode, overlaps, read_segmentation

shapes = st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.bool_, shapes))
def test_what_is_encoded_is_decoded(masks: Any) -> None:
    encoded = encode(masks)
    found = decode(encoded)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, masks)
    np.testing.assert_array_equal(areas(encoded), masks.sum((1, 2)))
    for segmentation, mask in zip(encoded.segmentations(), masks, strict=True):
        counts = read_segmentation(segmentation, mask.shape[1], mask.shape[0])
        np.testing.assert_array_equal(decode(encoded._replace(counts=[counts]))[0], mask)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.bool_, (2, 3, 5, 7)))
def test_overlaps(masks: Any) -> None:
    some, others = masks
    expected = [(a & b).sum() / max(1, (a | b).sum()) for a, b in zip(some, others, strict=True)]
    np.testing.assert_allclose(overlaps(encode(some), encode(others)), expected)


def mask_of(segmentation: Any, width: int = 8, height: int = 6) -> Any:
    counts = read_segmentation(segmentation, width, height)
    return decode(EncodedMasks(height, width, [counts]))[0]


def test_the_forms_of_a_segmentation() -> None:
    expected = np.zeros((6, 8), np.uint8)
    expected[1:4, 2:5] = 1
    np.testing.assert_array_equal(mask_of([[2, 1, 5, 1, 5, 4, 2, 4]]), expected)
    runs = {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 20]}  # down the columns, zeros first
    np.testing.assert_array_equal(mask_of(runs), expected)
    np.testing.assert_array_equal(mask_of(encode(expected[None]).segmentations()[0]), expected)
    slivers = [[2, 1, 5, 1, 5, 4, 2, 4], [0, 0, 1, 1], []]
    np.testing.assert_array_equal(mask_of(slivers), expected)
    expected[4:, 6:] = 1
    two = [[2, 1, 5, 1, 5, 4, 2, 4], [6, 4, 1e12, 4, 1e12, 1e12, 6, 1e12]]  # the second far outside
    np.testing.assert_array_equal(mask_of(two), expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "no segmentation"),
        ([], "no segmentation"),
        ([[1, 1, 5, 1]], "three points"),
        ([[1, 1, 5, 1, 4]], "malformed"),
        ([[1, 1, 5, 1, float("nan"), 3]], "three points"),
        ([["a", 1, 5, 1, 4, 4]], "malformed"),
        ([[10**400, 1, 5, 1, 4, 4]], "malformed"),
        ([1, 1, 5, 1, 5, 4], "malformed"),
        ("mask", "malformed"),
        (3, "malformed"),
        ({"size": [8, 6], "counts": [48]}, r"size \[8, 6\] instead of \[6, 8\]"),
        ({"size": 8, "counts": [48]}, "malformed"),
        ({"counts": [48]}, "malformed"),
        ({"size": [6, 8]}, "malformed"),
        ({"size": [6, 8], "counts": [10, 5]}, "malformed"),
        ({"size": [6, 8], "counts": [10, 500]}, "malformed"),
        ({"size": [6, 8], "counts": [-1, 49]}, "malformed"),
        ({"size": [6, 8], "counts": ["a"]}, "malformed"),
        ({"size": [6, 8], "counts": "zzzz"}, "malformed"),
        ({"size": [6, 8], "counts": "5"}, "malformed"),
        ({"size": [6, 8], "counts": "möwe"}, "malformed"),
    ],
)
def test_what_is_no_segmentation(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_segmentation(segmentation, 8, 6)
