"""Tars as folders of images: where each image lies in them, so that any one can be read alone."""

from __future__ import annotations

import os
import tarfile
from bisect import bisect_left
from functools import lru_cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pyarrow as pa

from aligndet.data.addresses import open_file, path_at, patiently
from aligndet.data.listing import SUFFIXES, is_listed
from aligndet.files import safe_name, whole_file

_SCHEMA = pa.schema([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])

_VERSIONS = ("ETag", "md5Hash", "generation", "mtime", "LastModified", "Last-Modified", "updated")

Members = dict[str, tuple[int, int]]
"""First byte and number of bytes of the images in a tar, by name."""


class TarIndex:
    """The images of one tar, sorted by name; a memory-mapped file, which all processes share."""

    def __init__(self, path: Path) -> None:
        """Opens an index.

        Args:
            path: Written by `write_index`.

        Raises:
            FileNotFoundError: If there is none.
            pyarrow.ArrowException: If the file is broken.
        """
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        batch.validate(full=True)
        if not batch.schema.equals(_SCHEMA):
            raise pa.ArrowInvalid(f"{path}: has other columns")
        self._names, self._offsets, self._sizes = batch.columns
        noted = batch.schema.metadata or {}
        self.fingerprint = noted.get(b"fingerprint", b"").decode()
        self.problem = noted.get(b"problem", b"").decode()
        """Read error that cut the scan short; empty if the tar is whole."""

    def names(self) -> list[str]:
        """The images in the tar, sorted."""
        return self._names.to_pylist()

    def find(self, name: str) -> tuple[int, int] | None:
        """Where an image lies: first byte and number of bytes; None if it is not in the tar."""
        at = bisect_left(range(len(self._names)), name, key=lambda i: self._names[i].as_py())
        if at == len(self._names) or self._names[at].as_py() != name:
            return None
        return self._offsets[at].as_py(), self._sizes[at].as_py()


def scan_tar(file: BinaryIO, tar: str) -> tuple[Members, str]:
    """Goes once over the headers of a tar.

    Args:
        file: The tar, opened; not compressed.
        tar: Its name, for messages.

    Returns:
        The images, of two of the same name the later one; and if the tar is broken, what is wrong with it.
    """
    found: Members = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # or it keeps them all
                name = member.name.removeprefix("./")
                if member.isreg() and not member.issparse():
                    safe_name(name, tar).encode()
                    if is_listed(PurePosixPath(name)):
                        found[name] = member.offset_data, member.size
                elif member.islnk() and (same := found.get(member.linkname.removeprefix("./"))):
                    found[safe_name(name, tar)] = same  # of two hard links, GNU tar stores the second so
            # tarfile takes a broken header for the end
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except (tarfile.TarError, ValueError) as error:
        return found, f"{tar}: broken, truncated or compressed tar ({error})"
    return found, ""


def write_index(path: Path, members: Members, fingerprint: str, problem: str = "") -> None:
    """Writes where the images of a tar lie.

    Args:
        path: Of the index.
        members: The images.
        fingerprint: What tells this tar from a later one of the same name.
        problem: What is wrong with the tar.
    """
    names = sorted(members)
    columns = [names, [members[name][0] for name in names], [members[name][1] for name in names]]
    schema = _SCHEMA.with_metadata({"fingerprint": fingerprint, "problem": problem})
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    with whole_file(path) as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))


@lru_cache(4096)
def tar_index(root: str, tar: str) -> TarIndex:
    """The index of a tar, opened once in each process; made if there is none.

    Args:
        root: Folder of the tar, local or an address.
        tar: Its name.

    Raises:
        ImageError: If there is no such tar, or it cannot be read.
    """
    try:
        return TarIndex(_index_path(root, tar))
    except (OSError, pa.ArrowException):  # none, or broken
        update_index(root, tar)
        return TarIndex(_index_path(root, tar))


def update_index(root: str, tar: str) -> None:
    """Makes the index of a tar if there is none, or none of the tar as it is now.

    Args:
        root: Folder of the tar, local or an address.
        tar: Its name.

    Raises:
        ImageError: If there is no such tar, or it cannot be read.
        OSError: If the index cannot be written.
    """
    files, path = path_at(root, tar)
    index, address = _index_path(root, tar), f"{root}/{tar}"
    known = patiently(address, lambda: files.info(path))
    # what every way of asking tells, and every copy has: S3 tells more of one file than of a folder's
    told = next((key for key in _VERSIONS if known.get(key) is not None), None)
    version = (known.get("size"), known[told]) if told else sorted(known.items())
    fingerprint = f"{version}, {' '.join(sorted(SUFFIXES))}"
    try:
        if TarIndex(index).fingerprint == fingerprint:
            return
    except (OSError, pa.ArrowException):  # none, or broken
        pass

    def scan() -> tuple[Members, str]:
        with open_file(root, tar) as file:
            return scan_tar(file, address)

    members, problem = patiently(address, scan)
    write_index(index, members, fingerprint, problem)


def _index_path(root: str, tar: str) -> Path:
    files, path = path_at(root, tar)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = sha256(files.unstrip_protocol(path).encode()).hexdigest()[:32]
    return cache / "aligndet" / "tars" / name[:2] / f"{name}.arrow"
