"""Weights on disk: a folder with ``model.safetensors`` and ``manifest.json``, and what moves between
detectors.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from aligndet.boxes import PretrainableDetector
from aligndet.detectors.build import build_detector
from aligndet.detectors.query_detector import QueryDetector
from aligndet.files import accepts_strings, atomic_write, read_json

MODULES = {
    "trunk": (
        *("backbone.body.", "model.backbone.model."),
        *("model.backbone.conv_encoder.", "model.backbone.backbone."),
    ),
    "neck": (
        *("backbone.fpn.", "backbone.connections."),
        *("model.input_proj", "model.encoder", "model.level_embed", "model.backbone.projector."),
        "model.position_embedding.",
    ),
    "rpn": ("rpn.",),
    "head": (
        *("head.", "roi_heads.", "bbox_", "class_", "model.decoder", "model.query_"),
        *("model.reference_point", "model.enc_", "model.weight_embedding", "model.denoising_"),
        *("model.pos_trans", "model.patterns."),
    ),
}
"""The parts of a detector by the names of the paper's table 9, as prefixes of state dicts: torchvision's, and
transformers', where the encoder with what leads to it is the neck and the decoder the head.
"""
# rows that serve all classes in pre-training
_CLASS_AGNOSTIC = {".bbox_pred.": 4, ".mask_fcn_logits.": 1, ".enc_score_head.": 1}
_CLASS_AGNOSTIC |= {".enc_out_class_embed.": 1}


def network_of(detector: nn.Module) -> nn.Module:
    """The module that is saved: the detector, or the model of transformers that it calls."""
    return detector.network if isinstance(detector, QueryDetector) else detector


def pretrained_state(adapter: PretrainableDetector) -> dict[str, Tensor]:
    """Everything that fine-tuning starts from: all but the projection head and the prediction layers."""
    left_out = tuple(f"{layer}." for layer in adapter.prediction_layers)
    state = network_of(adapter.detector).state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(left_out)}


def initialise(
    detector: nn.Module, state: dict[str, Tensor], modules: tuple[str, ...] = tuple(MODULES)
) -> dict[str, str]:
    """Loads pre-trained tensors into a plain detector.

    Args:
        detector: To be fine-tuned.
        state: Of `pretrained_state`, or of a whole detector.
        modules: Keys of `MODULES`: the parts to take from `state`; the others stay as they are.

    Returns:
        For each module with parameters: "pre-trained" or "new".

    Raises:
        ValueError: If a module is unknown, or the tensors belong to another kind of detector.
    """
    unknown = set(modules) - set(MODULES)
    if unknown:
        raise ValueError(f"unknown module {sorted(unknown)[0]!r}; there are: {', '.join(MODULES)}")
    prefixes = tuple(prefix for module in modules for prefix in MODULES[module])
    network = network_of(detector)
    wanted = network.state_dict()
    alien = [name for name in state if name not in wanted]
    if alien:
        raise ValueError(
            f"these weights are of another detector or trunk: {len(alien)} of {len(state)} tensors have"
            f" no place in it, the first is {alien[0]!r}"
        )
    every = tuple(prefix for parts in MODULES.values() for prefix in parts)
    assert all(name.startswith(every) for name in state), "a layer of no module would be lost"
    taken = {
        name: _tiled(name, tensor, wanted[name])
        for name, tensor in state.items()
        if name.startswith(prefixes)
    }
    for name, tensor in taken.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"these weights are of another class count or width: {name!r} is {tuple(tensor.shape)}"
                f" there and {tuple(wanted[name].shape)} here"
            )
    network.load_state_dict(taken, strict=False)
    return _by_module(wanted, set(taken))


def _tiled(name: str, tensor: Tensor, wanted: Tensor) -> Tensor:
    """Repeats what was learned for all classes at once for each class."""
    rows = next((rows for layer, rows in _CLASS_AGNOSTIC.items() if layer in name), 0)
    return torch.cat([tensor] * (len(wanted) // rows)) if rows and len(tensor) == rows else tensor


def _by_module(names: dict[str, Tensor], pretrained: set[str]) -> dict[str, str]:
    """One line for each layer of the neck and heads, one for the whole trunk."""
    report: dict[str, set[str]] = {}
    for name in names:
        trunk = next((prefix for prefix in MODULES["trunk"] if name.startswith(prefix)), "")
        module = trunk.rstrip(".") or name.rpartition(".")[0] or name
        report.setdefault(module, set()).add("pre-trained" if name in pretrained else "new")
    return {
        module: "pre-trained" if origins == {"pre-trained"} else "new" for module, origins in report.items()
    }


def save_weights(folder: Path, state: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Writes weights and manifest; each file appears whole or not at all.

    Args:
        folder: Made if need be.
        state: Named tensors.
        manifest: What JSON can hold.
    """
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        # the format refuses two names for one place in memory (heads that layers share)
        tensors[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    atomic_write(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=2, default=str) + "\n")


