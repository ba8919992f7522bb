"""Videos, frame by frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import supervision as sv
import torch
from torch import Tensor

from aligndet.data.images import ImageError
from aligndet.files import whole_path

SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"})
_RATE = 25.0  # frames a second, where a file does not say

Writer = Callable[[npt.NDArray[np.uint8]], None]


def is_video(path: Path) -> bool:
    """Tells a video by its name."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def rate_and_length(path: Path) -> tuple[float, int]:
    """Frames a second, and how many there are, if the file knows it.

    Returns:
        A number above 0, and a number that is 0 where it is not known.

    Raises:
        ImageError: If it cannot be opened.
    """
    try:
        info = sv.VideoInfo.from_video_path(str(path))
    except Exception as error:  # supervision's own has no type
        raise ImageError(f"{path}: cannot be opened as a video") from error
    rate = info.fps if math.isfinite(info.fps) and 0 < info.fps <= 1000 else _RATE
    return rate, max(0, info.total_frames or 0)


def read_frames(path: Path) -> Iterator[Tensor]:
    """Decodes a video.

    Yields:
        (3, H, W) uint8 RGB.

    Raises:
        ImageError: If it cannot be opened, or holds no frame that can be read.
    """
    rate_and_length(path)  # says if the video cannot be opened
    count = 0
    for frame in sv.get_video_frames_generator(str(path)):
        count += 1
        yield torch.from_numpy(np.ascontiguousarray(frame[:, :, ::-1].transpose(2, 0, 1)))
    if not count:
        raise ImageError(f"{path}: no frame of this video can be read")


@contextmanager
def video_writer(path: Path, rate: float) -> Iterator[Writer]:
    """Writes an MP4 file that appears whole or not at all.

    Args:
        path: Of the file; its folder is made if need be.
        rate: Frames a second.

    Yields:
        A function that takes the next frame, (H, W, 3) RGB, all of the size of the first.

    Raises:
        OSError: If frames are missing in the file at the end, as on a full disk, of which OpenCV says
            nothing.
    """
    count = 0
    with ExitStack() as opened:
        sinks: list[sv.VideoSink] = []

        def write(frame: npt.NDArray[np.uint8]) -> None:
            nonlocal count
            if not sinks:
                partial = opened.enter_context(whole_path(path))
                opened.enter_context(check(partial))
                info = sv.VideoInfo(frame.shape[1], frame.shape[0], rate)
                sinks.append(opened.enter_context(sv.VideoSink(str(partial), info)))
            sinks[0].write_frame(frame[:, :, ::-1])
            count += 1

        @contextmanager
        def check(partial: Path) -> Iterator[None]:
            yield
            with suppress(ImageError):
                if rate_and_length(partial)[1] == count:
                    return
            raise OSError(f"{path}: not all {count} frames could be written; is the disk full?")

        yield write
