"""Query-based detectors, made pre-trainable: one adapter for all that transformers has.

transformers' own ``forward(labels=...)`` gives each family's losses over all decoder layers, with
pseudo-classes (clusters of the proposals' trunk features) in the place of classes. The family's own matcher,
applied to the outputs of every layer, then says which proposal a query stands for, and a projection head
beside the class layer embeds the queries (paper section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from aligndet.boxes import BACKGROUND, Adapter, BoxPredictions, PretrainOutput, wants_losses
from aligndet.detectors.backbones import PyramidNorm
from aligndet.detectors.projection import ProjectionHead
from aligndet.detectors.query_detector import QueryDetector, QueryTrunk, relative_targets
from aligndet.detectors.query_families import Family, from_transformers, settings_of
from aligndet.detectors.trunks import build_timm_trunk
from aligndet.detectors.windowed import build_windowed_vit

Matches: TypeAlias = list[tuple[Tensor, Tensor]]
"""Of each image: which queries stand for which of its proposals, on the CPU."""


class QueryPretraining(Adapter):
    """A query-based detector in the protocol of `PretrainableDetector`; see `query_pretraining`.

    Every decoder layer is a stage of the contrast, as every layer has losses of its own in these detectors;
    the contrast is their mean.
    """

    family: ClassVar[Family]
    weights_format = "transformers"
    training_defaults: ClassVar = {"learning_rate": 1e-4, "weight_decay": 1e-4, "clip": 0.1}  # DETR's
    top_proposals = True  # the first in rank order, not a random subset: each takes a query

    def __init__(
        self,
        backbone: QueryTrunk,
        *,
        image_mean: list[float],
        image_std: list[float],
        embedding_dim: int = 128,
        num_clusters: int = 256,
        objectness: bool = False,
        **settings: Any,
    ) -> None:
        """Builds detector and projection head.

        Args:
            backbone: Of `QueryPretraining.backbone`.
            image_mean: Of the trunk's images.
            image_std: Likewise.
            embedding_dim: Of the contrast.
            num_clusters: Pseudo-classes that the class layer tells apart.
            objectness: The plain variant: the class layer tells objects from background alone, and
                only the contrast tells objects from each other. No clusters are needed then.
            settings: Of transformers' configuration, such as ``num_queries``; they are the fine-tuned
                detector's, too.
        """
        super().__init__()
        self.needs: tuple[str, ...] = () if objectness else ("clusters",)
        self.num_clusters = 1 if objectness else num_clusters
        # no queries that are noisy copies of the targets; fine-tuning has them again
        no_noise = {"num_denoising": 0} if "num_denoising" in settings_of(self.family) else {}
        self.detector = QueryDetector(
            self.family,
            backbone,
            self.num_clusters,
            image_mean=image_mean,
            image_std=image_std,
            settings={**settings, **no_noise},
        )
        # With one class, the encoder's query-selection score is class-independent, so fine-tuning keeps it.
        kept = self.family.encoder_score if objectness else None
        self.prediction_layers = tuple(layer for layer in self.family.class_layers if layer != kept)
        self.copied_parameters = tuple(f"detector.network.{name}" for name in self.family.queries)
        self.projection_head = ProjectionHead(backbone.width, embedding_dim)
        self.matcher = _matcher(self.family, self.detector.network.config)

    @classmethod
    def shared_options(cls) -> frozenset[str]:
        """Names of the settings that pre-training and fine-tuning share."""
        return settings_of(cls.family)

    @classmethod
    def backbone(cls, trunk: str, trunk_weights: str, fpn_channels: int, fpn_norm: PyramidNorm) -> QueryTrunk:
        """Builds the trunk of this family; fpn_channels is the width of encoder and decoder."""
        if fpn_norm != "none":
            raise ValueError(f"query-based detectors have no feature pyramid: no fpn_norm={fpn_norm!r}")
        if cls.family.windowed:
            return QueryTrunk(*build_windowed_vit(trunk, trunk_weights), fpn_channels)
        built = build_timm_trunk(trunk, strides=cls.family.strides, weights=trunk_weights)
        return QueryTrunk(*built, fpn_channels)

    @classmethod
    def plain(
        cls,
        backbone: QueryTrunk,
        num_classes: int,
        *,
        image_mean: list[float],
        image_std: list[float],
        min_size: int = 800,
        max_size: int = 1333,
        _skip_resize: bool = False,
        **settings: Any,
    ) -> QueryDetector:
        """Builds the detector of fine-tuning and prediction; num_classes counts the background."""
        return QueryDetector(
            cls.family,
            backbone,
            num_classes - 1,
            image_mean=image_mean,
            image_std=image_std,
            min_size=min_size,
            max_size=max_size,
            resize_in_training=not _skip_resize,
            settings=settings,
        )

    def forward(
        self, images: list[Tensor], proposals: list[Tensor], clusters: list[Tensor] | None = None
    ) -> PretrainOutput:
        """Matches queries to proposals, layer by layer, and embeds them."""
        if clusters is None:
            clusters = [
                torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device) for boxes in proposals
            ]
        labels = [relative_targets(*target) for target in zip(images, proposals, clusters, strict=True)]
        network, learns = self.detector.network, wants_losses()
        with (
            decoder_states(network.model) as recorded,
            matches(network, type(self.matcher)) if learns else without_losses(network) as found,
        ):
            outputs = self.detector.run(images, labels)
        states = recorded[0].movedim(self.family.layer_dim, 0).flatten(1, 2)  # (L, B * Q, C)
        if learns:  # the loss matches the last layer first, then the others in order
            last, *others = found[: len(states)]
            found = [*others, last]
        else:
            found = [self._match(layer, labels) for layer in self._layers(outputs, len(states))]
        ids = proposal_ids(found, labels, states.shape[1])  # (L, B * Q)
        stages = self._stages(states, ids.to(states.device), len(images))
        return PretrainOutput(stages, self.detector.losses(outputs, labels) if learns else {})

    def _stages(self, states: Tensor, ids: Tensor, images: int) -> tuple[BoxPredictions, ...]:
        """Embeds the queries (L, B * Q, C) of all layers; only those that stand for a proposal have a graph,
        as the loss has no gradient for others. Of RF-DETR's groups, the background is that of the first.
        """
        stands, weight = ids != BACKGROUND, 1.0 / len(ids)
        rests = ~stands
        if self.family.windowed:
            queries = torch.arange(ids.shape[1], device=ids.device) % (ids.shape[1] // images)
            rests &= queries < self.detector.network.config.num_queries
        own = self.projection_head(states[stands])
        with torch.no_grad():
            background = self.projection_head(states[rests])
        embeddings = own.new_zeros(*ids.shape, own.shape[1])
        embeddings[stands], embeddings[rests] = own, background
        layers = zip(embeddings, ids, stands | rests, strict=True)
        if self.family.windowed:
            return tuple(BoxPredictions(layer[kept], own[kept], weight) for layer, own, kept in layers)
        return tuple(BoxPredictions(layer, own, weight) for layer, own, _ in layers)

    def _layers(self, outputs: Any, count: int) -> list[Any]:
        """Class scores and boxes after each of the decoder's layers."""
        if not self.family.from_encoder:
            return [*outputs.auxiliary_outputs[: count - 1], outputs]
        # D-FINE has one prediction more, from before its first refinement
        logits = outputs.intermediate_logits.unbind(1)[-count:]
        boxes = outputs.intermediate_reference_points.unbind(1)[-count:]
        return [{"logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]

    def _match(self, layer: Any, labels: list[dict[str, Tensor]]) -> Matches:
        """Matches the queries of each image to its proposals, with the family's own matcher."""
        logits = layer["logits"].float()
        boxes = layer["pred_boxes"].float()
        if self.family.predicts_first:  # D-FINE's boxes may reach beyond the image, not in its losses
            boxes = boxes.clamp(0.0, 1.0)
        if not torch.isfinite(boxes).all():  # the matcher does not say what is wrong
            raise FloatingPointError("the predicted boxes are not finite")
        groups = () if not self.family.windowed else (self.detector.network.config.group_detr,)
        found: Matches = self.matcher({"logits": logits, "pred_boxes": boxes}, labels, *groups)
        return found


def query_pretraining(family: Family) -> Any:
    """The adapter of a family, a subclass of `QueryPretraining`.

    Args:
        family: One of `aligndet.detectors.query_families`.
    """
    members = {"family": family, "square": family.square}
    return type(f"{family.model}Pretraining", (QueryPretraining,), members)


def _matcher(family: Family, config: Any) -> nn.Module:
    matcher = from_transformers(family.matcher)
    if family.from_encoder:
        return matcher(config)
    return matcher(class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost)


@contextmanager
def decoder_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Records the states after each of the decoder's layers in one call; not all families return them.

    The hook is removed after the call: in a deep copy, it would still point to the original.

    Args:
        model: transformers' model below the prediction layers.

    Yields:
        A list that the call will add to: the stacked states of all layers.
    """
    states: list[Tensor] = []
    hook = model.register_forward_hook(lambda *call: states.append(call[2].intermediate_hidden_states))
    try:
        yield states
    finally:
        hook.remove()


def proposal_ids(found: Sequence[Matches], labels: list[dict[str, Tensor]], queries: int) -> Tensor:
    """The proposal that each query stands for.

    Args:
        found: Matches of each layer, on the CPU.
        labels: transformers' targets.
        queries: How many there are in the batch.

    Returns:
        (L, queries) int64 on the CPU; a proposal of the batch or BACKGROUND.
    """
    ids = torch.full((len(found), len(labels), queries // len(labels)), BACKGROUND)
    for layer, matched in zip(ids, found, strict=True):
        first = 0
        for image, (query, target), label in zip(layer, matched, labels, strict=True):
            image[query] = first + target
            first += len(label["boxes"])
    return ids.flatten(1)


@contextmanager
def matches(network: Any, matcher: type[nn.Module]) -> Iterator[list[Matches]]:
    """Records what transformers' losses match in one call; matching again would take as long.

    Args:
        network: transformers' model; called with labels inside.
        matcher: Class of its losses' matcher.

    Yields:
        A list that the call will add to: the last layer's matches, then those of the others in order.
    """
    found: list[Matches] = []

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, matcher):
            found.append(output)

    def watched(*call: Any, **others: Any) -> Any:
        # a hook on all modules: the loss builds a new matcher in each call
        hook = register_module_forward_hook(keep)
        try:
            return own(*call, **others)
        finally:
            hook.remove()

    own, network.loss_function = network.loss_function, watched
    try:
        yield found
    finally:
        network.loss_function = own


@contextmanager
def without_losses(network: Any) -> Iterator[list[Matches]]:
    """Lets transformers predict from every layer, as it does for its losses, without computing them.

    Args:
        network: transformers' model; called with labels inside.

    Yields:
        No matches.
    """

    def predictions(*call: Any, **_: Any) -> tuple[None, dict[str, Tensor], list[dict[str, Tensor]]]:
        classes, boxes = call[5:7]  # of all layers
        former = zip(classes[:-1], boxes[:-1], strict=True)
        return None, {}, [{"logits": logits, "pred_boxes": box} for logits, box in former]

    own, network.loss_function = network.loss_function, predictions
    try:
        yield []
    finally:
        network.loss_function = own
