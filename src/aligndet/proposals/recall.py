"""How well proposals find labelled objects."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aligndet.data.coco import CocoDataset
from aligndet.data.rle import EncodedMasks, overlaps
from aligndet.proposals.filters import best_proposals
from aligndet.proposals.storage import whole_masks
from aligndet.proposals.table import ImageProposals


class Recall:
    """Counts the objects that proposals find, image by image; crowds do not count."""

    def __init__(self, coco: CocoDataset) -> None:
        """Starts with no image.

        Args:
            coco: Labels; masks are compared if they have some.
        """
        self._coco = coco
        self._positions: dict[str, list[int]] = {}  # an image can be listed twice
        for position, name in enumerate(coco.file_names):
            self._positions.setdefault(name, []).append(position)
        self._box_ious: list[npt.NDArray[np.float32]] = [np.zeros(0, np.float32)]
        self._mask_ious: list[npt.NDArray[np.float64]] = [np.zeros(0)]
        self.unlike = 0

    def add(self, proposals: ImageProposals) -> None:
        """Compares the proposals of an image with its objects.

        Args:
            proposals: Of an image, which may have no labels.
        """
        for position in self._positions.get(proposals.file_name, ()):
            self._add(proposals, position)

    def _add(self, proposals: ImageProposals, position: int) -> None:
        coco = self._coco
        size = proposals.width, proposals.height
        if tuple(coco.sizes[position]) != size:  # turned, say: boxes of another system
            self.unlike += 1
            return
        objects = np.flatnonzero(~coco.iscrowd[position])
        ious, best = best_proposals(proposals.boxes, coco.boxes[position][objects])
        self._box_ious.append(ious)
        if coco.masks is not None and proposals.masks is not None:
            is_found = ious >= 0.7
            masks = [coco.masks[position][i] for i in objects[is_found].tolist()]
            labelled = EncodedMasks(proposals.height, proposals.width, masks)
            self._mask_ious.append(overlaps(whole_masks(proposals, best[is_found]), labelled))

    def figures(self) -> dict[str, float]:
        """Shares of the objects with a box of IoU 0.5 ("recall50") and 0.7 ("recall70") at least; "AR": their
        mean over IoU 0.5 to 0.95. Empty if there is no object.
        """
        ious = np.concatenate(self._box_ious)
        if not len(ious):
            return {}
        recall50, recall70, *others = (
            float((ious >= threshold).mean()) for threshold in (0.5, 0.7, *np.arange(0.5, 1.0, 0.05))
        )
        return {"recall50": recall50, "recall70": recall70, "AR": float(np.mean(others))}

    def mask_iou(self) -> float | None:
        """Mean IoU of the masks of objects that are found at IoU 0.7; None if there are none."""
        ious = np.concatenate(self._mask_ious)
        return float(ious.mean()) if len(ious) else None
