"""The proposals of many images in memory, which the processes of a loader share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aligndet.data.rle import EncodedMasks, decode
from aligndet.proposals.masks import MASK_SIDE


class ImageProposals(NamedTuple):
    """The proposals of one image, or why there are none."""

    file_name: str
    width: int
    height: int
    boxes: npt.NDArray[np.float32]  # (N, 4) xyxy pixels, in rank order
    skipped: str | None = None
    masks: Sequence[bytes] | None = None  # (N,) run lengths on the grid over each box, if known


class SharedNames(Sequence[str]):
    """Names in two tensors, which a loader's processes share; a list would be copied, string by string."""

    def __init__(self, text: Tensor, ends: Tensor) -> None:
        """Takes them over; see `of`.

        Args:
            text: (bytes,) uint8, all names.
            ends: (N + 1,) where each begins, and where the last one ends.
        """
        self._text, self._ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> SharedNames:
        """Makes them of strings.

        Args:
            names: In order.
        """
        encoded = [name.encode() for name in names]
        text = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
        return cls(text, torch.from_numpy(_offsets([len(name) for name in encoded])))

    def __reduce__(self) -> Any:
        try:
            return SharedNames, (self._text.share_memory_(), self._ends.share_memory_())
        except RuntimeError as error:
            _check_is_full(error)
            return list, (list(self),)

    def __len__(self) -> int:
        """Number of names."""
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        begin, end = self._ends[range(len(self))[index] :][:2].tolist()
        return self._text[begin:end].numpy().tobytes().decode()


@dataclass(frozen=True)
class ProposalTable:
    """The proposals of many images in few arrays.

    Sent to the processes of a loader, the arrays lie in memory that these share, once for all of them.
    """

    file_names: Sequence[str]
    sizes: npt.NDArray[np.int32]  # (images, 2) width, height
    boxes: npt.NDArray[np.float32]  # (all boxes, 4) xyxy pixels, in rank order within an image
    offsets: npt.NDArray[np.int64]  # (images + 1,) into boxes
    # run lengths of all masks (bytes,) uint8, and offsets (all boxes + 1,) into them
    masks: tuple[Tensor, npt.NDArray[np.int64]] | None = None
    clusters: npt.NDArray[np.signedinteger[Any]] | None = None  # (all boxes,) pseudo-classes

    def __len__(self) -> int:
        """Number of images."""
        return len(self.file_names)

    @cached_property
    def _shared(self) -> tuple[Any, ...]:
        shared: list[Any] = [SharedNames.of(self.file_names)]
        for name in ("sizes", "boxes", "offsets", "clusters"):
            array = getattr(self, name)
            shared.append(None if array is None else torch.from_numpy(array).share_memory_())
            object.__setattr__(self, name, None if array is None else shared[-1].numpy())  # no second copy
        if self.masks is None:
            return *shared, None
        ends = torch.from_numpy(self.masks[1]).share_memory_()
        object.__setattr__(self, "masks", (self.masks[0], ends.numpy()))
        return *shared, (self.masks[0], ends)

    def __reduce__(self) -> Any:
        try:
            return _received, self._shared
        except RuntimeError as error:
            _check_is_full(error)
            arrays = self.sizes, self.boxes, self.offsets, self.masks, self.clusters
            return ProposalTable, (list(self.file_names), *arrays)

    def boxes_of(self, index: int) -> npt.NDArray[np.float32]:
        """The boxes of an image, best first.

        Returns:
            (N, 4) xyxy pixels.
        """
        return self.boxes[self.offsets[index] : self.offsets[index + 1]]

    def masks_of(self, index: int, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Pseudo-masks of some boxes of an image, on the grid over each box.

        Args:
            index: Of the image.
            chosen: (N,) positions among the image's boxes.

        Returns:
            (N, MASK_SIDE, MASK_SIDE), 0 or 1; all 0 where nothing is known.
        """
        assert self.masks is not None
        runs, offsets = self.masks[0].numpy(), self.masks[1]
        first = self.offsets[index] + chosen
        bounds = zip(offsets[first].tolist(), offsets[first + 1].tolist(), strict=True)
        return decode(EncodedMasks(MASK_SIDE, MASK_SIDE, [runs[a:b].tobytes() for a, b in bounds]))

    def clusters_of(self, index: int, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Pseudo-classes of some boxes of an image.

        Args:
            index: Of the image.
            chosen: (N,) positions among the image's boxes.

        Returns:
            (N,) from 0 on.
        """
        assert self.clusters is not None
        return self.clusters[self.offsets[index] + chosen].astype(np.int64)

    def only(self, names: Collection[str]) -> ProposalTable:
        """The proposals of some images.

        Args:
            names: Of the images; those that have no proposals do not matter.
        """
        wanted = set(names)
        kept = np.array([name in wanted for name in self.file_names], np.bool_)
        counts = np.diff(self.offsets)
        boxes = np.repeat(kept, counts)  # (all boxes,)
        masks = self.masks
        if masks is not None:
            parts = zip(
                *(masks[1][ends[kept]].tolist() for ends in (self.offsets[:-1], self.offsets[1:])),
                strict=True,
            )
            runs = torch.cat([masks[0][:0], *(masks[0][begin:end] for begin, end in parts)])
            masks = runs, _offsets(np.diff(masks[1])[boxes])
        return ProposalTable(
            [name for name in self.file_names if name in wanted],
            self.sizes[kept],
            self.boxes[boxes],
            _offsets(counts[kept]),
            masks,
            None if self.clusters is None else self.clusters[boxes],
        )

    @classmethod
    def of(cls, rows: Iterable[ImageProposals]) -> ProposalTable:
        """Collects images.

        Args:
            rows: One an image; their masks are kept if all have them.
        """
        rows = list(rows)
        boxes = [row.boxes.reshape(-1, 4).astype(np.float32, copy=False) for row in rows]
        table = cls(
            [row.file_name for row in rows],
            np.array([(row.width, row.height) for row in rows], np.int32).reshape(-1, 2),
            np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
            _offsets([len(b) for b in boxes]),
        )
        counts = [mask for row in rows for mask in row.masks or ()]
        if len(counts) < len(table.boxes):
            return table
        runs = torch.from_numpy(np.frombuffer(b"".join(counts), np.uint8).copy())
        return replace(table, masks=(runs, _offsets([len(count) for count in counts])))


def _received(
    names: Sequence[str],
    sizes: Tensor,
    boxes: Tensor,
    offsets: Tensor,
    clusters: Tensor | None,
    masks: tuple[Tensor, Tensor] | None,
) -> ProposalTable:
    """A table out of what was sent."""
    return ProposalTable(
        names,
        sizes.numpy(),
        boxes.numpy(),
        offsets.numpy(),
        None if masks is None else (masks[0], masks[1].numpy()),
        None if clusters is None else clusters.numpy(),
    )


def _check_is_full(error: RuntimeError) -> None:
    """Raises what is not that /dev/shm is too small: then each process gets a copy."""
    if "shared memory" not in str(error):
        raise error


def _offsets(lengths: Any) -> npt.NDArray[np.int64]:
    """Where parts of these lengths begin, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
