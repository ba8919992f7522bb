"""PASCAL VOC: XML as annotation tools write it, turned into COCO's form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from aligndet.data.document import CocoWriter, Document
from aligndet.data.images import ImageError, read_image_size
from aligndet.data.listing import READ, find_files, walk
from aligndet.files import read_lines, safe_name


class _Object(NamedTuple):
    name: str
    corners: tuple[float, ...]  # as written: xmin, ymin, xmax, ymax
    difficult: bool


class _Refused(ValueError):
    """An XML that no other part of the data set is read with."""


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE before its entities are declared, so that none can be expanded."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise _Refused(f"has a DOCTYPE ({name}), which is refused")


def is_voc(path: Path) -> bool:
    """Whether a path is VOC: a devkit, a year, a folder with XML in it, or a list of a year."""
    if path.is_file():
        return path.suffix.lower() == ".txt" and path.parent.parent.name == "ImageSets"
    return path.is_dir() and any(_is_annotation(path / name) for name in walk(path, {".xml"}))


def _is_annotation(xml: Path) -> bool:
    """Whether an XML is VOC's, not another tool's; of one that cannot be told the reader says more."""
    try:
        with xml.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return True
    root = re.search(rb"<[A-Za-z_][\w.:-]*", re.sub(rb"<!--.*?-->", b"", head, flags=re.DOTALL))
    return root is None or root.group() == b"<annotation"


def load_voc(path: Path, images: Path | None = None, split: str = "all") -> Document:
    """Reads VOC annotations.

    The classes are those of all XML files under the folder, sorted by name, so that the lists of a year
    share them. Coordinates are pixels counted from 1, the last one inside, as the format has it: one is
    taken off xmin and ymin, and xmax and ymax are the far edges as they stand. Where any coordinate of the
    folder is below 1, they count from 0 and are all taken as they are. ``difficult`` becomes
    COCO's crowd flag: not for training, ignored in evaluation. The size of an image is the
    file's own only where the XML has none: boxes refer to that one.

    Args:
        path: A year (VOC2007), several of them (VOCdevkit), a folder of XML beside images or in a folder of
            its own, or one list (ImageSets/Main/*.txt).
        images: Folder of the images; by default JPEGImages, images, or where the XML is.
        split: "train", "val" or "all". With ImageSets, "train" and "val" are trainval and test where any
            year has a test list (the protocols 07 and 07+12), else train and val.

    Raises:
        ValueError: If no XML file is there, one has a DOCTYPE, or a name leads out of the folder.
    """
    chosen_list = path if path.is_file() else None
    root = path.parents[2] if chosen_list else path
    if root.name.lower() == "annotations":  # the images are beside it
        root = root.parent
    found = [xml for name in find_files(root, {".xml"}) if _is_annotation(xml := root / name)]
    years = sorted({year for year in (root, *root.iterdir()) if (year / "ImageSets" / "Main").is_dir()})
    folder = images if images is not None else root
    available = _index_images(folder)
    chosen = None if not years else _chosen(years, split, chosen_list)
    notes: list[str] = []
    rows: dict[str, tuple[tuple[int, int], list[_Object], Path]] = {}
    names: set[str] = set()
    lowest = math.inf
    for xml in found:
        try:
            file_name, size, objects, flaws = _read_xml(xml)
        except ElementTree.ParseError as error:
            notes.append(f"{xml}: is no XML ({error}); its image is left out")
            continue
        names |= {item.name for item in objects}
        lowest = min([lowest, *(min(item.corners) for item in objects)])
        if chosen is not None and xml.with_suffix("") not in chosen:
            continue
        notes += [f"{xml}: {flaw}" for flaw in flaws]
        image = _find_image(xml, file_name, root, available)
        if image is None:
            notes.append(f"{xml}: its image {file_name or xml.stem!r} is not in {folder}")
            continue
        try:
            size = size if min(size) > 0 else read_image_size(folder / image)
        except ImageError as error:
            notes.append(f"image {error}")
        else:
            row = (size, objects, xml)
            if image in rows:  # of two, one has lost its own
                row, further = sorted((rows[image], row), key=lambda r: -_shared(r[2], root, image))
                notes.append(f"{further[2]}: its image is not there; {image} is that of {row[2]}")
            rows[image] = row
    missing = sorted((chosen or set()) - {xml.with_suffix("") for xml in found})
    notes += [f"{place}.xml: is in a list, but not there" for place in missing]
    if not rows:
        raise ValueError(f"{path}: has no annotated image ({notes[0] if notes else 'no XML file is chosen'})")
    return Document(_document(rows, sorted(names), 0.0 if lowest < 1 else 1.0), folder, tuple(notes))


def _document(
    rows: Mapping[str, tuple[tuple[int, int], list[_Object], Path]], names: list[str], shift: float
) -> dict[str, Any]:
    category = {name: number for number, name in enumerate(names, 1)}
    document = CocoWriter(dict(enumerate(names, 1)))
    for file_name, (size, objects, _) in rows.items():
        document.add_image(file_name, *size)
        for item in objects:
            left, top, right, bottom = item.corners
            box = (left - shift, top - shift, right, bottom)
            document.add_object(category[item.name], box, iscrowd=int(item.difficult))
    return document.content


def _index_images(folder: Path) -> dict[str, list[str]]:
    """Relative paths of all images by stem."""
    index: dict[str, list[str]] = {}
    for name in find_files(folder):
        index.setdefault(PurePosixPath(name).stem, []).append(name)
    return index


def _find_image(xml: Path, file_name: str, root: Path, available: dict[str, list[str]]) -> str | None:
    """The image that is named like the XML, else as the XML says; the nearest one if there are several.

    Tools leave ``filename`` stale when files are renamed, so that the XML's own name comes first.
    """
    candidates = available.get(xml.stem) or available.get(Path(file_name).stem, [])

    def distance(candidate: str) -> tuple[bool, int, bool, str]:
        path = Path(candidate)
        exact = path.name == Path(file_name).name
        return path.suffix.lower() not in READ, -_shared(xml, root, candidate), not exact, candidate

    return min(candidates, key=distance, default=None)


def _shared(xml: Path, root: Path, image: str) -> int:
    """How many folders an XML and an image are both in."""
    return len({*xml.relative_to(root).parts[:-1]} & {*PurePosixPath(image).parts[:-1]})


def _chosen(years: list[Path], split: str, chosen_list: Path | None) -> set[Path] | None:
    """The XML files of the lists, without suffix; None for all."""
    if chosen_list is None and split == "all":
        return None
    there = {path.stem for year in years for path in (year / "ImageSets" / "Main").glob("*.txt")}
    whole = {name for name in there if not any(name.endswith(f"_{other}") for other in there)}
    if chosen_list is None and len(whole) == 1 and not whole & {"train", "val", "trainval", "test"}:
        return None  # some tools write one list, default.txt, beside those of each class (cat_default.txt)
    if "test" in there:
        wanted = ("test",) if split == "val" else ("trainval", "train")
    else:
        wanted = ("val",) if split == "val" else ("train",) if "val" in there else ("train", "trainval")
    name = next((name for name in wanted if name in there), wanted[0])
    chosen: set[Path] = set()
    for year in years:
        listed = chosen_list or year / "ImageSets" / "Main" / f"{name}.txt"
        if not listed.is_file():
            continue
        for entry in read_lines(listed):
            place = year / "Annotations" / safe_name(entry, listed)
            # lists of one class: name and whether it is there
            if entry.endswith((" -1", " 0", " 1")) and not place.with_name(f"{place.name}.xml").is_file():
                place = year / "Annotations" / safe_name(entry.rsplit(maxsplit=1)[0], listed)
            chosen.add(place)
    if not chosen:
        lists = ", ".join(f"{stem}.txt" for stem in sorted(there)[:5])
        raise ValueError(
            f"{years[0]}: has no list ImageSets/Main/{name}.txt with an image in it; give one that it has"
            f" ({lists})"
        )
    return chosen


def _read_xml(path: Path) -> tuple[str, tuple[int, int], list[_Object], list[str]]:
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        parser.feed(path.read_bytes())
        tree = parser.close()
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except (LookupError, ValueError) as error:  # of an encoding that the parser does not know
        raise ElementTree.ParseError(str(error)) from error
    file_name = (tree.findtext("filename") or "").strip()
    file_name = file_name.replace("\\", "/")
    if file_name and not file_name.startswith("/"):  # of an absolute one, the last part counts alone
        safe_name(file_name, path)
    size = (_number(tree.findtext("size/width")), _number(tree.findtext("size/height")))
    objects: list[_Object] = []
    flaws: list[str] = []
    for item in tree.iter("object"):
        name = (item.findtext("name") or "").strip()
        corners = tuple(_number(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
        if not name or not all(map(math.isfinite, corners)):
            flaws.append(f"dropped an object without a name or box ({name or 'no name'}, {corners})")
            continue
        difficult = (item.findtext("difficult") or "").strip().lower() in ("1", "true", "yes")
        objects.append(_Object(name, corners, difficult))
    width, height = (int(value) if math.isfinite(value) else 0 for value in size)
    return file_name, (width, height), objects, flaws


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
