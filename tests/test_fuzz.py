"""Whatever comes in: no crash, no NaN, ids in range, boxes inside, and broken files named.

`make test-slow` runs many more examples of each.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from aligndet.boxes import BACKGROUND
from aligndet.checkpoints import read_checkpoint
from aligndet.commands.check_data import check_data
from aligndet.data.augmentations import AUGMENTATIONS, AugmentationName
from aligndet.data.formats import read_labelled
from aligndet.data.images import read_image, read_image_size
from aligndet.data.labelled import LabelledDataset
from aligndet.data.views import TwoViewDataset
from aligndet.data.voc import load_voc
from aligndet.data.yolo import load_yolo
from aligndet.detectors.build import build_pretrainable, family_of
from aligndet.detectors.reading import read_tensors
from aligndet.detectors.weights import load_weights, save_weights
from aligndet.files import read_json
from aligndet.losses import box_contrastive_loss
from aligndet.proposals.clusters import with_clusters, write_clusters
from aligndet.proposals.storage import clean, read_proposals, write_shard
from aligndet.proposals.table import ImageProposals, ProposalTable

pytestmark = pytest.mark.filterwarnings("ignore")  # decoders warn of what is broken

NUMBERS = st.floats(width=32) | st.sampled_from([0.0, -1.0, 1.0, 1e9, 63.999, 64.0])


@st.composite
def rows(draw: st.DrawFn, most: int = 6) -> ImageProposals:
    """An image's size and any boxes at all, cleaned as every reader cleans them."""
    width, height = draw(st.integers(8, 150)), draw(st.integers(8, 150))
    boxes = draw(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=most))
    inside = draw(st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), max_size=most))
    scaled = [[a * width, b * height, c * width, d * height] for a, b, c, d in inside]
    found = np.array([*boxes, *scaled], np.float32).reshape(-1, 4)
    return ImageProposals("image.png", width, height, clean(found, width, height))


def assert_inside(boxes: torch.Tensor, image: torch.Tensor) -> None:
    height, width = image.shape[1:]
    assert boxes.isfinite().all()
    assert (boxes >= -1e-3).all()
    assert (boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@given(row=rows(), seed=st.integers(0, 2**63), most=st.integers(1, 8), longest=st.integers(64, 300))
def test_views(folder: Path, row: ImageProposals, seed: int, most: int, longest: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (row.height, row.width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    table = ProposalTable.of([row])
    item = TwoViewDataset(folder, table, min_size=(32, 64), max_size=longest, max_proposals=most)[0, seed]
    for view in (item.online, item.momentum):
        assert view.image.dtype == torch.uint8
        assert max(view.image.shape[1:]) <= longest
        assert view.proposals.shape == (min(most, len(row.boxes)), 4)
        assert_inside(view.proposals, view.image)


@given(row=rows(), seed=st.integers(0, 2**63), augmentation=st.sampled_from(list(AUGMENTATIONS)))
def test_labelled_images(
    folder: Path, row: ImageProposals, seed: int, augmentation: AugmentationName
) -> None:
    Image.new("RGB", (row.width, row.height)).save(folder / "image.png")
    boxes = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in row.boxes.astype(float).tolist()]
    document = {
        "images": [{"id": 1, "file_name": "image.png", "width": row.width, "height": row.height}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 7, "bbox": box} for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "thing"}],
    }
    (folder / "labels.json").write_text(json.dumps(document))
    coco = read_labelled(folder / "labels.json", folder)
    sizes: dict[str, Any] = {"min_size": (32, 64), "max_size": 300}
    item = LabelledDataset(coco, augmentation=augmentation, **sizes)[0, seed]
    assert len(item.labels) == len(item.boxes)
    assert (item.labels == 1).all()
    assert_inside(item.boxes, item.image)


FEW = {"num_queries": 30, "encoder_layers": 1, "decoder_layers": 2, "num_clusters": 4}
SLOW = ("retinanet", "mask_rcnn", "cascade_rcnn", "htc", "rt_detr_v2", "d_fine")


