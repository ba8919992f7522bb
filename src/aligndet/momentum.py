"""The momentum detector: a copy that shares the frozen trunk and follows the online one (paper section
3.2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Module = TypeVar("Module", bound=nn.Module)


def momentum_copy(online: Module, shared: nn.Module | None = None) -> Module:
    """Copies a detector without gradients.

    Args:
        online: The detector to copy.
        shared: A submodule that both keep in common (the frozen trunk): no second copy in memory.

    Returns:
        The copy, in the same train or eval mode. torchvision's dense detectors ignore targets in eval mode,
        so the copy has to stay in train mode.
    """
    momentum = copy.deepcopy(online, {} if shared is None else {id(shared): shared})
    for source, target in zip(online.parameters(), momentum.parameters(), strict=True):
        if target is not source:
            target.requires_grad_(False)
    return momentum


def cosine_decay(step: int, steps: int, start: float = 0.996) -> float:
    """The coefficient of the moving average: from `start` to 1 along half a cosine.

    Args:
        step: Number of the step, from 0.
        steps: Length of the run.
        start: Value at step 0.
    """
    return 1.0 - (1.0 - start) * (1.0 + math.cos(math.pi * min(step, steps) / max(steps, 1))) / 2.0


def decay_for(steps: int) -> float:
    """Where the coefficient starts by default: at the official code's 0.996, or lower in short runs.

    With `cosine_decay`, the momentum detector keeps exp(-(1 - decay) * steps / 2) of its random start.
    Starting at 0.996, 150 steps would keep 74 % of the random start; this rule keeps exp(-7.5).
    """
    return max(0.0, min(0.996, 1.0 - 15.0 / steps))


@torch.no_grad()
def update_momentum(
    online: nn.Module, momentum: nn.Module, decay: float, copied: Collection[str] = frozenset()
) -> None:
    """Moves every momentum parameter towards the online one: ``m = decay * m + (1 - decay) * o``.

    Parameters only: buffers (batch norm statistics) stay each detector's own. Shared parameters are left
    alone.

    Args:
        online: The trained detector.
        momentum: Its `momentum_copy`.
        decay: In [0, 1].
        copied: Names of parameters that are copied instead of averaged (DETR's query embeddings).
    """
    averaged: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for (name, source), target in zip(online.named_parameters(), momentum.parameters(), strict=True):
        if target is source:
            continue
        if name in copied:
            target.copy_(source)
        else:
            averaged[0].append(target)
            averaged[1].append(source)
    if averaged[0]:
        get_ema_multi_avg_fn(decay)(*averaged, 0)
