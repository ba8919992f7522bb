"""`aligndet propose`: boxes for images without labels, once and offline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from aligndet.commands._settings import check_bounds
from aligndet.data.coco import CocoDataset
from aligndet.data.formats import read_labelled
from aligndet.data.images import ImageError, read_image, read_image_size
from aligndet.data.rle import EncodedMasks, encode, overlaps
from aligndet.data.sources import ImageSource
from aligndet.files import accepts_strings, atomic_write, contents, locked, print_skipped, read_json
from aligndet.proposals.clusters import clusters_file
from aligndet.proposals.engines import Engine, check_engine, run
from aligndet.proposals.filters import best_proposals, filter_boxes
from aligndet.proposals.masks import MASK_SIDE, pseudo_masks
from aligndet.proposals.segments import objectness
from aligndet.proposals.selective_search import Mode, selective_search
from aligndet.proposals.storage import clean, read_shard, whole_masks, write_coco, write_shard
from aligndet.proposals.table import ImageProposals

Rank = Literal["straddling", "search"]

_EXPLANATION = f"""Proposals of `aligndet propose`.

manifest.json    parameters, versions, counts; status "complete" or "in progress"
part-*.parquet   an image a row: file_name (relative to the folder of images), width, height,
                 boxes (flat xyxy pixels, best first), skipped (why there are none, or null); with --masks
                 also masks (of each box on a grid of {MASK_SIDE} by {MASK_SIDE} cells over it, as COCO's
                 compressed run lengths) and mask_side (that {MASK_SIDE})

