from __future__ import annotations

import cv2
import numpy as np

from aligndet.proposals.selective_search import _C_LIBRARY, selective_search


def test_boxes_are_the_images_own_whatever_was_searched_before() -> None:
    image = np.random.default_rng(0).integers(0, 60, (72, 96, 3)).astype(np.uint8)
    image[15:45, 20:70] += 150
    first = selective_search(image)
    selective_search(image[::-1])
    np.testing.assert_array_equal(selective_search(image), first)
    _C_LIBRARY.srand(0)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))  # OpenCV's order of colours
    search.switchToSelectiveSearchFast()
    theirs = np.asarray(search.process(), np.float32)
    np.testing.assert_array_equal(first, np.concatenate([theirs[:, :2], theirs[:, :2] + theirs[:, 2:]], 1))
    assert len(selective_search(image, mode="quality")) > len(first)
    large = selective_search(image.repeat(4, 0).repeat(4, 1), resolution=96)
    assert large.max() > 96  # pixels of the image, not of what was searched
    assert (large <= [384, 288, 384, 288]).all()
