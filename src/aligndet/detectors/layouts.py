"""Published weights of trunks: finds out whose names a file has, and translates them into the trunk's.

Projects differ in three ways. Prefixes ("module.encoder_q.", "state_dict.backbone.") need no table: the one
under which most of the trunk is found is taken; of equally complete copies (an encoder and its moving
average), it is the one that the authors evaluate. Names of layers are the table below, a few rules each.
And networks that are the same but for their names (MobileNets, EfficientNets) are matched by the order of
their layers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from math import isqrt
from typing import NamedTuple, TypeAlias

from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

Rule: TypeAlias = tuple[str, str | Callable[[re.Match[str]], str]]

NEARLY_ALL = 0.99
# DINO evaluates its teacher, all others the encoder
_COPY = re.compile(r"momentum|encoder_k|target|student|ema")
_COMPUTED = re.compile(r"num_batches_tracked|relative_position_index|relative_coords_table|attn_mask")


def _stage(name: str, shift: int, between: str = "") -> Callable[[re.Match[str]], str]:
    """Adds to the number of a stage."""
    return lambda match: f"{name}{int(match[1]) + shift}.{between}"


_MLP = (
    (r"\bffn\.layers\.0\.0\.", "mlp.fc1."),
    (r"\bffn\.layers\.1\.", "mlp.fc2."),
    (r"\bpatch_embed\.projection\.", "patch_embed.proj."),
)
_TORCHVISION_MLP = ((r"\bmlp\.(0|linear_1)\.", "mlp.fc1."), (r"\bmlp\.(3|linear_2)\.", "mlp.fc2."))
# Microsoft's stages end in the layer that halves the map, timm's begin with it
_DOWNSAMPLE: Rule = (r"\blayers\.(\d+)\.downsample\.", _stage("layers.", 1, "downsample."))


def _in_features(stages: str, stem: tuple[Rule, Rule]) -> tuple[Rule, ...]:
    """Rules for torchvision's ``features``: the stem, then stages and downsampling layers in turns."""
    return (
        *stem,
        (r"\bfeatures\.([1357])\.", lambda match: f"{stages}.{int(match[1]) // 2}.blocks."),
        (r"\bfeatures\.([246])\.", lambda match: f"{stages}.{int(match[1]) // 2}.downsample."),
    )


