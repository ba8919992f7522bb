"""Image-domain pre-training of a trunk without labels: SimSiam and MoCo v2 (paper section 3, step 1).

Heads, losses, queue and augmentations are lightly's; the order of the data, the optimizer and the momentum
copy are those of box-domain pre-training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.data.crops import TwoCrops
from aligndet.data.labelled import HostBatch
from aligndet.detectors.trunks import trunk_features
from aligndet.momentum import cosine_decay, momentum_copy, update_momentum
from aligndet.processes import all_gather_items
from aligndet.training import TrainingModule

try:
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss
    from lightly.models.modules import MoCoProjectionHead, SimSiamPredictionHead, SimSiamProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle
    from lightly.transforms.moco_transform import MoCoV2Transform
    from lightly.transforms.simsiam_transform import SimSiamTransform
    from lightly.utils.benchmarking import knn_predict
    from lightly.utils.debug import std_of_l2_normalized
except ImportError as error:
    raise ImportError(
        f'image-domain pre-training needs lightly: pip install "aligndet[backbone]" ({error})'
    ) from error

COLLAPSED = 0.1
"""Below this share of a healthy spread, embeddings of different images are nearly the same."""


class Encoder(nn.Module):
    """A trunk, the mean over its last map, and a projection head."""

    def __init__(self, trunk: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.trunk, self.projection = trunk, projection

    def forward(self, images: Tensor) -> Tensor:
        """Returns embeddings, (B, D), not normalised."""
        return self.projection(self.pooled(images))

    def pooled(self, images: Tensor) -> Tensor:
        """Returns the trunk's own features, (B, C)."""
        return trunk_features(self.trunk, images)[-1].mean((2, 3))


