"""The query-based detectors of transformers, and what each does differently from the others."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Family(NamedTuple):
    """What one kind of query-based detector does differently."""

    model: str  # transformers' classes begin with it: DetrConfig, DetrForObjectDetection
    processor: str  # likewise its image processor, which may be another family's
    matcher: str  # class below transformers
    losses: dict[str, str | float]  # prefix of a loss's name: its weight, or the setting with it
    strides: tuple[int, ...]  # of the trunk's maps
    width: tuple[str, ...]  # settings that hold the width of everything above the trunk
    class_layers: tuple[str, ...]  # what depends on the number of classes
    encoder_score: str | None = None  # the one of them that selects queries from the encoder's output
    queries: tuple[str, ...] = ()  # learned query embeddings
    own_norm: tuple[str, ...] = ()  # losses that are not divided by the number of boxes
    layer_dim: int = 0  # dimension of the layers in the decoder's stacked states
    square: bool = False  # made for square images, without masks of the padding
    from_encoder: bool = False  # queries are selected from the encoder's output
    moves: bool = True  # boxes are predicted as offsets to reference points or boxes
    sides: float = 0.0  # initial logit of the sides of boxes that are offsets to points
    predicts_first: bool = False  # once before its first refinement, see `with_first_prediction`
    feeds_norm_back: bool = False  # into the next layer, in transformers; see `norm_for_predictions_alone`
    windowed: bool = False  # has a trunk of transformers' own, of `aligndet.detectors.windowed`
    defaults: dict[str, Any] = {}  # settings, where the authors have others than transformers


_DETR_LOSSES: dict[str, str | float] = {
    "loss_ce": 1.0,
    "loss_bbox": "bbox_loss_coefficient",
    "loss_giou": "giou_loss_coefficient",
}
_DEFORMABLE_MATCHER = "loss.loss_deformable_detr.DeformableDetrHungarianMatcher"
_RT_DETR: dict[str, Any] = {
    "processor": "RTDetr",
    "matcher": "loss.loss_rt_detr.RTDetrHungarianMatcher",
    "losses": dict.fromkeys(("loss_vfl", "loss_bbox", "loss_giou", "loss_fgl", "loss_ddf"), 1.0),
    "strides": (8, 16, 32),
    "width": ("d_model", "encoder_hidden_dim"),
    "class_layers": (
        *("class_embed", "model.decoder.class_embed", "model.enc_score_head"),
        "model.denoising_class_embed",
    ),
    "encoder_score": "model.enc_score_head",
    "own_norm": ("loss_ddf",),
    "layer_dim": 1,
    "square": True,
    "from_encoder": True,
}

# DETR, as in the paper.
DETR = Family(
    model="Detr",
    processor="Detr",
    matcher="loss.loss_for_object_detection.HungarianMatcher",
    losses=_DETR_LOSSES,
    strides=(32,),
    width=("d_model",),
    class_layers=("class_labels_classifier",),
    queries=("model.query_position_embeddings.weight",),
    own_norm=("loss_ce",),
    moves=False,
    feeds_norm_back=True,
)
# Queries attend to where they expect the edges of their object.
CONDITIONAL_DETR = DETR._replace(
    model="ConditionalDetr",
    processor="ConditionalDetr",
    matcher=_DEFORMABLE_MATCHER,
    losses={**_DETR_LOSSES, "loss_ce": 2.0},  # as its authors weigh it, transformers with 1
    own_norm=(),
    moves=True,
)
# Queries are boxes, moved from layer to layer.
DAB_DETR = CONDITIONAL_DETR._replace(
    model="DabDetr",
    losses=_DETR_LOSSES,
    feeds_norm_back=False,
    width=("hidden_size",),
    class_layers=("class_embed",),
    queries=("model.query_refpoint_embeddings.weight",),
)
# Attention to few points of several maps.
DEFORMABLE_DETR = CONDITIONAL_DETR._replace(
    model="DeformableDetr",
    processor="DeformableDetr",
    strides=(8, 16, 32),
    class_layers=("class_embed", "model.decoder.class_embed"),
    layer_dim=1,
    sides=-2.0,
    feeds_norm_back=False,
    defaults={"class_cost": 2},
)
# A hybrid encoder, whose best locations become queries; v2 has sampling points of its own for each map.
RT_DETR = Family(model="RTDetr", **_RT_DETR)
RT_DETR_V2 = Family(model="RTDetrV2", **_RT_DETR)
# Edges as distributions, refined from layer to layer.
D_FINE = RT_DETR._replace(model="DFine", layer_dim=0, predicts_first=True)

# Deformable DETR without an encoder on a ViT, whose best locations move the queries; groups of queries.
RF_DETR = DEFORMABLE_DETR._replace(
    model="RfDetr",
    processor="RTDetr",  # its own makes images smaller without smoothing
    matcher="loss.loss_lw_detr.LwDetrHungarianMatcher",
    losses={**_DETR_LOSSES, "loss_ce": "class_loss_coefficient"},
    class_layers=("class_embed", "model.enc_out_class_embed"),
    encoder_score="model.enc_out_class_embed",
    queries=("model.query_feat.weight", "model.reference_point_embed.weight"),
    own_norm=tuple(_DETR_LOSSES),  # is the mean over all processes already
    layer_dim=0,
    square=True,
    sides=0.0,
    windowed=True,
    defaults={"dropout": 0.0},
)

_OURS = {
    *("backbone_config", "num_channels", "freeze_backbone_batch_norms", "feat_strides"),
    *("encoder_in_channels", "decoder_in_channels", "eval_size", "anchor_image_size", "auxiliary_loss"),
    *("is_encoder_decoder", "tie_word_embeddings", "num_labels"),
    *("two_stage", "two_stage_num_proposals"),  # transformers has no loss for Deformable DETR's first stage
    *("cls_loss_coefficient", "encoder_layerdrop"),  # transformers does not read these
    "decoder_layerdrop",  # the views would have different layers
    *("learn_initial_query", "eval_idx"),  # transformers has errors there
    "random_refpoints_xy",  # a start of its own, see `start_as_authors`
}
"""Settings of transformers that follow from the trunk, the images or the task, or do not work."""


def from_transformers(name: str) -> Any:
    """Imports a class or function of transformers when it is needed.

    Args:
        name: Below ``transformers``.

    Raises:
        ValueError: If transformers is not installed.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(f"transformers.{module}" if module else "transformers"), attribute)
    except (ImportError, AttributeError) as error:  # an older version has fewer of them
        raise ValueError(
            f'query-based detectors need transformers: pip install "aligndet[detr]" ({error})'
        ) from error