@pytest.fixture(
    scope="module",
    params=["fcos", "faster_rcnn", "detr", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def adapter(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"fpn_channels": 64}
    if family_of(request.param).weights_format == "transformers":
        sizes["options"] = FEW
    built: Any = build_pretrainable(request.param, trunk="resnet18", trunk_weights="none", **sizes)
    built.train()
    built.detector.backbone.body.requires_grad_(False).eval()  # as in pre-training
    return built


@given(batch=st.lists(rows(3), min_size=1, max_size=2), seed=st.integers(0, 2**31))
@settings(max_examples=settings().max_examples // 3)
def test_adapters_and_loss(adapter: Any, batch: list[ImageProposals], seed: int) -> None:
    torch.manual_seed(seed)
    images = [torch.rand(3, max(32, row.height), max(32, row.width)) for row in batch]
    proposals = [torch.from_numpy(row.boxes) for row in batch]
    total = sum(map(len, proposals))
    known = {
        "masks": [torch.randint(0, 2, (len(boxes), 56, 56), dtype=torch.uint8) for boxes in proposals],
        "clusters": [torch.randint(0, 4, (len(boxes),)) for boxes in proposals],
    }
    asked = {name: known[name] for name in adapter.needs}
    output = adapter(images=images, proposals=proposals, **asked)
    with torch.no_grad():
        keys = adapter(images=images, proposals=proposals, **asked)
    assert output.losses
    for name, loss in output.losses.items():
        assert loss.isfinite(), name
    for online, momentum in zip(output.stages, keys.stages, strict=True):
        assert online.embeddings.isfinite().all()
        assert len(online.embeddings) == len(online.proposal_ids)
        assert ((online.proposal_ids >= BACKGROUND) & (online.proposal_ids < total)).all()
        assert box_contrastive_loss(online, momentum, 0.5).isfinite()


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(buffer, kind, exif=exif.tobytes())
    return buffer.getvalue()


def parquet(folder: Path) -> bytes:
    boxes = np.array([[0, 0, 20, 20], [5, 5, 30, 20]], np.float32)
    write_shard(folder / "valid.parquet", [ImageProposals(f"{i}.png", 32, 24, boxes) for i in range(3)])
    return (folder / "valid.parquet").read_bytes()


def clusters(folder: Path) -> bytes:
    (folder / "files" / "a.parquet").write_bytes(parquet(folder))
    table = read_proposals(folder / "files" / "a.parquet")
    path = write_clusters(
        folder / "files" / "a.parquet", table, np.arange(6, dtype=np.int32), {"clusters": 6}
    )
    return path.read_bytes()


def read_clusters(path: Path) -> None:
    proposals = path.with_name("a.parquet")
    with_clusters(read_proposals(proposals), proposals)


def labels() -> bytes:
    document = {
        "images": [{"id": 1, "file_name": "image.png", "width": 32, "height": 24}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    return json.dumps(document).encode()


def voc() -> bytes:
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>12</ymax></bndbox>"
    item = f"<object><name>thing</name><difficult>0</difficult>{box}</object>"
    return f"<annotation><filename>image.png</filename>{item}</annotation>".encode()


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"conv1.weight": torch.ones(2, 3)}, "global_step": 3}, buffer)
    return buffer.getvalue()


def read_images(path: Path) -> None:
    read_image(path)
    read_image_size(path)


TENSORS = {"conv1.weight": torch.arange(6.0).reshape(2, 3)}
PICKLE = {"model": {"conv1.weight": np.ones((2, 3), np.float32)}, "lr": 0.1}
FILES: dict[str, tuple[Callable[[Path], bytes], Callable[[Path], Any]]] = {
    "a.jpg": (lambda _: picture("JPEG"), read_images),
    "a.png": (lambda _: picture("PNG"), read_images),
    "a.webp": (lambda _: picture("WEBP"), read_images),
    "a.tif": (lambda _: picture("TIFF"), read_images),
    "a.parquet": (parquet, read_proposals),
    "proposals.json": (lambda _: labels(), read_proposals),
    "coco.json": (lambda _: labels(), lambda path: read_labelled(path, path.parent)),
    "run.json": (lambda _: labels(), read_json),
    "data.yaml": (lambda _: b"path: .\ntrain: images\nnames: {0: thing, 1: other}\n", load_yolo),
    "xml/image.xml": (lambda _: voc(), lambda path: load_voc(path.parent)),
    "a.safetensors": (lambda _: save(TENSORS), read_tensors),
    "a.pth": (lambda _: torch_file(), read_tensors),
    "last.ckpt": (lambda _: torch_file(), read_checkpoint),
    "a.clusters.parquet": (clusters, read_clusters),
    "a.pkl": (lambda _: pickle.dumps(PICKLE), read_tensors),
}


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bytes that are changed, a piece that is cut out or doubled, or an early end."""
    places = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4))
    start, end, times = draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.sampled_from([0, 1, 1, 2]))

    def apply(content: bytes) -> bytes:
        changed = bytearray(content)
        for place, value in places:
            changed[int(place * (len(changed) - 1))] = value
        first, last = sorted((int(start * len(changed)), int(end * len(changed))))
        return bytes(changed[:first] + changed[first:last] * times + changed[last:])

    return apply


def read_or_name(read: Callable[[Path], Any], path: Path) -> None:
    """Reads a file, which may be refused by an error of the right kind whose message names it."""
    try:
        read(path)
    except ValueError as error:  # of which ImageError is one
        if path.name not in str(error) and path.parent.name not in str(error):
            raise


@pytest.mark.parametrize("name", list(FILES))
@given(broken=damage())
def test_broken_files_are_named(folder: Path, name: str, broken: Callable[[bytes], bytes]) -> None:
    make, read = FILES[name]
    path = folder / "files" / name
    (folder / "files" / "images").mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    for place in (path.parent, folder / "files" / "images"):
        Image.new("RGB", (32, 24)).save(place / "image.png")
    read_valid = make(folder)
    path.write_bytes(read_valid)
    read(path)  # what is in order is read
    path.write_bytes(broken(read_valid))
    read_or_name(read, path)


ODD: list[Any] = [None, True, "0", "", "x", [], [[]], [1, 2, 3], {}, -1, 0, 0.5, 1e300, 10**400, -(10**400)]
ODD += [float("inf"), float("nan")]


def outlined() -> Any:
    """Labels of two objects, with outlines."""
    document = json.loads(labels())
    outline = {"segmentation": [[1, 2, 11, 2, 11, 14]]}
    document["annotations"] = [{**document["annotations"][0], **outline, "id": number} for number in (1, 2)]
    return document


def places(value: Any) -> list[tuple[Any, ...]]:
    """The ways to all values within a JSON value."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [(), *((key, *rest) for key, entry in entries for rest in places(entry))]


def swapped(value: Any, place: tuple[Any, ...], odd: Any) -> Any:
    """A JSON value with another one in a place, if it still has that place."""
    if not place:
        return deepcopy(odd)
    with suppress(LookupError, TypeError):
        value[place[0]] = swapped(value[place[0]], place[1:], odd)
    return value


MANIFEST: dict[str, Any] = {
    "architecture": {
        **{"detector": "fcos", "trunk": "resnet18", "fpn_channels": 256, "fpn_norm": "none"},
        **{"num_classes": 2, "min_size": 64, "max_size": 96, "options": {}},
    },
    "class_names": ["a", "b"],
    "category_ids": [1, 2],
}


@given(place=st.sampled_from(places(MANIFEST)), odd=st.sampled_from(ODD))
def test_odd_values_in_a_manifest_are_refused(folder: Path, place: tuple[Any, ...], odd: Any) -> None:
    path = folder / "odd" / "manifest.json"
    save_weights(path.parent, {"a": torch.zeros(1)}, MANIFEST)
    load_weights(path.parent)
    path.write_text(json.dumps(swapped(deepcopy(MANIFEST), place, odd)))

    def read(path: Path) -> None:
        _, manifest = load_weights(path.parent)  # a wrong name or number is the builder's to refuse
        for name, value in manifest["architecture"].items():
            assert type(value) is type(MANIFEST["architecture"][name])
        assert [type(name) for name in manifest["class_names"] or []] in ([], [str], [str, str])

    read_or_name(read, path)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_labelled(path),
        lambda path: read_labelled(path, masks=True),
        lambda path: check_data(path),
        lambda path: read_proposals(path),
        lambda path: read_proposals(path, masks=True),
    ],
    ids=["coco", "coco-masks", "check-data", "proposals", "proposals-masks"],
)
@given(
    swaps=st.lists(
        st.tuples(st.sampled_from(places(outlined())), st.sampled_from(ODD)), min_size=1, max_size=3
    )
)
@settings(max_examples=2 * settings().max_examples)
def test_odd_values_are_read_or_refused(
    folder: Path, read: Callable[[Path], Any], swaps: list[tuple[tuple[Any, ...], Any]]
) -> None:
    path = folder / "odd" / "labels.json"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (32, 24)).save(path.with_name("image.png"))
    document = outlined()
    for place, odd in swaps:
        document = swapped(document, place, odd)
    path.write_text(json.dumps(document))
    read_or_name(read, path)
