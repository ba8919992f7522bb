"""`aligndet propose`: boxes for images without labels, once and offline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from tqdm import tqdm

from aligndet.commands._settings import check_bounds
from aligndet.data.formats import read_labelled
from aligndet.data.sources import ImageSource
from aligndet.files import accepts_strings, atomic_write, contents, locked, print_skipped, read_part
from aligndet.proposals.clusters import clusters_file, partial_file
from aligndet.proposals.engines import Engine, check_engine, run
from aligndet.proposals.masks import MASK_SIDE
from aligndet.proposals.pipeline import Rank, propose_image
from aligndet.proposals.recall import Recall
from aligndet.proposals.selective_search import Mode
from aligndet.proposals.storage import read_shard, write_coco, write_shard
from aligndet.proposals.table import ImageProposals

_EXPLANATION = f"""Proposals of `aligndet propose`.

manifest.json    parameters, versions, counts; status "complete" or "in progress"
part-*.parquet   an image a row: file_name (relative to the folder of images), width, height,
                 boxes (flat xyxy pixels, best first), skipped (why there are none, or null); with --masks
                 also masks (of each box on a grid of {MASK_SIDE} by {MASK_SIDE} cells over it, as COCO's
                 compressed run lengths) and mask_side (that {MASK_SIDE})

The same command goes on where it was stopped. `aligndet pretrain --proposals THIS_FOLDER` reads it.
"""


class ProposeSummary(NamedTuple):
    """Counts of `propose`, and how well the boxes find labelled objects."""

    output: Path
    images: int  # that could be read
    skipped: dict[str, str]  # file name -> reason
    boxes: int
    without: int  # images without a box
    recall: dict[str, float] | None  # "recall50", "recall70" and "AR": their mean over IoU
    mask_iou: float | None  # mean IoU of the masks of objects that are found at IoU 0.7
    unlike: int  # labelled images whose labels are of another size, and not among these


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
        names: Only these images: a text file with one name per line, or Parquet with a column file_name, both
            relative to images; a tar stands for its images. Web servers need it, as they list nothing.
        mode: "fast", or "quality" (three to four times as slow).
        resolution: Longest side at which to run; null for full size.
        rank: Order of the boxes, which decides what overlap and max_proposals drop: "straddling" puts boxes
            first that cut no segment of the image in two; "search" keeps selective search's own order, which
            is largely chance.
        max_aspect_ratio: Largest ratio of a box's longer side to its shorter one.
        min_area: Smallest share of the image that a box may cover.
        max_area: Largest share of the image that a box may cover.
        nms_iou: A box that overlaps a better one by more is dropped.
        max_proposals: Most boxes per image, best first; null for all.
        masks: Guess the outline of each object, too: the union of the segments that lie almost wholly in
            the box. Pre-training of a mask head needs it.
        segmentation: For masks: sigma of the blur, scale and smallest size in pixels of the segments.
        min_inside: For masks: smallest share of a segment that must lie in the box.
        engine: "processes" of this machine, or "ray": tasks on the machines of a Ray cluster, which all see
            the images under the same path. Both give the same result, and each goes on where the other was
            stopped.
        ray_address: Address of the Ray cluster; by default that of RAY_ADDRESS, a cluster that runs on this
            machine, or one that is started on it for this command.
        workers: Processes or tasks at a time; by default one per core.
        shard_size: Images per Parquet file; a stopped run loses at most this many.
        annotations: Labels of these images (COCO JSON, PASCAL VOC or YOLO), to measure how many objects the
            boxes find and, if the labels have masks, how well the masks fit.
        strict: A broken image is an error; by default it is skipped, counted and named.
        overwrite: Throw away what output holds.

    Returns:
        Counts, skipped images with the reason, and if annotations were given, recall and fit of the masks.

    Raises:
        ValueError: If the folder has no image that can be read, output holds something else, or (strict) an
            image is broken.
    """
    check_bounds(locals())
    check_engine(engine, ray_address)
    source = ImageSource(images)
    recall = None
    if annotations is not None:  # fails before the work
        recall = Recall(read_labelled(annotations, source.labelled_folder("--annotations"), masks=None))
    file_names = source.names(names)
    if names is not None:
        source.prepare(file_names, names)
    filters = {
        "max_aspect_ratio": max_aspect_ratio,
        "min_area": min_area,
        "max_area": max_area,
        "nms_iou": nms_iou,
        "max_proposals": max_proposals,
    }
    parameters: dict[str, Any] = {
        "mode": mode,
        "resolution": resolution,
        "rank": rank,
        **filters,
        "shard_size": shard_size,
        "images": len(file_names),
        "image_list": hashlib.sha256("\n".join(file_names).encode()).hexdigest(),
    }
    outlines = None
    if masks:
        sigma, scale, min_size = segmentation
        if sigma < 0 or scale <= 0 or min_size < 1:
            raise ValueError(f"segmentation must be sigma, scale and smallest size, not {segmentation}")
        parameters |= {"masks": True, "segmentation": list(segmentation), "min_inside": min_inside}
        outlines = {"sigma": sigma, "scale": scale, "min_size": min_size, "min_inside": min_inside}
    as_json = output.suffix == ".json"
    if as_json and output.exists() and not overwrite:
        raise ValueError(f"{output}: is there already; give --overwrite or another output")
    folder = output.with_name(f".{output.name}.partial") if as_json else output
    shards = {
        folder / f"part-{start // shard_size:05d}.parquet": file_names[start : start + shard_size]
        for start in range(0, len(file_names), shard_size)
    }
    search: dict[str, Any] = {"mode": mode, "resolution": resolution, "rank": rank}
    work = partial(propose_image, source.absolute(), **search, filters=filters, outlines=outlines)
    with locked(folder):
        _check_folder(folder, parameters, overwrite)
        for path in folder.glob(".part-*.partial*"):  # left by a write that was killed
            path.unlink(missing_ok=True)
        find = partial(run, work, engine=engine, workers=workers, address=ray_address)
        _write_shards(shards, find, strict)
        summary = _summarise(output, _read(shards, masks=masks and recall is not None), recall)
        if not summary.images:
            for path in shards:  # an image that is broken is not looked at again
                path.unlink()
            first = next(iter(summary.skipped.values()))
            raise ValueError(
                f"{source}: none of its {len(file_names)} images can be read; the first: {first}"
            )
        if recall is not None and not summary.recall:
            raise ValueError(f"{annotations}: has no object in the images of {source}")
        if strict and summary.skipped:  # in an earlier run that was not strict
            raise ValueError(f"{next(iter(summary.skipped.values()))}; mend it and give --overwrite")
        _write_manifest(folder, parameters, "complete", summary)
        if as_json:
            write_coco(output, _read(shards, masks=masks))
            files = (folder / name for name in ("manifest.json", "README.txt", ".lock"))
            for path in (*shards, *files, *folder.glob(".*.partial*")):
                path.unlink(missing_ok=True)
    if as_json:
        folder.rmdir()
    _print(summary)
    return summary


