"""Pseudo-classes of proposals: clusters of their features, for detectors whose own losses need classes
(those of the official DETR).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from aligndet.files import whole_file
from aligndet.proposals.table import ProposalTable

SMALLEST = 10
"""Proposals a cluster on average, at least: fewer would be no class."""
_SCHEMA = pa.schema([("file_name", pa.string()), ("clusters", pa.list_(pa.int32()))])
_MANIFEST = b"aligndet"


class FeatureClusters:
    """Principal components of features, and k-means on them; the seed decides."""

    def __init__(
        self, features: npt.NDArray[np.float32], *, clusters: int, components: int, seed: int
    ) -> None:
        """Finds components and clusters.

        Args:
            features: (N, C), N >= 1.
            clusters: Asked for; a small set gets fewer.
            components: To keep at most.
            seed: Of the random parts.

        Raises:
            ValueError: If scikit-learn is not installed.
        """
        try:
            from sklearn.cluster import MiniBatchKMeans
            from sklearn.decomposition import PCA
        except ImportError as error:
            raise ValueError('clusters need scikit-learn: pip install "aligndet[detr]"') from error
        self.clusters = max(1, min(clusters, len(features) // SMALLEST))
        self.components = min(components, *features.shape)
        self._pca = PCA(self.components, random_state=seed).fit(features)
        self._means = MiniBatchKMeans(self.clusters, batch_size=4096, n_init=3, random_state=seed)
        self._means.fit(self._pca.transform(features))

    def __call__(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Tells the clusters of features.

        Args:
            features: (M, C).

        Returns:
            (M,) from 0 on.
        """
        if not len(features):
            return np.zeros(0, np.int32)
        return self._means.predict(self._pca.transform(features)).astype(np.int32)


def clusters_file(proposals: Path) -> Path:
    """Where the clusters of proposals are: beside them.

    Args:
        proposals: Folder or file, see `aligndet.proposals.storage.read_proposals`.
    """
    if proposals.is_dir():
        return proposals / "clusters.parquet"
    return proposals.with_name(f"{proposals.stem}.clusters.parquet")


def write_clusters(
    proposals: Path, table: ProposalTable, clusters: npt.NDArray[np.int32], parameters: dict[str, Any]
) -> Path:
    """Writes clusters beside their proposals, whole or not at all.

    Args:
        proposals: Folder or file.
        table: What was read from it.
        clusters: (all boxes,).
        parameters: How they came about; kept in the file.

    Returns:
        The file.
    """
    rows = np.split(clusters, table.offsets[1:-1])
    manifest = {**parameters, "proposals": _digest(table)}
    schema = _SCHEMA.with_metadata({_MANIFEST: json.dumps(manifest, default=str).encode()})
    columns = {"file_name": table.file_names, "clusters": rows}
    path = clusters_file(proposals)
    with whole_file(path) as file:
        pq.write_table(pa.table(columns, schema=schema), file, compression="zstd")
    return path


def with_clusters(table: ProposalTable, proposals: Path, most: int | None = None) -> ProposalTable:
    """Adds clusters to the proposals that they were made of.

    Args:
        table: What was read from `proposals`.
        proposals: Folder or file.
        most: Clusters that the detector can tell apart.

    Raises:
        ValueError: If there are none, or more than `most`, they are of other proposals, or the file is
            broken.
    """
    path = clusters_file(proposals)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; this detector needs clusters of the proposals: run"
            f" `aligndet cluster IMAGES --proposals {proposals}` first, or do without"
            " (--options.objectness true)"
        )
    try:
        content = pq.read_table(path)
        manifest = read_manifest(path)
        clusters = content["clusters"].combine_chunks().flatten().to_numpy().astype(np.int32)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: broken clusters ({error}); run `aligndet cluster` again") from error
    if manifest.get("proposals") != _digest(table) or len(clusters) != len(table.boxes):
        raise ValueError(f"{path}: these clusters are of other proposals; run `aligndet cluster` again")
    if most is not None and manifest["clusters"] > most:
        raise ValueError(
            f"{path}: holds {manifest['clusters']} clusters, the detector tells {most} apart; give"
            f" --options.num_clusters {manifest['clusters']}, or make fewer with `aligndet cluster`"
        )
    return replace(table, clusters=clusters)


def read_manifest(path: Path) -> dict[str, Any]:
    """How clusters came about.

    Args:
        path: Of `clusters_file`.
    """
    manifest: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {})[_MANIFEST])
    return manifest


def _digest(table: ProposalTable) -> str:
    """Of the boxes and of whose they are."""
    digest = hashlib.sha256(json.dumps(list(table.file_names)).encode())
    for array in (table.offsets, table.boxes):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
