"""Low-data splits: nested subsets of the training images, in folds; and images that are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def in_order(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The images of a COCO JSON in the order that draws count in."""
    return sorted(document["images"], key=lambda image: (image["file_name"], image["id"]))


def with_images(document: Mapping[str, Any], images: list[dict[str, Any]]) -> dict[str, Any]:
    """A COCO JSON of some of its images and what they show."""
    kept = {image["id"] for image in images}
    annotations = [a for a in document["annotations"] if a["image_id"] in kept]
    return {**document, "images": images, "annotations": annotations}


def nested_subsets(
    length: int, counts: Sequence[int], *, folds: int, seed: int
) -> list[list[npt.NDArray[np.int64]]]:
    """Draws subsets; within a fold the smaller ones are the beginning of the larger ones.

    Each fold is one random order of all images, so that a fold and a count give the same images whatever
    other counts are asked for.

    Args:
        length: Number of images.
        counts: Sizes of the subsets.
        folds: Number of draws, independent of each other.
        seed: Of the draws.

    Returns:
        For each fold and count the sorted positions of its images.

    Raises:
        ValueError: If a count is not from 1 to the number of images.
    """
    wrong = next((count for count in counts if not 1 <= count <= length), None)
    if wrong is not None:
        raise ValueError(f"a split must have from 1 to {length} images, not {wrong}")
    orders = [np.random.default_rng((seed, fold)).permutation(length) for fold in range(folds)]
    return [[np.sort(order[:count]) for count in counts] for order in orders]


def held_out_positions(
    length: int, share: float, *, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draws images to be held out.

    Args:
        length: Number of images, at least two.
        share: Of them that is held out, rounded; at least one is, and at least one is not.
        seed: Of the draw.

    Returns:
        The sorted positions of the images to train on, and of those held out.
    """
    count = min(length - 1, max(1, round(share * length)))
    ((drawn,),) = nested_subsets(length, [count], folds=1, seed=seed)
    return np.setdiff1d(np.arange(length), drawn), drawn
