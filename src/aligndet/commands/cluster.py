"""`aligndet cluster`: pseudo-classes of proposals, once and offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from aligndet.commands._settings import check_bounds, provenance
from aligndet.data.augmentations import multiscale
from aligndet.data.images import ImageError, StoredImage, check_shape, read_image
from aligndet.data.sources import ImageSource
from aligndet.detectors.trunks import build_trunk, normalisation, trunk_features
from aligndet.evaluation.inference import allow_tf32, resolve_device
from aligndet.files import accepts_strings, check_writable, print_skipped
from aligndet.proposals.clusters import (
    FeatureClusters,
    PartialClusters,
    check_installed,
    clusters_file,
    digest,
    partial_file,
    write_clusters,
)
from aligndet.proposals.engines import Engine, check_engine, run
from aligndet.proposals.storage import read_proposals
from aligndet.proposals.table import ProposalTable
from aligndet.workers import worker_settings

_GRID = 7  # cells of a box whose features are averaged, as RoI heads have them
_WRITE_EVERY = 300.0  # seconds: what is lost at most where the command is stopped


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
    the proposals, where a detector needs it. The same command goes on where it was stopped, from
    a file .partial that is written there every five minutes once the sample is grouped, and looks at broken
    images once more.

    Args:
        images: Folder of images, or an address; see `aligndet pretrain --help`.
        proposals: What `aligndet propose` has written for them, or a COCO-style JSON of boxes.
        trunk: Whose features to take, by name; see `aligndet pretrain --help`.
        trunk_weights: "default" (ImageNet, downloaded), "bundled", "none", or a file, likewise.
        clusters: Pseudo-classes; fewer where there are less than ten proposals for each.
        components: Principal components; fewer where there are less features or proposals.
        sample: Proposals that components and clusters are found on, of images drawn at random; the others
            are only assigned.
        min_size: Images are resized to this short side. Keep it large where pre-training sees smaller images:
            clusters know no more than the features of a box do.
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
    check_installed()
    if clusters_file(proposals).exists() and not overwrite:
        raise ValueError(f"{clusters_file(proposals)}: is there already; give --overwrite to replace it")
    table = read_proposals(proposals)
    if not len(table.boxes):
        raise ValueError(f"{proposals}: holds no box in any of its {len(table)} images: nothing to group")
    check_writable(clusters_file(proposals).parent)
    source = ImageSource(images)
    source.prepare(table.file_names, proposals)
    torch.manual_seed(seed)  # a trunk without weights is a random one
    describe = _BoxFeatures(trunk, trunk_weights, resolve_device(device, elsewhere=engine == "ray"))
    boxes = _Boxes(source.absolute(), table, min_size, max_size)
    on_gpu = describe.device.type == "cuda"
    stream = partial(_stream, boxes, strict, engine, workers, ray_address, on_gpu)
    order = np.random.default_rng(seed).permutation(len(table)).tolist()
    decides = {name: settings[name] for name in ("clusters", "components", "sample", "seed")}
    decides |= {"sizes": [min_size, max_size], "trunk": describe.fingerprint(), "proposals": digest(table)}
    begun = partial_file(proposals)
    state, again = PartialClusters.read(begun, decides), list[int]()
    if state is not None:
        again = list(state.broken)  # they may be readable by now
    else:
        drawn, done, broken = _sample(partial(stream, describe), order, np.diff(table.offsets), sample)
        if not any(len(rows) for _, rows in drawn):
            first = next(iter(broken.values()))
            raise ImageError(f"{images}: none of {done} images can be read; the first: {first}")
        features = np.concatenate([rows for _, rows in drawn])
        group = FeatureClusters.fit(features, clusters=clusters, components=components, seed=seed)
        state = PartialClusters(group, np.zeros(len(table.boxes), np.int32), done, broken)
        for index, rows in drawn:
            state.found[slice(*table.offsets[index : index + 2])] = group(rows)
        state.write(begun, decides)
    written, rest = monotonic(), [*again, *order[state.done :]]
    items = zip(rest, stream(partial(_assign, describe, state.group), rest), strict=True)
    progress = tqdm(items, total=len(order), initial=len(order) - len(rest), desc="cluster", unit="image")
    for number, (position, item) in enumerate(progress):
        state.done += number >= len(again)
        if isinstance(item, str):
            state.broken[position] = item
        else:
            state.broken.pop(position, None)
            state.found[slice(*table.offsets[position : position + 2])] = item[1]
        if monotonic() - written > _WRITE_EVERY:
            state.write(begun, decides)
            written = monotonic()
    path = write_clusters(
        proposals,
        table,
        state.found,
        {
            "clusters": len(state.group.centres),
            "components": len(state.group.components),
            "skipped": list(state.broken.values()),
            "settings": settings,
            **provenance(),
        },
    )
    begun.unlink(missing_ok=True)
    print_skipped(state.broken.values())
    print(
        f"{len(state.found)} proposals in {len(state.group.centres)} clusters, {len(state.broken)} images"
        f" skipped: {path}"
    )
    return path


Loaded = tuple[int, Tensor, Tensor]
"""Position of an image, the image (3, H, W) uint8 and its boxes (N, 4), resized."""
Described = tuple[int, npt.NDArray[np.float32]]
"""Position of an image, and the features (N, C) of its boxes."""


def _sample(
    stream: Callable[[list[int]], Iterator[Described | str]],
    order: list[int],
    counts: npt.NDArray[np.int64],
    sample: int,
) -> tuple[list[Described], int, dict[int, str]]:
    """Features of the first images that have so many boxes, how many images that took, and broken ones."""
    done, left = 0, sample
    drawn: list[Described] = []
    broken: dict[int, str] = {}
    with tqdm(total=min(sample, int(counts.sum())), desc="sample", unit="box") as bar:
        while left > 0 and done < len(order):
            enough = 1 + int(np.searchsorted(counts[order[done:]].cumsum(), left))
            images = order[done : done + enough]
            for position, item in zip(images, stream(images), strict=True):
                if isinstance(item, str):
                    broken[position] = item
                    continue
                drawn.append(item)
                left -= len(item[1])
                bar.update(len(item[1]))
            done += len(images)
    return drawn, done, broken


class _Request(NamedTuple):
    """An image and its boxes, as the table has them."""

    position: int
    image: Path | StoredImage
    size: npt.NDArray[np.int32]  # (2,) width, height when the proposals were made
    boxes: npt.NDArray[np.float32]  # (N, 4)


class _Boxes(Dataset[Any]):
    """Images and their boxes; in the place of a broken one, why."""

    def __init__(self, images: ImageSource, table: ProposalTable, min_size: int, max_size: int) -> None:
        self.images, self.table = images, table
        self.resize = multiscale((min_size, min_size), max_size, flip=0.0)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Loaded | str:
        return _load(self.request(index), self.resize)

    def request(self, index: int) -> _Request:
        image = self.images / self.table.file_names[index]
        return _Request(index, image, self.table.sizes[index], self.table.boxes_of(index))


def _load(request: _Request, resize: Any) -> Loaded | str:
    try:
        image = read_image(request.image)
        check_shape(image, request.size, request.image)
    except ImageError as error:
        return str(error)
    image = resize(image)
    size = torch.tensor([image.shape[2], image.shape[1]]) / torch.from_numpy(request.size)
    return request.position, image, torch.from_numpy(request.boxes) * size.repeat(2)


def _stream(
    boxes: _Boxes,
    strict: bool,
    engine: Engine,
    workers: int,
    address: str | None,
    on_gpu: bool,
    do: Callable[[Loaded], Any],
    order: list[int],
) -> Iterator[Any]:
    """What is done to images, in order; in the place of a broken one, why."""
    if not order:
        return
    if engine == "ray":
        results = run(
            partial(_read_and_do, do, boxes.images, boxes.resize),
            map(boxes.request, order),
            engine="ray",
            workers=workers or None,
            gpus=float(on_gpu),
            address=address,
        )
    else:
        loader = DataLoader(boxes, batch_size=None, sampler=order, **worker_settings(workers))
        results = (loaded if isinstance(loaded, str) else do(loaded) for loaded in loader)
    with closing(results):
        for result in results:
            if strict and isinstance(result, str):
                raise ImageError(result)
            yield result


def _read_and_do(do: Callable[[Loaded], Any], images: ImageSource, resize: Any, request: _Request) -> Any:
    images.check_here()
    loaded = _load(request, resize)
    return loaded if isinstance(loaded, str) else do(loaded)


class _BoxFeatures:
    """Features (N, C) of an image's boxes: the mean over each box on a trunk's last map."""

    def __init__(self, trunk: str, weights: str, device: torch.device) -> None:
        body: Any = build_trunk(trunk, strides=(8, 16, 32), weights=weights, any_patch=True)[0]
        self.body, self.device = body.eval(), device
        self.stride = body.feature_info.reduction()[-1] if hasattr(body, "feature_info") else 32
        self.mean, self.std = normalisation(trunk)

    def fingerprint(self) -> str:
        """Of the weights (CRC-32)."""
        return f"{crc32(save(self.body.state_dict())):08x}"

    @torch.inference_mode()
    def __call__(self, loaded: Loaded) -> Described:
        index, image, boxes = loaded
        allow_tf32(self.device)
        self.body.to(self.device)  # here, because a machine of a cluster has GPUs of its own
        pixels = transforms.normalize(image.to(self.device).float() / 255, list(self.mean), list(self.std))
        features = trunk_features(self.body, pixels[None])[-1]
        cells = roi_align(
            features, [boxes.to(self.device)], _GRID, 1 / self.stride, sampling_ratio=2, aligned=True
        )
        return index, cells.mean((2, 3)).cpu().numpy()


def _assign(
    describe: _BoxFeatures, group: FeatureClusters, loaded: Loaded
) -> tuple[int, npt.NDArray[np.int32]]:
    """Position of an image, and the clusters (N,) of its boxes."""
    index, features = describe(loaded)
    return index, group(features)
