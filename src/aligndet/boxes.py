"""The vocabulary that detectors, losses and training share: boxes, the proposal each stands for, and the
protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

BACKGROUND = -1
"""The proposal id of a box that stands for no proposal (the empty set of the paper's section 3.2)."""


class BoxPredictions(NamedTuple):
    """The boxes of one view and one stage, as the contrastive loss sees them."""

    embeddings: Tensor  # (M, D) projected, not normalised
    proposal_ids: Tensor  # (M,) int64 index into the batch's proposals, or BACKGROUND
    weight: float = 1.0  # of this stage in the contrastive loss


class PretrainOutput(NamedTuple):
    """What a pre-trainable detector returns for one view of a batch."""

    stages: tuple[BoxPredictions, ...]  # one; Cascade R-CNN three; CBNet v2 six
    losses: dict[str, Tensor]  # the detector's own box losses: scalars, already weighted


def wants_losses() -> bool:
    """The momentum detector runs without a graph; its losses would be thrown away."""
    return torch.is_grad_enabled()


def as_targets(proposals: Sequence[Tensor], first: int = 0) -> list[dict[str, Tensor]]:
    """Makes torchvision's targets of proposals: the label of each is its index in the batch.

    Args:
        proposals: (N_i, 4) xyxy pixels of each image.
        first: Label of the batch's first proposal.

    Returns:
        Of each image: boxes (N_i, 4), labels (N_i,) int64.
    """
    counts = [len(boxes) for boxes in proposals]
    labels = torch.arange(first, first + sum(counts), device=proposals[0].device).split(counts)
    return [{"boxes": boxes, "labels": label} for boxes, label in zip(proposals, labels, strict=True)]


class PretrainableDetector(Protocol):
    """Three members make a detector pre-trainable; it is an ``nn.Module`` that also has them.

    A detector that wants to know more of its proposals names it in a tuple ``needs`` and gets it as further
    lists by keyword: "masks" (pseudo-masks) or "clusters" (pseudo-classes), see `aligndet.data.views.View`.

    Attributes:
        detector: The plain detector that `export` saves; ``detector.backbone.body`` is its trunk.
        prediction_layers: Names (prefixes in ``detector``'s state dict) that the export leaves out.
    """

    detector: nn.Module
    prediction_layers: tuple[str, ...]

    def __call__(self, images: list[Tensor], proposals: list[Tensor]) -> PretrainOutput:
        """Assigns proposals to predicted boxes and embeds them.

        Where no graph is built (`wants_losses`), ``losses`` may be empty.

        Args:
            images: Of shape (3, H_i, W_i) each, in [0, 1].
            proposals: Of shape (N_i, 4) each, xyxy pixels of ``images[i]``, N_i >= 0.
        """
        ...


class Adapter(nn.Module):
    """A detector of `aligndet.detectors.build.DETECTORS`; below is what it may say of itself."""

    needs: tuple[str, ...] = ()  # to know of its proposals: "masks", "clusters"
    copied_parameters: tuple[str, ...] = ()  # of the momentum copy: copied, not averaged
    top_proposals = False  # the first in rank order by default, not a random subset
    num_clusters: int | None = None  # pseudo-classes that it tells apart
    masks = False  # it finds masks as well as boxes
    weights_format = "torchvision"  # whose names and files its weights have, or "transformers"
    training_defaults: ClassVar[dict[str, float]] = {}  # of AdamW: learning_rate, weight_decay, clip
    fixed_options: frozenset[str] = frozenset()  # of torchvision's detector that cannot be chosen

    @classmethod
    def shared_options(cls) -> frozenset[str]:
        """Options that change the plain detector, so that fine-tuning needs those of pre-training."""
        return frozenset()
