"""The arms of `aligndet compare`: what each is pre-trained with, and whether they can be compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from aligndet.comparison import BASELINE
from aligndet.data.coco import image_files
from aligndet.data.sources import ImageSource
from aligndet.detectors.build import family_of
from aligndet.detectors.weights import load_weights, weights_folder
from aligndet.files import fingerprint
from aligndet.proposals.storage import read_proposals

ARMS: dict[str, dict[str, Any] | None] = {  # settings of pre-training; None: no pre-training
    BASELINE: None,
    "trunk-only": {},
    "boxes-only": {"contrast_weight": 0.0},
    "contrast-only": {"box_weight": 0.0},
    "aligndet": {},
}
WEIGHTS = ("default", "bundled", "none")  # weights of trunks that are not files


class Source(NamedTuple):
    """Existing weights that an arm starts from."""

    path: Path
    manifest: dict[str, Any]


def read_arms(arms: Sequence[str]) -> list[tuple[str, Source | None]]:
    """Names of arms, and the weights of those that bring their own.

    Args:
        arms: Keys of `ARMS`, or from:PATH, which is named by the content of its weights: other weights in the
            same folder are another arm.

    Raises:
        ValueError: If there is no such arm, or no weights where it says.
    """
    return [_read(arm) for arm in arms]


def _read(arm: str) -> tuple[str, Source | None]:
    if arm.startswith("from:"):
        path = Path(arm[5:]).resolve()
        manifest = load_weights(path)[1]
        content = fingerprint(weights_folder(path) / "model.safetensors")
        return f"from-{path.name}-{content}", Source(path, manifest)
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}; there are: {', '.join(ARMS)} and from:PATH")
    return arm, None


def detector_settings(
    detector: str, pretraining: dict[str, Any], finetuning: dict[str, Any]
) -> dict[str, Any]:
    """Settings of fine-tuning that make the detectors of all arms alike, pre-trained or not.

    Args:
        detector: A key of `DETECTORS`.
        pretraining: Settings of `aligndet pretrain`.
        finetuning: Settings of `aligndet finetune`, which override them.

    Returns:
        Its ``options``, and ``fpn_norm`` if it is set.
    """
    shared = family_of(detector).shared_options()
    options = {name: value for name, value in (pretraining.get("options") or {}).items() if name in shared}
    norm = finetuning.get("fpn_norm") or pretraining.get("fpn_norm")
    options |= finetuning.get("options") or {}
    return {"options": options or None} | ({"fpn_norm": norm} if norm else {})


def check_arms(
    names: Sequence[str],
    sources: Mapping[str, Source],
    pretraining: dict[str, Any],
    finetuning: dict[str, Any],
    model: dict[str, Any],
) -> None:
    """Refuses an arm that is the same as scratch, or whose detector differs from that of the others.

    Args:
        names: Names of all arms.
        sources: Arms with weights of their own.
        pretraining: Settings of `aligndet pretrain`.
        finetuning: Settings of `aligndet finetune`.
        model: Detector, trunk and fpn_channels of the other arms.

    Raises:
        ValueError: Naming the arm and the difference.
    """
    if "trunk-only" in names and not pretraining.get("train_trunk"):
        raise ValueError(
            "arm 'trunk-only' is the same as 'scratch' while pre-training leaves the trunk frozen;"
            " leave it out or give --pretraining.train_trunk true"
        )
    expected: dict[str, Any] = {**model, "fpn_norm": "none"}
    expected |= detector_settings(model["detector"], pretraining, finetuning)
    options = expected.pop("options") or {}
    shared = family_of(model["detector"]).shared_options()
    expected |= {name: options.get(name) for name in shared}
    for path, manifest in sources.values():
        architecture = manifest["architecture"]
        actual = dict.fromkeys(shared) | architecture | architecture.get("options", {})
        for name, value in expected.items():
            if actual.get(name) != value:
                raise ValueError(
                    f"{path}: has {name} {actual.get(name)!r}, the other arms {value!r}: not comparable"
                )


def check_trunks(sources: Mapping[str, Source], trunk_weights: str) -> list[str]:
    """Refuses arms whose frozen trunk has other weights than that of the other arms.

    Args:
        sources: Arms with weights of their own.
        trunk_weights: Weights of the other arms' trunk.

    Returns:
        A sentence for each arm whose trunk has unknown weights.

    Raises:
        ValueError: Naming the arm's folder, and the --trunk-weights that would fit it.
    """
    remarks = []
    for name, (path, manifest) in sources.items():
        trunk = manifest.get("trunk", {})
        if trunk.get("trained") or "initialised_from" in manifest:
            continue  # it is part of what the arm has learnt
        weights = trunk.get("weights")
        if weights is None or (weights not in WEIGHTS and not Path(weights).exists()):
            remarks.append(
                f"{name}: it is not known whether its trunk has the weights of the others ({trunk_weights})."
            )
        elif os.path.realpath(weights) != os.path.realpath(trunk_weights):
            raise ValueError(
                f"{path}: its trunk has the weights {weights!r}, that of the other arms {trunk_weights!r}:"
                f" not comparable; give --trunk-weights {weights}"
            )
    return remarks


def remarks_on_images(sources: Mapping[str, Source], validation_files: Set[str]) -> list[str]:
    """Says which arms were, or may have been, pre-trained on validation images.

    Args:
        sources: Arms with weights of their own.
        validation_files: Files of the validation images.

    Returns:
        A sentence for each such arm.
    """
    remarks = []
    for name, source in sources.items():
        files = _pretrained_on(source)
        if files is None:
            remarks.append(f"{name}: it is not known whether it was pre-trained on validation images.")
        elif count := len(validation_files & files):
            total = len(validation_files)
            remarks.append(f"{name}: was pre-trained on {count} of {total} validation images.")
    return remarks


def _pretrained_on(source: Source) -> set[str] | None:
    """The files of a pre-training's images, if they are still where its manifest says."""
    settings = source.manifest.get("pretraining", {})
    images, proposals = settings.get("images"), settings.get("proposals")
    if not (images and proposals and Path(images).exists()):
        return None
    try:
        only, exclude = (name and Path(name) for name in map(settings.get, ("names", "exclude")))
        names = read_proposals(Path(proposals)).file_names
        names = ImageSource(images).select(names, only=only, exclude=exclude)
    except (ValueError, OSError):
        return None
    return set(image_files(Path(images), names))
