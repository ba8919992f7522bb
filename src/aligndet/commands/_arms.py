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

ARMS: dict[str, dict[str, Any] | None] = {  # settings of pre-training; None: there is none
    BASELINE: None,
    "trunk-only": {},
    "boxes-only": {"contrast_weight": 0.0},
    "contrast-only": {"box_weight": 0.0},
    "aligndet": {},
}
WEIGHTS = ("default", "bundled", "none")  # of trunks that are no file


class Source(NamedTuple):
    """Weights that are there already, for an arm to start from."""

    path: Path
    manifest: dict[str, Any]


def read_arms(arms: Sequence[str]) -> list[tuple[str, Source | None]]:
    """Names of arms, and the weights of those that bring their own.

    Args:
        arms: Keys of `ARMS`, or from:PATH, which is known by the content of its weights: other weights in the
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
        finetuning: Of `aligndet finetune`; they come first.

    Returns:
        Its ``options``, and ``fpn_norm`` if it is set.
    """
    shared = family_of(detector).shared_options()
    given = {name: value for name, value in (pretraining.get("options") or {}).items() if name in shared}
    norm = finetuning.get("fpn_norm") or pretraining.get("fpn_norm")
    options = given | (finetuning.get("options") or {})
    return {"options": options or None} | ({"fpn_norm": norm} if norm else {})


def check_arms(
    names: Sequence[str],
    sources: Mapping[str, Source],
    pretraining: dict[str, Any],
    finetuning: dict[str, Any],
    model: dict[str, Any],
) -> None:
    """Refuses arms that say nothing, or whose detector is another one.

    Args:
        names: Of all arms.
        sources: Those with weights of their own.
        pretraining: Settings of `aligndet pretrain`.
        finetuning: Of `aligndet finetune`.
        model: Detector, trunk and fpn_channels of the other arms.

    Raises:
        ValueError: Naming the arm and the difference.
    """
    if "trunk-only" in names and not pretraining.get("train_trunk"):
        raise ValueError(
            "arm 'trunk-only' is the same as 'scratch' while pre-training leaves the trunk frozen;"
            " leave it out or give --pretraining.train_trunk true"
        )
    others: dict[str, Any] = {**model, "fpn_norm": "none"}
    others |= detector_settings(model["detector"], pretraining, finetuning)
    options = others.pop("options") or {}
    shared = family_of(model["detector"]).shared_options()
    others |= {name: options.get(name) for name in shared}
    for path, manifest in sources.values():
        architecture = manifest["architecture"]
        found = dict.fromkeys(shared) | architecture | architecture.get("options", {})
        for name, value in others.items():
            if found[name] != value:
                raise ValueError(
                    f"{path}: has {name} {found[name]!r}, the other arms {value!r}: not comparable"
                )


def check_trunks(sources: Mapping[str, Source], trunk_weights: str) -> list[str]:
    """Refuses weights whose frozen trunk is not that of the other arms.

    Args:
        sources: Arms with weights of their own.
        trunk_weights: Of the other arms.

    Returns:
        A sentence for each arm of which it is not known.

    Raises:
        ValueError: Naming the weights, and the trunk's to give for the others.
    """
    remarks = []
    for name, (path, manifest) in sources.items():
        trunk = manifest.get("trunk", {})
        if trunk.get("trained") or "initialised_from" in manifest:
            continue  # it is part of what the arm has learnt
        theirs = trunk.get("weights")
        if theirs is None or (theirs not in WEIGHTS and not Path(theirs).exists()):
            remarks.append(
                f"{name}: it is not known whether its trunk has the weights of the others ({trunk_weights})."
            )
        elif os.path.realpath(theirs) != os.path.realpath(trunk_weights):
            raise ValueError(
                f"{path}: its trunk has the weights {theirs!r}, that of the other arms {trunk_weights!r}: not"
                f" comparable; give --trunk-weights {theirs}"
            )
    return remarks


def remarks_on_images(sources: Mapping[str, Source], measured: Set[str]) -> list[str]:
    """What to know of weights that were pre-trained elsewhere: have they seen the validation images?

    Args:
        sources: Arms with weights of their own.
        measured: Files of the validation images.

    Returns:
        A sentence for each arm that has, or of which it is not known.
    """
    remarks = []
    for name, source in sources.items():
        files = _pretrained_on(source)
        if files is None:
            remarks.append(f"{name}: it is not known whether it was pre-trained on validation images.")
        elif seen := len(measured & files):
            remarks.append(f"{name}: was pre-trained on {seen} of {len(measured)} validation images.")
    return remarks


def _pretrained_on(source: Source) -> set[str] | None:
    """The files of a pre-training's images, if they are still where its manifest says."""
    given = source.manifest.get("pretraining", {})
    images, proposals, listed = (given.get(name) for name in ("images", "proposals", "names"))
    if not (images and proposals and Path(images).exists()):
        return None
    try:
        names = set(read_proposals(Path(proposals)).file_names)
        if listed is not None:
            names &= set(ImageSource(images).names(Path(listed)))
    except (ValueError, OSError):
        return None
    return set(image_files(Path(images), names))
