from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import aligndet
from aligndet.commands import cluster as module
from aligndet.data.images import ImageError
from aligndet.proposals.clusters import FeatureClusters, with_clusters
from aligndet.proposals.storage import read_proposals, write_shard
from aligndet.proposals.table import ImageProposals

SMALL: dict[str, Any] = {"trunk": "resnet18", "trunk_weights": "none", "device": "cpu", "clusters": 2}
SMALL |= {"min_size": 128, "max_size": 256}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Each has a dark half and a bright one, with proposals in both, the first ones on the left."""
    rng, rows = np.random.default_rng(0), []
    for number in range(6):
        pixels = np.full((128, 256, 3), 20, np.uint8)
        pixels[:, 128 * (number % 2) : 128 * (number % 2) + 128] = 220
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        corner = rng.uniform(0, 60, (number + 2, 2)).astype(np.float32)
        left = np.concatenate([corner, corner + 60], 1)
        boxes = np.concatenate([left, left + np.array([128, 0, 128, 0], np.float32)])
        rows.append(ImageProposals(f"{number}.png", 256, 128, boxes))
    (tmp_path / "proposals").mkdir()
    write_shard(tmp_path / "proposals" / "part-00000.parquet", rows)
    return tmp_path


def clusters_of(images: Path) -> list[tuple[set[int], set[int]]]:
    """Of the left and of the right half of each image."""
    table = with_clusters(read_proposals(images / "proposals"), images / "proposals")
    found = [table.clusters_of(index, np.arange(2 * index + 4)) for index in range(len(table))]
    return [(set(c[: len(c) // 2].tolist()), set(c[len(c) // 2 :].tolist())) for c in found]


@pytest.mark.parametrize("trunk", ["resnet18", "vit_small_patch14_dinov2"])
def test_a_cluster_is_of_what_lies_in_the_box(images: Path, trunk: str) -> None:
    aligndet.cluster(images, proposals=images / "proposals", **{**SMALL, "trunk": trunk}, sample=20)
    found = clusters_of(images)
    (bright,), (dark,) = found[0]
    assert bright != dark
    assert found == [({bright}, {dark}), ({dark}, {bright})] * 3


def test_a_broken_image_is_skipped_and_named(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "3.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"3\.png: is empty"):
        aligndet.cluster(images, proposals=images / "proposals", **SMALL, strict=True)
    aligndet.cluster(images, proposals=images / "proposals", **SMALL)
    assert clusters_of(images)[3] == ({0}, {0})  # as promised: the first
    assert clusters_of(images)[0] in [({0}, {1}), ({1}, {0})]
    printed = capsys.readouterr().out
    assert "3.png: is empty" in printed
    assert "1 images skipped" in printed


def test_a_folder_that_cannot_be_written_to_is_named_before_the_work(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposals = images / "proposals"
    monkeypatch.setattr("aligndet.files.os.access", lambda folder, mode: folder != proposals)  # root may all
    monkeypatch.setattr("aligndet.commands.cluster.build_trunk", lambda *_, **__: pytest.fail("the work"))
    with pytest.raises(PermissionError, match=r"cannot be written to.*proposals"):
        aligndet.cluster(images, proposals=proposals, **SMALL)


def test_what_was_stopped_goes_on_to_the_same_clusters(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = (images / "4.png").read_bytes()
    (images / "4.png").write_bytes(b"")
    settings: dict[str, Any] = {**SMALL, "proposals": images / "proposals", "sample": 20, "overwrite": True}
    whole = aligndet.cluster(images, **settings).read_bytes()
    seen: list[int] = []  # the order is 3, 2, 5, on which clusters are found, and 4, 0, 1
    last = 1

    def assign(describe: Any, group: Any, loaded: Any, assign: Any = module._assign) -> Any:
        if len(seen) == last:
            raise KeyboardInterrupt
        seen.append(loaded[0])
        return assign(describe, group, loaded)

    monkeypatch.setattr(module, "_assign", assign)
    monkeypatch.setattr(module, "_WRITE_EVERY", -1.0)
    with pytest.raises(KeyboardInterrupt):
        aligndet.cluster(images, **settings)
    last = 9
    monkeypatch.setattr(FeatureClusters, "fit", lambda *_, **__: pytest.fail("these are there"))
    again = aligndet.cluster(images, **settings)
    assert seen == [0, 1]
    assert again.read_bytes() == whole
    assert not again.with_suffix(".partial").exists()
    # what was broken is looked at once more, and --strict holds for it
    monkeypatch.undo()
    monkeypatch.setattr(module, "_assign", assign)
    monkeypatch.setattr(module, "_WRITE_EVERY", -1.0)
    seen.clear()
    last = 1
    with pytest.raises(KeyboardInterrupt):
        aligndet.cluster(images, **settings)
    with pytest.raises(ImageError, match=r"4\.png: is empty"):
        aligndet.cluster(images, **settings, strict=True)
    (images / "4.png").write_bytes(unbroken)
    last = 9
    aligndet.cluster(images, **settings)
    assert seen == [0, 4, 1]
    (bright,), (dark,) = clusters_of(images)[0]
    assert clusters_of(images)[4] == ({bright}, {dark})


def test_more_images_are_drawn_where_some_cannot_be_read(images: Path) -> None:
    (images / "3.png").write_bytes(b"")  # the first of the sample
    aligndet.cluster(images, proposals=images / "proposals", **SMALL, sample=10)
    (bright,), (dark,) = clusters_of(images)[0]
    assert clusters_of(images)[3] == ({0}, {0})
    assert clusters_of(images)[2] == ({bright}, {dark})
