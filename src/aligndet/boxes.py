"""The vocabulary that detectors, losses and training share: boxes, the proposal each stands for, and the
protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
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


def rows_of(matrix: Tensor, index: Tensor) -> Tensor:
    """Is ``matrix[index]``, whose gradient, too, is the same each time.

    Where a row occurs more than once, the threads of indexing add up its gradients in any order.

    Args:
        matrix: (N, C).
        index: (M,) int64.

    Returns:
        (M, C).
    """
    return F.embedding(index, matrix)


def as_targets(proposals: Sequence[Tensor], first: int = 0) -> list[dict[str, Tensor]]:
    """Turns proposals into torchvision's targets: the label of each is its index in the batch.

    Args:
        proposals: (N_i, 4) xyxy pixels of each image.
        first: Label of the batch's first proposal.

    Returns:
        For each image: boxes (N_i, 4), labels (N_i,) int64.
    """
    counts = [len(boxes) for boxes in proposals]
    labels = torch.arange(first, first + sum(counts), device=proposals[0].device).split(counts)
    return [{"boxes": boxes, "labels": label} for boxes, label in zip(proposals, labels, strict=True)]


class PretrainableDetector(Protocol):
    """What makes a detector pre-trainable: an ``nn.Module`` with three more members.

    A detector that needs more than the boxes of proposals names it in a tuple ``needs``, and gets it as
    further lists by keyword: "masks" (pseudo-masks) or "clusters" (pseudo-classes), see
    `aligndet.data.views.View`.

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
    """Base of `aligndet.detectors.build.DETECTORS`: what a detector may say about itself."""

    needs: tuple[str, ...] = ()  # beside the boxes of proposals: "masks", "clusters"
    copied_parameters: tuple[str, ...] = ()  # that the momentum copy takes over without averaging
    top_proposals = False  # takes the first proposals in rank order by default, not a random subset
    num_clusters: int | None = None  # how many pseudo-classes it tells apart, if any
    masks = False  # whether it finds masks as well as boxes
    square = False  # whether it sees images stretched to squares of their short side, however long they are
    weights_format = "torchvision"  # of saved weights; or "transformers"
    training_defaults: ClassVar[dict[str, float]] = {}  # for AdamW: learning_rate, weight_decay, clip
    fixed_options: frozenset[str] = frozenset()  # options of torchvision's detector that users cannot set

    @classmethod
    def long_side(cls, min_size: tuple[int, int], max_size: int) -> int:
        """Bound of the long side of images to learn from.

        It would make squares smaller in training than in prediction, so these have one for panoramas alone.

        Args:
            min_size: Smallest and largest short side.
            max_size: The bound that was asked for.
        """
        return max(max_size, 4 * min_size[1]) if cls.square else max_size

    @classmethod
    def shared_options(cls) -> frozenset[str]:
        """Options that change the plain detector: fine-tuning needs the same as pre-training."""
        return frozenset()
