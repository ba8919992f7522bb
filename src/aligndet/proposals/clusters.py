"""Pseudo-classes of proposals: clusters of their features, for detectors whose own losses need classes
(those of the official DETR).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from aligndet.files import whole_file
from aligndet.proposals.table import ProposalTable

SMALLEST = 10
"""Proposals a cluster on average, at least: fewer would be no class."""
_SCHEMA = pa.schema([("file_name", pa.string()), ("clusters", pa.list_(pa.int32()))])
_MANIFEST = b"aligndet"


def check_installed() -> None:
    """Makes sure, before the work, that scikit-learn is there.

    Raises:
        ImportError: If it is not.
    """
    if find_spec("sklearn") is None:
        raise ImportError('clusters need scikit-learn: pip install "aligndet[detr]"')


@dataclass(frozen=True)
class FeatureClusters:
    """Principal components of features, and the centres of k-means on them."""

    mean: npt.NDArray[np.float32]  # (C,)
    components: npt.NDArray[np.float32]  # (components, C)
    centres: npt.NDArray[np.float32]  # (clusters, components)

    @classmethod
    def fit(
        cls, features: npt.NDArray[np.float32], *, clusters: int, components: int, seed: int
    ) -> FeatureClusters:
        """Finds components and clusters.

        Args:
            features: (N, C), N >= 1.
            clusters: Asked for; a small set gets fewer.
            components: To keep at most.
            seed: Of the random parts.

        Raises:
            ImportError: If scikit-learn is not installed.
        """
        check_installed()
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.decomposition import PCA

        clusters = max(1, min(clusters, len(features) // SMALLEST))
        pca = PCA(min(components, *features.shape), random_state=seed).fit(features)
        means = MiniBatchKMeans(clusters, batch_size=4096, n_init=3, random_state=seed)
        means.fit(pca.transform(features))
        found = pca.mean_, pca.components_, means.cluster_centers_
        return cls(*(np.ascontiguousarray(array, np.float32) for array in found))

    def __call__(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Tells the clusters of features: the nearest centres.

        Args:
            features: (M, C).

        Returns:
            (M,) from 0 on.

        Raises:
            ValueError: If features are not finite.
        """
        if not np.isfinite(features).all():
            raise ValueError("the trunk's features are not finite: other weights, or another --device")
        reduced = (features - self.mean) @ self.components.T
        distances = (self.centres**2).sum(1) - 2 * reduced @ self.centres.T  # but for what all centres share
        return distances.argmin(1).astype(np.int32)


@dataclass
class PartialClusters:
    """What a clustering has so far, so that one that was stopped goes on."""

    group: FeatureClusters
    found: npt.NDArray[np.int32]  # (all boxes,)
    done: int  # images, in the order of the work
    broken: dict[int, str]  # why, by their positions

    def write(self, path: Path, decides: dict[str, Any]) -> None:
        """Writes it, whole or not at all.

        Args:
            path: Of the file.
            decides: What the result depends on.
        """
        noted = {"decides": json.dumps(decides), "done": str(self.done), "broken": json.dumps(self.broken)}
        with whole_file(path) as file:
            file.write(save({"found": self.found, **vars(self.group)}, noted))

    @classmethod
    def read(cls, path: Path, decides: dict[str, Any]) -> PartialClusters | None:
        """Reads it; None if there is none, or it is of something else.

        Args:
            path: Of the file.
            decides: What the result depends on.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                noted = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if noted["decides"] != json.dumps(decides):
                print(f"{path}: is of other settings, proposals or weights; begins anew")
                return None
            found = tensors.pop("found")
            broken = {int(position): why for position, why in json.loads(noted["broken"]).items()}
            return cls(FeatureClusters(**tensors), found, int(noted["done"]), broken)
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            print(f"{path}: is broken ({error}); begins anew")
            return None


def clusters_file(proposals: Path) -> Path:
    """Where the clusters of proposals are: beside them.

    Args:
        proposals: Folder or file, see `aligndet.proposals.storage.read_proposals`.
    """
    if proposals.is_dir():
        return proposals / "clusters.parquet"
    return proposals.with_name(f"{proposals.stem}.clusters.parquet")


def partial_file(proposals: Path) -> Path:
    """Where an unfinished clustering is: beside them, too."""
    return clusters_file(proposals).with_suffix(".partial")


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
    manifest = {**parameters, "proposals": digest(table)}
    schema = _SCHEMA.with_metadata({_MANIFEST: json.dumps(manifest, default=str).encode()})
    columns = {"file_name": table.file_names, "clusters": rows}
    path = clusters_file(proposals)
    with whole_file(path) as file:
        pq.write_table(pa.table(columns, schema=schema), file, compression="zstd", write_page_checksum=True)
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
        lists = pq.read_table(path, page_checksum_verification=True)["clusters"].combine_chunks()
        manifest = read_manifest(path)
        made_of, count = manifest["proposals"], int(manifest["clusters"])
        clusters = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
        if clusters.min(initial=0) < 0 or clusters.max(initial=0) >= count:
            raise ValueError(f"not all are from 0 to {count - 1}")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: broken clusters ({error}); run `aligndet cluster` again") from error
    if made_of != digest(table) or not np.array_equal(lists.value_lengths(), np.diff(table.offsets)):
        raise ValueError(f"{path}: these clusters are of other proposals; run `aligndet cluster` again")
    if most is not None and count > most:
        raise ValueError(
            f"{path}: holds {count} clusters, the detector tells {most} apart; give"
            f" --options.num_clusters {count}, or make fewer with `aligndet cluster`"
        )
    return replace(table, clusters=clusters)


def read_manifest(path: Path) -> dict[str, Any]:
    """How clusters came about."""
    manifest: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {})[_MANIFEST])
    return manifest


def digest(table: ProposalTable) -> str:
    """Of the boxes and of whose they are."""
    known = hashlib.sha256(json.dumps(list(table.file_names)).encode())
    for array in (table.offsets, table.boxes):
        known.update(np.ascontiguousarray(array).data)
    return known.hexdigest()
