"""Proposals on disk: sharded Parquet, or the COCO-style JSON that other projects use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from aligndet.data.document import CocoWriter, image_size, read_box
from aligndet.data.rle import EncodedMasks, decode, encode, read_segmentation
from aligndet.files import atomic_write, read_json, safe_name, whole_file
from aligndet.proposals.masks import MASK_SIDE, on_grid, on_image
from aligndet.proposals.table import ImageProposals, ProposalTable

SCHEMA = pa.schema(
    [
        ("file_name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.float32())),  # flat xyxy pixels, in rank order
        ("skipped", pa.string()),  # why the image has no proposals, or null
    ]
)
MASK_SCHEMA = pa.schema(
    [
        ("mask_side", pa.int32()),  # of the grid over its box that each mask is on
        ("masks", pa.list_(pa.binary())),  # COCO's compressed run lengths, one a box
    ]
)


def read_proposals(path: Path, *, masks: bool = False) -> ProposalTable:
    """Reads the proposals of a data set.

    Args:
        path: A folder that `aligndet propose` has written, a Parquet file, or a COCO-style JSON (one
            category, ``bbox`` xywh) of any origin.
        masks: Read their masks, too.

    Raises:
        ValueError: If there are none, they have no masks but shall, or the file is broken; the message names
            it.
    """
    if path.is_dir():
        shards = sorted(path.glob("part-*.parquet"))
        if not shards:
            raise ValueError(f"{path}: holds no proposals (part-*.parquet); run `aligndet propose` first")
        manifest = path / "manifest.json"
        noted: dict[str, Any] = read_json(manifest) if manifest.is_file() else {"status": "complete"}
        rows = [row for shard in shards for row in read_shard(shard, masks=masks)]
        images = noted.get("parameters", {}).get("images", len(rows))
        if noted.get("status") != "complete" or images != len(rows):  # a part can have been lost since
            raise ValueError(
                f"{path}: these proposals are not complete; run the same `aligndet propose` again to finish"
            )
    elif not path.is_file():
        raise ValueError(f"{path}: no such file or folder of proposals")
    elif path.suffix == ".json":
        rows = _read_coco(path, masks)
    else:
        rows = read_shard(path, masks=masks)
    kept = [row for row in rows if row.skipped is None]
    if not kept:
        raise ValueError(f"{path}: holds no image with proposals")
    names = {row.file_name for row in kept}
    if len(names) < len(kept):
        raise ValueError(f"{path}: holds an image twice")
    table = ProposalTable.of(kept)
    if masks and table.masks is None:
        raise ValueError(f"{path}: its proposals have no masks; make them with `aligndet propose --masks`")
    return table


def read_shard(path: Path, *, masks: bool = False) -> list[ImageProposals]:
    """Reads one Parquet file.

    Args:
        path: Of the file.
        masks: Read masks, too, if there are any.

    Raises:
        ValueError: If it is broken or lacks a column.
    """
    schema = SCHEMA
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        if masks and "masks" in file.schema_arrow.names:
            schema = pa.unify_schemas([SCHEMA, MASK_SCHEMA])
        table = file.read(schema.names).select(schema.names).cast(schema)
    except PermissionError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: broken proposals ({error}); delete the file and run `aligndet propose` again"
        ) from error
    missing = next((key for key in ("file_name", "width", "height", "boxes") if table[key].null_count), None)
    if missing is not None:
        raise ValueError(
            f"{path}: an image has no {missing}; delete the file and run `aligndet propose` again"
        )
    names = [safe_name(name, path) for name in table["file_name"].to_pylist()]
    boxes, counts = _flat_boxes(path, table["boxes"], names)
    widths, heights = (table[key].to_numpy() for key in ("width", "height"))
    boxes, kept = _clip(boxes, np.stack([widths, heights] * 2, axis=1).repeat(counts, axis=0))
    found = _masks(path, table, counts, names) if "masks" in schema.names else None
    rows: list[ImageProposals] = []
    bounds = zip(names, widths.tolist(), heights.tolist(), table["skipped"].to_pylist(), strict=True)
    for (name, width, height, skipped), end, count in zip(bounds, counts.cumsum(), counts, strict=True):
        part = slice(end - count, end if skipped is None else end - count)
        of_image = None
        if found is not None and skipped is None and (given := found[len(rows)]) is not None:
            of_image = [mask for mask, is_kept in zip(given, kept[part].tolist(), strict=True) if is_kept]
        rows.append(ImageProposals(name, width, height, boxes[part][kept[part]], skipped, of_image))
    return rows


def _flat_boxes(
    path: Path, column: pa.ChunkedArray, names: Sequence[str]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Boxes of all images (N, 4), and how many each has."""
    lists = column.combine_chunks()
    numbers = np.diff(lists.offsets.to_numpy())
    wrong = np.flatnonzero(numbers % 4)
    if len(wrong):
        raise ValueError(f"{path}: the boxes of {names[wrong[0]]} are not in fours")
    flat = lists.flatten().to_numpy(zero_copy_only=False)  # nan for null
    return flat.astype(np.float32, copy=False).reshape(-1, 4), numbers // 4


def _masks(
    path: Path, table: pa.Table, counts: npt.NDArray[np.int64], names: Sequence[str]
) -> list[list[bytes] | None]:
    """Run lengths of each image's masks, or None."""
    sides, found = table["mask_side"].to_pylist(), table["masks"].to_pylist()
    for name, count, side, masks, skipped in zip(
        names, counts.tolist(), sides, found, table["skipped"].to_pylist(), strict=True
    ):
        if skipped is not None or masks is None:
            continue
        if side != MASK_SIDE or len(masks) != count or None in masks:
            raise ValueError(
                f"{path}: {name} has {count} boxes and {len(masks)} masks of side {side}; there must be a"
                f" mask of side {MASK_SIDE} for each box"
            )
    return found


