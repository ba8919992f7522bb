"""The proposals of one image: decoded, searched, filtered, ranked, and with masks if asked for."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np

from aligndet.data.images import ImageError, read_image, read_image_size
from aligndet.data.rle import encode
from aligndet.data.sources import ImageSource
from aligndet.proposals.filters import filter_boxes
from aligndet.proposals.masks import pseudo_masks
from aligndet.proposals.segments import objectness
from aligndet.proposals.selective_search import Mode, selective_search
from aligndet.proposals.storage import clean
from aligndet.proposals.table import ImageProposals

Rank = Literal["straddling", "search"]


def propose_image(
    folder: ImageSource,
    name: str,
    *,
    mode: Mode,
    resolution: int | None,
    rank: Rank,
    filters: dict[str, Any],
    outlines: dict[str, Any] | None,
) -> ImageProposals:
    """Finds the boxes of one image, and their masks if asked for.

    Args:
        folder: The images.
        name: Name of the image in it.
        mode: Mode of selective search.
        resolution: Longest side at which to run.
        rank: Order of the boxes.
        filters: Arguments of `filter_boxes`.
        outlines: Arguments of `pseudo_masks`; None: no masks.

    Returns:
        The boxes, or why there are none.

    Raises:
        ValueError: If this machine does not have the folder.
    """
    try:
        file = folder / name
        size = read_image_size(file)
        image = read_image(file, long_side=resolution).permute(1, 2, 0).numpy()
    except ImageError as error:
        folder.check_here()
        return ImageProposals(name, 0, 0, np.zeros((0, 4), np.float32), str(error))
    height, width = image.shape[:2]  # as decoded: a large JPEG is smaller than its size
    boxes = clean(selective_search(image, mode=mode, resolution=resolution), width, height)
    score = partial(objectness, image) if rank == "straddling" else None
    boxes = filter_boxes(boxes, width, height, score=score, **filters)
    masks = None
    if outlines is not None:
        masks = encode(pseudo_masks(image, boxes, resolution=resolution, **outlines)).counts
    boxes = boxes * np.array([size[0] / width, size[1] / height] * 2, np.float32)
    return ImageProposals(name, *size, boxes, None, masks)
