"""`aligndet export`: a plain detector out of a pre-training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from lightning import seed_everything

from aligndet.commands._settings import check_bounds, provenance
from aligndet.detectors.build import build_detector, family_of
from aligndet.detectors.onnx import save_onnx
from aligndet.detectors.weights import initialise, load_tuned, load_weights, save_detector
from aligndet.files import accepts_strings, atomic_write, locked


@accepts_strings
def export(
    run: Path,
    *,
    output: Path,
    num_classes: int | None = None,
    format: Literal["torchvision", "transformers", "onnx"] | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes a plain detector: pre-trained neck and heads, new prediction layers.

    torchvision's detectors load with torchvision alone, ``strict=True``; query-based ones with transformers
    alone, ``AutoModelForObjectDetection.from_pretrained(FOLDER)``. The manifest says, module by module, what
    is pre-trained and what is new. With --format onnx, writes the fine-tuned detector as model.onnx, checked
    against PyTorch if onnxruntime is installed.

    Args:
        run: Folder of `aligndet pretrain`; for ONNX of `aligndet finetune`.
        output: Folder for model.safetensors (or model.onnx) and manifest.json, and for transformers
            config.json and preprocessor_config.json.
        num_classes: Object classes of the detector to be fine-tuned, without the background; a fine-tuned one
            has its own.
        format: "onnx" (FCOS, RetinaNet, Faster and Mask R-CNN); otherwise that of the detector,
            "torchvision" or "transformers".
        min_size: Short side for prediction, kept in the manifest; 800 by default. ONNX has fine-tuning's.
        max_size: Bound of the long side, likewise; 1333 by default.
        seed: Of the new layers.
        overwrite: Replace an export that is there.

    Returns:
        The output folder.

    Raises:
        ImportError: If onnx is not installed.
        ValueError: If the run holds no weights of this kind, the number of classes is missing, the detector
            is of another format, the output is taken, or onnxruntime finds other boxes than PyTorch.
    """
    if (output / "run.json").exists():
        raise ValueError(f"{output}: is the folder of a run; give another output")
    if format == "onnx":
        if (num_classes, min_size, max_size) != (None, None, None):
            raise ValueError(
                "--num-classes, --min-size, --max-size: are those of fine-tuning; leave them out for ONNX"
            )
        return _to_onnx(run, output, overwrite)
    if num_classes is None:
        raise ValueError(
            "--num-classes: give the number of object classes to be fine-tuned (a fine-tuned run is a whole"
            " detector already: RUN/model)"
        )
    check_bounds(locals())
    if any((output / name).exists() for name in ("model.safetensors", "model.onnx")) and not overwrite:
        raise ValueError(f"{output}: holds weights already; give --overwrite or another output")
    state, source = load_weights(run)
    if "num_classes" in source["architecture"]:
        raise ValueError(f"{run}: is a whole detector already; there is nothing to export but --format onnx")
    size = {"num_classes": num_classes, "min_size": min_size or 800, "max_size": max_size or 1333}
    architecture = {**source["architecture"], **size}
    own = family_of(architecture["detector"]).weights_format
    if format not in (None, own):
        raise ValueError(f"{run}: {architecture['detector']} is a detector of {own}, there is no {format}")
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


def _to_onnx(run: Path, output: Path, overwrite: bool) -> Path:
    path = output / "model.onnx"
    if (output / "model.safetensors").exists():
        raise ValueError(f"{output}: is the folder of a detector, whose manifest stays; give another output")
    if path.exists() and not overwrite:
        raise ValueError(f"{output}: holds a model already; give --overwrite or another output")
    detector, source = load_tuned(run)
    with locked(output):
        share = save_onnx(detector, path)
        kept = {name: source[name] for name in ("architecture", "class_names", "category_ids")}
        manifest = {"kind": "detector", "format": "onnx", **kept, "exported_from": str(run), **provenance()}
        atomic_write(output / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    checked = (
        "not checked: onnxruntime is not installed" if share is None else f"{share:.1%} of the boxes agree"
    )
    print(f"{path}: {checked}")
    return output
