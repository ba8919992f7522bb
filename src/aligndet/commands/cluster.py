"""`aligndet cluster`: pseudo-classes of proposals, once and offline."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from aligndet.commands._runs import check_bounds, provenance
from aligndet.data.images import ImageError, read_image
from aligndet.data.labelled import geometric
from aligndet.data.sources import ImageSource
from aligndet.detectors.backbones import build_trunk, normalisation, trunk_features
from aligndet.evaluation.inference import resolve_device
from aligndet.files import accepts_strings, skipped_lines
from aligndet.proposals.clusters import FeatureClusters, clusters_file, write_clusters
from aligndet.proposals.storage import ProposalTable, read_proposals

_GRID = 7  # cells of a box whose features are averaged, as RoI heads have them


@accepts_strings
def cluster(
    images: str | Path,
    *,
    proposals: Path,
    trunk: str = "resnet50",
    trunk_weights: str = "default",
    clusters: int = 256,
    components: int = 256,
    sample: int = 50_000,
    min_size: int = 800,
    max_size: int = 1333,
    device: str = "auto",
    workers: int = 0,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Groups proposals by what they look like, for query-based detectors, whose losses need classes.

    A trunk's features of each proposal (RoI align on its last map), reduced to principal components, are
    grouped by k-means (paper section 3.2, DETR). `aligndet pretrain` reads the result, a Parquet file beside
    the proposals, where a detector needs it.

    Args:
        images: Folder of images, or an address; see `aligndet pretrain --help`.
        proposals: What `aligndet propose` has written for them, or a COCO-style JSON of boxes.
        trunk: Whose features to take, by name; see `aligndet pretrain --help`.
        trunk_weights: "default" (ImageNet, downloaded), "bundled", "none", or a file, likewise.
        clusters: Pseudo-classes; fewer where there are less than ten proposals for each.
        components: Principal components; fewer where there are less features or proposals.
        sample: Proposals that components and clusters are found on, of images drawn at random; the others
            are only assigned.
        min_size: Images are resized to this short side.
        max_size: Bound of the long side.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        workers: Processes that read images.
        seed: Of sample, components and clusters.
        strict: A broken image is an error; by default it is skipped, counted and named, and its proposals
            are in the first cluster.
        overwrite: Replace clusters that are there.

    Returns:
        The file.

    Raises:
        ValueError: If the input does not fit together, or there are clusters already.
    """
    settings = dict(locals())
    check_bounds(settings)
    if clusters_file(proposals).exists() and not overwrite:
        raise ValueError(f"{clusters_file(proposals)}: is there already; give --overwrite to replace it")
    table = read_proposals(proposals)
    if not len(table.boxes):
        raise ValueError(f"{proposals}: holds no box in any of its {len(table)} images: nothing to group")
    source = ImageSource(images)
    source.prepare(table.file_names, proposals)
    broken: list[str] = []
    stream = tqdm(
        _read(_Boxes(source, table, min_size, max_size), workers, seed, strict, broken),
        total=len(table),
        desc="cluster",
        unit="image",
    )
    torch.manual_seed(seed)  # a trunk without weights is a random one
    features = map(_BoxFeatures(trunk, trunk_weights, resolve_device(device)), stream)
    drawn = _take(features, sample)
    if not drawn:
        raise ImageError(f"{images}: none of the {len(table)} images can be read; the first: {broken[0]}")
    group = FeatureClusters(
        np.concatenate([rows for _, rows in drawn]), clusters=clusters, components=components, seed=seed
    )
    found = np.zeros(len(table.boxes), np.int32)
    for index, rows in chain(drawn, features):
        found[table.offsets[index] : table.offsets[index + 1]] = group(rows)
    path = write_clusters(
        proposals,
        table,
        found,
        {
            "clusters": group.clusters,
            "components": group.components,
            "skipped": broken,
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
            **provenance(),
        },
    )
    for line in skipped_lines(broken):
        print(line)
    print(f"{len(found)} proposals in {group.clusters} clusters, {len(broken)} images skipped: {path}")
    return path


class _Boxes(Dataset[Any]):
    """Position, image (3, H, W) uint8 and boxes (N, 4), resized; or in the place of a broken one, why."""

    def __init__(self, images: ImageSource, table: ProposalTable, min_size: int, max_size: int) -> None:
        self.images, self.table = images, table
        self.resize = geometric((min_size, min_size), max_size, flip=0.0)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor] | str:
        try:
            image = read_image(self.images / self.table.file_names[index])
        except ImageError as error:
            return str(error)
        image = self.resize(image)
        # the table knows the image's size from when the proposals were made
        size = torch.tensor([image.shape[2], image.shape[1]]) / torch.from_numpy(self.table.sizes[index])
        return index, image, torch.from_numpy(self.table.boxes_of(index)) * size.repeat(2)


def _read(
    boxes: _Boxes, workers: int, seed: int, strict: bool, broken: list[str]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """All images in a random order; messages about broken ones are put into a list."""
    loader: DataLoader[Any] = DataLoader(
        boxes,
        batch_size=None,
        sampler=np.random.default_rng(seed).permutation(len(boxes)).tolist(),
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
    )
    for item in loader:
        if not isinstance(item, str):
            yield item
        elif strict:
            raise ImageError(item)
        else:
            broken.append(item)


class _BoxFeatures:
    """Features (N, C) of an image's boxes: the mean over each box on a trunk's last map."""

    def __init__(self, trunk: str, weights: str, device: torch.device) -> None:
        body, _ = build_trunk(trunk, strides=(8, 16, 32), weights=weights)
        self.body, self.device = body.eval().to(device), device
        self.mean, self.std = normalisation(trunk)

    @torch.inference_mode()
    def __call__(self, item: tuple[int, Tensor, Tensor]) -> tuple[int, npt.NDArray[np.float32]]:
        index, image, boxes = item
        pixels = transforms.normalize(image.to(self.device).float() / 255, list(self.mean), list(self.std))
        features = trunk_features(self.body, pixels[None])[-1]
        stride = -(-image.shape[2] // 32) * 32 / features.shape[3]  # the trunk pads to whole multiples of 32
        cells = roi_align(
            features, [boxes.to(self.device)], _GRID, 1 / stride, sampling_ratio=2, aligned=True
        )
        return index, cells.mean((2, 3)).cpu().numpy()


def _take(
    features: Iterator[tuple[int, npt.NDArray[np.float32]]], sample: int
) -> list[tuple[int, npt.NDArray[np.float32]]]:
    """The first images, until they have as many boxes together."""
    taken, count = [], 0
    for index, rows in features:
        taken.append((index, rows))
        count += len(rows)
        if count >= sample:
            break
    return taken if count else []
