"""torchvision's detectors as ONNX files: resizing, normalisation and suppression of overlaps are in them."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet

from aligndet.files import whole_path

_KINDS = (FCOS, RetinaNet, FasterRCNN, MaskRCNN)
_SIZE = (3, 240, 320)  # of the image that the detector is traced with
_OPSET = 17
_SAME = 0.99  # share of boxes that must be found again; ties in the order of suppression may fall either way


def save_onnx(detector: nn.Module, path: Path) -> float | None:
    """Writes a detector that takes one image, (3, H, W) in [0, 1] of any size, and gives boxes (n, 4) xyxy
    pixels, scores (n,), labels (n,) from 1, and masks (n, 1, H, W) if it finds them.

    Args:
        detector: Of torchvision.
        path: Of the file; it appears whole or not at all.

    Returns:
        The share of boxes on two images that onnxruntime finds as PyTorch does, or None if it is not
        installed.

    Raises:
        ImportError: If onnx is not installed.
        ValueError: If the detector is none of torchvision's own, or onnxruntime finds other boxes.
    """
    if type(detector) not in _KINDS:
        kinds = ", ".join(kind.__name__ for kind in _KINDS)
        raise ValueError(f"{type(detector).__name__} cannot be written as ONNX; these can: {kinds}")
    if find_spec("onnx") is None:
        raise ImportError('ONNX files need onnx: pip install "aligndet[onnx]"')
    detector = detector.cpu().eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(_SIZE, generator=generator)
    with torch.no_grad():
        names = list(detector([image])[0])
    with whole_path(path) as partial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a tracer that sees Python's numbers
            torch.onnx.export(
                detector,
                ([image],),
                str(partial),
                dynamo=False,  # the newer exporter does not follow boxes whose number depends on the image
                opset_version=_OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "boxes"} for name in names}},
            )
        share = None
        if find_spec("onnxruntime") is not None:
            others = torch.rand((3, 200, 170), generator=generator)  # another size than the traced one
            share = min(_share_of_same(detector, partial, names, x) for x in (image, others))
            if share < _SAME:
                raise ValueError(f"{path}: onnxruntime finds {100 * share:.0f} % of PyTorch's boxes only")
    return share


def _share_of_same(detector: nn.Module, path: Path, names: list[str], image: Tensor) -> float:
    """The share of boxes that the other one has as well, at the same place and with the same label and score:
    the lower of both shares.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = session.run(names, {"image": image.numpy()})
    found = {name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, values, strict=True)}
    with torch.no_grad():
        expected = detector([image])[0]
    if not len(expected["boxes"]) or not len(found["boxes"]):
        return float(len(expected["boxes"]) == len(found["boxes"]))
    same = torch.cdist(expected["boxes"], found["boxes"], p=torch.inf) < 1  # pixel
    same &= expected["labels"][:, None] == found["labels"]
    same &= (expected["scores"][:, None] - found["scores"]).abs() < 1e-3
    return min(float(same.any(dim).float().mean()) for dim in (0, 1))