class ImagePretraining(TrainingModule):
    """What both methods share: two crops in, a loss out, figures of collapse and of neighbours."""

    transform: Any  # lightly's class of augmentations
    sgd_learning_rate: float  # in the method's paper, for 256 images a step

    def __init__(self, encoder: Encoder, *, patience: int = 100, **training: Any) -> None:
        super().__init__(**training)
        self.encoder, self.patience = encoder, patience
        self._low_steps = 0
        self._seen: list[tuple[Tensor, int]] = []  # feature (D,) and class of each image

    def loss_and_embeddings(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the method's loss of two crops of each image, and embeddings to watch.

        Args:
            first: (B, 3, S, S).
            second: Likewise.
        """
        raise NotImplementedError

    def training_step(self, batch: list[TwoCrops], batch_idx: int) -> Tensor:
        """One step of the method."""
        loss, embeddings = self.loss_and_embeddings(
            torch.stack([item.first for item in batch]), torch.stack([item.second for item in batch])
        )
        spread = std_of_l2_normalized(embeddings.detach().float())
        share = float(spread) * embeddings.shape[1] ** 0.5  # healthy: 1 / sqrt(D) (SimSiam, section 4.1)
        self.log_dict({"embeddings/std": spread, "embeddings/std_of_healthy": share})
        self._watch(share)
        return self.total_loss({"contrast": loss}, [item.file_name for item in batch])

    def _watch(self, share: float) -> None:
        self._low_steps = self._low_steps + 1 if share < COLLAPSED else 0
        if self._low_steps == self.patience and self.global_rank == 0:
            print(
                f"warning: for {self.patience} steps until step {self.global_step}, embeddings of different"
                f" images have been nearly the same (spread {share:.3f} of a healthy 1): the trunk collapses;"
                " take larger batches, another learning rate or the other method"
            )

    def validation_step(self, batch: HostBatch, batch_idx: int) -> None:
        """Collects features of images that have a class."""
        if batch.items:
            images, labels = zip(*batch.items, strict=True)
            pooled = self.encoder.pooled(torch.stack(images).to(self.device))
            features = F.normalize(pooled.float(), dim=1)
            # copies: a view would be sent to other processes with the whole table behind it
            self._seen += [(row.clone(), label) for row, label in zip(features.cpu(), labels, strict=True)]

    def on_validation_epoch_end(self) -> None:
        """Logs the accuracy of nearest neighbours, and the share of the largest class to compare it with."""
        seen = all_gather_items(self._seen)
        self._seen.clear()
        if len(seen) > 1:
            rows, classes = zip(*seen, strict=True)
            features = torch.stack(rows).to(self.device)
            labels = torch.tensor(classes, device=self.device)
            self.log("knn/accuracy", knn_accuracy(features, labels), prog_bar=True)
            self.log("knn/largest_class", labels.bincount().max() / len(labels))


class SimSiam(ImagePretraining):
    """One crop's embedding predicts the other's, which passes no gradient; no negatives."""

    transform = SimSiamTransform
    sgd_learning_rate = 0.05

    def __init__(self, trunk: nn.Module, channels: int, **settings: Any) -> None:
        super().__init__(Encoder(trunk, SimSiamProjectionHead(channels, 2048, 2048)), **settings)
        self.predictor = SimSiamPredictionHead(2048, 512, 2048)
        self.similarity = NegativeCosineSimilarity()
        self.train()  # Lightning leaves the modes as it finds them

    def loss_and_embeddings(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts each crop's embedding from the other's; the target is detached."""
        ours, theirs = self.encoder(first), self.encoder(second)
        there = self.similarity(self.predictor(ours), theirs.detach())
        back = self.similarity(self.predictor(theirs), ours.detach())
        return (there + back) / 2, ours


class MoCo(ImagePretraining):
    """An embedding has to find the momentum encoder's of the other crop among a queue of earlier ones."""

    transform = MoCoV2Transform
    sgd_learning_rate = 0.03

    def __init__(
        self,
        trunk: nn.Module,
        channels: int,
        *,
        temperature: float = 0.2,
        decay: float = 0.99,
        queue: int = 4096,
        processes: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(Encoder(trunk, MoCoProjectionHead(channels, 2048, 128)), **settings)
        self.momentum = momentum_copy(self.encoder)
        self.decay, self.several = decay, processes > 1
        # all processes have the same queue, so all can go on with what the first one saves
        self.contrast = NTXentLoss(temperature, (queue, 128), gather_distributed=self.several)
        self.train()

    def loss_and_embeddings(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of the first crops, keys of the second; the keys then join the queue."""
        queries = self.encoder(first)
        with torch.no_grad():
            if self.several:  # batch norms must not tell which images came together (MoCo, section 3.3)
                second, order = batch_shuffle(second, distributed=True)
                keys = batch_unshuffle(self.momentum(second), order, distributed=True)
            else:
                keys = self.momentum(second)
        return self.contrast(queries, keys), queries

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Updates the momentum encoder after every step of the optimizer."""
        super().optimizer_step(*args, **kwargs)
        update_momentum(self.encoder, self.momentum, cosine_decay(self.global_step, self.steps, self.decay))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the queue, which lightly does not count as part of the state."""
        bank = self.contrast.memory_bank
        checkpoint["queue"] = {"bank": bank.bank, "bank_ptr": bank.bank_ptr}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the queue."""
        for name, value in checkpoint["queue"].items():
            getattr(self.contrast.memory_bank, name).copy_(value)


METHODS: dict[str, type[SimSiam] | type[MoCo]] = {"simsiam": SimSiam, "moco": MoCo}


def knn_accuracy(features: Tensor, labels: Tensor) -> float:
    """Accuracy of a weighted vote of the 20 nearest neighbours: every second image is classified by the
    others.

    Args:
        features: (N, C) normalised.
        labels: (N,) from 0.
    """
    bank, voters = features[::2].T, labels[::2]
    classes, right = int(labels.max()) + 1, 0
    for asked, truth in zip(features[1::2].split(256), labels[1::2].split(256), strict=True):
        ranks = knn_predict(asked, bank, voters, classes, knn_k=min(20, len(voters)), knn_t=0.1)
        right += int((ranks[:, 0] == truth).sum())
    return right / len(labels[1::2])
