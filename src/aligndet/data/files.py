"""Files that appear whole or not at all, and folders with one owner."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def atomic_write(path: Path, content: bytes | str) -> None:
    """Writes a file under another name, flushes it to disk, and only then renames it.

    Args:
        path: Of the file; its folder is made if need be.
        content: Text is written as UTF-8.

    Raises:
        OSError: If the disk is full or the folder not writable; the former file, if any, is intact then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Owns a folder until the end of the block, or of the process, however it ends.

    Args:
        folder: Made if need be; the lock is its file ``.lock``.
        wait: Until the other owner is done.

    Raises:
        ValueError: If another process owns it, unless told to wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: is in use by another process; wait for it or give another output"
            ) from error
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
