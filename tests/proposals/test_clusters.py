from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aligndet.proposals.clusters import (
    FeatureClusters,
    PartialClusters,
    clusters_file,
    with_clusters,
    write_clusters,
)
from aligndet.proposals.table import ImageProposals, ProposalTable


def table(shift: float = 0.0) -> ProposalTable:
    boxes = np.array([[0, 0, 9, 9], [5, 5, 20, 20 + shift]], np.float32)
    rows = [ImageProposals(name, 30, 30, boxes[:count]) for name, count in (("a", 2), ("b", 0), ("c", 1))]
    return ProposalTable.of(rows)


def features(groups: int, of_each: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 10, (groups, 32))
    return np.repeat(centres, of_each, axis=0).astype(np.float32) + rng.normal(
        0, 0.1, (groups * of_each, 32)
    ).astype(np.float32)


def test_what_looks_alike_is_one_cluster() -> None:
    known = features(4, 20)
    group = FeatureClusters.fit(known, clusters=4, components=8, seed=0)
    found = group(known).reshape(4, 20)
    assert (found == found[:, :1]).all()
    assert len(set(found[:, 0].tolist())) == 4
    nearest = [
        np.linalg.norm((row - group.mean) @ group.components.T - group.centres, axis=1) for row in known
    ]
    np.testing.assert_array_equal(group(known), np.argmin(nearest, 1))
    assert group(known[:0]).shape == (0,)
    again = FeatureClusters.fit(known, clusters=4, components=8, seed=0)
    np.testing.assert_array_equal(again(known), group(known))


def test_a_small_set_gets_fewer() -> None:
    group = FeatureClusters.fit(features(5, 5), clusters=256, components=256, seed=0)
    assert group.centres.shape == (2, 25)
    assert FeatureClusters.fit(features(1, 3), clusters=256, components=256, seed=0).centres.shape == (1, 3)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_clusters_are_those_of_their_proposals(form: str, tmp_path: Path) -> None:
    proposals = tmp_path if form == "folder" else tmp_path / "proposals.json"
    parameters = {"clusters": 8}
    path = write_clusters(proposals, table(), np.array([3, 0, 7], np.int32), parameters)
    assert path == clusters_file(proposals)
    found = with_clusters(table(), proposals, 8)
    assert found.clusters_of(0, np.array([1, 0])).tolist() == [0, 3]
    assert found.clusters_of(2, np.array([0])).tolist() == [7]
    with pytest.raises(ValueError, match="clusters are of other proposals; run `aligndet cluster` again"):
        with_clusters(table(shift=1.0), proposals)
    with pytest.raises(ValueError, match=r"holds 8 clusters, the detector tells 4 apart"):
        with_clusters(table(), proposals, 4)
    for wrong in ([3, 0, 8], [3, -1, 7]):
        write_clusters(proposals, table(), np.array(wrong, np.int32), parameters)
        with pytest.raises(ValueError, match=r"clusters\.parquet: broken clusters .*from 0 to 7"):
            with_clusters(table(), proposals)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"clusters\.parquet: broken clusters"):
        with_clusters(table(), proposals)
    path.unlink()
    with pytest.raises(ValueError, match=r"clusters\.parquet: no such file; .* run `aligndet cluster"):
        with_clusters(table(), proposals)


def test_what_was_begun_goes_on_where_it_is_of_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, decides = tmp_path / "clusters.partial", {"seed": 0}
    assert PartialClusters.read(path, decides) is None
    group = FeatureClusters.fit(features(4, 20), clusters=4, components=8, seed=0)
    PartialClusters(group, np.array([3, 0, 7], np.int32), 2, {4: "é.jpg: is empty"}).write(path, decides)
    begun = PartialClusters.read(path, decides)
    assert begun is not None
    assert (begun.found.tolist(), begun.done, begun.broken) == ([3, 0, 7], 2, {4: "é.jpg: is empty"})
    np.testing.assert_array_equal(begun.group(features(4, 3)), group(features(4, 3)))
    assert not capsys.readouterr().out
    assert PartialClusters.read(path, {"seed": 1}) is None
    assert "clusters.partial: is of other settings" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1])
    assert PartialClusters.read(path, decides) is None
    assert "clusters.partial: is broken" in capsys.readouterr().out
