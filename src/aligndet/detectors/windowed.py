"""RF-DETR's trunk: transformers' DINOv2 in windows, with the weights of a ViT of timm's."""

from __future__ import annotations

import re
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from aligndet.detectors.query_families import from_transformers
from aligndet.detectors.trunks import load_trunk_weights

_USUAL = "vit_small_patch14_dinov2"
_NAMES = (  # timm's, and transformers'
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)


def build_windowed_vit(trunk: str, weights: str) -> tuple[str, nn.Module, list[int]]:
    """Builds the trunk that transformers has for RF-DETR.

    Attention is within 4 x 4 windows of the image, but for the layers whose inputs are maps of the trunk. The
    input of the last one is the last map, so that this layer is left out.

    Args:
        trunk: A ViT of timm's with one class token: "vit_small_patch14_dinov2", which RF-DETR's authors take.
        weights: As for `aligndet.detectors.trunks.build_trunk`.

    Returns:
        timm's name, the trunk, and the channels of its maps.

    Raises:
        ValueError: If timm has no such ViT, or the weights do not fit.
    """
    name = trunk.removeprefix("timm/")
    try:
        vit: Any = timm.create_model(name, pretrained=False, num_classes=0)
        first, (side, other) = vit.blocks[0], vit.patch_embed.img_size
        heads, hidden, patch = first.attn.num_heads, first.mlp.fc1.out_features, vit.patch_embed.patch_size[0]
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"trunk {trunk!r}: RF-DETR has a plain ViT, such as {_USUAL} ({error})") from error
    load_trunk_weights(vit, trunk, weights, num_classes=0)
    depth = len(vit.blocks)
    places = sorted({max(0, depth * part // 4 - 1) for part in (1, 2, 3, 4)})
    config = from_transformers("RfDetrDinov2Config")(
        hidden_size=vit.embed_dim,
        num_hidden_layers=places[-1],  # what comes after the last map would be computed in vain
        num_attention_heads=heads,
        mlp_ratio=hidden // vit.embed_dim,
        image_size=side,
        patch_size=patch,
        out_indices=places,
        use_mask_token=False,
    )
    body: nn.Module = from_transformers("models.rf_detr.modeling_rf_detr.RfDetrDinov2Backbone")(config)
    state = _translated(vit.state_dict())
    after = tuple(f"encoder.layer.{layer}." for layer in range(places[-1], depth))
    state = {key: value for key, value in state.items() if not key.startswith(after)}
    wanted = body.state_dict()
    spare = [key for key in wanted.keys() - state.keys() if re.search(r"layer_scale|[qkv]_proj\.bias", key)]
    for key in spare:  # which not all ViTs have
        state[key] = torch.full_like(wanted[key], 1.0 if "layer_scale" in key else 0.0)
    alien = [key for key, value in state.items() if key not in wanted or wanted[key].shape != value.shape]
    alien += wanted.keys() - state.keys()
    if alien or side != other or not isinstance(vit, VisionTransformer):
        raise ValueError(
            f"trunk {trunk!r}: is no plain ViT with one class token, on squares, as RF-DETR has it"
            f" ({', '.join(alien[:1]) or type(vit).__name__}); take {_USUAL}, for example"
        )
    body.load_state_dict(state)
    return name, body, [vit.embed_dim] * len(places)


@torch.no_grad()
def _translated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors under transformers' names."""
    found = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for kind, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace(".attn.qkv.", f".attention.{kind}_proj.")] = part
        else:
            found[name] = tensor
    return found
