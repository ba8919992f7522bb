"""What the processes of a run exchange beside gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torchmetrics.utilities.distributed import gather_all_tensors

from aligndet.boxes import BACKGROUND, BoxPredictions

T = TypeVar("T")


@torch.no_grad()
def gather_other_boxes(*views: BoxPredictions) -> BoxPredictions:
    """Gathers the boxes of all other processes as negatives for this one's contrast.

    Every process has to call it; their numbers of boxes may differ.

    Args:
        views: The boxes of this process.

    Returns:
        The other processes' boxes of all views, without a graph; none in a run of one process. Their ids are
        BACKGROUND, since they stand for no proposal of this process's batch.
    """
    own = torch.cat([view.embeddings for view in views])
    found = [own[:0]]
    if _several():
        gathered = gather_all_tensors(own)
        here = distributed.get_rank()
        found += [embeddings for rank, embeddings in enumerate(gathered) if rank != here]
    embeddings = torch.cat(found)
    ids = torch.full((len(embeddings),), BACKGROUND, device=embeddings.device)
    return BoxPredictions(embeddings, ids)


@torch.no_grad()
def all_reduce_mean(value: Tensor) -> Tensor:
    """Averages numbers over the processes of the run; every process has to call it.

    Returns:
        The mean, the same in all of them; in a run of one process the value itself.
    """
    if not _several():
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def all_gather_items(items: Sequence[T]) -> list[T]:
    """Gathers the items of all processes; every process has to call it.

    Args:
        items: This process's, on the CPU: process r of w has the items r, r + w, ...

    Returns:
        All items in their order, the same in all processes; in a run of one process the items themselves.
    """
    if not _several():
        return list(items)
    parts: list[list[T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, list(items))
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
