"""`aligndet export`: a plain detector out of a pre-training run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning import seed_everything

from aligndet.commands._runs import check_bounds, provenance
from aligndet.detectors.build import build_detector, weights_format
from aligndet.detectors.weights import initialise, load_weights, save_detector
from aligndet.files import accepts_strings, locked


@accepts_strings
def export(
    run: Path,
    *,
    output: Path,
    num_classes: int,
    format: Literal["torchvision", "transformers"] | None = None,
    min_size: int = 800,
    max_size: int = 1333,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes a plain detector: pre-trained neck and heads, new prediction layers.

    torchvision's detectors load with torchvision alone, ``strict=True``; query-based ones with transformers
    alone, ``AutoModelForObjectDetection.from_pretrained(FOLDER)``. The manifest says, module by module, what
    is pre-trained and what is new.

    Args:
        run: Folder of `aligndet pretrain`.
        output: Folder for model.safetensors and manifest.json, and for transformers config.json and
            preprocessor_config.json.
        num_classes: Object classes of the detector to be fine-tuned, without the background.
        format: Of the weights; by default, and at all, the one that the detector has.
        min_size: Short side for prediction, kept in the manifest.
        max_size: Bound of the long side, likewise.
        seed: Of the new layers.
        overwrite: Replace an export that is there.

    Returns:
        The output folder.

    Raises:
        ValueError: If the run holds no pre-trained weights, the detector is of another format, or the output
            is taken.
    """
    check_bounds({"num_classes": num_classes, "seed": seed})
    if (output / "model.safetensors").exists() and not overwrite:
        raise ValueError(f"{output}: holds weights already; give --overwrite or another output")
    state, source = load_weights(run)
    architecture = {k: source["architecture"][k] for k in ("detector", "trunk", "fpn_channels", "fpn_norm")}
    if "options" in source["architecture"]:
        architecture["options"] = source["architecture"]["options"]
    own = weights_format(architecture["detector"])
    if format not in (None, own):
        raise ValueError(f"{run}: {architecture['detector']} is a detector of {own}, there is no {format}")
    architecture |= {"num_classes": num_classes, "min_size": min_size, "max_size": max_size}
    seed_everything(seed, verbose=False)
    detector = build_detector(**architecture)
    modules = initialise(detector, state)
    manifest = {
        "kind": "detector",
        "format": own,
        "architecture": architecture,
        **({"torchvision_num_classes": num_classes + 1} if own == "torchvision" else {}),
        "class_names": None,
        "modules": modules,
        "exported_from": str(run),
        **provenance(),
    }
    with locked(output):
        save_detector(output, detector, manifest)
    new = [name for name, origin in modules.items() if origin == "new"]
    print(
        f"{output / 'model.safetensors'}: {len(modules) - len(new)} modules pre-trained;"
        f" new: {', '.join(new)}"
    )
    return output
