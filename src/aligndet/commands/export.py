"""`aligndet export`: plain weights out of a pre-training run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning import seed_everything

from aligndet.commands._runs import check_bounds, provenance
from aligndet.detectors.build import build_detector
from aligndet.detectors.weights import initialise, load_weights, save_weights
from aligndet.files import accepts_strings, locked


@accepts_strings
def export(
    run: Path,
    *,
    output: Path,
    num_classes: int,
    format: Literal["torchvision"] = "torchvision",
    min_size: int = 800,
    max_size: int = 1333,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes a plain torchvision state dict: pre-trained neck and heads, new prediction layers.

    The file loads with torchvision alone, ``strict=True``; the manifest beside it says, module by module,
    what is pre-trained and what is new.

    Args:
        run: Folder of `aligndet pretrain`.
        output: Folder for model.safetensors and manifest.json.
        num_classes: Object classes of the detector to be fine-tuned, without the background.
        format: Of the weights.
        min_size: Short side for prediction, kept in the manifest.
        max_size: Bound of the long side, likewise.
        seed: Of the new layers.
        overwrite: Replace an export that is there.

    Returns:
        The output folder.

    Raises:
        ValueError: If the run holds no pre-trained weights, or the output is taken.
    """
    check_bounds({"num_classes": num_classes, "seed": seed})
    if (output / "model.safetensors").exists() and not overwrite:
        raise ValueError(f"{output}: holds weights already; give --overwrite or another output")
    state, source = load_weights(run)
    architecture = {k: source["architecture"][k] for k in ("detector", "trunk", "fpn_channels", "fpn_norm")}
    architecture |= {"num_classes": num_classes, "min_size": min_size, "max_size": max_size}
    seed_everything(seed, verbose=False)
    detector = build_detector(**architecture)
    modules = initialise(detector, state)
    manifest = {
        "kind": "detector",
        "format": format,
        "architecture": architecture,
        "torchvision_num_classes": num_classes + 1,
        "class_names": None,
        "modules": modules,
        "exported_from": str(run),
        **provenance(),
    }
    with locked(output):
        save_weights(output, detector.state_dict(), manifest)
    new = [name for name, origin in modules.items() if origin == "new"]
    print(
        f"{output / 'model.safetensors'}: {len(modules) - len(new)} modules pre-trained;"
        f" new: {', '.join(new)}"
    )
    return output
