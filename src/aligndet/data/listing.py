"""Which files of a folder are images."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePath

AVIF = find_spec("PIL.AvifImagePlugin") is not None
READ = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
READ |= {".avif"} if AVIF else set()
OTHERS = {".avif", ".heic", ".heif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw"} - READ
SUFFIXES = READ | OTHERS  # what is not read is skipped, counted and named
# of PASCAL VOC: colours that stand for labels, no photographs
_LABELS = {"SegmentationClass", "SegmentationObject"}


def is_listed(path: PurePath, suffixes: Collection[str] = SUFFIXES) -> bool:
    """Whether a file counts as one of a folder's: by its suffix, and if neither it nor its folder is hidden
    or holds labels.

    Args:
        path: Relative to the folder.
        suffixes: In lower case, with the dot.
    """
    return path.suffix.lower() in suffixes and not any(_is_passed_over(part) for part in path.parts)


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name in _LABELS


def find_files(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[str]:
    """Finds files in a folder and its subfolders, linked ones too; hidden ones are left out.

    A folder that several links lead to is searched once.

    Args:
        folder: To search.
        suffixes: In lower case, with the dot.

    Returns:
        Paths relative to the folder, with slashes, sorted.

    Raises:
        ValueError: If the folder does not exist, or a name in it is no UTF-8.
        OSError: If a folder cannot be read, other than for want of permission.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    names = sorted(walk(folder, suffixes))
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{folder}: the file name {name!r} is no UTF-8; rename the file") from None
    return names


def walk(folder: Path, suffixes: Collection[str]) -> Iterator[str]:
    """Yields what `find_files` sorts, as it finds it.

    Args:
        folder: To search.
        suffixes: In lower case, with the dot.
    """
    seen: set[str] = set()
    places = [folder]
    for place in places:  # which grows: links come after all that is really there
        for root, folders, files in os.walk(place, onerror=_refuse):
            if (real := os.path.realpath(root)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not _is_passed_over(name))
            places += [path for name in folders if (path := Path(root, name)).is_symlink()]
            for path in (Path(root, name) for name in files):
                missing = path.is_symlink() and path.suffix.lower() in SUFFIXES  # an image that is named
                if is_listed(PurePath(path.name), suffixes) and (path.is_file() or missing):
                    yield path.relative_to(folder).as_posix()


def _refuse(error: OSError) -> None:
    """Lets no folder be missing but those that are somebody else's (lost+found)."""
    if not isinstance(error, PermissionError):
        raise error


def list_images(folder: Path) -> list[str]:
    """Finds the images of a folder and its subfolders; hidden files and folders are left out.

    Returns:
        Paths relative to the folder, with slashes, sorted.

    Raises:
        ValueError: If the folder does not exist or holds no image.
    """
    names = find_files(folder)
    if not names:
        raise ValueError(f"{folder}: holds no image ({', '.join(sorted(READ))})")
    return names


def without_ours(names: Sequence[str], folder: Path, place: Path) -> list[str]:
    """Leaves out what we have drawn ourselves, which is no photograph.

    Args:
        names: Of the images of a folder.
        folder: It.
        place: Where we draw, in that folder or elsewhere.

    Raises:
        ValueError: If no other image is left.
    """
    folder, place = folder.resolve(), place.resolve()
    if not place.is_relative_to(folder):
        return list(names)
    ours = f"{place.relative_to(folder).as_posix()}/"
    kept = [name for name in names if not name.startswith(ours)]
    if not kept:
        raise ValueError(f"{folder}: holds no image but those in {place}")
    return kept
