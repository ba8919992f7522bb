"""Data: the two-view pipeline against the least that it could do.

    python benchmarks/data.py                  # on the sample data
    python benchmarks/data.py --images FOLDER

"floor" decodes an image once and resizes it twice, and does nothing else; "ours" is an item of
`TwoViewDataset`: both views with their proposals. Seconds are the processor's, on one core, so that other
work on the machine counts little; passes over the images alternate, medians of all passes.
`--wait` also pre-trains for some steps as `aligndet quickstart` does and prints the share of the time for
which the trainer waited for data.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from aligndet.commands.pretrain import pretrain
from aligndet.commands.propose import propose
from aligndet.commands.sample_data import sample_data
from aligndet.data.images import read_image_size
from aligndet.data.listing import list_images
from aligndet.data.views import TwoViewDataset
from aligndet.proposals.table import ImageProposals, ProposalTable
from aligndet.reporting.runs import read_curves

VIEWS = {"default": ((640, 800), 1333), "quickstart": ((128, 192), 256)}


def table_of(folder: Path, names: list[str], boxes: int = 50) -> ProposalTable:
    """Random proposals: what they hold makes no difference here."""
    rng = np.random.default_rng(0)
    rows = []
    for name in names:
        size = read_image_size(folder / name)
        corner = rng.uniform(0, 0.6, (boxes, 2))
        relative = np.concatenate([corner, corner + rng.uniform(0.1, 0.4, (boxes, 2))], axis=1)
        rows.append(ImageProposals(name, *size, (relative * np.tile(size, 2)).astype(np.float32)))
    return ProposalTable.of(rows)


def floor(path: Path, ours: TwoViewDataset, rng: np.random.Generator) -> None:
    with Image.open(path) as file:
        part = min(1.0, ours.max_size / max(file.size), ours.short_sides[-1] / min(file.size))
        file.draft("RGB", (round(file.width * part), round(file.height * part)))
        image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    height, width = image.shape[1:]
    for _ in range(2):
        scale = min(rng.choice(ours.short_sides) / min(height, width), ours.max_size / max(height, width))
        F.resize(image, [int(height * scale), int(width * scale)], antialias=True)


def measure(folder: Path, names: list[str], views: str, repeats: int) -> None:
    min_size, max_size = VIEWS[views]
    ours = TwoViewDataset(folder, table_of(folder, names), min_size=min_size, max_size=max_size)
    taken: dict[str, list[float]] = {"floor": [], "ours": []}
    for repeat in range(repeats + 1):
        rng = np.random.default_rng(repeat)
        begun = time.process_time()
        for name in names:
            floor(folder / name, ours, rng)
        between = time.process_time()
        for index in range(len(names)):
            ours[index, repeat * len(names) + index]
        if repeat:  # the first one warms the file cache
            taken["floor"].append(between - begun)
            taken["ours"].append(time.process_time() - between)
    median = {name: statistics.median(values) for name, values in taken.items()}
    size = "x".join(str(int(side)) for side in np.median(ours.table.sizes, axis=0))
    speeds = "".join(f"{len(names) / seconds:>10.1f}" for seconds in median.values())
    print(f"{size:>11}{views:>12}{speeds}{median['ours'] / median['floor']:>12.2f}", flush=True)


def data_wait(steps: int) -> float:
    """Share of the time waited for data, as logged by a short run with quickstart's settings."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = sample_data(folder / "data", train_images=32, val_images=1) / "train"
        propose(images, output=folder / "proposals")
        pretrain(
            images,
            proposals=folder / "proposals",
            output=folder / "run",
            trunk="tf_efficientnet_lite0",
            trunk_weights="bundled",
            fpn_channels=128,
            min_size=VIEWS["quickstart"][0],
            max_size=VIEWS["quickstart"][1],
            max_proposals=20,
            batch_size=8,
            steps=steps,
            workers=1,
            log_every=max(1, steps // 4),
        )
        waits = list(read_curves(folder / "run" / "logs")["speed/data_wait"].values())
    return statistics.median(waits[1:])  # the first part has the start of the loader's process in it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, help="folder of images; by default sample data of 256 and 640 pixels"
    )
    parser.add_argument("--count", type=int, default=30, help="images of a pass")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--wait", type=int, metavar="STEPS", help="measure the wait for data, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f"{'image':>11}{'views':>12}{'floor /s':>10}{'ours /s':>10}{'ours/floor':>12}")
    with tempfile.TemporaryDirectory() as temporary:
        folders = [args.images] if args.images else []
        for size in () if args.images else (256, 640):
            made = sample_data(Path(temporary) / str(size), train_images=args.count, val_images=1, size=size)
            folders.append(made / "train")
        for folder in folders:
            names = list_images(folder)
            names = names[:: max(1, len(names) // args.count)][: args.count]
            for views in VIEWS:
                measure(folder, names, views, args.repeats)
    if args.wait:
        print(f"waiting for data: {100 * data_wait(args.wait):.1f} % of the time")


if __name__ == "__main__":
    main()