The same command goes on where it was stopped. `aligndet pretrain --proposals THIS_FOLDER` reads it.
"""


class ProposeSummary(NamedTuple):
    """What came out."""

    output: Path
    images: int  # with proposals looked for
    skipped: dict[str, str]  # file name -> reason
    boxes: int
    without: int  # images in which nothing was found
    recall: dict[str, float] | None  # "recall50", "recall70" and "AR": their mean over IoU
    mask_iou: float | None  # mean IoU of the masks of objects that are found at IoU 0.7


@accepts_strings
def propose(
    images: str | Path,
    *,
    output: Path,
    names: Path | None = None,
    mode: Mode = "fast",
    resolution: int | None = 256,
    rank: Rank = "straddling",
    max_aspect_ratio: float = 3.0,
    min_area: float = 0.008,
    max_area: float = 0.81,
    nms_iou: float = 0.5,
    max_proposals: int | None = 200,
    masks: bool = False,
    segmentation: tuple[float, float, int] = (0.5, 150.0, 50),
    min_inside: float = 0.9,
    engine: Engine = "processes",
    ray_address: str | None = None,
    workers: int | None = None,
    shard_size: int = 256,
    annotations: Path | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> ProposeSummary:
    """Finds boxes around whatever coheres in each image, by selective search (paper section 3.2).

    Done once, before pre-training; a stopped run goes on where it was when the same command is given again.

    Args:
        images: Folder of images, searched with its subfolders, or an address (s3://bucket/images,
            gs://bucket/images, https://host/images, ...); a tar in it counts as a folder of images.
        output: Folder for Parquet files, or a ``.json`` file for COCO style (one category).
        names: Only these images: a text file with a name a line, or Parquet with a column file_name, relative
            to images; a tar stands for its images. Web servers need it, as they list nothing.
        mode: "fast", or "quality" (three to four times as slow).
        resolution: Longest side at which to run; null for full size.
        rank: Order of the boxes, which decides what overlap and max_proposals drop: "straddling" puts boxes
            first that cut no segment of the image in two; "search" keeps selective search's own order, which
            is largely chance.
        max_aspect_ratio: Longer to shorter side of a box at most.
        min_area: Share of the image that a box covers at least.
        max_area: Share of the image that a box covers at most.
        nms_iou: A box that overlaps a better one by more is dropped.
        max_proposals: Most boxes an image, best first; null for all.
        masks: Guess the outline of each object, too: the union of the segments that lie almost wholly in
            the box. Pre-training of a mask head needs it.
        segmentation: Of masks: sigma of the blur, scale and smallest size in pixels of the segments.
        min_inside: Of masks: share of a segment that lies in the box at least.
        engine: "processes" of this machine, or "ray": tasks on the machines of a Ray cluster, which all see
            the images under the same path. The result is the same, and the one goes on where the other was
            stopped.
        ray_address: Of the cluster; by default what RAY_ADDRESS says, a cluster that runs on this machine, or
            one of this machine alone, started for the purpose.
        workers: Processes or tasks at a time; by default one a core.
        shard_size: Images a Parquet file, which is also what a stopped run loses at most.
        annotations: COCO JSON, PASCAL VOC or YOLO of the objects in these images, to measure how many the
            boxes find, and how well the masks fit if it has masks.
        strict: A broken image is an error; by default it is skipped, counted and named.
        overwrite: Throw away what output holds.

    Returns:
        Counts, skipped images with the reason, and if annotations were given, recall and fit of the masks.

    Raises:
        ValueError: If the folder has no images, output holds something else, or (strict) an image is broken.
    """
    check_bounds(locals())
    check_engine(engine, ray_address)
    source = ImageSource(images)
    if annotations is not None:  # fails before the work
        read_labelled(annotations, source.labelled_folder("--annotations"), masks=None)
    file_names = source.names(names)
    parameters: dict[str, Any] = {
        "mode": mode,
        "resolution": resolution,
        "rank": rank,
        "max_aspect_ratio": max_aspect_ratio,
        "min_area": min_area,
        "max_area": max_area,
        "nms_iou": nms_iou,
        "max_proposals": max_proposals,
        "shard_size": shard_size,
        "images": len(file_names),
        "image_list": hashlib.sha256("\n".join(file_names).encode()).hexdigest(),
    }
    if masks:
        if segmentation[0] < 0 or segmentation[1] <= 0 or segmentation[2] < 1:
            raise ValueError(f"segmentation must be sigma, scale and smallest size, not {segmentation}")
        parameters |= {"masks": True, "segmentation": list(segmentation), "min_inside": min_inside}
    as_json = output.suffix == ".json"
    if as_json and output.exists() and not overwrite:
        raise ValueError(f"{output}: is there already; give --overwrite or another output")
    folder = output.with_name(f".{output.name}.partial") if as_json else output
    with locked(folder):
        _check_folder(folder, parameters, overwrite)
        for path in folder.glob(".part-*.partial*"):  # of a write that was killed
            path.unlink(missing_ok=True)
        work = partial(
            propose_image,
            source.absolute(),
            mode=mode,
            resolution=resolution,
            rank=rank,
            filters={
                k: parameters[k]
                for k in ("max_aspect_ratio", "min_area", "max_area", "nms_iou", "max_proposals")
            },
            outlines=dict(zip(("sigma", "scale", "min_size"), segmentation, strict=True))
            | {"min_inside": min_inside}
            if masks
            else None,
        )
        shards = [file_names[start : start + shard_size] for start in range(0, len(file_names), shard_size)]
        paths = [folder / f"part-{index:05d}.parquet" for index in range(len(shards))]
        left = [(shard, path) for shard, path in zip(shards, paths, strict=True) if not path.is_file()]
        waiting = [name for shard, _ in left for name in shard]
        with (
            tqdm(
                total=len(file_names), initial=len(file_names) - len(waiting), desc="propose", unit="image"
            ) as bar,
            closing(run(work, waiting, engine=engine, workers=workers, address=ray_address)) as results,
        ):
            for shard, path in left:
                write_shard(path, _rows(shard, results, bar, strict))
        reread = masks and (as_json or annotations is not None)
        rows: Iterable[ImageProposals] = (row for path in paths for row in read_shard(path, masks=reread))
        if as_json:
            rows = list(rows)
        summary = _summarise(output, rows, source, annotations)
        if strict and summary.skipped:  # by a former run that was not strict
            raise ValueError(f"{next(iter(summary.skipped.values()))}; mend it and give --overwrite")
        if as_json:
            write_coco(output, rows)
            others = (folder / name for name in ("manifest.json", "README.txt", ".lock"))
            for path in (*paths, *others, *folder.glob(".*.partial*")):
                path.unlink(missing_ok=True)
        else:
            counts = {
                "done": summary.images,
                "boxes": summary.boxes,
                "skipped": summary.skipped,
                "recall": summary.recall,
                "mask_iou": summary.mask_iou,
            }
            _write_manifest(folder, parameters, "complete", counts)
    if as_json:
        folder.rmdir()
    _print(summary)
    return summary


def _rows(
    shard: list[str], results: Iterator[ImageProposals], bar: tqdm[Any], strict: bool
) -> list[ImageProposals]:
    """The next results, which are those of a shard."""
    rows = []
    for row in islice(results, len(shard)):
        if row.skipped is not None and strict:
            raise ValueError(row.skipped)
        rows.append(row)
        bar.update()
    assert [row.file_name for row in rows] == shard
    return rows


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
        folder: Of the images.
        name: Of the file in it.
        mode: Of selective search.
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


def _check_folder(folder: Path, parameters: dict[str, Any], overwrite: bool) -> None:
    manifest = folder / "manifest.json"
    if overwrite and manifest.is_file():
        _write_manifest(folder, {}, "in progress", {})
        for path in [*folder.glob("part-*.parquet"), *folder.glob(".*.partial*"), clusters_file(folder)]:
            path.unlink(missing_ok=True)
    elif manifest.is_file():
        before = read_json(manifest).get("parameters", {})
        changed = next((key for key in before | parameters if before.get(key) != parameters.get(key)), None)
        if changed == "image_list" or changed == "images":
            raise ValueError(f"{folder}: was made of other images; give --overwrite or another output")
        if changed:
            raise ValueError(
                f"{folder}: was made with {changed}={before.get(changed)!r}, now {parameters.get(changed)!r};"
                " give the former, --overwrite, or another output"
            )
        return
    elif used := contents(folder):
        raise ValueError(f"{folder}: holds {used[0]!r} and no proposals; give another output")
    # the manifest first: a folder without it is taken for somebody else's
    _write_manifest(folder, parameters, "in progress", {})
    atomic_write(folder / "README.txt", _EXPLANATION)


def _write_manifest(folder: Path, parameters: dict[str, Any], status: str, counts: dict[str, Any]) -> None:
    versions = {"aligndet": version("aligndet"), "opencv": cv2.__version__}
    document = {"status": status, "parameters": parameters, "versions": versions, **counts}
    atomic_write(folder / "manifest.json", json.dumps(document, indent=2) + "\n")


def _summarise(
    output: Path, rows: Iterable[ImageProposals], images: ImageSource, annotations: Path | None
) -> ProposeSummary:
    coco = None
    if annotations is not None:
        coco = read_labelled(annotations, images.labelled_folder("--annotations"), masks=None)
    labelled = frozenset(coco.file_names if coco else ())
    skipped, kept, counts = {}, {}, []
    for row in rows:  # one by one: all of a large set are larger than the memory
        if row.skipped is not None:
            skipped[row.file_name] = row.skipped
            continue
        counts.append(len(row.boxes))
        if row.file_name in labelled:
            kept[row.file_name] = row
    recall, mask_iou = None, None
    if coco is not None:
        found, fitted = _measure(kept, coco)
        if not len(found):
            raise ValueError(f"{annotations}: has no object in the images of {images}")
        at = {f"recall{round(100 * t)}": float((found >= t).mean()) for t in (0.5, 0.7)}
        recall = {**at, "AR": float(np.mean([(found >= t).mean() for t in np.arange(0.5, 1.0, 0.05)]))}
        mask_iou = float(fitted.mean()) if len(fitted) else None
    return ProposeSummary(output, len(counts), skipped, sum(counts), counts.count(0), recall, mask_iou)


def _measure(
    kept: dict[str, ImageProposals], coco: CocoDataset
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """IoU of every object with its best box, and of the masks of objects whose box is found at IoU 0.7."""
    found, fitted = [np.zeros(0, np.float32)], [np.zeros(0)]
    for index, name in enumerate(coco.file_names):
        if name not in kept:
            continue
        row, objects = kept[name], np.flatnonzero(~coco.iscrowd[index])
        overlap, best = best_proposals(row.boxes, coco.boxes[index][objects])
        found.append(overlap)
        same_size = coco.sizes[index].tolist() == [row.width, row.height]
        if coco.masks is not None and row.masks is not None and same_size:
            sure = overlap >= 0.7
            true = [coco.masks[index][i] for i in objects[sure].tolist()]
            fitted.append(overlaps(whole_masks(row, best[sure]), EncodedMasks(row.height, row.width, true)))
    return np.concatenate(found), np.concatenate(fitted)


def _print(summary: ProposeSummary) -> None:
    mean = summary.boxes / max(1, summary.images)
    print(f"{summary.images} images, {mean:.1f} proposals an image, {summary.without} images without any")
    print_skipped(summary.skipped.values())
    if summary.skipped:
        print(f"{len(summary.skipped)} images skipped")
    if summary.recall:
        print("objects found: " + ", ".join(f"{name} {value:.3f}" for name, value in summary.recall.items()))
    if summary.mask_iou is not None:
        print(f"masks of objects found at IoU 0.7: mean IoU {summary.mask_iou:.3f}")
    print(f"proposals: {summary.output}")
