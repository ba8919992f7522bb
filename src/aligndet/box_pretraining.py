"""Box-domain pre-training: the algorithm of AlignDet (paper section 3.2, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.boxes import BACKGROUND, BoxPredictions, PretrainOutput
from aligndet.data.views import TwoViews, View
from aligndet.detectors.folding import folded
from aligndet.losses import box_contrastive_loss
from aligndet.momentum import cosine_decay, decay_for, momentum_copy, update_momentum
from aligndet.processes import gather_other_boxes
from aligndet.training import TrainingModule


class BoxPretraining(TrainingModule):
    """Trains everything but the trunk to tell proposals apart and to find their boxes."""

    def __init__(
        self,
        online: Any,
        *,
        temperature: float = 0.5,
        gather_keys: bool = False,
        decay: float | None = None,
        contrast_weight: float = 1.0,
        box_weight: float = 1.0,
        train_trunk: bool = False,
        **training: Any,  # for TrainingModule: steps, optimizer, learning_rate, schedule, seed, ...
    ) -> None:
        super().__init__(**training)
        self.online = online  # an nn.Module in the protocol of PretrainableDetector
        self.needs: tuple[str, ...] = getattr(online, "needs", ())
        self.trunk: nn.Module = online.detector.backbone.body
        self.trunk.requires_grad_(train_trunk)
        self.train_trunk = train_trunk
        self.momentum = momentum_copy(self.online, None if train_trunk else self.trunk)
        self.temperature = temperature
        self.decay = decay_for(self.steps) if decay is None else decay
        self.contrast_weight, self.box_weight = contrast_weight, box_weight
        self.gather_keys = gather_keys  # negatives come from all processes, not from this one alone
        self.train()  # Lightning leaves the modes as it finds them

    def train(self, mode: bool = True) -> BoxPretraining:
        """Keeps the frozen trunk in eval mode (also its batch norms)."""
        super().train(mode)
        if not self.train_trunk:
            self.trunk.eval()
        return self

    def on_train_start(self) -> None:
        """Runs the frozen trunk with its batch norms folded; names and weights stay as they are."""
        if not self.train_trunk:
            self.trunk.forward = folded(self.trunk).forward

    def training_step(self, batch: list[TwoViews], batch_idx: int) -> Tensor:
        """One step of algorithm 1; the update of the momentum detector follows in `optimizer_step`."""
        names = [item.file_name for item in batch]
        # first, so that it needs no memory beside the online view's graph
        with self.naming(names), torch.no_grad():
            views = [item.momentum for item in batch]
            momentum: PretrainOutput = self.momentum(**_inputs(views, self.needs))
        with self.naming(names):
            online: PretrainOutput = self.online(**_inputs([item.online for item in batch], self.needs))
        contrast = torch.stack(
            [self._contrast(stage, keys) for stage, keys in zip(online.stages, momentum.stages, strict=True)]
        ).sum()
        losses = {"contrast": self.contrast_weight * contrast}
        losses |= {name: self.box_weight * loss for name, loss in online.losses.items()}
        self.log_dict(_statistics(batch, online.stages[-1], momentum.stages[-1]))
        return self.total_loss(losses, names)

    def _contrast(self, online: BoxPredictions, momentum: BoxPredictions) -> Tensor:
        """The weighted contrastive loss of one stage."""
        others = gather_other_boxes(online, momentum) if self.gather_keys else None
        return online.weight * box_contrastive_loss(online, momentum, self.temperature, others)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Updates the momentum detector after every step of the optimizer."""
        super().optimizer_step(*args, **kwargs)
        decay = cosine_decay(self.global_step, self.steps, self.decay)
        update_momentum(self.online, self.momentum, decay, getattr(self.online, "copied_parameters", ()))


def _inputs(views: Sequence[View], needs: tuple[str, ...]) -> dict[str, list[Tensor]]:
    images = [view.image.float() / 255 for view in views]
    return {"images": images} | {name: [getattr(v, name) for v in views] for name in ("proposals", *needs)}


@torch.no_grad()
def _statistics(
    batch: list[TwoViews], online: BoxPredictions, momentum: BoxPredictions
) -> dict[str, Tensor | float]:
    """Figures to watch: the spread of embeddings starts near 1; at 0 they are all the same."""
    found = [
        torch.unique(stage.proposal_ids[stage.proposal_ids != BACKGROUND]) for stage in (online, momentum)
    ]
    proposals = sum(len(item.online.proposals) for item in batch)
    directions = F.normalize(online.embeddings.float(), dim=1)
    spread = (directions.var(0, unbiased=False).sum()).sqrt() if len(directions) else directions.sum()
    return {
        "boxes/assigned": float((online.proposal_ids != BACKGROUND).sum()),
        "boxes/background": float((online.proposal_ids == BACKGROUND).sum()),
        "proposals/in_batch": float(proposals),
        "proposals/in_both_views": torch.isin(found[0], found[1]).sum() / max(1, proposals),
        "embedding_spread": spread,
    }