def settings_of(family: Family) -> frozenset[str]:
    """The settings of a family's configuration that may be chosen, by transformers' names."""
    config = from_transformers(f"{family.model}Config")
    chosen = {name for name in config.__annotations__ if not name.startswith("_")}
    if len(family.strides) > 1:
        chosen -= {"dilation"}  # is for detectors with one map
    if family.windowed:
        chosen -= {"num_feature_levels"}  # there is one
    return frozenset(chosen - _OURS - set(family.width) - set(config.attribute_map))


def start_as_authors(family: Family, network: nn.Module) -> None:
    """Initialises everything above the trunk as the detectors' authors do.

    transformers' initial weights, normal with a deviation of 0.01 or 0.02, are meant to be replaced by a
    checkpoint: with them, all queries of DETR predict the same box, to 3e-8 of the image's side, and the maps
    of RT-DETR's encoder are a hundredth of its queries in size.
    """
    refines = getattr(network.config, "with_box_refine", False)
    backbone: Any = network.model.backbone  # type: ignore[union-attr]
    trunk = set((backbone.backbone if family.windowed else backbone).modules())
    modules = [(name, module) for name, module in network.named_modules() if module not in trunk]
    kinds = ("q_proj", "k_proj", "v_proj")
    fused = {  # the authors have one matrix of three times the height, whose Xavier weights are smaller
        getattr(module, kind) for _, module in modules if hasattr(module, "q_proj") for kind in kinds
    }
    for name, module in modules:
        if name.endswith("reference_point_embed"):  # how far queries are from where they are selected
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding) and not name.startswith("model.position_embedding."):
            nn.init.normal_(module.weight)
            if module.padding_idx is not None:  # of denoising: what fills up images with few objects
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.weight.any():  # zeros are intended
            if is_head(name) or name == "model.input_projection" or ".projector." in name:
                module.reset_parameters()
            else:
                nn.init.xavier_uniform_(module.weight, 0.5**0.5 if module in fused else 1.0)
            if family.moves and name.startswith(family.class_layers) and module.bias is not None:
                nn.init.constant_(module.bias, -log(99))  # objects are rare: focal loss
        if family.moves and "bbox_" in name and hasattr(module, "layers"):  # no move at first
            nn.init.zeros_(module.layers[-1].weight)
            nn.init.zeros_(module.layers[-1].bias)
            if not refines or name.endswith("bbox_embed.0"):  # later layers refine its boxes
                nn.init.constant_(module.layers[-1].bias[2:], family.sides)


