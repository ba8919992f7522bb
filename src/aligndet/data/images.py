"""Reading image files as they come: any mode, any depth, any orientation, and broken ones with a clear
word.
"""

from __future__ import annotations

import io
import math
import random
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePath
from typing import IO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from aligndet.data.listing import AVIF, OTHERS, list_images

# Pillow knows many more, and would start Ghostscript for PostScript that calls itself a JPEG
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF", *(["AVIF"] if AVIF else []))
_NOT_READ = "this format is not read; save it as JPEG or PNG"
_NO_EXIF = SyntaxError, struct.error, ValueError  # of metadata that are damaged, where pixels may be sound
MIN_SIDE = 8
MAX_PIXELS = 300_000_000  # an RGB image of that many takes 0.9 GB, one of 16 bits a pixel 2.4 GB

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses from twice this on


Item = TypeVar("Item")
Place = TypeVar("Place")


class ImageError(ValueError):
    """An image that cannot be used; the message names the file and the reason."""


class Unreachable(ImageError):
    """An image whose place does not answer, which is no fault of the image."""


class StoredImage:
    """An image that is no local file of its own; see `aligndet.data.sources`."""

    def __init__(self, address: str, fetch: Callable[[], bytes]) -> None:
        """Names an image; nothing is read yet.

        Args:
            address: For messages.
            fetch: Reads it; raises ImageError.
        """
        self.address, self._fetch = address, fetch

    def __str__(self) -> str:
        return self.address

    @cached_property
    def content(self) -> bytes:
        """The encoded image, read when it is first asked for."""
        return self._fetch()


def first_images(folder: Path, count: int) -> list[tuple[str, Tensor]]:
    """The first images of a folder that can be read.

    Args:
        folder: As of `list_images`.
        count: How many at most.

    Returns:
        Names, and images as of `read_image`.

    Raises:
        ValueError: As of `list_images`.
        ImageError: If none can be read: of the first.
    """
    broken: list[str] = []
    images = readable(
        lambda name: (name, read_image(folder / name)), list_images(folder), strict=False, broken=broken
    )
    found = list(islice(images, count))
    if not found:
        raise ImageError(broken[0])
    return found


def readable(
    read: Callable[[Place], Item], places: Iterable[Place], *, strict: bool, broken: list[str]
) -> Iterator[Item]:
    """Reads images one after the other, and passes over those that cannot be read.

    Args:
        read: From a place to the image; raises ImageError.
        places: Names or positions.
        strict: A broken image is an error.
        broken: Gets the messages about those passed over.

    Yields:
        What was read.

    Raises:
        ImageError: With strict, at the first that cannot be read.
    """
    for place in places:
        try:
            yield read(place)
        except ImageError as error:
            if strict:
                raise
            broken.append(str(error))


def check_shape(image: Tensor, size: Iterable[int], path: object) -> None:
    """Makes sure that boxes of an image of one size can be scaled to another.

    Args:
        image: (3, H, W), as it was decoded.
        size: Width and height that the boxes refer to.
        path: Of the image, for the message.

    Raises:
        ImageError: If width and height differ by more than rounding and one factor.
    """
    (height, width), (other_width, other_height) = image.shape[1:], (int(side) for side in size)
    if abs(width * other_height - height * other_width) > other_width + other_height:
        raise ImageError(
            f"{path}: has {width}x{height} pixels, its proposals are of {other_width}x{other_height}: turned"
            " or replaced since, or listed with another size; make them again"
        )


_UNREACHABLE = 3  # images one after the other, until the place is given up


def first_readable(
    read: Callable[[int], Item], index: int, length: int, *, strict: bool
) -> tuple[Item, int, tuple[str, ...]]:
    """Reads an image, or in the place of a broken one another that can be read.

    Which one depends on the position alone. Substitutes are spread pseudo-randomly; taking the next readable
    image would repeat one image for a whole missing folder.

    Args:
        read: From a position to the image; raises ImageError.
        index: Where to begin.
        length: Number of images.
        strict: A broken image is an error.

    Returns:
        What was read, its position, and the messages about the broken ones before it.

    Raises:
        ImageError: If none can be read, or the first with strict, or if their place does not answer.
    """
    skipped: list[str] = []
    unreachable = 0
    draw = random.Random(index)
    stride = next(s for s in iter(lambda: draw.randrange(1, length + 1), None) if math.gcd(s, length) == 1)
    for position in ((index + turn * stride) % length for turn in range(length)):
        try:
            return read(position), position, tuple(skipped)
        except ImageError as error:
            unreachable = unreachable + 1 if isinstance(error, Unreachable) else 0
            if strict or unreachable == _UNREACHABLE:  # an outage: others would be tried for ever
                raise
            skipped.append(str(error))
    raise ImageError(f"none of the {length} images can be read; the first: {skipped[0]}")


