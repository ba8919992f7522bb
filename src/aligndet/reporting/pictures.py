"""Predictions of two detectors on the same images."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from aligndet.comparison import BASELINE
from aligndet.data.images import list_images, read_image
from aligndet.detectors.weights import load_detector
from aligndet.evaluation.drawing import draw_detections
from aligndet.evaluation.inference import predict_images, resolve_device
from aligndet.reporting.runs import Comparison, Run

_SIDE = 480  # pixels of a picture on the page


@dataclass(frozen=True)
class Pictures:
    """Pictures of two sides, row by row the same image."""

    sides: tuple[str, str]
    rows: list[tuple[str, bytes, bytes]]  # file name, JPEGs


def sides_of(comparisons: list[Comparison], runs: list[Run]) -> list[tuple[str, Run]]:
    """Chooses the two detectors to be looked at.

    Args:
        comparisons: Of the first with two finished arms, scratch and the best other arm are taken, where
            labels and steps are the most, of the same seed and fold.
        runs: Else the first two with a detector.

    Returns:
        Title and run of each; fewer than two if there are none.
    """
    for comparison in comparisons:
        cells = [(entry, run) for entry, run in comparison.cells if run.model is not None]
        cells.sort(
            key=lambda cell: (cell[0]["labels"], cell[0]["steps"], cell[0]["figures"].get("AP") or 0.0)
        )
        for best, run in reversed(cells):
            if best["arm"] == BASELINE:
                continue
            for entry, scratch in cells:
                same = all(entry[k] == best[k] for k in ("fraction", "steps", "seed", "fold"))
                if same and entry["arm"] == BASELINE:
                    where = f"{best['labels']} labelled images, {best['steps']} steps, seed {best['seed']}"
                    return [(f"{BASELINE} ({where})", scratch), (f"{best['arm']} ({where})", run)]
    return [(run.name, run) for run in runs if run.model is not None][:2]


def draw_sides(sides: list[tuple[str, Run]], images: Path, *, count: int, score: float) -> Pictures:
    """Predicts and draws.

    Args:
        sides: Two, of `sides_of`.
        images: Folder; its first images by name are taken.
        count: Of images.
        score: Boxes below are left out.

    Raises:
        ValueError: Naming the folder without images, the broken image, or the weights that cannot be read.
    """
    names = list_images(images)[:count]
    pixels = [read_image(images / name) for name in names]
    drawn = []
    for _, run in sides:
        assert run.model is not None  # sides_of chooses finished runs
        detector, manifest = load_detector(run.model)
        found = predict_images(detector, pixels, device=resolve_device("cpu"), batch_size=1)
        pairs = zip(pixels, found, strict=True)
        classes = manifest["class_names"]
        drawn.append(
            [_jpeg(draw_detections(p.permute(1, 2, 0).numpy(), f, classes, score)) for p, f in pairs]
        )
    return Pictures((sides[0][0], sides[1][0]), list(zip(names, *drawn, strict=True)))


def _jpeg(array: object) -> bytes:
    image = Image.fromarray(array)  # type: ignore[arg-type]
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