class _LateNorm(nn.LayerNorm):
    """Leaves the states of a decoder as they are where transformers calls it."""

    def forward(self, states: Tensor) -> Tensor:
        """Returns its input; `normed` is the norm."""
        return states

    def normed(self, states: Tensor) -> Tensor:
        """The norm before class and box layers."""
        return super().forward(states)


def norm_for_predictions_alone(decoder: Any) -> None:
    """Lets the layers of a decoder go on from each other's states, as DETR's authors do.

    With losses of all layers, transformers feeds the states that are normed for the predictions into the next
    layer, and norms the last ones twice; without them, as in its own checkpoints, it does neither.

    Args:
        decoder: Of transformers' DETR or Conditional DETR.
    """
    decoder.layernorm.__class__ = _LateNorm
    decoder.register_forward_hook(_norm_states)


def _norm_states(decoder: Any, _: Any, output: Any) -> Any:
    output.intermediate_hidden_states = decoder.layernorm.normed(output.intermediate_hidden_states)
    output.last_hidden_state = output.intermediate_hidden_states[-1]
    return output


def is_head(name: str) -> bool:
    """Whether a module gives class scores or boxes.

    Args:
        name: Of the module in transformers' model.
    """
    begins = ("bbox_", "class_", "enc_score_head", "enc_bbox_head", "enc_out_", "pre_bbox_head")
    return any(part.startswith(begins) for part in name.split("."))


def with_first_prediction(
    loss: Callable[..., Any],
    logits: Tensor,
    labels: list[dict[str, Tensor]],
    device: Any,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor,
    outputs_coord: Tensor,
    **others: Any,
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """D-FINE's loss with each layer's prediction paired with its own distributions of edges.

    D-FINE predicts once before its first refinement, so it has one prediction more than distributions.
    transformers' loss pairs the first with the first, and so the edges of a layer with the prediction of the
    layer before: the last layer but one learns neither classes nor boxes.

    Args:
        loss: transformers' ``DFineForObjectDetectionLoss``.
        logits: This and all further ones are that loss's own arguments.

    Returns:
        Its results, and losses of the first prediction's classes and boxes among them (``loss_vfl_pre``).
    """
    more = outputs_class.shape[1] - others["predicted_corners"].shape[1]  # none in eval mode
    layers = outputs_class[:, more:], outputs_coord[:, more:]
    total, losses, auxiliary = loss(logits, labels, device, pred_boxes, config, *layers, **others)
    if not more:
        return total, losses, auxiliary
    first: dict[str, Any] = {"logits": outputs_class[:, 0], "pred_boxes": outputs_coord[:, 0].clamp(0, 1)}
    noisy = others.get("denoising_meta_values")
    if noisy is not None:
        parts = {name: value.split(noisy["dn_num_split"], dim=1) for name, value in first.items()}
        first = {name: value for name, (_, value) in parts.items()}
        first["dn_auxiliary_outputs"] = [{name: value for name, (value, _) in parts.items()}]
        first["denoising_meta_values"] = noisy
    criterion = from_transformers("loss.loss_d_fine.DFineLoss")(config).to(device)
    own = {f"{name}_pre": value for name, value in criterion(first, labels).items()}
    return total + torch.stack(list(own.values())).sum(), {**losses, **own}, auxiliary