LAYOUTS: dict[str, tuple[Rule, ...]] = {
    "torchvision's and timm's names": (),
    "detectron2's ResNet": (
        (r"\bstem\.conv1\.norm\.", "bn1."),
        (r"\bstem\.conv1\.", "conv1."),
        (r"\bres([2-5])\.", _stage("layer", -1)),
        (r"\.conv(\d)\.norm\.", r".bn\1."),
        (r"\.shortcut\.norm\.", ".downsample.1."),
        (r"\.shortcut\.", ".downsample.0."),
    ),
    "a ResNet's layers by number": (
        (r"\b([4-7])\.(?=\d+\.(conv|bn|downsample))", _stage("layer", -3)),
        (r"(?<!downsample\.)\b0\.(?=weight$)", "conv1."),
        (r"(?<!downsample\.)\b1\.(?=(weight|bias|running_mean|running_var|num_batches_tracked)$)", "bn1."),
    ),
    "Microsoft's Swin": (_DOWNSAMPLE,),
    "OpenMMLab's Swin": ((r"\bstages\.", "layers."), _DOWNSAMPLE, (r"\battn\.w_msa\.", "attn."), *_MLP),
    "torchvision's Swin": (
        *_in_features(
            "layers",
            ((r"\bfeatures\.0\.0\.", "patch_embed.proj."), (r"\bfeatures\.0\.2\.", "patch_embed.norm.")),
        ),
        *_TORCHVISION_MLP,
    ),
    "the authors' ConvNeXt": (
        (r"\bdownsample_layers\.0\.", "stem."),
        (r"\bdownsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"(\bstages\.\d+\.)(\d+\.)", r"\1blocks.\2"),
        (r"\bdwconv\.", "conv_dw."),
        (r"\bpwconv([12])\.", r"mlp.fc\1."),
    ),
    "torchvision's ConvNeXt": (
        *_in_features("stages", ((r"\bfeatures\.0\.0\.", "stem.0."), (r"\bfeatures\.0\.1\.", "stem.1."))),
        (r"\bblock\.0\.", "conv_dw."),
        (r"\bblock\.2\.", "norm."),
        (r"\bblock\.3\.", "mlp.fc1."),
        (r"\bblock\.5\.", "mlp.fc2."),
        (r"\blayer_scale\b", "gamma"),
    ),
    "OpenMMLab's ViT": (
        *_MLP,
        (r"(?<!\d\.)\bln1\.", "norm."),
        (r"\blayers\.(\d+)\.", r"blocks.\1."),
        (r"\bln([12])\.", r"norm\1."),
    ),
    "torchvision's ViT": (
        (r"\bclass_token\b", "cls_token"),
        (r"\bencoder\.pos_embedding\b", "pos_embed"),
        (r"\bconv_proj\.", "patch_embed.proj."),
        (r"\bencoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\bln_([12])\.", r"norm\1."),
        (r"\bencoder\.ln\.", "norm."),
        (r"\bself_attention\.in_proj_", "attn.qkv."),
        (r"\bself_attention\.out_proj\.", "attn.proj."),
        *_TORCHVISION_MLP,
    ),
}
"""Rules by layout, applied in order: a pattern, and timm's name in its place (ResNets: torchvision's)."""


class Match(NamedTuple):
    """The part of a file that belongs to a trunk."""

    state: dict[str, Tensor]  # by the trunk's names
    layout: str
    prefix: str
    share: float  # of the trunk's numbers
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether nearly all numbers of the trunk are there, and nearly all tensors (norms are small).

        The norm after the last block may be missing: networks that give maps have none.
        """
        missing = len(set(self.missing) - {"norm.weight", "norm.bias"})
        tensors = len(self.state) / max(1, len(self.state) + missing)
        return min(self.share, tensors) >= NEARLY_ALL

    def __str__(self) -> str:
        under = f" under {self.prefix!r}" if self.prefix else ""
        matched = f"{len(self.state)} tensors, {100 * self.share:.1f} % of the trunk"
        rest = f"missing {_some(self.missing)}, unused {_some(self.unused)}"
        return f"{self.layout}{under}, matched {matched}, {rest}"


def load_trunk(body: nn.Module, tensors: dict[str, Tensor], complaint: str) -> Match:
    """Loads weights in any of the layouts into a trunk.

    Args:
        body: Of `aligndet.detectors.trunks.build_trunk`.
        tensors: Of `aligndet.detectors.reading.read_tensors`.
        complaint: Begins the message if they do not fit.

    Returns:
        What was loaded; what is missing (less than 1 %) stays as it was.

    Raises:
        ValueError: If less than nearly all of the trunk matched.
    """
    match = match_trunk(tensors, body.state_dict())
    if not match.fits:
        raise ValueError(f"{complaint}: {match}")
    body.load_state_dict(match.state, strict=False)
    return match


def match_trunk(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> Match:
    """Finds layout and prefix under which a file holds most of a trunk.

    Args:
        tensors: By the file's names.
        wanted: The trunk's state dict.
    """
    # timm flattens the first level of names for feature maps and wraps transformers as "model"; a file has
    # either the flat names (of `aligndet pretrain-backbone`) or those of the whole network
    flat = {name.removeprefix("model."): name for name in wanted}
    names = flat | {re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name): own for name, own in flat.items()}
    best: tuple[tuple[int, bool], str, str, dict[str, str]] = ((0, False), "none of the layouts", "", {})
    for layout, rules in LAYOUTS.items():
        found: dict[str, dict[str, str]] = defaultdict(dict)  # by prefix: the trunk's name -> the file's
        for key, tensor in tensors.items():
            parts = _renamed(key, rules).split(".")
            for start in range(len(parts)):
                name = names.get(".".join(parts[start:]))
                if name is not None and _fitted(name, tensor, wanted[name]) is not None:
                    found[".".join(parts[:start])][name] = key
        for prefix, pairs in found.items():
            rank = (_numbers(wanted, pairs), not _COPY.search(prefix))
            if rank > best[0]:
                best = (rank, layout, prefix, pairs)
    _, layout, prefix, pairs = best
    if _numbers(wanted, pairs) < NEARLY_ALL * _numbers(wanted, wanted):
        in_order = _in_order(tensors, wanted)
        if in_order:
            layout, prefix, pairs = "the same layers under other names", "", in_order
    fitted = {name: _fitted(name, tensors[key], wanted[name]) for name, key in pairs.items()}
    state = {name: value for name, value in fitted.items() if value is not None}
    if layout == "OpenMMLab's Swin":
        state = {name: _unfolded(value) if ".downsample." in name else value for name, value in state.items()}
    used = set(pairs.values())
    return Match(
        state,
        layout,
        prefix,
        _numbers(wanted, pairs) / max(1, _numbers(wanted, wanted)),
        tuple(name for name in wanted if name not in pairs and not _COMPUTED.search(name)),
        tuple(key for key in tensors if key not in used and not _COMPUTED.search(key)),
    )


def _renamed(name: str, rules: tuple[Rule, ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _numbers(wanted: dict[str, Tensor], names: dict[str, str] | dict[str, Tensor]) -> int:
    return sum(wanted[name].numel() for name in names if not _COMPUTED.search(name))


def _fitted(name: str, tensor: Tensor, wanted: Tensor) -> Tensor | None:
    """A tensor in the wanted shape: as it is, with axes of length 1, or a table of positions resampled."""
    if tensor.shape == wanted.shape:
        return tensor
    if [n for n in tensor.shape if n > 1] == [n for n in wanted.shape if n > 1]:
        return tensor.reshape(wanted.shape)
    if name.endswith("relative_position_bias_table") and tensor.shape[1:] == wanted.shape[1:]:
        window = (isqrt(len(wanted)) + 1) // 2  # (2 * window - 1)^2 offsets
        return resize_rel_pos_bias_table(tensor, (window, window), tuple(wanted.shape))
    if name.endswith("pos_embed") and tensor.ndim == 3 and tensor.shape[::2] == wanted.shape[::2]:
        tokens = wanted.shape[1]
        grid, prefix = isqrt(tokens), tokens - isqrt(tokens) ** 2  # class and register tokens come first
        patches = tensor.shape[1] - prefix
        if patches > 0 and isqrt(patches) ** 2 == patches:
            return resample_abs_pos_embed(tensor, [grid, grid], num_prefix_tokens=prefix)
    return None


def _unfolded(tensor: Tensor) -> Tensor:
    """Reorders the four merged pixels: OpenMMLab unfolds channel by channel and row by row, Microsoft
    concatenates pixel by pixel and column by column.
    """
    return tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :].flatten(-2)


def _in_order(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, str]:
    """Finds the trunk's layers in a row in the file: all shapes and kinds (weight, running_mean) agree."""
    ours = [name for name in wanted if not _COMPUTED.search(name)]
    theirs = [key for key in tensors if not _COMPUTED.search(key)]
    for start in range(len(theirs) - len(ours) + 1):
        pairs = dict(zip(ours, theirs[start:], strict=False))
        if all(
            wanted[name].shape == tensors[key].shape and name.rpartition(".")[2] == key.rpartition(".")[2]
            for name, key in pairs.items()
        ):
            return pairs
    return {}


def _some(names: tuple[str, ...]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "0"