def write_shard(path: Path, rows: Sequence[ImageProposals]) -> None:
    """Writes one Parquet file, whole or not at all; with masks if an image has them."""
    columns: dict[str, list[Any]] = {
        "file_name": [row.file_name for row in rows],
        "width": [row.width for row in rows],
        "height": [row.height for row in rows],
        "boxes": [row.boxes.astype(np.float32).ravel() for row in rows],
        "skipped": [row.skipped for row in rows],
    }
    schema = SCHEMA
    if any(row.masks is not None for row in rows):
        schema = pa.unify_schemas([SCHEMA, MASK_SCHEMA])
        columns["mask_side"] = [MASK_SIDE for _ in rows]
        columns["masks"] = [row.masks for row in rows]
    with whole_file(path) as file:
        pq.write_table(pa.table(columns, schema=schema), file, compression="zstd", write_page_checksum=True)


def write_coco(path: Path, rows: Iterable[ImageProposals]) -> None:
    """Writes COCO-style JSON: one category, ``bbox`` xywh and ``segmentation`` if known, in rank order.

    Args:
        path: Of the file.
        rows: The images; those skipped are left out.
    """
    document = CocoWriter({1: "proposal"})
    for row in rows:
        if row.skipped is not None:
            continue
        document.add_image(row.file_name, row.width, row.height)
        masks = [] if row.masks is None else whole_masks(row, np.arange(len(row.boxes))).segmentations()
        for position, box in enumerate(row.boxes.astype(float).tolist()):
            mask = {"segmentation": masks[position]} if masks else {}
            document.add_object(1, box, area=(box[2] - box[0]) * (box[3] - box[1]), iscrowd=0, **mask)
    atomic_write(path, json.dumps(document.content))


def whole_masks(row: ImageProposals, chosen: npt.NDArray[np.int64]) -> EncodedMasks:
    """Masks of some boxes at the size of their image.

    Args:
        row: An image with its masks.
        chosen: (N,) positions among its boxes.
    """
    assert row.masks is not None
    grids = decode(EncodedMasks(MASK_SIDE, MASK_SIDE, [row.masks[i] for i in chosen.tolist()]))
    size = row.width, row.height
    # one by one: all of a large image's masks together can be larger than the memory
    masks = (on_image(grid, box, *size) for grid, box in zip(grids, row.boxes[chosen], strict=True))
    return EncodedMasks(row.height, row.width, [encode(mask[None]).counts[0] for mask in masks])


def _read_coco(path: Path, masks: bool) -> list[ImageProposals]:
    try:
        document = read_json(path)
        images = {image["id"]: image for image in document["images"]}
        if len(images) < len(document["images"]):
            raise ValueError("an image id occurs twice")
        found: dict[Any, list[dict[str, Any]]] = {key: [] for key in images}
        for annotation in document["annotations"]:
            found[annotation["image_id"]].append(annotation)
        return [_of_coco(path, image, found[key], masks) for key, image in images.items()]
    except (KeyError, TypeError, ValueError) as error:
        wanted = "proposals with masks" if masks else "proposals"
        raise ValueError(f"{path}: no COCO-style {wanted}: {type(error).__name__}: {error}") from error


def _of_coco(
    path: Path, image: dict[str, Any], annotations: list[dict[str, Any]], masks: bool
) -> ImageProposals:
    if not isinstance(image["file_name"], str):
        raise ValueError(f"the file_name {image['file_name']!r:.80} is no text")
    name, (width, height) = safe_name(image["file_name"], path), image_size(image, path)
    try:
        corners = [[x, y, x + w, y + h] for x, y, w, h in (read_box(entry["bbox"]) for entry in annotations)]
    except ValueError as error:
        raise ValueError(f"image {name}: {error}") from error
    boxes, kept = _clip(np.array(corners, np.float32).reshape(-1, 4), [width, height] * 2)
    counts = None
    if masks:
        grids = np.zeros((kept.sum(), MASK_SIDE, MASK_SIDE), np.uint8)
        for row, index in enumerate(np.flatnonzero(kept).tolist()):
            try:
                runs = read_segmentation(annotations[index].get("segmentation"), width, height)
            except ValueError as error:
                raise ValueError(f"annotation {annotations[index].get('id')} {error}") from error
            grids[row] = on_grid(decode(EncodedMasks(height, width, [runs]))[0], boxes[index])
        counts = encode(grids).counts
    return ImageProposals(name, width, height, boxes[kept], None, counts)


def clean(boxes: npt.NDArray[np.float32], width: int, height: int) -> npt.NDArray[np.float32]:
    """Clips boxes to the image and drops those that are not finite or less than a pixel wide or high.

    Args:
        boxes: (N, 4) xyxy pixels.
        width: Of the image.
        height: Of the image.

    Returns:
        (M, 4), M <= N, in the same order.
    """
    clipped, kept = _clip(boxes, [width, height] * 2)
    return clipped[kept]


def _clip(
    boxes: npt.NDArray[np.float32], limits: Any
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Boxes (N, 4) within their image (width, height, width, height), and which (N,) are of use."""
    clipped = boxes.clip(0, np.asarray(limits, np.float32))
    large = ((clipped[:, 2:] - clipped[:, :2]) >= 1).all(axis=1)
    return clipped, large & np.isfinite(boxes).all(axis=1)
