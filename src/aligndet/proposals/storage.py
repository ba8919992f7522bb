"""Proposals on disk: sharded Parquet, or the COCO-style JSON that other projects use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from aligndet.data.files import atomic_write

SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # flat xyxy pixels, in rank order
        ("skipped", pa.string()),  # why the image has no proposals, or null
    ]
)


class ImageProposals(NamedTuple):
    """The proposals of one image, or why there are none."""

    file_name: str
    width: int
    height: int
    boxes: npt.NDArray[np.float32]  # (N, 4) xyxy pixels, in rank order
    skipped: str | None = None


@dataclass(frozen=True)
class ProposalTable:
    """The proposals of many images in few arrays."""

    file_names: list[str]
    sizes: npt.NDArray[np.int32]  # (images, 2) width, height
    boxes: npt.NDArray[np.float32]  # (all boxes, 4) xyxy pixels, in rank order within an image
    offsets: npt.NDArray[np.int64]  # (images + 1,) into boxes

    def __len__(self) -> int:
        """Number of images."""
        return len(self.file_names)

    def boxes_of(self, index: int) -> npt.NDArray[np.float32]:
        """The boxes of an image, best first.

        Args:
            index: Of the image.

        Returns:
            (N, 4) xyxy pixels.
        """
        return self.boxes[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def of(cls, rows: Iterable[ImageProposals]) -> ProposalTable:
        """Collects images.

        Args:
            rows: One an image.
        """
        rows = list(rows)
        boxes = [row.boxes.reshape(-1, 4).astype(np.float32) for row in rows]
        return cls(
            [row.file_name for row in rows],
            np.array([(row.width, row.height) for row in rows], np.int32).reshape(-1, 2),
            np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
            np.cumsum([0, *(len(b) for b in boxes)], dtype=np.int64),
        )


def read_proposals(path: Path) -> ProposalTable:
    """Reads the proposals of a data set.

    Args:
        path: A folder that `aligndet propose` has written, a Parquet file, or a COCO-style JSON (one
            category, ``bbox`` xywh) of any origin.

    Raises:
        ValueError: If there are none, or the file is broken; the message names it.
    """
    if path.is_dir():
        shards = sorted(path.glob("part-*.parquet"))
        if not shards:
            raise ValueError(f"{path}: holds no proposals (part-*.parquet); run `aligndet propose` first")
        manifest = path / "manifest.json"
        if manifest.is_file() and json.loads(manifest.read_text()).get("status") != "complete":
            raise ValueError(
                f"{path}: these proposals are not complete; run the same `aligndet propose` again to finish"
            )
        rows = [row for shard in shards for row in read_shard(shard)]
    elif not path.is_file():
        raise ValueError(f"{path}: no such file or folder of proposals")
    elif path.suffix == ".json":
        rows = _read_coco(path)
    else:
        rows = read_shard(path)
    kept = [row for row in rows if row.skipped is None]
    if not kept:
        raise ValueError(f"{path}: holds no image with proposals")
    names = {row.file_name for row in kept}
    if len(names) < len(kept):
        raise ValueError(f"{path}: holds an image twice")
    return ProposalTable.of(kept)


def read_shard(path: Path) -> list[ImageProposals]:
    """Reads one Parquet file.

    Args:
        path: Of the file.

    Raises:
        ValueError: If it is broken or lacks a column.
    """
    try:
        columns = pq.read_table(path).cast(SCHEMA).to_pydict()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: broken proposals ({error}); delete the file and run `aligndet propose` again"
        ) from error
    rows = []
    for name, width, height, flat, skipped in zip(*columns.values(), strict=True):
        if len(flat) % 4:
            raise ValueError(f"{path}: the boxes of {name} are not in fours")
        boxes = (
            clean(np.array(flat, np.float32).reshape(-1, 4), width, height)
            if skipped is None
            else np.zeros((0, 4), np.float32)
        )
        rows.append(ImageProposals(safe_name(name, path), width, height, boxes, skipped))
    return rows


def write_shard(path: Path, rows: Sequence[ImageProposals]) -> None:
    """Writes one Parquet file, whole or not at all.

    Args:
        path: Of the file.
        rows: Its images.
    """
    columns = {
        "file_name": [row.file_name for row in rows],
        "width": [row.width for row in rows],
        "height": [row.height for row in rows],
        "boxes": [row.boxes.astype(np.float32).ravel() for row in rows],
        "skipped": [row.skipped for row in rows],
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=SCHEMA), sink, compression="zstd")
    atomic_write(path, sink.getvalue().to_pybytes())


def write_coco(path: Path, rows: Iterable[ImageProposals]) -> None:
    """Writes COCO-style JSON: one category, ``bbox`` xywh, in rank order.

    Args:
        path: Of the file.
        rows: The images; those skipped are left out.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in rows:
        if row.skipped is not None:
            continue
        images.append(
            {"id": len(images) + 1, "file_name": row.file_name, "width": row.width, "height": row.height}
        )
        for x0, y0, x1, y1 in row.boxes.astype(float).tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "proposal"}]}
    atomic_write(path, json.dumps(document))


def _read_coco(path: Path) -> list[ImageProposals]:
    try:
        document = json.loads(path.read_text())
        images = {image["id"]: image for image in document["images"]}
        if len(images) < len(document["images"]):
            raise ValueError("an image id occurs twice")
        boxes: dict[Any, list[list[float]]] = {key: [] for key in images}
        for annotation in document["annotations"]:
            x, y, width, height = annotation["bbox"]
            boxes[annotation["image_id"]].append([x, y, x + width, y + height])
        return [
            ImageProposals(
                safe_name(image["file_name"], path),
                int(image["width"]),
                int(image["height"]),
                clean(np.array(boxes[key], np.float32).reshape(-1, 4), image["width"], image["height"]),
            )
            for key, image in images.items()
        ]
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no COCO-style proposals: {type(error).__name__}: {error}") from error


def clean(boxes: npt.NDArray[np.float32], width: int, height: int) -> npt.NDArray[np.float32]:
    """Clips boxes to the image and drops those that are not finite or less than a pixel wide or high.

    Args:
        boxes: (N, 4) xyxy pixels.
        width: Of the image.
        height: Of the image.

    Returns:
        (M, 4), M <= N, in the same order.
    """
    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    boxes = boxes.clip(0, np.array([width, height, width, height], np.float32))
    return boxes[((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)]


def safe_name(name: str, source: Path) -> str:
    """Refuses a file name that leads out of the folder of images.

    Args:
        name: Relative path with slashes.
        source: The file that it stands in, for the message.

    Raises:
        ValueError: If the name is absolute or goes up.
    """
    parts = PurePosixPath(str(name).replace("\\", "/"))
    if not str(name) or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{source}: refuses the file name {name!r}, which leads out of the folder of images")
    return str(name)
