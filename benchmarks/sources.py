"""What it costs to read images out of tars in place of files: microseconds of one core an image.

    python benchmarks/sources.py

Both are read in the same random order, in turns, from a warm page cache.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from aligndet.data.images import StoredImage, read_image
from aligndet.data.sources import ImageSource


def write(folder: Path, count: int, side: int) -> tuple[ImageSource, ImageSource]:
    """The same photograph-like JPEG many times, as files and in four tars."""
    noise = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((side, side)).save(buffer, "JPEG", quality=90)
    content = buffer.getvalue()
    print(f"{count} images of {side} pixels and {len(content) / 1e3:.0f} kB")
    for tar in range(4):
        (folder / "files" / f"{tar}").mkdir(parents=True)
        (folder / "tars").mkdir(exist_ok=True)
        with tarfile.open(folder / "tars" / f"{tar}.tar", "w") as archive:
            for number in range(count // 4):
                path = folder / "files" / f"{tar}" / f"{number:06d}.jpg"
                path.write_bytes(content)
                archive.add(path, path.name)
    return ImageSource(folder / "files"), ImageSource(folder / "tars")


def fetch(image: Path | StoredImage) -> object:
    return image.read_bytes() if isinstance(image, Path) else image.content


def cost(source: ImageSource, names: list[str], read: Callable[[Path | StoredImage], object]) -> float:
    started = time.process_time()
    for name in names:
        read(source / name)
    return (time.process_time() - started) / len(names) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        sources = write(Path(folder), args.images, args.side)
        sources[1].names()
        rmtree(f"{folder}/cache")  # once more: the first look at a tar loads libraries
        listed = []
        for kind, source in zip(
            ("files", "tars, first time", "tars, again"), (*sources, sources[1]), strict=True
        ):
            started = time.process_time()
            listed.append(source.names())
            print(f"listing of {kind}: {(time.process_time() - started) / args.images * 1e6:.0f} µs an image")
        order = random.Random(0).sample(range(args.images), args.images)
        names = [[found[i] for i in order] for found in listed[:2]]
        for what, read, count in (("reading", fetch, args.images), ("reading and decoding", read_image, 200)):
            rounds = [
                [cost(source, n[:count], read) for source, n in zip(sources, names, strict=True)]
                for _ in range(args.rounds)
            ]
            files, tars = (median(column) for column in zip(*rounds, strict=True))
            ratio = median(b / a for a, b in rounds)
            print(f"{what}: files {files:.0f} µs, tars {tars:.0f} µs an image, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
