"""Supervised fine-tuning of a plain detector (paper section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from aligndet.data.labelled import HostBatch, Labelled
from aligndet.detectors.trunks import first_stages
from aligndet.evaluation.coco import CocoEvaluator
from aligndet.training import TrainingModule


class Finetuning(TrainingModule):
    """Trains a detector on its own losses and measures average precision on the way."""

    def __init__(
        self,
        detector: nn.Module,
        *,
        evaluator: CocoEvaluator | None = None,
        freeze_batch_norm: bool = True,
        trunk_factor: float = 0.1,
        frozen_stages: int = 0,
        **training: Any,  # of TrainingModule
    ) -> None:
        super().__init__(**training)
        self.detector, self.evaluator, self.trunk_factor = detector, evaluator, trunk_factor
        if trunk_factor == 0:  # frozen as a whole: no gradient is made
            freeze_batch_norm = True
            self._trunk().requires_grad_(False)
        norms = (
            [m for m in self._trunk().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            if freeze_batch_norm
            else []
        )
        self._frozen = [*first_stages(self._trunk(), frozen_stages), *norms]
        for part in self._frozen:
            part.requires_grad_(False)
        self.train()  # Lightning leaves the modes as it finds them

    def train(self, mode: bool = True) -> Finetuning:
        """Keeps a frozen trunk, frozen stages and frozen batch norms in eval mode."""
        super().train(mode)
        if self.trunk_factor == 0:
            self._trunk().eval()
        for part in self._frozen:
            part.eval()
        return self

    def training_step(self, batch: list[Labelled], batch_idx: int) -> Tensor:
        """The detector's own losses."""
        images = [item.image.float() / 255 for item in batch]
        targets = [
            {"boxes": item.boxes, "labels": item.labels}
            | ({} if item.masks is None else {"masks": item.masks})
            for item in batch
        ]
        names = [item.file_name for item in batch]
        with self.naming(names):
            losses = self.detector(images, targets)
        return self.total_loss(losses, names)

    def validation_step(self, batch: HostBatch, batch_idx: int) -> None:
        """Collects predictions; images are moved to the device part by part, targets are wanted here."""
        if self.evaluator is None or not batch.items:
            return
        # masks of images of full size, so one after another
        parts = [[item] for item in batch.items] if self.evaluator.masks else [batch.items]
        for part in parts:
            found = self.detector([image.to(self.device).float() / 255 for image, _ in part])
            self.evaluator.update(found, [target for _, target in part])

    def on_validation_epoch_end(self) -> None:
        """Logs average precision."""
        if self.evaluator is not None:
            result = self.evaluator.compute()
            self.evaluator.reset()
            watched = ("AP", "AP50", "AP75", "mask_AP")
            figures = {f"val/{name}": result.figures[name] for name in watched if name in result.figures}
            self.log_dict(figures, prog_bar=True, sync_dist=False)
            self.log("val/images", float(result.images), sync_dist=False)

    def parameter_groups(self) -> list[tuple[Iterable[tuple[str, nn.Parameter]], float]]:
        """A smaller learning rate for the trunk."""
        trunk = {id(p) for p in self._trunk().parameters()}
        rest = [(name, p) for name, p in self.detector.named_parameters() if id(p) not in trunk]
        return [(rest, 1.0), (self._trunk().named_parameters(), self.trunk_factor)]

    def _trunk(self) -> nn.Module:
        return self.detector.backbone.body  # type: ignore[union-attr, return-value]