def save_detector(folder: Path, detector: nn.Module, manifest: dict[str, Any]) -> None:
    """Writes a whole detector; one of transformers in a form that transformers loads by itself.

    Args:
        folder: Made if need be.
        detector: Of `aligndet.detectors.build.build_detector`.
        manifest: What JSON can hold, with ``architecture`` and, if known, ``class_names``.
    """
    files: dict[str, str] = {}
    if isinstance(detector, QueryDetector):
        files = detector.configuration_files(manifest.get("class_names"))
    for name in ("config.json", "preprocessor_config.json"):  # of what was here before
        (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        atomic_write(folder / name, text)
    save_weights(folder, network_of(detector).state_dict(), manifest)


def load_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_weights` has written.

    Args:
        folder: Of the weights, or a run that holds them in ``model`` or ``pretrained``.

    Raises:
        ValueError: Naming the file that is missing or broken.
    """
    folder = weights_folder(folder)
    try:
        manifest = read_json(folder / "manifest.json")
        state = dict(load_file(folder / "model.safetensors"))
    except FileNotFoundError as error:
        if (weights := folder / "model.safetensors").is_file() and not os.access(weights, os.R_OK):
            raise PermissionError(errno.EACCES, "may not be read", str(weights)) from error
        raise ValueError(
            f"{folder}: holds no weights (model.safetensors and manifest.json, as `aligndet pretrain`,"
            f" `export` and `finetune` write them): {error}"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'}: broken weights: {error}") from error
    _check(manifest, folder / "manifest.json")
    return state, manifest


_ARCHITECTURE = {"detector": str, "trunk": str, "fpn_channels": int, "fpn_norm": str, "num_classes": int}
_ARCHITECTURE |= {"min_size": int, "max_size": int, "options": dict}


def _check(manifest: dict[str, Any], path: Path) -> None:
    """Raises ValueError where what all manifests of detectors have is missing or of another kind."""
    architecture = manifest.get("architecture")
    if not isinstance(architecture, dict) or "detector" not in architecture:
        raise ValueError(f"{path}: is of no detector (a trunk goes to --trunk-weights)")
    for name, kind in _ARCHITECTURE.items():
        needed = name in ("detector", "trunk") or name in architecture
        if needed and type(architecture.get(name)) is not kind:
            raise ValueError(f"{path}: {name} of its architecture is missing or damaged")
    names, ids = manifest.get("class_names") or [], manifest.get("category_ids") or []
    lists = isinstance(names, list) and isinstance(ids, list)
    kinds = lists and {*map(type, names)} <= {str} and {*map(type, ids)} <= {int}
    if not kinds or (names and len(ids) not in (0, len(names))):
        raise ValueError(f"{path}: its class_names and category_ids do not fit together")


def weights_folder(folder: Path) -> Path:
    """Where a run or an export has its weights.

    Args:
        folder: Of a run, of an export, or of the weights themselves.
    """
    candidates = [folder, folder / "model", folder / "pretrained"]
    files = "manifest.json", "model.safetensors"
    return next((c for c in candidates if all((c / name).is_file() for name in files)), folder)


@accepts_strings
def load_detector(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Builds a fine-tuned or exported detector and loads its weights.

    Args:
        folder: As for `load_weights`.

    Returns:
        The plain detector in eval mode, called as torchvision's are, and its manifest.

    Raises:
        ValueError: If the folder holds no whole detector.
    """
    state, manifest = load_weights(folder)
    architecture = manifest["architecture"]
    if "num_classes" not in architecture:
        raise ValueError(
            f"{folder}: holds pre-trained parts, not a whole detector; `aligndet export` completes it"
        )
    try:
        detector = build_detector(**architecture)
        network_of(detector).load_state_dict(state, strict=True)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: the weights do not fit the architecture of the manifest: {error}"
        ) from error
    return detector.eval(), manifest


def load_tuned(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """As `load_detector`, for a fine-tuned detector: its manifest names the classes.

    Args:
        folder: Of `aligndet finetune`.

    Raises:
        ValueError: If the folder holds no whole detector, or one that is not fine-tuned.
    """
    detector, manifest = load_detector(folder)
    if not (manifest.get("class_names") and manifest.get("category_ids")):
        raise ValueError(f"{folder}: knows no classes yet; fine-tune it first")
    return detector, manifest
