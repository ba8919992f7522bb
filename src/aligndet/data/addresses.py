"""Files of a folder at any address that fsspec knows, read with patience."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from random import SystemRandom
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from fsspec.config import conf
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from aligndet.data.images import ImageError, Unreachable

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further attempt to read, give or take a half."""

_BLOCK = 2**20  # bytes a request of `open_file`
_SILENCE = 20.0  # seconds without an answer

Result = TypeVar("Result")


def is_web(root: str) -> bool:
    """Whether a folder is on a web server."""
    return re.match(r"(.*::)?https?://", root) is not None


def file_system(root: str) -> tuple[Any, str]:
    """The file system of a folder, which fsspec keeps for each process, and the folder's path in it.

    Raises:
        ImportError: If a package for such addresses is missing; the message names it.
        ValueError: If fsspec knows no such addresses.
    """
    if is_web(root):
        _limit_silence()
    try:
        files, path = url_to_fs(root)
    except (ImportError, ValueError) as error:
        protocol = root.partition("://")[0].rpartition("::")[2]
        package = known_implementations.get(protocol, {"class": "fsspec"})["class"].partition(".")[0]
        hint = f"; pip install {package}" if package != "fsspec" else ""
        raise type(error)(f"{root}: {error}{hint}") from error
    return files, path.rstrip("/")


@cache
def _limit_silence() -> None:
    """Gives up a web server that says nothing, where aiohttp would wait for five minutes.

    Limits that the user has set stay.
    """
    import aiohttp

    for protocol in ("http", "https"):
        settings = conf.setdefault(protocol, {}).setdefault("client_kwargs", {})
        seconds = settings.get("timeout", _SILENCE)
        if isinstance(seconds, int | float):  # a file of settings can have no more, aiohttp wants more
            settings["timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)


def path_at(root: str, name: str) -> tuple[Any, str]:
    """The file system of a folder, and the path of one of its files."""
    files, path = file_system(root)
    return files, f"{path}/{quote(name) if is_web(root) else name}"


def open_file(root: str, name: str) -> AbstractContextManager[BinaryIO]:
    """Opens a file to go through it from start to end."""
    if "://" in root:
        files, path = path_at(root, name)
        return files.open(path, "rb", block_size=_BLOCK, cache_type="readahead")
    return Path(root, name).open("rb")


def read_range(root: str, name: str, start: int, size: int) -> bytes:
    """Reads part of a file.

    Args:
        root: Local or an address.
        name: Relative to it.
        start: First byte.
        size: Number of bytes.
    """
    if "://" in root:
        files, path = path_at(root, name)
        return files.cat_file(path, start=start, end=start + size)
    with Path(root, name).open("rb", buffering=0) as file:  # takes a quarter of fsspec's time
        file.seek(start)
        return file.read(size)


def patiently(what: object, read: Callable[[], Result]) -> Result:
    """Reads, after an error once more, a few times.

    Args:
        what: Is read, for messages.
        read: To be called.

    Raises:
        ImageError: If there is no such file, or all attempts have failed.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ImageError(f"{what}: no such file") from error
        except Exception as error:  # every file system has errors of its own
            if getattr(error, "status", None) in (403, 410, 451):  # an answer: no to this one
                raise ImageError(f"{what}: is refused ({error})") from error
            if pause is None:
                reason = f"{type(error).__name__}: {error}"
                raise Unreachable(f"{what}: {len(PAUSES) + 1} attempts have failed ({reason})") from error
            # not all processes at once; and no draw from a generator that training uses
            time.sleep(pause * SystemRandom().uniform(0.5, 1.5))
    raise AssertionError
