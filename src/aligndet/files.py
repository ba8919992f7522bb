"""Files that appear whole or not at all, and folders with one owner."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ParamSpec, TypeVar
from zlib import crc32

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def accepts_strings(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Lets a function that wants a Path be called with a string as well, and refuses addresses.

    Args:
        function: Parameters annotated ``Path`` or ``Path | None`` are converted.
    """
    parameters = signature(function)
    paths = {name for name, p in parameters.parameters.items() if p.annotation in ("Path", "Path | None")}

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        bound = parameters.bind(*args, **kwargs)
        named = {k: v for k, v in bound.arguments.items() if k in paths}
        given = {k: at_home(Path(v)) for k, v in named.items() if isinstance(v, str | Path)}
        bound.arguments.update(given)
        for name, path in given.items():
            if was_address(path):
                raise ValueError(
                    f"{name} {path}: is an address, where a local file or folder is wanted; images at"
                    " addresses are for propose, cluster, pretrain and pretrain-backbone"
                )
        return function(*bound.args, **bound.kwargs)

    return call


def at_home(path: Path) -> Path:
    """The same path, with the home folder in the place of ~, which shells leave as it is after --output=."""
    return path.expanduser() if path.parts[:1] == ("~",) else path


def was_address(path: Path) -> bool:
    """Whether a path was made of an address, which costs it a slash (s3:/bucket).

    Args:
        path: One that exists is what it is.
    """
    return re.match("[a-z0-9+]{2,}:/", str(path)) is not None and not path.exists()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: UTF-8, whatever the locale, with or without a mark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: Naming the file, if it is no JSON object.
    """
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError, IsADirectoryError) as error:  # ValueError: no JSON, text or number
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return document


def read_part(path: Path, name: str) -> dict[str, Any]:
    """Reads one part of a JSON object, such as the settings in ``run.json``.

    Args:
        path: Of the file.
        name: Of the part; empty if there is none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: Naming the file, if the part is no object.
    """
    part = read_json(path).get(name, {})
    if not isinstance(part, dict):
        raise ValueError(f"{path}: {name!r} is no JSON object")
    return part


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Lets a library write a file under another name, flushes it to disk, and only then renames it.

    Args:
        path: Of the file; its folder is made if need be.

    Yields:
        The path to write to, in the same folder and with the same suffix.

    Raises:
        OSError: If the disk is full or the folder not writable; the former file, if any, is intact then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # at random: processes on two machines or in two containers can have the same number
    stem = os.fsencode(path.stem)[:100].decode(errors="ignore")  # a name may have no more than 255 bytes
    partial = path.with_name(f".{stem}.{secrets.token_hex(8)}.partial{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        with suppress(OSError):  # the name as well; some file systems cannot
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to write that appears whole or not at all; see `whole_path`.

    Args:
        path: Of the file; its folder is made if need be.

    Yields:
        The file to write to.

    Raises:
        OSError: Naming the file, if the disk is full or the folder not writable; the former file, if any, is
            intact then.
    """
    try:
        with whole_path(path) as partial, partial.open("wb") as file:
            yield file
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def atomic_write(path: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all.

    Args:
        path: Of the file; its folder is made if need be.
        content: Text is written as UTF-8.

    Raises:
        OSError: As of `whole_file`.
    """
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Owns a folder until the end of the block, or of the process, however it ends.

    Args:
        folder: Made if need be; the lock is its file ``.lock``.
        wait: Until the other owner is done; that it waits is printed.

    Raises:
        ValueError: If another process owns it, unless told to wait.
        OSError: Naming the folder, if its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not wait:
                    raise ValueError(
                        f"{folder}: is in use by another process; wait for it or give another output"
                    ) from error
                print(f"waits for another process in {folder}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            message = f"the file system has no locks for the folder ({error.strerror})"
            raise OSError(error.errno, message, str(folder)) from error
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def safe_name(name: str, source: object) -> str:
    """Refuses a file name that leads out of the folder of images.

    Args:
        name: Relative path with slashes.
        source: What it stands in, for the message.

    Raises:
        ValueError: If the name is absolute or goes up.
    """
    parts = PurePosixPath(str(name).replace("\\", "/"))
    if not str(name) or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(
            f"{source}: refuses the file name {name!r}, which leads out of the folder of images; names have"
            " to be relative to it"
        )
    return str(name)


def plain_name(name: str, folder: Path) -> str:
    """The name of an image as `safe_name` takes it, out of what tools write.

    Args:
        name: With slashes, or with backslashes where no file is called so; relative to the folder, or
            absolute.
        folder: Of the images.

    Returns:
        The name relative to the folder, or as it was if it is not in it.
    """
    if "\\" in name and not (folder / name).is_file():
        name = name.replace("\\", "/")
    if not name.startswith("/"):
        return name
    path = PurePosixPath(name)
    for spelt in (folder.absolute(), os.path.normpath(folder.absolute()), os.path.realpath(folder)):
        if path.is_relative_to(spelt):
            return path.relative_to(spelt).as_posix()
    return name


def holds(folder: Path, name: str) -> bool:
    """Whether a folder has the image of a name."""
    name = plain_name(name, folder)
    return not name.startswith("/") and (folder / name).is_file()


def read_lines(path: Path) -> list[str]:
    """The lines of a list that are not empty, without the space around them.

    Args:
        path: UTF-8, with or without a mark.

    Raises:
        ValueError: Naming the file, if it is no such text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text in UTF-8 ({error}); save it as such") from error
    return [line.strip() for line in lines if line.strip()]


def contents(folder: Path) -> list[str]:
    """What is in a folder, sorted; hidden files, such as locks, do not count.

    Args:
        folder: That exists.
    """
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def check_writable(folder: Path) -> None:
    """Makes sure, before the work, that its result can be written.

    Raises:
        PermissionError: Naming the folder.
    """
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "this folder cannot be written to", str(folder))


def check_file(path: Path, kind: str = "a file") -> None:
    """Makes sure, before the work, that a file can be written.

    Raises:
        ValueError: If it is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the name of {kind}")


def fingerprint(path: Path) -> str:
    """Of a file's content (CRC-32): tells files apart that were not made to deceive."""
    value = 0
    with path.open("rb") as file:
        while part := file.read(2**22):
            value = crc32(part, value)
    return f"{value:08x}"


def check_zip(path: Path) -> None:
    """Compares the parts of a zip, as torch.save writes them, with their checksums, which torch does not.

    Raises:
        ValueError: If a part has changed since.
        zipfile.BadZipFile: If it is no zip.
    """
    with zipfile.ZipFile(path) as file:
        broken = file.testzip()
    if broken is not None:
        raise ValueError(f"{broken} is not what was written, or was written without checksums")


def print_skipped(messages: Collection[str]) -> None:
    """Prints the files that a command has left out: the first ten, and how many more there are."""
    for message in islice(messages, 10):
        print(f"skipped: {message}")
    if len(messages) > 10:
        print(f"skipped: {len(messages) - 10} more")