def _write_shards(
    shards: dict[Path, list[str]],
    find: Callable[[list[str]], Generator[ImageProposals, None, None]],
    strict: bool,
) -> None:
    """Finds and writes what is not there yet, each shard as soon as it is complete."""
    missing = {path: names for path, names in shards.items() if not path.is_file()}
    waiting, total = list(chain.from_iterable(missing.values())), sum(map(len, shards.values()))
    with (
        tqdm(total=total, initial=total - len(waiting), desc="propose", unit="image") as bar,
        closing(find(waiting)) as results,
    ):
        for path, names in missing.items():
            rows = []
            for row in islice(results, len(names)):
                if row.skipped is not None and strict:
                    raise ValueError(row.skipped)
                rows.append(row)
                bar.update()
            assert [row.file_name for row in rows] == names
            write_shard(path, rows)


def _read(shards: Iterable[Path], *, masks: bool) -> Iterator[ImageProposals]:
    """Reads images one by one: those of a large set do not fit into memory together."""
    return (row for path in shards for row in read_shard(path, masks=masks))


def _check_folder(folder: Path, parameters: dict[str, Any], overwrite: bool) -> None:
    manifest = folder / "manifest.json"
    if overwrite and manifest.is_file():
        _write_manifest(folder, {}, "in progress")
        for path in [
            *folder.glob("part-*.parquet"),
            *folder.glob(".*.partial*"),
            clusters_file(folder),
            partial_file(folder),
        ]:
            path.unlink(missing_ok=True)
    elif manifest.is_file():
        before = read_part(manifest, "parameters")
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
    _write_manifest(folder, parameters, "in progress")
    atomic_write(folder / "README.txt", _EXPLANATION)


def _write_manifest(
    folder: Path, parameters: dict[str, Any], status: str, summary: ProposeSummary | None = None
) -> None:
    versions = {"aligndet": version("aligndet"), "opencv": cv2.__version__}
    document: dict[str, Any] = {"status": status, "parameters": parameters, "versions": versions}
    if summary is not None:
        names = ("boxes", "skipped", "recall", "mask_iou")
        document |= {"done": summary.images, **{name: getattr(summary, name) for name in names}}
    atomic_write(folder / "manifest.json", json.dumps(document, indent=2) + "\n")


def _summarise(output: Path, rows: Iterable[ImageProposals], recall: Recall | None) -> ProposeSummary:
    skipped, counts = {}, []
    for row in rows:
        if row.skipped is not None:
            skipped[row.file_name] = row.skipped
            continue
        counts.append(len(row.boxes))
        if recall is not None:
            recall.add(row)
    figures, mask_iou = (recall.figures(), recall.mask_iou()) if recall is not None else (None, None)
    unlike = 0 if recall is None else recall.unlike
    return ProposeSummary(
        output, len(counts), skipped, sum(counts), counts.count(0), figures, mask_iou, unlike
    )


def _print(summary: ProposeSummary) -> None:
    mean = summary.boxes / max(1, summary.images)
    print(f"{summary.images} images, {mean:.1f} proposals an image, {summary.without} images without any")
    print_skipped(summary.skipped.values())
    if summary.skipped:
        print(f"{len(summary.skipped)} images skipped")
    if summary.recall:
        print("objects found: " + ", ".join(f"{name} {value:.3f}" for name, value in summary.recall.items()))
    if summary.unlike:
        print(f"{summary.unlike} labelled images have another size in their labels, and are left out of this")
    if summary.mask_iou is not None:
        print(f"masks of objects found at IoU 0.7: mean IoU {summary.mask_iou:.3f}")
    print(f"proposals: {summary.output}")
