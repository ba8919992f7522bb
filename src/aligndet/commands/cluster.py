"""`aligndet cluster`: pseudo-classes of proposals, once and offline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from aligndet.commands._settings import check_bounds, provenance
from aligndet.data.images import ImageError, StoredImage, check_shape, read_image
from aligndet.data.labelled import geometric
from aligndet.data.sources import ImageSource
from aligndet.detectors.backbones import build_trunk, normalisation, trunk_features
from aligndet.evaluation.inference import allow_tf32, resolve_device
from aligndet.files import accepts_strings, check_writable, print_skipped
from aligndet.proposals.clusters import FeatureClusters, clusters_file, write_clusters
from aligndet.proposals.engines import Engine, check_engine, run
from aligndet.proposals.storage import read_proposals
from aligndet.proposals.table import ProposalTable
from aligndet.workers import worker_settings

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
    engine: Engine = "processes",
    ray_address: str | None = None,
    workers: int = 0,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Groups proposals by what they look like, for query-based detectors, whose losses need classes.

    A trunk's features of each proposal (RoI align on its last map), reduced to principal components, are
    grouped by k-means, as for the official DETR. `aligndet pretrain` reads the result, a Parquet file beside
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
        device: "auto", "cpu", "cuda", "cuda:1", ...; with Ray "auto" is what this machine has.
        engine: "processes" read images for one trunk here; with "ray", tasks on the machines of a Ray cluster
            read images and run the trunk; they all see the images under the same path.
        ray_address: Of the cluster; by default what RAY_ADDRESS says, a cluster that runs on this machine, or
            one of this machine alone, started for the purpose.
        workers: Processes that read images; of Ray tasks at a time, 0 for one a core or GPU.
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
    check_engine(engine, ray_address)
    if clusters_file(proposals).exists() and not overwrite:
        raise ValueError(f"{clusters_file(proposals)}: is there already; give --overwrite to replace it")
    table = read_proposals(proposals)
    if not len(table.boxes):
        raise ValueError(f"{proposals}: holds no box in any of its {len(table)} images: nothing to group")
    check_writable(clusters_file(proposals).parent)
    source = ImageSource(images)
    source.prepare(table.file_names, proposals)
    broken: list[str] = []
    order = np.random.default_rng(seed).permutation(len(table)).tolist()
    boxes = _Boxes(source.absolute(), table, min_size, max_size)
    torch.manual_seed(seed)  # a trunk without weights is a random one
    describe = _BoxFeatures(trunk, trunk_weights, resolve_device(device, elsewhere=engine == "ray"))
    if engine == "ray":
        stream = _on_ray(describe, boxes, order, workers, ray_address)
    else:
        stream = map(describe, DataLoader(boxes, batch_size=None, sampler=order, **worker_settings(workers)))
    features = _sound(tqdm(stream, total=len(table), desc="cluster", unit="image"), strict, broken)
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
            "settings": settings,
            **provenance(),
        },
    )
    print_skipped(broken)
    print(f"{len(found)} proposals in {group.clusters} clusters, {len(broken)} images skipped: {path}")
    return path


Described = tuple[int, npt.NDArray[np.float32]]  # position of an image, features (N, C) of its boxes


class _Request(NamedTuple):
    """An image and its boxes, as the table has them."""

    position: int
    image: Path | StoredImage
    size: npt.NDArray[np.int32]  # (2,) width, height when the proposals were made
    boxes: npt.NDArray[np.float32]  # (N, 4)


class _Boxes(Dataset[Any]):
    """Position, image (3, H, W) uint8 and boxes (N, 4), resized; or in the place of a broken one, why."""

    def __init__(self, images: ImageSource, table: ProposalTable, min_size: int, max_size: int) -> None:
        self.images, self.table = images, table
        self.resize = geometric((min_size, min_size), max_size, flip=0.0)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor] | str:
        return _load(self.request(index), self.resize)

    def request(self, index: int) -> _Request:
        image = self.images / self.table.file_names[index]
        return _Request(index, image, self.table.sizes[index], self.table.boxes_of(index))


def _load(request: _Request, resize: Any) -> tuple[int, Tensor, Tensor] | str:
    try:
        image = read_image(request.image)
        check_shape(image, request.size, request.image)
    except ImageError as error:
        return str(error)
    image = resize(image)
    size = torch.tensor([image.shape[2], image.shape[1]]) / torch.from_numpy(request.size)
    return request.position, image, torch.from_numpy(request.boxes) * size.repeat(2)


def _on_ray(
    describe: _BoxFeatures, boxes: _Boxes, order: list[int], workers: int, address: str | None
) -> Iterator[Described | str]:
    """Features of all images, from the machines of a cluster."""
    results = run(
        partial(_read_and_describe, describe, boxes.images, boxes.resize),
        map(boxes.request, order),
        engine="ray",
        workers=workers or None,
        gpus=float(describe.device.type == "cuda"),
        address=address,
    )
    with closing(results):
        yield from results


def _read_and_describe(
    describe: _BoxFeatures, images: ImageSource, resize: Any, request: _Request
) -> Described | str:
    images.check_here()
    return describe(_load(request, resize))


def _sound(described: Iterable[Described | str], strict: bool, broken: list[str]) -> Iterator[Described]:
    """What could be read; messages about broken images are put into a list."""
    for item in described:
        if not isinstance(item, str):
            yield item
        elif strict:
            raise ImageError(item)
        else:
            broken.append(item)


class _BoxFeatures:
    """Features (N, C) of an image's boxes: the mean over each box on a trunk's last map; messages pass."""

    def __init__(self, trunk: str, weights: str, device: torch.device) -> None:
        body, _ = build_trunk(trunk, strides=(8, 16, 32), weights=weights)
        self.body, self.device = body.eval(), device
        self.mean, self.std = normalisation(trunk)

    @torch.inference_mode()
    def __call__(self, item: tuple[int, Tensor, Tensor] | str) -> Described | str:
        if isinstance(item, str):
            return item
        index, image, boxes = item
        allow_tf32(self.device)
        self.body.to(self.device)  # here, because a machine of a cluster has GPUs of its own
        pixels = transforms.normalize(image.to(self.device).float() / 255, list(self.mean), list(self.std))
        features = trunk_features(self.body, pixels[None])[-1]
        stride = -(-image.shape[2] // 32) * 32 / features.shape[3]  # the trunk pads to whole multiples of 32
        cells = roi_align(
            features, [boxes.to(self.device)], _GRID, 1 / stride, sampling_ratio=2, aligned=True
        )
        return index, cells.mean((2, 3)).cpu().numpy()


def _take(features: Iterator[Described], sample: int) -> list[Described]:
    """The first images, until they have as many boxes together."""
    taken, count = [], 0
    for index, rows in features:
        taken.append((index, rows))
        count += len(rows)
        if count >= sample:
            break
    return taken if count else []