def read_image(path: Path | StoredImage, *, long_side: int | None = None) -> Tensor:
    """Decodes an image to RGB, upright.

    EXIF orientation is applied, transparency is laid on black, grey of 16 bits is scaled from as many bits as
    it uses (8, 12, 14 or 16), float from its own range (what is not finite is black), of an animation the
    first frame is taken.

    Args:
        path: Of the file, or an image from elsewhere.
        long_side: How long the longer side has to be at least if the image is larger: a JPEG is then decoded
            at a half, a quarter or an eighth of its size, which is several times faster.

    Returns:
        (3, H, W) uint8; the channels of a pixel are neighbours in memory, which torchvision resizes fastest.

    Raises:
        ImageError: If the file is missing, empty, truncated, no image, too small or too large.
    """
    with _opened(path) as file:
        if long_side is not None and max(file.size) >= 2 * long_side:
            part = long_side / max(file.size)
            file.draft(None, (math.ceil(file.width * part), math.ceil(file.height * part)))
        file.load()
        with suppress(*_NO_EXIF):
            ImageOps.exif_transpose(file, in_place=True)
        array = _to_rgb(file)
    return torch.from_numpy(array).permute(2, 0, 1)


def read_image_size(path: Path | StoredImage) -> tuple[int, int]:
    """Reads width and height of the upright image from the file's header.

    Args:
        path: Of the file, or an image from elsewhere.

    Raises:
        ImageError: As for `read_image`, as far as the header tells.
    """
    with _opened(path) as image:
        turned = _orientation(image) in (5, 6, 7, 8)
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # newer Pillows have turned image.size
            size = image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
        else:
            size = image.size
    return size[::-1] if turned else size


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF's word on how to turn an image.

    Of a PNG, Pillow decodes all pixels to look for metadata behind them; to look whether there is any takes a
    hundredth of that.
    """
    assert image.fp is not None  # until its pixels are read
    decode = image.format != "PNG" or _has_metadata_behind(image.fp)
    with suppress(*_NO_EXIF):
        exif = image.getexif() if decode else Image.Image.getexif(image)
        return int(exif.get(ExifTags.Base.Orientation, 1))
    return 1


def _has_metadata_behind(png: IO[bytes]) -> bool:
    """Whether any chunk follows the pixels of a PNG; true, too, if it is cut off."""
    position, pixels = png.tell(), False
    png.seek(8)
    try:
        while len(head := png.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IEND":
                return False
            if pixels and kind != b"IDAT":
                return True
            pixels = pixels or kind == b"IDAT"
            png.seek(length + 4, io.SEEK_CUR)
        return True
    finally:
        png.seek(position)


@contextmanager
def _opened(path: Path | StoredImage) -> Iterator[ImageFile.ImageFile]:
    """Opens an image; whatever is wrong with it, here or within the block, becomes an ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata
            source = path if isinstance(path, Path) else io.BytesIO(path.content)
            with Image.open(source, formats=_FORMATS) as file:
                if file.format == "TIFF" and _is_other(path):  # raw photos begin with a small preview
                    raise ImageError(f"{path}: {_NOT_READ}")
                _check_size(path, file.size)
                yield file
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image") from error
    except PermissionError as error:
        raise ImageError(f"{path}: may not be read (no permission)") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        raise ImageError(f"{path}: {_reason(path, error)}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.array(image, dtype=np.float32)  # changed in place: such images can be large
        np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)  # measured images have gaps
        largest = float(values.max(initial=0.0))
        # cameras and scanners use 8, 12, 14 or all of the 16 bits
        top = next((t for t in (255.0, 4095.0, 16383.0) if largest <= t), 65535.0)
        if image.mode == "F":
            top = largest or 1.0
        values *= 255.0 / top
        grey = np.rint(np.clip(values, 0, 255, out=values), out=values).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _check_size(path: Path | StoredImage, size: tuple[int, int]) -> None:
    if min(size) < MIN_SIDE:
        raise ImageError(f"{path}: {size[0]}x{size[1]} pixels is too small to hold an object")
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{path}: {size[0]}x{size[1]} pixels is too large; scale it down first")


def _is_other(path: Path | StoredImage) -> bool:
    return PurePath(str(path)).suffix.lower() in OTHERS


def _reason(path: Path | StoredImage, error: Exception) -> str:
    if isinstance(path, Path) and path.is_dir():
        return "is a folder, not an image"
    if path.is_file() and not path.stat().st_size if isinstance(path, Path) else not path.content:
        return "is empty"
    if _is_other(path):
        return _NOT_READ
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large; scale it down first ({error})"
    if isinstance(error, UnidentifiedImageError):
        return "is no image that Pillow knows"
    return f"broken or truncated image ({error})"
