"""Proposals: what they find against what they cost, and `aligndet propose` against OpenCV's own call.

    python benchmarks/proposals.py                  # on the sample data
    python benchmarks/proposals.py --data FOLDER    # with val.json and val/

A line for each mode and resolution (the longest side at which selective search runs). "OpenCV" is its call
alone, on an image in memory that has been scaled already; "all" is what a process of `aligndet propose` does:
decode, scale, search, rank, filter. Seconds are the processor's, on one core, medians over the images, so
that other work on the machine counts little. AR is the average recall over IoU 0.5 to 0.95 of the first 50
and 200 boxes; "own" of the first 50 in selective search's own order (`--rank search`). "x" is the throughput
of "all" against that of OpenCV's call at the images' own size in the same mode.
`--processes 1 2` runs the command with that many and prints images a second by the clock. `--storage` prints
what proposals take, in bytes an image, without and with masks: as Parquet, and in memory (`read_proposals`;
each process of training holds them).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import cv2
import numpy as np
import numpy.typing as npt
import torch

from aligndet.commands.propose import propose
from aligndet.commands.sample_data import sample_data
from aligndet.data.coco import CocoDataset
from aligndet.data.formats import read_labelled
from aligndet.data.images import read_image
from aligndet.data.sources import ImageSource
from aligndet.proposals.filters import best_proposals
from aligndet.proposals.pipeline import propose_image
from aligndet.proposals.selective_search import Mode, selective_search, shrink
from aligndet.proposals.storage import read_proposals

FILTERS = {"max_aspect_ratio": 3.0, "min_area": 0.008, "max_area": 0.81, "nms_iou": 0.5, "max_proposals": 200}


class Figures(NamedTuple):
    """Of one image."""

    opencv: float  # seconds
    all: float
    chance50: npt.NDArray[np.float32]  # as found50, in selective search's own order
    found50: npt.NDArray[np.float32]  # IoU of each object with the best of the first 50 boxes
    found200: npt.NDArray[np.float32]


def measure(coco: CocoDataset, index: int, mode: Mode, resolution: int | None) -> Figures:
    image = read_image(coco.folder / coco.file_names[index]).permute(1, 2, 0).numpy()
    image = shrink(image, resolution)
    begun = time.process_time()
    selective_search(image, mode=mode)
    between = time.process_time()
    given: dict[str, Any] = {"mode": mode, "resolution": resolution, "filters": FILTERS, "outlines": None}
    find = partial(propose_image, ImageSource(coco.folder), coco.file_names[index], **given)
    boxes = find(rank="straddling").boxes
    ended = time.process_time()
    objects = coco.boxes[index][~coco.iscrowd[index]]
    chance = best_proposals(find(rank="search").boxes[:50], objects)[0]
    found = [best_proposals(boxes[:count], objects)[0] for count in (50, 200)]
    return Figures(between - begun, ended - between, chance, *found)


def average_recall(found: list[npt.NDArray[np.float32]]) -> float:
    overlaps = np.concatenate(found)
    return float(np.mean([(overlaps >= threshold).mean() for threshold in np.arange(0.5, 1.0, 0.05)]))


def compare(coco: CocoDataset, modes: list[Mode], resolutions: list[int], count: int) -> None:
    chosen = range(0, len(coco), max(1, len(coco) // count))[:count]
    longest = int(np.median(coco.sizes[list(chosen)].max(axis=1)))
    print(f"{len(chosen)} images, longest side {longest}")
    head = ("mode", "resolution", "OpenCV ms", "all ms", "all/OpenCV", "own AR@50", "AR@50", "AR@200", "x")
    print("".join(f"{name:>11}" for name in head))
    for mode in modes:
        reference = 0.0
        for resolution in [None, *(r for r in resolutions if r < longest)]:
            found = [measure(coco, index, mode, resolution) for index in chosen]
            opencv, everything = (statistics.median(times) for times in list(zip(*found, strict=True))[:2])
            reference = reference or opencv
            cells = [
                *(mode, str(resolution or "own"), f"{1000 * opencv:.0f}", f"{1000 * everything:.0f}"),
                f"{everything / opencv:.3f}",
                *(
                    f"{average_recall([getattr(f, name) for f in found]):.3f}"
                    for name in ("chance50", "found50", "found200")
                ),
                f"{reference / everything:.1f}",
            ]
            print("".join(f"{cell:>11}" for cell in cells), flush=True)


def speed(images: Path, processes: int) -> float:
    with tempfile.TemporaryDirectory() as temporary:
        begun = time.perf_counter()
        count = propose(images, output=Path(temporary) / "proposals", workers=processes).images
        return count / (time.perf_counter() - begun)


def storage(images: Path, masks: bool) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "proposals"
        count = propose(images, output=output, masks=masks).images
        on_disk = sum(path.stat().st_size for path in output.glob("part-*.parquet"))
        read_proposals(output, masks=masks)  # imports what it needs
        tracemalloc.start()
        table = read_proposals(output, masks=masks)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    return (
        f"{len(table.boxes) / count:.0f} boxes{' with masks' if masks else ''}, bytes an image:"
        f" on disk {on_disk / count:.0f}, in memory {held / count:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with val.json and val/; by default sample data")
    parser.add_argument("--modes", nargs="+", choices=get_args(Mode), default=["fast"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[100, 128, 160, 200, 256, 320, 400])
    parser.add_argument("--count", type=int, default=30, help="images")
    parser.add_argument("--size", type=int, default=400, help="longer side of the sample data")
    parser.add_argument("--processes", nargs="*", type=int, default=[])
    parser.add_argument("--storage", action="store_true", help="what proposals take on disk and in memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or sample_data(
            Path(temporary) / "data", train_images=1, val_images=args.count, size=args.size
        )
        coco = read_labelled(data / "val.json")
        compare(coco, args.modes, args.resolutions, args.count)
        for processes in args.processes:
            print(f"{processes} processes: {speed(coco.folder, processes):.2f} images a second")
        for masks in (False, True) if args.storage else ():
            print(storage(coco.folder, masks))


if __name__ == "__main__":
    main()
