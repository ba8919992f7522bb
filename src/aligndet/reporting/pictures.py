"""Pictures of a report: predictions of two detectors on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torchvision.transforms import v2

from aligndet.comparison import BASELINE
from aligndet.data.coco import CocoDataset
from aligndet.data.images import first_images
from aligndet.detectors.weights import load_detector
from aligndet.evaluation.drawing import draw_detections, draw_labelled, to_jpeg
from aligndet.evaluation.inference import predict_images, resolve_device
from aligndet.reporting.runs import Comparison, Run

_SIDE = 400  # pixels of a picture's long side
_SUREST = 10  # boxes of an image; more would hide it


@dataclass(frozen=True)
class Pictures:
    """Pictures row by row, each row the same image, each column a side."""

    name: str  # of their files, without number and suffix
    title: str
    note: str  # what one sees
    sides: tuple[str, ...]
    rows: list[tuple[str, tuple[bytes, ...]]]  # file name of the image, JPEGs


def sides_of(comparison: Comparison) -> list[tuple[str, Run]]:
    """Chooses the two detectors to be looked at: scratch and the best other arm with the most labels and
    steps, of the same seed and fold.

    Args:
        comparison: Whose cells may be finished in part.

    Returns:
        Title and run of each; none if no such pair is finished.
    """
    cells = [(entry, run) for entry, run in comparison.cells if run.model is not None]
    cells.sort(key=lambda cell: (cell[0]["labels"], cell[0]["steps"], cell[0]["figures"].get("AP") or 0.0))
    for best, run in reversed(cells):
        if best["arm"] == BASELINE:
            continue
        for entry, scratch in cells:
            same = all(entry[k] == best[k] for k in ("fraction", "steps", "seed", "fold"))
            if same and entry["arm"] == BASELINE:
                return [(BASELINE, scratch), (best["arm"], run)]
    return []


def draw_sides(
    name: str,
    sides: list[tuple[str, Run]],
    images: Path,
    labelled: CocoDataset | None,
    *,
    count: int,
    score: float,
) -> Pictures:
    """Predicts and draws.

    Args:
        name: Of the files.
        sides: Title and run of each, with a detector.
        images: Folder; its first images by name are taken.
        labelled: If any of the images is in it, its labels become a side, too.
        count: Of images.
        score: Boxes below are left out.

    Raises:
        ValueError: Naming the folder without images, the broken image, or the weights that cannot be read.
    """
    names, pixels = zip(*first_images(images, count), strict=True)
    fitted = [fit(image) for image in pixels]
    columns = {}
    if labelled is not None and (drawn := _draw_labels([images / name for name in names], fitted, labelled)):
        columns["labels"] = drawn
    for title, run in sides:
        assert run.model is not None
        detector, manifest = load_detector(run.model)
        columns[title] = []
        shown = zip(pixels, fitted, strict=True)
        found = predict_images(detector, shown, device=resolve_device("auto"), batch_size=1)
        for (_, (image, scale)), prediction in found:
            surest = {key: prediction[key][:_SUREST] for key in ("boxes", "labels", "scores")}
            surest["boxes"] = surest["boxes"] * scale
            columns[title].append(to_jpeg(draw_detections(image, surest, manifest["class_names"], score)))
    note = f"Boxes from score {score:g}, at most the {_SUREST} surest of an image."
    rows = list(zip(names, zip(*columns.values(), strict=True), strict=True))
    return Pictures(name, "Predictions on the same images", note, tuple(columns), rows)


def _draw_labels(
    files: list[Path], fitted: list[tuple[npt.NDArray[np.uint8], float]], labelled: CocoDataset
) -> list[bytes]:
    """What people have drawn; images that are not among the labelled stay as they are; none if all do."""
    places = {(labelled.folder / name).resolve(): place for place, name in enumerate(labelled.file_names)}
    classes = [category.name for category in labelled.categories]
    found = [places.get(file.resolve()) for file in files]
    drawn = []
    for place, (image, scale) in zip(found, fitted, strict=True):
        if place is not None:
            image = draw_labelled(image, labelled.boxes[place] * scale, labelled.labels[place], classes)
        drawn.append(to_jpeg(image))
    return drawn if any(place is not None for place in found) else []


def fit(image: Tensor) -> tuple[npt.NDArray[np.uint8], float]:
    """Makes an image as large as it is shown, so that lines and letters are the same in all.

    Args:
        image: (3, H, W) uint8.

    Returns:
        (h, w, 3), and how many of its pixels one was.
    """
    height, width = image.shape[1:]
    scale = _SIDE / max(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    return v2.functional.resize(image, size).permute(1, 2, 0).numpy(), scale
