"""Where images come from: a local folder or any address that fsspec knows, with tars as folders in both."""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from aligndet.data.addresses import file_system, is_web, path_at, patiently, read_range
from aligndet.data.images import ImageError, StoredImage
from aligndet.data.listing import READ, SUFFIXES, find_files, is_listed
from aligndet.data.tars import tar_index, update_index
from aligndet.files import at_home, read_lines, safe_name, was_address

_AT_ONCE = 16  # tars
_ASKED = 20  # images asked for before an address is taken for a wrong one
_LISTED = SUFFIXES | {".tar"}
_IN_TAR = re.compile(r"(.+?\.tar)/(.+)", re.IGNORECASE)


class ImageSource:
    """A folder of images, local or at an address, in which every tar is a folder, too.

    ``source / name`` is an image for `read_image`: a path for a plain local file, otherwise a `StoredImage`,
    of which nothing is read before it is needed. No file and no connection is kept open, so that the
    processes of a loader can be handed a source.
    """

    def __init__(self, place: str | Path) -> None:
        """Takes a place as commands do; looks for nothing there yet.

        Args:
            place: A folder, a tar, or an address (``s3://bucket/images``, ``https://host/images``).

        Raises:
            ImportError: If a package for such addresses is missing; the message names it.
            ValueError: If fsspec knows no such addresses.
        """
        self.place, self.is_local = str(place), "://" not in str(place)
        if isinstance(place, Path) and was_address(place):
            raise ValueError(
                f"{place}: only a local folder is taken here (from Python, give an address as a string: Paths"
                " keep one slash only)"
            )
        if self.is_local:
            self.place = str(at_home(Path(self.place)))
        else:
            self.place = self.place.rstrip("/") if not self.place.endswith("://") else self.place
            file_system(self.place)
        self._root, self._tar = self.place, ""
        if _is_tar(self.place) and not (self.is_local and Path(place).is_dir()):
            folder, _, self._tar = self.place.rpartition("/")
            self._root = str(Path(self.place).parent) if self.is_local else folder

    def __str__(self) -> str:
        return self.place

    def __truediv__(self, name: str) -> Path | StoredImage:
        tar, member = self._parts(name)
        if tar:
            return StoredImage(f"{self}/{name}", partial(self._read_member, tar, member, name))
        if self.is_local:
            return Path(self._root) / name
        return StoredImage(f"{self}/{name}", partial(self._read, name))

    def absolute(self) -> ImageSource:
        """The same place for processes that work in another folder, or on another machine."""
        return ImageSource(Path(self.place).absolute() if self.is_local else self.place)

    def check_here(self) -> None:
        """Makes sure that this machine has the place; an address is everywhere.

        Raises:
            ValueError: Naming the place and the machine.
        """
        if self.is_local and not Path(self.place).exists():
            raise ValueError(f"{self}: no such folder of images on {platform.node()}")

    def names(self, listed: Path | None = None) -> list[str]:
        """The images, also of subfolders and tars; hidden ones are left out.

        Args:
            listed: Text file with a name a line, or Parquet with a column file_name, in the place of a look
                at the folder; a tar in it stands for its images.

        Returns:
            Names relative to the place, with slashes, sorted; those in a tar begin with its name.

        Raises:
            ValueError: If there is no image, the place cannot be listed, or a tar is broken.
        """
        if listed is None and self._tar:
            names = self._members([self._tar])[self._tar]
        else:
            found = self._find() if listed is None else _read_names(listed)
            tars = self._members([name for name in found if _is_tar(name)])
            inside = (f"{tar}/{name}" for tar, names in tars.items() for name in names)
            names = sorted({*found, *inside} - tars.keys())
        if not names:
            raise ValueError(f"{self}: holds no image ({', '.join(sorted(READ))}) and no tar with one")
        return names

    def labelled_folder(self, option: str) -> Path:
        """The folder for readers of labels, which know local files alone.

        Args:
            option: That gives the labels, for the message.

        Raises:
            ValueError: If the place is an address.
        """
        if not self.is_local:
            raise ValueError(f"{option}: wants the images in a local folder, not at {self}")
        return Path(self.place)

    def select(
        self, names: Sequence[str], *, only: Path | None = None, exclude: Path | None = None
    ) -> list[str]:
        """Some of the images, in their order.

        Args:
            names: Of all that there are.
            only: A list of those to take, as of `names`.
            exclude: Likewise, of those to leave out.

        Raises:
            ValueError: If a list is of other images, or no image is left.
        """
        kept = list(names)
        if only is not None:
            wanted = set(self.names(only))
            kept = [name for name in kept if name in wanted]
        if not kept:
            raise ValueError(
                f"{only or self}: names none of the {len(names)} images ({', '.join(names[:2])}, ...)"
            )
        if exclude is None:
            return kept
        unwanted = set(self.names(exclude))
        rest = [name for name in kept if name not in unwanted]
        if not rest or len(rest) == len(kept):
            which = "none" if rest else "all"
            raise ValueError(
                f"{exclude}: names {which} of the {len(kept)} images ({', '.join(kept[:2])}, ...)"
            )
        return rest

    def prepare(self, names: Sequence[str], origin: Path) -> None:
        """Looks tars up anew, and makes sure that names fit the place before all are found missing.

        Args:
            names: Of the images that will be read.
            origin: Where the names are from, for messages.

        Raises:
            ValueError: If none of them is there; of an address some are asked for.
        """
        self._look_up({self._parts(name)[0] for name in names} - {""}, strict=False)
        some = names if self.is_local else names[:: max(1, len(names) // _ASKED)]
        first = ""
        for name in some:
            problem = self._problem(name)
            if problem is None:
                return
            first = first or problem
        raise ValueError(f"{origin}: none of its {len(names)} images is in {self}; the first: {first}")

    def _parts(self, name: str) -> tuple[str, str]:
        """The tar that an image is in, if any, and its name there."""
        if self._tar:
            return self._tar, name
        found = _IN_TAR.fullmatch(name) if ".tar/" in name.lower() else None
        if found is None or (self.is_local and _is_folder(self._root, found[1])):
            return "", name
        return found[1], found[2]

    def _find(self) -> list[str]:
        """Images and tars of the folder."""
        if self.is_local:
            return find_files(Path(self._root), _LISTED)
        if is_web(self._root):
            raise ValueError(
                f"{self}: a web server does not list its files; give --names FILE, a list of images or tars"
            )
        files, root = file_system(self._root)
        paths = patiently(self, lambda: files.find(root))
        names = [safe_name(path[len(root) :].lstrip("/"), self) for path in paths]
        return [name for name in names if is_listed(PurePosixPath(name), _LISTED)]

    def _members(self, tars: Sequence[str]) -> dict[str, list[str]]:
        """The images in tars."""
        self._look_up(tars, strict=True)
        found = {}
        for tar in tars:
            index = tar_index(self._root, tar)
            if index.problem:
                raise ValueError(f"{index.problem}; fetch it anew or take it away")
            found[tar] = index.names()
        return found

    def _look_up(self, tars: Collection[str], *, strict: bool) -> None:
        """Makes the indexes of tars that have none or have changed."""
        tar_index.cache_clear()

        def look_up(tar: str) -> None:
            try:
                update_index(self._root, tar)
            except ImageError:
                if strict:
                    raise

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in tqdm(pool.map(look_up, tars), total=len(tars), desc="tars", unit="tar", delay=2):
                pass

    def _problem(self, name: str) -> str | None:
        """Why there is no such image, or None."""
        image = self / name
        if isinstance(image, Path):
            return None if image.is_file() else name
        tar, member = self._parts(name)
        try:
            if tar:
                self._span(tar, member, name)
            else:
                files, path = path_at(self._root, name)
                patiently(image, lambda: files.info(path))
        except ImageError as error:
            return str(error)
        return None

    def _span(self, tar: str, member: str, name: str) -> tuple[int, int]:
        """First byte and number of bytes of an image in its tar."""
        index = tar_index(self._root, tar)
        span = index.find(member)
        if span is None:
            raise ImageError(f"{self}/{name}: no such image in the tar ({index.problem or 'which is whole'})")
        return span

    def _read(self, name: str) -> bytes:
        files, path = path_at(self._root, name)
        return patiently(f"{self}/{name}", lambda: files.cat_file(path))

    def _read_member(self, tar: str, member: str, name: str) -> bytes:
        image = f"{self}/{name}"
        start, size = self._span(tar, member, name)
        content = patiently(image, lambda: read_range(self._root, tar, start, size))
        if len(content) != size:
            raise ImageError(
                f"{image}: {len(content)} bytes came in the place of {size}: the tar has changed or ends"
                " early, or the server does not give ranges of bytes"
            )
        return content


@lru_cache(4096)
def _is_folder(root: str, name: str) -> bool:
    """Asked once for each tar, not for each of its images."""
    return Path(root, name).is_dir()


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _read_names(path: Path) -> list[str]:
    """The names in a list."""
    try:
        if path.suffix.lower() == ".parquet":
            names = pq.read_table(path, columns=["file_name"])["file_name"].to_pylist()
        else:
            names = read_lines(path)
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"{path}: is no list of names ({error})") from error
    return [safe_name(name, path) for name in names if name]
