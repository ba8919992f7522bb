"""The contrast features of labelled boxes in two dimensions (after the paper's figure 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.poolers import LevelMapper

from aligndet.boxes import BACKGROUND
from aligndet.data.coco import CocoDataset
from aligndet.data.labelled import LabelledDataset
from aligndet.evaluation.pretraining import Pair

try:
    from sklearn.manifold import TSNE
except ImportError as error:
    raise ImportError(f't-SNE needs scikit-learn: pip install "aligndet[report]" ({error})') from error

Floats = npt.NDArray[np.float64]
_FEWEST = 10  # points that t-SNE makes sense of


@dataclass(frozen=True)
class Embedded:
    """Boxes in two dimensions, by the features of a detector before and after pre-training."""

    before: Floats  # (N, 2)
    after: Floats  # (N, 2)
    classes: list[str]  # of each box
    levels: list[str]  # the pyramid level that two-stage detectors take a box of this size from


def embed_boxes(
    pair: Pair,
    coco: CocoDataset,
    *,
    min_size: int,
    max_size: int,
    classes: int = 3,
    boxes: int = 300,
    device: torch.device,
    seed: int = 0,
) -> Embedded:
    """Lays out the contrast features of labelled boxes in two dimensions.

    Args:
        pair: Of `aligndet.evaluation.pretraining.load_pretrainable`.
        coco: Labelled images.
        min_size: Their short side.
        max_size: Bound of the long side.
        classes: How many of the largest classes (paper: 3).
        boxes: Most of each class (paper: 5,000).
        device: To compute on.
        seed: Of t-SNE.

    Raises:
        ValueError: If there are too few boxes.
    """
    counts = np.bincount(np.concatenate([*coco.labels, np.array([0])]), minlength=len(coco.categories) + 1)
    chosen = np.argsort(-counts[1:], kind="stable")[:classes] + 1
    images = LabelledDataset(coco, min_size=(min_size, min_size), max_size=max_size)
    for adapter in pair:
        adapter.to(device).train()
        adapter.detector.backbone.body.eval()
    rows = []
    for item in _images(images, coco, chosen, boxes):
        pixels, drawn = item.image.to(device), item.boxes.to(device)
        (first, assigned), (second, assigned_too) = (box_features(adapter, pixels, drawn) for adapter in pair)
        rows.append((item.boxes, item.labels, first, second, assigned & assigned_too))
    if not rows:
        raise ValueError(f"{coco.folder}: there are no labelled boxes")
    drawn, labels, before, after, seen = (torch.cat(column) for column in zip(*rows, strict=True))
    own = seen[:, None] & (labels[:, None] == torch.from_numpy(chosen))  # (N, classes)
    kept = (own & (own.cumsum(0) <= boxes)).any(1)
    if int(kept.sum()) < _FEWEST:
        raise ValueError(
            f"{coco.folder}: {int(kept.sum())} boxes have features; at least {_FEWEST} are needed"
        )
    names = {position: category.name for position, category in enumerate(coco.categories, 1)}
    levels = LevelMapper(2, 5)([drawn[kept]]) + 2
    return Embedded(
        _laid_out(before[kept], seed),
        _laid_out(after[kept], seed),
        [names[label] for label in labels[kept].tolist()],
        [f"P{level}" for level in levels.tolist()],
    )


@torch.no_grad()
def box_features(adapter: nn.Module, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Treats boxes as proposals, and gives each the mean feature of the predictions that stand for it.

    Args:
        adapter: In the protocol of `PretrainableDetector`, in train mode: detectors assign nothing otherwise.
        image: (3, H, W) uint8.
        boxes: (N, 4) xyxy pixels.

    Returns:
        Means of features of unit length (N, D), and whether any prediction stands for the box (N,); on the
        CPU.
    """
    # mask heads need masks, which the contrast has no use for
    unused = (
        {"masks": [boxes.new_zeros(len(boxes), 1, 1)]} if "masks" in getattr(adapter, "needs", ()) else {}
    )
    stage = adapter([image.float() / 255], [boxes], **unused).stages[-1]
    assigned = stage.proposal_ids != BACKGROUND
    ids, embeddings = stage.proposal_ids[assigned], F.normalize(stage.embeddings[assigned].float(), dim=1)
    sums = embeddings.new_zeros(len(boxes), stage.embeddings.shape[1]).index_add_(0, ids, embeddings)
    counts = torch.bincount(ids, minlength=len(boxes))
    return (sums / counts.clamp(min=1)[:, None]).cpu(), (counts > 0).cpu()


def _images(
    images: LabelledDataset, coco: CocoDataset, classes: npt.NDArray[np.int64], boxes: int
) -> Iterator[Any]:
    """Images with boxes of the classes, until there are enough of each."""
    counts = np.zeros(len(classes), np.int64)
    for index, (labels, crowds) in enumerate(zip(coco.labels, coco.iscrowd, strict=True)):
        own = (labels[~crowds, None] == classes).sum(0)
        if (own[counts < boxes] > 0).any():
            counts += own
            yield images[index, 0]


def _laid_out(features: Tensor, seed: int) -> Floats:
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features.numpy())
